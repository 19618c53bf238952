"""The output head and the log-probabilities of labels  →  `fxopt::linear_log_prob`, which never holds the logits.

Losses of preference and reinforcement learning compute them. Rows that are cut off behind the head, the rules of
`fuse_linear_cross_entropy.py` have cut off before it by then. `gather` takes no label that is out of range: here, too,
every label counts, and one that is out of range is an error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.kernels.linear_log_prob import linear_log_prob
from fxopt.passes.fuse_linear_cross_entropy import check_loss
from fxopt.rewrite.graph import shape_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass
from fxopt.rewrite.sample import Example


def of_labels(values: Any, labels: Any, axis: Any, labels_axis: Any, squeezed_axis: Any) -> Any:
    """values.gather(-1, labels.unsqueeze(-1)).squeeze(-1); the last axis is also written as a positive number."""
    return torch.gather(values, axis, torch.unsqueeze(labels, labels_axis)).squeeze(squeezed_axis)


class FuseLinearLogProb(Rule):
    """log_softmax(linear(hidden, weight).float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    Source: trl.trainer.utils.selective_log_softmax; trl.DPOTrainer.
    """

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        log_probs = torch.log_softmax(F.linear(hidden, weight, bias).to(dtype), softmax_axis)
        return of_labels(log_probs, labels, axis, labels_axis, squeezed_axis)

    @staticmethod
    def check(
        hidden: fx.Node, weight: fx.Node, labels: fx.Node,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> None:  # fmt: skip
        num_axes = len(shape_of(hidden))
        last = {-1, num_axes - 1}
        require(num_axes > 1, "there is one row")
        require(softmax_axis in last, "the softmax is not over the vocabulary")
        require({axis, labels_axis, squeezed_axis} <= last, "what is gathered is not of the vocabulary")
        check_loss(hidden, weight, labels, num_axes=num_axes - 1)
        require(shape_of(labels) == shape_of(hidden)[:-1], "the labels are not one for each row")

    @staticmethod
    def examples(weight: torch.Tensor) -> dict[str, Example]:
        def in_range(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
            labels = torch.randint(0, weight.shape[0], shape, generator=generator, dtype=dtype)
            ends = torch.tensor([weight.shape[0] - 1, 0])  # the last and the first are there
            labels.view(-1)[:2] = ends[: labels.numel()]
            return labels

        return {"labels": in_range}

    @staticmethod
    def rewrite(hidden: Any, weight: Any, bias: Any, labels: Any, dtype: Any) -> Any:
        return linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None, dtype=dtype)[0]


class FuseCastingLinearLogProb(FuseLinearLogProb):
    """The same where log_softmax(…, dtype=torch.float32) casts the logits"""

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        log_probs = torch.log_softmax(F.linear(hidden, weight, bias), softmax_axis, dtype=dtype)
        return of_labels(log_probs, labels, axis, labels_axis, squeezed_axis)

    @staticmethod
    def check(
        hidden: fx.Node, weight: fx.Node, labels: fx.Node, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> None:  # fmt: skip
        require(dtype is not None, "")  # there is no cast
        FuseLinearLogProb.check(hidden, weight, labels, softmax_axis, axis, labels_axis, squeezed_axis)


class FuseScaledLinearLogProb(FuseLinearLogProb):
    """The same with logits * scale

    Source: transformers CohereForCausalLM.forward.
    """

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        logits = F.linear(hidden, weight, bias).to(wide) * scale
        return of_labels(torch.log_softmax(logits.to(dtype), softmax_axis), labels, axis, labels_axis, squeezed_axis)

    @staticmethod
    def check(
        hidden: fx.Node, weight: fx.Node, labels: fx.Node, scale: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> None:  # fmt: skip
        FuseLinearLogProb.check(hidden, weight, labels, softmax_axis, axis, labels_axis, squeezed_axis)
        check_scale(scale)

    @staticmethod
    def rewrite(hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, dtype: Any) -> Any:
        options = {"bias": bias, "ignore_index": None, "dtype": dtype}
        return linear_log_prob(hidden, weight, labels, logit_scale=scale, **options)[0]


def check_scale(scale: Any) -> None:
    require(isinstance(scale, int | float), "the scale of the logits is not a number")
    require(scale > 0, f"the scale of the logits is {scale}")


class FuseDividedLinearLogProb(FuseScaledLinearLogProb):
    """The same with logits / scale

    Source: transformers GraniteForCausalLM.forward; the temperature of trl.GRPOTrainer.
    """

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        logits = F.linear(hidden, weight, bias).to(wide) / scale
        return of_labels(torch.log_softmax(logits.to(dtype), softmax_axis), labels, axis, labels_axis, squeezed_axis)

    @staticmethod
    def rewrite(hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, dtype: Any) -> Any:
        options = {"bias": bias, "ignore_index": None, "dtype": dtype}
        return linear_log_prob(hidden, weight, labels, temperature=scale, **options)[0]


class FuseSoftcappedLinearLogProb(FuseScaledLinearLogProb):
    """The same with tanh(logits / scale) * scale

    Source: transformers Gemma2ForCausalLM.forward.
    """

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        logits = torch.tanh(F.linear(hidden, weight, bias).to(wide) / scale) * scale
        return of_labels(torch.log_softmax(logits.to(dtype), softmax_axis), labels, axis, labels_axis, squeezed_axis)

    @staticmethod
    def rewrite(hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, dtype: Any) -> Any:
        options = {"bias": bias, "ignore_index": None, "dtype": dtype}
        return linear_log_prob(hidden, weight, labels, softcap=scale, **options)[0]


class FuseLinearLogitMinusLogSumExp(FuseLinearLogProb):
    """logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1), for logits = linear(…).float()

    Source: trl.trainer.utils.selective_log_softmax.
    """

    nearly = 0.5
    keeps_nan = False  # beside a logit of +inf, the others have -inf here, and NaN by log_softmax

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        logits = F.linear(hidden, weight, bias).to(dtype)
        return of_labels(logits, labels, axis, labels_axis, squeezed_axis) - torch.logsumexp(logits, softmax_axis)


class FuseScaledLinearLogitMinusLogSumExp(FuseScaledLinearLogProb):
    """The same with logits * scale"""

    keeps_nan = False

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        logits = (F.linear(hidden, weight, bias).to(wide) * scale).to(dtype)
        return of_labels(logits, labels, axis, labels_axis, squeezed_axis) - torch.logsumexp(logits, softmax_axis)


class FuseDividedLinearLogitMinusLogSumExp(FuseDividedLinearLogProb):
    """The same with logits / scale"""

    keeps_nan = False

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        logits = (F.linear(hidden, weight, bias).to(wide) / scale).to(dtype)
        return of_labels(logits, labels, axis, labels_axis, squeezed_axis) - torch.logsumexp(logits, softmax_axis)


class FuseSoftcappedLinearLogitMinusLogSumExp(FuseSoftcappedLinearLogProb):
    """The same with tanh(logits / scale) * scale"""

    keeps_nan = False

    @staticmethod
    def pattern(
        hidden: Any, weight: Any, bias: Any, labels: Any, scale: Any, wide: Any, dtype: Any,
        softmax_axis: Any, axis: Any, labels_axis: Any, squeezed_axis: Any,
    ) -> Any:  # fmt: skip
        logits = (torch.tanh(F.linear(hidden, weight, bias).to(wide) / scale) * scale).to(dtype)
        return of_labels(logits, labels, axis, labels_axis, squeezed_axis) - torch.logsumexp(logits, softmax_axis)


FUSE_LINEAR_LOG_PROB = rules_pass(
    "fuse_linear_log_prob",
    FuseLinearLogProb,
    FuseCastingLinearLogProb,
    FuseScaledLinearLogProb,
    FuseDividedLinearLogProb,
    FuseSoftcappedLinearLogProb,
    FuseLinearLogitMinusLogSumExp,
    FuseScaledLinearLogitMinusLogSumExp,
    FuseDividedLinearLogitMinusLogSumExp,
    FuseSoftcappedLinearLogitMinusLogSumExp,
)
