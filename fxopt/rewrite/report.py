"""What optimizing a model did: every rewrite, every near miss with its reason, every fallback."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.printing import as_text
from fxopt.rewrite.match import NearMiss
from fxopt.rewrite.pipeline import PassRecord, Refused
from fxopt.rewrite.snapshot import NodeRow

MOST_REASONS = 12  # printed; `to_dict` has all


@dataclass(frozen=True)
class GraphRecord:
    """One captured graph.

    `kind` counts the kinds of call (training or evaluation, with or without a mask, …), which are captured one by
    one. Within a kind, graphs with the same `frame` are recompilations of one piece of code.
    """

    kind: int
    frame: int
    passes: list[PassRecord]
    before: tuple[NodeRow, ...]
    after: tuple[NodeRow, ...]
    elapsed_ms: float  # spent in passes and proofs

    def hits(self) -> Counter[str]:
        return Counter(change.op for record in self.passes for change in record.outcome.changes)

    @property
    def num_rewrites(self) -> int:
        return sum(len(record.outcome.changes) for record in self.passes)


@dataclass
class Report:
    """The report of one optimized model. Print it, or read its parts.

    `optimized`: how many calls ran through graphs, by the module that was called ('' is the model itself).
    `graphs`: one `GraphRecord` per captured graph, in order of capture.
    `graph_breaks`: where Dynamo had to break a graph in two and why, as `file.py:line: reason`, and how often.
    `fallbacks`: why a call that fxopt covers ran the original forward all the same, and how often.
    `uncovered`: why a call went to the original forward by design (no gradient, a cache, …), and how often.
    `logits_computed`: how often the logits of an optimized call were read, and so computed.
    `under_compiler`: how many calls came from code that torch.compile compiles: fxopt's graphs ran inside it.
    `autocast`: whether a call came under autocast, beside the policy.
    `attends_across_documents`: whether rows of a call were packed, and tokens attend to the documents before their own.
    `forward_replaced`: who has put another forward in the place of fxopt's, or around it; or ''.
    `optimizer`: which optimizer steps the parameters; '' if none did. `optimizer_warning`: what it loses, or ''.
    """

    model: str
    policy: str
    optimized: Counter[str] = field(default_factory=Counter)
    graphs: list[GraphRecord] = field(default_factory=list)
    graph_breaks: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    uncovered: Counter[str] = field(default_factory=Counter)
    logits_computed: int = 0
    under_compiler: int = 0
    autocast: bool = False
    attends_across_documents: bool = False
    forward_replaced: str = ""
    optimizer: str = ""
    optimizer_warning: str = ""
    # Of each kind of call, the graphs that it ran, one as often as it was run: those of the call with most rewrites.
    _runs: dict[int, list[GraphRecord]] = field(default_factory=dict, repr=False)

    def note_call(self, entry: str, kind: int, graphs: Sequence[GraphRecord]) -> None:
        """Notes that a call of the module `entry` has run `graphs`, in this order."""
        self.optimized[entry] += 1
        known = self._runs.get(kind)
        if known is not None and len(known) == len(graphs) and all(map(operator.is_, known, graphs)):
            return
        if known is None or _num_rewrites(graphs) >= _num_rewrites(known):
            self._runs[kind] = list(graphs)

    @property
    def hits(self) -> dict[str, int]:
        """Op name → number of sites in the model.

        A site that another kind of call captures again does not count again; one graph that serves several layers
        counts for each.
        """
        found: Counter[str] = Counter()
        for graphs in self._runs_of_kinds().values():
            found |= sum((graph.hits() for graph in graphs), Counter[str]())
        return dict(found)

    @property
    def near_misses(self) -> list[NearMiss]:
        """Where a rule matched most of its pattern, and nothing else took the place."""
        return [miss for graph in self._latest() for record in graph.passes for miss in record.outcome.near_misses]

    @property
    def refused(self) -> list[Refused]:
        """Where a rule matched and its proof failed."""
        return [item for graph in self._latest() for record in graph.passes for item in record.outcome.refused]

    @property
    def recompiles(self) -> int:
        """How many graphs were captured again for code that had one already."""
        return len(self.graphs) - len({(graph.kind, graph.frame) for graph in self.graphs})

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {
            "model": self.model,
            "policy": self.policy,
            "hits": self.hits,
            "near_misses": [
                {"rule": miss.rule, "node": miss.node, "source": miss.source, "reason": miss.reason}
                for miss in self.near_misses
            ],
            "refused": [
                {"rule": item.rule, "source": item.source, "module": item.module, "reason": item.reason}
                for item in self.refused
            ],
            "graphs": [
                {
                    "kind": graph.kind,
                    "frame": graph.frame,
                    "nodes_before": len(graph.before),
                    "nodes_after": len(graph.after),
                    "elapsed_ms": graph.elapsed_ms,
                    "passes": [
                        {"name": record.name, "elapsed_ms": record.elapsed_ms, "sites": len(record.outcome.changes)}
                        for record in graph.passes
                    ],
                }
                for graph in self.graphs
            ],
            "recompiles": self.recompiles,
            "optimized": dict(self.optimized),
            "graph_breaks": dict(self.graph_breaks),
            "fallbacks": dict(self.fallbacks),
            "uncovered": dict(self.uncovered),
            "logits_computed": self.logits_computed,
            "under_compiler": self.under_compiler,
            "autocast": self.autocast,
            "attends_across_documents": self.attends_across_documents,
            "forward_replaced": self.forward_replaced,
            "optimizer": self.optimizer,
            "optimizer_warning": self.optimizer_warning,
        }

    def __str__(self) -> str:
        return as_text(self, width=120)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self._headline(), style="bold"), *self._circumstances()]
        if self.graphs:
            parts += [self._table(), *self._gains()]
        parts += _reasons("near misses (not rewritten)", self.near_misses)
        parts += _reasons("refused by the proof", self.refused)
        parts += [Text(f"graph break at {reason}", style="dim") for reason in self.graph_breaks]
        if self.logits_computed:
            parts.append(
                Text(
                    f"logits were read after, and so computed for, {self.logits_computed} optimized calls", style="dim"
                )
            )
        return Group(*parts)

    def _circumstances(self) -> list[RenderableType]:
        """What ran, what did not and why, and who else has a hand in it."""
        lines: list[RenderableType] = []
        if self.optimized:
            by = ", ".join(f"{n} of {name or 'the model itself'}" for name, n in self.optimized.items())
            where = "" if list(self.optimized) == [""] else f": {by}"
            total = self.optimized.total()
            lines.append(Text(f"{total} optimized call{'s' * (total != 1)}{where}"))
        lines += [Text(f"fell back {n}×: {reason}", style="yellow") for reason, n in self.fallbacks.items()]
        lines += [Text(f"ran the original forward {n}×: {reason}", style="dim") for reason, n in self.uncovered.items()]
        if self.forward_replaced:
            lines.append(Text(f"the model's forward: {self.forward_replaced}", style="yellow"))
        if self.under_compiler:
            lines.append(
                Text(
                    f"called {self.under_compiler}× from inside torch.compile, which leaves the model to fxopt's "
                    'graphs; backend="inductor" compiles these further',
                    style="yellow",
                )
            )
        if self.autocast:
            lines.append(
                Text("called under autocast, which casts beside the policy: leave bf16= and fp16= off", style="yellow")
            )
        if self.attends_across_documents:
            lines.append(
                Text(
                    "packed rows: tokens attend to the documents before their own, as in transformers with a cache or "
                    "a mask; set model.config.use_cache = False and leave attention_mask out",
                    style="yellow",
                )
            )
        if self.optimizer:
            lines.append(Text(f"parameters are stepped by {self.optimizer}", style="dim"))
        if self.optimizer_warning:
            lines.append(Text(self.optimizer_warning, style="yellow"))
        return lines

    def _headline(self) -> str:
        if not self.graphs and (self.uncovered or self.fallbacks):
            return f"{self.model}, policy {self.policy}: no call was optimized so far"
        if not self.graphs:
            return f"{self.model}, policy {self.policy}: no graph captured yet; the first training call captures it"
        latest = self._latest()
        before, after = sum(len(graph.before) for graph in latest), sum(len(graph.after) for graph in latest)
        elapsed = sum(graph.elapsed_ms for graph in self.graphs) / 1e3
        return (
            f"{self.model}, policy {self.policy}: {len(latest)} graph{'s' * (len(latest) > 1)}, "
            f"{before} → {after} operations, {self.recompiles} recompiles, {elapsed:.1f} s in passes and proofs"
        )

    def _table(self) -> Table:
        table = Table("op", "sites", "operations", "error against float64", "from")
        rows: dict[str, list[Any]] = {}
        for graph in self._latest():
            for record in graph.passes:
                for change in record.outcome.changes:
                    rows.setdefault(change.op, []).append(change)
        hits = self.hits
        for op, changes in rows.items():
            proofs = [change.proof for change in changes if change.proof is not None]
            was = max((proof.original_error for proof in proofs), default=0.0)
            now = max((proof.replacement_error for proof in proofs), default=0.0)
            replaced = f"{changes[0].nodes_replaced} → 1"
            sources = Counter(change.source.split(": ")[0] for change in changes)
            proof = f"{was:.1e} → {now:.1e}" if proofs else "computed"
            table.add_row(op, str(hits[op]), replaced, proof, sources.most_common(1)[0][0])
        return table

    def _gains(self) -> list[RenderableType]:
        """Which results became more accurate than the original's, by op: in its proofs, where the factor is largest."""
        gains: dict[str, tuple[str, float, float]] = {}
        for graph in self._latest():
            for change in (change for record in graph.passes for change in record.outcome.changes):
                gain = change.proof.gain if change.proof is not None else None
                known = gains.get(change.op)
                if gain is not None and (known is None or gain[1] / gain[2] > known[1] / known[2]):
                    gains[change.op] = gain
        if not gains:
            return []
        told = [f"{op}, {name}: {was:.1e} → {now:.1e}" for op, (name, was, now) in sorted(gains.items())]
        title = Text("more accurate than the original code, against float64 on the proofs' samples:")
        return [title, *(Text(f"  {line}", style="dim") for line in told)]

    def _latest(self) -> list[GraphRecord]:
        """The graphs of each kind of call, each once."""
        return list({id(graph): graph for graphs in self._runs_of_kinds().values() for graph in graphs}.values())

    def _runs_of_kinds(self) -> dict[int, list[GraphRecord]]:
        """Of kinds of call that did not come to an end: of each piece of code the graph that has the most rewrites."""
        best: dict[tuple[int, int], GraphRecord] = {}
        for graph in self.graphs:
            known = best.get((graph.kind, graph.frame))
            if graph.kind not in self._runs and (known is None or _num_rewrites([graph]) >= _num_rewrites([known])):
                best[graph.kind, graph.frame] = graph
        runs = dict(self._runs)
        for graph in best.values():
            runs.setdefault(graph.kind, []).append(graph)
        return runs


def _num_rewrites(graphs: Sequence[GraphRecord]) -> int:
    return sum(graph.num_rewrites for graph in graphs)


def _reasons(title: str, found: Sequence[NearMiss | Refused]) -> list[RenderableType]:
    counted = Counter((f"{item.rule}: {item.reason}", item.source) for item in found)
    if not counted:
        return []
    lines: list[RenderableType] = [Text(f"{title}:")]
    for (reason, source), count in counted.most_common(MOST_REASONS):
        lines.append(Text(f"  {count}× {reason}   {source}", style="dim", overflow="fold"))
    if len(counted) > MOST_REASONS:
        lines.append(Text(f"  and {len(counted) - MOST_REASONS} more; see .to_dict()"))
    return lines
