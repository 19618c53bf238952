"""What a graph costs, found by running it on fake tensors, forward and backward: no data, no memory, no GPU.

Counted are ATen calls as eager PyTorch makes them, one kernel launch each, except views and allocations. An op of
fxopt's is one call; what it allocates and frees inside is not seen. Bytes moved are those of inputs and results.
FLOPs are those of matrix products and attention, by the formulas of `torch.utils.flop_counter`. Saved for backward is
what is still alive when the forward ends, each storage once; the peak is that of everything but inputs, parameters and
their gradients, which are released as soon as they are there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fxopt.kernels.interval_attention  # noqa: F401 — it registers its op
from fxopt.inspection.live_memory import LiveMemory
from fxopt.inspection.repetition import Key, Shortened, shorten
from fxopt.kernels.linear_cross_entropy import workspace_bytes
from fxopt.rematerialize import rematerializing
from fxopt.rewrite.graph import named_graph_modules, value_of

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default

OUTSIDE: Key = ("", "")


class Where(NamedTuple):
    """What runs: a node, or its backward."""

    node: Key
    in_backward: bool


@dataclass
class Cost:
    """What one node, or a whole graph, costs in one training step."""

    launches: int = 0
    backward_launches: int = 0
    casts: int = 0  # conversions of dtype that are run, in both directions
    bytes_moved: int = 0
    backward_bytes_moved: int = 0
    flops: int = 0
    backward_flops: int = 0
    saved_bytes: int = 0  # of storages that the node made, and that are kept for backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(times * number for number in vars(self).values()))


@dataclass
class Measurement:
    """The cost of every node of a graph, the peak of its activations in bytes, and what ran at the peak."""

    costs: dict[Key, Cost] = field(default_factory=lambda: defaultdict(Cost))
    peak_bytes: int = 0
    peak_at: Where | None = None

    @property
    def total(self) -> Cost:
        return sum(self.costs.values(), Cost())


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
        with torch.set_grad_enabled(grad_enabled), meter:
            with rematerializing():
                results = Interpreter(module, paths, meter, graph).run(*inputs)
            losses = _losses(results)
            del results
            meter.end_forward()
            if losses:
                torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])


def _concrete(value: Any) -> Any:
    """A fake tensor, or a number, of the size that was captured."""
    if not isinstance(value, torch.Tensor):
        return _number(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value
    sizes, strides = (torch.Size([_number(n) for n in numbers]) for numbers in (value.shape, value.stride()))
    if is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        inner = {name: _concrete(getattr(value, name)) for name in names}
        tensor = type(value).__tensor_unflatten__(inner, context, sizes, strides)
    else:
        tensor = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if value.requires_grad:
        tensor.requires_grad_().register_post_accumulate_grad_hook(_release_gradient)
    return tensor


def _number(value: Any) -> Any:
    return value if isinstance(value, int) else value.node.hint


def _release_gradient(leaf: torch.Tensor) -> None:
    leaf.grad = None


def _losses(results: Any) -> list[torch.Tensor]:
    """What backward starts from: the loss, or, in a graph that does not compute it, everything."""
    found = [value for value in tree_leaves(results) if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    return [value for value in found if value.ndim == 0] or found


class Interpreter(fx.Interpreter):
    """Runs a graph and the graphs inside it, and tells the meter which node runs."""

    def __init__(
        self, module: fx.GraphModule, paths: dict[fx.GraphModule, str], meter: Meter, graph: fx.Graph | None = None
    ):
        super().__init__(module, graph=graph)
        self.paths, self.meter, self.path = paths, meter, paths[module]

    def run_node(self, n: fx.Node) -> Any:
        around = self.meter.node
        self.meter.enter((self.path, n.name))
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
            context = {"context_fn": body.meta[_SELECTIVE]} if _SELECTIVE in body.meta else {}
            return checkpoint(self._runner(body), *operands, use_reentrant=False, preserve_rng_state=False, **context)
        if target is torch.ops.higher_order.invoke_subgraph:
            body, _, *operands = args
            return self._runner(body)(*operands)
        return super().call_function(target, args, kwargs)

    def _runner(self, body: fx.GraphModule) -> Callable[..., Any]:
        # A new interpreter each time, and none that is held on to: each keeps some values of its last run.
        paths, meter = self.paths, self.meter
        return lambda *operands: Interpreter(body, paths, meter).run(*operands)


_SELECTIVE = "_checkpoint_context_fn"


class Meter(TorchDispatchMode):
    """Counts ATen calls for the node that runs, or whose gradient is computed, and follows what is alive.

    `num_shards`: of `LiveMemory`.
    """

    def __init__(self, num_shards: int = 1) -> None:
        super().__init__()
        self.node = OUTSIDE
        self.measurement = Measurement()
        self.memory = LiveMemory(num_shards)
        self._in_backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # what autograd asks for most
        kwargs = kwargs or {}
        if func is aten.add.Tensor and not kwargs and self._adds_gradients and self._is_from_backward(args[0]):
            # Where several gradients of one value are added, autograd writes over the first; not over fake tensors.
            func = aten.add_.Tensor
        result = func(*args, **kwargs)
        if func.is_view:  # most calls
            return result
        results = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        if not _is_free(func):
            self._count(func, args, kwargs, result, results)
        for value in results:
            self.memory.follow(value, self.where)
        if workspace := _WORKSPACE.get(func.overloadpacket):
            self.memory.note_peak(self.where, workspace(*args, **kwargs))
        return result

    @property
    def _adds_gradients(self) -> bool:
        """Whether backward runs; not the forward that a checkpoint runs again in it, which records what it does."""
        return self._in_backward and not torch.is_grad_enabled()

    def _is_from_backward(self, value: Any) -> bool:
        storage = self.memory.of(value) if isinstance(value, torch.Tensor) else None
        return storage is not None and storage.made_by.in_backward and storage.size_bytes > 0

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, results: list[torch.Tensor]) -> None:
        cost = self.measurement.costs[self.node]
        moved = sum(map(_num_bytes, results))
        if func.overloadpacket in _GATHERING:
            moved *= 2
        else:
            inputs = {id(v): v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)}
            moved += sum(map(_num_bytes, inputs.values()))
        formula = _FLOPS.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        if func is aten._to_copy.default and results[0].dtype != args[0].dtype:
            cost.casts += 1
        if self._in_backward:
            cost.backward_launches += 1
            cost.backward_bytes_moved += moved
            cost.backward_flops += flops
        else:
            cost.launches += 1
            cost.bytes_moved += moved
            cost.flops += flops

    def ignore(self, value: Any) -> None:
        """Do not count a value that was there before."""
        self.follow(value, size_bytes=0)

    def follow(self, value: Any, size_bytes: int | None = None) -> None:
        """Count a value that was made where the meter does not look."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                self.memory.follow(leaf, self.where, size_bytes)

    @property
    def where(self) -> Where:
        """What runs now."""
        return Where(self.node, self._in_backward)

    def claim(self, result: Any) -> None:
        """Count what autograd will do for `result`, back to what other nodes have claimed, for the node that runs."""
        pending: list[Any] = [value.grad_fn for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        while pending:
            function = pending.pop()
            # Noted on the function itself: to hold on to it would keep alive what it saves.
            if function is None or "fxopt" in function.metadata or function.name().endswith("AccumulateGrad"):
                continue
            function.metadata["fxopt"] = True
            function.register_prehook(self._starts(self.node))
            pending += [following for following, _ in function.next_functions]

    def _starts(self, node: Key) -> Callable[[Any], None]:
        return lambda _: self.enter(node)

    def enter(self, node: Key) -> None:
        """From now on it is `node` that runs, or its backward."""
        self.node = node

    def end_forward(self) -> None:
        """From now on it is the backward that runs."""
        self.node, self._in_backward = OUTSIDE, True
        for storage in self.memory:
            if storage.size_bytes:
                self.measurement.costs[storage.made_by.node].saved_bytes += storage.size_bytes

    def result(self) -> Measurement:
        """What was measured, once all has run."""
        measurement, peak = self.measurement, self.memory.peak_when_released
        measurement.costs.pop(OUTSIDE, None)  # the ones that backward starts from
        measurement.peak_bytes, measurement.peak_at = peak.total, peak.at
        return measurement


class _MeterOfLayers(Meter):
    """Measures a shortened graph as if the layers that were left out ran too.

    What each of them would keep for backward is counted as alive from where they would have run to where their backward
    would have: while they do run, less is alive than in the last layer.
    """

    def __init__(self, short: Shortened):
        super().__init__()
        self.short = short
        self._alive_at: dict[Key, int] = {}  # bytes, in forward
        self._kept = 0  # bytes that the layers that were left out keep
        self._second = frozenset(short.following_like.values())

    def enter(self, node: Key) -> None:
        super().enter(node)
        if self._in_backward:
            if self._kept and node in self._second:
                self.memory.hold(-self._kept, self.where)
                self._kept = 0
        elif node in (self.short.second, self.short.following, self.short.last):
            self._alive_at[node] = self.memory.activations - self._kept
            if node == self.short.following:
                self._kept = self.short.num_left_out * self._growth(self.short.second, node)
                self.memory.hold(self._kept, self.where)

    def _growth(self, start: Key, end: Key) -> int:
        return self._alive_at[end] - self._alive_at[start]

    @property
    def are_alike(self) -> bool:
        """Whether the layers before and after those that were left out cost the same."""
        short, costs = self.short, self.measurement.costs
        return self._growth(short.second, short.following) == self._growth(short.following, short.last) and all(
            costs.get(node) == costs.get(like) for node, like in short.following_like.items()
        )

    def of_all_layers(self) -> Measurement:
        """What was measured, for the layers that were left out too."""
        measurement = self.result()
        for node, like in self.short.like.items():
            if like in measurement.costs:
                measurement.costs[node] = measurement.costs[like]
        return measurement


def _is_free(func: Any) -> bool:
    """Whether a call runs no kernel, such as an allocation that is left as it is."""
    return func.overloadpacket in _FREE or func.namespace == "prim"


def _num_bytes(value: torch.Tensor) -> int:
    """The bytes that reading or writing a tensor moves; of an expanded one, those that there are."""
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def _loss_flops(hidden: Any, weight: Any, bias: Any, labels: Any, *rest: Any, out_val: Any = None) -> int:
    """One product for the logits and one for each gradient, which the forward computes too. Every label counts."""
    want_hidden, want_weight = rest[-3:-1] if rest[1] != "none" else (False, False)
    return 2 * hidden.shape[0] * weight.numel() * (1 + want_hidden + want_weight)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, _like(key, query), _like(value, query)))


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, _like(key, query), _like(value, query)))


def _like(shared: torch.Tensor, query: torch.Tensor) -> tuple[int, ...]:
    """The shape of keys or values that several query heads share, as if each had its own."""
    return (shared.shape[0], query.shape[1], *shared.shape[2:])


_FREE = {
    aten.detach, aten.alias, aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
    aten.new_empty_strided, aten.lift_fresh, aten.sym_size, aten.sym_stride, aten.sym_numel,
}  # fmt: skip
_WORKSPACE: dict[Any, Callable[..., int]] = {
    torch.ops.fxopt.linear_cross_entropy: workspace_bytes,
}
_GATHERING = {aten.embedding, aten.index, aten.index_select, aten.gather}  # they read as much as they yield
_FLOPS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    # As if all keys were seen: how many are depends on the mask.
    torch.ops.fxopt.interval_attention: _attention_flops,
    torch.ops.fxopt.interval_attention_backward: _attention_backward_flops,
    torch.ops.fxopt.linear_cross_entropy: _loss_flops,
}
