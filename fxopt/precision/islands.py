"""Which parameters a policy should keep in float32, so that no module loses more to rounding than a bound."""

from __future__ import annotations

import fnmatch
import glob
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxopt.precision.policy import MATMUL_DTYPES, Precision, Selector
from fxopt.precision.roles import Role

# What the presets compute in float32 where they store it so: few numbers, and no matrix products that would be slow.
COMPUTED_IN_FLOAT32 = (Role.NORM, Role.ROUTER)


@dataclass(frozen=True)
class Losses:
    """What rounding costs the updates of some parameters.

    lost: the share of the updates that is lost for good or, in a nearest cast, hidden from the forward pass.
    noise: root mean square of stochastic rounding's noise over that of the updates.
    """

    lost: float
    noise: float

    def exceeds(self, bound: Losses) -> tuple[bool, bool]:
        """Whether `lost` and whether `noise` are above the bound's."""
        return self.lost > bound.lost, self.noise > bound.noise


@dataclass(frozen=True)
class Measured:
    """One parameter in the probe: its precision, how many of its numbers are updated in a step, and what that loses."""

    name: str
    role: Role
    numel: int
    precision: Precision
    updates: float
    losses: Losses


@dataclass(frozen=True)
class Candidate:
    """Parameters that become an island together: those of one module and role. A norm computes in one dtype."""

    measured: tuple[Measured, ...]
    added_bytes: int

    @property
    def role(self) -> Role:
        return self.measured[0].role

    @property
    def losses(self) -> Losses:
        return together(self.measured)

    @property
    def updates(self) -> float:
        return sum(one.updates for one in self.measured)

    @property
    def name(self) -> str:
        return self.measured[0].name


def together(measured: Iterable[Measured]) -> Losses:
    """The losses of several parameters: means over their updates, of the noise's square."""
    measured = tuple(measured)
    updates = sum(one.updates for one in measured)
    if not updates:
        return Losses(0.0, 0.0)
    lost = sum(one.updates * one.losses.lost for one in measured) / updates
    return Losses(lost, (sum(one.updates * one.losses.noise**2 for one in measured) / updates) ** 0.5)


def by_module(measured: Iterable[Measured]) -> list[list[Measured]]:
    """The parameters of each module and role."""
    found: dict[tuple[str, Role], list[Measured]] = {}
    for one in measured:
        found.setdefault((one.name.rpartition(".")[0], one.role), []).append(one)
    return list(found.values())


def island_overrides(precision: Precision, role: Role) -> dict[str, object]:
    """What a Selector changes to put such a parameter in an island of float32; empty where it is in one already.

    Float32 storage that is cast to bfloat16 by nearest rounding only moves the dead zone from the update to the cast.
    So norms and routers compute in float32, too; elsewhere the cast is stochastic, and matrix products stay as fast as
    they were. The gradient of what is computed in bfloat16 has no more bits than that: it stays as it was.
    """
    float32 = torch.float32
    storage: dict[str, object] = {} if precision.storage == float32 else {"storage": float32}
    if precision.compute == float32:
        return storage
    if role in COMPUTED_IN_FLOAT32:
        return {**storage, "compute": float32}
    if not storage and precision.cast == "stochastic":
        return {}
    compute = {"compute": torch.bfloat16} if precision.compute in MATMUL_DTYPES else {}
    gradient = {"gradient": precision.gradient} if storage else {}
    return {**storage, **compute, **gradient, "cast": "stochastic"}


def island_precision(precision: Precision, role: Role) -> Precision:
    """The precision of such a parameter in an island."""
    overrides = island_overrides(precision, role)
    return Selector(role=role, **overrides).applied_to(precision) if overrides else precision  # type: ignore[arg-type]


def held_bytes(precision: Precision, shape: Sequence[int]) -> int:
    """Bytes of a parameter's values, of its gradient, and of what rounding keeps beside them."""
    numel = torch.Size(shape).numel()
    held = numel * (precision.storage.itemsize + precision.gradient.itemsize)
    if precision.storage == torch.int8:
        held += shape[0] * precision.activation.itemsize  # a scale for each row
    if precision.rounding == "kahan":
        held += numel * torch.bfloat16.itemsize
    return held


def candidates(measured: Iterable[Measured], shapes: Mapping[str, Sequence[int]]) -> list[Candidate]:
    """What can become an island: modules with parameters that are not in one yet."""
    possible = [one for one in measured if island_overrides(one.precision, one.role)]
    return [
        Candidate(
            tuple(members),
            sum(
                held_bytes(island_precision(one.precision, one.role), shapes[one.name])
                - held_bytes(one.precision, shapes[one.name])
                for one in members
            ),
        )
        for members in by_module(possible)
    ]


def choose(possible: Sequence[Candidate], bound: Losses, budget_bytes: float = math.inf) -> list[Candidate]:
    """The candidates that lose more than `bound`, as far as `budget_bytes` go.

    The bound is each module's own: one that loses all of its updates is not saved by others that lose few. So without a
    budget there is nothing to weigh. With one, greedily, first comes what takes most lost updates away for each byte:
    the losses above the bound, in units of the bound, times the module's part of its role's updates. Every role counts
    the same, or the few numbers of the norms would never come to be served.
    """
    updates: dict[Role, float] = {}
    for candidate in possible:
        updates[candidate.role] = updates.get(candidate.role, 0.0) + candidate.updates
    tiny = torch.finfo(torch.float32).tiny
    gains: list[tuple[float, Candidate]] = []
    for candidate in possible:
        losses = candidate.losses
        is_lost, is_noise = losses.exceeds(bound)
        size = is_lost * losses.lost / max(bound.lost, tiny) + is_noise * (losses.noise / bound.noise) ** 2
        if size:
            gain = size * candidate.updates / updates[candidate.role]
            gains.append((gain / max(candidate.added_bytes, tiny), candidate))
    chosen: list[Candidate] = []
    for _, candidate in sorted(gains, key=lambda pair: -pair[0]):
        if candidate.added_bytes <= budget_bytes:
            budget_bytes -= candidate.added_bytes
            chosen.append(candidate)
    return chosen


def selectors(
    chosen: Iterable[Candidate], roles: Mapping[str, Role], aliases: Mapping[str, Sequence[str]]
) -> list[tuple[Selector, tuple[str, ...]]]:
    """Few selectors that mean exactly the chosen parameters, each with the parameters that it means.

    roles: of all parameters of the model. aliases: all names of each parameter, its own included.
    """
    wanted: dict[tuple[Role, tuple[tuple[str, object], ...]], list[str]] = {}
    for candidate in chosen:
        for one in candidate.measured:
            overrides = tuple(island_overrides(one.precision, one.role).items())
            wanted.setdefault((one.role, overrides), []).append(one.name)
    of_parameter = {alias: name for name, names in aliases.items() for alias in names}
    found: list[tuple[Selector, tuple[str, ...]]] = []
    for (role, overrides), names in wanted.items():
        options = dict(overrides)
        if {name for name, other in roles.items() if other == role} == set(names):
            found.append((Selector(role=role, **options), tuple(names)))  # type: ignore[arg-type]
            continue
        left = dict.fromkeys(names)
        while left:
            name = next(iter(left))
            # All layers at once, if all of them are meant and nothing else is.
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", glob.escape(name))
            meant = {of_parameter[alias] for alias in fnmatch.filter(of_parameter, pattern)}
            if not meant <= set(left):
                pattern, meant = glob.escape(name), {name}
            found.append((Selector(name=pattern, **options), tuple(one for one in left if one in meant)))  # type: ignore[arg-type]
            left = {one: None for one in left if one not in meant}
    return found
