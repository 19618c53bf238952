"""Rules, and the matcher that finds where they apply.

A rule's pattern is code as people write it in modelling files. It is traced once, brought into the canonical
spelling (`spelling.py`) and compared with the graph, backwards from the pattern's last result:

* a parameter of the pattern binds to whatever stands in its place, a node or a literal, the same one each time;
* everything else must be equal; operands of `+` and `*` may be swapped;
* a cast in the pattern also matches where there is nothing to cast, so that one pattern serves all dtypes;
* inner nodes of a match must have no users outside it, since the match replaces them.

A mismatch has a reason. Where a rule nearly matched, the deepest reason that was met goes into the report.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.rewrite.graph import (
    cast,
    dtype_of,
    is_mode_switch,
    nodes_to_move_up,
    source_line,
    storages_of,
    storages_written,
    tensor_of,
)
from fxopt.rewrite.spelling import arguments_of, spell_out
from fxopt.rewrite.trace import as_tuple, ops_called_by, trace

COMMUTATIVE = frozenset({operator.add, operator.mul})


class Declined(Exception):
    """A rule's `check` does not want this match; the message is the reason."""


def require(condition: bool, reason: str) -> None:
    """Decline the match, for `reason`, unless `condition` holds. `reason` says what is the case, not what should be.

    An empty reason says that nothing is missed, and the report leaves the place out.
    """
    if not condition:
        raise Declined(reason)


class Rule:
    """What is rewritten, and to what.

    Subclasses define three static methods, whose parameters are the names that `pattern` binds:

    * `pattern(x, weight, …)`: the code to find, returning its result. Where it returns a tuple, the last element
      is what the search starts from, and the elements before it are inner results that may be used elsewhere.
    * `rewrite(x, weight, …)`: the replacement, returning as much as `pattern`. Every plain function that it calls
      by a global name is put into the graph as one node.
    * `check(x, weight, …)`: calls `require` for what the pattern cannot say. Optional; takes any of the names.

    `op` names the result in reports, where the rewrite calls no op of fxopt's. `nearly` is the share of the pattern
    that must match for a mismatch to be worth a word.

    `examples(x, weight, …)` may return `{name: function(shape, dtype, generator) -> tensor}` for inputs that the
    proof must not fill with normally distributed numbers; a list of functions where the two sides must also be finite
    alike for each but the first. It is given tensors in the sizes of the sample, without memory. `proof_context` is
    what the proof runs in, for an op that would treat its small tensors otherwise than those of the model.
    `keeps_nan` is whether NaN and infinity must show where they showed. `keeps_no_result` is whether the replacement's
    backward needs none of its results, so that code after it may write to them, as `loss += …` does.
    `has_gradient_at_zero` is whether the original has one for inputs of zeros; sqrt(mean(x²)) has not.
    """

    pattern: ClassVar[Callable[..., Any]]
    rewrite: ClassVar[Callable[..., Any]]

    op: ClassVar[str] = ""
    nearly: ClassVar[float] = 0.6
    check: ClassVar[Callable[..., None]] = staticmethod(lambda: None)
    examples: ClassVar[Callable[..., dict[str, Any]]] = staticmethod(lambda: {})
    keeps_nan: ClassVar[bool] = True
    keeps_no_result: ClassVar[bool] = False
    has_gradient_at_zero: ClassVar[bool] = True
    proof_context: ClassVar[Callable[[], AbstractContextManager[None]]] = staticmethod(nullcontext)

    def __init_subclass__(cls) -> None:
        for name in ("pattern", "rewrite"):
            if not callable(getattr(cls, name, None)):
                raise TypeError(f"rule {cls.__name__} has no `{name}`; see fxopt.rewrite.match.Rule")
        if not cls.op and not ops_called_by(cls.rewrite):
            raise TypeError(
                f"rule {cls.__name__}: `rewrite` calls no function by a global name; say in `op` what it is"
            )

    @classmethod
    def op_name(cls) -> str:
        """What reports call the result: `op`, or else the last function that `rewrite` calls by a global name."""
        return cls.op or ops_called_by(cls.rewrite)[-1].__name__


