"""A stored parameter as float32 values, by ranges: read, and written back with one rounding."""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fxopt.kernels.rounding import Rounding, noise_key, store_


class ParameterStorage(Protocol):
    """Flat element ranges of one parameter; both ends of a range are multiples of `alignment`."""

    alignment: int

    def read(self, start: int, stop: int) -> Tensor:
        """Float32 values (stop - start,); for a float32 parameter, its own memory."""

    def write(self, start: int, values: Tensor) -> None:
        """Stores float32 `values`, which are scratch afterwards."""

    def finish(self) -> None:
        """To be called after the last write."""


def is_wrapper(tensor: object) -> bool:
    """Whether `tensor` is made of other tensors: quantized. Not one that is sharded (DTensor)."""
    return hasattr(type(tensor), "__tensor_flatten__") and not hasattr(tensor, "to_local")


def is_int8(parameter: object) -> bool:
    """Whether `parameter` is torchao's int8 weight for quantized training."""
    if not is_wrapper(parameter):
        return False
    from torchao.prototype.quantized_training.int8 import Int8QuantizedTrainingLinearWeight

    return isinstance(parameter, Int8QuantizedTrainingLinearWeight)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (FSDP2), which shares its memory. An update needs no other part."""
    if type(tensor) in (Tensor, nn.Parameter):  # looking for what is not there takes longer
        return tensor
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def storage_of(
    parameter: Tensor, rounding: Rounding, *, seed: int, step: int, index: int, compensation: Tensor | None = None
) -> ParameterStorage:
    """How `parameter` is read and written. The noise of its rounding is a pure function of (seed, step, index)."""
    if is_int8(parameter):
        return _Int8Rows(parameter.detach(), noise_key(seed, step, index))
    return _Plain(parameter, rounding, seed, step, index, compensation)


class _Plain:
    alignment = 1

    def __init__(
        self, parameter: Tensor, rounding: Rounding, seed: int, step: int, index: int, compensation: Tensor | None
    ) -> None:
        self._local = local(parameter)
        self._dense = self._local.contiguous()
        self._flat = self._dense.view(-1)
        self._compensation = compensation.view(-1) if compensation is not None else None
        self._rounding, self._noise = rounding, (seed, step, index)

    def read(self, start: int, stop: int) -> Tensor:
        values = self._flat[start:stop].float()
        if self._compensation is not None:
            values.add_(self._compensation[start:stop])
        return values

    def write(self, start: int, values: Tensor) -> None:
        stop = start + values.numel()
        stored = self._flat[start:stop]
        if stored.data_ptr() == values.data_ptr():  # float32, updated where it lies
            return
        cut_off = self._compensation[start:stop] if self._compensation is not None else None
        seed, step, index = self._noise
        store_(
            stored,
            values,
            self._rounding,
            seed=seed,
            step=step,
            index=noise_key(index, start, 0),
            compensation=cut_off,
        )

    def finish(self) -> None:
        if self._dense is not self._local:
            self._local.copy_(self._dense)


class _Int8Rows:
    """torchao's int8 weight (rows, columns): whole rows, each with its scale, rounded stochastically.

    What torchao's own `copy_` does to an update is too noisy: it takes a new scale for each row at each step, so that
    every code of the row falls between two codes of the new scale and is drawn anew, whether its value moved or not.
    With updates of 1e-5 that makes ten times the noise of the updates themselves. Here a row keeps its scale, on which
    its old values lie exactly, until its codes outgrow it or have left a quarter of it empty.
    """

    def __init__(self, parameter: Any, key: int) -> None:
        self._parameter, self._key = parameter, key
        self.alignment = parameter.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        return self._rows(start, stop).to(torch.float32).dequantize().view(-1)

    def write(self, start: int, values: Tensor) -> None:
        rows = self._rows(start, start + values.numel())
        generator = torch.Generator(values.device).manual_seed(noise_key(self._key, start, 0))
        scale = _divisor(rows.scale.float().view(-1, 1))
        codes = values.view(-1, self.alignment).div_(scale)
        fits = _within(codes, _LARGEST_CODE + 1)
        codes = torch.where(fits, _draw(codes, generator), codes)
        # A code that was drawn too large is rounded again as it was drawn: had the value been taken instead, only what
        # chance made larger would have been put right, and the row would on average be too small.
        fits &= _within(codes, _LARGEST_CODE)
        if values.device.type != "cpu" or not fits.all():  # a GPU is not asked: that would wait for it
            fresh = codes.abs().amax(1, keepdim=True) * scale / _FRESH_LARGEST_CODE
            fresh = fresh.to(rows.scale.dtype).float()
            codes = torch.where(fits, codes, _draw(codes * (scale / _divisor(fresh)), generator))
            scale = torch.where(fits, scale, fresh)
        rows.int_data.copy_(codes)
        rows.scale.copy_(scale.view(-1))

    def finish(self) -> None:
        pass

    def _rows(self, start: int, stop: int) -> Any:
        return self._parameter[start // self.alignment : stop // self.alignment]


_LARGEST_CODE = 127
_FRESH_LARGEST_CODE = 124  # of a row with a new scale: it has room to grow


def _divisor(scale: Tensor) -> Tensor:
    """`scale`, but 1 for a row of zeros, which has none."""
    return torch.where(scale > 0, scale, 1.0)


def _within(codes: Tensor, most: int) -> Tensor:
    """Which rows of `codes` (rows, columns) their scale serves: (rows, 1)."""
    largest = torch.linalg.vector_norm(codes, torch.inf, 1, keepdim=True)
    return (largest <= most) & (largest >= 0.75 * _LARGEST_CODE)


def _draw(values: Tensor, generator: torch.Generator) -> Tensor:
    """The whole number below or above each value, with the probabilities that make it right on average."""
    below = values.floor()
    return below.add_(torch.rand(values.shape, device=values.device, generator=generator) < values - below)
