"""A small vocabulary for FX graphs: what a node computes, where it comes from, how to walk and grow a graph."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxopt.error_lines import FRAME, is_ours

# Their underscore keeps them apart from Python's keywords, and does not mean that they write.
NAMED_FOR_KEYWORDS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
MUTATING_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
)
RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal_", "exponential", "rrelu")
SELECTIVE = "_checkpoint_context_fn"  # where the body of a checkpoint says what it saves nevertheless
# In Dynamo's names of sources, what is not part of a path in the model.
DYNAMO_WORDS = frozenset({"L", "G", "forward", "__self__", "call", "_modules", "_parameters", "_buffers", "__dict__"})


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`; the one spelling of a dtype conversion in a canonical graph."""
    return x.to(dtype)


def value_of(node: Any) -> Any:
    """The fake value (tensor, SymInt, tuple, …) that a node stands for; a literal stands for itself."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def tensor_of(node: Any) -> torch.Tensor | None:
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def as_captured(number: Any) -> Any:
    """A size, or another number, that may be dynamic, as it was captured with; None where it depends on data."""
    return number.node.hint if isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool) else number


def shape_of(node: Any) -> tuple[Any, ...]:
    """The shape of the tensor a node yields (dynamic sizes are SymInts), `()` where it is not a tensor."""
    value = tensor_of(node)
    return tuple(value.shape) if value is not None else ()


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of the tensor a node yields, None where it is not a tensor."""
    value = tensor_of(node)
    return value.dtype if value is not None else None


def requires_grad(node: Any) -> bool:
    value = tensor_of(node)
    return value is not None and value.requires_grad


