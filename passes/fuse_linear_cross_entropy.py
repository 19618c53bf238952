"""The output head and the loss  →  `fxopt::linear_cross_entropy`, which never holds the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.rewrite.graph import dtype_of, shape_of, value_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass
from fxopt.rewrite.sample import Example


class SliceBeforeLinear(Rule):
    """linear(hidden, weight)[..., rows, :]: the rows that are wanted, alone

    Source: the shift of the logits, in models that shift logits and labels themselves.
    """

    op = "linear"
    nearly = 1.0  # it prepares for the others, and is not missed

    @staticmethod
    def pattern(hidden: Any, weight: Any, bias: Any, rows: Any) -> Any:
        return F.linear(hidden, weight, bias)[..., rows, :]

    @staticmethod
    def check(hidden: fx.Node, rows: Any) -> None:
        require(len(shape_of(hidden)) > 1, "there is one row")
        ends = (rows.start, rows.stop, rows.step) if isinstance(rows, slice) else (rows,)
        require(isinstance(rows, slice) and not any(isinstance(end, fx.Node) for end in ends), "the rows vary")

    @staticmethod
    def rewrite(hidden: Any, weight: Any, bias: Any, rows: Any) -> Any:
        return F.linear(hidden[..., rows, :], weight, bias)


class ContiguousSliceBeforeLinear(SliceBeforeLinear):
    """linear(hidden, weight)[..., rows, :].contiguous(), which the shorter product is by itself"""

    @staticmethod
    def pattern(hidden: Any, weight: Any, bias: Any, rows: Any) -> Any:
        return F.linear(hidden, weight, bias)[..., rows, :].contiguous()


class FuseLinearCrossEntropy(Rule):
    """cross_entropy(linear(hidden, weight).float().view(-1, vocabulary), labels)

    Source: transformers LlamaForCausalLM.forward and transformers.loss.loss_utils.ForCausalLMLoss.
    """

    nearly = 0.2  # every loss that stays has a reason

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any,
        dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        logits = F.linear(hidden, weight, bias)
        return loss_of(logits, labels, dtype, vocabulary, ignore_index, reduction, label_smoothing)

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
    def examples(ignore_index: int, vocabulary: int) -> dict[str, list[Example]]:
        def some_ignored(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
            labels = torch.randint(0, vocabulary, shape, generator=generator, dtype=dtype)
            ignored = torch.rand(shape, generator=generator) < 0.3
            ignored.view(-1)[:1] = False  # the mean over no label is NaN, which proves nothing
            return labels.masked_fill_(ignored, ignore_index)

        def all_ignored(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
            return torch.full(shape, ignore_index, dtype=dtype)

        return {"labels": [some_ignored, all_ignored]}

    @staticmethod
    def rewrite(
        hidden: Any, weight: Any, bias: Any, labels: Any,
        dtype: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias, dtype=dtype, **options)


def loss_of(
    logits: Any, labels: Any, dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> Any:
    """The loss as every model writes it: cross_entropy(logits.float().view(-1, vocabulary), labels)."""
    rows = logits.to(dtype).view(-1, vocabulary)
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return F.cross_entropy(rows, labels, **options)


class FuseScaledLinearCrossEntropy(FuseLinearCrossEntropy):
    """The same with logits * scale

    Source: transformers CohereForCausalLM.forward.
    """

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any,
        dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        logits = F.linear(hidden, weight, bias).to(wide) * scale
        return loss_of(logits, labels, dtype, vocabulary, ignore_index, reduction, label_smoothing)

    @staticmethod
    def check(hidden: fx.Node, weight: fx.Node, labels: fx.Node, vocabulary: int, scale: Any) -> None:
        FuseLinearCrossEntropy.check(hidden, weight, labels, vocabulary)
        require(isinstance(scale, int | float), "the scale of the logits is not a number")
        require(scale > 0, f"the scale of the logits is {scale}")

    @staticmethod
    def rewrite(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any,
        dtype: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels, bias=bias, dtype=dtype, logit_scale=scale, **options
        )


class FuseDividedLinearCrossEntropy(FuseScaledLinearCrossEntropy):
    """The same with logits / scale

    Source: transformers GraniteForCausalLM.forward.
    """

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any,
        dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        logits = F.linear(hidden, weight, bias).to(wide) / scale
        return loss_of(logits, labels, dtype, vocabulary, ignore_index, reduction, label_smoothing)

    @staticmethod
    def rewrite(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any,
        dtype: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels, bias=bias, dtype=dtype, logit_scale=1 / scale, **options
        )


class FuseSoftcappedLinearCrossEntropy(FuseScaledLinearCrossEntropy):
    """The same with tanh(logits / scale) * scale

    Source: transformers Gemma2ForCausalLM.forward.
    """

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any,
        dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        logits = torch.tanh(F.linear(hidden, weight, bias).to(wide) / scale) * scale
        return loss_of(logits, labels, dtype, vocabulary, ignore_index, reduction, label_smoothing)

    @staticmethod
    def rewrite(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any,
        dtype: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels, bias=bias, dtype=dtype, softcap=scale, **options
        )


class FuseLinearCrossEntropyWithZLoss(FuseScaledLinearCrossEntropy):
    """The same, plus scale * logsumexp(logits)² on average over the labels that count

    Source: Chowdhery et al., "PaLM", arXiv:2204.02311; olmo_core.nn.functional.cross_entropy_loss.
    """

    nearly = 0.6

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any,
        dtype: Any, vocabulary: Any, ignore_index: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        rows = F.linear(hidden, weight, bias).to(dtype).view(-1, vocabulary)
        options = {"ignore_index": ignore_index, "reduction": "mean", "label_smoothing": label_smoothing}
        counts = labels != ignore_index
        squares = rows.logsumexp(-1).pow(2)
        return F.cross_entropy(rows, labels, **options) + scale * ((squares * counts).sum() / counts.sum())

    @staticmethod
    def rewrite(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any,
        dtype: Any, ignore_index: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        return linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels, bias=bias, dtype=dtype, z_loss=scale, **options
        )


FUSE_LINEAR_CROSS_ENTROPY = rules_pass(
    "fuse_linear_cross_entropy",
    ContiguousSliceBeforeLinear,  # before the next, which would leave the copy
    SliceBeforeLinear,
    FuseLinearCrossEntropyWithZLoss,
    FuseLinearCrossEntropy,
    FuseScaledLinearCrossEntropy,
    FuseDividedLinearCrossEntropy,
    FuseSoftcappedLinearCrossEntropy,
)
