"""A model's graphs before the passes, after each, and after all, as data: see `GraphDiff`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.atomic_file import write_text
from fxopt.inspection.meter import Cost


@dataclass(frozen=True)
class Source:
    """A line of source. The file is told from its package or the working directory, or by its name alone."""

    file: str
    line: int
    function: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}"


@dataclass(frozen=True)
class Origin:
    """The pass that made or removed a node, and the rule, or '' where the pass has no rules."""

    step: str
    rule: str


@dataclass(frozen=True)
class Node:
    """One call in a graph, at whatever stage it stands there.

    `name` is its name in the graph at the path `graph`: '' but for bodies of checkpoints and the like. `module` is the
    path of the module whose forward it belongs to. `shape`, `dtype` and `size_bytes` are those of its result; where it
    has several, `results` has the dtype and shape of each, `size_bytes` is that of all, and `dtype` is ''.
    `operation` is spelled as the passes leave it, `spelled` as the model had it; `arguments` as the model had them.
    It stands in the stages from `made` to `removed`, which it does not stand in any more (None: it stays). `reads` says
    which nodes it reads, from which stage on. `before` and `after` are what it costs in the captured and in the last
    graph; None where it does not stand there, or nothing was measured.
    """

    id: int
    name: str
    graph: str
    operation: str
    spelled: str
    arguments: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    source: Source | None
    module: str
    made: int
    removed: int | None
    made_by: Origin | None
    removed_by: Origin | None
    reads: tuple[tuple[int, tuple[int, ...]], ...]
    before: Cost | None
    after: Cost | None
    results: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def values(self) -> tuple[str, ...]:
        """Each result in words: `bfloat16[2, 33, 64]`. None where there is no tensor."""
        results = ((self.dtype, self.shape),) if self.dtype else self.results
        return tuple(f"{dtype}[{', '.join(map(str, shape))}]" for dtype, shape in results)

    @property
    def value(self) -> str:
        return ", ".join(self.values)

    def reads_at(self, stage: int) -> tuple[int, ...]:
        """The nodes that this one reads at a stage."""
        return next((nodes for since, nodes in reversed(self.reads) if since <= stage), ())

    def stands_at(self, stage: int) -> bool:
        return self.made <= stage and (self.removed is None or stage < self.removed)


@dataclass(frozen=True)
class Proof:
    """What the proof of a rewrite measured: the original's and the replacement's largest errors against float64."""

    original_error: float
    replacement_error: float
    num_inputs: int


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that landed.

    `source` is a line in words, `file.py:line: code`. `removed` and `added` are nodes; a node that was changed in place
    is in both.
    """

    id: int
    stage: int
    step: str
    rule: str
    op: str
    source: str
    module: str
    removed: tuple[int, ...]
    added: tuple[int, ...]
    proof: Proof | None


@dataclass(frozen=True)
class Hunk:
    """Nodes of the captured graph that went, and those of the last graph that came in their place.

    Rewrites that build on each other, such as a norm and the sum before it, are one hunk. `steps` are the passes that
    took part. `like` is the first hunk that is equal but for the layer, and the hunk's own index if it is the first.
    """

    index: int
    like: int
    rewrites: tuple[int, ...]
    steps: tuple[str, ...]
    removed: tuple[int, ...]
    added: tuple[int, ...]
    source: Source | None
    module: str
    before: Cost | None
    after: Cost | None


@dataclass(frozen=True)
class Miss:
    """A place that was left alone: a near miss of a rule, or a match that its proof refused."""

    rule: str
    step: str
    node: int | None
    source: str
    module: str
    reason: str
    refused: bool


@dataclass(frozen=True)
class Block:
    """The nodes of one layer, or of one module outside the layers; of all stages, in order.

    `like` is the first block that is equal to this one but for its place, and the block's own index if it is the first.
    """

    index: int
    like: int
    path: str
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """A graph as it was captured, or after a pass. `cost` and the peak are None where nothing was measured."""

    name: str
    num_nodes: int
    num_rewrites: int
    elapsed_ms: float
    cost: Cost | None
    peak_bytes: int | None
    peak_at: str


