import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxopt.rewrite.graph import cast
from fxopt.rewrite.spelling import OTHER_ORDER, arguments_of, spell_out
from tests.captured_graphs import captured

X = torch.randn(3, 5)


def spelled(function, *inputs):
    module = captured(function, *inputs)
    spell_out(module.graph)
    module.recompile()
    return module, [node for node in module.graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.float64),
        lambda x: x.to(dtype=torch.float64),
        lambda x: x.double(),
        lambda x: x.type(torch.float64),
        lambda x: x.to("cpu", torch.float64),
    ],
)
def test_each_dtype_conversion_is_a_cast(function):
    module, (node,) = spelled(function, X)
    assert (node.target, node.args[1]) == (cast, torch.float64)
    assert torch.equal(module(X)[0], X.double())


@pytest.mark.parametrize(
    "function",
    [lambda x: x.pow(2), lambda x: x**2, lambda x: x * x, lambda x: torch.pow(x, 2.0), lambda x: torch.square(x)],
)
def test_each_square_is_a_square(function):
    module, (node,) = spelled(function, X)
    assert node.target is torch.square
    assert torch.equal(module(X)[0], X * X)


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda x: x.add(x.neg()), operator.add),
        (lambda x: torch.mul(x, x.neg()), operator.mul),
        (lambda x: torch.true_divide(x, x.neg()), operator.truediv),
        (lambda x: x.neg().rsqrt(), torch.rsqrt),
    ],
)
def test_methods_and_functions_are_one(function, target):
    _, nodes = spelled(function, X)
    assert nodes[-1].target is target


def test_operators_called_as_methods_are_operators():
    """Dynamo of torch 2.11 writes `x.__eq__(y)` for `x == y`."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_method("__eq__", (x, graph.call_method("__mul__", (x, 2)))))
    spell_out(graph)
    assert [node.target for node in graph.nodes if node.op.startswith("call")] == [operator.mul, operator.eq]


def test_what_means_something_else_keeps_its_spelling():
    _, nodes = spelled(lambda x: torch.add(x, x, alpha=2), X)
    assert nodes[-1].target is torch.add
    _, nodes = spelled(lambda x: x.to(torch.float64, copy=True), X)
    assert nodes[-1].target == "to"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(-1, keepdim=True),
        lambda x: torch.mean(x, dim=-1, keepdim=True),
        lambda x: x.mean([-1], True),
        lambda x: torch.mean(x, (-1,), keepdim=True, dtype=None),
    ],
)
def test_arguments_are_read_by_name(function):
    _, (node,) = spelled(function, X)
    named = arguments_of(node)
    assert isinstance(named.pop("input"), fx.Node)
    assert named == {"dim": -1, "keepdim": True, "dtype": None}


@pytest.mark.parametrize(
    "function",
    [lambda x: x[:, 1::2], lambda x: x[..., 1::2], lambda x: x[0:, 1::2], lambda x: x[:, 1:None:2]],
)
def test_whole_axes_of_an_index_go_without_saying(function):
    module, (node,) = spelled(function, X)
    assert node.args[1] == (Ellipsis, slice(1, None, 2))
    assert torch.equal(module(X)[0], X[:, 1::2])


def test_an_index_that_cuts_another_axis_stays():
    module, (node,) = spelled(lambda x: x[1:, ::2], X)
    assert node.args[1] == (slice(1, None), slice(None, None, 2))
    assert torch.equal(module(X)[0], X[1:, ::2])


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("module", [F, torch, torch.Tensor])
def test_activations_have_one_name(module, name):
    _, (node,) = spelled(lambda x: getattr(module, name)(x), X)
    assert node.target is getattr(torch, name)


def test_a_relu_in_place_stays():
    _, (node,) = spelled(lambda x: F.relu(x, True), X.clone())
    assert node.target is F.relu


@pytest.mark.parametrize("function", [lambda x: x.flip(-1), lambda x: x.flip((0, 1)), lambda x: x.tile(2, 1)])
def test_sizes_that_only_methods_take_one_by_one(function):
    module, _ = spelled(function, X)
    assert torch.equal(module(X)[0], function(X))


@pytest.mark.parametrize("function", [lambda x: x.where(x > 0, 2 * x), lambda x: (x > 0).where(x < 1, x == 2)])
def test_a_method_whose_function_has_another_order_stays(function):
    module, _ = spelled(function, X)
    assert torch.equal(module(X)[0], function(X))


def test_all_methods_of_another_order_are_known():
    """Where an operator's schema does not start with `self`, method and function differ in their order."""
    names = {name for name in dir(torch) if callable(getattr(torch, name))} & set(dir(torch.Tensor))
    differ = set()
    for schema in torch._C._jit_get_all_schemas():
        arguments = [argument.name for argument in schema.arguments]
        if schema.name.removeprefix("aten::") in names and "self" in arguments[1:]:
            differ.add(schema.name.removeprefix("aten::"))
    assert differ == OTHER_ORDER


