"""The optimizer that a policy asks for: float32 arithmetic, states in 32, 8 or 4 bits, one rounding at the store."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fxopt.arguments import require_module
from fxopt.kernels.rounding import Rounding
from fxopt.precision import moment_ranges, optimizer_states
from fxopt.precision.accumulation import AccumulatedGradients
from fxopt.precision.annotate import parameter_precisions
from fxopt.precision.gradient_clipping import ClipBy, GradientClipping
from fxopt.precision.optimizer_kinds import RULES, Item, Kind
from fxopt.precision.param_group import (
    by_precision,
    check_memory,
    check_options,
    check_parameter,
    check_usable,
    place_of,
    require_values,
    roles_named,
    rounding_and_state,
)
from fxopt.precision.parameter_storage import is_int8, local
from fxopt.precision.policy import OptimizerState
from fxopt.precision.release_gradients import UpdateInBackward
from fxopt.precision.roles import Role, parameter_roles
from fxopt.precision.state_shapes import check_gradient, check_state


def optimizer(
    model: nn.Module,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    no_decay: str | None = None,
    kind: Kind = "adamw",
    momentum: float | None = None,
    nesterov: bool | None = None,
    release_gradients: bool = False,
    clip_grad_norm: float | None = None,
    clip_by: ClipBy = "global",
    seed: int = 0,
) -> "Optimizer":
    """The optimizer for `model` as its policy asks; arguments and defaults are those of `torch.optim.AdamW`.

    An annotated model's parameters are rounded, and their states kept, as its policy says. In any other model bfloat16
    is rounded stochastically, and states are float32: 8 bytes per parameter.

    no_decay: roles that get no weight decay, separated by commas: "norm,bias". Default: none, as in torch.
    kind: "adamw"; "sgd", "adafactor" and "muon" are the formulas of torch's own classes. "muon" updates the linear
        weights, and leaves everything else to AdamW.
    momentum, nesterov: of SGD and Muon. Default: torch's.
    release_gradients, clip_grad_norm, clip_by: see `Optimizer`.
    seed: of the rounding noise.

    Raises ValueError (no trainable parameter, one on the meta device, unknown role in `no_decay`, option out of range
    or of another kind), TypeError (no module; a trainable parameter that is neither float32, nor bfloat16, nor
    torchao's int8 weight for training).
    """
    require_module("optimizer", model)
    exempt = roles_named(no_decay)
    asked: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "kind": kind,
        "momentum": momentum,
        "nesterov": nesterov,
        "seed": seed,
    }
    check_options({**asked, **rounding_and_state(None)})
    check_usable(kind, momentum, nesterov)
    for name, parameter in model.named_parameters():
        require_values(name, parameter)
    roles = parameter_roles(model)
    precisions = parameter_precisions(model)
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        options = {
            "weight_decay": 0.0 if roles[name] in exempt else weight_decay,
            "kind": "adamw" if kind == "muon" and not _is_muons(parameter, roles[name]) else kind,
            **rounding_and_state(precisions.get(name) or getattr(parameter, "fxopt_precision", None)),
        }
        group = groups.setdefault(tuple(options.values()), {"params": [], **options})
        group["params"].append((name, parameter))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to optimize")
    return Optimizer(
        list(groups.values()),
        **asked,
        release_gradients=release_gradients,
        clip_grad_norm=clip_grad_norm,
        clip_by=clip_by,
    )


class Optimizer(torch.optim.Optimizer):
    """AdamW, SGD, Adafactor or Muon over float32, bfloat16 and int8 parameters, in float32 arithmetic.

    Arguments and defaults are those of `torch.optim.AdamW`, and, in each group of its own if need be:

    kind: the update rule; momentum, nesterov: of SGD and Muon, None for torch's default.
    rounding: of bfloat16 parameters: "stochastic", "nearest" or "kahan". int8 parameters are rounded stochastically.
    optimizer_state: "float32", "8bit" or "4bit": in blocks, rounded so that they are on average what float32 states are
        (tensors under 4096 elements, or not a whole number of blocks, stay float32).
        Both are None for what each parameter's policy says, or "stochastic" and "float32" where it has none: a group
        whose parameters differ in this becomes several, each with the other options of the group.
    seed: of the noise, a pure function of (seed, number of the parameter's step, place of the parameter): training
        resumed from `state_dict` continues bit by bit.

    For all groups:

    release_gradients: each parameter is updated inside backward, as soon as its gradient is complete, and the gradient
        is freed. `step()` then only updates what backward has left, and counts the step. Gradients of several backward
        passes are summed under `no_update()`. Who clips between backward and step finds none: Trainer's `max_grad_norm`
        has no effect, and logs a norm of 0; `clip_grad_norm` has.
    clip_grad_norm: the largest norm of the gradients; None for no clipping.
    clip_by: "global", `torch.nn.utils.clip_grad_norm_` over all parameters, at the head of `step()`. With released
        gradients that norm is known too late; there is "previous", which scales by the global norm of the step before
        (the first step, which has none before it, is clipped as "parameter"), and "parameter", which clips each
        gradient by its own norm.

    Gradients that several backward passes leave in bfloat16 are summed in float32, and `.grad` is their sum, rounded
    once (`fxopt.precision.accumulation`).

    State per parameter, as in torch: `step` () float32 on the CPU; AdamW's `exp_avg`, `exp_avg_sq` (...); with kahan
    rounding also `compensation` (...) bfloat16.
    """

    rounds_as_policies_say = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        kind: Kind = "adamw",
        momentum: float | None = None,
        nesterov: bool | None = None,
        rounding: Rounding | None = None,
        optimizer_state: OptimizerState | None = None,
        release_gradients: bool = False,
        clip_grad_norm: float | None = None,
        clip_by: ClipBy = "global",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "kind": kind,
            "momentum": momentum,
            "nesterov": nesterov,
            "rounding": rounding,
            "optimizer_state": optimizer_state,
            "seed": seed,
            "previous_grad_norm": None,
        }
        self._clipping = GradientClipping(clip_grad_norm, clip_by, released=release_gradients)
        self._in_backward = UpdateInBackward() if release_gradients else None
        self._accumulated = AccumulatedGradients()
        self._places: dict[Tensor, tuple[dict[str, Any], int]] = {}
        self._observers: list[UpdateObserver] = []
        super().__init__(cast(Any, params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, or the groups it becomes, as `torch.optim.Optimizer` does.

        Refuses parameters and options that cannot be trained with, and then adds nothing.
        """
        before = len(self.param_groups)
        try:
            for group in by_precision({**self.defaults, **param_group}, param_group):
                self._add_one_group(group)
            check_memory(self.param_groups)
        except Exception:
            del self.param_groups[before:]
            raise
        self._take_places()

    def _add_one_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_options(group)
        optimizer_states.load(group["optimizer_state"])
        for place, parameter in enumerate(group["params"]):
            if parameter.requires_grad:
                check_parameter(parameter, group, place)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient are left alone. Returns what `closure` returns.

        Raises, before anything is changed, RuntimeError for a gradient that is sparse or not of its parameter's shape,
        and ValueError for a state that is not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        remaining = [parameter for parameter in self._places if parameter.grad is not None]
        self.update(remaining)
        norm = self._clipping.finish_step()
        for group in self.param_groups:
            group["previous_grad_norm"] = norm
        if self._in_backward is not None:
            self._in_backward.attach(self, self._places)  # model.to() may have taken hooks away
            self._in_backward.start_over()
        self._accumulated.start_over()
        return loss

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Updates these parameters, all of which have a gradient. `step()` and released gradients come through here."""
        for parameter in parameters:
            group, _ = self._places[parameter]
            check_gradient(parameter, group)
            check_state(parameter, self.state.get(parameter, {}), group, group["kind"])
        self._clipping.clip(parameters, self.param_groups[0]["previous_grad_norm"])
        self.add_states(parameters)
        for observer in self._observers:
            observer.before_update(parameters)
        states = [self.state[parameter] for parameter in parameters]
        if states:
            torch._foreach_add_([state["step"] for state in states], 1)
        items: dict[int, list[Item]] = {}
        for parameter, state in zip(parameters, states, strict=True):
            if parameter.numel():
                group, index = self._places[parameter]
                items.setdefault(id(group), []).append(Item(parameter, state, index))
        for group in self.param_groups:
            if found := items.get(id(group)):
                RULES[group["kind"]].update(found, group)
        for observer in self._observers:
            observer.after_update(parameters)

    def register_update_observer(self, observer: "UpdateObserver") -> None:
        """`observer` sees each update, inside `step()` or inside backward. Not copied or pickled."""
        self._observers.append(observer)

    def remove_update_observer(self, observer: "UpdateObserver") -> None:
        """`observer` sees no more updates."""
        self._observers.remove(observer)

    @contextlib.contextmanager
    def no_update(self) -> Iterator[None]:
        """Backward passes in this context leave their gradients to be summed: all but the last of an accumulation."""
        paused = self._in_backward.paused() if self._in_backward is not None else contextlib.nullcontext()
        with paused:
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With released gradients it also forgets a backward pass that was broken off."""
        super().zero_grad(set_to_none)
        self._accumulated.start_over()
        if self._in_backward is not None:
            self._in_backward.start_over()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as `torch.optim.Optimizer` does, but keeps its moments float32, or quantized.

        torch casts the moments to the parameter's dtype: through bfloat16, a resumed run would leave its path at once.
        The state of one of torch's optimizers of the same kind is accepted too.

        Raises ValueError, before anything is changed, for a state that is not of its parameter's shape, or not of the
        kind; and what torch raises for other parameters or groups.
        """

        def keep(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            for mine, saved in zip(self.param_groups, loaded["param_groups"], strict=False):
                for parameter, key in zip(mine["params"], saved["params"], strict=False):
                    check_state(parameter, loaded["state"].get(key, {}), mine, saved.get("kind", mine["kind"]))
            groups = [
                {**{name: value for name, value in mine.items() if name in self.defaults}, **saved}
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

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_clipping": self._clipping,
            "_in_backward": self._in_backward,
            "_accumulated": self._accumulated,
            "_observers": [],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = {parameter: group for group in state["param_groups"] for parameter in group["params"]}
        for parameter, values in state["state"].items():
            if isinstance(values, _Kept):
                state["state"][parameter] = values.on(parameter, groups[parameter])
        super().__setstate__(state)
        self._take_places()

    def _take_places(self) -> None:
        """Group and place of each parameter: groups change in `add_param_group` and `load_state_dict` alone."""
        parameters = ((parameter, group) for group in self.param_groups for parameter in group["params"])
        self._places = {parameter: (group, index) for index, (parameter, group) in enumerate(parameters)}
        self._accumulated.attach(tuple(self._places))
        if self._in_backward is not None:
            self._in_backward.attach(self, self._places)

    def add_states(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Zeros for the parameters that have no state yet; all that are trained if None. The first `step()` does it.

        Float32 moments of one device lie in one piece of memory. One by one they would settle in the gaps that the
        first backward pass has left behind, and every later step would need its activations elsewhere.
        """
        if parameters is None:
            parameters = [parameter for parameter in self._places if parameter.requires_grad]
        fresh = [parameter for parameter in parameters if not self.state.get(parameter)]
        together: dict[torch.device, list[tuple[Tensor, str]]] = {}
        for parameter in fresh:
            group, _ = self._places[parameter]
            check_parameter(parameter, group, place_of(group, parameter))  # frozen when it was added, trained now
        for parameter in fresh:
            group, _ = self._places[parameter]
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32)
            if group["rounding"] == "kahan" and parameter.dtype == torch.bfloat16 and not is_int8(parameter):
                state["compensation"] = torch.zeros_like(parameter, requires_grad=False).contiguous()
            if group["kind"] != "adamw":
                continue  # torch's class makes its own
            for name, signed in RULES["adamw"].signed.items():
                if optimizer_states.quantizes(local(parameter).numel(), group["optimizer_state"]):
                    state[name] = optimizer_states.quantized_zeros(parameter, group["optimizer_state"], signed=signed)
                elif hasattr(parameter, "to_local"):
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
                else:
                    together.setdefault(parameter.device, []).append((parameter, name))
        for device, moments in together.items():
            sizes = [parameter.numel() for parameter, _ in moments]
            pieces = torch.zeros(sum(sizes), dtype=torch.float32, device=device).split(sizes)
            for (parameter, name), piece in zip(moments, pieces, strict=True):
                self.state[parameter][name] = piece.view(parameter.shape)


class UpdateObserver(Protocol):
    """What looks at updates: `fxopt.monitor`. The parameters have their (clipped) gradients in both calls."""

    def before_update(self, parameters: Sequence[Tensor]) -> None: ...

    def after_update(self, parameters: Sequence[Tensor]) -> None: ...


class _Kept:
    """One parameter's loaded state. torch's loading casts tensors, and what is in lists and dicts, but not this."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def on(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        loaded = dict(self.values)
        loaded["step"] = torch.as_tensor(loaded.get("step", 1), dtype=torch.float32, device="cpu")
        signed = RULES[group["kind"]].signed
        for name, value in loaded.items():
            if not torch.is_tensor(value) or name == "step":
                continue
            value = value.to(parameter.device)
            if name == "compensation":
                loaded[name] = value.to(torch.bfloat16).contiguous()
            elif hasattr(value, "to_local"):
                loaded[name] = value if moment_ranges.is_quantized(value.to_local()) else value.float()
            else:
                value = value if moment_ranges.is_quantized(value) else value.float().contiguous()
                if name in signed:
                    value = optimizer_states.convert(value, group["optimizer_state"], signed=signed[name])
                loaded[name] = value
        return loaded


def _is_muons(parameter: Tensor, role: Role) -> bool:
    return role == Role.LINEAR and parameter.dim() == 2
