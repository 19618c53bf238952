"""Models whose code is not transformers' train as before, and the report says what of them was not optimized."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fxopt
from fxopt.rewrite.pipeline import Pipeline, simple_pass
from tests.foreign_models import LAYERS, VOCABULARY, WIDTH, NanoGPT, RemoteConfig, RemoteModel, tokens


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_nanogpt_trains_alike(policy):
    torch.manual_seed(0)
    model = fxopt.optimize(NanoGPT(), policy)
    batches = [{"idx": tokens(seed=seed), "targets": tokens(seed=seed).roll(-1, 1)} for seed in range(3)]
    batches[0]["targets"][:, :5] = -1
    outcome = fxopt.verify(model, *batches)
    assert outcome.holds, outcome.failures
    report = fxopt.report(model)
    hits = {"layer_norm": 5, "add_layer_norm": 4, "linear_cross_entropy": 1}  # its logits wait, in a tuple too
    hits |= {"embedding": 2} if policy == "bf16" else {}
    assert report.hits == hits and not report.fallbacks


def test_nanogpt_takes_its_arguments_by_position():
    torch.manual_seed(0)
    model = fxopt.optimize(NanoGPT(), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    idx = tokens()
    for arguments in ((idx, idx), (idx,)):
        (logits, loss), (expected_logits, expected_loss) = model(*arguments), plain(*arguments)
        torch.testing.assert_close(logits, expected_logits)
        assert (loss is None) == (expected_loss is None)
    assert fxopt.report(model).optimized == {"": 2} and not fxopt.report(model).uncovered


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_custom_loss_trains_alike(policy):
    torch.manual_seed(0)
    model = fxopt.optimize(RemoteModel(RemoteConfig()), policy)
    outcome = fxopt.verify(model, *({"input_ids": tokens(seed=s), "labels": tokens(seed=s)} for s in range(3)))
    assert outcome.holds, outcome.failures
    report = fxopt.report(model)
    assert report.hits["swiglu"] == 1 and "linear_cross_entropy" not in report.hits
    assert any("FuseLinearCrossEntropy" in miss.rule for miss in report.near_misses)
    assert any("foreign_models.py" in graph_break for graph_break in report.graph_breaks)
    assert model.calls == 0  # verify gives it back
    model(input_ids=tokens(), labels=tokens())
    assert model.calls == 1


class Watching(nn.Module):
    """Looks at a value in the middle of its forward, which breaks a graph."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x, labels):
        h = F.silu(self.first(x)) * x
        if (h > 1e6).any():
            raise FloatingPointError
        return h, F.cross_entropy(self.last(F.silu(h) * x), labels)


def test_graph_breaks_are_named_and_both_sides_are_optimized():
    model = fxopt.optimize(Watching(), "fp32")
    model(torch.randn(5, 8), torch.zeros(5, dtype=torch.int64))[1].backward()
    report = fxopt.report(model)
    (graph_break,) = report.graph_breaks
    assert graph_break.startswith("test_foreign_models.py:") and graph_break in str(report)
    assert report.to_dict()["graph_breaks"] == report.graph_breaks
    assert report.hits["swiglu"] == 2 and len(report.graphs) == 2


class WatchingTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Watching() for _ in range(2))

    def forward(self, x, labels):
        for layer in self.layers:
            x, loss = layer(x, labels)
        return x, loss


@torch._dynamo.config.patch(recompile_limit=2)
def test_models_of_one_class_do_not_use_up_each_others_cache():
    """Where a graph breaks, Dynamo's cache belongs to code that they share."""
    models = [fxopt.optimize(WatchingTwice(), "fp32") for _ in range(4)]
    for model in models:
        for _ in range(2):
            model(torch.randn(5, 8), torch.zeros(5, dtype=torch.int64))[1].backward()
        report = fxopt.report(model)
        assert report.hits["swiglu"] == 4 and not report.fallbacks  # two layers, which run the same graphs


@pytest.mark.parametrize("kind", [NanoGPT, WatchingTwice])
def test_a_model_that_nobody_holds_is_freed(kind):
    model = fxopt.optimize(kind(), "fp32")
    call = (tokens(), tokens()) if kind is NanoGPT else (torch.randn(5, 8), torch.zeros(5, dtype=torch.int64))
    model(*call)[1].backward()
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


