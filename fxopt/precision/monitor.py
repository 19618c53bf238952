"""What precision costs a training run: how much of each update rounding lost, measured on a sample of the elements."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from fxopt.kernels.rounding import Rounding
from fxopt.precision.optimizer import Optimizer
from fxopt.precision.parameter_storage import is_int8
from fxopt.precision.policy import Precision
from fxopt.precision.roles import parameter_roles
from fxopt.precision.update_samples import Sample, Sampler, Shadow, chance_to_stay, rounding_variance
from fxopt.printing import as_text

# Sums over the elements of one row and one step, in this order.
_SUMS = (
    "elements", "moving", "unchanged", "expected_unchanged", "unchanged_in_cast", "update_square", "weight_square",
    "intended", "arrived", "noise_square",
    "subnormal_weights", "saturated_weights", "subnormal_gradients", "saturated_gradients",
)  # fmt: skip
_EXTREMES = _SUMS[-4:]


@dataclass(frozen=True)
class RoundingCost:
    """One row: the parameters of one role in one param group, over all steps so far. Shares are of 1.

    moving: the share of elements that float32 would have moved. The shares of updates that follow are shares of these.
    lost: the share of updates that rounding swallowed: the float32 update was not zero, and the stored value stayed.
        With stochastic rounding most values stay, and rightly; there it is what stayed beyond the expected share.
    lost_error: the standard error of `lost`: elements are sampled, and stochastic rounding is drawn.
    unchanged, expected_unchanged: the share that stayed, and the share that unbiased stochastic rounding lets stay
        (None for the other roundings, and for int8).
    arrived: how much of the update is in the stored weights: sum of movements in the update's direction over the sum
        of updates. 1 without bias.
    noise: root mean square of the noise that stochastic rounding adds to an update, over that of the updates, per step:
        expected for bfloat16, also where it is rounded to the nearest and stochastic rounding would add it; measured
        for int8. Noise has no direction: after n² steps in one direction an update stands above a noise of n. None
        for float32 and Kahan's rounding, which have next to none, and where it `is_estimated`.
    lost_in_cast: the share of updates that moved a float32 weight, but not what it is cast to in the forward pass; None
        where nothing is cast, or the cast is stochastic.
    update_to_weight: root mean square of the updates over that of the weights, per step.
    subnormal, saturated: the share of stored weights, or gradients, so small or so large (or not finite).
    state_error: by the optimizer state's name, the distance from the float32 shadow's over the length of the shadow's.
    is_estimated: the optimizer's rule does not work element by element (Muon, Adafactor), or is not known: what
        float32 would have done is not known either, and every element with a gradient counts as moving.
    """

    name: str
    num_parameters: int
    storage: str
    rounding: str
    steps: int
    moving: float
    lost: float
    lost_error: float
    unchanged: float
    expected_unchanged: float | None
    arrived: float | None
    noise: float | None
    lost_in_cast: float | None
    update_to_weight: float
    subnormal_weights: float
    saturated_weights: float
    subnormal_gradients: float
    saturated_gradients: float
    state_error: dict[str, float]
    is_estimated: bool


class Monitor:
    """Watches an optimizer; made by `fxopt.monitor`. `print` it for a table.

    labels: what the rows are, by parameter (Tensor), instead of the roles of `model`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        samples: int = 256,
        compute: torch.dtype | None = None,
        labels: Mapping[Any, str] | None = None,
    ) -> None:
        if samples < 1:
            raise ValueError(f"fxopt.monitor: samples={samples!r} must be 1 or more")
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            if not hasattr(optimizer, "optimizer"):
                raise TypeError(f"fxopt.monitor watches a torch.optim.Optimizer, got {type(optimizer).__name__}")
            optimizer = optimizer.optimizer  # accelerate's wrapper
        self.optimizer = optimizer
        self._samples, self._compute = samples, compute
        self._labels: dict[Tensor, str] = dict(labels or {})
        if model is not None and labels is None:
            roles = parameter_roles(model)
            self._labels = {parameter: str(roles[name]) for name, parameter in model.named_parameters()}
        self._samplers: dict[Tensor, Sampler] = {}
        self._shadows: dict[int, Shadow] = {}
        self._before: dict[Tensor, Tensor] = {}
        self._taken: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._rows: dict[str, _Row] = {}
        self._handles: list[Any] = []
        if isinstance(optimizer, Optimizer):
            optimizer.register_update_observer(self)
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._digest()))
        else:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.before_update(self._all())))
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._after_foreign_step()))

    def close(self) -> None:
        """Stops watching; what was measured stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if isinstance(self.optimizer, Optimizer):
            self.optimizer.remove_update_observer(self)

    @property
    def rows(self) -> tuple[RoundingCost, ...]:
        """One for each role (or, without a model, one) of each param group."""
        return tuple(row.cost(self._state_error(row)) for row in self._rows.values())

    def to_dict(self) -> dict[str, Any]:
        """The rows, and the history: for each row the lost share and the update-to-weight ratio of each step."""
        history = {
            name: {
                "lost": [row.lost(sums) for sums in row.steps()],
                "update_to_weight": [_ratio(sums) for sums in row.steps()],
            }
            for name, row in self._rows.items()
        }
        return {"rows": [asdict(row) for row in self.rows], "history": history}

    def save(self, path: str | Path) -> None:
        """Writes `to_dict()` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2))

    def summary(self) -> dict[str, float]:
        """Flat numbers for a training log: "rounding/<row>/lost", …"""
        found: dict[str, float] = {}
        for row in self.rows:
            found[f"rounding/{row.name}/lost"] = row.lost
            found[f"rounding/{row.name}/update_to_weight"] = row.update_to_weight
            if row.lost_in_cast is not None:
                found[f"rounding/{row.name}/lost_in_cast"] = row.lost_in_cast
        return found

    def plot(self, path: str | Path) -> None:
        """Draws the lost share and the update-to-weight ratio over the steps. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        lost, ratio = figure.subplots(2, 1, sharex=True)
        for name, history in self.to_dict()["history"].items():
            steps = range(1, len(history["lost"]) + 1)
            lost.plot(steps, history["lost"], label=name, marker="." if len(steps) < 50 else "")
            ratio.plot(steps, history["update_to_weight"], label=name, marker="." if len(steps) < 50 else "")
        lost.set(ylabel="share of updates lost to rounding", ylim=(-0.02, 1.02))
        ratio.set(ylabel="update to weight", xlabel="step", yscale="log")
        lost.legend(frameon=False)
        figure.savefig(path)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        rows = self.rows
        if not rows:
            return f"no update yet in {type(self.optimizer).__name__}: print the monitor after optimizer.step()"
        table = Table(title=f"what rounding cost, over {max(row.steps for row in rows)} steps")
        for heading in ("", "storage", "rounding"):
            table.add_column(heading, no_wrap=True)
        for heading in ("lost", "unchanged", "expected", "arrived", "noise", "lost in cast", "update/weight"):
            table.add_column(heading, justify="right")
        for heading in ("subnormal w, g", "saturated w, g", "state error"):
            table.add_column(heading, justify="right")
        for row in rows:
            shares = row.lost, row.unchanged, row.expected_unchanged, row.arrived
            table.add_row(
                row.name + (" (estimated)" if row.is_estimated else ""),
                row.storage,
                row.rounding,
                *map(_percent, shares),
                "–" if row.noise is None else f"{row.noise:.2g}×",
                _percent(row.lost_in_cast),
                f"{row.update_to_weight:.1e}",
                f"{_percent(row.subnormal_weights)}, {_percent(row.subnormal_gradients)}",
                f"{_percent(row.saturated_weights)}, {_percent(row.saturated_gradients)}",
                "\n".join(f"{name} {error:.0e}" for name, error in row.state_error.items() if error) or "0",
            )
        return table

    # An UpdateObserver ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_update(self, parameters: Sequence[Tensor]) -> None:
        """Reads the samples that are about to change."""
        for parameter in parameters:
            if parameter not in self._samplers:
                self._samplers[parameter] = Sampler(parameter, self._samples)
            self._before[parameter] = self._stored(parameter)

    @torch.no_grad()
    def after_update(self, parameters: Sequence[Tensor]) -> None:
        """Reads what became of them."""
        for parameter in parameters:
            before = self._before.pop(parameter, None)
            if before is not None and before.numel() and parameter.grad is not None:
                gradient = self._samplers[parameter].read(parameter.grad)
                self._taken.append((parameter, before, gradient, self._stored(parameter)))

    def _stored(self, parameter: Tensor) -> Tensor:
        values = self._samplers[parameter].read(parameter)
        compensation = self.optimizer.state.get(parameter, {}).get("compensation")
        return values if compensation is None else values + self._samplers[parameter].read(compensation)

    def _all(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def _after_foreign_step(self) -> None:
        self.after_update(self._all())
        self._before.clear()
        self._digest()

    @torch.no_grad()
    def _digest(self) -> None:
        taken = {parameter: rest for parameter, *rest in self._taken}
        self._taken.clear()
        for place, group in enumerate(self.optimizer.param_groups):
            found = [parameter for parameter in group["params"] if parameter in taken]
            if not found:
                continue
            shadow = self._shadows.setdefault(place, Shadow(self.optimizer, group))
            intended: Sequence[Tensor | None] = [None] * len(found)
            if shadow.exists:
                with torch.enable_grad():
                    intended = shadow.update(group, found, *([taken[p][i] for p in found] for i in (0, 1)))
            by_row: dict[_Row, list[Sample]] = {}
            for parameter, wanted in zip(found, intended, strict=True):
                before, gradient, after = taken[parameter]
                sample = Sample(parameter, before, gradient, after, wanted)
                formats = _formats(parameter, group, self._compute)
                by_row.setdefault(self._row(place, parameter, formats, shadow), []).append(sample)
            for row, samples in by_row.items():
                row.add(samples)

    def _row(self, place: int, parameter: Tensor, formats: "_Formats", shadow: Shadow) -> "_Row":
        name = f"{place}/{self._labels.get(parameter, 'all')}"
        if name in self._rows and self._rows[name].formats != formats:  # one group of several dtypes
            name += f"/{formats.storage}".replace("torch.", "")
        return self._rows.setdefault(name, _Row(name, formats, shadow))

    def _state_error(self, row: "_Row") -> dict[str, float]:
        """Of all parameters of the row, from their states of this moment."""
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for parameter in row.parameters:
            state = self.optimizer.state.get(parameter, {})
            for name, right in row.shadow.states(parameter).items():
                if torch.is_tensor(state.get(name)):
                    pairs.setdefault(name, []).append((self._samplers[parameter].read(state[name]), right))
        errors = {}
        for name, found in pairs.items():
            kept, right = (torch.cat(side) for side in zip(*found, strict=True))
            errors[name] = float((kept - right).norm() / right.norm().clamp_min(torch.finfo(torch.float32).tiny))
        return errors


def monitor(
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    *,
    samples: int = 256,
    compute: torch.dtype | None = None,
) -> Monitor:
    """Measures what rounding costs each step of `optimizer` from now on; any torch optimizer, fxopt's included.

    model: with it, the rows of the result are the roles of its parameters in each param group; without it, the groups.
    samples: elements looked at in each parameter.
    compute: what float32 weights are cast to in the forward pass, where no policy says so: `torch.bfloat16` under
        autocast, Trainer's `bf16=True` included.

    The first step's float32 shadow starts from zero states: call it before training, not in the middle.
    Raises TypeError (not an optimizer), ValueError (`samples` below 1).
    """
    return Monitor(optimizer, model, samples=samples, compute=compute)


@dataclass(frozen=True)
class _Formats:
    """What a row's parameters are stored in, and how they are rounded and cast."""

    storage: torch.dtype
    compute: torch.dtype
    rounding: Rounding
    cast: str

    @property
    def is_stochastic(self) -> bool:
        return self.rounding == "stochastic" and self.storage == torch.bfloat16

    @property
    def is_cast(self) -> bool:
        return self.storage == torch.float32 and self.compute == torch.bfloat16 and self.cast == "nearest"


