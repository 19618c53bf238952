"""A residual sum and the norm that reads it: rewritten, as accurate, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import run_optimized, targets
from tests.passes.rewriting import DTYPES, assert_rewritten, leaf, near_misses, optimized_targets
from tests.passes.test_fuse_rms_norm import NORM_MODULES, normed


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
@pytest.mark.parametrize("bias", [True, False])
def test_add_layer_norm(bias, dtype):
    def block(x, residual, weight, bias=None):
        summed = residual + x
        return summed * 2, F.layer_norm(summed, (32,), weight, bias, 1e-5)

    torch.manual_seed(0)
    inputs = leaf(3, 7, 32, dtype=dtype), leaf(3, 7, 32, dtype=dtype), leaf(32, dtype=dtype)
    graph, _ = run_optimized(EXACT, block, *inputs, *([leaf(32, dtype=dtype)] if bias else []))
    assert targets(graph).count("add_layer_norm") == 1 and "layer_norm" not in targets(graph)


def test_the_sum_inside_a_rotation_is_no_residual():
    def rotated_and_normed(x, cos, sin, weight):
        rotated = x * cos + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin
        return F.rms_norm(rotated, (16,), weight, 1e-5)

    inputs = [leaf(2, 4, 9, 16, dtype=torch.bfloat16) for _ in range(3)]
    assert optimized_targets(rotated_and_normed, *inputs, leaf(16, dtype=torch.bfloat16)) == ["rope", "rms_norm"]


def test_add_norm_declines_addends_of_two_dtypes():
    def block(x, residual, weight):
        return F.rms_norm(x + residual, (32,), weight, 1e-5)

    inputs = leaf(3, 32, dtype=torch.bfloat16), leaf(3, 32, dtype=torch.float32), leaf(32, dtype=torch.float32)
    (miss,) = near_misses(block, *inputs)
    assert "different dtypes" in miss.reason
