"""A gated linear unit and the projection that reads it  →  `fxopt::swiglu_linear`, which does not save the product."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx

from fxopt.kernels.glu import swiglu
from fxopt.kernels.glu_linear import swiglu_linear
from fxopt.rewrite.graph import dtype_of, tensor_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseSwiGLULinear(Rule):
    """linear(swiglu(gate, up), weight, bias)

    Source: the down projection of transformers LlamaMLP.forward.
    """

    @staticmethod
    def pattern(gate: Any, up: Any, weight: Any, bias: Any) -> Any:
        return F.linear(swiglu(gate, up), weight, bias)

    @staticmethod
    def check(gate: fx.Node, weight: fx.Node) -> None:
        require(tensor_of(weight) is not None, "the weight is not a tensor")
        require(dtype_of(gate) == dtype_of(weight), f"gate is {dtype_of(gate)}, the weight is {dtype_of(weight)}")

    @staticmethod
    def rewrite(gate: Any, up: Any, weight: Any, bias: Any) -> Any:
        return swiglu_linear(gate, up, weight, bias)


FUSE_GLU_LINEAR = rules_pass("fuse_glu_linear", FuseSwiGLULinear)
