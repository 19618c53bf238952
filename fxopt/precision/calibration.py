"""What `Policy.calibrate` found: the losses of the base policy by role, the islands, and what is left with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.precision.islands import Losses
from fxopt.precision.policy import Policy, PolicyError, Selector, dtype_name
from fxopt.precision.roles import Role
from fxopt.printing import as_text

MAX_ISLANDS_SHOWN = 12


@dataclass(frozen=True)
class Island:
    """One selector of the calibrated policy.

    names: the parameters that it means. added_bytes: of their values and gradients, beside what they took before.
    before: what they lost in the probe under the base policy.
    """

    selector: Selector
    names: tuple[str, ...]
    num_parameters: int
    added_bytes: int
    before: Losses


@dataclass(frozen=True)
class RoleLosses:
    """One role: what its parameters lose under the base policy, and what they lose under the calibrated one.

    num_parameters, num_in_islands: numbers, not tensors; those that got a gradient.
    before, after: means over the updates of the role.
    num_modules, num_above, num_above_after: modules, and how many of them lose more than the bound.
    """

    role: Role
    formats: str
    num_parameters: int
    num_in_islands: int
    added_bytes: int
    num_modules: int
    num_above: int
    num_above_after: int
    before: Losses
    after: Losses


@dataclass(frozen=True)
class Calibration:
    """A policy, and the measurements that it rests on. `print` it for a table.

    policy: `base`, with an island of float32 for what lost too much; `base` itself where nothing did.
    rows: by role. Losses before and after are both measured, in probes of `steps` steps on the same batches.
    added_bytes: what the islands hold beside what `base` holds, of `num_parameters` numbers in the whole model.
    bound: what each module may lose.
    worst_left: a parameter of the module that loses most with the calibrated policy, and what the module loses; None
        where none is above the bound.
    unmeasured: trainable parameters that got no gradient in the probe; they stay as `base` has them.
    alternative: `base` with stochastic rounding, which adds no bytes, instead of the islands of those roles where its
        noise is under the bound; None where nothing is to be won by it. It is not probed.
    advice: the same in words.
    """

    policy: Policy
    base: Policy
    rows: tuple[RoleLosses, ...]
    islands: tuple[Island, ...]
    added_bytes: int
    num_parameters: int
    bound: Losses
    lr: float
    steps: int
    worst_left: tuple[str, Losses] | None = None
    unmeasured: tuple[str, ...] = ()
    alternative: Policy | None = None
    advice: str | None = None

    @property
    def holds(self) -> bool:
        """Whether every module is under the bound with the calibrated policy."""
        return self.worst_left is None

    @property
    def added_bytes_per_parameter(self) -> float:
        """`added_bytes` over all parameters of the model, in islands or not."""
        return self.added_bytes / max(self.num_parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the policies' own JSON as plain data; policies and selectors as text."""
        islands = [
            {**asdict(island), "selector": _selector_text(island.selector), "names": list(island.names)}
            for island in self.islands
        ]
        return {
            "policy": self.policy.name,
            "base": self.base.name,
            "rows": [{**asdict(row), "role": str(row.role)} for row in self.rows],
            "islands": islands,
            "added_bytes": self.added_bytes,
            "num_parameters": self.num_parameters,
            "bound": asdict(self.bound),
            "lr": self.lr,
            "steps": self.steps,
            "worst_left": None if self.worst_left is None else [self.worst_left[0], asdict(self.worst_left[1])],
            "unmeasured": list(self.unmeasured),
            "holds": self.holds,
            "advice": self.advice,
        }

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        table = Table(title=f"policy {self.base.name}, {self.steps} probe steps at a learning rate of {self.lr:g}")
        for heading in ("", "weights"):
            table.add_column(heading, no_wrap=True)
        of_base = ("parameters", "lost", "noise", "above bound")
        for heading in (*of_base, "in islands", "added bytes", "lost left", "noise left", "above"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                str(row.role),
                row.formats,
                f"{row.num_parameters:,}",
                _share(row.before.lost),
                _ratio(row.before.noise),
                f"{row.num_above} of {row.num_modules}",
                f"{row.num_in_islands:,}" if row.num_in_islands else "–",
                f"{row.added_bytes:,}" if row.num_in_islands else "–",
                _share(row.after.lost),
                _ratio(row.after.noise),
                f"[red]{row.num_above_after}[/red]" if row.num_above_after else "0",
            )
        lines = [
            f"bound: {self.bound.lost:.1%} of the updates lost, noise {self.bound.noise:g} × update, in each module; "
            + ("kept" if self.holds else "NOT kept")
        ]
        if not self.islands:
            lines.append(f"no islands: policy {self.policy.name} as it is")
        else:
            lines.append(
                f"policy {self.policy.name}: {self.added_bytes:,} bytes more, {self.added_bytes_per_parameter:.2g} for "
                "each parameter of the model"
            )
        for island in self.islands[:MAX_ISLANDS_SHOWN]:
            lost = f"lost {_share(island.before.lost)}" if island.before.lost else ""
            noise = f"noise {_ratio(island.before.noise)}" if island.before.noise else ""
            each = island.added_bytes // len(island.names)
            lines.append(
                f"  {_selector_text(island.selector)}; {len(island.names)} × {each:,} bytes; "
                + (f"{lost}, {noise}" if lost and noise else lost or noise)
            )
        if len(self.islands) > MAX_ISLANDS_SHOWN:
            lines.append(f"  … and {len(self.islands) - MAX_ISLANDS_SHOWN} more")
        if self.worst_left is not None:
            name, losses = self.worst_left
            what = f"{_share(losses.lost)} lost" if losses.exceeds(self.bound)[0] else f"noise {_ratio(losses.noise)}"
            lines.append(f"most of all: {what}, {name}")
        if self.unmeasured:
            lines.append(
                f"{len(self.unmeasured)} trainable parameters got no gradient and are not measured, such as "
                f"{self.unmeasured[0]!r}: give more batches"
            )
        if self.advice:
            lines.append(self.advice)
        return Group(table, Text("\n".join(lines)))


class BudgetError(PolicyError):
    """The budget is too small for the bound. `calibration` is what it reached, within the budget."""

    def __init__(self, message: str, calibration: Calibration) -> None:
        super().__init__(message)
        self.calibration = calibration


def _share(share: float) -> str:
    return "0" if share == 0 else f"{share:.1%}"


def _ratio(ratio: float) -> str:
    return "–" if ratio == 0 else f"{ratio:.2g} ×"


def _selector_text(selector: Selector) -> str:
    values = {f: dtype_name(v) if f in ("storage", "compute", "gradient") else v for f, v in selector.overrides.items()}  # type: ignore[arg-type]
    return f"{selector.where}: " + ", ".join(f"{field} {value}" for field, value in values.items())
