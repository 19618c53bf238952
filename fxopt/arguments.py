"""Arguments of the wrong kind, told in a sentence instead of by what fails on them."""

from __future__ import annotations

from torch import nn


def require_module(function: str, model: object) -> None:
    """Raises TypeError if what `fxopt.<function>` was given for its model is none."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(
            f"fxopt.{function} takes the model, a torch.nn.Module, not {kind}: load the model first, and call "
            f"fxopt.{function}(model, …)"
        )
