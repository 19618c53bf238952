"""A model's computation in float64 throughout, whatever dtypes its code names: the truth that errors are measured by.

`model.double()` is not enough. Modelling code says `.float()` in its norms, its router and its loss, and those parts
would round to float32: such a result cannot tell which of two float32 results is the better one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
NARROWING_METHODS = {Tensor.float, Tensor.half, Tensor.bfloat16}


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy of `model`, all parameters and buffers in float64."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # a state kept from another call, which cannot be copied
    return copy.deepcopy(model, memo).double()


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Where code asks for a narrower floating or complex dtype, it gets float64 or complex128."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(default)


def float64_backward(loss: Tensor) -> None:
    """`loss.backward()` that stays within `float64_throughout`, so that checkpoints compute again in float64, too.

    The method, `torch.autograd.backward` and `torch.autograd.grad` leave the mode before they start PyTorch's engine.
    """
    one = torch.ones_like(loss)
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Widening(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in NARROWING_METHODS:
            return args[0].double()
        args = tuple(_wide(value) for value in args)
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        if function in GROUPED_PRODUCTS:
            return _grouped_product(*args, **kwargs)
        return function(*args, **kwargs)


def _wide(value: Any) -> Any:
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value


# What mixture-of-experts layers call; PyTorch has no float64 for it.
GROUPED_PRODUCTS: set[Callable[..., Any]] = {
    getattr(module, name)
    for module, name in ((torch.nn.functional, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(module, name)
}


def _grouped_product(x: Tensor, weight: Tensor, offs: Tensor, **options: Any) -> Tensor:
    """(N, D), (E, D, F), (E,) -> (N, F): each group of rows, up to its offset, by the matrix of its own."""
    ends = offs.tolist()
    groups = [x[start:end] @ w for start, end, w in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat([*groups, x.new_zeros(x.shape[0] - ends[-1], weight.shape[-1])])
