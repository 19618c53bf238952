"""Gradient clipping that also works where no two gradients exist at one time."""

from collections.abc import Sequence
from typing import Literal, SupportsFloat, get_args

import torch
from torch import Tensor

ClipBy = Literal["global", "previous", "parameter"]


class GradientClipping:
    """Scales gradients in place so that their norm is at most `max_norm`; None: does nothing.

    by: the norm that is compared: "global", of all gradients of the step; "previous", the same of the step before, and
        each gradient's own at the first; "parameter", each gradient's own.
    released: whether gradients come one by one, so that their global norm is not known in time.

    Raises ValueError for options that do not fit.
    """

    def __init__(self, max_norm: float | None, by: ClipBy, *, released: bool) -> None:
        if released not in (True, False):
            raise ValueError(f"fxopt.optimizer: release_gradients={released!r} is neither True nor False")
        if by not in get_args(ClipBy):
            raise ValueError(f"fxopt.optimizer: clip_by={by!r} is none of {', '.join(get_args(ClipBy))}")
        if max_norm is not None and not (isinstance(max_norm, SupportsFloat) and float(max_norm) > 0):
            raise ValueError(
                f"fxopt.optimizer: clip_grad_norm={max_norm!r} must be a number above 0, such as 1.0, or None for no "
                "clipping"
            )
        if max_norm is not None and released and by == "global":
            raise ValueError(
                "fxopt.optimizer: with release_gradients=True the global norm is known only when the last gradient is, "
                "after the updates: choose clip_by='previous' (scale by the norm of the step before) or "
                "clip_by='parameter' (each gradient by its own norm)"
            )
        self.max_norm, self.by = max_norm, by
        self._norms: list[Tensor] = []

    def clip(self, parameters: Sequence[Tensor], previous: float | None) -> None:
        """Clips the gradients of `parameters`; `previous` is the global norm of the step before."""
        if self.max_norm is None or not parameters:
            return
        if self.by == "global":
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
            return
        for parameter in parameters:
            assert parameter.grad is not None
            norm = torch.nn.utils.get_total_norm([parameter.grad])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all ranks
            if self.by == "previous":
                self._norms.append(norm.float().cpu())
            if self.by == "parameter" or previous is None:
                torch.nn.utils.clip_grads_with_norm_(parameter, self.max_norm, norm)
            elif previous > self.max_norm:
                parameter.grad.mul_(self.max_norm / previous)

    def finish_step(self) -> float | None:
        """The global norm of the gradients since the last call, before clipping, where "previous" needs it."""
        norms, self._norms = self._norms, []
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else None
