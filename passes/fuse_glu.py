"""Gated linear units  →  `fxopt::swiglu`, `fxopt::geglu`, `fxopt::reglu`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx

from fxopt.kernels.glu import geglu, reglu, swiglu
from fxopt.rewrite.graph import shape_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseSwiGLU(Rule):
    """silu(gate) * up

    Source: transformers LlamaMLP.forward.
    """

    @staticmethod
    def pattern(gate: Any, up: Any) -> Any:
        return F.silu(gate) * up

    @staticmethod
    def check(gate: fx.Node, up: fx.Node) -> None:
        require(isinstance(up, fx.Node), "the activation is multiplied by a number")
        require(shape_of(gate) == shape_of(up), f"gate {shape_of(gate)} and up {shape_of(up)} have different shapes")

    @staticmethod
    def rewrite(gate: Any, up: Any) -> Any:
        return swiglu(gate, up)


class FuseGeGLU(FuseSwiGLU):
    """gelu(gate) * up, exact or by tanh

    Source: transformers GemmaMLP.forward.
    """

    @staticmethod
    def pattern(gate: Any, up: Any, approximate: Any) -> Any:
        return F.gelu(gate, approximate=approximate) * up

    @staticmethod
    def rewrite(gate: Any, up: Any, approximate: Any) -> Any:
        return geglu(gate, up, approximate)


class FuseReGLU(FuseSwiGLU):
    """relu(gate) * up"""

    @staticmethod
    def pattern(gate: Any, up: Any) -> Any:
        return F.relu(gate) * up

    @staticmethod
    def rewrite(gate: Any, up: Any) -> Any:
        return reglu(gate, up)


FUSE_GLU = rules_pass("fuse_glu", FuseSwiGLU, FuseGeGLU, FuseReGLU)
