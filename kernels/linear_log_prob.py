"""Linear layer and log-probabilities without the logits:  log_prob = log_softmax(hidden @ weightᵀ + bias)[labels].

Source: `torch.nn.functional.log_softmax` and `torch.gather`, as losses of preference and reinforcement learning use
them: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290; Shao et al. (GRPO), arXiv:2402.03300.
Softmax and Σ p z in one pass as Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
Shapes: hidden (..., D), weight (V, D), bias (V,), labels (...) int64 -> log_prob, entropy, logsumexp, is_top, all in
labels' shape: float32 (float64 for float64 inputs), is_top bool. Labels are already shifted.
The logits x are rounded to hidden's dtype, as eager code rounds them. All from there to dx is float32 (float64 for
float64 inputs); dx is rounded once.
    z = logit_scale * x / temperature,  or with softcap  z = softcap * tanh(logit_scale * x / softcap) / temperature
    logsumexp = log Σ exp(z),  log_prob = z[label] - logsumexp,  entropy = logsumexp - Σ p z  with  p = softmax(z)
    is_top = whether no x is larger than x[label], and of those that are equal none comes before it
Gradient, from those of log_prob (g), entropy (h) and logsumexp (l):
    dz = p * (l - g - h * (log p + entropy)) + g * onehot(label)
    dx = dz * logit_scale / temperature,  with softcap  * (1 - tanh²)
    dhidden = dx @ weight,  dweight = dxᵀ @ hidden,  dbias = Σ_rows dx
As `linear_head.py` says, some rows at a time in the forward, and some columns at a time in the backward, which knows
the softmax: there dx replaces the logits, and dhidden is summed over the parts in float32. Rows whose label is
ignore_index are left out; their results are zeros and False. Kept for the backward are, beside the arguments, four
numbers a row.
Bytes that must move: hidden and weight, twice, their gradients, and for each part 2 + 3 passes over the buffer.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, compute_dtype
from fxopt.kernels.linear_head import (
    HeadGradients,
    Wanted,
    check_head,
    check_options,
    empty_gradients,
    head_workspace_bytes,
    logits_by_part,
    parts_of_logits,
    rounded,
    rows_that_count,
    some_columns,
    some_rows,
)
from fxopt.kernels.log_prob_rows import (
    LogitOptions,
    RowGradients,
    RowResults,
    backward_rows,
    backward_rows_triton,
    forward_rows,
    forward_rows_triton,
)
from fxopt.kernels.op import op


class LogProbs(NamedTuple):
    """Of each label: what `linear_log_prob` returns."""

    log_prob: Tensor
    entropy: Tensor | None  # None where it is not wanted
    logsumexp: Tensor
    is_top: Tensor


class SavedSoftmax(NamedTuple):
    """Of each row's softmax, what the backward needs beside the arguments of the forward."""

    maximum: Tensor
    total: Tensor
    entropy: Tensor | None
    log_prob: Tensor


