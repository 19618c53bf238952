"""Gated linear units  →  `fxopt::swiglu`, `fxopt::geglu`, `fxopt::reglu`, `fxopt::clamped_swiglu`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.kernels.clamped_swiglu import clamped_swiglu
from fxopt.kernels.glu import geglu, reglu, swiglu
from fxopt.rewrite.graph import dtype_of, shape_of
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


class FuseCastSwiGLU(FuseSwiGLU):
    """silu(gate.float()).to(dtype) * up: the activation alone in float32"""

    @staticmethod
    def pattern(gate: Any, up: Any, wide: Any, dtype: Any) -> Any:
        return F.silu(gate.to(wide)).to(dtype) * up

    @staticmethod
    def check(gate: fx.Node, up: fx.Node, wide: torch.dtype, dtype: torch.dtype) -> None:
        FuseSwiGLU.check(gate, up)
        require(wide != torch.float64, "the activation is calculated in float64")
        require(dtype_of(gate) == dtype, f"the activation is cast to {dtype}, the gate is {dtype_of(gate)}")


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


class FuseClampedSwiGLU(Rule):
    """(up + 1) * gate * sigmoid(alpha * gate), gate clamped from above and up on both sides

    Source: transformers GptOssExperts._apply_gate; from halves instead of pairs, MiniMaxM3VLExperts._apply_gate.
    """

    @staticmethod
    def pattern(gate: Any, up: Any, alpha: Any, limit: Any, lowest: Any, one: Any) -> Any:
        clamped = gate.clamp(max=limit)
        return (up.clamp(min=lowest, max=limit) + one) * (clamped * torch.sigmoid(clamped * alpha))

    @staticmethod
    def check(gate: fx.Node, up: fx.Node, alpha: Any, limit: Any, lowest: Any, one: Any) -> None:
        FuseSwiGLU.check(gate, up)
        numbers = {"steepness": alpha, "limit": limit, "lower limit": lowest, "summand": one}
        for name, number in numbers.items():
            require(isinstance(number, int | float), f"the {name} is {number}, not a number")
        require(limit >= 0 and lowest == -limit, f"up is clamped to [{lowest}, {limit}], not to [-{limit}, {limit}]")
        require(one == 1, f"up is added to {one}, not to 1")

    @staticmethod
    def rewrite(gate: Any, up: Any, alpha: Any, limit: Any) -> Any:
        return clamped_swiglu(gate, up, alpha, limit)


FUSE_GLU = rules_pass("fuse_glu", FuseSwiGLU, FuseCastSwiGLU, FuseGeGLU, FuseReGLU, FuseClampedSwiGLU)
