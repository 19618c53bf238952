"""What a forward call may leave changed in a model beside its results, and giving it back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None))


class ModelState:
    """A model's buffers, its plain attributes (a count of calls, a flag) and the random state, as they are now."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._buffers = [(m._buffers, name, b, b.detach().clone()) for m in modules for name, b in _named_buffers(m)]
        self._attributes = [(m.__dict__, {k: v for k, v in vars(m).items() if type(v) in PLAIN}) for m in modules]
        self._random = torch.get_rng_state()
        self._random_of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def give_back(self) -> None:
        """Make the model and the random state what they were, buffers that were replaced included."""
        with torch.no_grad():
            for buffers, name, buffer, value in self._buffers:
                buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for attributes, values in self._attributes:
            attributes.update(values)
        torch.set_rng_state(self._random)
        if self._random_of_gpus:
            torch.cuda.set_rng_state_all(self._random_of_gpus)


def _named_buffers(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
