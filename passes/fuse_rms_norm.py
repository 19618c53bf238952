"""RMSNorm, in the cast orders that models use  →  `fxopt::rms_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.kernels.rms_norm import rms_norm
from fxopt.rewrite.graph import dtype_of, shape_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseRMSNorm(Rule):
    """weight * (x * rsqrt(mean(x²) + eps)).to(dtype)

    Source: transformers LlamaRMSNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, dtype: Any) -> Any:
        h = x.to(torch.float32)
        variance = h.pow(2).mean(-1, keepdim=True)
        return weight * (h * torch.rsqrt(variance + eps)).to(dtype)

    @staticmethod
    def check(x: fx.Node, weight: fx.Node, dtype: torch.dtype) -> None:
        require(dtype_of(x) == dtype, f"the result is cast to {dtype}, the input is {dtype_of(x)}")
        require(dtype_of(weight) == dtype, f"the weight is {dtype_of(weight)}, which promotes a {dtype} result")
        require(shape_of(weight) == shape_of(x)[-1:], f"the weight {shape_of(weight)} does not cover the last axis")

    @staticmethod
    def rewrite(x: Any, weight: Any, eps: Any) -> Any:
        return rms_norm(x, weight, eps)


class FuseFloat32RMSNorm(FuseRMSNorm):
    """The same on float32 input, where `remove_casts` has taken both casts away."""

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any) -> Any:
        variance = x.pow(2).mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(variance + eps))

    @staticmethod
    def check(x: fx.Node, weight: fx.Node) -> None:
        require(dtype_of(x) == torch.float32, f"the input is {dtype_of(x)}, and the variance is not in float32")
        FuseRMSNorm.check(x, weight, torch.float32)


FUSE_RMS_NORM = rules_pass("fuse_rms_norm", FuseRMSNorm, FuseFloat32RMSNorm)
