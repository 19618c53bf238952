"""LayerNorm of the real modules: rewritten, as accurate, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from tests.passes.rewriting import DTYPES, assert_proven, leaf, near_misses, proven

MODULES = {
    "torch's own": torch.nn.LayerNorm(32),
    "no bias": torch.nn.LayerNorm(32, bias=False),
    "no weight": torch.nn.LayerNorm(32, elementwise_affine=False),
    "in float32, no weight": OlmoLayerNorm(32),
    "in float32, written out": CohereLayerNorm(32),
    "one plus weight": NemotronLayerNorm1P(32),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODULES)
def test_layer_norm_of_every_kind(kind, dtype):
    torch.manual_seed(0)
    module = MODULES[kind]
    weights = [leaf(32, dtype=dtype) for _ in module.parameters()]

    def normed(x, *weights):
        named = dict(zip(dict(module.named_parameters()), weights, strict=True))
        return torch.func.functional_call(module, named, (x,))

    assert_proven("layer_norm", normed, leaf(3, 7, 32, dtype=dtype), *weights)


def test_a_weight_for_each_head_stays_outside():
    norm = CohereLayerNorm((4, 16)).bfloat16()
    assert_proven("layer_norm", norm, leaf(2, 9, 4, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_variance_that_torch_computes(dtype):
    def normed(x):
        h = x.float()
        variance = h.var(dim=-1, keepdim=True, unbiased=False)
        return ((h - h.mean(dim=-1, keepdim=True)) * torch.rsqrt(variance + 1e-6)).to(x.dtype)

    assert_proven("layer_norm", normed, leaf(3, 7, 4, 16, dtype=dtype))


def test_layer_norm_declines_more_than_one_axis():
    x = leaf(3, 7, 32, dtype=torch.bfloat16)
    (miss,) = near_misses(lambda x: F.layer_norm(x, (7, 32)), x)
    assert "over the last 2 axes" in miss.reason


def test_layer_norm_declines_the_unbiased_variance():
    def unbiased(x):
        h = x.float()
        return ((h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True) + 1e-5)).to(x.dtype)

    assert not any("layer_norm" in miss.reason for miss in near_misses(unbiased, leaf(3, 32, dtype=torch.bfloat16)))


def centered(x):
    return x - x.mean(-1, keepdim=True)


def with_var_mean(x):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def in_float32(function):
    return lambda x: function(x.float()).to(x.dtype)


WEIGHT = torch.linspace(0.5, 1.5, 32)
BY_HAND = {
    "over torch's deviation": lambda x: centered(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
    "over the root of the mean": lambda x: centered(x) / torch.sqrt(centered(x).pow(2).mean(-1, keepdim=True) + 1e-12),
    "variance and mean at once": with_var_mean,
    "over a deviation and epsilon": lambda x: centered(x) / (x.std(-1, keepdim=True) + 1e-6),
    "over a deviation and epsilon in float32": in_float32(lambda x: centered(x) / (x.std(-1, keepdim=True) + 1e-6)),
    "weighted before the division": lambda x: WEIGHT.to(x.dtype) * centered(x) / (x.std(-1, keepdim=True) + 1e-6),
    "without correction": lambda x: centered(x) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BY_HAND)
def test_layer_norm_written_by_hand(kind, dtype):
    torch.manual_seed(0)
    _, ops = proven(BY_HAND[kind], leaf(3, 7, 32, dtype=dtype))
    assert ops[-1] in ("layer_norm", "deviation_norm")
