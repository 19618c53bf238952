"""Gradients of several backward passes, summed without a loss: each addition in float32, two more bytes a parameter.

Autograd adds a micro-batch's gradient to bfloat16 `.grad` and rounds, each time; after 128 additions the sum is wrong
by 1.2 %. Here what rounding cuts off is kept in a second bfloat16, the residual, and goes into the next addition, as in
Kahan's sum ("Further remarks on reducing truncation errors", 1965), but in float32, so that nothing else is lost:

    wide = grad + residual + gradient;  grad = bfloat16(wide);  residual = bfloat16(wide − grad)

`.grad` is bfloat16 all the while, and after each pass the whole sum, rounded once: what clipping, a scaler, or
DistributedDataParallel's buckets expect. A residual is an attribute of its gradient, and goes when that goes.

Shapes: gradient, grad, residual (...) alike. Dtypes: bfloat16; sums float32.
Bytes moved: 10 per element and addition (grad and residual both ways, the gradient), and 4 for autograd's own.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fxopt.precision.parameter_storage import is_wrapper

# Elements that pass through float32 at a time: on a CPU as many as its cache holds, on a GPU as make launches cheap.
_CPU_CHUNK_NUMEL = 1 << 18
_GPU_CHUNK_NUMEL = 1 << 22

_NOTE = "_fxopt_residual"


@dataclass(frozen=True)
class _Residual:
    """What `.grad` lacks of the sum: bfloat16, flat; and the version of `.grad` that it belongs to."""

    values: Tensor
    version: int


class AccumulatedGradients:
    """Sums the gradients of bfloat16 parameters. Belongs to an optimizer, which attaches it; until there is one of
    fxopt's, to the optimized model.

    Nothing is held, and nothing but a look at `.grad` is done, where a step has one backward pass. Copied or pickled
    with its optimizer, it is attached to the parameters anew. What FSDP2 shards, FSDP2 sums: in its `reduce_dtype`.
    """

    def __init__(self) -> None:
        self.parameters: tuple[Tensor, ...] = ()
        self.step = 0

    def attach(self, parameters: Sequence[Tensor]) -> None:
        """Hooks the parameters that are trained and have no hook of this object; those of an earlier one go."""
        self.parameters = tuple(parameters)
        for number, parameter in enumerate(parameters):
            self._attach(number, parameter)

    def attach_unclaimed(self, parameters: Iterable[Tensor]) -> None:
        """Hooks those bfloat16 parameters whose gradients nobody sums yet.

        Without an optimizer that says when a sum begins, it begins where `.grad` is None or was changed.
        """
        for parameter in parameters:
            hooks: Any = parameter._backward_hooks or {}
            claimed = any(isinstance(hook, _Hook) and hook.owner() is not None for hook in hooks.values())
            if parameter.dtype == torch.bfloat16 and parameter.is_leaf and not claimed:
                self.parameters += (parameter,)
                self._attach(len(self.parameters) - 1, parameter)

    def start_over(self) -> None:
        """The next gradient of each parameter begins a new sum.

        Frozen ones may be trained by now, int8 ones lose hooks where they are moved, another optimizer took them.
        """
        self.step += 1
        self.attach(self.parameters)

    def _attach(self, number: int, parameter: Tensor) -> None:
        hooks: Any = parameter._backward_hooks
        ours = {key: hook for key, hook in (hooks or {}).items() if isinstance(hook, _Hook)}
        for key, hook in ours.items():
            if hook.owner() is self and parameter.requires_grad:
                hook.number = number
                parameter._backward_hooks = hooks  # one that was moved has its dict still, but no longer calls it
                return
            del hooks[key]
        # Whatever the dtype is now: a policy may be applied later.
        if parameter.requires_grad and not hasattr(parameter, "to_local"):
            parameter.register_hook(_Hook(weakref.ref(self), number))

    def __getstate__(self) -> dict[str, Any]:
        return {"parameters": (), "step": 0}


class _Hook:
    """Called with a parameter's gradient before autograd adds it. It keeps neither the parameter nor the optimizer.

    (A parameter that its own hook referred to would be freed only by the next collection of garbage.)
    """

    __torch_unserializable__ = True  # torch would warn where an int8 parameter is pickled
    __slots__ = ("number", "owner", "step")

    def __init__(self, owner: "weakref.ref[AccumulatedGradients]", number: int) -> None:
        self.owner, self.number, self.step = owner, number, -1

    def __call__(self, gradient: Tensor) -> Tensor | None:
        owner = self.owner()
        if owner is None:
            return None
        parameter = owner.parameters[self.number]
        grad = parameter.grad
        if grad is None:
            self.step = owner.step
            return None
        if self.step != owner.step:  # the first of the sum, to be added to zeros
            self.step = owner.step
            grad.__dict__.pop(_NOTE, None)
            return None
        if not _can_be_summed(grad, gradient) or not _will_be_added(parameter):
            return None
        return _add(grad, gradient)


def residual_of(gradient: Tensor) -> Tensor | None:
    """What is kept beside an accumulated gradient: bfloat16, as many elements; None where nothing is."""
    kept = gradient.__dict__.get(_NOTE)
    return kept.values if kept is not None else None


def _can_be_summed(grad: Tensor, gradient: Tensor) -> bool:
    """Whether both are plain bfloat16. With `create_graph=True` autograd must see the addition itself."""
    return (
        grad.dtype == gradient.dtype == torch.bfloat16
        and grad.layout == gradient.layout == torch.strided
        and grad.shape == gradient.shape
        and grad.is_contiguous()
        and not torch.is_grad_enabled()
        and not is_wrapper(grad)
    )


def _will_be_added(parameter: Tensor) -> bool:
    """Whether this backward pass adds to `.grad`. `torch.autograd.grad` calls the hooks as well, and does not."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # how it says that this is torch.autograd.grad
        return False


def _add(grad: Tensor, gradient: Tensor) -> Tensor:
    """Adds to `grad` and its residual. Returns what is left for autograd to add: zeros."""
    kept = grad.__dict__.get(_NOTE)
    # A gradient that was changed since (clipped, zeroed, averaged over the ranks) is what it shows.
    residual = kept.values if kept is not None and kept.version == grad._version else None
    rest = torch.empty(grad.numel(), dtype=grad.dtype, device=grad.device) if residual is None else residual
    total, increment = grad.view(-1), gradient.reshape(-1)
    chunk = _CPU_CHUNK_NUMEL if grad.device.type == "cpu" else _GPU_CHUNK_NUMEL
    for start in range(0, total.numel(), chunk):
        part = slice(start, start + chunk)
        wide = total[part].float()
        wide.add_(increment[part])
        if residual is not None:
            wide.add_(residual[part])
        total[part].copy_(wide)
        rest[part].copy_(wide.sub_(total[part]))
    setattr(grad, _NOTE, _Residual(rest, grad._version + 1))  # autograd's own addition makes one more version
    return grad.new_zeros(()).expand_as(grad)
