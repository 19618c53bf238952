"""The output head and its loss: rewritten, as accurate, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes.fuse_linear_cross_entropy import FuseLinearCrossEntropy
from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import run_optimized, targets
from tests.passes.rewriting import DTYPES, leaf, near_misses, proven


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype, reduction):
    def loss(hidden, weight, labels):
        logits = F.linear(hidden, weight).float().view(-1, 61)
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction=reduction)

    torch.manual_seed(0)
    hidden, weight = leaf(3, 7, 32, dtype=dtype), leaf(61, 32, dtype=dtype)
    labels = torch.randint(0, 61, (21,))
    labels[::3] = -100
    graph, fused = run_optimized(EXACT, loss, hidden, weight, labels)
    assert targets(graph)[-1] == "linear_cross_entropy"
    plain = loss(hidden, weight, labels)
    wide = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    exact = F.cross_entropy(F.linear(*wide).view(-1, 61), labels, reduction=reduction)
    assert (fused - exact).abs() <= 1.1 * (plain - exact).abs() + 2 * torch.finfo(torch.float32).eps * exact.abs()
    for g, e, t in zip(
        torch.autograd.grad(fused, [hidden, weight]),
        torch.autograd.grad(plain, [hidden, weight]),
        torch.autograd.grad(exact, wide),
        strict=True,
    ):
        rounding = torch.finfo(dtype).eps / 2 * t.abs().max()
        assert (g - t).abs().max() <= 1.1 * (e - t).abs().max() + rounding


def test_linear_cross_entropy_declines_probabilities_as_labels():
    def loss(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float().view(-1, 61), labels)

    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(61, 32, dtype=torch.bfloat16), torch.rand(21, 61)
    (miss,) = near_misses(loss, *inputs)
    assert "not one class" in miss.reason


def test_linear_cross_entropy_declines_float16():
    def loss(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float().view(-1, 61), labels)

    inputs = leaf(3, 7, 32, dtype=torch.float16), leaf(61, 32, dtype=torch.float16), torch.randint(0, 61, (21,))
    (miss,) = near_misses(loss, *inputs)
    assert "float16" in miss.reason


def loss_of(logits, labels, **options):
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels, **options)


def nll_of(rows, labels):
    return F.nll_loss(torch.log_softmax(rows, -1), labels)


def with_z_loss(logits, labels):
    rows = logits.float().view(-1, logits.shape[-1])
    counts = labels != -100
    z_loss = (torch.logsumexp(rows, dim=-1) ** 2 * counts).sum() / counts.sum()
    return F.cross_entropy(rows, labels) + 1e-4 * z_loss


LOSSES = {
    "with z-loss": lambda h, w, labels: with_z_loss(F.linear(h, w), labels),
    "scaled": lambda h, w, labels: loss_of(F.linear(h, w) * 0.0625, labels),
    "divided": lambda h, w, labels: loss_of(F.linear(h, w) / 13.0, labels),
    "soft-capped": lambda h, w, labels: loss_of(torch.tanh(F.linear(h, w) / 30.0) * 30.0, labels),
    "soft-capped in float32": lambda h, w, labels: loss_of(15.0 * F.tanh(F.linear(h, w).float() / 15.0), labels),
    "smoothed": lambda h, w, labels: loss_of(F.linear(h, w), labels, label_smoothing=0.1),
    "shifted": lambda h, w, labels: loss_of(F.linear(h, w)[..., :-1, :].contiguous(), labels[3:]),
    "contiguous": lambda h, w, labels: loss_of(F.linear(h, w).contiguous(), labels),
    "cast, then shifted": lambda h, w, labels: loss_of(F.linear(h, w).float()[..., :-1, :].contiguous(), labels[3:]),
    "shifted, then cast": lambda h, w, labels: loss_of(F.linear(h, w)[:, :-1, :].contiguous().float(), labels[3:]),
    "cast last": lambda h, w, labels: F.cross_entropy(F.linear(h, w)[:, :-1].reshape(-1, 61).float(), labels[3:]),
    "flattened": lambda h, w, labels: F.cross_entropy(F.linear(h, w).flatten(0, 1).float(), labels),
    "of rows": lambda h, w, labels: F.cross_entropy(F.linear(h.view(-1, 32), w).float(), labels),
    "classes second": lambda h, w, labels: F.cross_entropy(F.linear(h, w).transpose(1, 2), labels.view(3, 7)),
    "permuted": lambda h, w, labels: F.cross_entropy(F.linear(h, w).float().permute(0, 2, 1), labels.view(3, 7)),
    "a product with w.t()": lambda h, w, labels: loss_of(torch.matmul(h, w.t()), labels),
    "a product with w.T": lambda h, w, labels: loss_of(h @ w.T, labels),
    "in two steps": lambda h, w, labels: F.nll_loss(F.log_softmax(F.linear(h, w).float(), dim=-1).view(-1, 61), labels),
    "in two steps, of rows": lambda h, w, labels: nll_of(F.linear(h, w).view(-1, 61).float(), labels),
    "in the dtype of the logits": lambda h, w, labels: F.cross_entropy(F.linear(h, w).view(-1, 61), labels),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [4, 9, 64])
def test_the_loss_of_a_frozen_body_is_proven(length, dtype):
    """NaN in a row without a label shows in eager gradients of the head, and not in ours: such rows prove nothing."""
    labels = torch.randint(0, 61, (2 * length,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    hidden = torch.randn(2, length, 16).to(dtype)
    assert proven(lambda h, w, labels: loss_of(F.linear(h, w), labels), hidden, leaf(61, 16, dtype=dtype), labels)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_every_kind(kind, dtype):
    torch.manual_seed(0)
    labels = torch.randint(0, 61, (21,))
    labels[::3] = -100
    graph, ops = proven(LOSSES[kind], leaf(3, 7, 32, dtype=dtype), leaf(61, 32, dtype=dtype), labels)
    assert ops[-1] == "linear_cross_entropy"
    assert not {"tanh", "linear", "cross_entropy"} & set(targets(graph))


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda h, w, labels: loss_of(F.linear(h, w) * h.mean(), labels), "scale of the logits is not a number"),
        (lambda h, w, labels: loss_of(F.linear(h, w) * -1.0, labels), "scale of the logits is -1.0"),
        (lambda h, w, labels: loss_of(torch.sin(F.linear(h, w)), labels), "`sin`"),
        (lambda h, w, labels: (loss_of(z := F.linear(h, w), labels), z.argmax(-1)), "also used by"),
    ],
)
def test_losses_that_stay_have_a_reason(loss, reason):
    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(61, 32, dtype=torch.bfloat16), torch.randint(0, 61, (21,))
    (miss,) = near_misses(loss, *inputs)
    assert reason in miss.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_that_something_is_added_to_afterwards(dtype):
    """As mixtures of experts add the loss of their routers: `loss += …`."""
    labels = torch.tensor([1, 4, -100, 0])

    def function(hidden, weight):
        logits = F.linear(hidden, weight).float()
        loss = F.cross_entropy(logits.view(-1, 30), labels, ignore_index=-100)
        loss += 0.1 * hidden.float().square().mean()
        return loss

    inputs = leaf(4, 8, dtype=dtype), leaf(30, 8, dtype=dtype)
    graph, found = run_optimized(EXACT, function, *inputs)
    assert "linear_cross_entropy" in targets(graph)
    expected = function(*inputs)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (found, expected))
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-3)


def test_a_loss_that_is_written_to_and_read_before_stays():
    labels = torch.tensor([1, 4, -100, 0])

    def function(hidden, weight):
        hidden = hidden * 1.0
        loss = F.cross_entropy(F.linear(hidden, weight).float().view(-1, 30), labels, ignore_index=-100)
        hidden += 1.0
        return loss, hidden

    (miss,) = near_misses(function, leaf(4, 8, dtype=torch.float32), leaf(30, 8, dtype=torch.float32))
    assert "`hidden" in miss.reason and "is written to in place after it is read" in miss.reason


def test_samples_for_the_proof_always_have_a_label():
    """Of three, all were ignored once: the loss was NaN on both sides, and a right rewrite was refused."""
    some_ignored, _ = FuseLinearCrossEntropy.examples(-100, torch.empty(61, 32))["labels"]
    for seed in range(200):
        labels = some_ignored((3,), torch.int64, torch.Generator().manual_seed(seed))
        assert (labels != -100).any()
