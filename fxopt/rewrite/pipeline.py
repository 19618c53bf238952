"""Passes, the pipeline that runs them in order, and the report of what they did.

The pipeline is the only place that lints, recompiles, times and records; a pass only changes graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import fx

from fxopt.error_lines import in_a_line
from fxopt.rewrite.graph import graph_modules, link_inner_graphs, module_path, named_graph_modules, source_line
from fxopt.rewrite.match import NearMiss, Rule, find_matches
from fxopt.rewrite.prove import Proof, Prover
from fxopt.rewrite.replace import put_in_place, rewrite_of


@dataclass(frozen=True)
class Change:
    """One rewrite that landed: the rule, the op it put in, how many nodes it replaced, and where they came from.

    `removed` and `added` name the nodes that went and came, in the graph whose path is `graph`; a node that was changed
    in place is in both.
    """

    rule: str
    op: str
    nodes_replaced: int
    source: str
    module: str
    proof: Proof | None
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    graph: str = ""


@dataclass(frozen=True)
class Refused:
    """A match whose proof failed: the graph keeps what it had."""

    rule: str
    source: str
    module: str
    proof: Proof

    @property
    def reason(self) -> str:
        return self.proof.reason


@dataclass
class Outcome:
    """What a pass did to one graph."""

    changes: list[Change] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def extend(self, other: Outcome) -> None:
        self.changes += other.changes
        self.near_misses += other.near_misses
        self.refused += other.refused

    def inside(self, path: str) -> Outcome:
        """This outcome, its changes told to be in the graph at `path`."""
        self.changes = [replace(change, graph=path) for change in self.changes]
        return self


@dataclass(frozen=True)
class Pass:
    """A named change to a graph, made in place, that tells what it did.

    `exact` says that every result stays at least as accurate as it was. `change(graph, prover)` gets None for a prover
    where the user asked for no proofs.
    """

    name: str
    change: Callable[[fx.Graph, Prover | None], Outcome | None]
    exact: bool = True

    def run(self, graph: fx.Graph, prover: Prover | None) -> Outcome:
        return self.change(graph, prover) or Outcome()


def rules_pass(name: str, *rules: type[Rule], exact: bool = True) -> Pass:
    """A pass that applies `rules` wherever they match, the first that matches a place winning."""
    return Pass(name, partial(_apply_rules, rules), exact)


def simple_pass(name: str, change: Callable[[fx.Graph], None], exact: bool = True) -> Pass:
    """A pass that needs no proof: `change(graph)` edits the graph."""
    return Pass(name, partial(_change_graph, change), exact)


# Module-level functions, so that a pipeline can be pickled with the model that it optimizes.
def _change_graph(change: Callable[[fx.Graph], None], graph: fx.Graph, prover: Prover | None) -> None:
    del prover
    change(graph)


def _apply_rules(rules: tuple[type[Rule], ...], graph: fx.Graph, prover: Prover | None) -> Outcome:
    outcome = Outcome()
    for rule in rules:
        outcome.extend(_apply_rule(graph, rule, prover))
    # One near miss for each place: of all rules, the one that got furthest says what is in the way.
    told: set[fx.Node] = set()
    misses = sorted(outcome.near_misses, key=lambda miss: (miss.share, len(miss.nodes)), reverse=True)
    outcome.near_misses = []
    for miss in misses:
        if miss.nodes[0] not in told:
            outcome.near_misses.append(miss)
        told.update(miss.nodes)
    return outcome


def _apply_rule(graph: fx.Graph, rule: type[Rule], prover: Prover | None) -> Outcome:
    matches, near_misses = find_matches(graph, rule)
    outcome = Outcome(near_misses=near_misses)
    successors: dict[fx.Node, fx.Node] = {}
    for match in matches:
        rewrite = rewrite_of(match.after(successors))
        source, module = source_line(match.anchor), module_path(match.anchor)
        proof = prover.prove(rewrite) if prover else None
        if proof is not None and not proof.holds:
            outcome.refused.append(Refused(rule.__name__, source, module, proof))
            continue
        removed = tuple(node.name for node in match.nodes)
        replaced = put_in_place(rewrite)
        successors |= replaced
        added = _between(rewrite.inputs.values(), replaced.values())
        outcome.changes.append(
            Change(rule.__name__, rule.op_name(), len(removed), source, module, proof, removed, added)
        )
    return outcome


def _between(inputs: Iterable[fx.Node], results: Iterable[fx.Node]) -> tuple[str, ...]:
    """The names of the nodes that compute `results` from `inputs`, in graph order."""
    known, found = set(inputs), set[fx.Node]()
    pending = list(results)
    while pending:
        node = pending.pop()
        if node not in known and node not in found and node.op.startswith("call"):
            found.add(node)
            pending += node.all_input_nodes
    return tuple(node.name for node in sorted(found))


class PassError(RuntimeError):
    """A pass raised, or left a graph that is none. Its message names the pass."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one captured graph, its sub-graphs included."""

    name: str
    elapsed_ms: float
    num_nodes_before: int
    num_nodes_after: int
    outcome: Outcome


Observer = Callable[[str, fx.GraphModule], None]  # gets the name of what was done, and the module as it is now


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Running a pipeline twice changes nothing the second time."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        for step in self.passes:
            if not isinstance(step, Pass):
                raise TypeError(
                    f"a pipeline is made of passes, got {step!r}: make one by fxopt.rewrite.pipeline.simple_pass(name, "
                    "change), or of rules by rules_pass(name, rule, …)"
                )

    def run(self, module: fx.GraphModule, prover: Prover | None, observe: Observer | None = None) -> list[PassRecord]:
        """Run every pass over `module` and the graphs inside it, in place. `observe` sees `module` after each pass.

        Raises PassError for a pass that raises or breaks a graph.
        """
        records = []
        for step in self.passes:
            records.append(self._run_pass(step, module, prover))
            if observe is not None:
                observe(step.name, module)
        for inner in graph_modules(module):
            inner.recompile()
        return records

    def with_rules(self, *rules: type[Rule]) -> Pipeline:
        """This pipeline with a pass for `rules` put before its last pass, the clean-up."""
        step = rules_pass("user_rules", *rules)
        return replace(self, passes=(*self.passes[:-1], step, self.passes[-1]))

    def without(self, *names: str) -> Pipeline:
        """This pipeline without the passes of those names; ValueError for a name that it does not have."""
        known = [step.name for step in self.passes]
        for name in names:
            if name not in known:
                raise ValueError(f"the pipeline has no pass {name!r}; it has {', '.join(known)}")
        return replace(self, passes=tuple(step for step in self.passes if step.name not in names))

    @staticmethod
    def _run_pass(step: Pass, module: fx.GraphModule, prover: Prover | None) -> PassRecord:
        start, before = time.perf_counter(), _num_nodes(module)
        outcome = Outcome()
        link_inner_graphs(module)
        for path, inner in named_graph_modules(module):
            try:
                outcome.extend(step.run(inner.graph, prover).inside(path))
            except Exception as error:
                raise PassError(f"the pass {step.name!r} failed: {in_a_line(error, with_place=True)}") from error
            try:
                inner.graph.lint()
            except Exception as error:
                raise PassError(f"the pass {step.name!r} left a broken graph: {in_a_line(error)}") from error
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        return PassRecord(step.name, elapsed_ms, before, _num_nodes(module), outcome)


def _num_nodes(module: fx.GraphModule) -> int:
    return sum(len(inner.graph.nodes) for inner in graph_modules(module))
