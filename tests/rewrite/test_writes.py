"""In-place writes of every kind, in graphs that the whole pipeline rewrites: values, effects and gradients stay."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import run_optimized, targets

WEIGHT = torch.randn(8)


def rms_norm(x, weight):
    return F.rms_norm(x, (8,), weight, 1e-5)


def sum_written_before_its_norm(x, r):
    summed = x + r
    summed[0] = 0.5
    return summed * 1, rms_norm(summed, WEIGHT)


def weight_written_between_sum_and_norm(x, r):
    weight = WEIGHT * 1
    summed = x + r
    weight.mul_(2)
    return summed * 1, rms_norm(summed, weight)


def weight_of_one_plus_written(x, r):
    weight = WEIGHT * 1
    summed = x + r
    weight.mul_(2)
    return summed * 1, rms_norm(summed, 1 + weight)


def cast_before_a_write(x, r):
    x = (x * r).bfloat16()
    wide = x.float()
    x.mul_(2)
    return x.float(), wide.bfloat16().float(), torch.softmax(wide, -1, dtype=torch.float32)


def copy_by_two_casts_written(x, r):
    x = (x * r).bfloat16()
    copy = x.float().to(torch.bfloat16)
    copy.mul_(2)
    return x.float(), copy.float()


def written_by_out(x, r):
    y = torch.zeros(3, 8)
    before = y.sin()
    torch.add(x.detach(), r.detach(), out=y)
    return before + y.sin() + x


def written_with_others(x, r):
    a, b = x.detach() * 1, r.detach() * 1
    before = b.sin()
    torch._foreach_mul_([a, b], 2)
    return x * (a + before - b.sin())


def written_by_a_positional_flag(x, r):
    y = (x * r).detach()
    before = y.sin()
    F.leaky_relu(y, 0.1, True)
    return x * (before - y.sin())


def written_by_running_statistics(x, r):
    mean, variance = torch.zeros(8), torch.ones(8)
    before = mean.sin()
    y = F.batch_norm(x * r, mean, variance, training=True)
    return y + before - mean.sin()


def sizes_and_dtypes(x, r):
    return (x * r).view(torch.int32).view(torch.float32)[:, None] * x[:, :, None].sum(-1)[:, None]


FUNCTIONS = [
    sum_written_before_its_norm,
    weight_written_between_sum_and_norm,
    weight_of_one_plus_written,
    cast_before_a_write,
    copy_by_two_casts_written,
    written_by_out,
    written_with_others,
    written_by_a_positional_flag,
    written_by_running_statistics,
    sizes_and_dtypes,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_write_is_respected(function):
    torch.manual_seed(0)
    x, r = (torch.randn(3, 8).requires_grad_() for _ in range(2))
    results = []
    for run in (function, lambda *inputs: run_optimized(EXACT, function, *inputs)[1]):
        found = run(x, r)
        found = found if isinstance(found, tuple) else (found,)
        total = sum(value.square().sum() for value in found)
        gradients = torch.autograd.grad(total, (x, r), allow_unused=True) if total.requires_grad else ()
        results.append((*(value.detach() for value in found), *gradients))
    torch.testing.assert_close(*results)


def test_a_write_inside_a_checkpoint_is_respected():
    def function(x):
        total = torch.zeros(8)

        def body(x):
            total.add_(1)
            return x * 2

        before = total.sin()
        return checkpoint(body, x, use_reentrant=False) + before - total.sin()

    x = torch.randn(3, 8, requires_grad=True)
    torch.testing.assert_close(run_optimized(EXACT, function, x)[1], function(x))


def test_random_operations_are_not_merged():
    def function(x):
        attended = [F.scaled_dot_product_attention(x, x, x, dropout_p=0.5) for _ in range(2)]
        return attended[0] - attended[1] + F.rrelu(x, training=True) - F.rrelu(x, training=True)

    graph, _ = run_optimized(EXACT, function, torch.randn(1, 2, 8, 16))
    assert targets(graph).count("scaled_dot_product_attention") == targets(graph).count("rrelu") == 2


def test_two_equal_results_stay_two():
    def function(x):
        return torch.zeros(3), torch.zeros(3), x.sin(), x.sin() * 2

    graph, (first, second, *_) = run_optimized(EXACT, function, torch.randn(3))
    first.add_(1)
    assert not second.any()
    assert targets(graph).count("sin") == 1
