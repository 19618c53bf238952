"""A policy is data: which `Precision` each parameter of a model gets."""

import difflib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from fxopt.precision.roles import Role

Rounding = Literal["nearest", "stochastic"]

_STORAGE = (torch.float32, torch.bfloat16)


class PolicyError(ValueError):
    """A policy that does not exist, cannot work, or does not fit the model. The message says what to do."""


@dataclass(frozen=True)
class Precision:
    """What one parameter is stored, computed and updated in.

    storage: the dtype in which the parameter (and so its gradient) is held.
    compute: the dtype in which the model's operations take it.
    rounding: how an update, always computed in float32, is rounded to `storage`. Stochastic rounding is right on
        average, so that an update far smaller than a step of `storage` is not lost.
    optimizer_state: the dtype of the optimizer's moments.
    """

    storage: torch.dtype
    compute: torch.dtype
    rounding: Rounding
    optimizer_state: torch.dtype

    def __post_init__(self) -> None:
        for field in ("storage", "compute"):
            if (dtype := getattr(self, field)) not in _STORAGE:
                raise PolicyError(f"Precision.{field} must be torch.float32 or torch.bfloat16, got {dtype!r}")
        if self.rounding not in get_args(Rounding):
            raise PolicyError(f"Precision.rounding must be 'nearest' or 'stochastic', got {self.rounding!r}")
        if self.optimizer_state != torch.float32:
            raise PolicyError(f"Precision.optimizer_state must be torch.float32, got {self.optimizer_state!r}")

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes held for one element of the weight, without gradient and optimizer state."""
        return self.storage.itemsize


@dataclass(frozen=True)
class Policy:
    """The precision of every parameter of a model. Presets: `policies()`."""

    name: str
    default: Precision

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise PolicyError(f"Policy.name must be a str, got {self.name!r}")
        if not isinstance(self.default, Precision):
            raise PolicyError(f"Policy.default must be a Precision, got {self.default!r}")

    @classmethod
    def named(cls, name: str) -> "Policy":
        """The preset called `name`. Raises PolicyError, with the nearest name, where there is none."""
        presets = policies()
        if name in presets:
            return presets[name]
        near = difflib.get_close_matches(name.lower(), presets, n=1, cutoff=0.5)
        nearest = f"; nearest: {near[0]!r}" if near else ""
        raise PolicyError(f"unknown policy {name!r}{nearest}; known: {', '.join(presets)}")

    def precision(self, name: str, role: Role, kept_in: torch.dtype | None = None) -> Precision:
        """The precision of the parameter `name`, which plays `role`.

        `kept_in` is the dtype in which the model's author keeps this parameter whatever the model is loaded in.
        """
        del name, role  # one default for all so far
        if kept_in is None or kept_in == self.default.storage:
            return self.default
        return replace(self.default, storage=kept_in, compute=kept_in, rounding="nearest")


def policies() -> dict[str, Policy]:
    """The presets by name."""
    fp32, bf16 = torch.float32, torch.bfloat16
    presets = (
        Policy("fp32", Precision(storage=fp32, compute=fp32, rounding="nearest", optimizer_state=fp32)),
        Policy("bf16", Precision(storage=bf16, compute=bf16, rounding="stochastic", optimizer_state=fp32)),
    )
    return {policy.name: policy for policy in presets}


def resolve(policy: "str | Policy") -> Policy:
    """A Policy from itself or from a preset's name. Raises PolicyError (unknown name), TypeError (another type)."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return Policy.named(policy)
    raise TypeError(f"policy must be a Policy or the name of one ({', '.join(policies())}), got {policy!r}")
