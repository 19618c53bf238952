"""Layers that are equal are shown once, with their number."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

from fxopt.inspection.diff import Block, Node

_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


def block_of(module: str) -> str:
    """The path of the layer that a module belongs to, such as `model.layers.3`; of a module outside the layers, its own."""
    found = _LAYER.match(module)
    return found.group() if found else module


def without_index(module: str) -> str:
    """`model.layers.3.mlp` as `model.layers.*.mlp`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def blocks_of(nodes: Iterable[Node]) -> tuple[Block, ...]:
    """`nodes`, which are in order, by layer, with equal layers told."""
    by_path: dict[str, list[Node]] = {}
    for node in nodes:
        by_path.setdefault(block_of(node.module), []).append(node)
    first: dict[Hashable, int] = {}
    blocks = []
    for index, (path, members) in enumerate(by_path.items()):
        signature = without_index(path), tuple(map(shape_of_node, members))
        like = first.setdefault(signature, index)
        blocks.append(Block(index, like, path, tuple(node.id for node in members)))
    return tuple(blocks)


def shape_of_node(node: Node) -> Hashable:
    """What equal nodes of two layers have in common."""
    costs = tuple(tuple(vars(cost).values()) if cost is not None else None for cost in (node.before, node.after))
    return (
        node.operation, node.spelled, node.shape, node.dtype, node.source, without_index(node.module), node.made,
        node.removed, node.made_by, node.removed_by, costs,
    )  # fmt: skip
