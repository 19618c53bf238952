"""Gated linear units of the real transformers modules: rewritten, as accurate, declined with a reason."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GptOssConfig, MiniMaxM3VLTextConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts

from tests.passes.rewriting import DTYPES, assert_proven, assert_rewritten, leaf, near_misses, optimized_targets, proven
from tests.tiny_models import tiny_llama

EXPERTS = {
    "pairs": GptOssExperts(GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=4)),
    "halves": MiniMaxM3VLExperts(MiniMaxM3VLTextConfig(hidden_size=32, intermediate_size=32, num_local_experts=4)),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_llama(dtype):
    model = tiny_llama()
    mlp: LlamaMLP = model.model.layers[0].mlp.to(dtype)

    def call(x, gate, up, down):
        weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        return torch.func.functional_call(mlp, weights, (x,))

    weights = [p.detach().clone().requires_grad_() for p in (mlp.gate_proj.weight, mlp.up_proj.weight)]
    down = mlp.down_proj.weight.detach().clone().requires_grad_()
    assert_rewritten("swiglu", call, leaf(3, 7, 64, dtype=dtype), *weights, down)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_gated_units(activation, dtype):
    torch.manual_seed(0)
    op = "reglu" if activation == "relu" else "geglu"
    inputs = leaf(3, 7, 33, dtype=dtype), leaf(3, 7, 33, dtype=dtype)
    assert_rewritten(op, lambda gate, up: ACT2FN[activation](gate) * up, *inputs)


def test_swiglu_declines_a_broadcast_product():
    def gated(gate, up):
        return F.silu(gate) * up

    (miss,) = near_misses(gated, leaf(3, 7, 32, dtype=torch.bfloat16), leaf(3, 7, 1, dtype=torch.bfloat16))
    assert "different shapes" in miss.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", EXPERTS)
def test_clamped_swiglu_of_experts(layout, dtype):
    torch.manual_seed(0)
    joint = (4 * torch.randn(3, 7, 66)).to(dtype).requires_grad_()
    gated = EXPERTS[layout]._apply_gate
    assert_rewritten("clamped_swiglu", gated, joint)
    assert_proven("clamped_swiglu", gated, joint)


@pytest.mark.parametrize(
    ("lowest", "limit", "one", "reason"),
    [
        (-5.0, 7.0, 1, "up is clamped to [-5.0, 7.0], not to [-7.0, 7.0]"),
        (-7.0, 7.0, 2, "up is added to 2, not to 1"),
    ],
)
def test_clamped_swiglu_declines_other_numbers(lowest, limit, one, reason):
    def gated(gate, up):
        gate, up = gate.clamp(max=limit), up.clamp(min=lowest, max=limit)
        return (up + one) * (gate * torch.sigmoid(gate * 1.702))

    (miss,) = near_misses(gated, *(leaf(3, 7, 32, dtype=torch.bfloat16) for _ in range(2)))
    assert reason in miss.reason


def test_clamped_swiglu_declines_a_gate_that_is_clamped_from_below():
    def gated(gate, up):
        gate, up = gate.clamp(min=-7.0, max=7.0), up.clamp(min=-7.0, max=7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    inputs = [leaf(3, 7, 32, dtype=torch.bfloat16) for _ in range(2)]
    assert "clamped_swiglu" not in optimized_targets(gated, *inputs)
    (miss,) = near_misses(gated, *inputs)
    assert "-7.0 stands where the pattern has None" in miss.reason


def factored_gelu(x):
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))


def tanh_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


BY_HAND = {
    "x sigmoid(x)": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "sigmoid(x) x": lambda gate, up: up * (gate.sigmoid() * gate),
    "silu in float32": lambda gate, up: F.silu(gate.float()).type_as(gate) * up,
    "all in float32": lambda gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype),
    "gelu by tanh": lambda gate, up: tanh_gelu(gate) * up,
    "gelu by tanh, factored": lambda gate, up: factored_gelu(gate) * up,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BY_HAND)
def test_a_gated_unit_written_by_hand(kind, dtype):
    torch.manual_seed(0)
    _, ops = proven(BY_HAND[kind], leaf(3, 7, 32, dtype=dtype), leaf(3, 7, 32, dtype=dtype))
    assert ops[-1] == ("geglu" if "gelu" in kind else "swiglu")


@pytest.mark.parametrize(
    "gelu",
    [lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), lambda x: 0.5 * x * (1 + torch.erf(x * 2**-0.5))],
)
def test_an_exact_gelu_written_by_hand(gelu):
    def gated(gate, up):
        return gelu(gate) * up

    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(3, 7, 32, dtype=torch.bfloat16)
    assert proven(gated, *inputs)[1] == ["gelu", "geglu"]
    # mkldnn's polynomial, which torch's gelu runs on a CPU, has twice the error of this formula in float32.
    misses = near_misses(gated, *(x.detach().float() for x in inputs))
    assert any("less accurate than the formula" in miss.reason for miss in misses)


def test_a_gelu_with_another_number_is_another_function():
    def gated(gate, up):
        return gate * 0.5 * (1.0 + torch.erf(gate / 1.4142)) * up

    misses = near_misses(gated, leaf(3, 32, dtype=torch.bfloat16), leaf(3, 32, dtype=torch.bfloat16))
    assert any(miss.reason == "the root is 1.4142, not 1.41421" for miss in misses)