def call_with(function: Callable[..., Any], bindings: dict[str, Any]) -> Any:
    """Call `function` with those of `bindings` that it has parameters for."""
    return function(**{name: bindings[name] for name in inspect.signature(function).parameters})


@dataclass(frozen=True)
class Match:
    """A place where a rule applies: what its names are bound to, and the nodes it replaces."""

    rule: type[Rule]
    bindings: dict[str, Any]
    nodes: tuple[fx.Node, ...]  # in graph order, results included
    results: tuple[fx.Node, ...]  # in the order of the pattern's return; the last is the anchor

    @property
    def anchor(self) -> fx.Node:
        return self.results[-1]

    def after(self, successors: dict[fx.Node, fx.Node]) -> Match:
        """This match in a graph where other matches' results have been replaced by their successors."""
        bindings = {
            name: successors.get(value, value) if isinstance(value, fx.Node) else value
            for name, value in self.bindings.items()
        }
        return replace(self, bindings=bindings)


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule matched most of its pattern, and why not all of it."""

    rule: str
    node: str
    source: str
    reason: str
    nodes: tuple[fx.Node, ...] = field(repr=False, compare=False)  # that matched; the first is where the search began
    share: float = 1.0  # of the pattern that matched; all of it where the rule's `check` declined


class _Pattern:
    """A rule's pattern as a canonical graph."""

    def __init__(self, rule: type[Rule]):
        self.names = list(inspect.signature(rule.pattern).parameters)
        # Functions of the rule's own module are written out; imported ones, fxopt's ops, are single nodes.
        imported = [op for op in ops_called_by(rule.pattern) if op.__module__ != rule.pattern.__module__]
        graph, returned = trace(rule.pattern, imported, {})
        self.results: tuple[fx.Node, ...] = tuple(result.node for result in as_tuple(returned))
        graph.output(self.results)
        spell_out(graph)
        self.num_nodes = sum(node.op.startswith("call") for node in graph.nodes)


@functools.cache
def _pattern_of(rule: type[Rule]) -> _Pattern:
    return _Pattern(rule)


@dataclass(frozen=True)
class _State:
    """How far a comparison has come: pattern nodes to graph nodes, names to what they are bound to."""

    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    needless: frozenset[fx.Node] = frozenset()  # casts of the pattern that the graph does without

    def with_node(self, pattern: fx.Node, node: fx.Node) -> _State:
        return replace(self, nodes={**self.nodes, pattern: node})

    def with_name(self, name: str, value: Any) -> _State:
        return replace(self, names={**self.names, name: value})

    def without_cast(self, pattern: fx.Node, node: fx.Node) -> _State:
        return replace(self, nodes={**self.nodes, pattern: node}, needless=self.needless | {pattern})


