"""Casts in the eager model: islands, parameters seen in another dtype, and nothing left behind."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from fxopt.float64 import float64_copy, float64_throughout
from fxopt.precision.annotate import annotate
from fxopt.precision.boundaries import cast_stochastically, new_noise, still_noise
from fxopt.precision.policy import Policy, Selector
from fxopt.precision.presets import policies
from tests.accuracy import assert_as_accurate

FP32, BF16 = torch.float32, torch.bfloat16
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
                       attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
    "qwen3_moe": Qwen3MoeConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=96, head_dim=8,
                                num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4,
                                num_experts_per_tok=2),
    "mamba": MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=96),
}  # fmt: skip


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=FP32)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("policy", ["mixed", "mixed-stochastic", "bf16", "bf16-islands", "int8", "fp8"])
@pytest.mark.parametrize("kind", ["llama", *CONFIGS])
@pytest.mark.filterwarnings("ignore:policy")
def test_every_preset_trains_copies_and_generates(
    kind: str, policy: str, llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    model = llama if kind == "llama" else build(kind)
    keys = list(model.state_dict())
    annotate(model, policy, emulate=True)
    assert list(model.state_dict()) == keys
    loss_of(model, tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.fxopt_precision.gradient, name
    assert model.eval().generate(tokens, max_new_tokens=2, min_new_tokens=2).shape == (2, 14)
    logits = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, logits)
        assert next(twin.parameters()) is not next(model.parameters())


def plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return annotate(copy.deepcopy(model), "fp32" if dtype == FP32 else "bf16")  # type: ignore[return-value]


@pytest.mark.parametrize("policy", ["mixed", "bf16-islands"])
def test_as_accurate_as_plain_eager_code(policy: str, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """Against float64 with the stored values; "mixed" beside autocast, "bf16-islands" beside plain bf16."""
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    eager = plain(llama, FP32 if policy == "mixed" else BF16)
    if policy == "bf16-islands":  # the norms' values have two bytes on both sides
        llama = plain(llama, BF16)
    annotate(llama, policy)
    truth_model = float64_copy(llama)
    with float64_throughout():
        truth = truth_model(tokens).logits
    with torch.autocast("cpu", BF16, enabled=policy == "mixed"):
        reference = eager(tokens).logits.to(BF16)
    assert_as_accurate(llama(tokens).logits, reference, truth)


def test_mixed_gradients_are_float32_and_finer_than_bfloat16(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    exact = copy.deepcopy(llama)
    loss_of(exact, tokens).backward()
    annotate(llama, "mixed")
    loss_of(llama, tokens).backward()
    for (name, parameter), truth in zip(llama.named_parameters(), exact.parameters(), strict=True):
        error = (parameter.grad - truth.grad).norm() / truth.grad.norm()
        assert parameter.dtype == parameter.grad.dtype == FP32 and error < 0.02, name
    norm = llama.model.norm.weight.grad
    assert not torch.equal(norm, norm.to(BF16).float())


def test_the_parameter_is_itself_outside_of_the_forward(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    parameters = dict(llama.named_parameters())
    annotate(llama, "mixed")
    layer = llama.model.layers[0].mlp.up_proj
    assert isinstance(layer, nn.Linear) and type(layer) is nn.Linear
    assert layer.weight is parameters["model.layers.0.mlp.up_proj.weight"]
    before = llama.eval()(tokens).logits
    with torch.no_grad():
        layer.weight.mul_(2)  # as adapters are merged
    assert not torch.equal(llama(tokens).logits, before)
    assert "weight" not in vars(layer)
    llama.tie_weights()
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_a_forward_that_fails_gives_its_parameters_back(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    annotate(llama, "mixed")
    good = llama.eval()(tokens).logits
    with pytest.raises(RuntimeError):
        llama.model.layers[0].mlp.up_proj(torch.randn(2, 7))
    assert llama.model.layers[0].mlp.up_proj.weight.dtype == FP32
    assert torch.equal(llama(tokens).logits, good)


@pytest.mark.parametrize("policy", list(policies()))
def test_annotating_again_undoes_it(policy: str, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    parameters, keys = list(llama.parameters()), set(vars(llama.lm_head))
    annotate(llama, policy, emulate=True)
    loss_of(llama, tokens).backward()
    annotate(llama, "bf16")
    assert hooks(llama) == 0 and set(vars(llama.lm_head)) == keys
    assert {type(m) for m in llama.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert all(new is old for new, old in zip(llama.parameters(), parameters, strict=True))
    assert {(type(p), p.dtype, p.grad.dtype) for p in llama.parameters()} == {(nn.Parameter, BF16, BF16)}
    fresh = plain(LlamaForCausalLM(llama.config), BF16)
    fresh.load_state_dict(llama.state_dict())
    assert torch.equal(fresh(tokens).logits, llama(tokens).logits)


def test_modules_of_a_group_can_be_an_island(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    policy = Policy.named("bf16").with_selectors(Selector(name="model.layers.0.*", storage=FP32, compute=FP32))
    seen: dict[str, torch.dtype] = {}
    annotate(llama, policy)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        module = llama.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].dtype}))
    loss_of(llama, tokens).backward()
    assert list(seen.values()) == [FP32, BF16]


@pytest.mark.parametrize("tied", [True, False])
def test_a_float32_head_gives_float32_logits(tied: bool, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    llama.config.tie_word_embeddings = tied
    model = LlamaForCausalLM(llama.config)
    role = "embedding" if tied else "output_head"
    annotate(model, Policy.named("bf16").with_selectors(Selector(role=role, storage=FP32, compute=FP32)))
    assert model(tokens).logits.dtype == model.lm_head.weight.dtype == FP32
    assert model.model.embed_tokens(tokens).dtype == BF16


class Reader(nn.Module):
    """Reads what belongs to its children, in a method that its forward calls; owns a parameter; ties by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(96, 16)
        self.shift = nn.Parameter(torch.zeros(16))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        return self._project(self.tokens(ids) + self.shift)

    def _project(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + F.linear(x, layer.weight, layer.bias)
        return F.linear(x, self.tokens.weight)


def test_what_reads_another_modules_parameter_sees_the_cast(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Reader())
    truth = model(tokens)
    annotate(model, "mixed")
    found = model(tokens)
    assert found.dtype == BF16 and (found - truth).norm() < 0.02 * truth.norm()
    found.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {FP32}
    assert model[0].tokens.weight.dtype == model[0].layers[0].weight.dtype == FP32


class Composite(nn.Module):
    """Owns a parameter and modules that own some: a float32 island around a bfloat16 layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor, *, gate: Tensor) -> dict[str, Any]:
        return {"out": self.inner(x * self.scale * gate), "kept": [x, (gate,)], "count": torch.tensor(3)}


def test_keyword_arguments_and_nested_outputs_are_cast() -> None:
    policy = Policy.named("bf16").with_selectors(Selector(name="*.scale", storage=FP32, compute=FP32))
    model = annotate(nn.Sequential(Composite()), policy)
    outputs = model[0](torch.randn(3, 16, dtype=BF16), gate=torch.randn(16, dtype=BF16))
    assert outputs["out"].dtype == outputs["kept"][0].dtype == outputs["kept"][1][0].dtype == BF16
    assert outputs["count"].dtype == torch.int64
    assert model[0].scale.dtype == FP32 and model[0].inner.weight.dtype == BF16


def test_dynamo_traces_one_graph(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    annotate(llama, "mixed")
    expected = loss_of(llama, tokens)
    compiled = torch.compile(lambda ids: loss_of(llama, ids), backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens), expected)
    assert llama.lm_head.weight.dtype == FP32


# Stochastic casts ----------------------------------------------------------------------------------------------------


def test_a_stochastic_cast_is_right_on_average_and_lets_the_gradient_through() -> None:
    step = 2.0**-7
    value = torch.full((100_000,), 1 + 0.3 * step, requires_grad=True)
    torch.manual_seed(0)
    cast = cast_stochastically(value, BF16, new_noise(value))
    assert cast.unique().tolist() == [1.0, 1 + step]
    assert abs((cast.double().mean().item() - 1) / step - 0.3) < 0.01
    cast.sum().backward()
    assert value.grad is not None and value.grad.dtype == FP32 and (value.grad == 1).all()
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -1.5])
    cast = cast_stochastically(special, BF16, new_noise(special))
    assert torch.equal(cast.nan_to_num(9), special.to(BF16).nan_to_num(9))


def test_stochastic_noise_is_new_each_step_and_repeatable(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    annotate(llama, "mixed-stochastic").train()

    def two_steps() -> list[Tensor]:
        torch.manual_seed(3)
        return [llama(tokens).logits for _ in range(2)]

    first, again = two_steps(), two_steps()
    assert not torch.equal(*first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    llama.eval()
    assert torch.equal(*two_steps())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_again_with_the_same_noise(
    reentrant: bool, llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    annotate(llama, "mixed-stochastic").train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
        llama.zero_grad()
        torch.manual_seed(3)
        loss_of(llama, tokens).backward()
        found.append([parameter.grad for parameter in llama.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_stochastic_cast_has_no_dead_zone() -> None:
    """A float32 weight a tenth of a step above bfloat16's grid shows in the average of what is computed."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1 + 0.1 * 2**-7)
    torch.manual_seed(0)
    x = torch.ones(1, 1)
    nearest = annotate(model, "mixed")(x).item()
    annotate(model, "mixed-stochastic")
    mean = torch.stack([model(x).double() for _ in range(3000)]).mean().item()
    assert nearest == 1.0 and abs((mean - 1) * 2**7 - 0.1) < 0.02


@pytest.mark.parametrize("shape", [(), (50_000,), (300, 200), (64, 30, 40)])
def test_evaluation_sees_what_float32_weights_have_learned(shape: tuple[int, ...]) -> None:
    """The same at each call, and right on average over every row, column and block of weights."""
    noise = still_noise(torch.Size(shape), torch.device("cpu"))
    assert torch.equal(noise, still_noise(torch.Size(shape), torch.device("cpu")))
    assert noise.shape == shape and noise.dtype == torch.int32 and noise.min() >= 0 and noise.max() < 1 << 16
    if not shape:
        assert noise == 1 << 15  # to the nearest
        return
    assert noise.view(-1)[0] == 1 << 15
    weight = torch.full(shape, 1 + 0.1 * 2**-7)
    moved = (cast_stochastically(weight, BF16, noise).float() - 1) * 2**7
    assert moved.mean().item() == pytest.approx(0.1, abs=0.002)
    for dim in range(len(shape)):
        if shape[dim] >= 100:
            by_slice = moved.movedim(dim, 0).flatten(1).mean(1) if len(shape) > 1 else moved.view(-1, 500).mean(1)
            assert (by_slice - 0.1).abs().max() < 0.02


def test_a_table_is_looked_up_in_evaluation_as_its_head_sees_it(llama: LlamaForCausalLM) -> None:
    """Rows are rounded by their number, not by where they are looked up, and no column always in one direction."""
    table = llama.model.embed_tokens
    with torch.no_grad():
        table.weight.copy_(1 + torch.rand_like(table.weight))
    annotate(llama, "mixed-stochastic").eval()
    whole = cast_stochastically(table.weight, BF16, still_noise(table.weight.shape, table.weight.device))
    tokens = torch.tensor([[3, 5, 3], [95, 0, 5]])
    assert torch.equal(table(tokens), whole[tokens]) and torch.equal(table(input=tokens[:, 1:]), whole[tokens[:, 1:]])
    error = (table(torch.arange(96)).float() - table.weight) * 2**7
    assert error.mean(0).abs().max() < 0.1 and error.mean(1).abs().max() < 0.2


def test_positions_are_looked_up_in_evaluation_alike_in_every_batch() -> None:
    """BART's table is asked with tokens and works the positions out itself."""
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 60}
    torch.manual_seed(0)
    model = BartForCausalLM(BartConfig(**sizes, max_position_embeddings=40))
    annotate(model, "mixed-stochastic").eval()
    table = model.model.decoder.embed_positions
    tokens = torch.randint(4, 60, (3, 12))
    assert torch.equal(table(tokens)[0], table(tokens[1:])[0]) and table(tokens).dtype == BF16


def test_evaluation_of_a_mixed_model_follows_its_masters() -> None:
    """Weights a tenth of a step above bfloat16's grid: linear layer and embedding move outputs by a tenth of a step."""
    model = nn.Sequential(nn.Embedding(50, 256), nn.Linear(256, 256, bias=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).bfloat16())
    tokens = torch.arange(50)[None].repeat(3, 1)
    before = model(tokens).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * 2**-8)
    annotate(model, "mixed-stochastic").eval()
    after = model(tokens)
    assert torch.equal(after, model(tokens))
    assert torch.equal(after[0], after[2])
    grown = (after.double() * before).sum() / before.square().sum() - 1
    assert grown.item() == pytest.approx(0.2 * 2**-8, rel=0.25)
