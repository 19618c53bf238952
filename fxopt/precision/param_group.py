"""What a param group of `fxopt.optimizer` may hold, and the errors that say what it may not."""

from typing import Any, get_args

import torch
from torch import Tensor

from fxopt.kernels.rounding import Rounding
from fxopt.precision import optimizer_states
from fxopt.precision.optimizer_kinds import RULES, Kind
from fxopt.precision.parameter_storage import is_int8, is_wrapper, local
from fxopt.precision.policy import OptimizerState


def place_of(group: dict[str, Any], parameter: Tensor) -> int:
    """Where a parameter is in its group."""
    return next(place for place, other in enumerate(group["params"]) if other is parameter)


def name_of(group: dict[str, Any], place: int) -> str:
    """A parameter in words, by its name if the group has names."""
    names = group.get("param_names")
    shape = tuple(group["params"][place].shape)
    return f"parameter {names[place]!r}" if names else f"parameter {place} of its group, of shape {shape},"


def check_parameter(parameter: Tensor, group: dict[str, Any], place: int) -> None:
    """Raises TypeError, or what the kind's rule raises, for a parameter that cannot be updated as its group says."""
    name = name_of(group, place)
    if is_int8(parameter):
        pass
    elif is_wrapper(parameter):
        raise TypeError(
            f"{name} is a {type(parameter).__name__}, not a plain tensor: freeze it (requires_grad_(False)) or train "
            "it with the optimizer of the library that quantized it"
        )
    elif parameter.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"{name} is {parameter.dtype}, and fxopt.optimizer updates torch.float32 and torch.bfloat16: convert the "
            "model with fxopt.annotate(model, 'bf16'), or freeze the parameter"
        )
    elif hasattr(parameter, "to_local") and optimizer_states.quantizes(
        local(parameter).numel(), group["optimizer_state"]
    ):
        raise TypeError(
            f"{name} is sharded, and {group['optimizer_state']} optimizer states are not: use optimizer_state='float32'"
        )
    RULES[group["kind"]].check(parameter, name)


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError for an option that is out of range, by its name."""
    beta1, beta2 = group["betas"]
    for option, value, right in (
        ("lr", group["lr"], float(group["lr"]) >= 0),
        ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("eps", group["eps"], group["eps"] >= 0),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
        ("kind", group["kind"], group["kind"] in get_args(Kind)),
        ("momentum", group["momentum"], group["momentum"] is None or group["momentum"] >= 0),
        ("rounding", group["rounding"], group["rounding"] in get_args(Rounding)),
        ("optimizer_state", group["optimizer_state"], group["optimizer_state"] in get_args(OptimizerState)),
        ("seed", group["seed"], isinstance(group["seed"], int)),
    ):
        if not right:
            raise ValueError(f"fxopt.optimizer: {option}={value!r} is out of range")
