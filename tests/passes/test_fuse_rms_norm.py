"""RMSNorm of the real transformers modules: rewritten, as accurate, declined with a reason."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, Llama4TextRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import captured, run_optimized, targets
from tests.passes.rewriting import DTYPES, assert_rewritten, leaf, near_misses, optimized_targets, proven

NORMS = {width: LlamaRMSNorm(width, 1e-5) for width in (32, 33)}


def normed(x, weight):
    return torch.func.functional_call(NORMS[x.shape[-1]], {"weight": weight}, (x,))


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
def test_rms_norm_of_llama(dtype):
    torch.manual_seed(0)
    assert_rewritten("rms_norm", normed, leaf(3, 7, 33, dtype=dtype), leaf(33, dtype=dtype))


def test_rms_norm_leaves_a_weight_that_promotes_outside():
    torch.manual_seed(0)
    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(32, dtype=torch.float32)
    graph, result = run_optimized(EXACT, normed, *inputs)
    assert targets(graph) == ["rms_norm", "mul"] and result.dtype == torch.float32


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
    graph, ops = proven(normed_by_module, leaf(3, 7, 32, dtype=dtype), *weights)
    assert ops == ["rms_norm"]
    assert targets(graph)[-1:] == ["rms_norm"] and not {"rsqrt", "square"} & set(targets(graph))


def test_rms_norm_declines_an_epsilon_that_is_not_given():
    module, x = torch.nn.RMSNorm(32), leaf(3, 7, 32, dtype=torch.float32)
    assert not any(record.outcome.changes for record in EXACT.run(captured(module, x), None))
    (miss,) = near_misses(module, x)
    assert "no epsilon is given" in miss.reason


def test_rms_norm_declines_another_formula():
    def scaled_by_mean_magnitude(x, weight):
        h = x.to(torch.float32)
        variance = h.abs().mean(-1, keepdim=True)
        return weight * (h * torch.rsqrt(variance + 1e-5)).to(x.dtype)

    inputs = leaf(3, 7, 32, dtype=torch.bfloat16), leaf(32, dtype=torch.bfloat16)
    assert "rms_norm" not in optimized_targets(scaled_by_mean_magnitude, *inputs)
    (miss,) = near_misses(scaled_by_mean_magnitude, *inputs)
    assert "`abs`" in miss.reason and "`square`" in miss.reason


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


def over_root(x, w):
    h = x.float()
    return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


def by_inverse(inverse):
    def normed(x, w):
        h = x.float()
        return w * (h * inverse(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    return normed


def root(x):
    return x.pow(2).mean(-1, keepdim=True).sqrt()


BY_HAND = {
    "over the root": over_root,
    "one by the root": by_inverse(lambda variance: 1.0 / torch.sqrt(variance)),
    "the root's reciprocal": by_inverse(lambda variance: variance.sqrt().reciprocal()),
    "a sum by its count": lambda x, w: w * (x * torch.rsqrt((x.float() ** 2).sum(-1, True) / 32 + 1e-5)).to(x.dtype),
    "epsilon first": lambda x, w: w * (x.float() * torch.rsqrt(1e-5 + x.float().pow(2).mean(-1, True))).to(x.dtype),
    "epsilon outside the root": lambda x, w: w * (x.float() / (root(x.float()) + 1e-5)).to(x.dtype),
    "epsilon outside, the weight in float32": lambda x, w: (w * (x.float() / (root(x.float()) + 1e-5))).to(x.dtype),
    "epsilon outside, the weight first": lambda x, w: w * x / (root(x) + 1e-5),
    "epsilon outside a norm times a factor": lambda x, w: w * (x / (x.norm(2, dim=-1, keepdim=True) * 32**-0.5 + 1e-5)),
    "epsilon outside a norm of a named input": lambda x, w: (
        w * (x / (torch.norm(input=x, p=2, dim=-1, keepdim=True) * 32**-0.5 + 1e-5))
    ),
    "epsilon outside a norm over a root": lambda x, w: w * (x / (torch.norm(x, dim=-1, keepdim=True) / 32**0.5 + 1e-5)),
    "without a cast": lambda x, w: x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5) * w,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BY_HAND)
def test_rms_norm_written_by_hand(kind, dtype):
    torch.manual_seed(0)
    graph, ops = proven(BY_HAND[kind], leaf(3, 7, 32, dtype=dtype), leaf(32, dtype=dtype))
    assert ops[-1] == "rms_norm" and not {"rsqrt", "root_mean_square"} & set(targets(graph))


def test_a_norm_with_epsilon_outside_the_root_is_not_added_to():
    def function(x, residual, w):
        summed = x + residual
        return summed, w * (summed / (root(summed) + 1e-5))

    inputs = leaf(3, 7, 32, dtype=torch.float32), leaf(3, 7, 32, dtype=torch.float32), leaf(32, dtype=torch.float32)
    assert optimized_targets(function, *inputs)[-1] == "rms_norm"
    assert "stands outside the root" in near_misses(function, *inputs)[0].reason


@pytest.mark.parametrize("factor", [1.0, 32.0**-0.4])
def test_a_norm_by_another_factor_is_none_of_the_mean_square(factor):
    def function(x, w):
        return w * (x / (x.norm(2, dim=-1, keepdim=True) * factor + 1e-5))

    assert "rms_norm" not in optimized_targets(
        function, leaf(3, 32, dtype=torch.float32), leaf(32, dtype=torch.float32)
    )


def test_rms_norm_keeps_float64_inside():
    def normed(x):
        h = x.double()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    assert optimized_targets(normed, leaf(3, 7, 32, dtype=torch.float32)) == ["cast", "rms_norm", "cast"]