@pytest.mark.parametrize(
    "function",
    [lambda x: x.t(), lambda x: x.T, lambda x: x.mT, lambda x: x.transpose(-1, 0), lambda x: x.permute(1, 0)],
)
def test_each_transposition_of_two_axes_is_one(function):
    module, (node, _) = spelled(lambda x: function(x).sin(), X)
    assert node.target is torch.t
    assert torch.equal(module(X)[0], X.T.sin())


@pytest.mark.parametrize("function", [lambda x: x.transpose(2, 1), lambda x: x.permute(0, 2, 1), lambda x: x.mT])
def test_two_axes_of_more_are_swapped_in_one_way(function):
    x = torch.randn(2, 3, 5)
    module, (node, _) = spelled(lambda x: function(x).sin(), x)
    assert torch.equal(module(x)[0], x.transpose(1, 2).sin())
    assert (node.target, node.args[1:]) == (torch.transpose, (1, 2))


def test_a_permutation_of_three_axes_stays():
    x = torch.randn(2, 3, 5)
    module, (node,) = spelled(lambda x: x.permute(2, 0, 1), x)
    assert node.target == "permute"
    assert torch.equal(module(x)[0], x.permute(2, 0, 1))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_softmax_has_one_name(name, dtype):
    for function in (getattr(F, name), getattr(torch, name)):
        module, (node,) = spelled(lambda x, f=function: f(x, dim=-1, dtype=dtype), X)
        assert node.target is getattr(torch, name)
        assert torch.equal(module(X)[0], function(X, dim=-1, dtype=dtype))


@pytest.mark.parametrize("correction", [0, 1])
def test_a_variance_says_whether_it_is_unbiased(correction):
    module, (node,) = spelled(lambda x: x.var(-1, correction=correction, keepdim=True), X)
    assert node.kwargs == {"keepdim": True, "unbiased": correction == 1}
    assert torch.equal(module(X)[0], X.var(-1, correction=correction, keepdim=True))


def test_a_stack_is_flattened_in_one_way():
    def flattened(x):
        return torch.stack((x, -x), dim=-1).reshape(x.shape[0], -1)

    module, nodes = spelled(flattened, X)
    assert (nodes[-1].target, nodes[-1].args[1]) == (torch.flatten, -2)
    assert torch.equal(module(X)[0], flattened(X))


def test_an_axis_is_counted_from_the_end_where_all_tensors_have_it():
    x = torch.randn(2, 3, 4)
    module, (node,) = spelled(lambda x, y: torch.cat((x, y), 2), x, x.clone())
    assert node.args[1] == -1
    assert torch.equal(module(x, x)[0], torch.cat((x, x), 2))
    nothing = torch.empty(0)  # which `cat` leaves out
    module, (node,) = spelled(lambda x, y: torch.cat((y, x), 2), x, nothing)
    assert node.args[1] == 2
    assert torch.equal(module(x, nothing)[0], x)
