"""Logits that are computed when somebody reads them.

A fused loss never holds the logits, and most training code never reads them. A captured call therefore returns, where
the logits belong, a `DeferredTensor` of them: what it needs to compute them is the hidden states before the output head
and the nodes from there on. Its place in the autograd graph is that of real logits, above the hidden states.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.deferred_tensor import DeferredTensor
from fxopt.output_head import OutputHead, head_in, nodes_of_head
from fxopt.passes.separate_logits import deferred
from fxopt.rewrite.graph import dtype_of, remove_dead_code, shape_of, value_of


class HeadInputs:
    """What the logits of one call are computed from: the end of the call's graph, and its inputs' values.

    `head` says what that end computes, where it is an output head and little else; None where it is something else.
    """

    def __init__(self, part: _Part, inputs: tuple[Any, ...], on_read: Callable[[], None]):
        self.head, self.is_beside_loss = part.head, part.is_beside_loss
        self._compute, self._on_read = part.compute, on_read
        # Without their history: the gradient goes through the node that holds this, and hooks on the logits see it.
        self.inputs = tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)
        device = next(value for value in inputs if isinstance(value, Tensor)).device.type
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        self._marks = [_mark(value) for value in self._tensors()]
        self.wanted: Sequence[bool] = ()  # which inputs a gradient is wanted of
        self._logits: Tensor | None = None
        self._leaves: list[Tensor] = []

    def logits(self) -> Tensor:
        """The logits, as they would have been computed in the call, above those inputs that want a gradient.

        Raises RuntimeError if an input was written to or freed since.
        """
        if self._logits is None:
            self.check()
            self._on_read()
            with self.as_in_the_call(grad_enabled=any(self.wanted)), _OWN_SAVED_TENSORS:
                inputs = list(self.inputs)
                for index, is_wanted in enumerate(self.wanted):
                    if is_wanted:
                        inputs[index] = self.inputs[index].detach().requires_grad_()
                        self._leaves.append(inputs[index])
                self._logits = self._compute(*inputs)
        return self._logits

    @contextlib.contextmanager
    def as_in_the_call(self, grad_enabled: bool) -> Iterator[None]:
        """The modes of the call. Whoever reads a value may do it below autograd: past autocast, and unrecorded."""
        device, dtype, enabled = self._autocast
        with (
            torch._C._ForceDispatchKeyGuard(*self._keys),
            torch.set_grad_enabled(grad_enabled),
            torch.autocast(device, dtype, enabled),
        ):
            yield

    def computes_in(self, dtype: torch.dtype) -> bool:
        """Whether a matrix product of this dtype was one in the call, too: autocast may have made it another."""
        _, autocast_dtype, enabled = self._autocast
        return not enabled or autocast_dtype == dtype

    def gradients(self, gradient: Tensor) -> Iterator[Tensor | None]:
        """Those of the inputs, from that of the logits."""
        logits = self.logits()
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        found = iter(torch.autograd.grad(logits, self._leaves, gradient, retain_graph=keep, allow_unused=True))
        return (next(found) if is_wanted else None for is_wanted in self.wanted)

    def check(self) -> None:
        """RuntimeError if what the logits are computed from is no longer what it was in the call."""
        for value, (version, samples) in zip(self._tensors(), self._marks, strict=True):
            if any(part.numel() and not part.untyped_storage().nbytes() for part in _parts(value)):
                raise RuntimeError(
                    "the logits of this output were not computed in the forward call, and the output head's weight "
                    "was sharded again since: call fully_shard with reshard_after_forward=False for the module that "
                    "holds the head, or read a value of `outputs.logits` inside its forward"
                )
            same = value._version == version and all(map(torch.equal, _samples(value), samples))
            if not same:
                raise RuntimeError(
                    "the logits of this output were not computed in the forward call, and the parameters have changed "
                    "since; read `outputs.logits` before `optimizer.step()`"
                )

    def _tensors(self) -> Iterator[Tensor]:
        return (value for value in self.inputs if isinstance(value, Tensor) and not value.is_inference())


# Whoever reads a value first may be inside a checkpoint, which counts what is saved: when it runs again, the value is
# there.
_OWN_SAVED_TENSORS = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)


class FactoredGradient(ABC):
    """The `source` of a gradient of deferred logits that knows those of what they are computed from by itself."""

    logits_from: HeadInputs

    @abstractmethod
    def gradients(self, wanted: Sequence[bool]) -> Iterator[Tensor | None]:
        """The gradients of `logits_from.inputs`; None for those that are not wanted."""


NUM_SAMPLES = 4096


def _mark(value: Tensor) -> tuple[int, list[Tensor]]:
    """What tells whether a tensor was written to. Its version does not, where a fused optimizer or `.data` wrote."""
    return value._version, [sample.clone() for sample in _samples(value)]


def _samples(value: Tensor) -> list[Tensor]:
    """Some of a matrix's numbers. An activation, which has more axes, is written to by nobody's optimizer."""
    flat = [part.reshape(-1) for part in _parts(value) if part.ndim <= 2]
    return [part[:: max(1, part.numel() // NUM_SAMPLES)] for part in flat]


def _parts(value: Tensor) -> list[Tensor]:
    """The plain tensors that a quantized one is made of."""
    value = value.detach()
    if not is_traceable_wrapper_subclass(value):
        return [value]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


class _Defer(torch.autograd.Function):
    """Makes the deferred logits of some inputs, and gives their gradient back to these."""

    @staticmethod
    def forward(ctx: Any, source: HeadInputs, like: tuple[Any, ...], *inputs: Any) -> DeferredTensor:
        ctx.source, source.wanted = source, ctx.needs_input_grad[2:]
        ctx.set_materialize_grads(False)
        shape, dtype, device = like
        return DeferredTensor(lambda: source.logits().detach(), shape, dtype, device, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the logits of an optimized call can be differentiated only once, and create_graph=True asks for more: "
                "use fxopt.restore(model) there"
            )
        wanted = ctx.needs_input_grad[2:]
        if gradient is None:
            return None, None, *(None for _ in wanted)
        if (
            isinstance(gradient, DeferredTensor)
            and not gradient.is_computed
            and isinstance(gradient.source, FactoredGradient)
            and gradient.source.logits_from is ctx.source
        ):
            found = gradient.source.gradients(wanted)
        else:
            found = ctx.source.gradients(gradient)
        return None, None, *found


class _Part:
    """The end of a graph that computes deferred logits from `needs`: nodes of the rest, and inputs of the graph.

    `is_beside_loss`: the call returns a loss as well, whose gradient does not pass through these logits.
    """

    def __init__(self, value: fx.Node, inside: Iterable[fx.Node], is_beside_loss: bool):
        self.is_beside_loss = is_beside_loss
        ordered = sorted(inside)
        self.needs = list(dict.fromkeys(n for node in ordered for n in node.all_input_nodes if n not in set(ordered)))
        graph = fx.Graph()
        mapped = {node: graph.placeholder(node.name) for node in self.needs}
        for node in ordered:
            mapped[node] = graph.node_copy(node, mapped.__getitem__)
        graph.output(mapped[value])
        assert value.graph.owning_module is not None
        self.compute: Callable[..., Tensor] = fx.GraphModule(value.graph.owning_module, graph)
        self.head: OutputHead | None = head_in(value, self.needs)
        tensor = value_of(value)
        self._dtype, self._device = tensor.dtype, tensor.device
        self._sizes = [self._size_from(size) for size in tensor.shape]

    def _size_from(self, size: Any) -> int | tuple[int, int]:
        """A static size, or which axis of which of `needs` has the same one."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        for index, node in enumerate(self.needs):
            for axis, other in enumerate(shape_of(node)):
                if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                    return index, axis
        raise NotImplementedError(f"the logits' size {size} is none of the sizes of what they are computed from")

    def deferred(self, inputs: tuple[Any, ...], on_read: Callable[[], None]) -> DeferredTensor:
        sizes = [size if isinstance(size, int) else inputs[size[0]].shape[size[1]] for size in self._sizes]
        source = HeadInputs(self, inputs, on_read)
        made: DeferredTensor = _Defer.apply(source, (sizes, self._dtype, self._device), *inputs)
        return made


