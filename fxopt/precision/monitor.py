"""What precision costs a training run: how much of each update rounding lost, measured on a sample of the elements."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from fxopt.atomic_file import write, write_text
from fxopt.precision.optimizer import Optimizer
from fxopt.precision.roles import parameter_roles
from fxopt.precision.rounding_cost import Formats, RoundingCost, Row, formats_of, update_to_weight
from fxopt.precision.update_samples import Sample, Sampler, Shadow
from fxopt.printing import as_text


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
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"fxopt.monitor: samples={samples!r} must be a whole number from 1 on")
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
        self._rows: dict[str, Row] = {}
        self._handles: list[Any] = []
        if isinstance(optimizer, Optimizer):
            optimizer.register_update_observer(self)
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._digest()))
        else:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.before_update(self._all())))
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._after_foreign_step()))

    def close(self) -> None:
        """Stops watching; what was measured stays."""
        if isinstance(self.optimizer, Optimizer) and self._handles:
            self.optimizer.remove_update_observer(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def rows(self) -> tuple[RoundingCost, ...]:
        """One for each role (or, without a model, one) of each param group."""
        return tuple(row.cost(self._state_error(row)) for row in self._rows.values())

    def to_dict(self) -> dict[str, Any]:
        """The rows, and the history: for each row the lost share and the update-to-weight ratio of each step."""
        history = {
            name: {
                "lost": [row.lost(sums) for sums in row.steps()],
                "update_to_weight": [update_to_weight(sums) for sums in row.steps()],
            }
            for name, row in self._rows.items()
        }
        return {"rows": [asdict(row) for row in self.rows], "history": history}

    def save(self, path: str | Path) -> None:
        """Writes `to_dict()` as JSON, which has no word for NaN and infinity: they are null there."""
        write_text(path, json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False))

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
        """Draws the lost share and the update-to-weight ratio over the steps. ImportError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the monitor is drawn with matplotlib: pip install matplotlib") from error

        figure = Figure(figsize=(8, 6), layout="constrained")
        lost, ratio = figure.subplots(2, 1, sharex=True)
        histories = self.to_dict()["history"]
        for name, history in histories.items():
            steps = range(1, len(history["lost"]) + 1)
            lost.plot(steps, history["lost"], label=name, marker="." if len(steps) < 50 else "")
            ratio.plot(steps, history["update_to_weight"], label=name, marker="." if len(steps) < 50 else "")
        lost.set(ylabel="share of updates lost to rounding", ylim=(-0.02, 1.02))
        moved = any(value > 0 for history in histories.values() for value in history["update_to_weight"])
        ratio.set(ylabel="update to weight", xlabel="step", yscale="log" if moved else "linear")
        if histories:
            lost.legend(frameon=False)
        place = Path(path) if Path(path).suffix else Path(f"{path}.png")
        write(place, lambda file: figure.savefig(file, format=place.suffix[1:]))

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
            by_row: dict[Row, list[Sample]] = {}
            for parameter, wanted in zip(found, intended, strict=True):
                before, gradient, after = taken[parameter]
                sample = Sample(parameter, before, gradient, after, wanted)
                formats = formats_of(parameter, group, self._compute)
                by_row.setdefault(self._row(place, parameter, formats, shadow), []).append(sample)
            for row, samples in by_row.items():
                row.add(samples)

    def _row(self, place: int, parameter: Tensor, formats: Formats, shadow: Shadow) -> Row:
        name = f"{place}/{self._labels.get(parameter, 'all')}"
        if name in self._rows and self._rows[name].formats != formats:  # one group of several dtypes
            name += f"/{formats.storage}".replace("torch.", "")
        return self._rows.setdefault(name, Row(name, formats, shadow))

    def _state_error(self, row: Row) -> dict[str, float]:
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


def _percent(share: float | None) -> str:
    return "–" if share is None else "0" if share == 0 else f"{share:.1%}"


def _finite(data: Any) -> Any:
    """Plain data with None for each number that is none."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
