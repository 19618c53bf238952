"""What a graph costs, found by running it on fake tensors, forward and backward: no data, no memory, no GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fxopt.inspection.meter import Measurement, Meter
from fxopt.inspection.repetition import Key, Shortened, shorten
from fxopt.rematerialize import rematerializing, users_of_cheap_results
from fxopt.rewrite.graph import SELECTIVE, as_captured, named_graph_modules, value_of


def measure(module: fx.GraphModule) -> Measurement:
    """Run `module` on fake tensors of the sizes that it was captured with. Raises what its operations raise there.

    Of many layers that are alike, four are run, and the others taken to cost what those in the middle do.
    """
    short = shorten(module)
    if short is not None:
        meter_of_layers = _MeterOfLayers(short)
        _run(module, meter_of_layers, short.graph)
        if meter_of_layers.are_alike:
            return meter_of_layers.of_all_layers()
    meter = Meter()
    _run(module, meter)
    return meter.result()


def _run(module: fx.GraphModule, meter: Meter, graph: fx.Graph | None = None) -> None:
    """Run `module`, or a graph that is shorter than its own, forward and backward under the eyes of `meter`."""
    grad_enabled = torch.is_grad_enabled()
    paths = {inner: path for path, inner in named_graph_modules(module)}
    # A static size needs no symbols; PyTorch's own fake mode, with symbols in it, stays out of this.
    with unset_fake_temporarily(), FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(False):
        inputs = [_concrete(value_of(node)) for node in (graph or module.graph).find_nodes(op="placeholder")]
        for value in inputs:
            meter.ignore(value)
        graphs = [graph or module.graph, *(inner.graph for inner in paths if inner is not module)]
        again = frozenset[fx.Node]().union(*map(users_of_cheap_results, graphs))
        with torch.set_grad_enabled(grad_enabled), meter:
            results = Interpreter(module, paths, meter, graph, again).run(*inputs)
            losses = _losses(results)
            del results
            meter.end_forward()
            if losses:
                torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])


def _concrete(value: Any) -> Any:
    """A fake tensor, or a number, of the size that was captured."""
    if not isinstance(value, torch.Tensor):
        return as_captured(value)
    sizes, strides = (torch.Size(map(as_captured, numbers)) for numbers in (value.shape, value.stride()))
    if is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        inner = {name: _concrete(getattr(value, name)) for name in names}
        tensor = type(value).__tensor_unflatten__(inner, context, sizes, strides)
    else:
        tensor = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if value.requires_grad:
        tensor.requires_grad_().register_post_accumulate_grad_hook(_release_gradient)
    return tensor


def _release_gradient(leaf: torch.Tensor) -> None:
    leaf.grad = None


def _losses(results: Any) -> list[torch.Tensor]:
    """What backward starts from: the loss, or, in a graph that does not compute it, everything."""
    found = [value for value in tree_leaves(results) if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    return [value for value in found if value.ndim == 0] or found


class Interpreter(fx.Interpreter):
    """Runs a graph and the graphs inside it, and tells the meter which node runs.

    `graph` is run in the place of the module's own; `rematerializing` are the calls to run within `rematerializing`,
    where the module is not yet rematerialized.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        paths: dict[fx.GraphModule, str],
        meter: Meter,
        graph: fx.Graph | None = None,
        rematerializing: frozenset[fx.Node] = frozenset(),
    ):
        super().__init__(module, graph=graph)
        self.paths, self.meter, self.path = paths, meter, paths[module]
        self.rematerializing = rematerializing

    def run_node(self, n: fx.Node) -> Any:
        around = self.meter.node
        self.meter.enter((self.path, n.name))
        with rematerializing() if n in self.rematerializing else nullcontext():
            result = super().run_node(n)
        if n.op == "get_attr":
            self.meter.ignore(result)
        elif n.op.startswith("call"):
            self.meter.claim(result)
        self.meter.node = around
        return result if n.users or n.op == "output" else None  # what nobody reads is not kept

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *operands = args
            context = {"context_fn": body.meta[SELECTIVE]} if SELECTIVE in body.meta else {}
            return checkpoint(self._runner(body), *operands, use_reentrant=False, preserve_rng_state=False, **context)
        if target is torch.ops.higher_order.invoke_subgraph:
            body, _, *operands = args
            return self._runner(body)(*operands)
        return super().call_function(target, args, kwargs)

    def _runner(self, body: fx.GraphModule) -> Callable[..., Any]:
        # A new interpreter each time, and none that is held on to: each keeps some values of its last run.
        paths, meter, again = self.paths, self.meter, self.rematerializing
        return lambda *operands: Interpreter(body, paths, meter, rematerializing=again).run(*operands)


class _MeterOfLayers(Meter):
    """Measures a shortened graph as if the layers that were left out ran too.

    What each of them would keep for backward is counted as alive from where they would have run to where their backward
    would have: while they do run, less is alive than in the last layer.
    """

    def __init__(self, short: Shortened):
        super().__init__()
        self.short = short
        # The layers on both sides of those that were left out, by their calls.
        self._beside = {
            **dict.fromkeys(short.following_like, short.following),
            **dict.fromkeys(short.following_like.values(), short.second),
        }
        self._alive_before: dict[Key, int] = {}  # bytes, as a layer starts
        self._alive_before_backward: dict[Key, int] = {}
        self._kept = 0  # bytes that the layers that were left out keep

    def enter(self, node: Key) -> None:
        super().enter(node)
        if self.where.in_backward:
            layer = self._beside.get(node)
            if layer is not None and layer not in self._alive_before_backward:
                self._alive_before_backward[layer] = self.memory.activations - self._kept
                if layer == self.short.second:
                    self.memory.hold(-self._kept, self.where)
                    self._kept = 0
        elif node in (self.short.second, self.short.following):
            self._alive_before[node] = self.memory.activations - self._kept
            if node == self.short.following:
                kept_by_each = self._alive_before[node] - self._alive_before[self.short.second]
                self._kept = self.short.num_left_out * kept_by_each
                self.memory.hold(self._kept, self.where)

    @property
    def are_alike(self) -> bool:
        """Whether the layers on both sides of those that were left out cost the same, and keep and free the same."""
        short, costs = self.short, self.measurement.costs
        before, after = self._alive_before, self._alive_before_backward
        kept = before[short.following] - before[short.second]
        freed = after.get(short.following, 0) - after.get(short.second, 0)
        return (kept == freed or not after) and all(
            costs.get(node) == costs.get(like) for node, like in short.following_like.items()
        )

    def of_all_layers(self) -> Measurement:
        """What was measured, for the layers that were left out too."""
        measurement = self.result()
        for node, like in self.short.like.items():
            if like in measurement.costs:
                measurement.costs[node] = measurement.costs[like]
        return measurement
