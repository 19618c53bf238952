"""From captured graphs to a `GraphDiff`: an observer of the passes, and what is made of what it saw."""

from __future__ import annotations

import functools
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
from torch import fx

from fxopt.error_lines import in_a_line
from fxopt.inspection.align import align
from fxopt.inspection.diff import Graph, Hunk, Miss, Node, Origin, Proof, Rewrite, Source, Stage
from fxopt.inspection.fold import blocks_of, shape_of_node, without_index
from fxopt.inspection.measure import measure
from fxopt.inspection.meter import Cost, Measurement, Where
from fxopt.inspection.repetition import Key
from fxopt.rewrite.graph import SourceLine
from fxopt.rewrite.match import NearMiss
from fxopt.rewrite.pipeline import Change, PassRecord
from fxopt.rewrite.report import GraphRecord
from fxopt.rewrite.snapshot import NodeRow, snapshot


@dataclass(frozen=True)
class Seen:
    """A graph at one stage: its nodes, in the order in which they run, and what they cost, or why that is not known."""

    name: str
    rows: tuple[NodeRow, ...]
    measurement: Measurement | str


@dataclass
class SeenGraph:
    """A graph at all stages, the call that it was captured for, in words, and how often that call has run it."""

    call: str
    stages: list[Seen]
    runs: int = 0


class Recorder:
    """Sees each graph before the passes, after each, and as it runs, and measures it where it changed.

    `not_seen` says why it may not have seen a graph.
    """

    def __init__(self, not_seen: str = "nobody looked at this graph") -> None:
        self.graphs: list[SeenGraph] = []
        self.not_seen = not_seen
        self.call = ""  # what is captured now
        self.on_stage: Callable[[str, int], None] | None = None  # gets a stage's name and number before it is measured

    def __call__(self, name: str, module: fx.GraphModule) -> None:
        if name == "captured":
            self.graphs.append(SeenGraph(self.call, []))
        stages = self.graphs[-1].stages
        if self.on_stage is not None:
            self.on_stage(name, len(stages))
        rows = _in_order(snapshot(module))
        unchanged = bool(stages) and stages[-1].rows == rows
        measurement = stages[-1].measurement if unchanged else _measured(module)
        stages.append(Seen(name, rows, measurement))

    def runner(self, module: fx.GraphModule) -> Callable[..., Any]:
        """For `OptimizedForward.runner`: how the graph that was seen last is run, and counted."""
        seen = self.graphs[-1]

        def run(*inputs: Any) -> Any:
            seen.runs += 1
            return module.forward(*inputs)

        return run

    def graph_of(self, record: GraphRecord) -> Graph:
        """A graph of the report with what was seen of it; only its start and end if nobody looked."""
        ends = _in_order(record.before), _in_order(record.after)
        for number, seen in enumerate(self.graphs):
            if (seen.stages[0].rows, seen.stages[-1].rows) == ends:
                return _Builder(record, self.graphs.pop(number)).graph()
        stages = [Seen(name, rows, self.not_seen) for name, rows in zip(("captured", "optimized"), ends, strict=True)]
        return _Builder(record, SeenGraph("", stages)).graph()


def _measured(module: fx.GraphModule) -> Measurement | str:
    try:
        return measure(module)
    except Exception as error:  # whatever an operation that depends on data says on fake tensors
        return in_a_line(error)


def _in_order(rows: tuple[NodeRow, ...]) -> tuple[NodeRow, ...]:
    """Rows in the order in which they run: those of an inner graph where it is called."""
    by_graph: dict[str, list[NodeRow]] = {}
    for row in rows:
        by_graph.setdefault(row.graph, []).append(row)

    def walk(path: str) -> Iterator[NodeRow]:
        for row in by_graph.pop(path, []):
            for name in row.input_nodes:
                yield from walk(f"{path}.{name}" if path else name)
            yield row

    return tuple(walk("")) + tuple(row for rest in list(by_graph) for row in walk(rest))


