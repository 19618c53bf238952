"""int8 weights: rows of int8 (N, D) with a scale (N,) each, as values: widened, quantized, and written to.

A class of fxopt's own, made from torchao's, which stays as it is. What can be done to a weight is in
`fxopt.precision.int8_operations`, which is loaded with this module: whoever has a weight has its operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight

from fxopt.precision.parameter_storage import FRESH_LARGEST_CODE, LARGEST_CODE, divisor, scale_serves


class Int8Weight(Int8QuantizedTrainingLinearWeight):  # type: ignore[misc]
    """An int8 weight (N, D) that can be read and written as any other (`fxopt.precision.int8_operations`).

    It shows the dtype of its scales (N,): float32, bfloat16, float16 or float64. Its gradient is a plain tensor. It
    trains as torchao's does, whose `from_float` and storage it has; torchao's own tables of operations are not touched.
    """

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = cls._ATEN_OP_TABLE[cls].get(func)
        if operation is None:
            from fxopt.precision.int8_operations import by_rule

            operation = by_rule
        return operation(func, types, args, kwargs or {})

    def fsdp_post_all_gather(
        self, all_gather_outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Int8Weight, tuple[Tensor, ...]]:
        """The whole weight (N, D) for FSDP2, from all ranks' rows and scales, whose memory it shares."""
        return Int8Weight(*all_gather_outputs), all_gather_outputs


# So that torch.load, which accepts what it knows, gives back a state dict with int8 weights bit by bit; torchao's own
# class is in checkpoints of models that were quantized without fxopt.
torch.serialization.add_safe_globals([Int8Weight, Int8QuantizedTrainingLinearWeight])


def quantized(values: Tensor) -> Any:
    """An int8 weight of `values` (N, D), rounded to the nearest by torchao; its scales have the dtype of `values`.

    A row that int8 can hold exactly is held exactly. So is what was int8 before, and came here by way of a checkpoint.
    """
    weight: Any = Int8Weight.from_float(values)
    if isinstance(values, FakeTensor):  # without values to look at
        return weight
    scale = _exact_scales(values)
    is_exact = scale > 0
    if is_exact.any():
        codes = (values[is_exact].float() / scale[is_exact, None].float()).round()
        weight.int_data[is_exact] = codes.to(torch.int8)
        weight.scale[is_exact] = scale[is_exact]
    return weight


def _exact_scales(values: Tensor) -> Tensor:
    """The scale (N,) of each row of `values` (N, D) whose values are all `dequantized` from int8 with it; 0 if none is.

    The largest of a row of int8 is 96 to 127 scales (`fxopt.precision.parameter_storage` keeps it there), and a scale
    a number of 8 significant bits, or of float32's 24: few enough to try. A few columns rule nearly all of them out.
    """
    scales = values.new_zeros(values.shape[0])
    if values.numel() == 0:
        return scales
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    largest = values.abs().amax(1)
    few = values[:, :: max(1, values.shape[1] // 8)][:, :8]
    for code in range(127, 95, -1):
        nearest = (largest.float() / code).to(values.dtype)
        for step in (-1, 0, 1):  # the largest value is itself rounded
            scale = (nearest.view(bits) + step).view(values.dtype)
            fits = (scales == 0) & (largest > 0) & ((largest.float() / scale.float()).round() <= 127)
            is_candidate = (_multiples(few, scale) == few).all(1) & fits
            rows = is_candidate.nonzero().squeeze(1)
            rows = rows[(_multiples(values[rows], scale[rows]) == values[rows]).all(1)]
            scales[rows] = scale[rows]
    return scales


def _multiples(values: Tensor, scale: Tensor) -> Tensor:
    """The multiples of `scale` (N,) next to `values` (N, D), rounded to their dtype."""
    scale = scale.float().unsqueeze(1)
    return ((values.float() / scale).round() * scale).to(values.dtype)


def dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain tensor (N, D) of the values that an int8 weight has, rounded once to `dtype`."""
    held: Any = weight.data
    return (held.int_data.float() * held.scale.float().unsqueeze(1)).to(dtype)


def store(weight: Any, values: Tensor, *, stochastic: bool) -> None:
    """Writes float32 `values` (N, D) to an int8 weight (N, D), row by row.

    A row keeps its scale if it lies where it was, or if its codes fit there; the others get a new one. Within half a
    step of the row's scale of `values`; `stochastic`: within one step, and right on average.
    """
    kept = weight.scale.to(values.dtype).unsqueeze(1)
    codes = values / divisor(kept)
    keeps = scale_serves(codes, LARGEST_CODE) | (values == weight.int_data * kept).all(1, keepdim=True)
    most = FRESH_LARGEST_CODE if stochastic else LARGEST_CODE
    fresh = (values.abs().amax(1, keepdim=True) / most).to(weight.scale.dtype).to(values.dtype)
    codes = torch.where(keeps, codes, values / divisor(fresh))
    codes = codes.add_(torch.rand_like(codes)).floor_() if stochastic else codes.round_()
    weight.int_data.copy_(codes.clamp_(-LARGEST_CODE, LARGEST_CODE))
    weight.scale.copy_(torch.where(keeps, kept, fresh).squeeze(1))


def fill(weight: Any, values: Tensor, *, stochastic: bool) -> None:
    """Gives an int8 weight (N, D) the content of a plain tensor of its shape, as `store`.

    Not stochastic: a row that int8 can hold exactly is held exactly, as by `quantized`.
    """
    values = values.detach().to(weight.device, wide_dtype(weight)).expand(weight.shape)
    if not stochastic and not isinstance(values, FakeTensor):
        shown = values.to(weight.dtype)
        scale = torch.where((shown == values).all(1), _exact_scales(shown), 0)
        weight.scale.copy_(torch.where(scale > 0, scale, weight.scale))
    store(weight, values, stochastic=stochastic)


def wide_dtype(weight: Tensor) -> torch.dtype:
    """float32, in which int8 times a scale of 16 bits is exact; float64 for a weight that shows float64."""
    return torch.promote_types(weight.dtype, torch.float32)


import fxopt.precision.int8_operations  # noqa: E402, F401  # the tables of Int8Weight
