"""A graph diff for people: like a `git diff` of the model's graph, with sizes beside the lines."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fxopt.inspection.diff import GraphDiff, Hunk
from fxopt.rewrite.report import GraphRecord
from fxopt.rewrite.snapshot import NodeRow

WIDTH = 140


def rendered(diff: GraphDiff) -> RenderableType:
    parts: list[RenderableType] = [Text(f"{diff.model}, policy {diff.policy}", style="bold")]
    for index, graph in enumerate(diff.graphs):
        parts.append(_headline(index, graph))
        parts += [_hunk(hunk) for hunk in diff.hunks(graph)]
    return Group(*parts)


def as_text(diff: GraphDiff) -> str:
    console = Console(width=WIDTH, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(rendered(diff))
    return capture.get()


def as_html(diff: GraphDiff) -> str:
    """A self-contained page. Everything that comes from the model is escaped."""
    console = Console(width=WIDTH, file=io.StringIO(), record=True)
    console.print(rendered(diff))
    return console.export_html(inline_styles=True)


def _headline(index: int, graph: GraphRecord) -> Text:
    before, after = (sum(row.size_bytes for row in side) for side in (graph.before, graph.after))
    return Text(
        f"\ngraph {index}: {len(graph.before)} → {len(graph.after)} operations, "
        f"{_megabytes(before)} → {_megabytes(after)} of results",
        style="bold",
    )


def _hunk(hunk: Hunk) -> RenderableType:
    times = f" × {hunk.count}" if hunk.count > 1 else ""
    rules = f"  [{', '.join(hunk.rules)}]" if hunk.rules else ""
    title = Text(f"\n@@ {hunk.module or 'the call'}{times}{rules}", style="cyan")
    lines = [_line("-", row, "red") for row in hunk.removed] + [_line("+", row, "green") for row in hunk.added]
    return Group(title, *lines)


def _line(sign: str, row: NodeRow, style: str) -> Text:
    call = f"{row.operation}({', '.join(row.inputs)})"
    text = f"{sign} {row.name} = {call}"
    return Text(f"{text:<70} {row.value:<28} {row.source}"[:WIDTH], style=style, no_wrap=True, overflow="ellipsis")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
