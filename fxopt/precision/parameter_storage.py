"""A stored parameter as float32 values, by ranges: read, and written back with one rounding."""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fxopt.kernels.rounding import NOISE_NUMEL, Rounding, noise_key, noise_slice, step_uniform, store_


class ParameterStorage(Protocol):
    """Flat element ranges of one parameter; both ends of a range are multiples of `alignment`."""

    alignment: int

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Float32 values (stop - start,): a float32 parameter's own memory; of others, in `out` or a new tensor."""

    def write(self, start: int, values: Tensor, scratch: Tensor | None = None) -> None:
        """Stores float32 `values`, which are scratch afterwards, as is `scratch`, of the same shape and dtype."""

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
        return _Int8Rows(parameter.detach(), seed, step, index)
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

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        stored = self._flat[start:stop]
        values = stored.float() if out is None or stored.dtype == torch.float32 else out.copy_(stored)
        if self._compensation is not None:
            values.add_(self._compensation[start:stop])
        return values

    def write(self, start: int, values: Tensor, scratch: Tensor | None = None) -> None:
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

    def __init__(self, parameter: Any, seed: int, step: int, index: int) -> None:
        self._codes, self._scale = parameter.int_data, parameter.scale
        self._seed, self._step, self._index = seed, step, index
        self.alignment = parameter.shape[1]

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        codes, scale = self._rows(start, stop)
        values = torch.empty_like(codes, dtype=torch.float32) if out is None else out.view(codes.shape)
        return values.copy_(codes).mul_(scale.float()[:, None]).view(-1)

    def write(self, start: int, values: Tensor, scratch: Tensor | None = None) -> None:
        stored_codes, stored_scale = self._rows(start, start + values.numel())
        scale = divisor(stored_scale.float()[:, None])
        codes = values.view(-1, self.alignment).div_(scale)
        fits = scale_serves(codes, LARGEST_CODE + 1)
        is_gpu = values.device.type != "cpu"  # which is not asked whether all rows fit: that would wait for it
        if is_gpu or not fits.all():
            codes = torch.where(fits, self._draw(codes.clone(), start, 0), codes)
        else:
            codes = self._draw(codes, start, 0, scratch)
        # A code that was drawn too large is rounded again as it was drawn: had the value been taken instead, only what
        # chance made larger would have been put right, and the row would on average be too small.
        fits &= scale_serves(codes, LARGEST_CODE)
        if is_gpu or not fits.all():
            fresh = _largest(codes) * scale / FRESH_LARGEST_CODE
            fresh = fresh.to(stored_scale.dtype).float()
            codes = torch.where(fits, codes, self._draw(codes * (scale / divisor(fresh)), start, 1))
            scale = torch.where(fits, scale, fresh)
        stored_codes.copy_(codes)
        stored_scale.copy_(scale.view(-1))

    def finish(self) -> None:
        pass

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = slice(start // self.alignment, stop // self.alignment)
        return self._codes[rows], self._scale[rows]

    def _draw(self, values: Tensor, start: int, number: int, scratch: Tensor | None = None) -> Tensor:
        """The whole number below or above each value, with the probabilities that make it right on average; in place.

        The noise is added to the fraction alone: there a sum is exact to 2⁻²⁴.
        """
        key = noise_key(noise_key(self._seed, self._step, self._index), start, number)
        if values.device.type == "cpu" and values.numel() <= NOISE_NUMEL // 2:
            noise = noise_slice(step_uniform(self._seed, self._step), values.numel(), key).view(values.shape)
        else:
            generator = torch.Generator(values.device).manual_seed(key)
            noise = torch.rand(values.shape, generator=generator, device=values.device, dtype=torch.float32)
        below = torch.floor(values, out=scratch.view(values.shape)) if scratch is not None else values.floor()
        return values.sub_(below).add_(noise).floor_().add_(below)


LARGEST_CODE = 127
FRESH_LARGEST_CODE = 124  # of a row with a new scale: it has room to grow


def divisor(scale: Tensor) -> Tensor:
    """`scale`, but 1 for a row of zeros, which has none."""
    return torch.where(scale > 0, scale, 1.0)


def scale_serves(codes: Tensor, most: int) -> Tensor:
    """Which rows of `codes` (rows, columns) their scale serves: (rows, 1)."""
    largest = _largest(codes)
    return (largest <= most) & (largest >= 0.75 * LARGEST_CODE)


def _largest(codes: Tensor) -> Tensor:
    """The largest magnitude in each row (rows, 1). Not by `abs`: memory for its result costs more than a pass."""
    return torch.maximum(codes.amax(1, keepdim=True), codes.amin(1, keepdim=True).neg_())
