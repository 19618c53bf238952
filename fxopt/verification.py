"""An optimized model against its own original forward: loss and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from fxopt.capture import OptimizedForward, original_throughout
from fxopt.float64 import float64_backward, float64_copy, float64_throughout
from fxopt.model_state import ModelState
from fxopt.precision.annotate import parameter_precisions
from fxopt.precision.instance_methods import original_forwards
from fxopt.rewrite.accuracy import FEW, SLACK
from fxopt.training_call import labels_of

ZERO = 1e-6  # of the largest gradient: what is smaller than this in float64 is zero, up to rounding


@dataclass(frozen=True)
class Comparison:
    """One value, the loss or a gradient: its error in the original and in the optimized model, against float64.

    Errors are root mean squares over the value's numbers and over the batches, relative to the value's own. `allowed`
    is 1.1 × the original's error plus one rounding of the dtype. Where that error is a matter of luck, it is 2 ×: for
    fewer than 100 numbers, for fewer than 100 labels in all batches, and where the original's error is larger than the
    value, which then is rounding alone.
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
    """What `fxopt.verify` found: the losses of the first batch, and a `Comparison` for the loss and each gradient."""

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

    @property
    def worst(self) -> tuple[Comparison, ...]:
        """The comparisons, the one that comes closest to what is allowed, or exceeds it most, first."""
        return tuple(sorted(self.comparisons, key=lambda c: c.optimized_error / max(c.allowed, 1e-30), reverse=True))

    def __rich__(self) -> RenderableType:
        table = Table("value", "original's error", "optimized's error", "allowed")
        table.title = f"{len(self.comparisons)} values compared"
        for c in self.worst[:10]:
            errors = (f"{error:.2e}" for error in (c.original_error, c.optimized_error, c.allowed))
            table.add_row(c.name, *errors, style="" if c.holds else "red")
        return table


def verify(forward: OptimizedForward, batches: Sequence[Mapping[str, Any]]) -> Verification:
    if not batches:
        raise ValueError("nothing to verify: give at least one batch, such as one that the model trains on")
    for batch in batches:
        reason = forward.why_not_covered(batch) if labels_of(batch) is not None else "the call has no labels"
        if reason:
            raise ValueError(f"nothing to verify: {reason}, so this batch runs the original forward")
    optimized = forward.model
    exact = original_forwards(float64_copy(optimized))
    sums: dict[str, Tensor] = {}  # of squares: the original's error, the optimized's, the truth
    numbers: dict[str, int] = {}
    losses: list[tuple[float, float, float]] = []
    num_labels = sum(labels.numel() for batch in batches if (labels := labels_of(batch)) is not None)
    for seed, batch in enumerate(batches):
        with original_throughout():
            plain = _loss_and_gradients(optimized, forward.original, batch, seed)
        fallbacks = forward.report.fallbacks.total()
        found = _loss_and_gradients(optimized, forward, batch, seed)
        if forward.report.fallbacks.total() > fallbacks:
            raise ValueError(f"nothing to verify: the call fell back ({', '.join(forward.report.fallbacks)})")
        with float64_throughout():
            truth = _loss_and_gradients(exact, exact.forward, _in_float64(batch), seed, float64_backward)
        losses.append((float(truth["loss"]), float(plain["loss"]), float(found["loss"])))
        for name in {**truth, **plain, **found}:
            true, *sides = (side.get(name, torch.zeros(())).double() for side in (truth, plain, found))
            squares = [_squares(side, true) for side in sides] + [true.nan_to_num(0.0, 0.0, 0.0).square().sum()]
            if sum(name in side for side in (plain, found)) == 1:
                squares[1] = true.new_tensor(math.inf)  # a gradient that the other does not have
            sums[name] = sums.get(name, torch.zeros(())) + torch.stack(squares)
            numbers[name] = true.numel()
    return Verification(*losses[0], tuple(_comparisons(sums, numbers, num_labels, _rounding(optimized))))


def _comparisons(
    sums: dict[str, Tensor], numbers: dict[str, int], num_labels: int, rounding: float
) -> list[Comparison]:
    sizes = {name: float(total[2].sqrt()) / math.sqrt(numbers[name]) for name, total in sums.items()}
    largest = max((size for name, size in sizes.items() if name != "loss" and math.isfinite(size)), default=0.0)
    comparisons = []
    for name, total in sums.items():
        # A gradient that is zero in float64, such as that of a key's bias, is measured by the others.
        size = max(sizes[name], ZERO * largest, torch.finfo(torch.float32).tiny) * math.sqrt(numbers[name])
        original, optimized = (float(error) / size for error in total[:2].sqrt())
        slack = SLACK if min(numbers[name], num_labels) >= FEW and original < 1.0 else 2.0
        comparisons.append(Comparison(name, original, optimized, slack * original + rounding))
    return comparisons


def _squares(value: Tensor, truth: Tensor) -> Tensor:
    """Σ (value - truth)²; infinite where one of two elements is nan or infinite and the other is not the same."""
    same = (value == truth) | (value.isnan() & truth.isnan())
    return torch.where(same, 0.0, value - truth).nan_to_num(nan=math.inf).square().sum()


def _rounding(model: nn.Module) -> float:
    """Half a step of the coarsest dtype that the model computes in."""
    dtypes = {precision.compute for precision in parameter_precisions(model).values()}
    dtypes = dtypes or {p.dtype for p in model.parameters() if p.is_floating_point()}
    return (
        max(torch.finfo(dtype).eps if dtype.is_floating_point else 1 / torch.iinfo(dtype).max for dtype in dtypes) / 2
    )


def _in_float64(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in batch.items()}


def _loss_and_gradients(
    model: nn.Module,
    forward: Callable[..., Any],
    batch: Mapping[str, Any],
    seed: int,
    backward: Callable[[Tensor], None] | None = None,
) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = list(named.values())

    def loss_of() -> Tensor:
        torch.manual_seed(seed)  # the same dropout in each
        return _loss_in(forward(**batch))

    state = ModelState(model)
    with torch.enable_grad():
        gradients: tuple[Tensor | None, ...]
        try:
            loss = loss_of()
            if backward is not None:
                gradients = _gradients_by(backward, loss, parameters)
            else:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            loss = loss_of()
            gradients = _gradients_by(Tensor.backward, loss, parameters)  # `autograd.grad` cannot do these
        finally:
            state.give_back()
    values = {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
    return {"loss": loss.detach(), **values}


def _loss_in(outputs: Any) -> Tensor:
    """A model output's `loss`, or a tuple's one number that has a gradient."""
    if hasattr(outputs, "loss"):
        return outputs.loss
    numbers = [value for value in outputs if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad]
    if len(numbers) != 1:
        raise ValueError(f"the model returns no `loss`, and {len(numbers)} numbers that could be one")
    return numbers[0]


def _gradients_by(
    backward: Callable[[Tensor], None], loss: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """What `backward` leaves in `.grad`, which then holds again what it held."""
    if any(parameter._post_accumulate_grad_hooks for parameter in parameters):
        raise ValueError("gradients are used inside backward here, and checkpoints are reentrant; verify without one")
    held = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        backward(loss)
        return tuple(parameter.grad for parameter in parameters)
    finally:
        for parameter, gradient in zip(parameters, held, strict=True):
            parameter.grad = gradient
