"""Dynamo as fxopt uses it: its configuration, its cache, its words, and what it leaves to Inductor."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext
from torch.utils.checkpoint import checkpoint

from fxopt.rewrite.graph import SELECTIVE, graph_modules

TOO_MANY = (
    "Dynamo captured this call too often (something in it changes from call to call) and runs the original code: see "
    "torch._dynamo.config.recompile_limit"
)


def configured(has_boundaries: bool, **options: bool) -> Any:
    """A context in which Dynamo captures a call in as few graphs as it can."""
    options["nested_graph_breaks"] = True
    if has_boundaries:
        # Their hooks write to attributes inside a checkpoint: they lend a module its parameters and take them back.
        # Dynamo captures that only if told that the writing need not be repeated when backward computes again.
        options["skip_fwd_side_effects_in_bwd_under_checkpoint"] = True
    changes: dict[str, Any] = {n: v for n, v in options.items() if hasattr(torch._dynamo.config, n)}
    if hasattr(logging.Logger, "warning_once"):
        # transformers' advice that it gives once, and that the original forward still gives. Any logging breaks a graph
        # in two; the advice about `loss_type` would come between the output head and its loss.
        changes["ignore_logging_functions"] = _Unlisted({logging.Logger.warning_once})
    if not ISOLATED:
        limit = torch._dynamo.config.recompile_limit * max(_num_own_codes, 1)
        changes["recompile_limit"] = min(limit, torch._dynamo.config.accumulated_recompile_limit)
    return torch._dynamo.config.patch(changes)


class _Unlisted(set[Any]):
    """A set that has its members, and shows none: before 2.13 Dynamo fails to write functions down in its metrics."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


# Where a graph breaks, Dynamo caches the pieces with code objects that all models of a class share. Where torch cannot
# keep their entries apart (before 2.13), they share one limit too, which therefore grows with their number.
ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)

_num_own_codes = 0


def own_code(function: Callable[..., Any]) -> FunctionType:
    """`function` with a code object and a name of its own.

    Dynamo's cache and its limit belong to the code object; what it remembers of changing numbers, to the name. A
    second model with another epsilon would otherwise be captured with its epsilon as an unknown.
    """
    global _num_own_codes
    assert isinstance(function, FunctionType)
    name = f"{function.__name__}_{_num_own_codes}"
    _num_own_codes += 1
    code = function.__code__.replace(co_name=name, co_qualname=name)
    # And its own globals, where Dynamo puts what it compiled.
    return FunctionType(code, dict(function.__globals__), name, function.__defaults__, function.__closure__)


@contextlib.contextmanager
def quiet(is_first: bool) -> Iterator[None]:
    """While a kind of call is captured, keeps back what this thread's Dynamo prints of an error: we say it in a line.

    `TORCH_LOGS` shows it all.
    """
    if not is_first or os.environ.get("TORCH_LOGS"):
        yield
        return
    here = threading.get_ident()

    def drop_ours(record: logging.LogRecord) -> bool:
        return record.thread != here

    logs = [logging.getLogger(name) for name in ("torch._guards", "torch._subclasses.fake_tensor")]
    for log in logs:
        log.addFilter(drop_ours)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(drop_ours)


def where_and_why(graph_break: Any) -> str:
    """A graph break of Dynamo's in one line: `file.py:line: reason`."""
    place = graph_break.user_stack[-1] if graph_break.user_stack else None
    where = f"{Path(place.filename).name}:{place.lineno}: " if place is not None else ""
    return where + graph_break.reason.strip().splitlines()[0]


def frame_number() -> int:
    """Which piece of code Dynamo is compiling: the same for all recompilations of it."""
    compile_id = CompileContext.current_compile_id()
    return -1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id


def checkpoint_eagerly(module: fx.GraphModule) -> None:
    """Let activation checkpointing keep the random state, in place.

    Dynamo's operator leaves that to Inductor: run as it is, it draws another dropout when it computes again.
    """
    for inner in graph_modules(module):
        for node in inner.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint):
            node.target = _checkpoint
        inner.recompile()


def _checkpoint(body: fx.GraphModule, *args: Any, **options: Any) -> Any:
    if SELECTIVE in body.meta:
        options["context_fn"] = body.meta[SELECTIVE]
    return checkpoint(body, *args, **{**options, "use_reentrant": False})
