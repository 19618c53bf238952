"""One spelling for each operation, so that a pattern meets a graph whichever way the model's author wrote it.

PyTorch has many ways to write the same thing: `x.float()`, `x.to(torch.float32)` and `x.type(torch.float32)`;
`x.pow(2)`, `x ** 2`, `x * x` and `torch.square(x)`; `x.mean(-1, keepdim=True)` and `torch.mean(x, dim=[-1],
keepdim=True)`. `spell_out` brings every node of a graph into one of them, without changing what it computes:

* a dtype conversion is `cast(x, dtype)`, a square is `torch.square(x)`, arithmetic uses `operator`'s functions;
* a method with a function of the same name in `torch` becomes that function;
* sizes stand in one tuple, and an index names the axes that it cuts;
* what swaps two axes is `torch.transpose`, or `torch.t` where there are no more.

Arguments keep their places in the graph; `arguments_of` reads them by name, whichever way they were given.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.rewrite.graph import argument_of, cast, dtype_of, shape_of, tensor_of, value_of

CASTING_METHODS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int32,
    "long": torch.int64,
    "bool": torch.bool,
}

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "subtract": operator.sub,
    "mul": operator.mul,
    "multiply": operator.mul,
    "div": operator.truediv,
    "divide": operator.truediv,
    "true_divide": operator.truediv,
    "neg": operator.neg,
    "negative": operator.neg,
    "pow": operator.pow,
    "matmul": operator.matmul,
}

FUNCTIONAL: dict[Any, Callable[..., Any]] = {F.tanh: torch.tanh, F.sigmoid: torch.sigmoid, F.relu: torch.relu}
SOFTMAX: dict[Any, Callable[..., Any]] = {F.softmax: torch.softmax, F.log_softmax: torch.log_softmax}

# Methods that take their sizes one by one or as a tuple.
SIZE_METHODS = frozenset({"view", "reshape", "expand", "permute", "repeat", "tile", "flip"})

# Methods of which the function takes its arguments in another order: `x.where(c, y)` is `torch.where(c, x, y)`.
OTHER_ORDER = frozenset({"where", "polygamma"})


def spell_out(graph: fx.Graph) -> None:
    """Bring every call in `graph` into its canonical spelling, in place. The values do not change."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            _spell_cast(node)
            _spell_function(node)
            _spell_softmax(node)
            _spell_variance(node)
            _spell_norm(node)
            _spell_sizes(node)
            _spell_transposition(node)
            _spell_flattening(node)
            _spell_axis(node)
            _spell_index(node)
            spell_square(node)
            _spell_reciprocal_root(node)


def _spell_cast(node: fx.Node) -> None:
    """`x.float()`, `x.to(dtype=…)`, `x.type_as(y)`, … become `cast(x, dtype)`."""
    if node.op != "call_method":
        return
    x, *rest = node.args
    name, kwargs = str(node.target), dict(node.kwargs)
    dtype: Any = None
    if name in CASTING_METHODS and not rest and not kwargs:
        dtype = CASTING_METHODS[name]
    elif name in ("to", "type"):
        if kwargs.pop("copy", False):
            return
        kwargs.pop("non_blocking", None)
        for option in [*rest, *kwargs.values()]:
            if _is_dtype(option):
                dtype = option
            elif not _is_device_of(x, option):
                return  # a move to another device, or `to(other)`: not a plain cast
    elif name == "type_as" and len(rest) == 1:
        dtype = dtype_of(rest[0])
    if dtype is not None:
        node.op, node.target, node.args, node.kwargs = "call_function", cast, (x, dtype), {}


def _is_dtype(option: Any) -> bool:
    # In a traced pattern the dtype is a placeholder: a Node without a value.
    return isinstance(option, torch.dtype) or (isinstance(option, fx.Node) and tensor_of(option) is None)


def _is_device_of(x: Any, option: Any) -> bool:
    tensor = tensor_of(x)
    return tensor is not None and isinstance(option, (torch.device, str)) and torch.device(option) == tensor.device


