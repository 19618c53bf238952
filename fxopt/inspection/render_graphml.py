"""A graph diff as GraphML: every node of every stage, with the stages that it stands in, for networkx, Gephi, yEd."""

from __future__ import annotations

import io
import re

import networkx as nx

from fxopt.inspection.diff import GraphDiff, Node


def as_graphml(diff: GraphDiff) -> str:
    out = io.BytesIO()
    nx.write_graphml(as_networkx(diff), out)
    return out.getvalue().decode()


def as_networkx(diff: GraphDiff) -> nx.MultiDiGraph:
    """The graphs of a diff in one, from what is read to who reads it; an edge has the stage from which on it holds."""
    result = nx.MultiDiGraph(model=_clean(diff.model), policy=_clean(diff.policy))
    for number, graph in enumerate(diff.graphs):
        for node in graph.nodes:
            result.add_node(f"{number}:{node.id}", graph=number, **_attributes(node))
        for node in graph.nodes:
            for since, reads in node.reads:
                for source in reads:
                    result.add_edge(f"{number}:{source}", f"{number}:{node.id}", since=since)
        for old, new, how in graph.aligned:
            if old != new:
                result.add_edge(f"{number}:{old}", f"{number}:{new}", aligned=how)
    return result


def _attributes(node: Node) -> dict[str, str | int]:
    """What GraphML can hold: texts and numbers, and nothing for None."""
    found: dict[str, str | int | None] = {
        "label": node.operation,
        "name": node.name,
        "arguments": node.arguments,
        "value": node.value,
        "size_bytes": node.size_bytes,
        "module": node.module,
        "source": f"{node.source.file}:{node.source.line}: {node.source.code}" if node.source else None,
        "made": node.made,
        "removed": node.removed,
        "made_by": f"{node.made_by.step} {node.made_by.rule}".strip() if node.made_by else None,
        "removed_by": f"{node.removed_by.step} {node.removed_by.rule}".strip() if node.removed_by else None,
        "saved_bytes_before": node.before.saved_bytes if node.before else None,
        "saved_bytes_after": node.after.saved_bytes if node.after else None,
        "flops_before": node.before.flops + node.before.backward_flops if node.before else None,
        "flops_after": node.after.flops + node.after.backward_flops if node.after else None,
    }
    return {
        key: _clean(value) if isinstance(value, str) else value for key, value in found.items() if value is not None
    }


def _clean(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)
