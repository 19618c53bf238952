"""Log-probabilities of a model's output, without its logits: what losses of preference and reinforcement learning need.

The output of an optimized call holds deferred logits. What they are computed from, the hidden states and the output
head, is enough for `linear_log_prob`. The gradient takes the way that it would take through real logits, past the same
hooks and wrappers, but as a `DeferredTensor` as well: the node that made the logits asks it for the gradients of hidden
states and weights, which are computed chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.deferred_logits import FactoredGradient, HeadInputs
from fxopt.deferred_tensor import DeferredTensor
from fxopt.kernels.linear_log_prob import (
    LogProbs,
    SavedSoftmax,
    linear_log_prob_backward,
    linear_log_prob_forward,
)
from fxopt.precision.parameter_storage import is_int8


def token_log_probs(
    outputs: Any,
    labels: Tensor,
    *,
    shifted: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    entropy: bool = False,
) -> LogProbs:
    """The log-probability of each label under a model's output, and what else the softmax tells of it.

    Where `outputs` is that of an optimized call whose logits nobody has read, they are not computed: memory is that of
    a chunk of them. Otherwise they are used as they are. Differentiable once.

    Args:
        outputs: a model's output with `logits` (B, L, V), a dict with them, or the logits themselves.
        labels: (B, L) int64, as the model takes them: the logits of a token are for the label of the next.
        shifted: whether the labels are shifted already: the logits of a token are for the label in the same place.
        ignore_index: the label of tokens that do not count; their results are 0 and False.
        temperature: what the logits are divided by.
        entropy: whether the entropy of each softmax is computed, too.

    Returns:
        log_prob, entropy (None unless asked for), logsumexp: float32 (float64 for float64 logits); is_top: bool,
        whether the label is the most likely token. All (B, L - 1), or (B, L) if `shifted`.

    Raises:
        ValueError: there are no logits, labels of another shape, or a temperature that is not positive.
        RuntimeError: labels that are not int64, or parameters that have changed since the call.
        IndexError: a label out of range (on a GPU a device-side assertion).

    Source: `LogProbs` in `kernels/linear_log_prob.py`.
    """
    logits = _logits_of(outputs)
    if not isinstance(labels, Tensor):
        raise ValueError(f"token_log_probs: labels are {type(labels).__name__}; they must be a tensor")
    if labels.shape != logits.shape[:-1] or logits.ndim < 2:
        raise ValueError(
            f"token_log_probs: labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}; for each row of "
            "logits there must be one label"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"token_log_probs: temperature is {temperature}; it must be positive and finite")
    if not shifted:  # the last logits are for no label: rows that are left out cost nothing
        labels = torch.cat([labels[..., 1:], labels.new_full((*labels.shape[:-1], 1), ignore_index)], dim=-1)
    if isinstance(logits, DeferredTensor) and not logits.is_computed and _has_plain_head(logits.source):
        *floats, is_top = _LogProbs.apply(logits, labels, ignore_index, temperature, entropy)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        results = LogProbs._make((*(None if each is None else each.to(dtype) for each in floats), is_top))
    else:
        results = log_probs_of_logits(logits, labels, ignore_index, temperature, entropy)
    return results if shifted else LogProbs(*(None if each is None else each[..., :-1] for each in results))  # type: ignore[arg-type]


def log_probs_of_logits(
    logits: Tensor, labels: Tensor, ignore_index: int, temperature: float, entropy: bool
) -> LogProbs:
    """The same of logits (..., V) that are there: labels (...) stand in their places already."""
    if labels.dtype != torch.int64:
        raise RuntimeError(f"token_log_probs: labels are {labels.dtype}; they must be torch.int64")
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z if temperature == 1.0 else z / temperature
    counts = labels != ignore_index
    if labels.device.type == "cpu" and (out := labels[counts & ((labels < 0) | (labels >= z.shape[-1]))]).numel():
        raise IndexError(f"token_log_probs: label {int(out[0])} is out of bounds for {z.shape[-1]} classes")
    logsumexp = z.logsumexp(-1)
    log_prob = z.gather(-1, labels.where(counts, 0).unsqueeze(-1)).squeeze(-1) - logsumexp
    found: Tensor | None = None
    if entropy:
        log_probs = z - logsumexp.unsqueeze(-1)
        found = -(log_probs.exp() * log_probs).sum(-1).where(counts, 0.0)
    is_top = (logits.detach().argmax(-1) == labels) & counts
    return LogProbs(log_prob.where(counts, 0.0), found, logsumexp.where(counts, 0.0), is_top)


def _logits_of(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"token_log_probs: this {type(outputs).__name__} has no `logits`; give the logits themselves")
    return logits


def _has_plain_head(source: Any) -> bool:
    """Whether the logits are those of an output head that `linear_log_prob` computes as the model does."""
    if not isinstance(source, HeadInputs) or source.head is None:
        return False
    hidden, weight = source.inputs[source.head.hidden], source.inputs[source.head.weight]
    return weight.dtype == hidden.dtype and source.computes_in(hidden.dtype)


@dataclass(frozen=True)
class _Call:
    """The arguments of `linear_log_prob` for one output head."""

    source: HeadInputs
    labels: Tensor
    ignore_index: int
    temperature: float

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        head = self.source.head
        assert head is not None
        weight = self.source.inputs[head.weight]
        return self.source.inputs[head.hidden], weight.dequantize() if is_int8(weight) else weight, self.labels

    def options(self) -> dict[str, Any]:
        head = self.source.head
        assert head is not None
        return {
            "bias": None if head.bias is None else self.source.inputs[head.bias],
            "ignore_index": self.ignore_index,
            "temperature": self.temperature,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
        }


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: DeferredTensor, labels: Tensor, ignore_index: int, temperature: float, entropy: bool
    ) -> tuple[Tensor | None, ...]:
        logits.source.check()
        ctx.call = _Call(logits.source, labels, ignore_index, temperature)
        ctx.like = logits.shape, logits.dtype, logits.device
        ctx.set_materialize_grads(False)
        results, ctx.saved = linear_log_prob_forward(*ctx.call.arguments(), **ctx.call.options(), with_entropy=entropy)
        ctx.mark_non_differentiable(results.is_top)
        return tuple(results)

    @staticmethod
    def backward(
        ctx: Any, dlog_prob: Tensor | None, dentropy: Tensor | None, dlogsumexp: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "token_log_probs can be differentiated only once, and create_graph=True asks for more: use "
                "fxopt.restore(model), and log_softmax on the logits"
            )
        if dlog_prob is dentropy is dlogsumexp is None:
            return None, None, None, None, None
        gradient = _LogProbGradient(ctx.call.source, ctx.call, ctx.saved, (dlog_prob, dentropy, dlogsumexp))
        shape, dtype, device = ctx.like
        return DeferredTensor(gradient.of_logits, shape, dtype, device, gradient), None, None, None, None


@dataclass(frozen=True)
class _LogProbGradient(FactoredGradient):
    """The gradient of deferred logits, in the three numbers a row that it comes from."""

    logits_from: HeadInputs
    call: _Call
    saved: SavedSoftmax
    of_results: tuple[Tensor | None, Tensor | None, Tensor | None]

    def gradients(self, wanted: Sequence[bool]) -> Iterator[Tensor | None]:
        self.logits_from.check()
        head = self.logits_from.head
        assert head is not None
        places = head.hidden, head.weight, head.bias
        found = linear_log_prob_backward(
            *self.of_results,
            *self.call.arguments(),
            self.saved,
            **self.call.options(),
            wanted=(wanted[head.hidden], wanted[head.weight], head.bias is not None and wanted[head.bias]),
        )
        by_place = dict(zip(places, found, strict=True))
        return (by_place.get(place) for place in range(len(wanted)))

    def of_logits(self) -> Tensor:
        """The gradient as a tensor (..., V): somebody looks at it, or adds another to it."""
        call = self.call
        with call.source.as_in_the_call(grad_enabled=True):
            logits = call.source.logits().detach().requires_grad_()
            results = log_probs_of_logits(
                logits, call.labels, call.ignore_index, call.temperature, self.saved.entropy is not None
            )
            outputs, gradients = list[Tensor](), list[Tensor]()
            for result, gradient in zip(results[:3], self.of_results, strict=True):
                if result is not None and gradient is not None:
                    outputs.append(result)
                    gradients.append(gradient)
            (found,) = torch.autograd.grad(outputs, [logits], gradients)
        return found
