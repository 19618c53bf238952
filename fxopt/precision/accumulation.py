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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fxopt.precision.parameter_storage import is_wrapper

# Elements that pass through float32 at a time: on a CPU as many as its cache holds, on a GPU as make launches cheap.
_CPU_CHUNK_NUMEL = 1 << 18
_GPU_CHUNK_NUMEL = 1 << 22

# The attribute of a gradient that has its residual: (bfloat16, flat; the version of `.grad` that it belongs to). Plain
# values, so that a gradient that is saved can be loaded without fxopt.
_NOTE = "_fxopt_residual"
LARGEST_RESIDUAL = 2.0**-8  # of the sum: half the distance of bfloat16's numbers, at most


class AccumulatedGradients:
    """Sums the gradients of an optimizer's bfloat16 parameters. Belongs to one optimizer, which attaches it.

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

    def start_over(self) -> None:
        """The next gradient of each parameter begins a new sum.

        Frozen ones may be trained by now, int8 ones lose hooks where they are moved, another optimizer took them.
        """
        self.step += 1
        self.attach(self.parameters)

    def parameter(self, place: Any) -> Tensor | None:
        """The parameter that a hook was made for; None where it is not there any more."""
        return self.parameters[place]

    def _attach(self, place: Any, parameter: Tensor) -> None:
        hooks: Any = parameter._backward_hooks
        for key, hook in list((hooks or {}).items()):
            if not isinstance(hook, _Hook):
                continue
            if hook.owner() is self and parameter.requires_grad:
                hook.place = place
                hooks.move_to_end(key)  # behind those of the user, whose results it is to add
                parameter._backward_hooks = hooks  # one that was moved has its dict still, but no longer calls it
                return
            del hooks[key]
        # Whatever the dtype is now: a policy may be applied later.
        if parameter.requires_grad and not hasattr(parameter, "to_local"):
            parameter.register_hook(_Hook(weakref.ref(self), place))

    def __getstate__(self) -> dict[str, Any]:
        return {"parameters": (), "step": 0}


class UnsteppedGradients(AccumulatedGradients):
    """Those of an optimized model that no optimizer of fxopt's steps so far.

    Nobody says when a sum begins: it begins where `.grad` is None, and what is written to `.grad` is what counts.
    Parameters are found by the modules that have them, so that one that is replaced is not kept.
    """

    def attach_to(self, model: nn.Module) -> None:
        """Hooks the model's trained bfloat16 parameters whose gradients nobody sums yet."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.dtype != torch.bfloat16 or not parameter.is_leaf:
                    continue
                owners = {hook.owner() for hook in (parameter._backward_hooks or {}).values() if type(hook) is _Hook}
                if owners <= {None, self}:
                    self._attach((weakref.ref(module), name), parameter)

    def parameter(self, place: Any) -> Tensor | None:
        module, name = place[0](), place[1]
        return None if module is None else module._parameters.get(name)


class _Hook:
    """Called with a parameter's gradient before autograd adds it. It keeps neither the parameter nor the optimizer.

    (A parameter that its own hook referred to would be freed only by the next collection of garbage, and one with a
    weak reference could not be swapped, as int8 ones are where they are moved.)
    """

    __torch_unserializable__ = True  # torch would warn where an int8 parameter is pickled
    __slots__ = ("owner", "place", "step")

    def __init__(self, owner: "weakref.ref[AccumulatedGradients]", place: Any) -> None:
        self.owner, self.place, self.step = owner, place, -1

    def __call__(self, gradient: Tensor) -> Tensor | None:
        owner = self.owner()
        parameter = owner.parameter(self.place) if owner is not None else None
        hooks: Any = parameter._backward_hooks if parameter is not None else None
        if owner is None or parameter is None or not hooks or next(reversed(hooks.values())) is not self:
            return None  # another's, or there is a hook behind this one, which must see the gradient
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
    return kept[0] if kept is not None else None


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
    residual = kept[0] if kept is not None and kept[1] == grad._version else None
    rest = torch.empty(grad.numel(), dtype=grad.dtype, device=grad.device) if residual is None else residual
    total, increment = grad.view(-1), gradient.reshape(-1)
    chunk = _CPU_CHUNK_NUMEL if grad.device.type == "cpu" else _GPU_CHUNK_NUMEL
    for start in range(0, total.numel(), chunk):
        part = slice(start, start + chunk)
        wide = total[part].float()
        if residual is not None:
            # What was written past autograd's eyes, as by `.grad.data.zero_()`, leaves a residual that is too large.
            of_this = residual[part].abs() <= total[part].abs() * LARGEST_RESIDUAL
            wide.add_(torch.where(of_this, residual[part], 0.0))
        wide.add_(increment[part])
        total[part].copy_(wide)
        rest[part].copy_(wide.sub_(total[part]))
    setattr(grad, _NOTE, (rest, grad._version + 1))  # autograd's own addition makes one more version
    return grad.new_zeros(()).expand_as(grad)
