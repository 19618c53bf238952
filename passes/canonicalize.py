"""One spelling for each operation, and nothing that computes nothing: what every later pass relies on."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxopt.rewrite.graph import (
    argument_of,
    inner_graphs,
    is_mode_switch,
    is_mutating,
    is_random,
    storages_of,
    storages_written,
    tensor_of,
    value_of,
)
from fxopt.rewrite.pipeline import simple_pass
from fxopt.rewrite.spelling import spell_out, spell_square


def canonicalize(graph: fx.Graph) -> None:
    """Spell every operation out, drop identities, and read sizes and compute equal things once."""
    spell_out(graph)
    for node in list(graph.nodes):
        if node.target is torch._C._log_api_usage_once and not node.users:
            graph.erase_node(node)
        elif (source := _identity_of(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    read_sizes_once(graph)
    merge_equal_nodes(graph)
    for node in graph.nodes:
        spell_square(node)  # of two equal factors that were merged


def read_sizes_once(graph: fx.Graph) -> None:
    """Write a fixed size as the number that it is, and take one that varies from the first value that has it.

    Under activation checkpointing code asks each value for its sizes anew, and what is asked seems to be needed.
    """
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        value = value_of(node)
        varies = isinstance(value, torch.SymInt) and bool(value.node.expr.free_symbols)
        known = first.setdefault(value.node.expr, node) if varies else value
        if known is node or not isinstance(known, fx.Node | int) or not _asks_for_size(node):
            continue
        _use_instead(node, known)
        shape = node.args[0]
        graph.erase_node(node)
        if isinstance(shape, fx.Node) and shape.target == "size" and not shape.users:
            graph.erase_node(shape)


def _use_instead(node: fx.Node, value: fx.Node | int) -> None:
    def replaced(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), replaced)


def _asks_for_size(node: fx.Node) -> bool:
    """Whether a node is `x.size(i)`, or an item of `x.size()`."""
    source = node.args[0] if node.args else None
    if node.op == "call_method":
        return node.target == "size"
    return node.target is operator.getitem and isinstance(source, fx.Node) and source.target == "size"


def _identity_of(node: fx.Node) -> Any:
    """The input that a node returns unchanged, if it does."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, rest = node.args[0], node.args[1:]
    value, source_value = tensor_of(node), tensor_of(source)
    if node.target is operator.getitem:
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        whole = all(item is Ellipsis or item in (slice(None), slice(0, None)) for item in index)
        return source if whole and source_value is not None else None
    if node.target == "to":
        if value is None or source_value is None or node.kwargs.get("copy") or "memory_format" in node.kwargs:
            return None
        return source if (value.dtype, value.device) == (source_value.dtype, source_value.device) else None
    if node.target == "contiguous" and source.target is torch.nn.functional.linear and not (rest or node.kwargs):
        return source if source_value is not None and source_value.is_contiguous() else None
    if node.target is torch.nn.functional.dropout:
        probability, training = argument_of(node, 1, "p", 0.5), argument_of(node, 2, "training", True)
        return source if training is False or probability == 0.0 else None
    return None


def merge_equal_nodes(graph: fx.Graph) -> None:
    """Compute once what is computed twice from the same inputs, under the same autograd, autocast and vmap state."""
    seen: dict[Any, fx.Node] = {}
    written = storages_written(graph).keys()
    leaving = _leaving(graph)
    mode = 0
    for node in list(graph.nodes):
        if is_mode_switch(node):
            mode += 1
            continue
        if node.op not in ("call_function", "call_method"):
            continue
        if node.is_impure() or is_random(node) or is_mutating(node) or inner_graphs(node):
            continue
        if any(storages_of(part) & written for part in (node, *node.all_input_nodes)):
            continue  # what is written to may be another thing the second time
        key = (mode, node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in seen and not (node in leaving and seen[key] in leaving):
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def _leaving(graph: fx.Graph) -> set[fx.Node]:
    """The graph's results and what they are views of. Outside, one of two may be written to: they must stay two."""
    found: set[fx.Node] = set()
    pending = [node for output in graph.find_nodes(op="output") for node in output.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [source for source in node.all_input_nodes if storages_of(source) & storages_of(node)]
    return found


def _hashable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    if isinstance(value, slice):
        return ("slice", _hashable((value.start, value.stop, value.step)))
    # 1, 1.0 and True are equal in Python and are not the same argument.
    return value if isinstance(value, fx.Node) else (type(value), value)


CANONICALIZE = simple_pass("canonicalize", canonicalize)
