"""Whether two models train alike: loss and every gradient against float64, or all parameters bit by bit."""

import torch
from torch import Tensor, nn

import fxopt
from fxopt.precision.parameter_storage import is_int8


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter's gradient that there is, under the parameter's name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_alike(model, batch, **options):
    """Loss and every gradient by the accuracy rule; the same parameters get gradients.

    Three batches: a whole model's error in one number is a matter of luck.
    """
    batches = []
    for turn in range(3):
        turned = {**batch, "input_ids": batch["input_ids"].roll(turn, 0), "labels": batch["labels"].roll(turn, 0)}
        turned["input_ids"] = (turned["input_ids"] + turn) % model.config.vocab_size
        batches.append({**turned, **options})
    outcome = fxopt.verify(model, *batches)
    assert outcome.holds, outcome.failures


def assert_same_parameters(left: nn.Module, right: nn.Module) -> None:
    """Bit by bit, int8 codes and scales too."""
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        parts = ("int_data", "scale") if is_int8(a) else ("data",)
        for part in parts:
            assert torch.equal(getattr(a, part), getattr(b, part)), name