def defer_marked_outputs(
    module: fx.GraphModule, on_read: Callable[[], None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Take the nodes that only a `deferred` output needs out of `module`, in place.

    Returns a function that wraps what `module` is compiled to, so that the wrapped callable yields a `DeferredTensor`
    in that output's place, which calls `on_read` when it is computed. Markers of outputs that the graph computes anyway
    are just removed.
    """
    graph = module.graph
    output = next(iter(graph.find_nodes(op="output")))
    results = list(output.args[0])
    markers = list(graph.find_nodes(op="call_function", target=deferred))
    slots = {results.index(marker): marker for marker in markers if marker in results}
    needed_anyway = _ancestors([r for r in results if isinstance(r, fx.Node) and r not in slots.values()])
    late: dict[int, _Part] = {}
    for slot, marker in slots.items():
        value, has_loss = marker.args
        assert isinstance(value, fx.Node)
        results[slot] = value
        if value in needed_anyway or value.op == "placeholder":
            continue
        part = _part_of(value, needed_anyway, bool(has_loss))
        if part is not None:
            late[slot] = part
            results[slot] = None
    placeholders = list(graph.find_nodes(op="placeholder"))
    extra = list(dict.fromkeys(n for part in late.values() for n in part.needs if n.op != "placeholder"))
    output.args = ((*results, *extra),)
    for marker in markers:
        marker.replace_all_uses_with(marker.args[0])
        graph.erase_node(marker)
    remove_dead_code(graph)
    module.recompile()

    def wrap(compiled: Callable[..., Any]) -> Callable[..., Any]:
        if not late:
            return compiled

        def call(*arguments: Any) -> list[Any]:
            values = list(compiled(*arguments))
            known = dict(zip(placeholders, arguments, strict=True))
            known |= dict(zip(extra, values[len(results) :], strict=True))
            del values[len(results) :]
            for slot, part in late.items():
                values[slot] = part.deferred(tuple(known[node] for node in part.needs), on_read)
            return values

        return call

    return wrap


def _part_of(value: fx.Node, needed_anyway: set[fx.Node], has_loss: bool) -> _Part | None:
    """What can wait until `value` is read: all that only it needs, beside a loss; the output head, without one."""
    if has_loss:
        inside = {node for node in _ancestors([value]) if node not in needed_anyway and node.op != "placeholder"}
    else:
        inside = {node for node in nodes_of_head(value) if node not in needed_anyway}
    if value not in inside or dtype_of(value) is None:
        return None
    try:
        part = _Part(value, inside, has_loss)
    except NotImplementedError:
        return None
    # To read logits of a sharded head takes all ranks: they are computed in the call, where all of them are.
    return None if any(hasattr(value_of(node), "to_local") for node in part.needs) else part


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found
