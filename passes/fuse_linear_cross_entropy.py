"""The output head and the loss  →  `fxopt::linear_cross_entropy`, which never holds the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.rewrite.graph import dtype_of, shape_of, value_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseLinearCrossEntropy(Rule):
    """cross_entropy(linear(hidden, weight).float().view(-1, vocabulary), labels)

    Source: transformers LlamaForCausalLM.forward and transformers.loss.loss_utils.ForCausalLMLoss.
    """

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, vocabulary: Any, ignore_index: Any, reduction: Any
    ) -> Any:
        logits = F.linear(hidden, weight, bias).float().view(-1, vocabulary)
        return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)

    @staticmethod
    def check(hidden: fx.Node, weight: fx.Node, labels: fx.Node, vocabulary: int) -> None:
        dtype, device = dtype_of(hidden), value_of(hidden).device.type
        require(dtype != torch.float16, "float16 gradients would be computed before the loss is scaled, and underflow")
        cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype
        require(not cast, f"autocast casts the {dtype} inputs of the output head")
        require(shape_of(weight)[:1] == (vocabulary,), f"the logits are viewed as rows of {vocabulary}")
        require(len(shape_of(labels)) == 1, "the labels are not one class for each row")
        require(not dtype_of(labels).is_floating_point, "the labels are probabilities")  # type: ignore[union-attr]

    @staticmethod
    def examples(ignore_index: int) -> dict[str, Callable[..., torch.Tensor]]:
        def some_ignored(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
            labels = torch.randint(0, 32, shape, generator=generator, dtype=dtype)
            return labels.masked_fill_(torch.rand(shape, generator=generator) < 0.3, ignore_index)

        return {"labels": some_ignored}

    @staticmethod
    def rewrite(hidden: Any, weight: Any, bias: Any, labels: Any, ignore_index: Any, reduction: Any) -> Any:
        rows = hidden.flatten(0, -2)
        return linear_cross_entropy(rows, weight, labels, bias=bias, ignore_index=ignore_index, reduction=reduction)


FUSE_LINEAR_CROSS_ENTROPY = rules_pass("fuse_linear_cross_entropy", FuseLinearCrossEntropy)
