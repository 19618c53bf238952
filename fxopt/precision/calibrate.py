"""A policy fitted to a model: a few probe steps on a copy, and islands of float32 where rounding loses too much."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.precision.annotate import annotate, parameter_precisions
from fxopt.precision.calibration import BudgetError, Calibration, Island, RoleLosses
from fxopt.precision.instance_methods import original_forwards
from fxopt.precision.islands import (
    Candidate,
    Losses,
    Measured,
    by_module,
    candidates,
    choose,
    selectors,
    together,
)
from fxopt.precision.monitor import Monitor
from fxopt.precision.optimizer import optimizer
from fxopt.precision.policy import Policy, PolicyError, Precision, Selector, dtype_name
from fxopt.precision.presets import resolve
from fxopt.precision.roles import Role, parameter_roles
from fxopt.precision.rounding_cost import RoundingCost
from fxopt.printing import progress_bar

Batch = Mapping[str, Any]

# Under the islands the other modules take another way, and one that lost just less than the bound may lose more.
MAX_ROUNDS = 3


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    lr: float,
    *,
    base: str | Policy,
    max_lost: float,
    max_noise: float,
    budget: float | None,
    steps: int = 8,
    samples: int = 4096,
    seed: int = 0,
    emulate: bool = False,
    **options: Any,
) -> Calibration:
    """See `Policy.calibrate`."""
    lr = float(lr)
    _check(model, lr, max_lost, max_noise, budget, steps, samples)
    base, bound = resolve(base, model), Losses(max_lost, max_noise)
    roles, shapes = parameter_roles(model), {name: tuple(p.shape) for name, p in model.named_parameters()}
    with _random_state_kept(model), progress_bar() as show:
        probe = _Probe(model, _first(batches, steps), lr, steps, samples, seed, emulate, options, show)
        measured, unmeasured, costs = probe.measure(base, roles)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        room = math.inf if budget is None else budget * num_parameters
        policy, left, seen = base, measured, measured
        islands: tuple[Island, ...] = ()
        chosen: list[Candidate] = []
        for _ in range(MAX_ROUNDS):
            found = choose(candidates(seen, shapes), bound, room)
            if {candidate.name for candidate in found} == {candidate.name for candidate in chosen}:
                break
            chosen, islands = found, _islands(model, found, roles)
            name = f"{base.name.removesuffix('-calibrated')}-calibrated"
            policy = base.with_selectors(*(island.selector for island in islands), name=name)
            left = probe.measure(policy, roles)[0]
            seen = _worse_of(seen, left)
    alternative, advice = _alternative(base, measured, costs, bound, islands, roles)
    result = Calibration(
        policy=policy,
        base=base,
        rows=_rows(measured, left, chosen, bound),
        islands=islands,
        added_bytes=_bytes_of(chosen),
        num_parameters=num_parameters,
        bound=bound,
        lr=lr,
        steps=steps,
        worst_left=_worst(left, bound),
        unmeasured=unmeasured,
        alternative=alternative,
        advice=advice,
    )
    if result.worst_left is not None and (needed := _bytes_of(choose(candidates(seen, shapes), bound))) > room:
        name, losses = result.worst_left
        num_above = sum(row.num_above_after for row in result.rows)
        raise BudgetError(
            f"budget={budget!r} bytes per parameter is too small: with {result.added_bytes_per_parameter:.3g} of it "
            f"spent, {num_above} of {sum(row.num_modules for row in result.rows)} modules still lose too much, most of "
            f"all that of {name!r}: {losses.lost:.1%} of its updates (max_lost={max_lost!r}), with a noise of "
            f"{losses.noise:.2g} × update (max_noise={max_noise!r}). "
            f"A budget of {_rounded_up(needed / num_parameters)} keeps the bound; or raise the bound"
            + (f". {advice}" if advice else "")
            + ". This error's `calibration` holds the policy that was reached",
            result,
        )
    return result


def _bytes_of(chosen: Iterable[Candidate]) -> int:
    return sum(candidate.added_bytes for candidate in chosen)


def _worse_of(before: Sequence[Measured], after: Sequence[Measured]) -> list[Measured]:
    """What was measured before the islands, and what has come above it since: the other steps go another way."""
    found = {one.name: one.losses for one in after}
    return [
        replace(
            one,
            losses=Losses(
                max(one.losses.lost, found.get(one.name, one.losses).lost),
                max(one.losses.noise, found.get(one.name, one.losses).noise),
            ),
        )
        for one in before
    ]


class _Probe:
    """Training steps on a copy of a model. The model itself is only read."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        lr: float,
        steps: int,
        samples: int,
        seed: int,
        emulate: bool,
        options: Mapping[str, Any],
        show: Callable[[str, int, int], None],
    ) -> None:
        self._model, self._batches, self._lr, self._steps = model, batches, lr, steps
        self._samples, self._seed, self._emulate, self._options = samples, seed, emulate, options
        self._show = show

    def measure(
        self, policy: Policy, roles: Mapping[str, Role]
    ) -> tuple[list[Measured], tuple[str, ...], dict[str, RoundingCost]]:
        """What each parameter loses under `policy`; those that got no gradient; and the monitor's rows by parameter."""
        for generator in _generators(self._model):
            generator.manual_seed(self._seed)
        trained = annotate(original_forwards(copy.deepcopy(self._model)), policy, emulate=self._emulate).train()
        names = {parameter: name for name, parameter in trained.named_parameters()}
        opt = optimizer(trained, lr=self._lr, **{"seed": self._seed, **self._options})
        seen = Monitor(opt, samples=self._samples, labels=names)
        with torch.enable_grad():
            for step, batch in enumerate(itertools.islice(itertools.cycle(self._batches), self._steps)):
                self._show(f"training steps under {policy.name}", step, self._steps)
                self._loss(trained, batch, step).backward()
                opt.step()
                opt.zero_grad()
        self._show(f"training steps under {policy.name}", self._steps, self._steps)
        precisions = parameter_precisions(trained)
        costs = {row.name.partition("/")[2]: row for row in seen.rows}
        measured = [
            Measured(name, roles[name], cost.num_parameters, precisions[name], _updates(cost), _losses(cost))
            for name, cost in costs.items()
        ]
        trainable = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
        return measured, tuple(name for name in trainable if name not in costs), costs

    def _loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        outputs = model(**batch)
        loss = getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
        if loss is None and isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor):
            loss = outputs[0] if outputs[0].ndim == 0 else None
        place = step % len(self._batches)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            missing = "" if "labels" in batch else ", and no 'labels'"
            raise ValueError(
                f"Policy.calibrate: {type(model).__name__} returned no loss for batch {place}, which has "
                f"{', '.join(map(repr, batch))}{missing}: give the arguments of the training call, labels included"
            )
        if not bool(loss.isfinite()):
            cause = (
                f"look at batch {place} (labels that are all ignored?) and at the weights"
                if step == 0
                else f"look at batch {place}, or lower lr={self._lr:g}"
            )
            raise ValueError(
                f"Policy.calibrate: the loss of probe step {step + 1} is {loss.item()}, and updates without a finite "
                f"loss measure nothing: {cause}"
            )
        return loss


