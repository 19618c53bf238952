"""An optimized model against its own original forward: loss and every gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from fxopt.capture import OptimizedForward

SLACK = 1.1


@dataclass(frozen=True)
class Comparison:
    """One value: its error against float32 in the original and in the optimized model.

    Errors are root mean squares, relative to the value's own. `allowed` is 1.1 × the original's error plus one
    rounding in the model's dtype.
    """

    name: str
    original_error: float
    optimized_error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.optimized_error <= self.allowed


@dataclass(frozen=True)
class Verification:
    """The outcome of `fxopt.verify`: the losses, and a `Comparison` for the loss and for each gradient."""

    loss_float32: float
    loss_original: float
    loss_optimized: float
    comparisons: tuple[Comparison, ...]

    @property
    def holds(self) -> bool:
        return all(comparison.holds for comparison in self.comparisons)

    @property
    def failures(self) -> tuple[Comparison, ...]:
        return tuple(comparison for comparison in self.comparisons if not comparison.holds)

    def __rich__(self) -> RenderableType:
        table = Table("value", "original's error", "optimized's error", "allowed")
        table.title = f"{len(self.comparisons)} values compared"
        worst = sorted(self.comparisons, key=lambda c: c.optimized_error / max(c.allowed, 1e-30), reverse=True)
        for c in worst[:10]:
            errors = (f"{error:.2e}" for error in (c.original_error, c.optimized_error, c.allowed))
            table.add_row(c.name, *errors, style="" if c.holds else "red")
        return table


def verify(model: nn.Module, forward: OptimizedForward, batch: Mapping[str, Any]) -> Verification:
    reason = forward.why_not_covered(batch)
    if reason:
        raise ValueError(f"nothing to verify: {reason}, so this batch runs the original forward")
    optimized = forward.model
    was_original = _loss_and_gradients(optimized, forward.original, batch)
    was_optimized = _loss_and_gradients(optimized, forward, batch)
    exact = copy.deepcopy(optimized).float()
    exact.__dict__.pop("forward", None)
    truth = _loss_and_gradients(exact, exact.forward, batch)
    rounding = max(torch.finfo(p.dtype).eps for p in optimized.parameters() if p.is_floating_point()) / 2
    comparisons = []
    for name, value in truth.items():
        scale = max(_root_mean_square(value), torch.finfo(torch.float32).tiny)
        errors = [_root_mean_square(side[name].float() - value) / scale for side in (was_original, was_optimized)]
        comparisons.append(Comparison(name, errors[0], errors[1], SLACK * errors[0] + rounding))
    losses = [float(side["loss"]) for side in (truth, was_original, was_optimized)]
    if any(math.isnan(loss) for loss in losses) and not all(math.isnan(loss) for loss in losses):
        comparisons.append(Comparison("loss", 0.0, math.inf, 0.0))
    return Verification(losses[0], losses[1], losses[2], tuple(comparisons))


def _loss_and_gradients(model: nn.Module, forward: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # the same dropout in each
        loss = forward(**batch).loss
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    values = {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
    return {"loss": loss.detach(), **values}


def _root_mean_square(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())