@dataclass(frozen=True)
class Graph:
    """One captured graph through all stages.

    `call` says in words what call it was captured for, and `runs` how often that call runs it: a piece of code that a
    graph break cut out of a layer runs once in each; costs are those of one run. `kind` numbers the calls that are
    captured one by one, `frame` the pieces of code. `before` and `after` are the nodes of the first and the last stage,
    in order. `aligned` pairs nodes of the two:
    "same", "rewritten" (the results of a rewrite with what computes them now) or "equal" (in
    structure to a node that went). `not_measured` says why costs are missing, or ''.
    """

    call: str
    runs: int
    kind: int
    frame: int
    stages: tuple[Stage, ...]
    nodes: tuple[Node, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    aligned: tuple[tuple[int, int, str], ...]
    rewrites: tuple[Rewrite, ...]
    hunks: tuple[Hunk, ...]
    blocks: tuple[Block, ...]
    misses: tuple[Miss, ...]
    not_measured: str

    def folded_hunks(self) -> list[list[Hunk]]:
        """Hunks that are equal but for the layer, together, in the order of the first of each."""
        return _folded(self.hunks)

    def folded_blocks(self) -> list[list[Block]]:
        """Layers that are equal, together, in the order of the first of each."""
        return _folded(self.blocks)


def _folded(items: tuple[Any, ...]) -> list[list[Any]]:
    groups: dict[int, list[Any]] = {}
    for item in items:
        groups.setdefault(item.like, []).append(item)
    return list(groups.values())


def call_in_words(training: bool, checkpointing: bool, batch_size: int | None, sequence_length: int | None) -> str:
    """ "training with activation checkpointing, 2 × 2048 tokens"."""
    call = "training" if training else "evaluation"
    sizes = f"{batch_size} × {sequence_length} tokens" if batch_size is not None else "no tokens"
    return f"{call}{' with activation checkpointing' * checkpointing}, {sizes}"


@dataclass(frozen=True)
class Conditions:
    """What was inspected: the sizes of the call, the mode, and the versions that made the graphs."""

    batch_size: int | None
    sequence_length: int | None
    training: bool
    checkpointing: bool
    num_parameters: int
    parameter_bytes: int
    versions: dict[str, str]


# What `GraphDiff.metrics` has only where the graphs could be measured; peak_bytes only of a single graph.
COSTS = ("casts", "launches", "bytes_moved", "flops", "saved_bytes", "peak_bytes")


@dataclass(frozen=True)
class GraphDiff:
    """What the passes did to each graph of a model, from `fxopt.inspect`.

    Print it for a terminal; `save` writes a page, JSON, text, GraphML or Model Explorer's JSON. `graph_breaks` and
    `fallbacks` count their reasons, as in `fxopt.report`.
    """

    model: str
    policy: str
    conditions: Conditions
    graphs: tuple[Graph, ...]
    graph_breaks: dict[str, int]
    fallbacks: dict[str, int]

    @property
    def hits(self) -> dict[str, int]:
        """Op name → number of rewrites."""
        return dict(Counter(rewrite.op for graph in self.graphs for rewrite in graph.rewrites))

    @property
    def metrics(self) -> dict[str, float]:
        """Every number that a comparison or a condition can be about, by name; over all graphs, after the passes.

        Costs are those of all runs of all graphs, of all calls; nodes and rewrites are counted once.
        """
        last = [graph.stages[-1] for graph in self.graphs]
        misses = [miss for graph in self.graphs for miss in graph.misses]
        found: dict[str, float] = {
            "graphs": len(self.graphs),
            "graph_breaks": sum(self.graph_breaks.values()),
            "fallbacks": sum(self.fallbacks.values()),
            "nodes": sum(stage.num_nodes for stage in last),
            "fusions": sum(self.hits.values()),
            "near_misses": sum(not miss.refused for miss in misses),
            "refused": sum(miss.refused for miss in misses),
            **self.hits,
        }
        if last and all(stage.cost is not None for stage in last):
            cost = sum((graph.stages[-1].cost * graph.runs for graph in self.graphs if graph.stages[-1].cost), Cost())
            found |= {
                "casts": cost.casts,
                "launches": cost.launches + cost.backward_launches,
                "bytes_moved": cost.bytes_moved + cost.backward_bytes_moved,
                "flops": cost.flops + cost.backward_flops,
                "saved_bytes": cost.saved_bytes,
            }
            if [graph.runs for graph in self.graphs] == [1]:  # each is measured by itself: all together hold more
                found["peak_bytes"] = last[0].peak_bytes or 0
        return found

    def to_dict(self) -> dict[str, Any]:
        """The diff as plain data, as the JSON file has it: see `fxopt.inspection.render_json`."""
        from fxopt.inspection.render_json import to_dict

        return to_dict(self)

    def save(self, path: str | Path) -> Path:
        """Write the diff to `path`, as its ending says, and return the path.

        .html: a page that opens from disk. .json: everything, as documented in `fxopt.inspection.render_json`.
        .txt: what printing shows. .graphml: the graphs for networkx, Gephi, yEd. .model-explorer.json: for Google's
        Model Explorer. Raises ValueError for another ending.
        """
        path = Path(path)
        render = next((render for ending, render in _renderers().items() if path.name.endswith(ending)), None)
        if render is None:
            raise ValueError(f"cannot save a graph diff as {path.name!r}; use one of {', '.join(_renderers())}")
        return write_text(path, render(self))

    def __rich__(self) -> Any:
        from fxopt.inspection.render_text import rendered

        return rendered(self)

    def __str__(self) -> str:
        from fxopt.inspection.render_text import as_text

        return as_text(self)


def _renderers() -> dict[str, Callable[[GraphDiff], str]]:
    """By the ending of a file's name; the longer one first."""
    from fxopt.inspection.render_graphml import as_graphml
    from fxopt.inspection.render_html import as_html
    from fxopt.inspection.render_json import as_json
    from fxopt.inspection.render_model_explorer import as_model_explorer
    from fxopt.inspection.render_text import as_text

    return {
        ".model-explorer.json": as_model_explorer,
        ".json": as_json,
        ".html": as_html,
        ".txt": as_text,
        ".graphml": as_graphml,
    }