class _Row:
    """The sums of one row, a small tensor a step; they stay on their device until someone looks."""

    def __init__(self, name: str, formats: _Formats, shadow: Shadow) -> None:
        self.name, self.formats, self.shadow = name, formats, shadow
        self.parameters: dict[Tensor, None] = {}  # in order
        self._sums: list[Tensor] = []

    def add(self, samples: Sequence[Sample]) -> None:
        self.parameters |= dict.fromkeys(sample.parameter for sample in samples)
        before, gradient, after = (
            torch.cat([getattr(sample, field).to(samples[0].before.device) for sample in samples])
            for field in ("before", "gradient", "after")
        )
        intended, moving = after, gradient != 0
        if self.shadow.exists:
            intended = torch.cat(
                [sample.intended.to(before.device) for sample in samples if sample.intended is not None]
            )
            moving = intended != before
        update, stays = intended - before, moving & (after == before)
        noise_square = torch.zeros_like(before)
        if self.formats.storage == torch.bfloat16:
            noise_square = rounding_variance(intended)
        elif self.formats.storage == torch.int8:
            noise_square = (after - intended).square()
        narrow = torch.bfloat16
        in_cast = moving & (after.to(narrow) == before.to(narrow))
        # An int8 weight is dequantized to the dtype of its scale, which it also shows as its own.
        limits = torch.finfo(samples[0].parameter.dtype)
        self._sums.append(
            torch.stack([
                torch.ones_like(before).sum(),
                moving.sum(),
                stays.sum(),
                (chance_to_stay(before, intended) * moving).sum(),
                in_cast.sum(),
                update.square().sum(),
                before.square().sum(),
                update.abs().sum(),
                ((after - before) * update.sign()).sum(),
                (noise_square * moving).sum(),
                *_extremes(after, limits),
                *_extremes(gradient, limits),
            ]).double()
        )  # fmt: skip

    def steps(self) -> list[dict[str, float]]:
        return [dict(zip(_SUMS, sums.tolist(), strict=True)) for sums in self._sums]

    def cost(self, state_error: dict[str, float]) -> RoundingCost:
        sums = dict(zip(_SUMS, torch.stack(self._sums).sum(0).tolist(), strict=True))
        moving, elements = max(sums["moving"], 1.0), max(sums["elements"], 1.0)
        return RoundingCost(
            name=self.name,
            num_parameters=sum(parameter.numel() for parameter in self.parameters),
            storage=str(self.formats.storage).removeprefix("torch."),
            rounding=self.formats.rounding,
            steps=len(self._sums),
            moving=sums["moving"] / elements,
            lost=self.lost(sums),
            lost_error=self._lost_error(sums),
            unchanged=sums["unchanged"] / moving,
            expected_unchanged=sums["expected_unchanged"] / moving if self.formats.is_stochastic else None,
            arrived=sums["arrived"] / sums["intended"] if self.shadow.exists and sums["intended"] else None,
            noise=self._noise(sums),
            lost_in_cast=sums["unchanged_in_cast"] / moving if self.formats.is_cast else None,
            update_to_weight=_ratio(sums),
            **{name: sums[name] / elements for name in _EXTREMES},
            state_error=state_error,
            is_estimated=not self.shadow.exists,
        )

    def lost(self, sums: dict[str, float]) -> float:
        if self.formats.storage == torch.int8:  # rounded stochastically, to codes: how many should stay is not known
            return max(0.0, 1 - sums["arrived"] / sums["intended"]) if sums["intended"] else 0.0
        expected = sums["expected_unchanged"] if self.formats.is_stochastic else 0.0
        return max(0.0, (sums["unchanged"] - expected) / max(sums["moving"], 1.0))

    def _lost_error(self, sums: dict[str, float]) -> float:
        if self.formats.storage == torch.int8:
            return sums["noise_square"] ** 0.5 / sums["intended"] if sums["intended"] else 0.0
        moving = max(sums["moving"], 1.0)
        share = sums["expected_unchanged" if self.formats.is_stochastic else "unchanged"] / moving
        return max(0.0, share * (1 - share) / moving) ** 0.5

    def _noise(self, sums: dict[str, float]) -> float | None:
        is_noisy = self.formats.storage in (torch.bfloat16, torch.int8) and self.formats.rounding != "kahan"
        if not is_noisy or not self.shadow.exists:
            return None
        return (sums["noise_square"] / sums["update_square"]) ** 0.5 if sums["update_square"] else 0.0