class _Builder:
    """Numbers the nodes of all stages, and finds who made and removed them."""

    def __init__(self, record: GraphRecord, seen: SeenGraph):
        self.record, self.seen, self.stages = record, seen, seen.stages
        stages = seen.stages
        # None where a stage could not be measured.
        self.measured = [seen.measurement if isinstance(seen.measurement, Measurement) else None for seen in stages]
        self.rows: dict[Key, NodeRow] = {}  # as each node was first seen
        self.latest: dict[Key, NodeRow] = {}
        self.present = [{(row.graph, row.name): row for row in stage.rows} for stage in stages]
        for present in self.present:
            for key, row in present.items():
                self.rows.setdefault(key, row)
                self.latest[key] = row
        self.ids = {key: index for index, key in enumerate(self._ordered())}
        self.stage_of_pass = {stage.name: index for index, stage in enumerate(stages)}
        self.rewrites = tuple(self._rewrites())
        self.maker, self.remover = dict[int, str](), dict[int, str]()  # the rule that made or removed a node
        self.rewrites_at: dict[int, set[int]] = {}
        for rewrite in self.rewrites:
            for number in {*rewrite.removed, *rewrite.added}:
                self.rewrites_at.setdefault(number, set()).add(rewrite.id)
            self.maker |= dict.fromkeys(set(rewrite.added) - set(rewrite.removed), rewrite.rule)
            self.remover |= dict.fromkeys(set(rewrite.removed) - set(rewrite.added), rewrite.rule)
        self.nodes = tuple(self._node(key) for key in self.ids)

    def graph(self) -> Graph:
        first, last = ([self.ids[key] for key in present] for present in (self.present[0], self.present[-1]))
        hunks = self._hunks()
        return Graph(
            call=self.seen.call,
            runs=max(self.seen.runs, 1),
            kind=self.record.kind,
            frame=self.record.frame,
            stages=tuple(self._stage(index) for index in range(len(self.stages))),
            nodes=self.nodes,
            before=tuple(first),
            after=tuple(last),
            aligned=tuple(self._aligned(hunks)),
            rewrites=self.rewrites,
            hunks=hunks,
            blocks=blocks_of(self.nodes),
            misses=tuple(self._misses()),
            not_measured=next((s.measurement for s in self.stages if isinstance(s.measurement, str)), ""),
        )

    def _ordered(self) -> list[Key]:
        """All nodes in one order: each new one before the first node of its stage that was there already."""
        ordered = list(self.present[0])
        for earlier, present in zip(self.present, self.present[1:], strict=False):
            if not present.keys() - earlier.keys():
                continue
            known, arrived = set(ordered), dict[Key | None, list[Key]]()
            pending: list[Key] = []
            for key in present:
                if key in known:
                    arrived.setdefault(key, []).extend(pending)
                    pending = []
                else:
                    pending.append(key)
            ordered = [item for key in ordered for item in (*arrived.get(key, ()), key)] + pending
        return ordered

    def _stage(self, index: int) -> Stage:
        stage = self.stages[index]
        record = next((record for record in self.record.passes if record.name == stage.name), None)
        measured = self.measured[index]
        return Stage(
            name=stage.name,
            num_nodes=len(stage.rows),
            num_rewrites=sum(rewrite.stage == index for rewrite in self.rewrites),
            elapsed_ms=record.elapsed_ms if record else 0.0,
            cost=measured.total if measured else None,
            peak_bytes=measured.peak_bytes if measured else None,
            peak_at=self._in_words(index, measured.peak_at) if measured and measured.peak_at else "",
        )

    def _in_words(self, stage: int, where: Where) -> str:
        row = self.present[stage].get(where.node)
        module = f" in {row.module}" if row is not None and row.module else ""
        return f"{where.node[1]}{module}{' (backward)' * where.in_backward}"

    def _seen_after(self, record: PassRecord) -> int:
        """The stage that shows what a pass did: the last one where nobody looked in between."""
        return self.stage_of_pass.get(record.name, len(self.stages) - 1)

    def _rewrites(self) -> Iterator[Rewrite]:
        number = 0
        for record in self.record.passes:
            stage = self._seen_after(record)
            for change in record.outcome.changes:
                proof = Proof(p.original_error, p.replacement_error, p.num_inputs) if (p := change.proof) else None
                yield Rewrite(
                    number, stage, self.stages[stage].name, change.rule, change.op, change.source, change.module,
                    self._known(change, change.removed), self._known(change, change.added), proof,
                )  # fmt: skip
                number += 1

    def _known(self, change: Change, names: Iterable[str]) -> tuple[int, ...]:
        """The numbers of nodes; one that came and went within a pass has none."""
        return tuple(self.ids[change.graph, name] for name in names if (change.graph, name) in self.ids)

    def _node(self, key: Key) -> Node:
        row, latest, number = self.rows[key], self.latest[key], self.ids[key]
        standing = [index for index, present in enumerate(self.present) if key in present]
        made, gone = standing[0], standing[-1] + 1
        removed = gone if gone < len(self.stages) else None
        return Node(
            id=number,
            name=row.name,
            graph=row.graph,
            operation=latest.operation,
            spelled=row.operation,
            arguments=row.arguments,
            shape=row.shape,
            dtype=row.dtype,
            size_bytes=row.size_bytes,
            source=_source(row.source_line),
            module=row.module,
            made=made,
            removed=removed,
            made_by=Origin(self.stages[made].name, self.maker.get(number, "")) if made else None,
            removed_by=Origin(self.stages[gone].name, self.remover.get(number, "")) if removed is not None else None,
            reads=tuple(self._reads(key, standing)),
            before=self._cost(key, 0) if made == 0 else None,
            after=self._cost(key, -1) if removed is None else None,
            results=row.results,
        )

    def _reads(self, key: Key, standing: list[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        known = None
        for index in standing:
            names = self.present[index][key].input_nodes
            nodes = tuple(self.ids[key[0], name] for name in names if (key[0], name) in self.ids)
            if nodes != known:
                known = nodes
                yield index, nodes

    def _cost(self, key: Key, stage: int) -> Cost | None:
        measurement = self.measured[stage]
        return measurement.costs.get(key, Cost()) if measurement else None

    def _misses(self) -> Iterator[Miss]:
        for record in self.record.passes:
            step = self.stages[self._seen_after(record)].name
            for miss in record.outcome.near_misses:
                number = self._number_of(miss)
                module = self.nodes[number].module if number is not None else ""
                yield Miss(miss.rule, step, number, miss.source, module, miss.reason, refused=False)
            for item in record.outcome.refused:
                yield Miss(item.rule, step, None, item.source, item.module, item.reason, refused=True)

    def _number_of(self, miss: NearMiss) -> int | None:
        found = [key for key, row in self.rows.items() if row.name == miss.node and row.source == miss.source]
        return self.ids[found[0]] if found else None

    def _hunks(self) -> tuple[Hunk, ...]:
        together = nx.Graph()
        for rewrite in self.rewrites:
            together.add_edges_from((("rewrite", rewrite.id), number) for number in (*rewrite.removed, *rewrite.added))
        for node in self.nodes:
            if node.removed is not None and node.removed_by is not None and not node.removed_by.rule:
                together.add_node(node.id)
                # What a pass without rules dropped together: a mask that nobody reads, with all that it is made of.
                for source in node.reads_at(node.removed):
                    if self.nodes[source].removed_by == node.removed_by:
                        together.add_edge(node.id, source)
            elif node.made and node.made_by is not None and not node.made_by.rule and node.removed is None:
                together.add_node(node.id)
        first: dict[object, int] = {}
        hunks: list[Hunk] = []
        groups = [sorted(n for n in group if isinstance(n, int)) for group in nx.connected_components(together)]
        for numbers in sorted(group for group in groups if group):
            nodes = [self.nodes[number] for number in numbers]
            ids = sorted({number for n in numbers for number in self.rewrites_at.get(n, ())})
            rewrites = tuple(self.rewrites[number] for number in ids)
            in_place = {n for r in rewrites for n in r.removed if n in r.added}
            removed = [n for n in nodes if n.made == 0 and (n.removed is not None or n.id in in_place)]
            added = [n for n in nodes if n.removed is None and (n.made > 0 or n.id in in_place)]
            if not removed and not added and not rewrites:
                continue  # came and went between two passes
            steps = {n.removed_by.step for n in nodes if n.removed_by} | {n.made_by.step for n in nodes if n.made_by}
            steps |= {r.step for r in rewrites}
            rules = tuple(r.rule for r in rewrites)
            like = first.setdefault(
                (rules, *(tuple(map(shape_of_node, side)) for side in (removed, added))), len(hunks)
            )
            lead = next((n for n in (*added, *reversed(removed)) if n.source), nodes[-1])
            hunks.append(
                Hunk(
                    index=len(hunks),
                    like=like,
                    rewrites=tuple(r.id for r in rewrites),
                    steps=tuple(sorted(steps, key=lambda step: self.stage_of_pass.get(step, 0))),
                    removed=tuple(n.id for n in removed),
                    added=tuple(n.id for n in added),
                    source=lead.source,
                    module=lead.module,
                    before=_sum(n.before for n in removed),
                    after=_sum((n.after for n in added), where_empty=self.measured[-1] is not None),
                )
            )
        return tuple(hunks)

    def _aligned(self, hunks: tuple[Hunk, ...]) -> Iterator[tuple[int, int, str]]:
        """Nodes that stayed, the results of rewrites, and nodes that are equal in structure to one that stayed."""
        stayed = {n.id: n.id for n in self.nodes if n.made == 0 and n.removed is None}
        rewritten = {
            hunk.removed[-1]: hunk.added[-1]
            for hunk in hunks
            if hunk.removed and hunk.added and hunk.removed[-1] not in stayed
        }
        pairs = align(self._digraph(0), self._digraph(len(self.stages) - 1), {**stayed, **rewritten}.items())
        for old in sorted(pairs):
            how = "same" if old in stayed else "rewritten" if old in rewritten else "equal"
            yield old, pairs[old], how

    def _digraph(self, stage: int) -> nx.DiGraph:
        graph = nx.DiGraph()
        for node in self.nodes:
            if node.stands_at(stage):
                label = node.operation, node.dtype, node.shape, without_index(node.module), node.source
                graph.add_node(node.id, label=label)
        for node in list(graph):
            for position, source in enumerate(self.nodes[node].reads_at(stage)):
                graph.add_edge(source, node, position=position)
        return graph


def _sum(costs: Iterable[Cost | None], where_empty: bool = False) -> Cost | None:
    known = [cost for cost in costs if cost is not None]
    return sum(known, Cost()) if known or where_empty else None


def _source(line: SourceLine | None) -> Source | None:
    return None if line is None else Source(_portable(line.path, os.getcwd()), line.line, line.function, line.code)


@functools.lru_cache(maxsize=256)
def _portable(path: str, working_directory: str) -> str:
    """A file's path without what is this machine's: from its package, or from the working directory, or its name."""
    for known in (
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        sysconfig.get_path("stdlib"),
        working_directory,
    ):
        if Path(path).is_relative_to(known):
            return Path(path).relative_to(known).as_posix()
    _, installed, rest = path.rpartition("site-packages/")
    if installed:
        return rest
    root = Path(path).parent
    while (root / "__init__.py").exists():  # a package that is not installed, or from where its source is
        root = root.parent
    return Path(path).relative_to(root).as_posix()
