"""A state or a gradient that is not of its parameter's shape is refused, by name, before anything is changed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.precision.state_shapes import check_state


def linear(rows: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(64, rows, bias=False).to(dtype)


def optimizer_of(model: nn.Linear, kind: Any, **options: Any) -> fxopt.Optimizer:
    momentum = 0.9 if kind == "sgd" else None
    return fxopt.Optimizer([{"params": [("head.weight", model.weight)]}], kind=kind, momentum=momentum, **options)


def stepped(model: nn.Linear, kind: Any, **options: Any) -> fxopt.Optimizer:
    optimizer = optimizer_of(model, kind, **options)
    model(torch.ones(1, 64, dtype=model.weight.dtype)).sum().backward()
    optimizer.step()
    return optimizer


CASES = [
    ("adamw", 64, 128, {}),  # larger, of which the kernel would read past the state's end
    ("adamw", 128, 64, {}),  # smaller
    ("adamw", 64, 128, {"optimizer_state": "8bit"}),
    ("adamw", 64, 65, {"optimizer_state": "8bit"}),  # which stays float32
    ("adamw", 64, 128, {"optimizer_state": "4bit"}),
    ("sgd", 64, 128, {}),
    ("sgd", 64, 128, {"optimizer_state": "8bit"}),
    ("adafactor", 64, 128, {}),
    ("muon", 64, 128, {}),
]


@pytest.mark.parametrize(("kind", "before", "after", "options"), CASES)
def test_a_loaded_state_of_another_shape_is_refused(
    kind: str, before: int, after: int, options: dict[str, Any]
) -> None:
    saved = stepped(linear(before), kind, **options).state_dict()
    model = linear(after)
    optimizer = stepped(model, kind, **options)
    kept, weight = copy.deepcopy(optimizer.state_dict()), model.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"'head\.weight' has shape \({after}, 64\).*Make a new optimizer"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == kept["param_groups"] and torch.equal(model.weight, weight)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()  # with its own state


@pytest.mark.parametrize(("kind", "before", "after", "options"), CASES)
def test_a_parameter_that_is_resized_under_its_state_is_refused(
    kind: str, before: int, after: int, options: dict[str, Any]
) -> None:
    """As transformers resizes an embedding: the parameter stays the same."""
    model = linear(before)
    optimizer = stepped(model, kind, clip_grad_norm=1e-3, **options)
    optimizer.zero_grad()
    model.weight.data = torch.ones(after, 64)
    model(torch.ones(1, 64)).sum().backward()
    gradient = model.weight.grad.clone()
    with pytest.raises(ValueError, match=rf"\({after}, 64\), and its state '\w+' has \(.*\) where \(.*\) is needed"):
        optimizer.step()
    assert torch.equal(model.weight, torch.ones(after, 64)) and torch.equal(model.weight.grad, gradient)
    assert optimizer.state[model.weight]["step"] == 1


def test_a_compensation_of_another_shape_is_refused() -> None:
    saved = stepped(linear(64, torch.bfloat16), "sgd", rounding="kahan").state_dict()
    with pytest.raises(ValueError, match=r"'compensation' has \(64, 64\) where \(32, 64\)|'momentum_buffer' has"):
        optimizer_of(linear(32, torch.bfloat16), "sgd", rounding="kahan").load_state_dict(saved)


def test_a_gradient_of_another_shape_is_refused() -> None:
    model = linear(64)
    optimizer = stepped(model, "adamw")
    model.weight.data = torch.ones(128, 64)  # and its gradient stays
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'head.weight' has shape \(64, 64\).*zero_grad"):
        optimizer.step()


@pytest.mark.parametrize(("saved", "loading"), [("sgd", "adamw"), ("adamw", "adafactor")])
def test_a_state_of_another_kind_is_refused(saved: str, loading: str) -> None:
    state = stepped(linear(64), saved).state_dict()
    del state["param_groups"][0]["kind"]  # as torch's own optimizers have none
    with pytest.raises(ValueError, match=rf"holds .* and no '\w+': it is not one of kind='{loading}'"):
        optimizer_of(linear(64), loading).load_state_dict(state)


class Shard:
    """What an update reads of a sharded state: this rank's part."""

    def __init__(self, whole: Tensor, part: Tensor) -> None:
        self.shape, self._part = whole.shape, part

    def to_local(self) -> Tensor:
        return self._part


def test_a_state_that_is_sharded_in_another_way_is_refused() -> None:
    weight: Any = Shard(torch.ones(8, 2), torch.ones(4, 2))
    group = {"params": [weight], "param_names": ["head.weight"]}
    with pytest.raises(ValueError, match=r"this rank holds \(4, 2\).*'exp_avg' \(8, 2\).*set_optimizer_state_dict"):
        check_state(weight, {"exp_avg": torch.ones(8, 2), "exp_avg_sq": torch.ones(8, 2)}, group, "adamw")
