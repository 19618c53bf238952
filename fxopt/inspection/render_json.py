"""A graph diff as JSON, and back. Schema 1:

    schema            "fxopt.graph_diff"
    version           1; a reader refuses a larger one
    model, policy     names
    conditions        batch_size, sequence_length, training, checkpointing, num_parameters, parameter_bytes, versions
    graph_breaks      reason → how often
    fallbacks         reason → how often
    metrics           name → number: what `fxopt diff` compares and --fail-if asks for; costs of all runs of all graphs
    graphs            a list; each with the fields of `diff.Graph`:
      call, runs      what call it is of, in words; how often that call runs it (costs are those of one run)
      kind, frame     numbers: of the calls that are captured one by one, of the pieces of code
      stages          name, num_nodes, num_rewrites, elapsed_ms, cost, peak_bytes, peak_at; the first is "captured"
      nodes           the fields of `diff.Node`, `id` being the place in this list; `source` is an index into `sources`;
                      made and removed are indices into `stages`; `results` is [[dtype, shape], …] of an operation with
                      several results, whose own dtype is "", and else []
      before, after   node ids of the first and the last stage, in order
      aligned         [node before, node after, "same" | "rewritten" | "equal"]
      rewrites        the fields of `diff.Rewrite`; `removed` and `added` are node ids; `source` is `file.py:line: code`
      hunks           the fields of `diff.Hunk`; `like` tells equal ones
      blocks          the fields of `diff.Block`: layers; `like` tells equal ones
      misses          near misses and refusals; `node` is a node id or null, `source` as in rewrites
      not_measured    why costs are null, or ""
      sources         file, line, function, code

A cost is {launches, backward_launches, casts, bytes_moved, backward_bytes_moved, flops, backward_flops, saved_bytes}.
Within version 1 fields are added and none is changed or dropped.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from fxopt.inspection.diff import (
    Block,
    Conditions,
    Graph,
    GraphDiff,
    Hunk,
    Miss,
    Node,
    Origin,
    Proof,
    Rewrite,
    Source,
    Stage,
)
from fxopt.inspection.meter import Cost

SCHEMA, VERSION = "fxopt.graph_diff", 1


def as_json(diff: GraphDiff) -> str:
    return json.dumps(to_dict(diff), separators=(",", ":"))


def to_dict(diff: GraphDiff) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "model": diff.model,
        "policy": diff.policy,
        "conditions": asdict(diff.conditions),
        "graph_breaks": diff.graph_breaks,
        "fallbacks": diff.fallbacks,
        "metrics": diff.metrics,
        "graphs": [_graph_to_dict(graph) for graph in diff.graphs],
    }


def _graph_to_dict(graph: Graph) -> dict[str, Any]:
    lines = [node.source for node in graph.nodes] + [hunk.source for hunk in graph.hunks]
    sources = list(dict.fromkeys(line for line in lines if line is not None))
    index = {source: number for number, source in enumerate(sources)}
    found = {field.name: _plain(getattr(graph, field.name), index) for field in fields(graph)}
    return {**found, "sources": [asdict(source) for source in sources]}


def _plain(value: Any, index: dict[Source, int]) -> Any:
    """Dataclasses as dictionaries, tuples as lists, a source as its number."""
    if isinstance(value, Source):
        return index[value]
    if isinstance(value, tuple):
        return [_plain(item, index) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name), index) for field in fields(value)}
    return value


def load(path: str | Path) -> GraphDiff:
    """The diff that `save` wrote to a JSON file.

    Raises ValueError, naming the file, for one that cannot be read, that holds none or half of one, or a newer one.
    """
    again = f"write one with: fxopt inspect MODEL --json {path}"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; {again}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} holds no graph diff; {again}")
    version = data.get("version")
    if type(version) is not int:
        raise ValueError(f"{path} is damaged: its version is {version!r}; {again}")
    if version > VERSION:
        raise ValueError(f"{path} has version {version} and this fxopt reads {VERSION}: update fxopt")
    try:
        diff = from_dict(data)
        _check(diff)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from error
    return diff


def _check(diff: GraphDiff) -> None:
    """Raises what a diff raises whose parts do not fit each other."""
    for graph in diff.graphs:
        numbers = [*graph.before, *graph.after, *(n for old, new, _ in graph.aligned for n in (old, new))]
        changes: tuple[Rewrite | Hunk, ...] = (*graph.rewrites, *graph.hunks)
        numbers += [n for change in changes for n in (*change.removed, *change.added)]
        numbers += [n for block in graph.blocks for n in block.nodes]
        numbers += [n for node in graph.nodes for _, reads in node.reads for n in reads]
        if not all(0 <= number < len(graph.nodes) for number in numbers):
            raise ValueError(f"it has {len(graph.nodes)} nodes and names others")
        sum((stage.cost for stage in graph.stages if stage.cost is not None), Cost())
    sum(diff.metrics.values())


def from_dict(data: dict[str, Any]) -> GraphDiff:
    """The inverse of `to_dict`."""
    return GraphDiff(
        model=data["model"],
        policy=data["policy"],
        conditions=Conditions(**_known(Conditions, data["conditions"])),
        graphs=tuple(_graph_from_dict(graph) for graph in data["graphs"]),
        graph_breaks=data["graph_breaks"],
        fallbacks=data["fallbacks"],
    )


def _graph_from_dict(data: dict[str, Any]) -> Graph:
    read = _Reader([Source(**_known(Source, source)) for source in data["sources"]])
    return Graph(
        call=data.get("call", ""),
        runs=data.get("runs", 1),
        kind=data["kind"],
        frame=data["frame"],
        stages=tuple(read(Stage, item) for item in data["stages"]),
        nodes=tuple(read(Node, item) for item in data["nodes"]),
        before=tuple(data["before"]),
        after=tuple(data["after"]),
        aligned=tuple((old, new, how) for old, new, how in data["aligned"]),
        rewrites=tuple(read(Rewrite, item) for item in data["rewrites"]),
        hunks=tuple(read(Hunk, item) for item in data["hunks"]),
        blocks=tuple(read(Block, item) for item in data["blocks"]),
        misses=tuple(read(Miss, item) for item in data["misses"]),
        not_measured=data["not_measured"],
    )


_CLASSES: dict[tuple[type, str], Any] = {
    (Stage, "cost"): Cost,
    (Node, "before"): Cost,
    (Node, "after"): Cost,
    (Hunk, "before"): Cost,
    (Hunk, "after"): Cost,
    (Node, "made_by"): Origin,
    (Node, "removed_by"): Origin,
    (Rewrite, "proof"): Proof,
}


class _Reader:
    def __init__(self, sources: list[Source]):
        self.sources = sources

    def __call__(self, cls: Any, data: dict[str, Any]) -> Any:
        """An object of `cls` from its dictionary."""
        return cls(**{name: self._value(cls, name, value) for name, value in _known(cls, data).items()})

    def _value(self, cls: type, name: str, value: Any) -> Any:
        if value is None:
            return None
        if name == "source" and isinstance(value, int):
            return self.sources[value]
        if (inner := _CLASSES.get((cls, name))) is not None:
            return inner(**_known(inner, value))
        return _tuples(value)


def _known(cls: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The fields that `cls` has; those that a later fxopt added are passed over, and an earlier one lacks some."""
    known = fields(cls)
    return {field.name: data[field.name] for field in known if field.name in data or field.default is MISSING}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
