"""How large a replacement's errors may be: the accuracy rule, for the values of a proof and for a whole model.

Error against float64 ≤ the original's own error in the same dtype × 1.1 + one rounding, for the largest error and for
the mean.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

SLACK = 1.1  # how much larger than the original's error the replacement's may be
FEW = 100  # the error of fewer numbers, as the largest of many in float32, is a draw; it may be twice the original's
TINY = 1e-30  # where everything is smaller than this, errors are not relative any more
MOST_DRAWS = 5  # if the errors are larger in the first: all of them, so that no lucky one ends it

Tensors = dict[str, Any]  # tensors by name: results, gradients, inputs afterwards


@dataclass(frozen=True)
class Seen:
    """What both sides made of one sample, in float64 and in their own dtypes."""

    truth: Tensors  # the original in float64
    same: Tensors  # the replacement in float64
    original: Tensors
    replacement: Tensors


@dataclass
class Errors:
    """The errors of one value in one norm, relative to its size: the original's and the replacement's."""

    name: str
    slack: float
    least_rounding: float  # what one more rounding may always add
    pooled: bool  # over draws: the mean, not the largest
    is_narrow: bool  # a dtype of two bytes or less
    draws: list[tuple[float, float, float]] = field(default_factory=list)  # the third is the truth's, rounded

    @property
    def original(self) -> float:
        return self._over_draws(0)

    @property
    def replacement(self) -> float:
        return self._over_draws(1)

    @property
    def one_rounding(self) -> float:
        return max(self.least_rounding, self._over_draws(2))

    def _over_draws(self, which: int) -> float:
        errors = [draw[which] for draw in self.draws]
        return math.hypot(*errors) / math.sqrt(len(errors)) if self.pooled else max(errors)

    @property
    def objection(self) -> str:
        # Independent roundings add up in their squares. In float32 a sum in another order is as large as one.
        add = math.hypot if self.pooled and self.is_narrow else operator.add
        if self.replacement <= add(self.slack * self.original, self.one_rounding):
            return ""
        return f"less accurate: the error of {self.name} is {self.replacement:.1e}, was {self.original:.1e}"


ErrorsOf = dict[tuple[str, str, float], Errors]  # by value, norm and magnitude


def objection(errors: ErrorsOf) -> str:
    """Why the replacement is less accurate than the rule allows, or ''."""
    return next((kept.objection for kept in errors.values() if kept.objection), "")


def draws(errors: ErrorsOf) -> Iterator[int]:
    """Which draws to take, the errors of each to be noted before the next: where the first objects, several more."""
    for draw in range(MOST_DRAWS):
        if draw == 1 and not objection(errors):
            return
        yield draw


def note_errors(errors: ErrorsOf, seen: Seen, magnitude: float) -> None:
    """Keep each kind of error of this draw."""
    for name, expected in seen.truth.items():
        was, is_now = seen.original[name], seen.replacement[name]
        if not was.is_floating_point():
            continue
        few = was.numel() < FEW  # their error is a draw: take the largest of several
        alike = magnitude == 0.0  # zeros in, numbers that are all the same out: one draw, however many they are
        for norm, measure in NORMS.items():
            is_narrow = was.element_size() < 4
            slack = 2.0 if few or (not is_narrow and (alike or norm == "largest")) else SLACK
            least = torch.finfo(was.dtype).eps * (1.0 if few else LEAST_ROUNDING[norm])
            pooled = norm == "mean" and not few
            kept = errors.setdefault(
                (name, norm, 0.0 if few else magnitude), Errors(name, slack, least, pooled, is_narrow)
            )
            size = max(measure(expected), TINY)
            first, second, third = (
                measure(difference(value, expected)) / size for value in (was, is_now, expected.to(was.dtype))
            )
            kept.draws.append((first, second, third))


def largest(value: torch.Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def root_mean_square(value: torch.Tensor) -> float:
    return float(value.double().square().mean().sqrt()) if value.numel() else 0.0


def difference(value: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """value - truth in float64; infinite where one is NaN or infinite and the other is not the same."""
    value, truth = value.double(), truth.double()
    same = (value == truth) | (value.isnan() & truth.isnan())
    return torch.where(same, 0.0, (value - truth).abs()).nan_to_num(nan=math.inf)


NORMS: dict[str, Callable[[torch.Tensor], float]] = {"largest": largest, "mean": root_mean_square}
# What one more rounding may add, in units of the dtype's epsilon: to an unlucky element, and on the average of random
# ones. Of many that is 0.2; of the few hundred of a proof it was up to 0.38 in right rewrites. Numbers that are all the
# same are rounded alike: see `Errors.one_rounding`.
LEAST_ROUNDING = {"largest": 1.0, "mean": 0.4}
