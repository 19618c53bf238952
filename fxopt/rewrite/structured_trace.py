"""The graphs as artifacts of PyTorch's structured trace, so that `tlparse` shows them beside PyTorch's own.

`TORCH_TRACE=folder python train.py`, then `tlparse folder`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch._logging._internal import trace_structured

from fxopt.rewrite.report import GraphRecord
from fxopt.rewrite.snapshot import NodeRow


def trace_graph(record: GraphRecord) -> None:
    """Write a graph before and after the passes, and what each pass did. Costs nothing where nobody traces."""
    _artifact("fxopt_before", "string", lambda: _text(record.before))
    _artifact("fxopt_after", "string", lambda: _text(record.after))
    _artifact("fxopt_passes", "json", lambda: json.dumps(_passes(record), indent=1))


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def _text(rows: tuple[NodeRow, ...]) -> str:
    """A graph as lines of Python, with the line of the model's source that each comes from."""
    return "\n".join(f"{row.name}: {row.value} = {row.operation}({row.arguments})  # {row.source}" for row in rows)


def _passes(record: GraphRecord) -> list[dict[str, Any]]:
    return [
        {
            "pass": step.name,
            "elapsed_ms": step.elapsed_ms,
            "num_nodes_before": step.num_nodes_before,
            "num_nodes_after": step.num_nodes_after,
            "rewrites": [asdict(change) for change in step.outcome.changes],
            "near_misses": [
                {"rule": miss.rule, "source": miss.source, "reason": miss.reason} for miss in step.outcome.near_misses
            ],
            "refused": [asdict(refused) for refused in step.outcome.refused],
        }
        for step in record.passes
    ]
