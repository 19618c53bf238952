"""What rounding costs the parameters of one row of the monitor's table: sums over their sampled elements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.rounding import Rounding
from fxopt.precision.parameter_storage import is_int8
from fxopt.precision.policy import Precision
from fxopt.precision.update_samples import Sample, Shadow, chance_to_stay, rounding_variance

# Sums over the elements of one row and one step, in this order.
_SUMS = (
    "elements", "moving", "unchanged", "expected_unchanged", "unchanged_in_cast", "update_square", "weight_square",
    "intended", "arrived", "noise_square",
    "subnormal_weights", "saturated_weights", "subnormal_gradients", "saturated_gradients",
)  # fmt: skip
_EXTREMES = _SUMS[-4:]


@dataclass(frozen=True)
class RoundingCost:
    """One row: the parameters of one role in one param group, over all steps so far. Shares are of 1.

    moving: the share of elements that float32 would have moved. The shares of updates that follow are shares of these.
    lost: the share of updates that rounding swallowed: the float32 update was not zero, and the stored value stayed.
        With stochastic rounding most values stay, and rightly; there it is what stayed beyond the expected share.
    lost_error: the standard error of `lost`: elements are sampled, and stochastic rounding is drawn.
    unchanged, expected_unchanged: the share that stayed, and the share that unbiased stochastic rounding lets stay
        (None for the other roundings, and for int8).
    arrived: how much of the update is in the stored weights: sum of movements in the update's direction over the sum
        of updates. 1 without bias.
    noise: root mean square of the noise that stochastic rounding adds to an update, over that of the updates, per step:
        expected for bfloat16, also where it is rounded to the nearest and stochastic rounding would add it; measured
        for int8. Noise has no direction: after n² steps in one direction an update stands above a noise of n. None
        for float32 and Kahan's rounding, which have next to none, and where it `is_estimated`.
    lost_in_cast: the share of updates that moved a float32 weight, but not what it is cast to in the forward pass; None
        where nothing is cast, or the cast is stochastic.
    update_to_weight: root mean square of the updates over that of the weights, per step.
    subnormal, saturated: the share of stored weights, or gradients, so small or so large (or not finite).
    state_error: by the optimizer state's name, the distance from the float32 shadow's over the length of the shadow's.
    is_estimated: the optimizer's rule does not work element by element (Muon, Adafactor), or is not known: what
        float32 would have done is not known either, and every element with a gradient counts as moving.
    """

    name: str
    num_parameters: int
    storage: str
    rounding: str
    steps: int
    moving: float
    lost: float
    lost_error: float
    unchanged: float
    expected_unchanged: float | None
    arrived: float | None
    noise: float | None
    lost_in_cast: float | None
    update_to_weight: float
    subnormal_weights: float
    saturated_weights: float
    subnormal_gradients: float
    saturated_gradients: float
    state_error: dict[str, float]
    is_estimated: bool


@dataclass(frozen=True)
class Formats:
    """What a row's parameters are stored in, and how they are rounded and cast."""

    storage: torch.dtype
    compute: torch.dtype
    rounding: Rounding
    cast: str

    @property
    def is_stochastic(self) -> bool:
        return self.rounding == "stochastic" and self.storage == torch.bfloat16

    @property
    def is_cast(self) -> bool:
        return self.storage == torch.float32 and self.compute == torch.bfloat16 and self.cast == "nearest"