class Counting(nn.Module):
    """Has sizes that depend on data, and in `hard` uses one where Dynamo must know it."""

    def __init__(self, hard: bool):
        super().__init__()
        self.hard, self.linear = hard, nn.Linear(8, 11)

    def forward(self, x, labels):
        rows = (labels > 0).nonzero().squeeze(1)
        h = F.silu(x) * x
        if self.hard and rows.shape[0] > 2:
            h = h + rows.shape[0]
        return h, F.cross_entropy(self.linear(h)[rows], labels[rows])


@pytest.mark.parametrize("hard", [False, True])
def test_sizes_that_depend_on_data(hard):
    torch.manual_seed(0)
    model = fxopt.optimize(Counting(hard), "fp32")
    outcome = fxopt.verify(model, *({"x": torch.randn(5, 8), "labels": torch.randint(0, 11, (5,))} for _ in range(3)))
    assert outcome.holds, outcome.failures
    report = fxopt.report(model)
    assert report.hits["swiglu"] == 1 and not report.fallbacks
    assert bool(report.graph_breaks) == hard


class Unusual(nn.Module):
    """Takes what transformers' models never do: None beside another default, a mask of ones, anything by name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 11)

    def forward(self, x, labels, scale=2.0, attention_mask=None, **options):
        h = self.linear(x) * (1.0 if scale is None else scale) + (0.0 if attention_mask is None else 1.0)
        return F.silu(h) * h + len(options), F.cross_entropy(h, labels)


def test_calls_of_other_models_are_captured_as_they_are():
    torch.manual_seed(0)
    model = fxopt.optimize(Unusual(), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    x, labels = torch.randn(5, 8), torch.zeros(5, dtype=torch.int64)
    for options in ({}, {"scale": None}, {"attention_mask": torch.ones(5, 8)}, {"anything": 1}):
        torch.testing.assert_close(model(x, labels, **options), plain(x, labels, **options))
    assert not fxopt.report(model).fallbacks


class Stateful(nn.Module):
    """Counts its calls, drops out, and breaks its graph before the loss."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout, self.calls = nn.Linear(8, 11), nn.Dropout(0.5), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, labels):
        self.seen += 1
        self.calls += 1
        h = self.dropout(self.linear(x))
        if (h > 1e6).any():
            raise FloatingPointError
        return h, F.cross_entropy(h, labels)


def refuse_losses(graph):
    if graph.find_nodes(op="call_function", target=F.cross_entropy):
        raise RuntimeError("no losses here")


REFUSING = Pipeline((simple_pass("refuse_losses", refuse_losses),))


def test_a_first_call_that_fails_leaves_nothing_behind():
    model = fxopt.optimize(Stateful(), "fp32", pipeline=REFUSING)
    plain = fxopt.restore(copy.deepcopy(model))
    x, labels = torch.randn(5, 8), torch.zeros(5, dtype=torch.int64)
    for _ in range(2):
        found, expected = [], []
        for each, results in ((model, found), (plain, expected)):
            torch.manual_seed(0)
            results += [each(x, labels)[1], each.seen.clone(), torch.tensor(each.calls), torch.rand(1)]
        torch.testing.assert_close(found, expected)
    assert any("no losses here" in reason for reason in fxopt.report(model).fallbacks)


def test_verify_says_so_where_there_is_nothing_to_verify():
    model = fxopt.optimize(Stateful(), "fp32", pipeline=REFUSING)
    with pytest.raises(ValueError, match=r"nothing to verify: the call fell back .*no losses here"):
        fxopt.verify(model, {"x": torch.randn(5, 8), "labels": torch.zeros(5, dtype=torch.int64)})
    assert model.seen == 0 and model.calls == 0
    with pytest.raises(ValueError, match="at least one batch"):
        fxopt.verify(model)


