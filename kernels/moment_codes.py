"""Optimizer moments in 8 or 4 bits whose expected value is that of float32 moments: the codes, on any device.

A step changes a second moment v by about a thousandth of its size (1 - beta2), and neighbouring values of 255 lie some
percent apart: stored as the nearest it would never move. So it is rounded stochastically, up or down with the
probabilities that make it right on average. That alone leaves a random walk whose spread grows while v decays; hence

- **A grid that decays.** A block's scale is multiplied by beta2 at each step, and every stored value with it, without
  any rounding. Only what the gradient adds is rounded. What remains of the noise is var(v) / v² of about half the
  spacing of the values, at rest, in growth and in decay alike.
- **Linear between, even in the logarithm over all.** The values are x = F - F(0), where F has `STEPS` evenly spaced
  values in each doubling. Doubling the scale moves every code by STEPS and no value. Code 0 is exactly zero.
- **Nothing positive becomes zero.** It keeps at least code 1: a second moment of zero beside a first moment that is not
  would make a step without bounds. That is the one bias, of what is under 2⁻²⁸ of its block's largest.

First moments move by a tenth of their size (1 - beta1), so that a plain floating-point grid serves, rounded
stochastically too: float16's sign and lower exponents, with 3 bits of mantissa, or one in 4 bits.

Sources: stochastic rounding, Gupta et al., arXiv:1502.02551; blocks with a scale, Dettmers et al., arXiv:2110.02861.
The grid is this file's.

Shapes: values (blocks, block) float32, contiguous; codes (blocks, block) uint8, from 0 to 2 ** bits - 1; scale
(blocks,) float32.
Bytes moved: 5 per element in each direction, 4 more for noise, and what passes through scratch in the cache.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_BITS = 23  # of a float32's mantissa
TINY = 2.0**-126  # the smallest float32 with all its digits
LARGEST = 2.0**126  # what reaches it is not finite to us: the whole block becomes NaN


@dataclass(frozen=True)
class Unsigned:
    """Second moments: code c stands for F(c) - F(0), F(c) being 2 ** (exponent - 127 + c / steps), linear in between.

    steps: values in each doubling. exponent: float32's, of F(0).
    """

    steps: int
    exponent: int

    @property
    def first(self) -> float:
        """F(0)."""
        return 2.0 ** (self.exponent - 127)

    @property
    def second(self) -> float:
        """F(1)."""
        return self.first * (1 + 1 / self.steps)

    @property
    def first_bits(self) -> int:
        return self.exponent << FLOAT_BITS

    @property
    def origin(self) -> int:
        """Where code 0 lies among the bits of all floats, in 2⁻²³ of a code, as a 32-bit number that wraps around."""
        return (self.first_bits * self.steps + (1 << 31)) % (1 << 32) - (1 << 31)


@dataclass(frozen=True)
class Signed:
    """First moments: a sign, exponent bits and `mantissa` bits of a float16, whose other exponent bits are zero.

    sign: the bit of a code that has the sign. shift: bits of a float16 that are cut. unit: what a value of one scale
    becomes, so that a block's largest cannot be rounded to more than there are codes for.
    """

    sign: int
    shift: int
    unit: float


# 25 doublings in the 255 codes of v: 7.6 decades in steps of 5 to 10 %, one more above zero. In |g|, half of that.
UNSIGNED = {8: Unsigned(steps=10, exponent=102), 4: Unsigned(steps=1, exponent=113)}
SIGNED = {8: Signed(sign=7, shift=7, unit=1.0), 4: Signed(sign=3, shift=9, unit=(6 - 2.0**-6) * 2.0**-14)}

# A code's place in the bits of a float32 is code * 2²³ / steps; in whole numbers under 2³¹, and right to some 2⁻¹⁹:
_PLACE_SHIFT = 3


def _place(unsigned: Unsigned) -> int:
    return (1 << (FLOAT_BITS + _PLACE_SHIFT)) // unsigned.steps


class Scratch:
    """What up to `numel` elements pass through between codes and values; for range after range.

    Memory of its own for each range would be mapped and unmapped each time, which takes as long as the arithmetic.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self._wide = torch.empty(numel, dtype=torch.float32, device=device)
        self._halves = torch.empty(2, numel, dtype=torch.int16, device=device)
        self._shape: torch.Size | None = None

    def take(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of this shape: float32; int16, and the same memory as float16; another int16."""
        if shape != self._shape:
            wide = self._wide[: shape.numel()].view(shape)
            half, sign = (part[: shape.numel()].view(shape) for part in self._halves)
            self._shape, self._taken = shape, (wide, half, half.view(torch.float16), sign)
        return self._taken


def read_unsigned(codes: Tensor, scale: Tensor, bits: int, out: Tensor) -> Tensor:
    """The second moments that `codes` stand for, in `out`."""
    grid = UNSIGNED[bits]
    places = out.view(torch.int32)
    places.copy_(codes).mul_(_int32(_place(grid))).bitwise_right_shift_(_int32(_PLACE_SHIFT))
    places.add_(_int32(grid.first_bits))
    return out.sub_(_float32(grid.first)).mul_(scale[:, None])


def write_unsigned(
    values: Tensor, codes: Tensor, scale: Tensor, bits: int, decay: float, noise: Tensor | None, scratch: Scratch
) -> None:
    """Stores second moments, none negative, in `codes` and `scale`, whose grid has decayed by `decay` since last time.

    noise: (blocks, block) int32: even in [0, 2²³), minus the grid's `origin`; None for the nearest. Keeps `values`.
    """
    grid = UNSIGNED[bits]
    largest = torch.amax(values, 1)
    scale.copy_(next_scale(largest, scale, decay))
    wide, *_ = scratch.take(values.shape)
    torch.addcmul(_row(grid.first, values.shape[1], values.device), values, scale.reciprocal()[:, None], out=wide)
    places = wide.clamp_(min=grid.second).view(torch.int32)
    if noise is None:
        noise = _int32((1 << (FLOAT_BITS - 1)) - grid.origin)
    # In one pass: the place of code 0 is subtracted with the noise. int32 wraps around on the way, the sum does not.
    torch.add(noise, places, alpha=grid.steps, out=places)
    codes.copy_(places.bitwise_right_shift_(_int32(FLOAT_BITS)))
    if codes.device.type != "cpu":
        codes.mul_(values != 0)
        return
    if not bool(largest.all()):
        codes.mul_((largest != 0)[:, None])
    # Few blocks have zeros beside other values, and comparing all of them costs more.
    rows = (values.amin(1) == 0).logical_and_(largest > 0).nonzero().view(-1)
    if rows.numel():
        codes[rows] = codes[rows].mul_(values[rows] != 0)


def next_scale(largest: Tensor, scale: Tensor, decay: float) -> Tensor:
    """The scale (blocks,) that puts `largest` (blocks,) between 0.66 and 1.5 and moves the grid by whole doublings."""
    base = torch.mul(scale, _float32(decay)).clamp_(min=TINY)
    bits = base.view(torch.int32)
    # The bits of a float grow as its logarithm does, nearly: half a doubling more or less, they tell the doublings.
    doublings = torch.sub(largest.view(torch.int32), bits).add_(_int32((1 << (FLOAT_BITS - 1)) + (1 << 15)))
    bits.add_(doublings.bitwise_and_(_int32(-1 << FLOAT_BITS))).clamp_(1 << FLOAT_BITS, 253 << FLOAT_BITS)
    return base.add_(_mark(largest))


def _mark(largest: Tensor) -> Tensor:
    """Zeros, but NaN where `largest` is not under `LARGEST`."""
    return torch.mul(largest, _float32(4.0)).mul_(_float32(0.0))


def read_signed(codes: Tensor, scale: Tensor, bits: int, out: Tensor, scratch: Scratch) -> Tensor:
    """The first moments that `codes` stand for, in `out`."""
    grid = SIGNED[bits]
    _, half, half_float, sign = scratch.take(out.shape)
    if bits == 8:
        half.copy_(codes.view(torch.int8)).bitwise_left_shift_(_int16(grid.shift))
        half.bitwise_and_(_int16(~(1 << 14)))  # which the sign has been extended to
    else:
        half.copy_(codes)
        torch.bitwise_right_shift(half, grid.sign, out=sign).bitwise_left_shift_(15)
        half.bitwise_and_((1 << grid.sign) - 1).bitwise_left_shift_(grid.shift).bitwise_or_(sign)
    out.copy_(half_float)
    if grid.unit != 1.0:
        out.mul_(1 / grid.unit)
    return out.mul_(scale[:, None])


def write_signed(
    values: Tensor, codes: Tensor, scale: Tensor, bits: int, noise: Tensor | None, scratch: Scratch
) -> None:
    """Stores first moments in `codes` and `scale`; `noise` (blocks, block) int16, even in [0, 2 ** shift).

    `values` are scratch afterwards.
    """
    grid = SIGNED[bits]
    largest = torch.maximum(values.amax(1), values.amin(1).neg_())
    scale.copy_(power_of_two(largest) if bits == 8 else largest.clamp_(min=TINY))  # 8 codes leave no room to spare
    shares = values.mul_(scale.reciprocal()[:, None])
    if grid.unit != 1.0:
        shares.mul_(grid.unit)
    _, half, half_float, sign = scratch.take(values.shape)
    half_float.copy_(shares)
    # Sign and magnitude: the noise makes either larger.
    half.add_(_int16(1 << (grid.shift - 1)) if noise is None else noise)
    torch.bitwise_right_shift(half, _int16(15 - grid.sign), out=sign).bitwise_and_(_int16(1 << grid.sign))
    half.bitwise_right_shift_(_int16(grid.shift))
    if bits != 8:  # in 8 bits the cast cuts what the sign has been extended to
        half.bitwise_and_((1 << grid.sign) - 1)
    codes.copy_(half.add_(sign))


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two (blocks,) that puts `largest` (blocks,) between 0.875 and 1.75."""
    bits = torch.add(largest.view(torch.int32), _int32(1 << (FLOAT_BITS - 2)))
    bits.bitwise_and_(_int32(255 << FLOAT_BITS)).clamp_(1 << FLOAT_BITS, 253 << FLOAT_BITS)
    return bits.view(torch.float32).add_(_mark(largest))


@functools.lru_cache(maxsize=16)
def _row(value: float, numel: int, device: torch.device) -> Tensor:
    """(numel,) float32, all `value`: a tensor () among three operands would keep PyTorch from vectorizing."""
    return torch.full((numel,), value, dtype=torch.float32, device=device)


@functools.cache
def _int32(value: int) -> Tensor:
    """A number as a tensor () of the dtype that it meets: a Python number would be converted at every call."""
    return torch.tensor(value, dtype=torch.int32)


@functools.cache
def _int16(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int16)


@functools.cache
def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def code_values(bits: int, signed: bool) -> Tensor:
    """What each code stands for at a scale of 1: (2 ** bits,) float32 on the CPU."""
    codes = torch.arange(1 << bits, dtype=torch.uint8)[None]
    out, one = torch.empty(1, 1 << bits), torch.ones(1)
    if signed:
        return read_signed(codes, one, bits, out, Scratch(1 << bits, out.device))[0]
    return read_unsigned(codes, one, bits, out)[0]