class Row:
    """The sums of one row, a small tensor a step; they stay on their device until someone looks."""

    def __init__(self, name: str, formats: Formats, shadow: Shadow) -> None:
        self.name, self.formats, self.shadow = name, formats, shadow
        self.parameters: dict[Tensor, None] = {}  # in order
        self._sums: list[Tensor] = []

    def add(self, samples: Sequence[Sample]) -> None:
        """The sums of one step; `samples` are of this row's parameters."""
        self.parameters |= dict.fromkeys(sample.parameter for sample in samples)
        before, gradient, after = (
            torch.cat([getattr(sample, field).to(samples[0].before.device) for sample in samples])
            for field in ("before", "gradient", "after")
        )
        intended, moving = after, gradient != 0
        if self.shadow.exists:
            intended = torch.cat(
                [sample.intended.to(before.device) for sample in samples if sample.intended is not None]
            )
            moving = intended != before
        update, stays = intended - before, moving & (after == before)
        noise_square = torch.zeros_like(before)
        if self.formats.storage == torch.bfloat16:
            noise_square = rounding_variance(intended)
        elif self.formats.storage == torch.int8:
            noise_square = (after - intended).square()
        narrow = torch.bfloat16
        in_cast = moving & (after.to(narrow) == before.to(narrow))
        # An int8 weight is dequantized to the dtype of its scale, which it also shows as its own.
        limits = torch.finfo(samples[0].parameter.dtype)
        self._sums.append(
            torch.stack([
                torch.ones_like(before).sum(),
                moving.sum(),
                stays.sum(),
                (chance_to_stay(before, intended) * moving).sum(),
                in_cast.sum(),
                update.square().sum(),
                before.square().sum(),
                update.abs().sum(),
                ((after - before) * update.sign()).sum(),
                (noise_square * moving).sum(),
                *_extremes(after, limits),
                *_extremes(gradient, limits),
            ]).double()
        )  # fmt: skip

    def steps(self) -> list[dict[str, float]]:
        """The sums of each step, by name."""
        return [dict(zip(_SUMS, sums.tolist(), strict=True)) for sums in self._sums]

    def cost(self, state_error: dict[str, float]) -> RoundingCost:
        """What all steps so far have cost."""
        sums = dict(zip(_SUMS, torch.stack(self._sums).sum(0).tolist(), strict=True))
        moving, elements = max(sums["moving"], 1.0), max(sums["elements"], 1.0)
        return RoundingCost(
            name=self.name,
            num_parameters=sum(parameter.numel() for parameter in self.parameters),
            storage=str(self.formats.storage).removeprefix("torch."),
            rounding=self.formats.rounding,
            steps=len(self._sums),
            moving=sums["moving"] / elements,
            lost=self.lost(sums),
            lost_error=self._lost_error(sums),
            unchanged=sums["unchanged"] / moving,
            expected_unchanged=sums["expected_unchanged"] / moving if self.formats.is_stochastic else None,
            arrived=sums["arrived"] / sums["intended"] if self.shadow.exists and sums["intended"] else None,
            noise=self._noise(sums),
            lost_in_cast=sums["unchanged_in_cast"] / moving if self.formats.is_cast else None,
            update_to_weight=update_to_weight(sums),
            **{name: sums[name] / elements for name in _EXTREMES},
            state_error=state_error,
            is_estimated=not self.shadow.exists,
        )

    def lost(self, sums: dict[str, float]) -> float:
        """`RoundingCost.lost`, from the sums of a step or of many."""
        if self.formats.storage == torch.int8:  # rounded stochastically, to codes: how many should stay is not known
            return max(0.0, 1 - sums["arrived"] / sums["intended"]) if sums["intended"] else 0.0
        expected = sums["expected_unchanged"] if self.formats.is_stochastic else 0.0
        return max(0.0, (sums["unchanged"] - expected) / max(sums["moving"], 1.0))

    def _lost_error(self, sums: dict[str, float]) -> float:
        if self.formats.storage == torch.int8:
            return sums["noise_square"] ** 0.5 / sums["intended"] if sums["intended"] else 0.0
        moving = max(sums["moving"], 1.0)
        share = sums["expected_unchanged" if self.formats.is_stochastic else "unchanged"] / moving
        return max(0.0, share * (1 - share) / moving) ** 0.5

    def _noise(self, sums: dict[str, float]) -> float | None:
        is_noisy = self.formats.storage in (torch.bfloat16, torch.int8) and self.formats.rounding != "kahan"
        if not is_noisy or not self.shadow.exists:
            return None
        return (sums["noise_square"] / sums["update_square"]) ** 0.5 if sums["update_square"] else 0.0


def _extremes(values: Tensor, limits: torch.finfo) -> tuple[Tensor, Tensor]:
    """How many are subnormal, and how many at the end of the range, beyond it, or not a number."""
    size = values.abs()
    return ((size > 0) & (size < limits.tiny)).sum(), (~(size < limits.max)).sum()


def update_to_weight(sums: dict[str, float]) -> float:
    """Root mean square of the updates over that of the weights."""
    return (sums["update_square"] / sums["weight_square"]) ** 0.5 if sums["weight_square"] else 0.0


def formats_of(parameter: Tensor, group: dict[str, Any], compute: torch.dtype | None) -> Formats:
    """What the parameter's policy says, where it has one, and what the optimizer does in any case."""
    noted = getattr(parameter, "fxopt_precision", None)
    storage = torch.int8 if is_int8(parameter) else parameter.dtype
    rounding: Rounding = "nearest"
    if storage == torch.int8 or group.get("bf16_stochastic_round"):  # torchao's flag
        rounding = "stochastic"
    elif storage == torch.bfloat16:
        rounding = group.get("rounding", "nearest")
    if not isinstance(noted, Precision):
        return Formats(storage, compute or storage, rounding, "nearest")
    return Formats(storage, compute or noted.compute, rounding, noted.cast)
