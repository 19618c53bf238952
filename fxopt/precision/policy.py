"""A policy is data: which `Precision` each parameter of a model gets."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch

from fxopt.kernels.rounding import Rounding
from fxopt.precision.roles import Role

if TYPE_CHECKING:
    from torch import nn

    from fxopt.precision.calibration import Calibration
    from fxopt.precision.policy_table import PolicyDiff

OptimizerState = Literal["float32", "8bit", "4bit"]  # the last two are torchao's block-wise quantized states
Cast = Literal["nearest", "stochastic"]

FLOAT8 = torch.float8_e4m3fn
# A matrix product can run in these; what surrounds it then runs in bfloat16.
MATMUL_DTYPES = (torch.int8, FLOAT8)
MATRIX_ROLES = (Role.LINEAR, Role.OUTPUT_HEAD)

_DTYPES = {
    "storage": (torch.float32, torch.bfloat16, torch.int8),
    "compute": (torch.float32, torch.bfloat16, torch.int8, FLOAT8),
    "gradient": (torch.float32, torch.bfloat16),
}
_CHOICES = {
    "rounding": get_args(Rounding),
    "optimizer_state": get_args(OptimizerState),
    "cast": get_args(Cast),
}


class PolicyError(ValueError):
    """A policy that does not exist, cannot work, or does not fit the model. The message says what to do."""


@dataclass(frozen=True)
class Precision:
    """What one parameter is stored, computed and updated in.

    storage: the dtype in which the parameter is held: float32, bfloat16, or int8 (torchao's quantized training weight:
        a row of int8 and its scale).
    compute: the dtype in which the model's operations take it: float32, bfloat16, or for matrix products int8 and
        float8_e4m3fn, where torchao quantizes both factors on the way in and returns bfloat16.
    gradient: the dtype of `parameter.grad`.
    rounding: how an update, always computed in float32, is rounded to `storage`. Stochastic rounding is right on
        average, so that an update far smaller than a step of `storage` is not lost; Kahan's keeps what was lost in a
        second bfloat16.
    optimizer_state: how the optimizer's moments are held.
    cast: how `storage` becomes `compute`. It matters for float32 → bfloat16, where nearest rounding hides every update
        smaller than half a step of bfloat16. The noise of a stochastic cast is new in each training forward, and in
        evaluation always the same.

    Raises PolicyError for a value or a combination that cannot work.
    """

    storage: torch.dtype
    compute: torch.dtype
    gradient: torch.dtype
    rounding: Rounding
    optimizer_state: OptimizerState
    cast: Cast = "nearest"

    def __post_init__(self) -> None:
        _check_values("Precision", {field.name: getattr(self, field.name) for field in fields(self)})
        if self.storage == torch.int8 and self.compute in MATMUL_DTYPES:
            raise PolicyError(
                f"storage int8 with compute {dtype_name(self.compute)} cannot work: torchao multiplies with int8 "
                "weights in bfloat16; use compute=torch.bfloat16, or storage=torch.bfloat16 for the quantized product"
            )
        if self.rounding != "nearest" and self.storage == torch.float32:
            raise PolicyError(f"rounding {self.rounding!r} is needless for storage float32: use rounding='nearest'")
        if self.rounding == "kahan" and self.storage == torch.int8:
            raise PolicyError("rounding 'kahan' cannot work for storage int8: use rounding='stochastic'")
        if self.cast == "stochastic" and (self.storage, self.compute) != (torch.float32, torch.bfloat16):
            raise PolicyError(
                "cast 'stochastic' is from storage float32 to compute bfloat16, not from "
                f"{dtype_name(self.storage)} to {dtype_name(self.compute)}: use cast='nearest'"
            )

    @property
    def activation(self) -> torch.dtype:
        """The dtype of an operation's other inputs and of its result: `compute`, or bfloat16 for quantized products."""
        return torch.bfloat16 if self.compute in MATMUL_DTYPES else self.compute

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes held for one element of the weight, without its scale, gradient and optimizer state."""
        return self.storage.itemsize


@dataclass(frozen=True)
class Selector:
    """Overrides a policy's default for some parameters: those of a role, of a name, or the trainable or frozen ones.

    Exactly one of `role`, `name` (a glob over parameter names: "model.layers.*.mlp.*") and `trainable` is given. Of the
    other fields None keeps what was; but where `storage` changes, `gradient` and `rounding` follow it if they are not
    given (float32: float32, nearest; narrower: bfloat16, stochastic), and a cast that has become needless is nearest.
    """

    role: Role | None = None
    name: str | None = None
    trainable: bool | None = None
    storage: torch.dtype | None = None
    compute: torch.dtype | None = None
    gradient: torch.dtype | None = None
    rounding: Rounding | None = None
    optimizer_state: OptimizerState | None = None
    cast: Cast | None = None

    def __post_init__(self) -> None:
        if sum(place is not None for place in (self.role, self.name, self.trainable)) != 1:
            raise PolicyError(f"a selector needs exactly one of role, name and trainable, got {self.where or 'none'}")
        if self.role is not None:
            object.__setattr__(self, "role", _role(self.role))
        if not isinstance(self.name, str | None) or not isinstance(self.trainable, bool | None):
            raise PolicyError(f"a selector's name is a str and its trainable a bool, got {self.where}")
        if not self.overrides:
            raise PolicyError(f"selector {self.where} overrides nothing: give it {', '.join(PRECISION_FIELDS)}")
        _check_values(f"selector {self.where}:", self.overrides)
        if self.role is not None:
            _check_role(f"selector {self.where}", self.role, self.storage, self.compute)

    @property
    def where(self) -> str:
        """Which parameters it is for, as text."""
        places = (("role", self.role and str(self.role)), ("name", self.name), ("trainable", self.trainable))
        return ", ".join(f"{field}={value!r}" for field, value in places if value is not None)

    @property
    def overrides(self) -> dict[str, object]:
        """The fields of `Precision` that it changes."""
        return {f: value for f in PRECISION_FIELDS if (value := getattr(self, f)) is not None}

    def matches(self, names: Iterable[str], role: Role, trainable: bool) -> bool:
        """Whether a parameter with these names (several, where it is shared) is meant."""
        if self.name is not None:
            return any(fnmatch.fnmatchcase(name, self.name) for name in names)
        return self.role == role if self.role is not None else self.trainable == trainable

    def applied_to(self, precision: Precision) -> Precision:
        """`precision` with the overrides. Raises PolicyError where the result cannot work."""
        merged = {field: getattr(precision, field) for field in PRECISION_FIELDS} | self.overrides
        if self.storage is not None and self.storage != precision.storage:
            is_wide = self.storage == torch.float32
            merged["gradient"] = self.gradient or (torch.float32 if is_wide else torch.bfloat16)
            merged["rounding"] = self.rounding or ("nearest" if is_wide else "stochastic")
        if self.cast is None and (merged["storage"], merged["compute"]) != (torch.float32, torch.bfloat16):
            merged["cast"] = "nearest"
        try:
            return Precision(**merged)
        except PolicyError as error:
            raise PolicyError(f"selector {self.where}: {error}") from None


PRECISION_FIELDS = tuple(field.name for field in fields(Precision))


@dataclass(frozen=True)
class Policy:
    """The precision of every parameter of a model: a default, and selectors of which later ones win.

    Presets: `policies()`. A policy of one's own is best derived: `Policy.named("bf16").with_selectors(
    Selector(role="embedding", storage=torch.float32))`. The default's `compute` is the dtype of the activations that
    flow between modules.
    """

    name: str
    default: Precision
    selectors: tuple[Selector, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise PolicyError(f"Policy.name must be a str, got {self.name!r}")
        if not isinstance(self.default, Precision):
            raise PolicyError(f"Policy.default must be a Precision, got {self.default!r}")
        object.__setattr__(self, "selectors", tuple(self.selectors))
        for selector in self.selectors:
            if not isinstance(selector, Selector):
                raise PolicyError(f"Policy.selectors must be Selectors, got {selector!r}")
        if self.default.compute in MATMUL_DTYPES or self.default.storage == torch.int8:
            raise PolicyError(
                "the default is for every parameter, norms and biases included, so it can be neither int8 nor float8: "
                "give these to Selector(role='linear', ...)"
            )

    @classmethod
    def named(cls, name: str) -> Policy:
        """The preset called `name`. Raises PolicyError, with the nearest name, where there is none."""
        from fxopt.precision.presets import named

        return named(name)

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        lr: float = 1e-5,
        *,
        base: str | Policy = "bf16",
        max_lost: float = 0.05,
        max_noise: float = 20.0,
        budget: float | None = None,
        **options: Any,
    ) -> Calibration:
        """The cheapest policy that keeps what rounding loses of `model`'s updates under a bound, found by a few steps.

        A copy of the model trains for `steps` steps under `base`, watched by `fxopt.monitor`. The modules that lose
        more than the bound go to islands of float32; under a budget greedily, those first that take most lost updates
        away for each byte. Another probe measures what is left. The model, its gradients and buffers, and the random
        state stay as they are. It takes the memory of one more model and of its training step.

        Nearest rounding loses an update, always the same one, that is smaller than half a step of the storage: there
        the lost share counts, or where float32 is cast to bfloat16 by nearest rounding the share that the cast hides.
        Stochastic rounding loses none on average, and its cost is noise. Where it would be cheaper than islands, the
        result's `advice` says so and `alternative` is that policy.

        model: with its trained weights: what is lost depends on their size. Not sharded.
        batches: keyword arguments of the training call, labels included, on the model's device. The first `steps` are
            taken, again from the first where there are fewer; each is one update.
        lr: the learning rate of the training to come. What is lost depends on it: a warm-up's first steps lose more.
        base: the policy to start from, a preset's name or a Policy. (It is not the policy that this is called on.)
        max_lost: the largest share of a module's updates that may be lost. Were they lost at random, it would be like a
            learning rate lower by as much, and none is tuned to 5 %.
        max_noise: the largest noise that a module's updates may have, in root mean square over that of the updates of
            a step. After n² steps in one direction an update stands above a noise of n: at 20, after 400. `math.inf`
            for no bound.
        budget: the most bytes that islands may add, per parameter of the whole model; None for as many as they need.
        options: steps (8), samples (elements of each parameter that are looked at, 4096), seed, emulate (as in
            `fxopt.annotate`); all others go to `fxopt.optimizer`: betas, eps, weight_decay, no_decay, kind, ….

        Raises ValueError and TypeError (no batches, no loss, a loss that is not finite, an option out of range),
        PolicyError (a policy that does not fit the model), and BudgetError, a PolicyError which carries the calibration
        that was reached, where `budget` is too small for the bound.
        """
        from fxopt.precision.calibrate import calibrate

        return calibrate(
            model, batches, lr, base=base, max_lost=max_lost, max_noise=max_noise, budget=budget, **options
        )

    def with_selectors(self, *selectors: Selector, name: str | None = None) -> Policy:
        """This policy with more selectors, which win over those it has. Called `name`, or "…-custom"."""
        return Policy(name or f"{self.name.removesuffix('-custom')}-custom", self.default, self.selectors + selectors)

    def precision(
        self,
        name: str,
        role: Role,
        trainable: bool = True,
        kept_in: torch.dtype | None = None,
        also_named: Iterable[str] = (),
    ) -> Precision:
        """The precision of the parameter `name`, which plays `role`.

        kept_in: the dtype in which the model's author keeps this parameter, whatever the model is loaded in. What is
            kept in float32 is stored and computed in it, unless a selector by name or `trainable` gives it a storage.
        also_named: further names of a shared parameter.

        Raises PolicyError where a selector asks for what this role cannot have.
        """
        precision, names = self.default, (name, *also_named)
        for selector in self.selectors:
            if selector.matches(names, role, trainable):
                precision = selector.applied_to(precision)
                _check_role(
                    f"selector {selector.where} matches {name!r}, and", role, precision.storage, precision.compute
                )
        if kept_in != torch.float32 or self.asks_for_storage(names, trainable):
            return precision
        float32 = dict.fromkeys(_DTYPES, torch.float32)
        return replace(precision, **float32, rounding="nearest", cast="nearest")  # type: ignore[arg-type]

    def asks_for_storage(self, names: Iterable[str], trainable: bool) -> bool:
        """Whether a selector by name or by `trainable`, which knows what it means, gives a parameter its storage."""
        names = tuple(names)
        return any(
            selector.role is None and selector.storage is not None and selector.matches(names, Role.OTHER, trainable)
            for selector in self.selectors
        )

    def check_selectors(self, roles: Mapping[str, Role], also_named: Iterable[str] = ()) -> None:
        """Raises PolicyError for a selector that matches no parameter, with the nearest name that there is.

        A preset's own selectors by role may match nothing (a model without a router).

        roles: role by parameter name. also_named: further names of shared parameters.
        """
        from fxopt.precision.presets import policies

        of_presets = {selector for preset in policies().values() for selector in preset.selectors}
        names = [*roles, *also_named]
        for selector in self.selectors:
            if selector.name is not None and not fnmatch.filter(names, selector.name):
                globs = sorted({re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names})
                nearest = nearest_name(selector.name, globs)
                raise PolicyError(f"selector {selector.name!r} matches no parameter{nearest}")
            if selector.role is not None and selector not in of_presets and selector.role not in roles.values():
                there = ", ".join(sorted(set(roles.values())))
                raise PolicyError(f"selector {selector.where} matches no parameter; roles in this model: {there}")

    def diff(self, other: Policy) -> PolicyDiff:
        """What changes from this policy to `other`, as data that prints well. Empty (false) where nothing does."""
        from fxopt.precision.policy_table import difference

        return difference(self, other)

    def __str__(self) -> str:
        from fxopt.precision.policy_table import table

        return table(self)

    def to_json(self) -> str:
        """This policy as JSON; `from_json` gives it back exactly."""
        from fxopt.precision.policy_file import to_json

        return to_json(self)

    def to_yaml(self) -> str:
        """This policy as YAML; `from_yaml` gives it back exactly."""
        from fxopt.precision.policy_file import to_yaml

        return to_yaml(self)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """A policy from JSON. Raises PolicyError for anything that is not exactly a policy."""
        from fxopt.precision.policy_file import from_json

        return from_json(text)

    @classmethod
    def from_yaml(cls, text: str) -> Policy:
        """A policy from YAML, safely loaded. Raises PolicyError for anything that is not exactly a policy."""
        from fxopt.precision.policy_file import from_yaml

        return from_yaml(text)

    def save(self, path: str | Path) -> Path:
        """Writes this policy to a file whose name ends in .json, .yaml or .yml."""
        from fxopt.precision.policy_file import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """A policy from a file that `save` wrote, or that was written by hand."""
        from fxopt.precision.policy_file import load

        return load(path)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → "bfloat16": how policy files and messages name a dtype."""
    return str(dtype).removeprefix("torch.")


def _check_values(owner: str, values: Mapping[str, object]) -> None:
    dot = "." if owner == "Precision" else " "
    for field, value in values.items():
        if field in _DTYPES and value not in _DTYPES[field]:
            allowed = ", ".join(map(str, _DTYPES[field]))
            raise PolicyError(f"{owner}{dot}{field} must be one of {allowed}; got {value!r}")
        if field in _CHOICES and value not in _CHOICES[field]:
            near = nearest_name(str(value), _CHOICES[field])
            raise PolicyError(f"{owner}{dot}{field} must be one of {', '.join(_CHOICES[field])}; got {value!r}{near}")


def _check_role(owner: str, role: Role, storage: torch.dtype | None, compute: torch.dtype | None) -> None:
    if compute in MATMUL_DTYPES and role not in MATRIX_ROLES:
        raise PolicyError(
            f"{owner} role {str(role)!r} cannot compute in {dtype_name(compute)}, which is for matrix products: use "
            "bfloat16 or float32 there, or select role='linear'"
        )
    if storage == torch.int8 and role not in (*MATRIX_ROLES, Role.EMBEDDING):
        raise PolicyError(
            f"{owner} role {str(role)!r} cannot be stored in int8, which is for matrices: use float32 or bfloat16 "
            "there, or select role='linear' or 'embedding'"
        )


def _role(role: object) -> Role:
    try:
        return Role(cast(str, role))
    except ValueError:
        raise PolicyError(
            f"unknown role {role!r}{nearest_name(str(role), list(Role))}; known: {', '.join(Role)}"
        ) from None


def nearest_name(word: str, known: Iterable[str], likeness: float = 0.3) -> str:
    """The end of a message: what of `known` is most like `word`, if anything is at least so much (0 to 1), or ''."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=likeness)
    return f"; nearest: {str(near[0])!r}" if near else ""
