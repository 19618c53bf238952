"""Gated linear units of the real transformers modules: rewritten, as accurate, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GptOssConfig, MiniMaxM3VLTextConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts

from tests.passes.rewriting import DTYPES, assert_proven, assert_rewritten, leaf, near_misses, optimized_targets
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
