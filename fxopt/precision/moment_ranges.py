"""Ranges of quantized states: read as float32, and written back, rounded so that they are right on average.

A block of elements (256 in 8 bits, 128 in 4) shares one float32 scale. Codes: `fxopt.kernels.moment_codes`. What the
tensors are: `fxopt.precision.quantized_moment`, which is not imported here, nor torchao with it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import moment_codes
from fxopt.kernels.adamw import QUANTIZED_CHUNK_NUMEL
from fxopt.kernels.adamw_8bit import QuantizedMoment
from fxopt.kernels.moment_codes import FLOAT_BITS, Scratch
from fxopt.kernels.rounding import OfOneStep, noise_key
from fxopt.precision.policy import OptimizerState


def is_quantized(state: object) -> bool:
    """Whether `state` is a quantized optimizer state, ours or torchao's own."""
    return hasattr(state, "codes") and hasattr(state, "qmap")


def form_of(state: Tensor) -> OptimizerState:
    """ "float32", "8bit" or "4bit"."""
    if not is_quantized(state):
        return "float32"
    return "8bit" if state.qmap.numel() == 256 else "4bit"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Noise:
    """What decides whether a value is rounded up: a pure function of these numbers and of an element's place."""

    seed: int
    step: int
    index: int

    def of(self, state: Any, start: int, shape: torch.Size) -> Tensor:
        """For the elements from `start` on, of `shape` (blocks, block), as `moment_codes` takes it."""
        key = noise_key(noise_key(self.seed, self.step, self.index), start, 1 if state.signed else 2)
        device, numel, bits = state.codes.device, shape.numel(), _bits(state)
        if device.type == "cpu":
            size = _FEW if numel <= _FEW // 2 else 2 * QUANTIZED_CHUNK_NUMEL
            noise = _step_noise(self.seed, self.step, bits, state.signed, size)
            start = key % (noise.numel() - numel + 1)
            return noise[start : start + numel].view(shape)
        generator = torch.Generator(device).manual_seed(key)
        if state.signed:
            most = 1 << moment_codes.SIGNED[bits].shift
            return torch.randint(0, most, shape, generator=generator, dtype=torch.int16, device=device)
        noise = torch.randint(0, 1 << FLOAT_BITS, shape, generator=generator, dtype=torch.int32, device=device)
        return noise.sub_(moment_codes.UNSIGNED[bits].origin)


_FEW = 1 << 15  # a small model's steps should not wait for noise that nobody reads


_NOISE = OfOneStep()


def _step_noise(seed: int, step: int, bits: int, signed: bool, size: int) -> Tensor:
    """Noise that one step shares, (size,): for first moments (signed) or second ones. Not to be written to.

    At least twice as many numbers as are needed at a time: each chunk reads a slice at a random place.
    """

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(noise_key(seed, step, 2))
        return torch.empty(size // 4, dtype=torch.int64).random_(-(1 << 63), None, generator=generator)

    def noise() -> Tensor:
        # 16 bits for each: first and second moments read them at other places.
        draws = _NOISE.get(seed, step, size, draw).view(torch.int16)
        if signed:
            return draws & ((1 << moment_codes.SIGNED[bits].shift) - 1)
        wide = draws.to(torch.int32).bitwise_and_((1 << 16) - 1)
        # In the middle of each 2⁷ that 16 bits cannot tell apart: right on average.
        middle = 1 << (FLOAT_BITS - 17)
        return wide.bitwise_left_shift_(FLOAT_BITS - 16).add_(middle).sub_(moment_codes.UNSIGNED[bits].origin)

    return _NOISE.get(seed, step, (size, bits, signed), noise)


def read(state: Any, start: int, stop: int, out: Tensor | None = None, scratch: Scratch | None = None) -> Tensor:
    """Elements `start` to `stop` in float32, flat and contiguous, on their own memory unless `state` is float32.

    Both ends lie on a block's edge. A quantized state's are written to `out` (stop - start,), if given;
    `scratch` is for at least as many elements.
    """
    if not is_quantized(state):
        return state.view(-1)[start:stop].float()
    bits, block = _bits(state), state.block_size
    codes = state.codes.view(-1)[start:stop] if bits == 8 else _unpacked(state.codes[start // 2 : stop // 2])
    codes, scale = codes.view(-1, block), state.scale[start // block : stop // block]
    if out is None:
        out = torch.empty(stop - start, dtype=torch.float32, device=codes.device)
    if state.signed:
        scratch = scratch or Scratch(stop - start, codes.device)
        moment_codes.read_signed(codes, scale, bits, out.view(codes.shape), scratch)
    else:
        moment_codes.read_unsigned(codes, scale, bits, out.view(codes.shape))
    return out


def pick(state: Any, positions: Tensor) -> Tensor:
    """Elements of a quantized state in float32 (n,), at `positions` (n,) int64 of its flat form."""
    if form_of(state) == "8bit":
        codes = state.codes.view(-1)[positions]
    else:
        codes = (state.codes[positions // 2] >> (4 * (1 - positions % 2))) & 0b1111
    picked: Tensor = state.qmap[codes.int()] * state.scale[positions // state.block_size]
    return picked


def write(
    state: Any,
    start: int,
    values: Tensor,
    scratch: Scratch | None = None,
    *,
    noise: Noise | None = None,
    decay: float = 1.0,
) -> None:
    """Stores float32 `values`, flat, contiguous and scratch afterwards, from element `start` on.

    They are rounded as `noise` says, right on average, or to the nearest without it. `decay`: what the second moments
    have been multiplied by since they were written last.
    """
    stop = start + values.numel()
    if not is_quantized(state):
        kept = state.view(-1)[start:stop]
        if kept.data_ptr() != values.data_ptr():  # else they were updated where they lie
            kept.copy_(values)
        return
    if values.numel() > QUANTIZED_CHUNK_NUMEL and values.device.type == "cpu":
        for part, piece in enumerate(values.split(QUANTIZED_CHUNK_NUMEL)):
            write(state, start + part * QUANTIZED_CHUNK_NUMEL, piece, scratch, noise=noise, decay=decay)
        return
    bits, block = _bits(state), state.block_size
    blocks = values.view(-1, block)
    scratch = scratch or Scratch(values.numel(), values.device)
    scale = state.scale[start // block : stop // block]
    if bits == 8:
        codes = state.codes.view(-1)[start:stop].view(blocks.shape)
    else:
        codes = torch.empty(blocks.shape, dtype=torch.uint8, device=values.device)
    drawn = noise.of(state, start, blocks.shape) if noise is not None else None
    if state.signed:
        moment_codes.write_signed(blocks, codes, scale, bits, drawn, scratch)
    else:
        moment_codes.write_unsigned(blocks, codes, scale, bits, decay, drawn, scratch)
    if bits == 4:
        state.codes[start // 2 : stop // 2] = (codes.view(-1)[::2] << 4) | codes.view(-1)[1::2]


def for_kernel(state: Any) -> QuantizedMoment:
    """An 8-bit state as AdamW's kernel for a GPU takes it; it shares its memory."""
    return QuantizedMoment(state.codes, state.scale, state.qmap)


def _bits(state: Any) -> int:
    return 8 if state.qmap.numel() == 256 else 4


def _unpacked(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 0b1111], dim=-1)
