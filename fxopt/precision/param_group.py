"""Which param groups the policy makes, what a group of `fxopt.optimizer` may hold, and the errors that say it."""

import math
from typing import Any, SupportsFloat, get_args

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fxopt.kernels.rounding import Rounding
from fxopt.precision import optimizer_states
from fxopt.precision.annotate import parameter_precision
from fxopt.precision.optimizer_kinds import RULES, Kind
from fxopt.precision.parameter_storage import is_int8, is_wrapper, local
from fxopt.precision.policy import OptimizerState, Precision
from fxopt.precision.roles import Role


def rounding_and_state(precision: Precision | None) -> dict[str, Any]:
    """The options of `Optimizer` that a parameter's precision asks for."""
    if precision is None:
        return {"rounding": "stochastic", "optimizer_state": "float32"}
    # What is stored in float32 is not rounded; but should a policy that comes later store it in bfloat16, it must be.
    rounding = "stochastic" if precision.storage == torch.float32 else precision.rounding
    return {"rounding": rounding, "optimizer_state": precision.optimizer_state}


def by_precision(options: dict[str, Any], param_group: dict[str, Any]) -> list[dict[str, Any]]:
    """`param_group` with the rounding and states that its `options` leave to the policy: one group for each choice."""
    left = [name for name in ("rounding", "optimizer_state") if options[name] is None]
    params = param_group["params"]
    if not left or isinstance(params, set):  # which torch refuses, in its words
        return [param_group]
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in [params] if isinstance(params, Tensor) else params:
        parameter = entry[1] if isinstance(entry, tuple) else entry
        asked = rounding_and_state(parameter_precision(parameter) if isinstance(parameter, Tensor) else None)
        chosen = {name: asked[name] for name in left}
        group = groups.setdefault(tuple(chosen.values()), {**param_group, **chosen, "params": []})
        group["params"].append(entry)
    return list(groups.values()) or [{**param_group, **rounding_and_state(None)}]


def place_of(group: dict[str, Any], parameter: Tensor) -> int:
    """Where a parameter is in its group."""
    return next(place for place, other in enumerate(group["params"]) if other is parameter)


def name_of(group: dict[str, Any], place: int) -> str:
    """A parameter in words, by its name if the group has names."""
    names = group.get("param_names")
    shape = tuple(group["params"][place].shape)
    return f"parameter {names[place]!r}" if names else f"parameter {place} of its group, of shape {shape},"


def check_parameter(parameter: Tensor, group: dict[str, Any], place: int) -> None:
    """Raises ValueError for a parameter without values, TypeError or what the kind's rule raises for one of a form that
    cannot be updated as its group says.
    """
    names = group.get("param_names")
    require_values(names[place] if names else str(place), parameter)
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


def require_values(name: str, parameter: Tensor) -> None:
    """Raises ValueError for a parameter that has no shape or no values yet."""
    if is_lazy(parameter):
        raise ValueError(
            f"parameter {name!r} is lazy and has no shape yet: run the model once, then make its optimizer"
        )
    if parameter.device.type == "meta":
        raise ValueError(
            f"parameter {name!r} is on the meta device and holds no values: load the model's weights first "
            "(from_pretrained without device_map='meta' or offloading), then make its optimizer"
        )


def check_memory(groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where two parameters lie in the same memory: each update would be made twice.

    So are tied weights after `load_state_dict(…, assign=True)`, which gives each of their names a parameter of its own.
    """
    known: dict[tuple[Any, ...], str] = {}
    for group in groups:
        for place, parameter in enumerate(group["params"]):
            plain = type(parameter) in (Tensor, torch.nn.Parameter) and parameter.requires_grad and parameter.numel()
            if not plain or not parameter.data_ptr():
                continue
            name, memory = name_of(group, place), (parameter.device, parameter.data_ptr(), parameter.numel())
            if (other := known.setdefault(memory, name)) != name:
                raise ValueError(
                    f"each update would be made twice, since {other.rstrip(',')} and {name.rstrip(',')} lie in the "
                    "same memory: tie them (model.tie_weights(), or a.weight = b.weight), then make the optimizer"
                )


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError for an option that is out of range or of another type, by its name, with what it takes."""
    for option, value, right, takes in (
        ("lr", group["lr"], _is_number(group["lr"]), "a finite number from 0 on, such as 1e-3, or a tensor of one"),
        ("betas", group["betas"], _are_betas(group["betas"]), "two numbers from 0 to below 1, such as (0.9, 0.999)"),
        ("eps", group["eps"], _is_number(group["eps"]), "a finite number from 0 on, such as 1e-8"),
        ("weight_decay", group["weight_decay"], _is_number(group["weight_decay"]), "a finite number from 0 on"),
        ("kind", group["kind"], group["kind"] in get_args(Kind), _one_of(Kind)),
        ("momentum", group["momentum"], _is_number(group["momentum"], or_none=True), "a number from 0 on, or None"),
        ("nesterov", group["nesterov"], group["nesterov"] in (None, True, False), "True, False or None"),
        ("rounding", group["rounding"], group["rounding"] in get_args(Rounding), _one_of(Rounding)),
        (
            "optimizer_state",
            group["optimizer_state"],
            group["optimizer_state"] in get_args(OptimizerState),
            _one_of(OptimizerState),
        ),
        ("seed", group["seed"], isinstance(group["seed"], int), "a whole number"),
    ):
        if not right:
            raise ValueError(f"fxopt.optimizer: {option}={value!r} is out of range; it takes {takes}")
    if group["nesterov"] and group["kind"] == "sgd" and not group["momentum"]:
        raise ValueError(
            "fxopt.optimizer: nesterov=True looks ahead along the momentum, and there is none: give momentum=0.9, or "
            "leave nesterov out"
        )


def check_usable(kind: object, momentum: object, nesterov: object) -> None:
    """Raises ValueError for an option that is given, and that no parameter's kind would use."""
    for option, value in (("momentum", momentum), ("nesterov", nesterov)):
        if value is not None and kind in ("adamw", "adafactor"):
            raise ValueError(
                f"fxopt.optimizer: {option}={value!r} is of kind='sgd' and kind='muon'; kind={kind!r} has none: leave "
                "it out"
            )


def roles_named(no_decay: str | None) -> frozenset[Role]:
    """The roles in `no_decay`. Raises ValueError for what is not their names, separated by commas."""
    takes = f"it takes roles, separated by commas, such as 'norm,bias'; roles: {', '.join(Role)}"
    if no_decay is not None and not isinstance(no_decay, str):
        raise ValueError(f"fxopt.optimizer: no_decay={no_decay!r} is no text; {takes}")
    try:
        return frozenset(Role(role.strip()) for role in (no_decay or "").split(",") if role.strip())
    except ValueError as error:
        raise ValueError(f"fxopt.optimizer: no_decay={no_decay!r}: {error}; {takes}") from None


def _is_number(value: Any, *, or_none: bool = False) -> bool:
    """Whether `value`, or the one value of a tensor, is a finite number from 0 on."""
    if torch.is_tensor(value):
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            return False
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        return or_none and value is None
    return 0 <= float(value) < math.inf


def _are_betas(betas: Any) -> bool:
    is_pair = isinstance(betas, tuple | list) and len(betas) == 2
    return is_pair and all(_is_number(beta) and float(beta) < 1 for beta in betas)


def _one_of(names: Any) -> str:
    return "one of " + ", ".join(map(repr, get_args(names)))
