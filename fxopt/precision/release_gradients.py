"""Updates inside backward, so that the gradients of a whole model never exist at one time."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from fxopt.precision.optimizer import Optimizer

# One hook a parameter: an optimizer made later takes over.
_HANDLES: Any = WeakTensorKeyDictionary()


class UpdateInBackward:
    """Updates each parameter when backward has summed its gradient (once for a tied weight), then frees the gradient.

    Copies and pickles with its optimizer, which attaches it to the parameters anew.
    """

    def __init__(self) -> None:
        self._is_paused = False
        self._updated: set[Tensor] = set()

    def attach(self, optimizer: "Optimizer", parameters: Iterable[Tensor]) -> None:
        """Hooks the parameters. The hooks do not keep the optimizer alive."""
        owner = weakref.ref(optimizer)

        def update(parameter: Tensor) -> None:
            if (alive := owner()) is not None:
                self._update(alive, parameter)

        for parameter in parameters:
            old: RemovableHandle | None = _HANDLES.get(parameter)
            if old is not None:
                old.remove()
            if parameter.requires_grad:
                _HANDLES[parameter] = parameter.register_post_accumulate_grad_hook(update)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Backward leaves gradients where they are, to be summed."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def start_over(self) -> None:
        """The next gradient of a parameter is that of the next step."""
        self._updated.clear()

    def _update(self, optimizer: "Optimizer", parameter: Tensor) -> None:
        if self._is_paused:
            return
        if parameter in self._updated:
            raise RuntimeError(
                "release_gradients: a second backward pass reached a parameter that this step has updated already. "
                "Call optimizer.step() after each backward pass; to accumulate gradients, run all but the last pass "
                "under `with optimizer.no_update():` (Trainer: gradient_accumulation_steps=1); activation "
                "checkpointing needs use_reentrant=False"
            )
        if not hasattr(parameter, "to_local") and _num_ranks() > 1:
            raise RuntimeError(
                "release_gradients: the gradient is used before DistributedDataParallel has averaged it over the "
                "ranks: use fully_shard (FSDP2), or release_gradients=False"
            )
        optimizer.update([parameter])
        self._updated.add(parameter)
        parameter.grad = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_is_paused": False, "_updated": set()}


def _num_ranks() -> int:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1
