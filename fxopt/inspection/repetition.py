"""Layers that are alike, found in a graph, so that it can be measured with a few of them.

A graph is a list of calls. A stretch of it in which each call does what the one `period` places before it does, with
what was computed `period` places before and with parameters of the same sizes, is one layer (or a few that alternate)
again and again, whatever the model calls it. Layers are left out of its middle, where what one computes is read by
itself and by the next alone, and where one reads what itself, the one before, or something for all has computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from fxopt.rewrite.graph import SELECTIVE, as_captured, inner_graphs, named_graph_modules, value_of

Key = tuple[str, str]  # the path of a graph, and the name of a node in it

_KEPT = 2  # layers at either end: the outermost may differ by what is beside them
_MOST_ALTERNATING = 8  # layers after which the kinds of layers repeat
_MOST_PERIODS = 32  # lengths of layers that are tried


@dataclass(frozen=True)
class Shortened:
    """A graph without `num_left_out` layers from the middle of a stretch, of which two are left on either side.

    `second` and `following` are the calls that the layer before those left out begins with, and the one after them.
    `like` maps each call of the layers that were left out to the one in the second layer
    that does the same, calls in inner graphs too; `following_like` those of the following layer.
    """

    graph: fx.Graph
    num_left_out: int
    second: Key
    following: Key
    like: dict[Key, Key]
    following_like: dict[Key, Key]


@dataclass(frozen=True)
class _Stretch:
    """`num_layers` of `period` calls each, from the call `start` on."""

    start: int
    period: int
    num_layers: int

    @property
    def num_left_out(self) -> int:
        return self.num_layers - 2 * _KEPT

    def layer(self, number: int) -> range:
        start = self.start + number * self.period
        return range(start, start + self.period)

    @property
    def left_out(self) -> range:
        return range(self.layer(_KEPT).start, self.layer(self.num_layers - _KEPT).start)


def shorten(root: fx.GraphModule) -> Shortened | None:
    """The graph of `root` with four of its repeated layers; None where it has no more than that."""
    calls = [node for node in root.graph.nodes if node.op.startswith("call")]
    return _Search(calls).shorten(root)


class _Search:
    """Stretches of repeated layers in a list of calls."""

    def __init__(self, calls: list[fx.Node]):
        self.calls = calls
        self.at = {node: index for index, node in enumerate(calls)}
        self.faces = [_face(node) for node in calls]

    def shorten(self, root: fx.GraphModule) -> Shortened | None:
        numbers: dict[Hashable, int] = {}
        kinds = [numbers.setdefault(face, len(numbers)) for face in self.faces]
        stretches = [stretch for period in _periods(kinds) for stretch in _stretches(kinds, period)]
        for stretch in sorted(stretches, key=_num_calls_left_out, reverse=True):
            for exact in self._with_equal_inputs(stretch):
                if self._stands_alone(exact):
                    return self._without_middle(root, exact)
        return None

    def _with_equal_inputs(self, stretch: _Stretch) -> list[_Stretch]:
        """The parts of a stretch of equal calls in which they read equal things too, the longest first."""
        later = range(stretch.start, stretch.layer(stretch.num_layers - 1).start)
        same = [self._reads_alike(index, stretch.period) for index in later]
        return sorted(_runs(same, stretch.start, stretch.period), key=_num_calls_left_out, reverse=True)

    def _reads_alike(self, index: int, period: int) -> bool:
        here, there = (self.calls[place].all_input_nodes for place in (index, index + period))
        return len(here) == len(there) and all(
            self._is_alike(one, other, period) for one, other in zip(here, there, strict=True)
        )

    def _is_alike(self, here: fx.Node, there: fx.Node, period: int) -> bool:
        body = _attribute(here)
        if isinstance(body, fx.GraphModule) and body is _attribute(there):
            return False  # its nodes count all runs of it together
        if here is there:
            return True
        if here in self.at or there in self.at:
            return here in self.at and self.at.get(there) == self.at[here] + period
        readers = sorted(self.at.get(user, -1) + period for user in here.users)
        other_readers = sorted(self.at.get(user, -1) for user in there.users)
        return _sizes(value_of(here)) == _sizes(value_of(there)) and readers == other_readers

    def _stands_alone(self, stretch: _Stretch) -> bool:
        """Whether the layers to leave out are tied to the layers beside them alone, and to what all layers read."""
        for number in range(_KEPT, stretch.num_layers - _KEPT):
            start, end = stretch.layer(number - 1).start, stretch.layer(number + 1).stop
            for index in stretch.layer(number):
                call, before = self.calls[index], self.calls[index - stretch.period]
                own = set(call.all_input_nodes).difference(before.all_input_nodes)
                if any(self.at.get(read, start) < start for read in own):
                    return False
                if any(self.at.get(user, end) >= end for user in call.users):
                    return False
        return True

    def _without_middle(self, root: fx.GraphModule, stretch: _Stretch) -> Shortened:
        left_out = {self.calls[index] for index in stretch.left_out}
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in root.graph.nodes:
            if node in left_out:
                copies[node] = copies[self.calls[self.at[node] - stretch.period]]
            elif node.op.startswith("call") or not node.users or not left_out.issuperset(node.users):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        paths = {module: path for path, module in named_graph_modules(root)}
        second, following = stretch.layer(_KEPT - 1), stretch.layer(stretch.num_layers - _KEPT)
        return Shortened(
            graph=graph,
            num_left_out=stretch.num_left_out,
            second=("", self.calls[second.start].name),
            following=("", self.calls[following.start].name),
            like=self._like(stretch.left_out, second, paths),
            following_like=self._like(following, second, paths),
        )

    def _like(self, layers: range, second: range, paths: dict[fx.GraphModule, str]) -> dict[Key, Key]:
        found: dict[Key, Key] = {}
        for index in layers:
            one = self.calls[index]
            other = self.calls[second.start + (index - second.start) % len(second)]
            found["", one.name] = "", other.name
            for bodies in zip(inner_graphs(one), inner_graphs(other), strict=True):
                for (_, here), (_, there) in zip(*map(named_graph_modules, bodies), strict=True):
                    for inner, like in zip(here.graph.nodes, there.graph.nodes, strict=True):
                        found[paths[here], inner.name] = paths[there], like.name
        return found


def _num_calls_left_out(stretch: _Stretch) -> int:
    return stretch.num_left_out * stretch.period


def _periods(kinds: list[int]) -> list[int]:
    """The distances at which calls of one kind follow each other most often, not only the nearest ones."""
    places: dict[int, list[int]] = {}
    for index, kind in enumerate(kinds):
        places.setdefault(kind, []).append(index)
    distances = Counter(
        later - index
        for found in places.values()
        for position, index in enumerate(found)
        for later in found[position + 1 : position + 1 + _MOST_ALTERNATING]
    )
    return [distance for distance, _ in distances.most_common(_MOST_PERIODS)]


def _stretches(kinds: list[int], period: int) -> Iterator[_Stretch]:
    return _runs([here == there for here, there in zip(kinds, kinds[period:], strict=False)], 0, period)


def _runs(same: list[bool], start: int, period: int) -> Iterator[_Stretch]:
    """The stretches in which each call is like the one a period later, if long enough to leave some out.

    `same` says so of the call `start` and those after it.
    """
    for alike, group in groupby(same):
        length = sum(1 for _ in group)
        stretch = _Stretch(start, period, length // period + 1)
        if alike and stretch.num_left_out > 0:
            yield stretch
        start += length


def _face(node: fx.Node) -> Hashable:
    """What a call does, apart from where its inputs come from: its target, constants, and the sizes of its result."""
    constants = str(fx.map_arg((node.args, node.kwargs), lambda _: None))
    return node.op, node.target, constants, _sizes(value_of(node)), tuple(map(_structure, inner_graphs(node)))


def _structure(module: fx.GraphModule) -> Hashable:
    """An inner graph, but for the names in it."""
    at = {node: index for index, node in enumerate(module.graph.nodes)}
    return module.meta.get(SELECTIVE), *(
        (
            _face(node) if node.op.startswith("call") else (node.op, _sizes(value_of(node))),
            tuple(at[source] for source in node.all_input_nodes),
        )
        for node in module.graph.nodes
    )


def _sizes(value: Any) -> Hashable:
    leaves, structure = tree_flatten(value)
    return str(structure), tuple(map(_size, leaves))


def _size(value: Any) -> Hashable:
    if not isinstance(value, torch.Tensor):
        return str(as_captured(value))
    shape, strides = (tuple(map(as_captured, numbers)) for numbers in (value.shape, value.stride()))
    return type(value), shape, strides, value.dtype, value.device, value.requires_grad


def _attribute(node: fx.Node) -> Any:
    return getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