def _spell_function(node: fx.Node) -> None:
    """Methods become functions, and arithmetic becomes `operator`'s."""
    if node.op == "call_function" and node.target in FUNCTIONAL and not argument_of(node, 1, "inplace", False):
        options = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        node.target, node.args, node.kwargs = FUNCTIONAL[node.target], node.args[:1], options
    name = _name(node)
    if node.op == "call_method" and name.startswith("__") and hasattr(operator, name):  # older Dynamo's `x.__eq__(y)`
        node.op, node.target = "call_function", getattr(operator, name)
    plain = not node.kwargs and isinstance(node.target, str | _BuiltinFunction)
    if name in ARITHMETIC and plain and len(node.args) <= 2:
        node.op, node.target = "call_function", ARITHMETIC[name]
    elif node.op == "call_method" and name not in SIZE_METHODS | OTHER_ORDER and _is_torch_function(name):
        node.op, node.target = "call_function", getattr(torch, name)


_BuiltinFunction = type(torch.add)


def _is_torch_function(name: str) -> bool:
    return isinstance(getattr(torch, name, None), _BuiltinFunction) and not name.endswith("_")


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _spell_softmax(node: fx.Node) -> None:
    """`F.softmax(x, dim=1)` becomes `torch.softmax(x, 1)`."""
    function = SOFTMAX.get(node.target)
    dim, dtype = argument_of(node, 1, "dim", None), argument_of(node, 3, "dtype", None)
    if function is not None and dim is not None and node.args:
        node.target, node.args = function, (node.args[0], dim)
        node.kwargs = {"dtype": dtype} if dtype is not None else {}


def _spell_variance(node: fx.Node) -> None:
    """`x.var(-1, correction=0)` becomes `x.var(-1, unbiased=False)`."""
    has_axis = argument_of(node, 1, "dim", None) is not None  # without one, there is no `unbiased` beside `keepdim`
    is_variance = node.target in (torch.var, torch.std, torch.var_mean) and has_axis
    if is_variance and node.kwargs.get("correction") in (0, 1):
        options = {name: value for name, value in node.kwargs.items() if name != "correction"}
        node.kwargs = {**options, "unbiased": node.kwargs["correction"] == 1}


def _spell_norm(node: fx.Node) -> None:
    """`x.norm(2, dim=-1, keepdim=True)` becomes `torch.linalg.vector_norm(x, dim=-1, keepdim=True)`: over one axis."""
    if node.target not in ("norm", torch.norm):
        return
    power, dim = argument_of(node, 1, "p", "fro"), argument_of(node, 2, "dim", None)
    axes = dim if isinstance(dim, list | tuple) else (dim,)
    is_plain = len(axes) == 1 and type(axes[0]) is int and argument_of(node, 4, "out", None) is None
    x = argument_of(node, 0, "input", None)
    if x is not None and power in (None, "fro", 2) and is_plain and argument_of(node, 5, "dtype", None) is None:
        keepdim = argument_of(node, 3, "keepdim", False)
        node.op, node.target, node.args = "call_function", torch.linalg.vector_norm, (x,)
        node.kwargs = {"dim": axes[0], "keepdim": keepdim}


def _spell_reciprocal_root(node: fx.Node) -> None:
    """`x ** -0.5` becomes `torch.rsqrt(x)`, which PyTorch runs for it."""
    if node.target is operator.pow and node.args[1:] == (-0.5,) and _is_floating(node.args[0]):
        node.target, node.args = torch.rsqrt, node.args[:1]


def spell_square(node: fx.Node) -> None:
    """`x ** 2`, `x.pow(2)` and `x * x` become `torch.square(x)`: in floating point all four round alike."""
    if node.target not in (operator.pow, operator.mul) or len(node.args) != 2:
        return
    base, other = node.args
    if not isinstance(base, fx.Node) or (value_of(base) is not None and tensor_of(base) is None):
        return  # a size
    is_power = node.target is operator.pow and isinstance(other, int | float) and other == 2
    if is_power or (node.target is operator.mul and other is base and _is_floating(base)):
        node.target, node.args = torch.square, (base,)


