"""Updates inside backward, so that the gradients of a whole model never exist at one time."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fxopt.precision.optimizer import Optimizer


class UpdateInBackward:
    """Updates each parameter when backward has summed its gradient (once for a tied weight), then frees the gradient.

    Copies and pickles with its optimizer, which attaches it to the parameters anew.
    """

    def __init__(self) -> None:
        self._is_paused = False
        self._updated: set[Tensor] = set()

    def attach(self, optimizer: "Optimizer", parameters: Iterable[Tensor]) -> None:
        """Hooks the parameters that are trained and have no hook of this optimizer; those of an earlier one go."""
        for parameter in parameters:
            # Looked up, not kept: an int8 parameter that something refers to weakly could not be moved by `model.to`.
            hooks = parameter._post_accumulate_grad_hooks
            ours = {key: hook for key, hook in (hooks or {}).items() if isinstance(hook, _Hook)}
            if parameter.requires_grad and any(hook.owner() is optimizer for hook in ours.values()):
                # One that was moved has its dict of hooks still, but no longer calls them: it is told again.
                parameter._post_accumulate_grad_hooks = hooks
                continue
            for key in ours:
                del hooks[key]
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_Hook(weakref.ref(optimizer), self._update))

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


@dataclass(frozen=True, eq=False)
class _Hook:
    """Updates a parameter whose gradient is complete. It does not keep the optimizer alive."""

    owner: "weakref.ref[Optimizer]"
    update: Callable[["Optimizer", Tensor], None]

    def __call__(self, parameter: Tensor) -> None:
        if (optimizer := self.owner()) is not None:
            self.update(optimizer, parameter)


def _num_ranks() -> int:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1
