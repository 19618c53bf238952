"""The residual addition and the norm that reads it  →  `fxopt::add_rms_norm`, `fxopt::add_layer_norm`."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.kernels.add_layer_norm import add_layer_norm
from fxopt.kernels.add_rms_norm import add_rms_norm
from fxopt.kernels.layer_norm import layer_norm
from fxopt.kernels.rms_norm import rms_norm
from fxopt.rewrite.graph import dtype_of, shape_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


def check_addition(x: fx.Node, residual: fx.Node) -> None:
    require(isinstance(x, fx.Node) and isinstance(residual, fx.Node), "a number is added")
    require(dtype_of(x) == dtype_of(residual), "the addends have different dtypes")
    require(shape_of(x) == shape_of(residual), "the addition broadcasts")


class FuseAddRMSNorm(Rule):
    """summed = x + residual; rms_norm(summed), where `summed` goes on as the next residual

    Source: the pre-norm block of transformers LlamaDecoderLayer.forward.
    """

    @staticmethod
    def pattern(x: Any, residual: Any, weight: Any, eps: Any, eps_outside: Any) -> Any:
        summed = x + residual
        return summed, rms_norm(summed, weight, eps, eps_outside)

    @staticmethod
    def check(x: fx.Node, residual: fx.Node, eps_outside: bool) -> None:
        check_addition(x, residual)
        require(not eps_outside, "the norm's epsilon stands outside the root")

    @staticmethod
    def rewrite(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
        return add_rms_norm(x, residual, weight, eps)


class FuseAddLayerNorm(Rule):
    """summed = x + residual; layer_norm(summed)

    Source: the pre-norm block of transformers GPT2Block.forward; the post-norm block of BartDecoderLayer.forward.
    """

    @staticmethod
    def pattern(x: Any, residual: Any, weight: Any, bias: Any, eps: Any) -> Any:
        summed = x + residual
        return summed, layer_norm(summed, weight, bias, eps)

    check = staticmethod(check_addition)

    @staticmethod
    def rewrite(x: Any, residual: Any, weight: Any, bias: Any, eps: Any) -> Any:
        return add_layer_norm(x, residual, weight, bias, eps)


FUSE_ADD_NORM = rules_pass("fuse_add_norm", FuseAddRMSNorm, FuseAddLayerNorm)
