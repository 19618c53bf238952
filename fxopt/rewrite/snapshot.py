"""A graph as plain data, kept after the graph itself is compiled and gone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxopt.rewrite.graph import (
    SourceLine,
    as_captured,
    module_path,
    named_graph_modules,
    readable_name,
    source_line,
    source_of,
    value_of,
)
from fxopt.rewrite.match import target_name


@dataclass(frozen=True)
class NodeRow:
    """One node: what it computes, the shape and dtype of its value, its bytes, and where it comes from.

    `name` is unique among the nodes of one graph, whose path is `graph`, as long as the passes run. `inputs` names what
    it reads as the model does, `input_nodes` as the graph does. `shape` and `size_bytes` count a dynamic size as the
    size that the graph was captured with. `rule` is the rule that put the node in, or ''. Where the value is several
    tensors, `results` has the dtype and shape of each and `size_bytes` is that of all; `dtype` and `shape` are empty.
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    value: str
    size_bytes: int
    source: str
    module: str
    rule: str
    graph: str = ""
    input_nodes: tuple[str, ...] = ()
    arguments: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    source_line: SourceLine | None = None
    results: tuple[tuple[str, tuple[int, ...]], ...] = ()


def snapshot(root: fx.GraphModule) -> tuple[NodeRow, ...]:
    """Every call in `root` and in the graphs inside it, in order."""
    return tuple(
        _row(node, path)
        for path, inner in named_graph_modules(root)
        for node in inner.graph.nodes
        if node.op.startswith("call")
    )


def _row(node: fx.Node, graph: str) -> NodeRow:
    value = value_of(node)
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    results = tuple((_dtype(tensor), _shape(tensor)) for tensor in tensors)
    dtype, shape = results[0] if isinstance(value, torch.Tensor) else ("", ())
    return NodeRow(
        name=node.name,
        operation=target_name(node),
        inputs=tuple(readable_name(source) for source in node.all_input_nodes),
        value=", ".join(f"{_dtype(tensor)}[{', '.join(map(str, tensor.shape))}]" for tensor in tensors),
        size_bytes=sum(map(_size_bytes, tensors)),
        source=source_line(node),
        module=module_path(node),
        rule=str(node.meta.get("fxopt_rule", "")),
        graph=graph,
        input_nodes=tuple(source.name for source in node.all_input_nodes),
        arguments=_arguments(node),
        shape=shape,
        dtype=dtype,
        source_line=source_of(node),
        results=() if dtype else results,
    )


def _arguments(node: fx.Node) -> str:
    """What a node is called with, as it would be written in Python."""
    positional = [_text(value) for value in node.args]
    return ", ".join(positional + [f"{name}={_text(value)}" for name, value in node.kwargs.items()])


def _text(value: object) -> str:
    if isinstance(value, fx.Node):
        return readable_name(value)
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_text, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, slice):
        return f"slice({', '.join(map(_text, (value.start, value.stop, value.step)))})"
    return repr(value)


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shape(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(as_captured(length) or 0 for length in value.shape)


def _size_bytes(value: torch.Tensor) -> int:
    return math.prod(_shape(value), start=value.element_size())
