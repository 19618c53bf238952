"""A model's graphs before and after the passes, as data: which nodes went, which came, from which line of source."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fxopt.rewrite.report import GraphRecord, Report
from fxopt.rewrite.snapshot import NodeRow


@dataclass(frozen=True)
class Hunk:
    """Nodes that stand together and were replaced together. Equal hunks of repeated layers are one, with a count."""

    removed: tuple[NodeRow, ...]
    added: tuple[NodeRow, ...]
    count: int

    @property
    def source(self) -> str:
        return next((row.source for row in (*self.removed, *self.added) if row.source), "")

    @property
    def module(self) -> str:
        return _without_index(next((row.module for row in (*self.removed, *self.added) if row.module), ""))

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.rule for row in self.added if row.rule))


@dataclass(frozen=True)
class GraphDiff:
    """What the passes changed in each captured graph of a model, in order of capture.

    Print it for a terminal; `save` writes it as text, HTML or JSON.
    """

    model: str
    policy: str
    graphs: tuple[GraphRecord, ...]

    @staticmethod
    def of(report: Report) -> GraphDiff:
        """The diff of everything captured so far; ValueError before the first training call."""
        if not report.graphs:
            raise ValueError(
                f"no graph of this {report.model} has been captured yet; call it once with labels: "
                "model(input_ids=…, labels=…)"
            )
        return GraphDiff(report.model, report.policy, tuple(report.graphs))

    def hunks(self, graph: GraphRecord) -> list[Hunk]:
        """The changes to one graph, equal ones of repeated layers folded into one."""
        folded: dict[Any, Hunk] = {}
        for removed, added in _changes(graph):
            key = tuple(_without_layer(row) for row in removed), tuple(_without_layer(row) for row in added)
            first = folded.setdefault(key, Hunk(removed, added, 0))
            folded[key] = replace(first, count=first.count + 1)
        return list(folded.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "policy": self.policy,
            "graphs": [
                {
                    "frame": graph.frame,
                    "before": [asdict(row) for row in graph.before],
                    "after": [asdict(row) for row in graph.after],
                }
                for graph in self.graphs
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Write the diff to `path`, as its ending says: .html, .json or .txt. Returns the path.

        Raises ValueError for another ending.
        """
        from fxopt.inspection.render_text import as_html, as_text

        path = Path(path)
        renderers = {
            ".html": as_html,
            ".txt": as_text,
            ".json": lambda diff: json.dumps(diff.to_dict(), indent=1),
        }
        if path.suffix not in renderers:
            raise ValueError(f"cannot save a graph diff as {path.name!r}; use one of {', '.join(renderers)}")
        path.write_text(renderers[path.suffix](self), encoding="utf-8")
        return path

    def __rich__(self) -> Any:
        from fxopt.inspection.render_text import rendered

        return rendered(self)

    def __str__(self) -> str:
        from fxopt.inspection.render_text import as_text

        return as_text(self)


def _changes(graph: GraphRecord) -> Iterator[tuple[tuple[NodeRow, ...], tuple[NodeRow, ...]]]:
    before, after = ([(row.name, row.operation) for row in side] for side in (graph.before, graph.after))
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            yield graph.before[i1:i2], graph.after[j1:j2]


def _without_layer(row: NodeRow) -> tuple[str, ...]:
    return row.operation, row.value, row.source, _without_index(row.module)


def _without_index(module: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)
