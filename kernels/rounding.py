"""How a float32 result is stored in bfloat16: to nearest, stochastically, or with Kahan's compensation.

Stochastic: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551. A float32 is stored as the
bfloat16 below or above it, with the probabilities that make the result right on average: the 16 bits to be discarded
are a whole number f; adding a whole number drawn evenly from [0, 2¹⁶) and cutting carries into the kept bits with
probability f / 2¹⁶. An update far smaller than a bfloat16 step then happens rarely, instead of never. inf and NaN stay
what they are.

Kahan: Kahan, "Further remarks on reducing truncation errors", 1965. What rounding to nearest cuts off is kept in a
second bfloat16, and added before the next update: 16 bits of the value instead of 8, two bytes more, no noise.

Shapes: value, param, compensation (...) alike. Dtypes: value float32; param, compensation bfloat16.
Bytes moved: 6 per element (value 4, param 2), and 4 for a compensation.

The noise is a pure function of its key: training resumed from a checkpoint continues bit by bit.
"""

from collections.abc import Callable, Hashable
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic", "kahan"]

# On the CPU each step draws this many random numbers, and each chunk reads a slice at a random place. A number of its
# own for every element would cost more than the whole update.
NOISE_NUMEL = 1 << 20
_CHUNK_NUMEL = NOISE_NUMEL // 2

_MASK_64 = (1 << 64) - 1


def stochastic_round_reference(value: Tensor, noise: Tensor) -> Tensor:
    """The specification: float32 `value` (...) to bfloat16, `noise` (...) int32 in [0, 2¹⁶)."""
    cut = (value.view(torch.int32) + noise) & -(1 << 16)
    return torch.where(value.isfinite(), cut.view(torch.float32), value).to(torch.bfloat16)


def noise_key(seed: int, step: int, index: int) -> int:
    """62 random bits from (seed, step, index): the finalizer of splitmix64 (Steele et al., 2014), once per number."""
    key = 0
    for number in (seed, step, index):
        key = (key + number + 0x9E3779B97F4A7C15) & _MASK_64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK_64
        key ^= key >> 31
    return key >> 2


class OfOneStep:
    """Noise that one step's calls share: megabytes, which are let go before another step's are drawn."""

    def __init__(self) -> None:
        self._step: tuple[int, int] | None = None
        self._kept: dict[Hashable, Tensor] = {}

    def get(self, seed: int, step: int, key: Hashable, draw: Callable[[], Tensor]) -> Tensor:
        """What `draw` has made for this seed, step and key."""
        if (seed, step) != self._step:
            self._step, self._kept = (seed, step), {}
        kept = self._kept  # another thread may come with another step
        if key not in kept:
            kept[key] = draw()
        return kept[key]


_NOISE, _UNIFORM = OfOneStep(), OfOneStep()


def step_noise(seed: int, step: int, device: torch.device) -> Tensor:
    """The noise that one step shares: (NOISE_NUMEL,) int32, even in [0, 2¹⁶). Not to be written to.

    Four numbers from each 64-bit draw of the CPU's generator. Kept for the step's other calls.
    """

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(noise_key(seed, step, 0))
        draws = torch.empty(NOISE_NUMEL // 4, dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
        return draws.view(torch.int16).to(torch.int32).bitwise_and_((1 << 16) - 1).to(device)

    return _NOISE.get(seed, step, device, draw)


def step_uniform(seed: int, step: int) -> Tensor:
    """Noise that one step shares, in [0, 1): (NOISE_NUMEL,) float32 on the CPU. Not to be written to."""

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(noise_key(seed, step, 1))
        return torch.rand(NOISE_NUMEL, generator=generator, dtype=torch.float32)

    return _UNIFORM.get(seed, step, None, draw)


def noise_slice(noise: Tensor, numel: int, key: int) -> Tensor:
    """`numel` < NOISE_NUMEL elements of the step's noise, from a place that `key` draws."""
    start = key % (NOISE_NUMEL - numel + 1)
    return noise[start : start + numel]


def add_noise_(bits: Tensor, noise: Tensor, key: int) -> None:
    """Adds a slice of `step_noise` to float32 bits: (n,) int32, n < NOISE_NUMEL."""
    bits.add_(noise_slice(noise, bits.numel(), key))


def cut_(bits: Tensor) -> None:
    """Clears the 16 bits that bfloat16 does not hold. A NaN that arithmetic makes has them clear: noise leaves it."""
    bits.bitwise_and_(-(1 << 16))


def store_(
    param: Tensor,
    value: Tensor,
    rounding: Rounding,
    *,
    seed: int = 0,
    step: int = 0,
    index: int = 0,
    compensation: Tensor | None = None,
) -> None:
    """Stores float32 `value` in bfloat16 or float32 `param`; `value`, contiguous, is scratch afterwards.

    With "kahan", `compensation` gets what was cut off.
    """
    if param.dtype == torch.float32 or rounding == "nearest":
        param.copy_(value)
    elif rounding == "kahan":
        assert compensation is not None, "kahan rounding needs a compensation"
        param.copy_(value)
        compensation.copy_(value.sub_(param))
    else:
        noise, bits = step_noise(seed, step, value.device), value.view(-1).view(torch.int32)
        for chunk, piece in enumerate(bits.split(_CHUNK_NUMEL)):
            add_noise_(piece, noise, noise_key(noise_key(seed, step, index), chunk, 0))
        cut_(bits)
        param.copy_(value)
