"""Whether an optimized model trains as its original does: the loss and every gradient, against float64."""

import copy

import torch

import fxopt
from benchmarks.training_errors import training_errors


def assert_trains_alike(model, batch, **options):
    """Loss and every gradient by the accuracy rule; the same parameters get gradients.

    Errors are root mean squares over three batches: a whole model's error in one number is a matter of luck.
    """
    batches = []
    for turn in range(3):
        turned = {**batch, "input_ids": batch["input_ids"].roll(turn, 0), "labels": batch["labels"].roll(turn, 0)}
        turned["input_ids"] = (turned["input_ids"] + turn) % model.config.vocab_size
        batches.append(turned)
    rounding = torch.finfo(model.dtype).eps / 2
    for error in training_errors(model, fxopt.restore(copy.deepcopy(model)), batches, **options):
        assert error.error <= error.allowed(rounding), error
