"""A new tensor that is written part by part: joined where the parts are all of it, left alone otherwise."""

import pytest
import torch

from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import run_optimized, targets
from tests.passes.rewriting import DTYPES, leaf


def halves(x, y):
    out = torch.empty_like(x)
    out[..., :4] = x[..., 4:] * y[..., :4]
    out[..., 4:] = x[..., :4] + y[..., 4:]
    return out.transpose(1, 2) * 2


def pairs(x, y):
    out = x.new_zeros(x.shape)
    out[:, :, :, 0::2] = x[..., 1::2] * y[..., ::2]
    out[:, :, :, 1::2] = x[..., ::2] + y[..., 1::2]
    return out.sin()


def one_by_one(x, y):
    out = torch.zeros(*x.shape[:-1], 2, dtype=torch.float32)
    out[..., 1] = x[..., 0] * y[..., 1]
    out[..., -2] = x[..., 1]
    return out.flatten(-2)


def unequal(x, y):
    out = torch.empty(x.shape, dtype=x.dtype)
    out[..., 6:] = y[..., 6:]
    out[..., :1] = x[..., :1] * 2
    out[..., 1:6] = (x * y)[..., 1:6]
    return out


def permuted(x, y):
    """`empty_like` lies in memory as x does, which the view needs."""
    x = x.transpose(1, 2)
    out = torch.empty_like(x)
    out[..., :4], out[..., 4:] = x[..., 4:], x[..., :4] * 3
    return out.transpose(1, 2).view(2, -1) * y.flatten(1)


JOINED = {"cat": (halves, unequal, permuted), "stack": (pairs, one_by_one)}


def not_all(x, y):
    out = torch.zeros_like(x)
    out[..., :3] = x[..., :3]
    out[..., 4:] = y[..., 4:]
    return out


def overlapping(x, y):
    out = torch.zeros_like(x)
    out[..., :5] = x[..., :5]
    out[..., 4:] = y[..., 4:]
    return out


def read_between(x, y):
    out = torch.zeros_like(x)
    out[..., :4] = x[..., :4]
    total = out.sum()
    out[..., 4:] = y[..., 4:]
    return out * total


def written_again(x, y):
    out = torch.zeros_like(x)
    out[..., :4] = x[..., :4]
    out[..., 4:] = y[..., 4:]
    out += 1
    return out


def broadcast(x, y):
    out = torch.empty_like(x)
    out[..., :4] = x[..., :1]
    out[..., 4:] = 0.5
    return out * y


def without_gradient(x, y):
    out = torch.empty_like(x)
    out[..., :4] = x[..., :4]
    with torch.no_grad():
        out[..., 4:] = y[..., 4:]
    return out


def a_part_that_changes(x, y):
    part = x[..., :4] * 2
    out = torch.empty_like(x)
    out[..., :4] = part
    part += 1
    out[..., 4:] = y[..., 4:]
    return out * part.sum()


def not_new(x, y):
    out = x * 1
    out[..., :4] = y[..., :4]
    out[..., 4:] = y[..., 4:] * 2
    return out


def under_autocast(x, y):
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.empty_like(x)
        out[..., :4] = x[..., :4] * 2
        out[..., 4:] = y[..., 4:]
    return out


def of_no_axis(x, y):
    out = x.new_zeros(())
    out[...] = x.sum()
    out[...] = y.sum()
    return out


LEFT_ALONE = (
    not_all, overlapping, read_between, written_again, broadcast, without_gradient, a_part_that_changes, not_new,
    of_no_axis, under_autocast,
)  # fmt: skip


def result_and_gradients(function, x, y):
    result = function(x, y)
    return result.detach(), *torch.autograd.grad(result.float().square().sum(), (x, y), allow_unused=True)


def assert_alike(function, dtype):
    """Bit by bit: the graph, rewritten, gives the results and gradients of the function."""

    def rewritten(x, y):
        return run_optimized(EXACT, function, x, y)[1]

    expected = result_and_gradients(function, *inputs(dtype))
    for found, wanted in zip(result_and_gradients(rewritten, *inputs(dtype)), expected, strict=True):
        assert torch.equal(found, wanted) if wanted is not None else found is None


def inputs(dtype):
    torch.manual_seed(0)
    return leaf(2, 3, 5, 8, dtype=dtype), leaf(2, 3, 5, 8, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "join"), [(each, join) for join, functions in JOINED.items() for each in functions]
)
def test_joined(function, join, dtype):
    graph, _ = run_optimized(EXACT, function, *inputs(dtype))
    assert join in targets(graph) and not {"setitem", "empty_like", "new_zeros", "zeros", "empty"} & {*targets(graph)}
    assert_alike(function, dtype)


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_left_alone(function):
    graph, _ = run_optimized(EXACT, function, *inputs(torch.float32))
    assert targets(graph).count("setitem") == 2
    assert_alike(function, torch.float32)
