"""Layers that are equal are shown once, with their number."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

from fxopt.inspection.diff import Block, Node

_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


def block_of(module: str) -> str:
    """The path of the layer that a module belongs to, such as `model.layers.3`; elsewhere, the module's own path."""
    found = _LAYER.match(module)
    return found.group() if found else module


def without_index(module: str) -> str:
    """`model.layers.3.mlp` as `model.layers.*.mlp`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def blocks_of(nodes: Iterable[Node]) -> tuple[Block, ...]:
    """`nodes`, which are in order, by layer, with equal layers told.

    What is outside the layers is apart before and after each: a call starts with its tokens and ends with its loss.
    """
    by_place: dict[tuple[str, int], list[Node]] = {}
    layers: dict[str, None] = {}
    for node in nodes:
        path = block_of(node.module)
        if _LAYER.match(node.module):
            layers[path] = None
        by_place.setdefault((path, 0 if path in layers else len(layers)), []).append(node)
    first: dict[Hashable, int] = {}
    blocks = []
    for index, ((path, _), members) in enumerate(by_place.items()):
        signature = without_index(path), tuple(map(shape_of_node, members))
        like = first.setdefault(signature, index)
        blocks.append(Block(index, like, path, tuple(node.id for node in members)))
    return tuple(blocks)


def shape_of_node(node: Node) -> Hashable:
    """What equal nodes of two layers have in common."""
    costs = tuple(tuple(vars(cost).values()) if cost is not None else None for cost in (node.before, node.after))
    return (
        node.operation, node.spelled, node.shape, node.dtype, node.source, without_index(node.module), node.made,
        node.removed, node.made_by, node.removed_by, costs, node.results,
    )  # fmt: skip