class Opaque(nn.Module):
    """Dynamo gives up on it without an error."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 11)

    def forward(self, x, labels):
        if torch.compiler.is_compiling():
            raise RuntimeError("not here")
        return F.cross_entropy(self.linear(x), labels)


def test_a_call_without_a_graph_is_said_to_have_none():
    model = fxopt.optimize(Opaque(), "fp32")
    for _ in range(2):
        model(torch.randn(5, 8), torch.zeros(5, dtype=torch.int64)).backward()
    assert fxopt.report(model).fallbacks == {"Dynamo captured no graph": 2}


def test_verify_compares_with_the_forward_that_was_replaced():
    torch.manual_seed(0)
    model = NanoGPT()
    original = model.forward
    model.forward = lambda idx, targets: (None, 3 * original(idx, targets)[1])
    outcome = fxopt.verify(fxopt.optimize(model, "fp32"), {"idx": tokens(), "targets": tokens()})
    assert abs(outcome.loss_exact - outcome.loss_original) < 1e-5 * outcome.loss_exact


class CountsItsCalls(NanoGPT):
    """A number that its code reads is another in each call: Dynamo captures it anew until it gives up."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, idx, targets=None):
        self.calls += 1
        if self.calls % 3 == 0:
            idx = idx.clone()
        return super().forward(idx, targets)


@torch._dynamo.config.patch(accumulated_recompile_limit=8)
def test_calls_that_dynamo_gives_up_on_are_reported():
    model = fxopt.optimize(CountsItsCalls(), "fp32", prove=False)
    plain = fxopt.restore(copy.deepcopy(model))
    for _ in range(12):
        assert model(tokens(), tokens())[1].item() == pytest.approx(plain(tokens(), tokens())[1].item(), rel=1e-6)
    ((reason, count),) = fxopt.report(model).fallbacks.items()
    assert "captured this call too often" in reason and 0 < count < 12
    assert str(count) in str(fxopt.report(model))


class Checkpointed(NanoGPT):
    """Asks for activation checkpoints itself, as research code does, around blocks that calculate in float32."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant
        for block in self.blocks:
            block.ln_1, block.ln_2 = LlamaRMSNorm(WIDTH), LlamaRMSNorm(WIDTH)

    def forward(self, idx, targets):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        logits = self.head(self.ln_f(x))
        return logits, F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.view(-1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_the_models_own_are_verified(reentrant):
    model = fxopt.optimize(Checkpointed(reentrant), "bf16")
    outcome = fxopt.verify(model, *({"idx": tokens(seed=s), "targets": tokens(seed=s + 9)} for s in range(3)))
    assert outcome.holds, outcome.failures
    assert fxopt.report(model).hits["rms_norm"] == 2 * LAYERS


class Restrided(nn.Module):
    """Takes results for as contiguous as they are in eager code: `view` where a rewrite may lie otherwise in memory."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        angles = torch.randn(17, 8)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, input_ids, labels):
        x = self.tokens(input_ids)
        rows, length, width = x.shape
        if self.kind == "rotated":
            q = x.view(rows, length, 4, 16).transpose(1, 2)
            a, b = q[..., :8], q[..., 8:]
            q = torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)
            x = q.view(rows * 4, length, 16).view(rows, 4, length, 16).transpose(1, 2).reshape(rows, length, width)
        elif self.kind == "rotated before a checkpoint":
            q = x.view(rows, length, 4, 16).transpose(1, 2)
            a, b = q[..., :8], q[..., 8:]
            q = torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)
            x = checkpoint(lambda q: q.view(rows * 4, length, 16).sin(), q, use_reentrant=False)
            x = x.view(rows, 4, length, 16).transpose(1, 2).reshape(rows, length, width)
        elif self.kind == "normed":
            y = x.transpose(0, 1)
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
            x = y.transpose(0, 1).view(rows * length, width).view(rows, length, width)
        logits = self.head(x)
        if self.kind == "length first":
            logits, labels = logits.transpose(0, 1), labels.t()
        return F.cross_entropy(logits.reshape(-1, VOCABULARY).float(), labels.reshape(-1)), logits


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "op"),
    [("rotated", "rope"), ("rotated before a checkpoint", "rope"), ("normed", "rms_norm"), ("length first", None)],
)
def test_views_fit_what_takes_the_place_of_other_results(kind, op, policy):
    model = fxopt.optimize(Restrided(kind), policy)
    outcome = fxopt.verify(model, *({"input_ids": tokens(seed=s), "labels": tokens(seed=s + 9)} for s in range(3)))
    report = fxopt.report(model)
    assert outcome.holds and not report.fallbacks
    assert op is None or report.hits[op] == 1
