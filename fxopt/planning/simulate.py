"""A training step on fake tensors: the very code that trains, forward and backward, without memory and without time.

The model, its policy, its captured and rewritten graphs, the activations that autograd keeps, the gradients and the
optimizer's states are those of a real run. Storages are followed as they are made and freed. What is not seen: memory
inside operators (of fxopt's, the loss's workspace is counted by its own formula), the allocator's rounding and
fragmentation, the libraries' and the device's own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from transformers import PretrainedConfig

from fxopt.capture import OptimizedForward, Settings
from fxopt.inspection.fake_models import checkpoint_activations, fake_model, labelled_batch
from fxopt.inspection.live_memory import Peak
from fxopt.inspection.measure import Interpreter
from fxopt.inspection.meter import Meter, Where
from fxopt.precision.annotate import policy_of
from fxopt.precision.footprint import footprint
from fxopt.precision.optimizer import optimizer
from fxopt.precision.policy import Policy
from fxopt.rewrite.graph import module_path, named_graph_modules, source_line


@dataclass(frozen=True)
class Moment:
    """Bytes at the moment of a step that takes most, beside weights and optimizer states, and what runs then."""

    activations: int
    gradients: int
    workspace: int
    place: str


@dataclass(frozen=True)
class Step:
    """What one training step takes, in bytes: `kept` where gradients are, `released` where backward uses them up."""

    weights: int  # buffers included
    gradients: int
    kept: Moment
    released: Moment
    at_update: Moment  # the most that is there when a gradient is complete, that gradient included
    largest_gradient: int
    residuals: int  # what is kept beside gradients that are summed over several backward passes
    summed: Moment | None = None  # of a backward pass that finds the gradients of another; these left out


class Simulation:
    """A configuration's model, or the like of a model, under a policy, on fake tensors.

    Its graphs are captured once, by the first step. `num_shards` is over how many devices gradients are sharded: it
    decides which moment takes most; the bytes are of the whole.

    Raises what `fxopt.annotate` raises, and ValueError for checkpointing that the model does not have.
    """

    def __init__(
        self,
        source: PretrainedConfig | nn.Module,
        policy: str | Policy,
        checkpointing: bool = False,
        num_shards: int = 1,
    ):
        self.model, self._mode = fake_model(source, policy)
        self.policy = cast(Policy, policy_of(self.model))
        self.model.train()
        if checkpointing:
            checkpoint_activations(self.model)
        self.forward = OptimizedForward(self.model, Settings(self.policy.name, prove=False))
        self.forward.runner = self._metered
        self._meter: Meter | None = None
        self._num_shards = num_shards
        self._at_update = Peak()
        self._steps: dict[tuple[int, int, bool], Step] = {}
        self._nodes: dict[tuple[str, str], fx.Node] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def step(self, batch_size: int, sequence_length: int, accumulates: bool = False) -> Step:
        """A step of `batch_size` rows of `sequence_length` tokens, each with a label. Raises what the model raises.

        accumulates: whether it has more such batches; `summed` is then the second.
        """
        shape = batch_size, sequence_length, accumulates
        if shape not in self._steps:
            self._steps[shape] = self._step(*shape)
        return self._steps[shape]

    def _step(self, batch_size: int, sequence_length: int, accumulates: bool) -> Step:
        with self._mode:
            call = labelled_batch(batch_size, sequence_length)
            self.forward.capture(dict(call))  # graphs that are new run once beside: compiling makes tensors too
            memory = self._run(call).memory
            at_update = self._at_update
            summed = self._moment(self._run(call).memory.peak) if accumulates else None
        held, parameters = footprint(self.model), list(self.model.parameters())
        step = Step(
            held.weights + sum(buffer.untyped_storage().nbytes() for buffer in self.model.buffers()),
            held.gradients,
            self._moment(memory.peak),
            self._moment(memory.peak_when_released),
            self._moment(at_update),
            max((p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None), default=0),
            sum(p.grad.nbytes for p in parameters if p.grad is not None and p.grad.dtype == torch.bfloat16),
            summed,
        )
        self.model.zero_grad()
        return step

    def _run(self, call: dict[str, torch.Tensor]) -> Meter:
        """Forward and backward under a meter, onto what gradients there are."""
        self._meter = meter = Meter(self._num_shards)
        self._at_update = Peak()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        for tensor in (*self.model.parameters(), *self.model.buffers(), *call.values(), *gradients):
            meter.ignore(tensor)
        try:
            loss = self.forward.capture(dict(call)).loss
            meter.end_forward()
            with meter:
                loss.backward()
        finally:
            self._meter = None
        return meter

    def _moment(self, peak: Peak) -> Moment:
        of = peak.bytes_of
        return Moment(of.get("activations", 0), of.get("gradients", 0), of.get("workspace", 0), self._place(peak.at))

    def _place(self, where: Where | None) -> str:
        """Where a node is in the model, in words."""
        node = self._nodes.get(where.node) if where is not None else None
        if where is None or node is None:
            return "outside of the graphs"
        module, source = module_path(node), source_line(node).partition(": ")[0]
        of = "backward" if where.in_backward else "forward"
        return f"{of} of {module or node.name}" + (f" ({source})" if source else "")

    def _note_gradient(self, parameter: torch.Tensor) -> None:
        if self._meter is not None and parameter.grad is not None:
            memory = self._meter.memory
            if (live := memory.activations) > self._at_update.total:
                self._at_update = Peak({"activations": live}, self._meter.where)
            memory.mark_as_gradient(parameter.grad)

    def _metered(self, module: fx.GraphModule) -> Callable[..., Any]:
        """How a captured graph is run: where there is a meter, node by node under its eyes."""
        number = len(self.forward.report.graphs)
        paths = {inner: f"{number} {path}" for path, inner in named_graph_modules(module)}
        self._nodes |= {(paths[inner], node.name): node for inner in paths for node in inner.graph.nodes}

        def run(*inputs: Any) -> Any:
            if self._meter is None:
                return module.forward(*inputs)
            with self._meter:  # not around the whole forward: Dynamo leaves its graphs alone inside such a mode
                self._meter.follow(inputs)
                return Interpreter(module, paths, self._meter).run(*inputs)

        return run


def optimizer_bytes(source: PretrainedConfig | nn.Module, policy: str | Policy) -> int:
    """What the states of `fxopt.optimizer` take under `policy`."""
    model, mode = fake_model(source, policy)
    with mode:
        states = optimizer(model)
        states.add_states()
    return footprint(model, states).optimizer


def graph_key(policy: Policy) -> Hashable:
    """What of a policy a step's graphs, weights and gradients depend on: all but rounding and optimizer states."""
    parts = [(selector.where, selector.overrides) for selector in policy.selectors]
    parts.append(("", vars(policy.default)))
    chosen = ((where, tuple((name, of[name]) for name in _OF_THE_GRAPH if name in of)) for where, of in parts)
    return tuple((where, values) for where, values in chosen if values)


_OF_THE_GRAPH = ("storage", "compute", "gradient", "cast")
