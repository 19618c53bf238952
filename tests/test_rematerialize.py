import operator
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.kernels.add_rms_norm import add_rms_norm
from fxopt.kernels.glu import swiglu
from fxopt.kernels.rms_norm import rms_norm
from fxopt.rematerialize import rematerialize, rematerializing


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16().requires_grad_()


def projected(x: Tensor, other: Tensor, weight: Tensor, *projections: Tensor) -> Tensor:
    summed, normed = add_rms_norm(x, other, weight, 1e-5)
    gated = swiglu(F.linear(normed, projections[0]), F.linear(normed, projections[1]))
    return F.linear(gated, projections[2]) + rms_norm(summed, weight, 1e-5)


def test_only_what_saves_a_cheap_result_is_called_with_hooks() -> None:
    def model(x: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
        normed = rms_norm(x, weight, 1e-5)
        rows = normed.view(-1, 16)
        return torch.mm(rows, projection).exp() + normed.matmul(projection).flatten(0, 1)

    graph = fx.Graph()
    x, weight, projection = (graph.placeholder(name) for name in ("x", "weight", "projection"))
    normed = graph.call_function(rms_norm, (x, weight, 1e-5))
    rows = graph.call_method("view", (normed, (-1, 16)))
    first = graph.call_function(torch.exp, (graph.call_function(torch.mm, (rows, projection)),))
    second = graph.call_method("flatten", (graph.call_method("matmul", (normed, projection)), 0, 1))
    graph.output(graph.call_function(torch.add, (first, second)))
    module = fx.GraphModule({}, graph)
    rematerialize(module)
    rematerialize(module)  # once more changes nothing
    names = [getattr(node.target, "__name__", node.target) for node in module.graph.nodes if "call" in node.op]
    assert names == ["rms_norm", "view", "rematerializing_mm", "exp", "rematerializing_matmul", "flatten", "add"]
    inputs = leaf(2, 5, 16), leaf(16), leaf(16, 8)
    expected = torch.autograd.grad(model(*inputs).float().square().sum(), inputs)
    found = torch.autograd.grad(module(*inputs).float().square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def wrapped(*calls: tuple[Any, ...]) -> list[str]:
    """What is wrapped of a graph in which each call is given the result of the one before."""
    graph = fx.Graph()
    last, other = graph.placeholder("x"), graph.placeholder("other")
    for function, *args in calls:
        last = graph.call_function(function, (last, *(other if arg is Tensor else arg for arg in args)))
    graph.output(last)
    module = fx.GraphModule({}, graph)
    rematerialize(module)
    names = [node.target.__name__ for node in module.graph.nodes if node.op == "call_function"]
    return [name.removeprefix("rematerializing_") for name in names if name.startswith("rematerializing_")]


def test_cheap_results_are_found_behind_each_other_and_behind_what_hands_them_on() -> None:
    norm, linear = (rms_norm, Tensor, 1e-5), (F.linear, Tensor)
    added = (add_rms_norm, Tensor, Tensor, 1e-5), (operator.getitem, 1)
    assert wrapped(norm, *added, linear) == ["add_rms_norm", "linear"]
    assert wrapped(norm, norm, linear) == ["rms_norm", "linear"]
    assert wrapped(norm, (torch.reshape, (-1, 16)), linear) == ["linear"]
    assert wrapped(norm, (F.dropout, 0.0, False), linear) == ["dropout", "linear"]
    assert wrapped(norm, (operator.getitem, slice(None)), linear) == ["linear"]
    assert wrapped((add_rms_norm, Tensor, Tensor, 1e-5), (operator.getitem, 0), linear) == []


INPUTS = [(2, 5, 16), (2, 5, 16), (16,), (24, 16), (24, 16), (16, 24)]


def test_gradients_are_the_same_bits() -> None:
    torch.manual_seed(0)
    inputs = [leaf(*shape) for shape in INPUTS]
    plain = torch.autograd.grad(projected(*inputs).float().square().sum(), inputs)
    with rematerializing():
        result = projected(*inputs)
    again = torch.autograd.grad(result.float().square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_result_itself_is_freed() -> None:
    x, weight, projection = leaf(2, 5, 16), leaf(16), leaf(24, 16)
    with rematerializing():
        normed = rms_norm(x, weight, 1e-5)
        result = F.linear(normed, projection)
    freed = weakref.ref(normed)
    del normed
    assert freed() is None
    result.sum().backward()
    assert projection.grad is not None


def test_a_graph_can_be_walked_twice() -> None:
    x, weight, first, second = leaf(2, 5, 16), leaf(16), leaf(24, 16), leaf(8, 16)
    with rematerializing():
        normed = rms_norm(x, weight, 1e-5)
        results = F.linear(normed, first), F.linear(normed, second)
    loss = results[0].sum() + results[1].sum()
    once = torch.autograd.grad(loss, [x, first, second], retain_graph=True)
    (partly,) = torch.autograd.grad(results[0].sum(), first, retain_graph=True)
    twice = torch.autograd.grad(loss, [x, first, second])
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert torch.equal(partly, once[1])


def test_a_part_of_a_result_is_saved_as_ever() -> None:
    x, weight, projection = leaf(2, 5, 16), leaf(16), leaf(24, 8)
    with rematerializing():
        result = F.linear(rms_norm(x, weight, 1e-5)[..., :8], projection)
    (gradient,) = torch.autograd.grad(result.sum(), projection)
    expected = rms_norm(x, weight, 1e-5)[..., :8].reshape(-1, 8).sum(0)
    torch.testing.assert_close(gradient[0], expected, rtol=0.02, atol=0.05)


def test_a_graph_that_is_never_walked_is_freed() -> None:
    x, residual, weight = leaf(2, 5, 16), leaf(2, 5, 16), leaf(16)
    with rematerializing():
        summed, normed = add_rms_norm(x, residual, weight, 1e-5)  # saves its own first result
        result = (summed * normed).exp()  # so does exp
    kept = weakref.ref(summed.untyped_storage())
    del summed, normed, result
    assert kept() is None


def test_the_callers_hooks_stay_in_force() -> None:
    x, weight = leaf(2, 5, 16), leaf(16)
    seen: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t), rematerializing():
        rms_norm(x, weight, 1e-5)
    assert seen == [x.shape, weight.shape]


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_projections(frozen: bool) -> None:
    x, weight, projection = leaf(2, 5, 16), leaf(16), leaf(24, 16).detach().requires_grad_(not frozen)
    with rematerializing():
        F.linear(rms_norm(x, weight, 1e-5), projection).sum().backward()
    assert x.grad is not None and (projection.grad is None) == frozen
