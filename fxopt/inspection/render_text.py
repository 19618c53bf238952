"""A graph diff for a terminal: like a `git diff` of the model's own source, with the numbers beside the lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt import printing
from fxopt.inspection.diff import Graph, GraphDiff, Hunk, Node, Source, Stage, call_in_words
from fxopt.inspection.fold import without_index
from fxopt.inspection.meter import Cost
from fxopt.inspection.numbers import change, in_bytes, in_count

WIDTH = 140
CODE = 88  # columns for a line of source
MOST_VALUES = 4  # of an operation with several results; a checkpoint's body may have dozens
MOST_MISSES = 12  # printed; `to_dict` has all


def rendered(diff: GraphDiff) -> RenderableType:
    return printing.WithoutControls(Group(*_parts(diff)))


def as_text(diff: GraphDiff) -> str:
    return printing.as_text(rendered(diff), WIDTH) + "\n"


def _parts(diff: GraphDiff) -> Iterator[RenderableType]:
    yield Text(headline(diff), style="bold")
    for number, graph in enumerate(diff.graphs):
        if len(diff.graphs) > 1:
            runs = f", run {graph.runs} times: costs are those of one run" if graph.runs > 1 else ""
            call = f": {graph.call}" if graph.call else ""
            yield Text(f"\ngraph {number} of {len(diff.graphs)}{call}{runs}", style="bold")
        yield _totals(graph)
        if graph.not_measured:
            yield Text(f"costs are not known: {graph.not_measured}", style="yellow")
        for hunks in graph.folded_hunks():
            if hunks[0].rewrites:
                yield from _hunk(graph, hunks)
        yield from _bookkeeping(graph)
        yield from _misses(graph)
    for reason, count in diff.graph_breaks.items():
        yield Text(f"graph break {count}× at {reason}", style="yellow")
    for reason, count in diff.fallbacks.items():
        yield Text(f"fell back {count}×: {reason}", style="yellow")
    if not diff.graphs:
        yield Text("no graph was captured", style="yellow")


def headline(diff: GraphDiff) -> str:
    """The model, the policy and the call, in one line."""
    what = diff.conditions
    call = call_in_words(what.training, what.checkpointing, what.batch_size, what.sequence_length)
    parameters = f"{in_count(what.num_parameters)} parameters in {in_bytes(what.parameter_bytes)}"
    return f"{diff.model}, policy {diff.policy}: {parameters}; {call}"


def _totals(graph: Graph) -> Table:
    """A row for each stage that changed something, and what all of them together changed."""
    measured = graph.stages[0].cost is not None
    columns = ["rewrites", "nodes", *(["launches", "casts", "moved", "saved for backward", "peak"] if measured else [])]
    table = Table("", *columns, box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    last: Stage | None = None
    for stage in graph.stages:
        if last is None or _numbers(stage) != _numbers(last) or stage.num_rewrites:
            table.add_row(stage.name, str(stage.num_rewrites or ""), *_numbers(stage), style="" if last else "dim")
        last = stage
    first, final = graph.stages[0], graph.stages[-1]
    pairs = [(first.num_nodes, final.num_nodes)]
    if first.cost is not None and final.cost is not None:
        pairs += [(launches(first.cost), launches(final.cost)), (first.cost.casts, final.cost.casts)]
        pairs += [(moved(first.cost), moved(final.cost)), (first.cost.saved_bytes, final.cost.saved_bytes)]
        pairs += [(first.peak_bytes or 0, final.peak_bytes or 0)]
    table.add_row("in all", str(len(graph.rewrites)), *(change(*pair) for pair in pairs), style="bold")
    return table


def _numbers(stage: Stage) -> list[str]:
    if stage.cost is None:
        return [str(stage.num_nodes)]
    saved, peak = in_bytes(stage.cost.saved_bytes), in_bytes(stage.peak_bytes or 0)
    return [
        str(stage.num_nodes),
        str(launches(stage.cost)),
        str(stage.cost.casts),
        in_bytes(moved(stage.cost)),
        saved,
        peak,
    ]


def launches(cost: Cost) -> int:
    return cost.launches + cost.backward_launches


def moved(cost: Cost) -> int:
    return cost.bytes_moved + cost.backward_bytes_moved


def _hunk(graph: Graph, hunks: list[Hunk]) -> Iterator[RenderableType]:
    hunk = hunks[0]
    modules = dict.fromkeys(without_index(item.module) for item in hunks)
    where = f"{hunk.source.file}:{hunk.source.line} in {hunk.source.function}" if hunk.source else "the call"
    times = f" × {len(hunks)}" if len(hunks) > 1 else ""
    module = hunk.module if len(hunks) == 1 else ", ".join(modules)
    yield Text(f"\n@@ {where} @@ {module or 'the call'}{times}", style="cyan", no_wrap=True, overflow="ellipsis")
    yield Text("   " + "; ".join(_facts(graph, hunk, len(hunks))), style="dim", overflow="fold")
    for source, nodes in _by_line([graph.nodes[number] for number in hunk.removed]):
        yield _removed(source, nodes, hunk.source)
    for number in hunk.added:
        node = graph.nodes[number]
        if node.operation != "getitem":  # one of an op's several results
            yield _line("+", "", f"{node.operation}({_shortened(node.arguments)})", node.values, node.after, "green")


def _facts(graph: Graph, hunk: Hunk, count: int) -> Iterator[str]:
    yield ", ".join(hunk.steps)
    if len(hunk.rewrites) > 1:  # else there are as many as places
        yield f"{count * len(hunk.rewrites)} rewrites"
    if hunk.before is not None and hunk.after is not None:
        yield f"launches {launches(hunk.before)} → {launches(hunk.after)}"
        yield f"moved {in_bytes(moved(hunk.before))} → {in_bytes(moved(hunk.after))}"
        saved = f"saved {in_bytes(hunk.before.saved_bytes)} → {in_bytes(hunk.after.saved_bytes)}"
        less = count * (hunk.before.saved_bytes - hunk.after.saved_bytes)
        yield f"{saved}, in all {in_bytes(abs(less))} {'less' if less > 0 else 'more'}" if less and count > 1 else saved
    for number in hunk.rewrites:
        proof = graph.rewrites[number].proof
        if proof is not None:
            yield f"{graph.rewrites[number].op} error {proof.original_error:.1e} → {proof.replacement_error:.1e}"


def _by_line(nodes: Iterable[Node]) -> list[tuple[Source | None, list[Node]]]:
    """Nodes by the line of source that they come from, in the order in which they run."""
    lines: dict[Source | None, list[Node]] = {}
    for node in nodes:
        lines.setdefault(node.source, []).append(node)
    return list(lines.items())


def _removed(source: Source | None, nodes: list[Node], beside: Source | None) -> Text:
    """What went from one line. A line of another file than that of `beside`, which heads the hunk, says of which."""
    costs = [node.before for node in nodes if node.before is not None]
    cost = sum(costs, Cost()) if costs else None
    if source is None:
        return _line("-", "", ", ".join(node.spelled for node in nodes), nodes[-1].values, cost, "red")
    if beside is None or source.file != beside.file:
        return _line("-", "", f"{source.place}: {source.code}", nodes[-1].values, cost, "red")
    return _line("-", str(source.line), source.code, nodes[-1].values, cost, "red")


def _line(sign: str, number: str, code: str, values: tuple[str, ...], cost: Cost | None, style: str) -> Text:
    """A line of code with its result; further results stand below the first."""
    if len(values) > MOST_VALUES:
        values = (*values[: MOST_VALUES - 1], f"and {len(values) - MOST_VALUES + 1} more results")
    value, *further = values or ("",)
    text = Text(f"{sign} {number:>4}  ", style=style, no_wrap=True, overflow="ellipsis")
    text.append(f"{_shortened(code):<{CODE}} ", style=style)
    text.append(f"{value:<27}", style="dim")
    if cost is not None and cost.saved_bytes:
        text.append(f" keeps {in_bytes(cost.saved_bytes)}", style="dim")
    for value in further:
        text.append(f"\n{'':{len('-  164  ') + CODE + 1}}{value}", style="dim")
    return text


def _shortened(text: str) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= CODE else f"{text[: CODE - 1]}…"


def _bookkeeping(graph: Graph) -> Iterator[RenderableType]:
    rest = [hunk for hunk in graph.hunks if not hunk.rewrites]
    if rest:
        steps = dict.fromkeys(step for hunk in rest for step in hunk.steps)
        removed, added = (
            sum(len(side) for side in sides) for sides in zip(*((h.removed, h.added) for h in rest), strict=True)
        )
        more = f", {added} came" if added else ""
        yield Text(f"\n{removed} nodes that change no value went{more}: {', '.join(steps)}", style="dim")


def _misses(graph: Graph) -> Iterator[RenderableType]:
    counted: dict[tuple[bool, str, str, str], int] = {}
    for miss in graph.misses:
        key = miss.refused, miss.rule, miss.reason, miss.source
        counted[key] = counted.get(key, 0) + 1
    if counted:
        yield Text("\nleft alone:")
    for (refused, rule, reason, source), count in sorted(counted.items(), key=lambda item: -item[1])[:MOST_MISSES]:
        what = "refused by the proof" if refused else "nearly"
        yield Text(f"  {count}× {rule}, {what}: {reason}   {source}", style="yellow", overflow="fold")
    if len(counted) > MOST_MISSES:
        yield Text(f"  and {len(counted) - MOST_MISSES} more reasons; see .to_dict()", style="dim")
