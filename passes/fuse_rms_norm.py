"""RMSNorm, in the cast orders that models use, or without casts  →  `fxopt::rms_norm`: float32 inside, rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.kernels.rms_norm import l2_norm, rms_norm
from fxopt.passes.recognize_functions import root_mean_square
from fxopt.rewrite.graph import dtype_of, shape_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseRMSNorm(Rule):
    """weight * (x * rsqrt(mean(x²) + eps)).to(dtype)

    Source: transformers LlamaRMSNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        variance = h.pow(2).mean(-1, keepdim=True)
        return weight * (h * torch.rsqrt(variance + eps)).to(dtype)

    @staticmethod
    def check(x: fx.Node, weight: fx.Node, eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
        check_norm(x, eps, wide, dtype)
        require(dtype_of(weight) == dtype, f"the weight is {dtype_of(weight)}, which promotes a {dtype} result")
        require(shape_of(weight) == shape_of(x)[-1:], f"the weight {shape_of(weight)} does not cover the last axis")

    @staticmethod
    def rewrite(x: Any, weight: Any, eps: Any) -> Any:
        return rms_norm(x, weight, eps)


def check_norm(x: fx.Node, eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
    """What all norms need: a number for epsilon, the dtype of x in the result, nothing wider inside than in the op."""
    require(isinstance(eps, int | float), "epsilon is a tensor, not a number")
    require(dtype_of(x) == dtype, f"the result is cast to {dtype}, the input is {dtype_of(x)}")
    require(wide != torch.float64 or dtype == wide, f"the norm of {dtype} is calculated in float64")


class FusePromotedRMSNorm(FuseRMSNorm):
    """weight * (x * rsqrt(mean(float32(x)²) + eps)).to(dtype), where the float32 variance promotes x

    Source: transformers T5LayerNorm.forward and CpmAntLayerNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        variance = x.to(wide).pow(2).mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(variance + eps)).to(dtype)


class FuseFloat32WeightRMSNorm(FuseRMSNorm):
    """(weight * (x * rsqrt(mean(x²) + eps))).to(dtype): the weight, or Gemma's 1 + weight, multiplies in float32

    Source: transformers Olmo2RMSNorm.forward, Gemma2RMSNorm.forward, Gemma4RMSNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        variance = h.pow(2).mean(-1, keepdim=True)
        return (weight * (h * torch.rsqrt(variance + eps))).to(dtype)

    @staticmethod
    def check(x: fx.Node, weight: fx.Node, eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
        check_norm(x, eps, wide, dtype)
        require(shape_of(weight) == shape_of(x)[-1:], f"the weight {shape_of(weight)} does not cover the last axis")


class FuseUnweightedRMSNorm(FuseRMSNorm):
    """(x * rsqrt(mean(x²) + eps)).to(dtype)

    Source: transformers Llama4TextL2Norm.forward; the normalization inside grouped and gated norms.
    """

    @staticmethod
    def pattern(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        variance = h.pow(2).mean(-1, keepdim=True)
        return (h * torch.rsqrt(variance + eps)).to(dtype)

    @staticmethod
    def check(x: fx.Node, eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
        check_norm(x, eps, wide, dtype)

    @staticmethod
    def rewrite(x: Any, eps: Any) -> Any:
        return rms_norm(x, None, eps)


class FuseL2Norm(FuseUnweightedRMSNorm):
    """(x * rsqrt(sum(x²) + eps)).to(dtype)

    Source: transformers DoryL2Norm.forward; l2norm of the linear attention of Qwen3Next.
    """

    @staticmethod
    def pattern(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + eps)).to(dtype)

    @staticmethod
    def rewrite(x: Any, eps: Any) -> Any:
        return l2_norm(x, eps)


class FuseRoundedRMSNorm(FuseUnweightedRMSNorm):
    """x * rsqrt(mean(x²) + eps).to(dtype)

    Source: transformers DeepseekV4UnweightedRMSNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        variance = x.to(wide).pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + eps).to(dtype)


class FuseOuterEpsilonRMSNorm(FuseRMSNorm):
    """weight * (x / (sqrt(mean(x²)) + eps)).to(dtype)

    Source: the authors' RMSNorm, rmsnorm_torch.RMSNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        return weight * (h / (root_mean_square(h) + eps)).to(dtype)

    @staticmethod
    def rewrite(x: Any, weight: Any, eps: Any) -> Any:
        return rms_norm(x, weight, eps, True)


class FuseOuterEpsilonFloat32WeightRMSNorm(FuseFloat32WeightRMSNorm):
    """(weight * (x / (sqrt(mean(x²)) + eps))).to(dtype)"""

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        return (weight * (h / (root_mean_square(h) + eps))).to(dtype)

    rewrite = staticmethod(FuseOuterEpsilonRMSNorm.rewrite)


class FuseOuterEpsilonScaledRMSNorm(FuseOuterEpsilonFloat32WeightRMSNorm):
    """(weight * x / (sqrt(mean(x²)) + eps)).to(dtype)"""

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        return (weight * h / (root_mean_square(h) + eps)).to(dtype)


class FuseOuterEpsilonUnweightedRMSNorm(FuseUnweightedRMSNorm):
    """(x / (sqrt(mean(x²)) + eps)).to(dtype)"""

    @staticmethod
    def pattern(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        return (h / (root_mean_square(h) + eps)).to(dtype)

    @staticmethod
    def rewrite(x: Any, eps: Any) -> Any:
        return rms_norm(x, None, eps, True)


class FuseTorchRMSNorm(FuseRMSNorm):
    """torch.rms_norm(x, (D,), weight, eps)

    Source: torch.nn.functional.rms_norm, which torch.nn.RMSNorm.forward calls.
    """

    @staticmethod
    def pattern(x: Any, shape: Any, weight: Any, eps: Any) -> Any:
        return torch.rms_norm(x, shape, weight, eps)

    @staticmethod
    def check(x: fx.Node, shape: tuple[int, ...], weight: fx.Node | None, eps: float | None) -> None:
        require(len(shape) == 1, f"the norm is over the last {len(shape)} axes")
        require(weight is None or dtype_of(weight) == dtype_of(x), f"the weight is {dtype_of(weight)}")
        require(eps is not None, "no epsilon is given: torch takes that of the dtype it calculates in")


FUSE_RMS_NORM = rules_pass(
    "fuse_rms_norm",
    FuseFloat32WeightRMSNorm,  # before the next, which would find its float32 part alone
    FuseRMSNorm,
    FusePromotedRMSNorm,
    FuseUnweightedRMSNorm,  # after those that it is a part of
    FuseL2Norm,
    FuseRoundedRMSNorm,
    FuseOuterEpsilonFloat32WeightRMSNorm,
    FuseOuterEpsilonRMSNorm,
    FuseOuterEpsilonScaledRMSNorm,
    FuseOuterEpsilonUnweightedRMSNorm,
    FuseTorchRMSNorm,
)
