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
from fxopt.rewrite.prove import FEW, SLACK


@dataclass(frozen=True)
class Comparison:
    """One value: its error in the original and in the optimized model, against float64.

    Against float32 where the model cannot be run in float64. Errors are root mean squares, relative to the value's
    own. `allowed` is 1.1 × the original's error (2 × for fewer than 100 numbers) plus one rounding of the dtype.
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

    loss_exact: float
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
    truth = _truth(optimized, batch)
    rounding = max(torch.finfo(p.dtype).eps for p in optimized.parameters() if p.is_floating_point()) / 2
    comparisons = []
    for name, value in truth.items():
        scale = max(_root_mean_square(value), torch.finfo(torch.float32).tiny)
        errors = [_root_mean_square(side[name].to(value) - value) / scale for side in (was_original, was_optimized)]
        # transformers takes the loss in float32, whatever the model's dtype: two roundings lie between two losses.
        roundings = 2 if name == "loss" else 1
        slack = SLACK if value.numel() >= FEW else 2.0
        comparisons.append(Comparison(name, errors[0], errors[1], slack * errors[0] + roundings * rounding))
    losses = [float(side["loss"]) for side in (truth, was_original, was_optimized)]
    if any(math.isnan(loss) for loss in losses) and not all(math.isnan(loss) for loss in losses):
        comparisons.append(Comparison("loss", 0.0, math.inf, 0.0))
    return Verification(losses[0], losses[1], losses[2], tuple(comparisons))


def _truth(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        return _in_dtype(torch.float64, model, batch)
    except RuntimeError:  # an operation that has no float64, such as torch's grouped matrix product
        return _in_dtype(torch.float32, model, batch)


def _in_dtype(dtype: torch.dtype, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    exact = copy.deepcopy(model).to(dtype)
    exact.__dict__.pop("forward", None)
    floating = {n: v.to(dtype) for n, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return _loss_and_gradients(exact, exact.forward, {**batch, **floating})


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
