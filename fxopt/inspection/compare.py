"""Two inspections compared: what `fxopt diff A.json B.json` shows, and the conditions that make it fail."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networkx as nx
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.inspection.align import align
from fxopt.inspection.diff import COSTS, Graph, GraphDiff, Node
from fxopt.inspection.fold import without_index
from fxopt.inspection.numbers import amount_of, change, in_bytes, in_flops
from fxopt.inspection.render_text import headline
from fxopt.printing import WithoutControls

MOST_KINDS = 20  # printed; `Comparison.lost` and `gained` have all
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(?P<name>[\w.]+)\s*(?P<operator><=|>=|==|!=|<|>)(?P<number>[^%]+)(?P<percent>%?)\s*")


@dataclass(frozen=True)
class Condition:
    """A condition on one number: `fusions < 61`, `peak_bytes > 20 GB`; on its change from A to B: `launches > 5 %`."""

    text: str
    name: str
    operator: str
    number: float
    relative: bool

    @staticmethod
    def parse(text: str) -> Condition:
        """Raises ValueError for what is no condition."""
        found = _CONDITION.fullmatch(text)
        amount, has_unit = (found and amount_of(found["number"])) or (math.nan, False)
        if found is None or math.isnan(amount) or (has_unit and found["percent"]):
            raise ValueError(
                f"{text!r} is no condition; write for instance 'fusions < 61', 'peak_bytes > 20 GB', 'launches > 5 %'"
            )
        return Condition(text, found["name"], found["operator"], amount, bool(found["percent"]))

    def holds(self, before: dict[str, float], after: dict[str, float]) -> bool:
        """Whether it holds in B. A rewrite that is not there counts as 0.

        Raises ValueError for a name that nobody has, and for a cost that was not measured.
        """
        if self.name not in after and self.name not in before:
            raise ValueError(f"there is no {self.name!r} to compare; there are: {', '.join(sorted({*before, *after}))}")
        for side, metrics in (("A", before), ("B", after)):
            if self.name in COSTS and self.name not in metrics and (side == "B" or self.relative):
                raise ValueError(f"{self.name} was not measured in {side}: {self.text!r} cannot be decided")
        value = after.get(self.name, 0.0)
        if self.relative:
            known = before.get(self.name, 0.0)
            value = 100 * (value - known) / known if known else 0.0 if value == known else float("inf")
        return _OPERATORS[self.operator](value, self.number)


@dataclass(frozen=True)
class Comparison:
    """What differs between the optimized graphs of two inspections."""

    before: GraphDiff
    after: GraphDiff

    def lost(self) -> Counter[str]:
        """Nodes of A's optimized graphs that have no counterpart in B's: `operation  source`, and how often."""
        return self._unpaired(self.before, self.after)

    def gained(self) -> Counter[str]:
        """The same the other way round."""
        return self._unpaired(self.after, self.before)

    @staticmethod
    def _unpaired(one: GraphDiff, other: GraphDiff) -> Counter[str]:
        found: Counter[str] = Counter()
        for number, graph in enumerate(one.graphs):
            paired = align(_digraph(graph), _digraph(other.graphs[number])) if number < len(other.graphs) else {}
            found.update(_described(graph.nodes[node]) for node in graph.after if node not in paired)
        return found

    def __rich__(self) -> RenderableType:
        table = Table("", "A", "B", "", box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for column in table.columns[1:]:
            column.justify = "right"
        first, second = self.before.metrics, self.after.metrics
        for name in dict.fromkeys([*first, *second]):
            if name in COSTS and (name not in first or name not in second):
                known = (shown(name, side[name]) if name in side else "not measured" for side in (first, second))
                table.add_row(name, *known, "")
                continue
            one, two = first.get(name, 0.0), second.get(name, 0.0)
            style = "dim" if one == two else ""
            table.add_row(name, shown(name, one), shown(name, two), change(one, two), style=style)
        parts: list[RenderableType] = [
            Text(f"A: {_title(self.before)}\nB: {_title(self.after)}\n", style="bold"),
            table,
        ]
        for title, sign, style, counted in (
            ("\nin A's optimized graph, not in B's:", "-", "red", self.lost()),
            ("\nin B's optimized graph, not in A's:", "+", "green", self.gained()),
        ):
            if counted:
                parts.append(Text(title))
                shown_here = counted.most_common(MOST_KINDS)
                parts += [Text(f"{sign} {text}  × {count}", style=style) for text, count in shown_here]
                if len(counted) > MOST_KINDS:
                    parts.append(Text(f"  and {len(counted) - MOST_KINDS} more kinds; see Comparison", style="dim"))
        return WithoutControls(Group(*parts))


def shown(name: str, value: float) -> str:
    """A metric as people read it."""
    if "bytes" in name:
        return in_bytes(value)
    return in_flops(value) if name == "flops" else f"{value:.0f}"


def _title(diff: GraphDiff) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in diff.conditions.versions.items())
    return f"{headline(diff)} ({versions})"


def _described(node: Node) -> str:
    place = f"  {node.source.place}" if node.source else ""
    return f"{node.operation}  {node.value}  {without_index(node.module)}{place}"


def _digraph(graph: Graph) -> Any:
    """The optimized graph, with what makes nodes of two captures comparable: not their names, not their lines."""
    stage, result = len(graph.stages) - 1, nx.DiGraph()
    for number in graph.after:
        node = graph.nodes[number]
        label = node.operation, node.dtype, node.shape, node.module, node.source.code if node.source else ""
        result.add_node(number, label=label)
    for number in graph.after:
        for position, source in enumerate(graph.nodes[number].reads_at(stage)):
            result.add_edge(source, number, position=position)
    return result
