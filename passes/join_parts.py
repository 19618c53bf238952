"""A new tensor that is written part by part  →  the parts, joined: what the fusions know, without a write.

    y = torch.empty_like(x); y[..., :n] = a; y[..., n:] = b       →  torch.cat((a, b), -1)
    y = torch.empty_like(x); y[..., ::2] = a; y[..., 1::2] = b    →  torch.stack((a, b), -1).flatten(-2)
    y = torch.empty(…, 2); y[..., 0] = a; y[..., 1] = b           →  torch.stack((a, b), -1)

Along the last axis alone, and not where the graph switches autocast on, under which `cat` and `stack` choose a dtype.
Rotary embeddings outside transformers are written so. Autograd then has one node instead of a copy of slices a part.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import fx

from fxopt.rewrite.graph import (
    autocast_switches,
    cast,
    dtype_of,
    fill_in_values,
    is_mode_switch,
    keep_layout,
    shape_of,
    storages_of,
    storages_written,
    tensor_of,
)
from fxopt.rewrite.match import target_name
from fxopt.rewrite.pipeline import simple_pass

NEW = frozenset({"empty_like", "zeros_like", "empty", "zeros", "new_empty", "new_zeros"})
Parts = dict[Any, fx.Node]  # of the last axis: a slice as (start, stop, step), or an index


def join_parts(graph: fx.Graph) -> None:
    """Join what is written to a new tensor, wherever it covers the last axis and nobody looks before the last write."""
    if autocast_switches(graph):
        return
    written = storages_written(graph)
    for new in list(graph.nodes):
        if new.op not in ("call_function", "call_method") or target_name(new) not in NEW:
            continue
        value = tensor_of(new)
        if value is None or (value.element_size() == 2 and torch.is_autocast_enabled(value.device.type)):
            continue
        writes = [node for storage in storages_of(new) for node in written.get(storage, ())]
        parts = _parts(new, writes)
        join = _join_of(parts, shape_of(new)[-1]) if parts and _nobody_looks_before(new, writes) else None
        if join is None or any(storages_of(part) & written.keys() for part in parts.values()):
            continue
        _put_in_place(new, writes, join)


def _parts(new: fx.Node, writes: list[fx.Node]) -> Parts:
    """What each part of the last axis is written with; nothing where a write is another one."""
    parts: Parts = {}
    *rows, whole = shape_of(new) or (None,)
    device = getattr(tensor_of(new), "device", None)
    for write in writes:
        if write.target is not operator.setitem or write.args[0] is not new or not isinstance(whole, int):
            return {}
        index: Any = write.args[1]
        value = write.args[2]
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and isinstance(value, fx.Node)):
            return {}
        cut = index[1]
        key: Any
        if isinstance(cut, slice) and all(type(item) in (int, NoneType) for item in (cut.start, cut.stop, cut.step)):
            at = range(*cut.indices(whole))
            key, wanted = (at.start, at.stop, at.step), [*rows, len(at)]
        elif type(cut) is int:
            key, wanted = cut % whole, rows
        else:
            return {}
        # As text, since comparing dynamic sizes would guard them. A value of another shape is broadcast.
        tensor = tensor_of(value)
        if tensor is None or tensor.device != device or [*map(str, tensor.shape)] != [*map(str, wanted)]:
            return {}
        if key in parts:
            return {}
        parts[key] = value
    return parts


def _join_of(parts: Parts, whole: int) -> Callable[[fx.Graph, fx.Node], fx.Node] | None:
    """How the parts are joined, in the dtype of what is written; None where they are not all of the last axis."""
    ordered = dict(sorted(parts.items(), key=lambda item: item[0] if isinstance(item[0], tuple) else (item[0],)))
    number = len(ordered)
    if [*ordered] == [*range(whole)]:
        return lambda graph, new: _joined(graph, new, ordered, torch.stack)
    if not all(isinstance(key, tuple) for key in ordered):
        return None
    starts, stops = [start for start, _, _ in ordered], [stop for _, stop, _ in ordered]
    if all(step == 1 for _, _, step in ordered) and [*starts, whole] == [0, *stops]:
        return lambda graph, new: _joined(graph, new, ordered, torch.cat)
    turns = [(start, step) for start, _, step in ordered] == [(start, number) for start in range(number)]
    if turns and whole % number == 0 and all(len(range(*key)) == whole // number for key in ordered):
        return lambda graph, new: graph.call_function(torch.flatten, (_joined(graph, new, ordered, torch.stack), -2))
    return None


def _joined(graph: fx.Graph, new: fx.Node, parts: Parts, function: Callable[..., Any]) -> fx.Node:
    dtype = dtype_of(new)
    values = [
        value if dtype_of(value) == dtype else graph.call_function(cast, (value, dtype)) for value in parts.values()
    ]
    return graph.call_function(function, (tuple(values), -1))


def _nobody_looks_before(new: fx.Node, writes: list[fx.Node]) -> bool:
    """Whether what happens between the new tensor and its last write does not depend on it, nor on autograd's state."""
    node = new.next
    while node is not writes[-1]:
        reads = bool(storages_of(node) & storages_of(new)) or (new in node.all_input_nodes and node not in writes)
        if reads or is_mode_switch(node):
            return False
        node = node.next
    return True


def _put_in_place(new: fx.Node, writes: list[fx.Node], join: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    graph, last, before = new.graph, writes[-1], tensor_of(new)
    start = last.prev
    with graph.inserting_before(last):
        joined = join(graph, new)
        if any(user.op == "output" for user in new.users):  # outside it may be written to, which not every view may be
            joined = graph.call_method("clone", (joined,))
    added = [joined]
    while (node := added[-1].prev) is not start:
        added.append(node)
    fill_in_values(added[::-1], like=last)
    for write in writes:
        graph.erase_node(write)
    new.replace_all_uses_with(joined)
    graph.erase_node(new)
    keep_layout(joined, before)


JOIN_PARTS = simple_pass("join_parts", join_parts)
