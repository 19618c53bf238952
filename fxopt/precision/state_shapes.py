"""Whether gradients and optimizer states belong to their parameters: compared before anything is changed.

The update rules read a state by ranges of its parameter's elements, and do not look whether it has as many.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxopt.precision.param_group import name_of, place_of
from fxopt.precision.parameter_storage import local

# Adafactor's means, and the dimension that each is taken over; every other state has the parameter's shape.
_MEANS = {"row_var": -1, "col_var": -2}
_SHAPED = {"exp_avg", "exp_avg_sq", "momentum_buffer", "variance", "compensation", *_MEANS}


def check_gradient(parameter: Tensor, group: dict[str, Any]) -> None:
    """Raises RuntimeError for a gradient that is sparse or, since the parameter was resized, of another shape."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {_name(parameter, group)} is sparse, and fxopt.optimizer updates dense ones; build the "
            "embedding with sparse=False"
        )
    if gradient.shape != parameter.shape:
        raise RuntimeError(
            f"the gradient of {_name(parameter, group)} has shape {tuple(gradient.shape)}, and the parameter has "
            f"{tuple(parameter.shape)}: call optimizer.zero_grad() before the parameter is resized"
        )


def check_state(parameter: Tensor, state: Mapping[str, Any], group: dict[str, Any], kind: str) -> None:
    """Compares a state, and this rank's part of it, with its parameter. An empty one is made at the first step.

    Raises ValueError, which names the parameter and gives both shapes, for a state of another shape, for one that is
    sharded in another way, and for one of another kind of optimizer.
    """
    for name, value in state.items():
        if name not in _SHAPED or not torch.is_tensor(value):
            continue
        shape = tuple(value.shape)
        if shape != (expected := _expected(parameter, name)):
            raise ValueError(
                f"{_name(parameter, group)} has shape {tuple(parameter.shape)}, and its state {name!r} has {shape} "
                f"where {expected} is needed: the parameter was resized, or the state is of another model. Make a new "
                "optimizer for the model as it is, fxopt.optimizer(model, …), and go on without the old state"
            )
        held = tuple(local(value).shape)
        if held != (expected := _expected(local(parameter), name)):
            raise ValueError(
                f"of {_name(parameter, group)} this rank holds {tuple(local(parameter).shape)}, and of its state "
                f"{name!r} {held} where {expected} is needed: load the state with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which shards it as the model is"
            )
    missing = [name for name in _needed(parameter, kind) if name not in state]
    if missing and any(name in _SHAPED for name in state):
        raise ValueError(
            f"the state of {_name(parameter, group)} holds {', '.join(map(str, state))} and no {missing[0]!r}: it is "
            f"not one of kind={kind!r}. Give the optimizer the kind that the state was made by, or go on without it"
        )


def _name(parameter: Tensor, group: dict[str, Any]) -> str:
    return name_of(group, place_of(group, parameter))


def _expected(parameter: Tensor, name: str) -> tuple[int, ...]:
    """The shape of a parameter's state of this name."""
    sizes = list(parameter.shape)
    if name in _MEANS and len(sizes) > 1:
        sizes[_MEANS[name]] = 1
    return tuple(sizes)


def _needed(parameter: Tensor, kind: str) -> tuple[str, ...]:
    """The states without which the kind cannot go on; the others make what is missing."""
    if kind == "adamw":
        return "exp_avg", "exp_avg_sq"
    if kind == "adafactor":
        return tuple(_MEANS) if parameter.dim() > 1 else ("variance",)
    return ()