class _Comparison:
    """Compares one pattern with the graph at one node, and remembers the deepest mismatch."""

    def __init__(self) -> None:
        self.nodes: tuple[fx.Node, ...] = ()  # of the graph, that matched until there
        self.reason = ""
        self.is_whole = False  # all of the pattern matched, and something else was in the way

    def fail(self, state: _State, reason: str, is_whole: bool = False) -> None:
        is_first = is_whole and not self.is_whole
        if not self.reason or is_first or len(state.nodes) > len(self.nodes):
            self.nodes, self.reason, self.is_whole = tuple(state.nodes.values()), reason, is_whole

    def compare(self, pattern: Any, value: Any, state: _State) -> Iterator[_State]:
        """Every way to go on from `state` such that `pattern` matches `value`."""
        if isinstance(pattern, fx.Node):
            yield from self._compare_node(pattern, value, state)
        elif isinstance(pattern, tuple | list):
            if not isinstance(value, tuple | list) or len(pattern) != len(value):
                self.fail(state, f"{value} stands where the pattern has {pattern}")
                return
            yield from self._compare_all(list(pattern), list(value), state)
        elif isinstance(pattern, slice):
            if not isinstance(value, slice):
                self.fail(state, f"{value} stands where the pattern has a slice")
                return
            ends = [(s.start, s.stop, s.step) for s in (pattern, value)]
            yield from self._compare_all(list(ends[0]), list(ends[1]), state)
        elif type(pattern) is type(value) and pattern == value:
            yield state
        else:
            self.fail(state, f"{value} stands where the pattern has {pattern}")

    def _compare_all(self, patterns: list[Any], values: list[Any], state: _State) -> Iterator[_State]:
        if not patterns:
            yield state
            return
        for following in self.compare(patterns[0], values[0], state):
            yield from self._compare_all(patterns[1:], values[1:], following)

    def _compare_node(self, pattern: fx.Node, value: Any, state: _State) -> Iterator[_State]:
        if pattern.op == "placeholder":
            name = str(pattern.target)
            if name not in state.names:
                yield state.with_name(name, value)
            elif state.names[name] is value or (not isinstance(value, fx.Node) and state.names[name] == value):
                yield state
            else:
                self.fail(state, f"`{name}` is {state.names[name]} in one place and {value} in another")
            return
        if pattern in state.nodes:
            if state.nodes[pattern] is value:
                yield state
            else:
                self.fail(state, f"{value} stands where {state.nodes[pattern]} is used again")
            return
        if pattern.target is cast:
            yield from self._compare_without_cast(pattern, value, state)
        if not isinstance(value, fx.Node) or not _is_called_alike(pattern, value):
            self.fail(state, f"{describe(value)} stands where the pattern has `{target_name(pattern)}`")
            return
        state = state.with_node(pattern, value)
        wanted, given = arguments_of(pattern), arguments_of(value)
        if set(wanted) != set(given):
            self.fail(state, f"`{target_name(value)}` is called with other arguments than in the pattern")
            return
        patterns, values = list(wanted.values()), [given[name] for name in wanted]
        yield from self._compare_all(patterns, values, state)
        if pattern.target in COMMUTATIVE and len(values) == 2:
            yield from self._compare_all(patterns, values[::-1], state)

    def _compare_without_cast(self, pattern: fx.Node, value: Any, state: _State) -> Iterator[_State]:
        """Matches what a cast of the pattern is of, where that has the dtype already."""
        source, dtype = pattern.args
        for following in self.compare(dtype, dtype_of(value), state):
            for matched in self.compare(source, value, following):
                yield matched.without_cast(pattern, value)


def _is_called_alike(pattern: fx.Node, node: fx.Node) -> bool:
    if pattern.op == node.op == "call_method" and {pattern.target, node.target} == {"view", "reshape"}:
        return True  # to other sizes, with or without a copy
    return (pattern.op, pattern.target) == (node.op, node.target)


def target_name(node: fx.Node) -> str:
    return str(node.target) if not callable(node.target) else getattr(node.target, "__name__", str(node.target))


def describe(value: Any) -> str:
    return f"`{target_name(value)}` ({value.name})" if isinstance(value, fx.Node) else repr(value)


def find_matches(graph: fx.Graph, rule: type[Rule]) -> tuple[list[Match], list[NearMiss]]:
    """All places in `graph` where `rule` applies, none overlapping another, and where it nearly does."""
    pattern = _pattern_of(rule)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    order = {node: index for index, node in enumerate(graph.nodes)}
    matches: list[Match] = []
    near_misses: list[NearMiss] = []
    taken: set[fx.Node] = set()
    written = storages_written(graph)
    anchor_pattern = pattern.results[-1]
    # First where the pattern's last cast is there: a match that includes it is the larger one.
    forms = [(form.op, form.target) for form in _with_and_without_casts(anchor_pattern)]
    for node in (node for form in forms for node in graph.nodes if (node.op, node.target) == form):
        if node in taken:
            continue
        comparison = _Comparison()
        for state in comparison.compare(anchor_pattern, node, _State()):
            match = _match_of(rule, pattern, state, order)
            reason = _objection(match, taken, written)
            if reason is None:
                matches.append(match)
                taken.update(match.nodes)
                break
            comparison.fail(state, reason, is_whole=True)
        else:
            share = len(comparison.nodes) / pattern.num_nodes
            if share > rule.nearly and comparison.reason:
                reason, nodes = comparison.reason, (node, *comparison.nodes)
                near_misses.append(NearMiss(rule.__name__, node.name, source_line(node), reason, nodes, share))
    return matches, near_misses


