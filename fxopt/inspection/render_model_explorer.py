"""A graph diff as JSON for Google's Model Explorer: `pip install ai-edge-model-explorer`, then
`model-explorer diff.model-explorer.json`. Each graph is shown as it was captured and as it runs, layers as namespaces.
"""

from __future__ import annotations

import json
from typing import Any

from fxopt.inspection.diff import Graph, GraphDiff, Node


def as_model_explorer(diff: GraphDiff) -> str:
    graphs = []
    for number, graph in enumerate(diff.graphs):
        last = len(graph.stages) - 1
        graphs.append(_graph(graph, f"{number}: captured", 0, graph.before))
        graphs.append(_graph(graph, f"{number}: optimized", last, graph.after))
    return json.dumps([{"label": f"{diff.model}, policy {diff.policy}", "graphs": graphs}], indent=1)


def _graph(graph: Graph, name: str, stage: int, ids: tuple[int, ...]) -> dict[str, Any]:
    return {"id": name, "nodes": [_node(graph.nodes[number], stage) for number in ids]}


def _node(node: Node, stage: int) -> dict[str, Any]:
    cost = node.after if stage else node.before
    attributes = {
        "arguments": node.arguments,
        "source": f"{node.source.file}:{node.source.line}: {node.source.code}" if node.source else "",
        "made by": f"{node.made_by.step} {node.made_by.rule}" if node.made_by else "",
        "removed by": f"{node.removed_by.step} {node.removed_by.rule}" if node.removed_by else "",
        **({key: str(value) for key, value in vars(cost).items()} if cost else {}),
    }
    return {
        "id": str(node.id),
        "label": node.operation if stage else node.spelled,
        "namespace": node.module.replace(".", "/"),
        "incomingEdges": [
            {"sourceNodeId": str(source), "sourceNodeOutputId": "0", "targetNodeInputId": str(position)}
            for position, source in enumerate(node.reads_at(stage))
        ],
        "attrs": [{"key": key, "value": value} for key, value in attributes.items() if value],
        "outputsMetadata": [
            {"id": str(position), "attrs": [{"key": "tensor_shape", "value": value}]}
            for position, value in enumerate(node.values)
        ],
    }