def linear_log_prob_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
) -> LogProbs:
    """The specification, in plain PyTorch.

    Model code scales and caps the logits before it casts them to float32 and rounds at each step; the op does not.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.reshape(*labels.shape, weight.shape[0])
    z = logits.to(compute_dtype(logits)) * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    z = z / temperature
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    log_probs = z.log_softmax(-1)
    log_prob = log_probs.gather(-1, labels.where(counts, 0).unsqueeze(-1)).squeeze(-1).where(counts, 0.0)
    entropy = (log_probs.exp() * -log_probs).sum(-1).where(counts, 0.0) if with_entropy else None
    is_top = (logits.argmax(-1) == labels) & counts if weight.shape[0] else counts
    return LogProbs(log_prob, entropy, z.logsumexp(-1).where(counts, 0.0), is_top)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    dtype: torch.dtype | None = None,
) -> LogProbs:
    """The log-probability of each label under softmax(hidden @ weightᵀ + bias), and what else the softmax tells.

    Differentiable once in hidden, weight and bias, through log_prob, entropy and logsumexp.

    Args:
        hidden: (..., D), any floating dtype and any strides.
        weight: (V, D), in hidden's dtype.
        labels: int64, one for each row of hidden, in [0, V) or ignore_index. Not shifted here.
        bias: (V,) or None, in hidden's dtype.
        ignore_index: the label of rows that are left out, with results 0.0 and False; None if every label counts.
        temperature: what the logits are divided by in the end.
        softcap: the bound c of logits that become c * tanh(logits / c), after logit_scale; None for no bound.
        logit_scale: what the logits are multiplied by, bias included.
        with_entropy: whether the entropy of each row's softmax is computed, too.
        dtype: what log_prob, entropy and logsumexp are rounded to; None for float32 (float64 for float64 inputs).

    Returns:
        log_prob, entropy (None unless `with_entropy`), logsumexp and is_top, whether the label is the most likely
        token, of equally likely ones the first. In labels' shape and in `dtype`, is_top bool.
        As in eager code, a logit of +inf makes log_prob NaN, and one of -inf the entropy.

    Raises:
        ValueError: an option out of its range, or shapes that do not fit each other.
        RuntimeError: dtypes that differ from hidden's, or labels that are not int64.
        IndexError: a label out of range (on a GPU a device-side assertion).
    """
    options = LogitOptions(temperature, softcap, logit_scale)
    results = _checked_and_run(hidden, weight, labels, bias, ignore_index, options, with_entropy)
    floats = results[:3] if dtype is None else (None if each is None else each.to(dtype) for each in results[:3])
    return LogProbs._make((*floats, results.is_top))


@torch.no_grad()
def linear_log_prob_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
) -> tuple[LogProbs, SavedSoftmax]:
    """`linear_log_prob` without autograd, and what `linear_log_prob_backward` needs of it; all in labels' shape."""
    options = LogitOptions(temperature, softcap, logit_scale)
    log_prob, entropy, logsumexp, is_top, maximum, total = _checked_and_run(
        hidden, weight, labels, bias, ignore_index, options, with_entropy
    )
    # Copies: what is returned may be written to.
    saved = SavedSoftmax(maximum, total, None if entropy is None else entropy.clone(), log_prob.clone())
    return LogProbs(log_prob, entropy, logsumexp, is_top), saved