def _updates(cost: RoundingCost) -> float:
    return cost.num_parameters * cost.moving


def _losses(cost: RoundingCost) -> Losses:
    """What counts of a row of the monitor.

    Stochastic rounding loses nothing on average, so that of what seems lost only what two standard errors do not
    explain counts; its cost is noise. Nearest rounding has no noise, but what its cast hides counts as lost.
    """
    if cost.rounding == "stochastic":
        return Losses(max(0.0, cost.lost - 2 * cost.lost_error), cost.noise or 0.0)
    return Losses(cost.lost if cost.lost_in_cast is None else cost.lost_in_cast, 0.0)


def _rows(
    measured: Sequence[Measured], left: Sequence[Measured], chosen: Sequence[Candidate], bound: Losses
) -> tuple[RoleLosses, ...]:
    rows = []
    for role in dict.fromkeys(one.role for one in measured):
        before, after = ([one for one in side if one.role == role] for side in (measured, left))
        mine = [candidate for candidate in chosen if candidate.role == role]
        rows.append(
            RoleLosses(
                role=role,
                formats=" and ".join(sorted({_format(one.precision) for one in before})),
                num_parameters=sum(one.numel for one in before),
                num_in_islands=sum(one.numel for candidate in mine for one in candidate.measured),
                added_bytes=_bytes_of(mine),
                num_modules=len(by_module(before)),
                num_above=len(_above(before, bound)),
                num_above_after=len(_above(after, bound)),
                before=together(before),
                after=together(after),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.num_parameters))


def _above(measured: Sequence[Measured], bound: Losses) -> list[tuple[str, Losses]]:
    """The modules that lose more than the bound: a parameter of each, and the losses."""
    losses = [(members[0].name, together(members)) for members in by_module(measured)]
    return [(name, lost) for name, lost in losses if any(lost.exceeds(bound))]


def _format(precision: Precision) -> str:
    is_cast = (precision.storage, precision.compute) == (torch.float32, torch.bfloat16)
    how = f"{precision.cast} cast" if is_cast else precision.rounding
    return f"{dtype_name(precision.storage)}, {how}"


