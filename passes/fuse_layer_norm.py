"""LayerNorm  →  `fxopt::layer_norm`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.kernels.layer_norm import layer_norm
from fxopt.kernels.rms_norm import deviation_norm
from fxopt.passes.fuse_rms_norm import check_norm
from fxopt.rewrite.graph import cast, shape_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseLayerNorm(Rule):
    """layer_norm(x, (D,), weight, bias, eps), of x itself or of its float32 copy

    Source: torch.nn.LayerNorm.forward; transformers OlmoLayerNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, shape: Any, weight: Any, bias: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        return F.layer_norm(x.to(wide), shape, weight, bias, eps).to(dtype)

    @staticmethod
    def check(x: fx.Node, shape: tuple[int, ...], eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
        require(len(shape) == 1, f"the norm is over the last {len(shape)} axes")
        check_norm(x, eps, wide, dtype)

    @staticmethod
    def rewrite(x: Any, weight: Any, bias: Any, eps: Any) -> Any:
        return layer_norm(x, weight, bias, eps)


class FuseFloat32LayerNorm(Rule):
    """(weight * (x - mean(x)) * rsqrt(mean((x - mean(x))²) + eps)).to(dtype), in float32 or in the dtype of x

    Source: transformers CohereLayerNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        centered = h - h.mean(-1, keepdim=True)
        variance = centered.pow(2).mean(-1, keepdim=True)
        return (weight.to(wide) * (centered * torch.rsqrt(variance + eps))).to(dtype)

    @staticmethod
    def check(x: fx.Node, weight: fx.Node, eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
        check_norm(x, eps, wide, dtype)
        require(shape_of(weight) == shape_of(x)[-1:], f"the weight {shape_of(weight)} does not cover the last axis")

    @staticmethod
    def rewrite(x: Any, weight: Any, eps: Any) -> Any:
        return layer_norm(x, weight, None, eps)


class FuseUnweightedLayerNorm(FuseFloat32LayerNorm):
    """((x - mean(x)) * rsqrt(mean((x - mean(x))²) + eps)).to(dtype): what is left where the weight is no vector

    Source: transformers CohereLayerNorm.forward, with a weight for each head.
    """

    @staticmethod
    def pattern(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        centered = h - h.mean(-1, keepdim=True)
        variance = centered.pow(2).mean(-1, keepdim=True)
        return (centered * torch.rsqrt(variance + eps)).to(dtype)

    @staticmethod
    def check(x: fx.Node, eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
        check_norm(x, eps, wide, dtype)

    @staticmethod
    def rewrite(x: Any, eps: Any) -> Any:
        return layer_norm(x, None, None, eps)


class FuseVarianceLayerNorm(FuseUnweightedLayerNorm):
    """((x - mean(x)) * rsqrt(var(x) + eps)).to(dtype)

    Source: transformers xLSTMMultiHeadLayerNorm.forward.
    """

    @staticmethod
    def pattern(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        variance = h.var(dim=-1, keepdim=True, unbiased=False)
        return ((h - h.mean(-1, keepdim=True)) * torch.rsqrt(variance + eps)).to(dtype)


class FuseVarianceAndMeanLayerNorm(FuseUnweightedLayerNorm):
    """The same with `torch.var_mean`"""

    @staticmethod
    def pattern(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        both = torch.var_mean(h, dim=-1, keepdim=True, unbiased=False)
        return ((h - both[1]) * torch.rsqrt(both[0] + eps)).to(dtype)


class FuseDeviationLayerNorm(FuseUnweightedLayerNorm):
    """((x - mean(x)) / (std(x) + eps)).to(dtype)

    Source: modelling code outside transformers, as in The Annotated Transformer.
    """

    @staticmethod
    def pattern(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        return ((h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + eps)).to(dtype)

    @staticmethod
    def check(x: fx.Node, eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
        check_norm(x, eps, wide, dtype)
        width = shape_of(x)[-1]
        require(isinstance(width, int) and width > 1, f"{width} numbers have no standard deviation")

    @staticmethod
    def rewrite(x: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        return cast(deviation_norm(cast(x, wide), None, eps), dtype)


class FuseScaledDeviationLayerNorm(FuseDeviationLayerNorm):
    """(weight * (x - mean(x)) / (std(x) + eps)).to(dtype)"""

    @staticmethod
    def pattern(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        h = x.to(wide)
        return (weight * (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + eps)).to(dtype)

    @staticmethod
    def check(x: fx.Node, weight: fx.Node, eps: Any, wide: torch.dtype, dtype: torch.dtype) -> None:
        FuseDeviationLayerNorm.check(x, eps, wide, dtype)
        require(shape_of(weight) == shape_of(x)[-1:], f"the weight {shape_of(weight)} does not cover the last axis")

    @staticmethod
    def rewrite(x: Any, weight: Any, eps: Any, wide: Any, dtype: Any) -> Any:
        return cast(deviation_norm(cast(x, wide), weight, eps), dtype)


FUSE_LAYER_NORM = rules_pass(
    "fuse_layer_norm",
    FuseLayerNorm,
    FuseFloat32LayerNorm,
    FuseUnweightedLayerNorm,  # after the one that it is a part of
    FuseVarianceLayerNorm,
    FuseVarianceAndMeanLayerNorm,
    FuseDeviationLayerNorm,
    FuseScaledDeviationLayerNorm,
)
