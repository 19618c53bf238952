"""Arguments that cannot be are refused in a sentence that names the argument and says what it takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.inspection.configurations import MOST_TOKENS, UnknownModelError, check_batch, check_sizes

NUMBER = "it takes a finite number from 0 on"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "1e-3"}, f"lr='1e-3' is out of range; {NUMBER}"),
        ({"lr": float("inf")}, f"lr=inf is out of range; {NUMBER}"),
        ({"lr": float("nan")}, f"lr=nan is out of range; {NUMBER}"),
        ({"lr": None}, f"lr=None is out of range; {NUMBER}"),
        ({"lr": True}, f"lr=True is out of range; {NUMBER}"),
        ({"lr": torch.ones(2)}, r"lr=tensor\(\[1., 1.\]\) is out of range"),
        ({"betas": None}, r"betas=None .* it takes two numbers from 0 to below 1"),
        ({"betas": 0.9}, r"betas=0.9 .* it takes two numbers"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\) .* it takes two numbers"),
        ({"betas": (0.9, "0.999")}, r"betas=\(0.9, '0.999'\) .* it takes two numbers"),
        ({"eps": "1e-8"}, f"eps='1e-8' is out of range; {NUMBER}"),
        ({"weight_decay": [0.1]}, rf"weight_decay=\[0.1\] is out of range; {NUMBER}"),
        ({"weight_decay": float("nan")}, f"weight_decay=nan is out of range; {NUMBER}"),
        ({"kind": "lion"}, "kind='lion' .* one of 'adamw', 'sgd', 'adafactor', 'muon'"),
        ({"kind": ["sgd"]}, r"kind=\['sgd'\] .* one of 'adamw'"),
        ({"no_decay": ["norm"]}, r"no_decay=\['norm'\] is no text; it takes roles, separated by commas"),
        ({"no_decay": "nrom"}, "no_decay='nrom': .*roles: norm"),
        ({"kind": "sgd", "nesterov": True}, "nesterov=True .* there is none: give momentum=0.9"),
        ({"kind": "sgd", "momentum": "0.9"}, "momentum='0.9' .* a number from 0 on"),
        ({"momentum": 0.9}, "momentum=0.9 is of kind='sgd' and kind='muon'; kind='adamw' has none"),
        ({"kind": "adafactor", "nesterov": True}, "nesterov=True is of kind='sgd'.*leave it out"),
        ({"seed": "0"}, "seed='0' .* a whole number"),
        ({"clip_grad_norm": "1"}, "clip_grad_norm='1' must be a number above 0"),
        ({"clip_by": "all"}, "clip_by='all' is none of global"),
        ({"release_gradients": "no"}, "release_gradients='no' is neither True nor False"),
    ],
)
def test_the_optimizers_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fxopt.optimizer(nn.Linear(2, 2), **options)


def test_options_as_they_come_are_taken() -> None:
    model = nn.Linear(2, 2)
    fxopt.optimizer(model, torch.tensor([1e-3]), betas=[torch.tensor(0.9), 0.99], eps=0, no_decay="bias, norm")
    fxopt.optimizer(model, kind="sgd", momentum=0.9, nesterov=True)
    fxopt.Optimizer([{"params": [model.weight], "kind": "sgd", "nesterov": True}, {"params": model.bias}], momentum=0.9)
    with pytest.raises(ValueError, match="nesterov=True"):
        fxopt.Optimizer(model.parameters(), kind="sgd", nesterov=True)


@pytest.mark.parametrize("function", ["optimize", "annotate", "optimizer", "footprint", "report", "restore", "verify"])
@pytest.mark.parametrize("given", [nn.Linear(1, 1).parameters(), [], "model", None])
def test_what_is_no_model(function: str, given: object) -> None:
    with pytest.raises(TypeError, match=rf"fxopt\.{function} takes the model, a torch.nn.Module, not "):
        getattr(fxopt, function)(given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' is on the meta device and holds no values: load"),
        (lambda: nn.LazyLinear(2), "'weight' is lazy and has no shape yet: run the model once"),
    ],
)
def test_models_without_values(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fxopt.optimizer(make())


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True, 10**15])
def test_sizes_that_cannot_be(size: Any) -> None:
    for function in (fxopt.inspect, fxopt.plan):
        with pytest.raises(ValueError, match="batch_size is "):
            function("llama", batch_size=size)
    if size != 10**15:
        with pytest.raises(ValueError, match=r"num_devices is .*a whole number from 1 on"):
            check_sizes(num_devices=size)


def test_the_most_tokens_of_a_batch() -> None:
    check_batch(MOST_TOKENS // 2048, 2048)
    with pytest.raises(ValueError, match=f"at most {MOST_TOKENS // 2048}, .* rows of one micro-batch on one device"):
        check_batch(MOST_TOKENS // 2048 + 1, 2048)


def test_names_that_are_none() -> None:
    with pytest.raises(UnknownModelError, match="5 is no model, configuration, name or path"):
        fxopt.inspect(5)  # type: ignore[arg-type]
    with pytest.raises(fxopt.PolicyError, match=r"by its name, one of fp32, .*got 5"):
        fxopt.Policy.named(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples='4' must be a whole number"):
        fxopt.monitor(torch.optim.SGD(nn.Linear(1, 1).parameters()), samples="4")  # type: ignore[arg-type]
