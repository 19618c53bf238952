"""Bytes that training holds for a model's parameters, measured on the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.arguments import require_module
from fxopt.precision.accumulation import residual_of


@dataclass(frozen=True)
class Footprint:
    """Bytes held now: `weights`, `gradients` and `optimizer` states, of `num_parameters` numbers (shared ones once).

    To `gradients` belongs what is kept beside them while they are summed over several backward passes.
    """

    num_parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def bytes_per_parameter(self) -> float:
        return self.total / max(self.num_parameters, 1)

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("gradients", self.gradients), ("optimizer", self.optimizer))
        lines = [f"{n:<10} {b / 1e9:9.4f} GB {b / max(self.num_parameters, 1):6.2f} B/parameter" for n, b in parts]
        return "\n".join(
            [*lines, f"{'total':<10} {self.total / 1e9:9.4f} GB {self.bytes_per_parameter:6.2f} B/parameter"]
        )


def footprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Footprint:
    """What is held for `model` and its `optimizer` at this moment: call it after a step, before gradients are cleared.

    Memory that tensors share counts once; a tensor made of others (int8 data and its scale, 8-bit states) counts as
    these; of a sharded one, this rank's part. Works on fake tensors.
    """
    require_module("footprint", model)
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    residuals = [kept for gradient in gradients if (kept := residual_of(gradient)) is not None]
    states = optimizer.state.values() if optimizer is not None else ()
    return Footprint(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        weights=_bytes(parameters),
        gradients=_bytes([*gradients, *residuals]),
        optimizer=_bytes(states),
    )


def _bytes(held: Iterable[Any]) -> int:
    storages = {storage._cdata: storage.nbytes() for value in held for storage in _storages(value)}
    return sum(storages.values())


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _storages(part)
    elif isinstance(value, Tensor):
        local: Any = value.to_local() if hasattr(value, "to_local") else value.data
        if hasattr(type(local), "__tensor_flatten__"):
            for name in local.__tensor_flatten__()[0]:
                yield from _storages(getattr(local, name))
        else:
            yield local.untyped_storage()