def argument_of(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """One argument of a call, given by position or by name, or its default."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_mutating(node: fx.Node) -> bool:
    """Whether a node writes into one of its inputs."""
    return bool(nodes_written(node))


def nodes_written(node: fx.Node) -> list[fx.Node]:
    """The inputs that a node writes into; all of them where it does not say which."""
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return []
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if "out" in node.kwargs:
        return _nodes_in(node.kwargs["out"])
    if name.endswith("_") and not name.endswith("__") and node.target not in NAMED_FOR_KEYWORDS:
        return _nodes_in(node.args[0]) if node.args else node.all_input_nodes
    if node.target in MUTATING_OPERATORS:
        return _nodes_in(node.args[0])
    if isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes if node.target._schema.is_mutable else []
    if any(is_mutating(inner) for module in inner_graphs(node) for inner in module.graph.nodes):
        return node.all_input_nodes
    if inspect.isfunction(node.target):
        arguments = _bound(node)
        if arguments.get("inplace") is True:
            return node.all_input_nodes[:1]
        if arguments.get("training", arguments.get("use_input_stats")):
            return _nodes_in([arguments.get("running_mean"), arguments.get("running_var")])
    return []


def _bound(node: fx.Node) -> dict[str, Any]:
    assert inspect.isfunction(node.target)
    try:
        return _signature(node.target).bind_partial(*node.args, **node.kwargs).arguments
    except TypeError:
        return dict(node.kwargs)


_signature = functools.lru_cache(maxsize=256)(inspect.signature)


def _nodes_in(value: Any) -> list[fx.Node]:
    return [node for node in tree_leaves(value) if isinstance(node, fx.Node)]


def inner_graphs(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a node runs: the body of activation checkpointing, the branches of a condition."""
    owner = node.graph.owning_module
    attributes = (source.target for source in node.all_input_nodes if source.op == "get_attr")
    found = (getattr(owner, str(name), None) for name in attributes)
    return [module for module in found if isinstance(module, fx.GraphModule)]


def is_mode_switch(node: fx.Node) -> bool:
    """Whether a node's effect is on how what follows it is computed: autograd's, autocast's or vmap's state."""
    if node.op != "call_function":
        return False
    module = getattr(node.target, "__module__", "") or ""
    name = getattr(node.target, "__name__", "")
    in_functorch = "_functorch" in module or "functorch" in name or "vmap" in name
    return (
        in_functorch
        or name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")
        or (not isinstance(node.target, torch._ops.OpOverload) and not is_mutating(node) and _has_only_an_effect(node))
    )


def _has_only_an_effect(node: fx.Node) -> bool:
    return value_of(node) is None and not node.users


def storages_written(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The storages that nodes of `graph` write to, by identity, and which nodes do, in order."""
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        for storage in {storage for target in nodes_written(node) for storage in storages_of(target)}:
            found.setdefault(storage, []).append(node)
    return found


def storages_of(node: Any) -> frozenset[int]:
    """The identities of the storages that a node's fake values lie in; views share them."""
    values = (value for value in tree_leaves(value_of(node)) if isinstance(value, torch.Tensor))
    return frozenset(_outside_vmap(value).untyped_storage()._cdata for value in values)


def _outside_vmap(value: torch.Tensor) -> torch.Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def is_random(node: fx.Node) -> bool:
    """Whether two runs of the node may differ."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name == "scaled_dot_product_attention":
        return bool(argument_of(node, 4, "dropout_p", 0.0) != 0.0)
    return any(word in name for word in RANDOM)


def remove_dead_code(graph: fx.Graph) -> None:
    """Drop nodes that nobody uses. Writes, random numbers and mode switches stay, used or not.

    In this graph only: `fx.Graph.eliminate_dead_code` goes on into the graphs inside it, and there drops writes.
    """
    for node in reversed(graph.nodes):
        if not (node.users or node.is_impure() or is_mutating(node) or is_random(node) or is_mode_switch(node)):
            graph.erase_node(node)


def nodes_to_move_up(value: fx.Node, before: fx.Node) -> list[fx.Node] | None:
    """What must be computed earlier for `value` to be known at `before`, in order; None where that cannot be.

    Only what follows from parameters and other inputs of the graph is moved, such as the `1 + weight` of a norm.
    """
    late: list[fx.Node] = []
    pending = [value]
    while pending:
        node = pending.pop()
        if node < before or node in late:
            continue
        stays = node is before or is_mutating(node) or is_random(node) or is_mode_switch(node)
        if stays or any(source.op.startswith("call") and source < before for source in node.all_input_nodes):
            return None
        late.append(node)
        pending += node.all_input_nodes
    return sorted(late)


@dataclass(frozen=True)
class SourceLine:
    """A line of source: the file, the number of the line, the function around it, and the code without its indent."""

    path: str
    line: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{self.path.rsplit('/', 1)[-1]}:{self.line}: {self.code}"


def source_of(node: fx.Node) -> SourceLine | None:
    """The innermost line of model source that a node comes from; none of fxopt's, which makes a policy's casts."""
    return _innermost_line(node.stack_trace or "")


@functools.lru_cache(maxsize=4096)  # each node is asked after each pass, and all layers have the same lines
def _innermost_line(stack_trace: str) -> SourceLine | None:
    lines = [line.strip() for line in stack_trace.splitlines() if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if found := FRAME.match(lines[index]):
            path, line, function = found.groups()
            if not is_ours(path):
                return SourceLine(path, int(line), function, lines[index + 1] if index + 1 < len(lines) else "")
    return None


def source_line(node: fx.Node) -> str:
    """`file.py:line: code` of the innermost line of model source that a node comes from, or ''."""
    return str(source_of(node) or "")


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward a node belongs to, such as `model.layers.3.mlp`, or ''."""
    stack = node.meta.get("nn_module_stack") or {}
    return _without_dynamo(list(stack.values())[-1][0]) if stack else ""


def readable_name(node: fx.Node) -> str:
    """A node's name; for an input that is a parameter or an argument, its path: `model.norm.weight`."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = source.name if source is not None else ""
    return _without_dynamo(name() if callable(name) else name) or node.name


_AFTER_A_BREAK = re.compile(r"^L\['(self|__nested_frame_values)'\](\[\d+\])*")


def _without_dynamo(path: str) -> str:
    """`L['forward'].__self__._modules['model']._modules['norm']` as `model.norm`.

    After a graph break inside of a module's forward, paths are told from that module on.
    """
    words = re.findall(r"\w+", _AFTER_A_BREAK.sub("", path))
    return ".".join(word for word in words if word not in DYNAMO_WORDS)


def graph_modules(root: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """`root` and every graph inside it: bodies of activation checkpointing, nested compile regions."""
    return (module for _, module in named_graph_modules(root))


def named_graph_modules(root: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """`root`, whose path is '', and every graph inside it with its path."""
    for path, module in root.named_modules():
        if isinstance(module, fx.GraphModule):
            yield path, module


def link_inner_graphs(root: fx.GraphModule) -> None:
    """Let the placeholders of inner graphs know what they are called with, for `outermost`.

    An inner graph is called as `operator(inner, *arguments)`: activation checkpointing does it so.
    """
    for module in graph_modules(root):
        for inner in module.graph.find_nodes(op="get_attr"):
            body = getattr(module, str(inner.target), None)
            if not isinstance(body, fx.GraphModule):
                continue
            placeholders = list(body.graph.find_nodes(op="placeholder"))
            for caller in inner.users:
                arguments = caller.args[caller.args.index(inner) + 1 :]
                if len(inner.users) == 1 and len(arguments) == len(placeholders):
                    for placeholder, argument in zip(placeholders, arguments, strict=True):
                        placeholder.meta["fxopt_argument"] = argument


def outermost(node: Any) -> Any:
    """What an inner graph's placeholder stands for in the graph around it; any other node stands for itself."""
    while isinstance(node, fx.Node) and node.op == "placeholder" and "fxopt_argument" in node.meta:
        node = node.meta["fxopt_argument"]
    return node


def fill_in_values(nodes: list[fx.Node], like: fx.Node) -> None:
    """Give new nodes what Dynamo's nodes carry: fake values, and the source that `like` comes from."""
    fake = next((value.fake_mode for value in _fake_tensors(nodes, like)), None)
    for node in nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in like.meta:
                node.meta.setdefault(key, like.meta[key])
        if not node.op.startswith("call") or fake is None:
            continue
        args = fx.map_arg(node.args, value_of)
        kwargs = fx.map_arg(node.kwargs, value_of)
        with fake, _autocast_at(node):
            node.meta["example_value"] = call_target(node)(*args, **kwargs)


def autocast_switches(graph: fx.Graph) -> list[fx.Node]:
    """Where a forward switches autocast on, or off, inside."""
    return list(graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast))


def _autocast_at(node: fx.Node) -> ExitStack:
    """The autocast that a forward has switched on or off around a node; what is around the call, is around passes."""
    stack, entered = ExitStack(), []
    switches = autocast_switches(node.graph)
    is_on = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if any(argument_of(switch, 2, "enabled", True) for switch in switches) or (switches and is_on):
        for before in node.graph.nodes:
            if before is node:
                break
            if before in switches:
                entered.append(before)
            elif before.target is torch.amp.autocast_mode._exit_autocast and before.args[0] in entered:
                entered.remove(before.args[0])
    for switch in entered:
        stack.enter_context(torch.amp.autocast(*switch.args))
    return stack


def keep_layout(node: fx.Node, before: Any) -> fx.Node:
    """`node`, or a copy of it that lies in memory as the value `before` did, where something depends on that.

    That is: a `view` that would be none, a result that leaves the graph, a graph inside, of which nothing is known.
    Other nodes that follow are told how their values lie now.
    """
    value, fake = value_of(node), next((value.fake_mode for value in _fake_tensors([node], node)), None)
    if fake is None or not isinstance(before, torch.Tensor) or _layout(before) == _layout(value):
        return node
    told: dict[fx.Node, Any] = {node: value}
    for follower in _nodes_after(node):
        if told.keys().isdisjoint(follower.all_input_nodes):
            continue
        if follower.op == "output" or inner_graphs(follower) or is_mode_switch(follower) or is_mutating(follower):
            return _copied_to_layout(node, before)
        try:
            with fake, _autocast_at(follower):
                new = call_target(follower)(
                    *fx.map_arg(follower.args, lambda n: told.get(n, value_of(n))),
                    **fx.map_arg(follower.kwargs, lambda n: told.get(n, value_of(n))),
                )
        except Exception:  # such as a view that is none
            return _copied_to_layout(node, before)
        if _layout(new) != _layout(value_of(follower)):
            told[follower] = new
    for follower, new in told.items():
        follower.meta["example_value"] = new
    return node


def _nodes_after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _copied_to_layout(node: fx.Node, like: torch.Tensor) -> fx.Node:
    """A copy of `node` with the axes in the order in memory that those of `like` have."""
    order = sorted(range(like.ndim), key=like.stride, reverse=True)
    back = sorted(range(like.ndim), key=order.__getitem__)
    graph, new, users = node.graph, [], list(node.users)
    last = node
    steps: list[tuple[str, tuple[Any, ...]]] = [
        ("permute", (tuple(order),)),
        ("contiguous", ()),
        ("permute", (tuple(back),)),
    ]
    for method, arguments in steps if order != sorted(order) else steps[1:2]:
        with graph.inserting_after(last):
            last = graph.call_method(method, (last, *arguments))
        new.append(last)
    fill_in_values(new, like=node)
    for user in users:
        user.replace_input_with(node, last)
    return last


def _layout(value: Any) -> list[str]:
    """The strides of each tensor in a value; as text, since comparing dynamic ones would guard them."""
    return [str(tensor.stride()) for tensor in tree_leaves(value) if isinstance(tensor, torch.Tensor)]


def call_target(node: fx.Node) -> Callable[..., Any]:
    """The callable that a `call_function` or `call_method` node runs."""
    if node.op == "call_method":
        return lambda self, *args, **kwargs: getattr(self, str(node.target))(*args, **kwargs)
    assert callable(node.target), node.format_node()
    return node.target


def _fake_tensors(nodes: list[fx.Node], like: fx.Node) -> Iterator[Any]:
    for node in (like, *(source for new in nodes for source in new.all_input_nodes)):
        value = tensor_of(node)
        if value is not None and hasattr(value, "fake_mode"):
            yield value
