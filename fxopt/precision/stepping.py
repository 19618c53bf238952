"""Which optimizer steps an annotated model, and a warning before one loses the updates that its policy keeps.

torch calls a step's pre-hook for every optimizer that is a `torch.optim.Optimizer`, also inside accelerate's and
Lightning's wrappers. One is registered while an annotated model is alive, and goes with the last of them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxopt.precision.parameter_storage import is_int8, is_wrapper

# How optimizers name what keeps a small update: float32 masters, Kahan's compensation, stochastic rounding.
_KEEPING = ("master", "kahan", "stochastic", "fp32_groups")
_ATTRIBUTE = "_fxopt_stepping"
_MEND = (
    "write `optimizer = fxopt.optimizer(model, lr=...)`; with transformers' Trainer pass `optimizers=(optimizer, None)`"
    " or use `fxopt.integrations.transformers.Trainer`, and with TRL's `class MyTrainer("
    "fxopt.integrations.transformers.PolicyOptimizerMixin, SFTTrainer)`"
)


@dataclass(frozen=True)
class SteppedBy:
    """What steps a model, by class ("torch.optim.AdamW"), several with commas; `warning`: what is lost, or ''."""

    optimizer: str
    warning: str


class Stepping:
    """Belongs to an annotated model, with which it is copied and pickled: a copy is watched too.

    `found`: what steps the model, by name, and what each loses, or ''. The model is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        # While a model is unpickled this runs before the model has any attribute.
        self.model = weakref.ref(model)
        self.found: dict[str, str] = {}
        _watched.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stepping | None:
        copied = memo.get(id(self.model()))
        return type(self)(copied) if copied is not None else None

    def __reduce__(self) -> Any:
        return type(self), (self.model(),)


def watch(model: nn.Module) -> None:
    """From now on the first step of an optimizer that loses updates of `model` warns."""
    if not isinstance(model.__dict__.get(_ATTRIBUTE), Stepping):
        model.__dict__[_ATTRIBUTE] = Stepping(model)
    _watched.changed()


def stepped_by(model: nn.Module) -> SteppedBy | None:
    """What steps `model`, or a model in it: the optimizers' names, and all that they lose; None if nothing has yet."""
    found: dict[str, str] = {}
    for module in model.modules():
        if (stepping := module.__dict__.get(_ATTRIBUTE)) is not None:
            found |= stepping.found
    if not found:
        return None
    return SteppedBy(", ".join(found), "\n".join(warning for warning in found.values() if warning))


class _Watched:
    """The annotated models that are alive, and the hook for as long as there are any."""

    def __init__(self) -> None:
        self._steppings: dict[int, weakref.ref[Stepping]] = {}
        self._handle: Any = None
        self._number = 0
        # What was looked at of each optimizer: how many parameters it had, when how many models had been annotated.
        self._looked: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._warned: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, stepping: Stepping) -> None:
        key = id(stepping)

        def gone(_: Any) -> None:
            self._steppings.pop(key, None)
            if not self._steppings and self._handle is not None:
                self._handle.remove()
                self._handle = None

        self._steppings[key] = weakref.ref(stepping, gone)
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self.look)
        self.changed()

    def changed(self) -> None:
        """Every optimizer is looked at anew."""
        self._number += 1

    def look(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Called before each step of any optimizer."""
        looked = self._number, sum(len(group["params"]) for group in optimizer.param_groups)
        if self._looked.get(optimizer) == looked:
            return
        self._looked[optimizer] = looked
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        for stepping in [alive for ref in list(self._steppings.values()) if (alive := ref()) is not None]:
            model = stepping.model()
            parameters = dict(_rounded(model, stepped)) if model is not None else {}
            if model is None or not any(id(parameter) in stepped for parameter in model.parameters()):
                continue
            warning = _warning(model, optimizer, parameters)
            stepping.found[_name(optimizer)] = warning
            if warning and optimizer not in self._warned:
                self._warned.add(optimizer)
                warnings.warn(warning, stacklevel=3)


def _rounded(model: nn.Module, stepped: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The parameters with these ids whose updates the policy does not round to nearest."""
    precisions = getattr(model, "_fxopt_precisions", {})
    for name, parameter in model.named_parameters():
        if id(parameter) not in stepped:
            continue
        stored = torch.int8 if is_int8(parameter) else None if is_wrapper(parameter) else parameter.dtype
        noted = precisions.get(name)
        is_meant = noted is not None and noted.storage == stored and noted.rounding == "nearest"
        if stored in (torch.bfloat16, torch.int8) and not is_meant:
            yield name, parameter


def _warning(model: nn.Module, optimizer: Any, parameters: dict[str, Tensor]) -> str:
    """What `optimizer` loses of the updates of these parameters, and the mend; '' for nothing."""
    if not parameters or getattr(optimizer, "rounds_as_policies_say", False):
        return ""
    num_int8 = sum(map(is_int8, parameters.values()))
    num_bfloat16 = len(parameters) - num_int8
    keeps = _keeps_updates(optimizer)
    lost = []
    if num_bfloat16 and not keeps and isinstance(optimizer, torch.optim.SGD) and _is_fused(optimizer):
        lost.append(f"torch's fused SGD leaves {num_bfloat16} bfloat16 parameters as they are on a CPU")
    elif num_bfloat16 and not keeps:
        lost.append(
            f"it rounds {num_bfloat16} bfloat16 parameters to nearest, which loses most of their updates (held-out "
            "loss on GSM8K after 100 steps: 1.518 instead of 0.870)"
        )
    if num_int8:
        lost.append(
            f"its states of {num_int8} int8 weights are bfloat16, where a second moment stops following its gradients"
        )
    if not lost:
        return ""
    policy = getattr(getattr(model, "_fxopt_policy", None), "name", "")
    return (
        f"{_name(optimizer)} steps a {type(model).__name__} whose policy {policy!r} rounds stochastically: "
        f"{'; '.join(lost)}. Instead, {_MEND}"
    )


def _keeps_updates(optimizer: Any) -> bool:
    """Whether an option or a state of it says that it keeps what nearest rounding would lose."""
    options = [*vars(optimizer).items(), *(option for group in optimizer.param_groups for option in group.items())]
    options += [state for states in optimizer.state.values() if isinstance(states, dict) for state in states.items()]
    return any(
        isinstance(name, str)
        and any(word in name.lower() for word in _KEEPING)
        and (bool(value) if isinstance(value, bool | int | str | list | dict | None) else True)
        for name, value in options
    )


def _is_fused(optimizer: Any) -> bool:
    is_torchs = type(optimizer).__module__.partition(".")[0] == "torch"
    return is_torchs and any(group.get("fused") is True for group in optimizer.param_groups)


def _name(optimizer: Any) -> str:
    kind = type(optimizer)
    module: str = kind.__module__
    return f"{'torch.optim' if module.startswith('torch.optim.') else module}.{kind.__qualname__}"


_watched = _Watched()