@torch.no_grad()
def linear_log_prob_backward(
    dlog_prob: Tensor | None,
    dentropy: Tensor | None,
    dlogsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    saved: SavedSoftmax,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    wanted: Wanted = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden, weight and bias, without autograd; of `linear_log_prob_forward` with the same arguments.

    Args:
        dlog_prob, dentropy, dlogsumexp: the gradients of the results, in labels' shape; None for one that has none.
        hidden, weight, labels, bias, ignore_index, temperature, softcap, logit_scale: as given to the forward.
        saved: what the forward returned.
        wanted: of which of hidden, weight and bias the gradient is computed.

    Returns:
        dhidden, dweight and dbias in their inputs' shapes and dtypes; None for what is not wanted, or is not there.

    Raises:
        ValueError: a gradient of the entropy, which the forward did not compute; else as `linear_log_prob`.
    """
    _check(hidden, weight, labels, bias, LogitOptions(temperature, softcap, logit_scale))
    if dentropy is not None and saved.entropy is None:
        raise ValueError("linear_log_prob_backward: dentropy is given; the forward must compute the entropy then")
    wanted = wanted[0], wanted[1], wanted[2] and bias is not None
    none = hidden.new_empty(0, dtype=compute_dtype(hidden))
    entropy = none if saved.entropy is None else saved.entropy.reshape(-1)
    gradients = _linear_log_prob_backward(
        *(None if gradient is None else gradient.reshape(-1) for gradient in (dlog_prob, dentropy, dlogsumexp)),
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1),
        entropy, saved.maximum.reshape(-1), saved.total.reshape(-1), saved.log_prob.reshape(-1),
        ignore_index, temperature, softcap, logit_scale, *wanted,
    )  # fmt: skip
    dhidden, dweight, dbias = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return None if dhidden is None else dhidden.reshape(hidden.shape), dweight, dbias


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: LogitOptions) -> None:
    temperature, softcap, logit_scale = options
    check_options(
        "linear_log_prob",
        ("temperature", temperature, 0 < temperature < math.inf, "positive and finite"),
        ("softcap", softcap, softcap is None or 0 < softcap < math.inf, "None, or positive and finite"),
        ("logit_scale", logit_scale, 0 < logit_scale < math.inf, "positive and finite"),
    )
    check_head("linear_log_prob", hidden, weight, bias, labels)


def _checked_and_run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int | None,
    options: LogitOptions,
    with_entropy: bool,
) -> RowResults:
    """The op's results in labels' shape."""
    _check(hidden, weight, labels, bias, options)
    rows, labels_of_rows = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    results = RowResults(*_linear_log_prob(rows, weight, bias, labels_of_rows, ignore_index, *options, with_entropy))
    if not with_entropy:
        results = results._replace(entropy=None)
    return RowResults._make(None if result is None else result.reshape(labels.shape) for result in results)


def _forward(
    compute: Callable[..., None], hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    ignore_index: int | None, temperature: float, softcap: float | None, logit_scale: float, with_entropy: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loop over some rows at a time, which all devices share. An entropy that is not wanted comes back empty."""
    rows = rows_that_count("linear_log_prob", hidden, weight, labels, ignore_index)
    options = LogitOptions(temperature, softcap, logit_scale)
    empty, entropy, *others = _empty_results(hidden, rows.labels, with_entropy)
    results = RowResults(empty, entropy if with_entropy else None, *others)
    for part, logits in logits_by_part(rows, weight, bias, parts_of_logits(some_rows, rows, weight)):
        compute(logits, rows.labels[part.rows], results.of(part.rows), options)
    return tuple(entropy if result is None else rows.put_back(result) for result in results)


def _empty_results(hidden: Tensor, labels: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    dtype, shape = compute_dtype(hidden), labels.shape
    log_prob, logsumexp, maximum, total = (hidden.new_empty(shape, dtype=dtype) for _ in range(4))
    entropy = hidden.new_empty(shape if with_entropy else 0, dtype=dtype)
    return log_prob, entropy, logsumexp, hidden.new_empty(shape, dtype=torch.bool), maximum, total


def _backward(
    compute: Callable[..., None], dlog_prob: Tensor | None, dentropy: Tensor | None, dlogsumexp: Tensor | None,
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    entropy: Tensor, maximum: Tensor, total: Tensor, log_prob: Tensor, ignore_index: int | None,
    temperature: float, softcap: float | None, logit_scale: float,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loop over some columns at a time, which all devices share. Gradients that are not wanted come back empty."""
    rows = rows_that_count("linear_log_prob", hidden, weight, labels, ignore_index)
    of_rows = RowGradients._make(
        None if gradient is None else rows.take(gradient)
        for gradient in _row_gradients(dlog_prob, dentropy, dlogsumexp, entropy, log_prob)
    )
    maximum, total = rows.take(maximum), rows.take(total)
    options, parts = LogitOptions(temperature, softcap, logit_scale), parts_of_logits(some_columns, rows, weight)
    gradients = HeadGradients(rows, weight, (want_hidden, want_weight, want_bias), parts)
    for part, logits in logits_by_part(rows, weight, bias, parts):
        compute(logits, rows.labels - part.columns.start, maximum, total, of_rows, options)
        gradients.add(part, logits)
    return rounded(gradients.result(), hidden.dtype)


def _row_gradients(
    dlog_prob: Tensor | None, dentropy: Tensor | None, dlogsumexp: Tensor | None, entropy: Tensor, log_prob: Tensor
) -> RowGradients:
    """What is known of each row beside its logits.

    The label's dz is g - p * g, nearly equal numbers where the model is sure of it. It is found from the forward's
    log-probability: logits that are computed again, in parts of other shapes, may be rounded otherwise.
    """
    dlog_prob, dentropy, dlogsumexp = (
        None if gradient is None else gradient.to(log_prob.dtype).contiguous()  # that of a sum has stride 0
        for gradient in (dlog_prob, dentropy, dlogsumexp)
    )
    zeros = torch.zeros_like(log_prob)
    dlog_prob, rest = (zeros if gradient is None else gradient for gradient in (dlog_prob, dlogsumexp))
    mass, slope = rest - dlog_prob, None
    if dentropy is not None:
        mass, slope = mass - dentropy * entropy, -dentropy
        rest = rest - dentropy * (entropy + log_prob)
    return RowGradients(mass, log_prob.exp() * rest - torch.expm1(log_prob) * dlog_prob, slope)


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_OPTIONS = "int? ignore_index, float temperature, float? softcap, float logit_scale"


@op(
    "linear_log_prob",
    schema=f"({_HEAD}, {_OPTIONS}, bool with_entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_log_prob(*args: Any) -> tuple[Tensor, ...]:
    return _forward(forward_rows, *args)


@_linear_log_prob.register_kernel(TRITON_DEVICES)
def _linear_log_prob_triton(*args: Any) -> tuple[Tensor, ...]:
    return _forward(forward_rows_triton, *args)


@_linear_log_prob.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return _empty_results(hidden, labels, with_entropy=options[-1])


@op(
    "linear_log_prob_backward",
    schema=f"(Tensor? dlog_prob, Tensor? dentropy, Tensor? dlogsumexp, {_HEAD}, Tensor entropy, Tensor maximum, "
    f"Tensor total, Tensor log_prob, {_OPTIONS}, bool want_hidden, bool want_weight, bool want_bias) "
    "-> (Tensor, Tensor, Tensor)",
)
def _linear_log_prob_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(backward_rows, *args)


@_linear_log_prob_backward.register_kernel(TRITON_DEVICES)
def _linear_log_prob_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(backward_rows_triton, *args)


@_linear_log_prob_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(args[3], args[4], args[-3:])


def _setup_context(ctx, inputs, output) -> None:
    ctx.options, ctx.with_entropy = inputs[4:-1], inputs[-1]  # the first: ignore_index, and what is in LogitOptions
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    log_prob, entropy, _, _, maximum, total = output
    # Copies: what is returned may be written to.
    ctx.save_for_backward(*inputs[:4], entropy.detach().clone(), maximum, total, log_prob.detach().clone())


def _differentiate(ctx, dlog_prob: Tensor | None, dentropy: Tensor | None, dlogsumexp: Tensor | None, *_: None):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_log_prob can be differentiated only once, and create_graph=True asks for more; "
            "use torch.log_softmax on the logits there, and fxopt.restore(model) if a graph was rewritten"
        )
    dentropy = dentropy if ctx.with_entropy else None
    nothing_else = [None] * (1 + len(ctx.options) + 1)  # labels, options and with_entropy have no gradient
    if dlog_prob is None and dentropy is None and dlogsumexp is None:
        return None, None, None, *nothing_else
    wanted = ctx.needs_input_grad[:3]
    gradients = _linear_log_prob_backward(dlog_prob, dentropy, dlogsumexp, *ctx.saved_tensors, *ctx.options, *wanted)
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), *nothing_else


_linear_log_prob.register_autograd(_differentiate, setup_context=_setup_context)


def workspace_bytes(hidden: Tensor, weight: Tensor, *options: Any) -> int:
    """The most that the forward holds at once beside its arguments and results; `options` are its other arguments."""
    copies = 2 if options[-1] else 1
    return head_workspace_bytes(some_rows, hidden, weight, copies, want_hidden=False, want_weight=False)


def backward_workspace_bytes(*args: Any) -> int:
    """The same of `linear_log_prob_backward`'s op, given its arguments."""
    dentropy, hidden, weight = args[1], args[3], args[4]
    *_, softcap, _, want_hidden, want_weight, _ = args
    copies = 1 + (dentropy is not None) + (softcap is not None)
    return head_workspace_bytes(some_columns, hidden, weight, copies, want_hidden, want_weight)
