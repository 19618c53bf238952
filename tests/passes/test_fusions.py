"""Each rule on the real transformers modules: it fires, results and gradients agree, it declines with a reason."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GptOssConfig, MiniMaxM3VLTextConfig
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, Llama4TextRMSNorm
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fxopt.passes.pipelines import EXACT
from fxopt.rewrite.match import NearMiss
from fxopt.rewrite.prove import Prover
from tests.accuracy import assert_op_as_accurate
from tests.captured_graphs import captured, run_optimized, targets
from tests.tiny_models import tiny_llama

DTYPES = [torch.float32, torch.bfloat16]


def near_misses(function, *inputs) -> list[NearMiss]:
    module = captured(function, *inputs)
    return [miss for record in EXACT.run(module, None) for miss in record.outcome.near_misses]


def optimized_targets(function, *inputs) -> list[str]:
    return targets(run_optimized(EXACT, function, *inputs)[0])


def assert_rewritten(op: str, function, *inputs: torch.Tensor) -> None:
    """`function` becomes `op` alone, is as accurate as before, and a second run of the passes changes nothing."""
    graph, _ = run_optimized(EXACT, function, *inputs)
    assert op in targets(graph), targets(graph)
    again = [record for record in EXACT.run(graph, None) if record.outcome.changes]
    assert not again

    def rewritten(*arguments):
        return run_optimized(EXACT, function, *arguments)[1]

    assert_op_as_accurate(rewritten, function, *inputs)


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


NORMS = {width: LlamaRMSNorm(width, 1e-5) for width in (32, 33)}


def normed(x, weight):
    return torch.func.functional_call(NORMS[x.shape[-1]], {"weight": weight}, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_llama(dtype):
    torch.manual_seed(0)
    assert_rewritten("rms_norm", normed, leaf(3, 7, 33, dtype=dtype), leaf(33, dtype=dtype))


def test_rms_norm_leaves_a_weight_that_promotes_outside():
    torch.manual_seed(0)
    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(32, dtype=torch.float32)
    graph, result = run_optimized(EXACT, normed, *inputs)
    assert targets(graph) == ["rms_norm", "mul"] and result.dtype == torch.float32


NORM_MODULES = {
    "weight in float32": Olmo2RMSNorm(32, 1e-5),
    "one plus weight": Gemma2RMSNorm(32, 1e-5),
    "promoted by the variance": T5LayerNorm(32, 1e-5),
    "rounded before the weight, to the right": Llama4TextRMSNorm(32, 1e-5),
    "power of minus a half": Gemma4RMSNorm(32, 1e-5),
    "no weight": Llama4TextL2Norm(1e-5),
    "torch's own": torch.nn.RMSNorm(32, 1e-5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORM_MODULES)
def test_rms_norm_in_every_cast_order(kind, dtype):
    torch.manual_seed(0)
    module = NORM_MODULES[kind]
    weights = [leaf(32, dtype=dtype) for _ in module.parameters()]

    def normed_by_module(x, *weights):
        named = dict(zip(dict(module.named_parameters()), weights, strict=True))
        return torch.func.functional_call(module, named, (x,))

    # A proof, since the modules themselves calculate in float32 at most: run in float64, they are no truth.
    graph = captured(normed_by_module, leaf(3, 7, 32, dtype=dtype), *weights)
    records = EXACT.run(graph, Prover())
    assert not [refused for record in records for refused in record.outcome.refused]
    assert [change.op for record in records for change in record.outcome.changes] == ["rms_norm"]
    assert targets(graph)[-1:] == ["rms_norm"] and not {"rsqrt", "square"} & set(targets(graph))


def test_rms_norm_declines_an_epsilon_that_is_not_given():
    module, x = torch.nn.RMSNorm(32), leaf(3, 7, 32, dtype=torch.float32)
    assert not any(record.outcome.changes for record in EXACT.run(captured(module, x), None))
    assert any("no epsilon is given" in miss.reason for miss in near_misses(module, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_of_one_plus_weight(dtype):
    """What the norm multiplies with is computed after the sum, and moved before it."""

    def block(x, residual, weight):
        summed = residual + x
        norm = NORM_MODULES["one plus weight"]
        return summed * 2, torch.func.functional_call(norm, {"weight": weight}, (summed,))

    torch.manual_seed(0)
    inputs = leaf(3, 7, 32, dtype=dtype), leaf(3, 7, 32, dtype=dtype), leaf(32, dtype=dtype)
    assert_rewritten("add_rms_norm", block, *inputs)


def test_rms_norm_declines_another_formula():
    def scaled_by_mean_magnitude(x, weight):
        h = x.to(torch.float32)
        variance = h.abs().mean(-1, keepdim=True)
        return weight * (h * torch.rsqrt(variance + 1e-5)).to(x.dtype)

    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(32, dtype=torch.bfloat16)
    assert "rms_norm" not in optimized_targets(scaled_by_mean_magnitude, *inputs)
    misses = near_misses(scaled_by_mean_magnitude, *inputs)
    assert any("`abs`" in miss.reason and "`square`" in miss.reason for miss in misses)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype):
    def block(x, residual, weight):
        summed = residual + x
        return summed * 2, normed(summed, weight)

    torch.manual_seed(0)
    inputs = leaf(3, 7, 32, dtype=dtype), leaf(3, 7, 32, dtype=dtype), leaf(32, dtype=dtype)
    assert_rewritten("add_rms_norm", block, *inputs)


def test_add_rms_norm_declines_a_broadcast_addition():
    def block(x, residual, weight):
        return normed(x + residual, weight)

    names = optimized_targets(
        block, leaf(3, 7, 32, dtype=torch.bfloat16), leaf(32, dtype=torch.bfloat16), leaf(32, dtype=torch.bfloat16)
    )
    assert "rms_norm" in names and "add_rms_norm" not in names


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


EXPERTS = {
    "pairs": GptOssExperts(GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=4)),
    "halves": MiniMaxM3VLExperts(MiniMaxM3VLTextConfig(hidden_size=32, intermediate_size=32, num_local_experts=4)),
}


def assert_proven(op: str, function, *inputs: torch.Tensor) -> None:
    records = EXACT.run(captured(function, *inputs), Prover())
    assert [change.op for record in records for change in record.outcome.changes] == [op]
    assert not [refused for record in records for refused in record.outcome.refused]


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_squared_of_transformers(dtype):
    torch.manual_seed(0)
    x = leaf(3, 7, 33, dtype=dtype)
    assert_rewritten("relu_squared", lambda x: ACT2FN["relu2"](x), x)
    assert_proven("relu_squared", lambda x: ACT2FN["relu2"](x), x)


@pytest.mark.parametrize("spelling", [lambda r: r**2, lambda r: r.pow(2), lambda r: r * r, torch.square])
def test_relu_squared_in_every_spelling(spelling):
    torch.manual_seed(0)
    assert_rewritten("relu_squared", lambda x: spelling(F.relu(x)), leaf(3, 7, 33, dtype=torch.bfloat16))


def test_relu_squared_declines_where_the_relu_is_also_used():
    def squared_and_counted(x):
        r = F.relu(x)
        return r.square(), (r > 0).sum()

    (miss,) = near_misses(squared_and_counted, leaf(3, 7, 32, dtype=torch.bfloat16))
    assert "inside the pattern, is also used by" in miss.reason


def test_relu_squared_declines_integers():
    (miss,) = near_misses(lambda x: F.relu(x).square(), torch.arange(-3, 4))
    assert "torch.int64, not floating point" in miss.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_llama(dtype):
    def rotated(q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)

    torch.manual_seed(0)
    angles = torch.randn(2, 9, 16)
    q, k = leaf(2, 9, 4, 16, dtype=dtype), leaf(2, 9, 2, 16, dtype=dtype)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    graph, _ = run_optimized(EXACT, rotated, q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert targets(graph).count("rope") == 2
    assert_rewritten("rope", rotated, q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def test_rope_declines_a_rotation_of_unequal_parts():
    def rotated(x, cos, sin):
        return x * cos + torch.cat((-x[..., 6:], x[..., :6]), dim=-1) * sin

    inputs = [leaf(2, 4, 9, 16, dtype=torch.bfloat16) for _ in range(3)]
    (miss,) = near_misses(rotated, *inputs)
    assert "not in halves" in miss.reason


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
    assert any("not one class" in miss.reason for miss in near_misses(loss, *inputs))


def repeated_attention(q, k, v, causal=True, dropout=0.0):
    def repeat(x):
        batch, heads, length, width = x.shape
        return x[:, :, None, :, :].expand(batch, heads, 2, length, width).reshape(batch, heads * 2, length, width)

    mask = None if causal else torch.ones(9, 9, dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, dropout_p=dropout, is_causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_key_value_heads_are_shared(dtype, causal):
    def function(q, k, v):
        return repeated_attention(q, k, v, causal)

    torch.manual_seed(0)
    q, k, v = (leaf(2, heads, 9, 16, dtype=dtype) for heads in (4, 2, 2))
    graph, _ = run_optimized(EXACT, function, q, k, v)
    assert "expand" not in targets(graph)
    assert_rewritten("scaled_dot_product_attention", function, q, k, v)


def test_key_value_heads_stay_repeated_where_attention_drops_out():
    def function(q, k, v):
        return repeated_attention(q, k, v, dropout=0.1)

    misses = near_misses(function, *(leaf(2, heads, 9, 16, dtype=torch.bfloat16) for heads in (4, 2, 2)))
    assert any("drops out" in miss.reason for miss in misses)


def test_rms_norm_declines_a_variance_without_gradient():
    def stopped(x, weight):
        with torch.no_grad():
            variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return weight * (x.to(torch.float32) * torch.rsqrt(variance + 1e-5)).to(x.dtype)

    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(32, dtype=torch.bfloat16)
    assert "rms_norm" not in optimized_targets(stopped, *inputs)


def test_rms_norm_of_an_input_that_is_written_to_later_reads_the_float32_copy():
    """Eager code saves a float32 copy of it; an op on the input would save the input itself."""

    def function(x, weight):
        h = x * 1
        y = normed(h, weight)
        h += y
        return h

    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(32, dtype=torch.bfloat16)
    targets = optimized_targets(function, *inputs)
    assert "cast" in targets[: targets.index("rms_norm")]
    assert_rewritten("rms_norm", function, *inputs)


def test_linear_cross_entropy_declines_float16():
    def loss(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float().view(-1, 61), labels)

    inputs = leaf(3, 7, 32, dtype=torch.float16), leaf(61, 32, dtype=torch.float16), torch.randint(0, 61, (21,))
    assert any("float16" in miss.reason for miss in near_misses(loss, *inputs))