def _islands(model: nn.Module, chosen: Sequence[Candidate], roles: Mapping[str, Role]) -> tuple[Island, ...]:
    named = dict(model.named_parameters())
    aliases: dict[str, list[str]] = {name: [] for name in named}
    name_of = {parameter: name for name, parameter in named.items()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        aliases[name_of[parameter]].append(alias)
    measured = {one.name: one for candidate in chosen for one in candidate.measured}
    # Bytes of a candidate are shared out to its tensors by their numbers, which have one format.
    added = {
        one.name: candidate.added_bytes * one.numel / sum(other.numel for other in candidate.measured)
        for candidate in chosen
        for one in candidate.measured
    }
    return tuple(
        Island(
            selector,
            names,
            num_parameters=sum(measured[name].numel for name in names),
            added_bytes=round(sum(added[name] for name in names)),
            before=together(measured[name] for name in names),
        )
        for selector, names in selectors(chosen, roles, aliases)
    )


def _alternative(
    base: Policy,
    measured: Sequence[Measured],
    costs: Mapping[str, RoundingCost],
    bound: Losses,
    islands: Sequence[Island],
    role_of: Mapping[str, Role],
) -> tuple[Policy | None, str | None]:
    """Stochastic rounding for the roles in which nearest rounding loses too much, where its noise is no worse."""
    roles: dict[Role, float] = {}
    for role in dict.fromkeys(one.role for one in measured):
        mine = [one for one in measured if one.role == role]
        is_rounded = all(
            one.precision.rounding == "nearest" and one.precision.storage == torch.bfloat16 for one in mine
        )
        is_known = all(costs[one.name].noise is not None for one in mine)
        instead = [replace(one, losses=Losses(0.0, costs[one.name].noise or 0.0)) for one in mine]
        if is_rounded and is_known and _above(mine, bound) and not _above(instead, bound):
            roles[role] = together(instead).noise
    if not roles:
        return None, None
    name = f"{base.name.removesuffix('-custom')}-stochastic"
    others = [island for island in islands if role_of[island.names[0]] not in roles]
    rounded = (Selector(role=role, rounding="stochastic") for role in roles)
    policy = base.with_selectors(*rounded, *(island.selector for island in others), name=name)
    added = sum(island.added_bytes for island in others)
    listed = ", ".join(f"{role} (noise {noise:.2g} × update)" for role, noise in roles.items())
    return policy, (
        f"Cheaper: with rounding='stochastic' in {listed} no update is lost on average, and noise is under "
        f"max_noise={bound.noise:g}. That adds {added:,} bytes and is this calibration's `alternative`"
    )


def _worst(left: Sequence[Measured], bound: Losses) -> tuple[str, Losses] | None:
    return max(_above(left, bound), key=lambda one: (one[1].lost, one[1].noise), default=None)


def _rounded_up(value: float) -> float:
    """To three digits, so that what a message asks for is enough."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2) if value > 0 else 1.0
    return float(f"{math.ceil(value / step) * step:.3g}")


def _first(batches: Iterable[Batch], steps: int) -> list[Batch]:
    if isinstance(batches, Mapping):
        raise TypeError("Policy.calibrate: batches is one batch: give a list of them, or a data loader")
    found = list(itertools.islice(batches, steps))
    if not found:
        raise ValueError(
            "Policy.calibrate: no batches, and so no updates to measure: give at least one, such as "
            "[next(iter(train_loader))]"
        )
    for place, batch in enumerate(found):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"Policy.calibrate: batch {place} is a {type(batch).__name__}: give mappings with the keyword "
                "arguments of the training call, such as {'input_ids': ..., 'labels': ...}"
            )
    return found


def _check(
    model: nn.Module,
    lr: float,
    max_lost: float,
    max_noise: float,
    budget: float | None,
    steps: int,
    samples: int,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Policy.calibrate takes a torch.nn.Module, not {type(model).__name__}: load the model first")
    for option, value, right, mend in (
        ("lr", lr, 0 < lr < math.inf, "the learning rate that you will train with"),
        ("max_lost", max_lost, 0 <= max_lost <= 1, "a share of the updates, from 0 to 1"),
        ("max_noise", max_noise, max_noise > 0, "the noise over the update, above 0; math.inf for no bound"),
        ("budget", budget, budget is None or budget >= 0, "bytes per parameter, 0 or more; None for no limit"),
        ("steps", steps, steps >= 1, "1 or more"),
        ("samples", samples, samples >= 1, "elements of each parameter, 1 or more"),
    ):
        if not right:
            raise ValueError(f"Policy.calibrate: {option}={value!r} is out of range: give {mend}")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "to_local"):
            raise PolicyError(f"{name!r} is sharded, and a probe needs it whole: calibrate first, then shard the model")


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Python's, NumPy's (where it is loaded) and torch's random states are afterwards what they were."""
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy.random.get_state() if numpy is not None else None
    of_torch = [(generator, generator.get_state()) for generator in _generators(model)]
    try:
        yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        for generator, state in of_torch:
            generator.set_state(state)


def _generators(model: nn.Module) -> list[torch.Generator]:
    """torch's own, of the CPU and of the model's devices. `torch.manual_seed` would reach those of all devices."""
    found = [torch.default_generator]
    for device in sorted({p.device for p in itertools.chain(model.parameters(), model.buffers())}, key=str):
        if device.type not in ("cpu", "meta"):
            generators = getattr(torch.get_device_module(device), "default_generators", ())
            found += generators[device.index or 0 :][:1]
    return found
