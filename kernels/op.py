"""How a kernel becomes an op: `torch.ops.fxopt.<name>` for tracers and a direct call for training.

    @op("rms_norm")
    def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...      # any device

    @_rms_norm.register_kernel(TRITON_DEVICES)
    def _rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...

    @_rms_norm.register_fake
    def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...              # shapes and dtypes only

    _rms_norm.register_autograd(_backward, setup_context=_setup_context)

These are the methods of `torch.library.custom_op`, which makes the op that Dynamo, Inductor, fake tensors, dispatch
modes and tensor subclasses see. Each of its calls goes through the dispatcher and several wrappers, forward and
backward: more time than the kernels of a small model take. `Op.__call__` therefore calls the kernel itself, within an
ordinary autograd function, whenever nobody is looking on: the same kernel, the same formula for the gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

OPS: dict[str, "Op"] = {}
_PLAIN = (Tensor, Parameter)


class Op:
    """An op of the namespace `fxopt`, and its kernels; made by `op`."""

    def __init__(self, name: str, kernel: Callable[..., Any], **options: Any):
        self.definition = torch.library.custom_op(f"fxopt::{name}", kernel, mutates_args=(), **options)
        self.overload = getattr(torch.ops.fxopt, name).default
        self._name, self._kernel = name, kernel
        self.fake: Callable[..., Any] | None = None
        self.kernels: dict[str, Callable[..., Any]] = {}  # for a type of device that has its own
        self._formula: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._functions: dict[str, Any] = {}
        OPS[name] = self

    def register_kernel(self, device_types: str | Sequence[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator: the function computes the op on these types of device ("cuda")."""

        def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
            self.definition.register_kernel(device_types, kernel)
            for device_type in (device_types,) if isinstance(device_types, str) else device_types:
                self.kernels[device_type] = kernel
                self._functions.pop(device_type, None)
            return kernel

        return register

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator: the function makes results of the right shapes and dtypes, from tensors that hold no data."""
        self.fake = fake
        return self.definition.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """The gradient, as `torch.library.register_autograd` takes it."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        self._formula = backward, setup_context

    def __call__(self, *args: Any) -> Any:
        """The result of the op for all its arguments, in order; differentiable where it has a gradient registered."""
        if torch.compiler.is_compiling() or _is_watched():
            return self.overload(*args)
        device_type, differentiate = None, False
        for arg in args:
            if isinstance(arg, Tensor):
                if type(arg) not in _PLAIN:
                    return self.overload(*args)
                device_type = device_type or arg.device.type
                differentiate = differentiate or arg.requires_grad
        if device_type is None or device_type == "meta":
            return self.overload(*args)
        if not (differentiate and torch.is_grad_enabled()):
            return self._kernel_for(device_type)(*args)
        if self._formula is None:
            return self.overload(*args)  # says so, where it is differentiated
        function = self._functions.get(device_type)
        if function is None:
            function = self._functions[device_type] = self._make_function(device_type)
        return function.apply(*args)

    def _kernel_for(self, device_type: str) -> Callable[..., Any]:
        return self.kernels.get(device_type, self._kernel)

    def _make_function(self, device_type: str) -> Any:
        """The autograd function that calls the kernel of one type of device."""
        assert self._formula is not None
        kernel, (backward, setup_context) = self._kernel_for(device_type), self._formula

        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():  # spares each of the kernel's own calls a look at autograd
                result = kernel(*args)
            setup_context(ctx, args, result)
            return result

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"fxopt::{self._name}", (torch.autograd.Function,), methods)


def op(name: str, **options: Any) -> Callable[[Callable[..., Any]], Op]:
    """A decorator that makes `torch.ops.fxopt.<name>` of a kernel; options as for `torch.library.custom_op`."""
    return lambda kernel: Op(name, kernel, **options)


def cheap_result(index: int | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function's result, or that one of several, may be computed again in the backward pass.

    Its autograd node says how, as `recompute` and `recomputed_output` (`fxopt/rematerialize.py`).
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.cheap_result = index  # type: ignore[attr-defined]
        return function

    return mark


def _is_watched() -> bool:
    """Whether a dispatch mode or a functorch transform would have to see the op."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
