"""A rule's Python functions as graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from torch import fx


def ops_called_by(function: Callable[..., Any]) -> list[FunctionType]:
    """The plain Python functions that `function` calls by a global name, in order of first mention."""
    assert isinstance(function, FunctionType), function
    found = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [value for value in found if isinstance(value, FunctionType)]


def trace(function: Callable[..., Any], ops: list[FunctionType], literals: dict[str, Any]) -> tuple[fx.Graph, Any]:
    """`function` as a graph, and its result, in which nodes are proxies.

    Each parameter that `literals` does not give becomes a placeholder. Each of `ops` becomes one node instead of
    being traced through.
    """
    assert isinstance(function, FunctionType), function
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    arguments = {
        name: literals[name] if name in literals else fx.Proxy(graph.placeholder(name), tracer)
        for name in inspect.signature(function).parameters
    }
    as_nodes = {op.__name__: partial(_call_as_node, tracer, op) for op in ops}
    traced = FunctionType(function.__code__, {**function.__globals__, **as_nodes}, function.__name__)
    return graph, traced(**arguments)


def _call_as_node(tracer: fx.proxy.TracerBase, op: FunctionType, *args: Any, **kwargs: Any) -> fx.Proxy:
    return tracer.create_proxy("call_function", op, args, kwargs)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