def _with_and_without_casts(pattern: Any) -> Iterator[fx.Node]:
    while isinstance(pattern, fx.Node):
        yield pattern
        pattern = pattern.args[0] if pattern.target is cast else None


def _match_of(rule: type[Rule], pattern: _Pattern, state: _State, order: dict[fx.Node, int]) -> Match:
    found = {node for part, node in state.nodes.items() if part not in state.needless}
    nodes = tuple(sorted(found, key=order.__getitem__))
    results = tuple(state.nodes[result] for result in pattern.results)
    return Match(rule, {name: state.names.get(name) for name in pattern.names}, nodes, results)


def _written_as_results(match: Match, around: set[fx.Node], written: dict[int, list[fx.Node]]) -> frozenset[int]:
    """The storages of results that the match makes anew, and that are written to only when all of it is done."""
    made = frozenset(storage for result in match.results for storage in storages_of(result))
    known = frozenset(storage for node in around for storage in storages_of(node))
    return frozenset(s for s in made - known if all(write > match.anchor for write in written.get(s, ())))


def _objection(match: Match, taken: set[fx.Node], written: dict[int, list[fx.Node]]) -> str | None:
    """Why a structural match is not one after all, or None."""
    inside = set(match.nodes)
    for node in match.nodes:
        if node in taken:
            return f"`{node.name}` is already part of another match"
        outside = [user.name for user in node.users if user not in inside]
        if node not in match.results and outside:
            return f"`{node.name}`, inside the pattern, is also used by `{outside[0]}`"
    first_result = min(match.results)
    inputs = {name: value for name, value in match.bindings.items() if isinstance(value, fx.Node)}
    moved: set[fx.Node] = set()
    for name, value in inputs.items():
        if value in inside:
            return f"`{name}` is `{value.name}`, which the pattern replaces"
        late = nodes_to_move_up(value, first_result)
        if late is None:
            return f"`{name}` is computed after `{first_result.name}`, which is needed before"
        moved.update(late)
    # The replacement reads everything where the first result stands: writes must be done by then, and before the code
    # that is replaced reads.
    sources = {source for node in moved for source in node.all_input_nodes}
    around = {*inputs.values(), *moved, *sources}
    harmless = _written_as_results(match, around, written) if match.rule.keeps_no_result else frozenset()
    for node in {*match.nodes, *around}:
        read = min([first_result, *(user for user in node.users if user in inside)])
        if any(write > read for storage in storages_of(node) - harmless for write in written.get(storage, ())):
            return f"`{node.name}` is written to in place after it is read"
    for name, value in inputs.items():
        tensor = tensor_of(value)
        if tensor is not None and is_traceable_wrapper_subclass(tensor):
            return f"`{name}` is no plain tensor, but a {type(tensor).__name__}"
    between = match.nodes[0]
    while between is not match.anchor:
        if is_mode_switch(between):
            return f"`{target_name(between)}`, between the pattern's nodes, changes how they are computed"
        between = between.next
    try:
        call_with(match.rule.check, match.bindings)
    except Declined as declined:
        return str(declined)
    except Exception as error:  # such as a size that is not known, where the check calculates with it
        return f"its check fails: {type(error).__name__}: {error}"
    return None