def _is_floating(node: Any) -> bool:
    """Whether a node is a floating tensor, as everything in a pattern may be."""
    value = value_of(node)
    return value is None or (isinstance(value, torch.Tensor) and value.is_floating_point())


def _spell_sizes(node: fx.Node) -> None:
    """`x.view(2, 3)` becomes `x.view((2, 3))`."""
    if node.op == "call_method" and str(node.target) in SIZE_METHODS:
        x, *sizes = node.args
        is_whole = len(sizes) == 1 and isinstance(value_of(sizes[0]), tuple | list | torch.dtype)  # `x.view(y.shape)`
        if sizes and not is_whole:
            node.args = (x, tuple(sizes))


# An attribute is an operator in what Dynamo captures since torch 2.14, and `getattr` until 2.13.
_TRANSPOSED: dict[Any, str] = {torch.ops.aten.numpy_T: "T", torch.ops.aten.mT: "mT"}


def _spell_transposition(node: fx.Node) -> None:
    """`x.permute(0, 2, 1)` and `x.mT` become `x.transpose(1, 2)`; of two axes, all of these and `x.T` `x.t()`."""
    tensor = tensor_of(node.args[0]) if node.args else None
    if tensor is None or tensor.ndim < 2 or node.kwargs:
        return
    axes: list[int] = []
    attribute = _TRANSPOSED.get(node.target, node.args[1] if node.target is getattr else None)
    if node.target is torch.transpose:
        axes = sorted(axis % tensor.ndim for axis in node.args[1:] if isinstance(axis, int))
    elif node.target == "permute" and isinstance(node.args[1], tuple | list):
        axes = [axis for axis, source in enumerate(node.args[1]) if source not in (axis, axis - tensor.ndim)]
    elif attribute == "mT" or (attribute == "T" and tensor.ndim == 2):
        axes = [tensor.ndim - 2, tensor.ndim - 1]
    if len(axes) == 2 and axes[0] != axes[1]:
        swapped = (torch.t, ()) if tensor.ndim == 2 else (torch.transpose, tuple(axes))
        node.op, node.target, node.args = "call_function", swapped[0], (node.args[0], *swapped[1])


def _spell_flattening(node: fx.Node) -> None:
    """`x.flatten(0, -2)`, of an x whose last size is known, becomes `x.reshape((-1, size))`.

    And `torch.stack((x, y), -1).reshape(x.shape[:-1] + (2 * n,))` becomes `torch.stack((x, y), -1).flatten(-2)`.
    """
    source = node.args[0] if node.args else None
    if node.target in ("view", "reshape") and isinstance(source, fx.Node) and source.target is torch.stack:
        sizes, flat = shape_of(source), shape_of(node)
        pair = sizes[-2:]
        if len(pair) == 2 and all(isinstance(size, int) for size in pair) and not node.kwargs:
            flattened = (*sizes[:-2], pair[0] * pair[1])
            if len(flat) == len(flattened) and all(map(_is_same_size, flat, flattened)):
                node.op, node.target, node.args = "call_function", torch.flatten, (source, -2)
        return
    if node.target not in ("flatten", torch.flatten) or len(node.args) != 3 or node.kwargs:
        return
    tensor = tensor_of(node.args[0])
    if tensor is None or tensor.ndim < 3 or node.args[1] not in (0, -tensor.ndim):
        return
    if node.args[2] in (-2, tensor.ndim - 2) and isinstance(tensor.shape[-1], int) and tensor.shape[-1] > 0:
        node.op, node.target, node.args = "call_method", "reshape", (node.args[0], (-1, tensor.shape[-1]))


