"""Errors of a model's loss and gradients against float64, for a model and its original side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingError:
    """Root mean squares over batches, of the loss ("loss") or of one parameter's gradient (its name)."""

    name: str
    error: float  # of the model
    original_error: float
    size: float  # of the truth

    def allowed(self, rounding: float) -> float:
        """The accuracy rule: original_error * 1.1 + one rounding.

        transformers rounds the loss to float32, in the float64 model too: between two losses are two roundings.
        """
        roundings = 2 if self.name == "loss" else 1
        return 1.1 * self.original_error + roundings * rounding * self.size


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter's gradient that there is, under the parameter's name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model: nn.Module, batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The loss under "loss", and the gradient of each parameter that gets one under its name."""
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def training_errors(
    model: nn.Module, original: nn.Module, batches: Iterable[dict[str, Any]], **options: Any
) -> list[TrainingError]:
    """Compares both models with `original` in float64. A result that is nan in float64 must be nan in both.

    Raises AssertionError where `model` has a loss or gradients where `original` has none, or the reverse.
    """
    exact: Any = copy.deepcopy(original).double()
    if getattr(getattr(exact, "config", None), "_experts_implementation", None) == "grouped_mm":
        exact.set_experts_implementation("batched_mm")  # torch's grouped product has no float64
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        results = []
        for each in (model, original, exact):
            torch.manual_seed(number)
            results.append(loss_and_gradients(each, batch, **options))
        found, plain, truth = results
        assert set(found) == set(plain), f"gradients differ: {sorted(set(found) ^ set(plain))}"
        for name, true in truth.items():
            if true.isnan().any():
                assert found[name].isnan().equal(plain[name].isnan()), f"nan in other places: {name}"
                continue
            sides = (found[name] - true, plain[name] - true, true)
            squares = torch.stack([side.double().square().sum() for side in sides])
            sums[name] = sums.get(name, 0) + squares
    return [TrainingError(name, *total.sqrt().tolist()) for name, total in sums.items()]
