"""The optimizer that a policy asks for: AdamW with float32 arithmetic and states over two-byte parameters."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxopt.kernels.adamw import Rounding, foreach_adamw_
from fxopt.precision.annotate import parameter_precisions
from fxopt.precision.roles import Role, parameter_roles

_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer(
    model: nn.Module,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    no_decay: str | None = None,
    seed: int = 0,
) -> "AdamW":
    """AdamW for `model` as its policy asks; the arguments and their defaults are those of `torch.optim.AdamW`.

    An annotated model's parameters are rounded as its policy says, those of any other model stochastically where they
    are bfloat16. States are float32 always: 8 bytes per parameter.

    no_decay: roles that get no weight decay, separated by commas: "norm,bias". Default: none, as in torch.
    seed: of the rounding noise.

    Raises ValueError (no trainable parameter, unknown role in `no_decay`, option out of range), TypeError (a trainable
    parameter that is neither float32 nor bfloat16, or a quantized one).
    """
    exempt = _roles_named(no_decay)
    roles = parameter_roles(model)
    precisions = parameter_precisions(model)
    groups: dict[tuple[bool, Rounding], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        rounding = precisions[name].rounding if name in precisions else "nearest"
        groups.setdefault((roles[name] in exempt, rounding), []).append((name, parameter))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to optimize")
    return AdamW(
        [
            {"params": named, "rounding": rounding, "weight_decay": 0.0 if exempted else weight_decay}
            for (exempted, rounding), named in groups.items()
        ],
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        seed=seed,
    )


class AdamW(torch.optim.Optimizer):
    """AdamW over float32 and bfloat16 parameters: float32 arithmetic, float32 states, stochastic rounding of bfloat16.

    Arguments and defaults are those of `torch.optim.AdamW`, plus `rounding` ("stochastic" or "nearest") and `seed` of
    the noise. The noise is a pure function of (seed, number of the parameter's step, place of the parameter), so
    training resumed from `state_dict` continues bit by bit. Formula and source: `fxopt.kernels.adamw`.

    State per parameter, as in torch: `step` () float32 on the CPU; `exp_avg`, `exp_avg_sq` (...) float32.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: Rounding = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(cast(Any, params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as `torch.optim.Optimizer` does; refuses parameters and options that cannot be trained with."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for place, parameter in enumerate(group["params"]):
                if parameter.requires_grad:
                    _check_parameter(parameter, _name(group, place))
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient are left alone. Returns what `closure` returns.

        Raises RuntimeError for a sparse gradient, before any parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._add_states()
        index = 0
        for group in self.param_groups:
            params, grads, states, indices = [], [], [], []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    params.append(_local(parameter))
                    grads.append(_local(parameter.grad))
                    states.append(self.state[parameter])
                    indices.append(index)
                index += 1
            for state in states:
                state["step"] += 1
            foreach_adamw_(
                params,
                grads,
                [_local(state["exp_avg"]) for state in states],
                [_local(state["exp_avg_sq"]) for state in states],
                [state["step"] for state in states],
                lr=float(group["lr"]),
                beta1=float(group["betas"][0]),
                beta2=float(group["betas"][1]),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                rounding=group["rounding"],
                seed=group["seed"],
                indices=indices,
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as `torch.optim.Optimizer` does, but keeps its moments float32.

        torch casts the moments to the parameter's dtype: through bfloat16, a resumed run would leave its path at once.
        The state of a `torch.optim.AdamW` is accepted too.
        """

        def keep(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            groups = [
                {"rounding": mine["rounding"], "seed": mine["seed"], **saved}  # torch.optim.AdamW saves neither
                for mine, saved in zip(self.param_groups, loaded["param_groups"], strict=False)
            ]
            kept = {key: _Kept(state) for key, state in loaded["state"].items()}
            return {**loaded, "state": kept, "param_groups": groups + loaded["param_groups"][len(groups) :]}

        # Registered last, so that it sees what the caller's own hooks have made of the state.
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for parameter, values in state["state"].items():
            if isinstance(values, _Kept):
                state["state"][parameter] = values.on(parameter)
        super().__setstate__(state)

    def _add_states(self) -> None:
        """Zeros for the parameters that are updated for the first time.

        Moments of one device lie in one piece of memory. One by one they would settle in the gaps that the first
        backward pass has left behind, and every later step would need its activations elsewhere.
        """
        fresh: dict[torch.device, list[Tensor]] = {}
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None and not self.state.get(parameter):
                    _check_parameter(parameter, _name(group, place))  # frozen when it was added, trained now
                    if hasattr(parameter, "to_local"):
                        self.state[parameter] = _zero_state(
                            parameter, *(torch.zeros_like(parameter, dtype=torch.float32) for _ in _MOMENTS)
                        )
                    else:
                        fresh.setdefault(parameter.device, []).append(parameter)
        for device, parameters in fresh.items():
            sizes = [parameter.numel() for parameter in parameters]
            pieces = [torch.zeros(sum(sizes), device=device).split(sizes) for _ in _MOMENTS]
            for parameter, *moments in zip(parameters, *pieces, strict=True):
                self.state[parameter] = _zero_state(parameter, *moments)

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"the gradient of {_name(group, place)} is sparse, and AdamW updates dense ones; "
                        "build the embedding with sparse=False"
                    )


class _Kept:
    """One parameter's loaded state. torch's loading casts tensors, and what is in lists and dicts, but not this."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def on(self, parameter: Tensor) -> dict[str, Any]:
        loaded = dict(self.values)
        loaded["step"] = torch.as_tensor(loaded["step"], dtype=torch.float32, device="cpu")
        for moment in _MOMENTS:
            loaded[moment] = loaded[moment].to(parameter.device, torch.float32).contiguous()
        return loaded


def _zero_state(parameter: Tensor, *moments: Tensor) -> dict[str, Tensor]:
    named = {name: moment.view(parameter.shape) for name, moment in zip(_MOMENTS, moments, strict=True)}
    return {"step": torch.zeros((), dtype=torch.float32), **named}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (FSDP2), which shares its memory. AdamW needs no other part."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor.detach()


def _name(group: dict[str, Any], place: int) -> str:
    names = group.get("param_names")
    shape = tuple(group["params"][place].shape)
    return f"parameter {names[place]!r}" if names else f"parameter {place} of its group, of shape {shape},"


def _check_parameter(parameter: Tensor, name: str) -> None:
    if hasattr(type(parameter), "__tensor_flatten__") and not hasattr(parameter, "to_local"):
        raise TypeError(
            f"{name} is a {type(parameter).__name__}, not a plain tensor: freeze it (requires_grad_(False)) or train "
            "it with the optimizer of the library that quantized it"
        )
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"{name} is {parameter.dtype}, and AdamW updates torch.float32 and torch.bfloat16: convert the model with "
            "fxopt.annotate(model, 'bf16'), or freeze the parameter"
        )


def _check_options(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for option, value, right in (
        ("lr", group["lr"], float(group["lr"]) >= 0),
        ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("eps", group["eps"], group["eps"] >= 0),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
        ("rounding", group["rounding"], group["rounding"] in ("nearest", "stochastic")),
        ("seed", group["seed"], isinstance(group["seed"], int)),
    ):
        if not right:
            raise ValueError(f"AdamW: {option}={value!r} is out of range")


def _roles_named(no_decay: str | None) -> frozenset[Role]:
    try:
        return frozenset(Role(role.strip()) for role in (no_decay or "").split(",") if role.strip())
    except ValueError as error:
        raise ValueError(f"no_decay={no_decay!r}: {error}; roles: {', '.join(Role)}") from None
