"""The storages that are alive while something runs, and the moment at which they take most."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["activations", "gradients", "workspace"]


@dataclass
class Peak:
    """The most bytes that were alive at once, of what kind, and what ran then."""

    bytes_of: dict[Kind, int] = field(default_factory=dict)
    at: Any = None

    @property
    def total(self) -> int:
        return sum(self.bytes_of.values())


@dataclass
class Storage:
    """A storage that is alive: its bytes, of what kind they are, and what ran when it was made."""

    alive: weakref.ref[Any]
    size_bytes: int
    kind: Kind
    made_by: Any


class LiveMemory:
    """Follows storages, each once, from where they are first seen to where they are freed.

    `peak` is of everything, `peak_when_released` of everything but gradients, as where each is used up at once. Where
    gradients are sharded over several devices, `peak` is the moment at which one of these holds most; its bytes are
    those of the whole gradients.
    """

    def __init__(self, num_shards: int = 1) -> None:
        self.peak, self.peak_when_released = Peak(), Peak()
        self._num_shards = num_shards
        self._alive: dict[int, Storage] = {}
        self._bytes_of: Counter[Kind] = Counter()

    def __iter__(self) -> Iterator[Storage]:
        return iter(self._alive.values())

    def follow(self, tensor: torch.Tensor, at: Any, size_bytes: int | None = None) -> None:
        """Count a tensor's storage from now on, if it is new; `size_bytes` is 0 for what was there before."""
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps one Python object for each storage
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            freed = self._alive.pop(key)
            self._bytes_of[freed.kind] -= freed.size_bytes

        size_bytes = storage.nbytes() if size_bytes is None else size_bytes
        self._alive[key] = Storage(weakref.ref(storage, gone), size_bytes, "activations", at)
        self.hold(size_bytes, at)

    def hold(self, size_bytes: int, at: Any) -> None:
        """Count bytes as alive, whether a storage stands for them or not; fewer than 0 take as many back."""
        self._bytes_of["activations"] += size_bytes
        self.note_peak(at)

    @property
    def activations(self) -> int:
        """Bytes alive now that are no gradient of a parameter."""
        return self._bytes_of["activations"]

    def of(self, tensor: torch.Tensor) -> Storage | None:
        """A tensor's storage, if it is followed."""
        return self._alive.get(id(tensor.untyped_storage()))

    def mark_as_gradient(self, tensor: torch.Tensor) -> None:
        """What was followed turned out to be the gradient of a parameter."""
        found = self.of(tensor)
        if found is not None and found.kind != "gradients":
            self._bytes_of[found.kind] -= found.size_bytes
            self._bytes_of["gradients"] += found.size_bytes
            found.kind = "gradients"

    def note_peak(self, at: Any, workspace: int = 0) -> None:
        """Compare what is alive now, and the workspace of what runs, with the peaks so far."""
        live: dict[Kind, int] = {**self._bytes_of, "workspace": workspace}
        if self._on_a_device(live) > self._on_a_device(self.peak.bytes_of):
            self.peak = Peak(live, at)
        released: dict[Kind, int] = {**live, "gradients": 0}
        if sum(released.values()) > self.peak_when_released.total:
            self.peak_when_released = Peak(released, at)

    def _on_a_device(self, bytes_of: dict[Kind, int]) -> float:
        gradients = bytes_of.get("gradients", 0)
        return sum(bytes_of.values()) - gradients + gradients / self._num_shards
