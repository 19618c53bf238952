"""Which node of one graph is which node of another: by structure, with pairs that are known to start from."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import networkx as nx


def structural_hashes(graph: nx.DiGraph, known: dict[Any, Hashable]) -> dict[Any, Hashable]:
    """A hash of each node and everything that it is computed from; equal nodes of two graphs have equal ones.

    Nodes have an attribute `label`, and edges, which lead from what is read to who reads it, an attribute `position`.
    `known` gives the hashes of some nodes, whatever they are computed from.
    """
    found: dict[Any, Hashable] = {}
    for node in nx.topological_sort(graph):
        if node in known:
            found[node] = known[node]
            continue
        reads = sorted((data["position"], found[source]) for source, _, data in graph.in_edges(node, data=True))
        found[node] = hash((graph.nodes[node]["label"], tuple(reads)))
    return found


def align(before: nx.DiGraph, after: nx.DiGraph, anchors: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """For nodes of `before`, the node of `after` that stands for them.

    `anchors` are pairs that are known to be the same, such as the results of a rewrite: what is computed from them
    stays comparable. Then nodes of equal structure are paired; the surplus of such nodes falls to the last of them, as
    where two equal nodes were made one. What is left is paired by its labels, in order.
    """
    anchors = dict(anchors)
    hashes = structural_hashes(before, {})
    other = structural_hashes(after, {there: hashes[here] for here, there in anchors.items()})
    by_hash: dict[Hashable, list[Any]] = defaultdict(list)
    for node, value in other.items():
        by_hash[value].append(node)
    pairs = dict(anchors)
    turn: dict[Hashable, int] = defaultdict(int)
    for node, value in hashes.items():
        if node not in pairs and value in by_hash:
            candidates = by_hash[value]
            pairs[node] = candidates[min(turn[value], len(candidates) - 1)]
            turn[value] += 1
    taken = set(pairs.values())
    left, right = [n for n in before if n not in pairs], [n for n in after if n not in taken]
    old, new = ([repr(graph.nodes[n]["label"]) for n in rest] for graph, rest in ((before, left), (after, right)))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for start, other_start, length in matcher.get_matching_blocks():
        for offset in range(length):
            pairs[left[start + offset]] = right[other_start + offset]
    return pairs