def _is_same_size(size: Any, other: Any) -> bool:
    """Whether two sizes are equal whatever the dynamic ones are; it asks nothing that would be guarded."""
    if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(size.node.expr == other.node.expr)
    return isinstance(size, int) and isinstance(other, int) and size == other


def _spell_axis(node: fx.Node) -> None:
    """`cat((x, y), 3)`, of four axes, becomes `cat((x, y), -1)`, and `x.flatten(3)`, of five, `x.flatten(-2)`."""
    if node.target not in (torch.cat, torch.flatten) or len(node.args) not in (1, 2):
        return
    parts = node.args[0] if isinstance(node.args[0], tuple | list) else node.args[:1]
    num_axes = {tensor.ndim for part in parts if (tensor := tensor_of(part)) is not None}
    if len(num_axes) != 1:
        return  # not known, or different: `cat` leaves out an empty tensor of one axis
    (ndim,) = num_axes
    for name, axis in [*enumerate(node.args[1:], 1), *node.kwargs.items()]:
        if name in (1, "dim", "start_dim") and isinstance(axis, int) and axis > 0:
            if isinstance(name, int):
                node.update_arg(name, axis - ndim)
            else:
                node.update_kwarg(name, axis - ndim)


def _spell_index(node: fx.Node) -> None:
    """`x[:, :, 0::2]` becomes `x[..., ::2]`, `x[:, :-1]` `x[..., :-1, :]`: whole axes before one go without saying."""
    if node.target not in (operator.getitem, operator.setitem):
        return
    if not isinstance(node.args[1], tuple) or not node.args[1]:
        return
    x, given, *value = node.args
    assert isinstance(given, tuple)
    index: tuple[Any, ...] = tuple(
        slice(None, item.stop, item.step) if isinstance(item, slice) and item.start == 0 else item for item in given
    )
    tensor = tensor_of(x)
    if tensor is not None and tensor.ndim > 1 and all(isinstance(item, slice) for item in index):
        index += (slice(None),) * (tensor.ndim - len(index))
        num_whole = next((axis for axis, item in enumerate(index) if item != slice(None)), tensor.ndim)
        if 0 < num_whole < tensor.ndim:
            index = (Ellipsis, *index[num_whole:])
    node.args = (x, index, *value)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by parameter name, defaults filled in; by position where the signature is not known.

    Two calls of one operation have equal dictionaries exactly if they were given equal arguments, whichever of
    positions, keywords and defaults they were written with. The graph is not changed.
    """
    by_position = {str(index): value for index, value in enumerate(node.args)} | dict(node.kwargs)
    if node.op != "call_function" or node.target in _OPERATORS or not callable(node.target):
        return by_position
    for signature in _signatures(node.target):
        try:
            bound = signature.bind(*node.args, **node.kwargs)
        except TypeError:
            continue
        bound.apply_defaults()
        return {name: _spell_dim(name, value) for name, value in bound.arguments.items()}
    return by_position


_OPERATORS = frozenset(value for value in vars(operator).values() if callable(value))


def _spell_dim(name: str, value: Any) -> Any:
    return value[0] if name == "dim" and isinstance(value, list | tuple) and len(value) == 1 else value


@functools.cache
def _signatures(target: Callable[..., Any]) -> tuple[inspect.Signature, ...]:
    """The signatures a target may be called with: of a Python function its own, of an ATen function its overloads'."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return ()
    if inspect.isfunction(target):
        return (inspect.signature(target),)
    name = getattr(target, "__name__", "")
    return tuple(_signature_of_schema(schema) for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"))


def _signature_of_schema(schema: Any) -> inspect.Signature:
    parameters = []
    for argument in schema.arguments:
        kind = inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        name = {"self": "input"}.get(argument.name, argument.name)
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, kind, default=default))
    try:
        return inspect.Signature(parameters)
    except ValueError:  # a default before a parameter without one: legal in a schema only
        stripped = [p.replace(default=inspect.Parameter.empty) for p in parameters]
        return inspect.Signature(stripped)
