"""A graph as plain data, kept after the graph itself is compiled and gone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxopt.rewrite.graph import graph_modules, module_path, readable_name, source_line, tensor_of
from fxopt.rewrite.match import target_name


@dataclass(frozen=True)
class NodeRow:
    """One node: what it computes, the shape and dtype of its value, its bytes, and where it comes from.

    `size_bytes` counts a dynamic size as the size that the graph was captured with. `rule` is the rule that put
    the node in, or ''.
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    value: str
    size_bytes: int
    source: str
    module: str
    rule: str


def snapshot(root: fx.GraphModule) -> tuple[NodeRow, ...]:
    """Every call in `root` and in the graphs inside it, in order."""
    return tuple(
        _row(node) for inner in graph_modules(root) for node in inner.graph.nodes if node.op.startswith("call")
    )


def _row(node: fx.Node) -> NodeRow:
    value = tensor_of(node)
    dtype_and_shape = ""
    if value is not None:
        dtype_and_shape = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return NodeRow(
        name=node.name,
        operation=target_name(node),
        inputs=tuple(readable_name(source) for source in node.all_input_nodes),
        value=dtype_and_shape,
        size_bytes=_size_bytes(value) if value is not None else 0,
        source=source_line(node),
        module=module_path(node),
        rule=str(node.meta.get("fxopt_rule", "")),
    )


def _size_bytes(value: torch.Tensor) -> int:
    size = value.element_size()
    for length in value.shape:
        size *= length if isinstance(length, int) else length.node.hint or 0  # None: it depends on data
    return size
