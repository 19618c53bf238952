"""The output head and the loss  →  `fxopt::linear_cross_entropy`, which never holds the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.passes.widen_int8_head import with_int8_heads
from fxopt.rewrite.graph import cast, dtype_of, shape_of, value_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass
from fxopt.rewrite.sample import Example, examples_of_labels


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
    def check(hidden: fx.Node, weight: fx.Node, rows: Any) -> None:
        require(len(shape_of(hidden)) > 1 and len(shape_of(weight)) == 2, "there is one row, or one class")
        ends = (rows.start, rows.stop, rows.step) if isinstance(rows, slice) else (rows,)
        require(isinstance(rows, slice) and not any(isinstance(end, fx.Node) for end in ends), "the rows vary")

    @staticmethod
    def rewrite(hidden: Any, weight: Any, bias: Any, rows: Any) -> Any:
        return F.linear(hidden[..., rows, :].contiguous(), weight, bias)  # with a bias, strided rows round twice


class SliceBeforeCastLinear(SliceBeforeLinear):
    """The same with a cast between

    Source: models that shift float32 logits themselves, as all of transformers' did once.
    """

    @staticmethod
    def pattern(hidden: Any, weight: Any, bias: Any, dtype: Any, rows: Any) -> Any:
        return F.linear(hidden, weight, bias).to(dtype)[..., rows, :]

    @staticmethod
    def check(hidden: fx.Node, weight: fx.Node, dtype: torch.dtype, rows: Any) -> None:
        require(dtype_of(hidden) != dtype, "")  # there is no cast
        SliceBeforeLinear.check(hidden, weight, rows)

    @staticmethod
    def rewrite(hidden: Any, weight: Any, bias: Any, dtype: Any, rows: Any) -> Any:
        return cast(F.linear(hidden[..., rows, :].contiguous(), weight, bias), dtype)


class ContiguousSliceBeforeLinear(SliceBeforeLinear):
    """linear(hidden, weight)[..., rows, :].contiguous(), which the shorter product is by itself"""

    @staticmethod
    def pattern(hidden: Any, weight: Any, bias: Any, rows: Any) -> Any:
        return F.linear(hidden, weight, bias)[..., rows, :].contiguous()


class ContiguousSliceBeforeCastLinear(SliceBeforeCastLinear):
    """linear(hidden, weight).float()[..., rows, :].contiguous()"""

    @staticmethod
    def pattern(hidden: Any, weight: Any, bias: Any, dtype: Any, rows: Any) -> Any:
        return F.linear(hidden, weight, bias).to(dtype)[..., rows, :].contiguous()


class CastBeforeView(Rule):
    """cross_entropy(logits.view(-1, vocabulary).float(), labels), with the cast first as in most models"""

    op = "cross_entropy"
    nearly = 1.0

    @staticmethod
    def pattern(
        logits: Any, labels: Any, dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
    ) -> Any:
        rows = logits.view(-1, vocabulary).to(dtype)
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return F.cross_entropy(rows, labels, **options)

    @staticmethod
    def check(logits: fx.Node, dtype: torch.dtype) -> None:
        require(dtype_of(logits) != dtype, "")  # there is no cast

    @staticmethod
    def examples(ignore_index: int, logits: torch.Tensor) -> dict[str, list[Example]]:
        return examples_of_labels(logits.shape[-1], ignore_index)

    @staticmethod
    def rewrite(
        logits: Any, labels: Any, dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
    ) -> Any:
        rows = cast(logits, dtype).reshape((-1, vocabulary))
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return F.cross_entropy(rows, labels, **options)


class FuseLinearCrossEntropy(Rule):
    """cross_entropy(linear(hidden, weight).float().view(-1, vocabulary), labels)

    Source: transformers LlamaForCausalLM.forward and transformers.loss.loss_utils.ForCausalLMLoss.
    """

    nearly = 0.2  # every loss that stays has a reason
    keeps_no_result = True

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any,
        dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        logits = F.linear(hidden, weight, bias)
        return loss_of(logits, labels, dtype, vocabulary, ignore_index, reduction, label_smoothing)

    @staticmethod
    def check(hidden: fx.Node, weight: fx.Node, labels: fx.Node, vocabulary: int) -> None:
        require(shape_of(weight)[:1] == (vocabulary,), f"the logits are viewed as rows of {vocabulary}")
        check_loss(hidden, weight, labels)

    @staticmethod
    def examples(ignore_index: int, weight: torch.Tensor) -> dict[str, list[Example]]:
        return examples_of_labels(weight.shape[0], ignore_index)

    @staticmethod
    def rewrite(
        hidden: Any, weight: Any, bias: Any, labels: Any,
        dtype: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias, dtype=dtype, **options)


def check_loss(hidden: fx.Node, weight: fx.Node, labels: fx.Node, num_axes: int = 1) -> None:
    """What all losses need: dtypes that the op rounds as the model does, and one class for each row."""
    dtype, device = dtype_of(hidden), value_of(hidden).device.type
    require(dtype != torch.float16, "float16 gradients would be computed before the loss is scaled, and underflow")
    is_cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype
    require(not is_cast, f"autocast casts the {dtype} inputs of the output head")
    require(len(shape_of(labels)) == num_axes, "the labels are not one class for each row")
    require(not dtype_of(labels).is_floating_point, "the labels are probabilities")  # type: ignore[union-attr]
    require(dtype_of(labels) == torch.int64, f"the labels are {dtype_of(labels)}")


def loss_of(
    logits: Any, labels: Any, dtype: Any, vocabulary: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> Any:
    """The loss as every model writes it: cross_entropy(logits.float().view(-1, vocabulary), labels)."""
    rows = logits.to(dtype).view(-1, vocabulary)
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return F.cross_entropy(rows, labels, **options)


class FuseRowsLinearCrossEntropy(FuseLinearCrossEntropy):
    """The same where hidden has two axes already"""

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any,
        dtype: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        rows = F.linear(hidden, weight, bias).to(dtype)
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return F.cross_entropy(rows, labels, **options)

    @staticmethod
    def check(hidden: fx.Node, weight: fx.Node, labels: fx.Node) -> None:
        require(len(shape_of(hidden)) == 2, "the logits are no rows of the vocabulary")
        check_loss(hidden, weight, labels)

    @staticmethod
    def rewrite(
        hidden: Any, weight: Any, bias: Any, labels: Any,
        dtype: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return linear_cross_entropy(hidden, weight, labels, bias=bias, dtype=dtype, **options)


class FuseTransposedLinearCrossEntropy(FuseRowsLinearCrossEntropy):
    """cross_entropy(linear(hidden, weight).transpose(1, 2), labels), with labels (batch, length)"""

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any,
        dtype: Any, ignore_index: Any, reduction: Any, label_smoothing: Any,
    ) -> Any:  # fmt: skip
        logits = torch.transpose(F.linear(hidden, weight, bias).to(dtype), 1, 2)
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return F.cross_entropy(logits, labels, **options)

    @staticmethod
    def check(hidden: fx.Node, weight: fx.Node, labels: fx.Node) -> None:
        require(len(shape_of(hidden)) == 3, "the logits have other axes than batch, length and vocabulary")
        check_loss(hidden, weight, labels, num_axes=2)


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


_RULES = rules_pass(
    "fuse_linear_cross_entropy",
    CastBeforeView,
    ContiguousSliceBeforeCastLinear,  # before the two that would leave the copy
    ContiguousSliceBeforeLinear,
    SliceBeforeCastLinear,
    SliceBeforeLinear,
    FuseLinearCrossEntropyWithZLoss,
    FuseLinearCrossEntropy,
    FuseRowsLinearCrossEntropy,
    FuseTransposedLinearCrossEntropy,
    FuseScaledLinearCrossEntropy,
    FuseDividedLinearCrossEntropy,
    FuseSoftcappedLinearCrossEntropy,
)
FUSE_LINEAR_CROSS_ENTROPY = with_int8_heads(_RULES)
