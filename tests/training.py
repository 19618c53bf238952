"""Whether an optimized model trains as its original does: the loss and every gradient, against float64."""

import copy

import torch
from torch import nn

import fxopt


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_trains_alike(model, batch, **options):
    """Loss and every gradient, against float64, by the accuracy rule; the same parameters get gradients.

    Errors are root mean squares over three batches: a whole model's error in one number is a matter of luck.
    """
    plain = fxopt.restore(copy.deepcopy(model))
    exact = copy.deepcopy(plain).double()
    rounding = torch.finfo(model.dtype).eps / 2
    errors: dict[str, list[torch.Tensor]] = {}
    for turn in range(3):
        turned = {**batch, "input_ids": batch["input_ids"].roll(turn, 0), "labels": batch["labels"].roll(turn, 0)}
        turned["input_ids"] = (turned["input_ids"] + turn) % model.config.vocab_size
        found, eager, truth = (loss_and_gradients(m, turned, **options) for m in (model, plain, exact))
        assert set(found) == set(eager)
        for name, true in truth.items():
            if true.isnan().any():
                assert found[name].isnan().equal(eager[name].isnan()), name
                continue
            sums = torch.stack([(side - true).double().square().sum() for side in (found[name], eager[name], 0 * true)])
            errors.setdefault(name, []).append(sums)
    for name, sums in errors.items():
        error, eager_error, size = torch.stack(sums).sum(0).sqrt()
        # transformers rounds the loss to float32 in the float64 model too, so there are two roundings between them.
        allowed = 2 * rounding if name == "loss" else rounding
        assert error <= 1.1 * eager_error + allowed * size, (name, error / size, eager_error / size)
