"""Dynamo graphs of small functions and real modules, for tests of passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.rewrite.pipeline import Pipeline


def captured(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """The one graph that Dynamo makes of `function` on `inputs`, with static sizes."""
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph


def targets(module: fx.GraphModule) -> list[str]:
    """The names of what the graph calls, in order."""
    return [
        getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes if node.op.startswith("call")
    ]


def run_optimized(pipeline: Pipeline, function: Callable[..., Any], *inputs: Any) -> tuple[fx.GraphModule, Any]:
    """`function` captured and rewritten by `pipeline`, without proofs, and what it returns then."""
    rewritten: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        pipeline.run(module, None)
        rewritten.append(module)
        return module.forward

    torch.compiler.reset()
    result = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (graph,) = rewritten
    return graph, result
