"""What is counted of a graph that runs, forward and backward.

That is ATen calls as eager PyTorch makes them, one kernel launch each, except views and allocations. An op of
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
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fxopt.kernels.embedding
import fxopt.kernels.interval_attention  # noqa: F401 — they register their ops
from fxopt.inspection.live_memory import LiveMemory
from fxopt.inspection.repetition import Key
from fxopt.kernels import linear_cross_entropy, linear_log_prob

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


def _log_prob_flops(hidden: Any, weight: Any, *args: Any, out_val: Any = None) -> int:
    return int(2 * hidden.shape[0] * weight.numel())


def _log_prob_backward_flops(*args: Any, out_val: Any = None) -> int:
    """One product for the logits, again, and one for each gradient. Every label counts."""
    (hidden, weight), (want_hidden, want_weight) = args[3:5], args[-3:-1]
    return int(2 * hidden.shape[0] * weight.numel() * (1 + want_hidden + want_weight))


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
    torch.ops.fxopt.linear_cross_entropy: linear_cross_entropy.workspace_bytes,
    torch.ops.fxopt.linear_log_prob: linear_log_prob.workspace_bytes,
    torch.ops.fxopt.linear_log_prob_backward: linear_log_prob.backward_workspace_bytes,
}
# They read as much as they yield.
_GATHERING = {aten.embedding, aten.index, aten.index_select, aten.gather, torch.ops.fxopt.embedding}
_FLOPS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    # As if all keys were seen: how many are depends on the mask.
    torch.ops.fxopt.interval_attention: _attention_flops,
    torch.ops.fxopt.interval_attention_backward: _attention_backward_flops,
    torch.ops.fxopt.linear_cross_entropy: _loss_flops,
    torch.ops.fxopt.linear_log_prob: _log_prob_flops,
    torch.ops.fxopt.linear_log_prob_backward: _log_prob_backward_flops,
}