def _percent(share: float | None) -> str:
    return "–" if share is None else "0" if share == 0 else f"{share:.1%}"


def _ratio(sums: dict[str, float]) -> float:
    return (sums["update_square"] / sums["weight_square"]) ** 0.5 if sums["weight_square"] else 0.0


def _extremes(values: Tensor, limits: torch.finfo) -> tuple[Tensor, Tensor]:
    """How many are subnormal, and how many at the end of the range, beyond it, or not a number."""
    size = values.abs()
    return ((size > 0) & (size < limits.tiny)).sum(), (~(size < limits.max)).sum()


def _formats(parameter: Tensor, group: dict[str, Any], compute: torch.dtype | None) -> _Formats:
    """What the parameter's policy says, where it has one, and what the optimizer does in any case."""
    noted = getattr(parameter, "fxopt_precision", None)
    storage = torch.int8 if is_int8(parameter) else parameter.dtype
    rounding: Rounding = "nearest"
    if storage == torch.int8 or group.get("bf16_stochastic_round"):  # torchao's flag
        rounding = "stochastic"
    elif storage == torch.bfloat16:
        rounding = group.get("rounding", "nearest")
    if not isinstance(noted, Precision):
        return _Formats(storage, compute or storage, rounding, "nearest")
    return _Formats(storage, compute or noted.compute, rounding, noted.cast)
