"""Dtype conversions that cannot change a value.

Removed are: a cast to the dtype a tensor already has; the narrow-back of a widening (bf16 → fp32 → bf16 is the
tensor itself); the first of two widenings (bf16 → fp32 → fp64 is bf16 → fp64); and a widening before an operation
that is told to widen its input, such as a router's softmax. Removing a *narrowing* cast changes values, so such casts
stay.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from fxopt.rewrite.graph import cast, dtype_of, storages_of, storages_written
from fxopt.rewrite.pipeline import simple_pass

# Which dtypes hold every value of the dtype on the left.
WIDER: dict[torch.dtype, frozenset[torch.dtype]] = {
    torch.bfloat16: frozenset({torch.float32, torch.float64}),
    torch.float16: frozenset({torch.float32, torch.float64}),
    torch.float32: frozenset({torch.float64}),
}


# What casts its input by itself, where it is told to.
CASTING = frozenset({torch.softmax, torch.log_softmax, torch.sum, torch.mean})


def remove_casts(graph: fx.Graph) -> None:
    """Remove every cast whose absence cannot be seen in any value."""
    written = storages_written(graph).keys()
    for node in list(graph.nodes):
        if node.target in CASTING:
            _take_uncast_input(node, written)
        if node.target is not cast:
            continue
        source, dtype = node.args
        if _any_written(written, node, source, *getattr(source, "all_input_nodes", ())):
            continue  # a copy of what is written to later, or one that is written to itself, is not redundant
        if dtype_of(source) != dtype and isinstance(source, fx.Node) and source.target is cast:
            origin = source.args[0]
            if _widens(origin, source):
                # origin → wider → dtype: the detour loses nothing, so `dtype` can be reached from origin directly.
                node.args = (origin, dtype)
                source = origin
        if dtype_of(source) == dtype:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _any_written(written: Collection[int], *nodes: Any) -> bool:
    return any(storage in written for node in nodes for storage in storages_of(node))


def _take_uncast_input(node: fx.Node, written: Collection[int]) -> None:
    """softmax(x.float(), dtype=torch.float32) widens x itself, so the copy of it is not needed."""
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and source.target is cast and node.kwargs.get("dtype") == source.args[1]:
        origin = source.args[0]
        if isinstance(origin, fx.Node) and _widens(origin, source) and not _any_written(written, origin, source):
            node.args = (origin, *node.args[1:])
            if not source.users:
                source.graph.erase_node(source)


def _widens(before: Any, after: fx.Node) -> bool:
    return dtype_of(after) in WIDER.get(dtype_of(before) or torch.bool, frozenset())


REMOVE_CASTS = simple_pass("remove_casts", remove_casts)
