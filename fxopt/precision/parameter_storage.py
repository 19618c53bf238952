"""A stored parameter as float32 values, by ranges: read, and written back with one rounding."""

import contextlib
from collections.abc import Iterator
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
    """torchao's int8 weight (rows, columns): whole rows, each with its scale, rounded stochastically by torchao.

    torchao takes the codes from the values and rounds the scale afterwards, so that a bfloat16 scale would move the
    whole row, by up to 2⁻⁹, to the same side at each step. Values that are rounded to the scale's dtype before,
    stochastically, have codes and scale that agree.
    """

    def __init__(self, parameter: Any, key: int) -> None:
        self._parameter, self._key = parameter, key
        self.alignment = parameter.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        return self._rows(start, stop).to(torch.float32).dequantize().view(-1)

    def write(self, start: int, values: Tensor) -> None:
        rows = self._rows(start, start + values.numel())
        key = noise_key(self._key, start, 0)
        rounded = torch.empty_like(values, dtype=rows.scale.dtype)
        store_(rounded, values, "stochastic", index=key)
        with _seeded(values.device, noise_key(key, 0, 1)):
            rows.copy_(rounded.view(-1, self.alignment))

    def finish(self) -> None:
        pass

    def _rows(self, start: int, stop: int) -> Any:
        return self._parameter[start // self.alignment : stop // self.alignment]


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The device's global generator, which torchao draws from, starts at `seed`, and is put back afterwards."""
    if device.type == "cpu":
        generator = torch.default_generator
    else:
        generators = torch.get_device_module(device).default_generators
        generator = generators[device.index or 0]
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
