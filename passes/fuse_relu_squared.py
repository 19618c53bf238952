"""Squared ReLU  →  `fxopt::relu_squared`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx

from fxopt.kernels.relu_squared import relu_squared
from fxopt.rewrite.graph import dtype_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseReLUSquared(Rule):
    """relu(x)²

    Source: transformers ReLUSquaredActivation.forward.
    """

    @staticmethod
    def pattern(x: Any) -> Any:
        return F.relu(x).square()

    @staticmethod
    def check(x: fx.Node) -> None:
        dtype = dtype_of(x)
        require(dtype is not None and dtype.is_floating_point, f"the input is {dtype}, not floating point")

    @staticmethod
    def rewrite(x: Any) -> Any:
        return relu_squared(x)


FUSE_RELU_SQUARED = rules_pass("fuse_relu_squared", FuseReLUSquared)
