"""Linear layer and cross-entropy without the logits:  loss = cross_entropy(hidden @ weightᵀ + bias, labels).

Source: `torch.nn.functional.cross_entropy`; computing the gradient chunk by chunk beside the loss follows Hsu et al.,
"Liger Kernel", arXiv:2410.10989; compare Wijmans et al., "Cut Your Losses", arXiv:2411.09009. The options: logit_scale
is that of transformers' Cohere (Granite divides instead), softcap that of Gemma 2, arXiv:2408.00118, label_smoothing
that of `cross_entropy`, z_loss that of PaLM, arXiv:2204.02311.
Shapes: hidden (..., D), weight (V, D), bias (V,), labels (...) int64 -> loss, float32 (float64 for float64 inputs): a
scalar, or labels' shape for reduction "none". Labels are already shifted.
The logits x are rounded to hidden's dtype, as eager code rounds them. All from there to dx is float32 (float64 for
float64 inputs); dx is rounded once; dweight is summed over chunks in float32. With ε = label_smoothing, a row's loss is
    z = logit_scale * x,  or with softcap  z = softcap * t  where  t = tanh(logit_scale * x / softcap)
    loss = lse - (1 - ε) * z[label] - ε * mean(z) + z_loss * lse²,  lse = logsumexp(z)
Gradient, with p = softmax(z) and s the row's share of the loss (1 / number of labels for "mean"):
    dx = s * (p * (1 + 2 * z_loss * lse) - (1 - ε) * onehot(label) - ε / V) * logit_scale * (1 - t², with softcap)
    dhidden = dx @ weight,  dweight = dxᵀ @ hidden,  dbias = Σ_rows dx
Chunk by chunk as `linear_head.py` says, dx replacing the logits; rows whose label is ignore_index are left out. For
"mean" and "sum" the gradients are computed with the loss, saved, and scaled in the backward (where a GPU multiplies
matrices into float32, dhidden waits in it and is rounded once); for "none" they are computed there.
Bytes that must move: hidden and weight, their gradients, and 3 passes over the buffer for each chunk.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, compute_dtype, tl, triton, triton_dtype
from fxopt.kernels.elementary import divide, exp, log, tanh, tanh_slope
from fxopt.kernels.launch import launch
from fxopt.kernels.linear_head import (
    BLOCK,
    HeadGradients,
    check_head,
    check_options,
    empty_gradients,
    exact_dtype,
    head_workspace_bytes,
    hidden_grad_dtype,
    logits_by_part,
    parts_of_logits,
    rounded,
    rows_that_count,
    softmax_step,
    some_rows,
)
from fxopt.kernels.op import op

_REDUCTIONS = ("mean", "sum", "none")


class _Options(NamedTuple):
    """What happens to the logits between the matrix product and the loss; the defaults cost nothing."""

    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


# (logits (n, V), labels (n,), scales (n,) or None, losses (n,), options): fills losses; with scales, replaces logits by
# dlogits.
SoftmaxRows = Callable[[Tensor, Tensor, Tensor | None, Tensor, _Options], None]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The specification, in plain PyTorch: the loss of transformers' `ForCausalLMLoss` on a linear head.

    Model code scales and caps the logits before it casts them to float32 and rounds at each step; the op does not.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(compute_dtype(logits)).reshape(-1, weight.shape[0]) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    labels_of_rows = labels.reshape(-1)
    losses = torch.nn.functional.cross_entropy(
        logits, labels_of_rows, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss:
        ignored = labels_of_rows == ignore_index
        penalties = z_loss * logits.logsumexp(1).square() * ~ignored
        if reduction != "none":
            penalties = penalties.sum() / ((~ignored).sum() if reduction == "mean" else 1)
        losses = losses + penalties
    return losses.reshape(labels.shape) if reduction == "none" else losses


@triton.jit
def _softmax_rows_kernel(
    logits_ptr, labels_ptr, scales_ptr, losses_ptr, V, row_stride,
    HAS_SCALES: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    # z is what FACTOR multiplies: the logits, or their tanh. It comes last, so that differences of logits are exact.
    FACTOR: tl.constexpr = LOGIT_SCALE if SOFTCAP is None else SOFTCAP

    # One pass keeps, per lane, the running maximum and the sum of exponentials below it (online softmax).
    maxima = tl.full([BLOCK], float("-inf"), dtype=DTYPE)
    sums = tl.zeros([BLOCK], dtype=DTYPE)
    z_sums = tl.zeros([BLOCK], dtype=DTYPE)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(DTYPE)
        if SOFTCAP is not None:
            z = tl.where(cols < V, tanh(z * (LOGIT_SCALE / SOFTCAP)), float("-inf"))
        if LABEL_SMOOTHING > 0.0:
            z_sums += tl.where(cols < V, z, 0.0)
        higher = tl.maximum(maxima, z)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * exp((maxima - finite) * FACTOR) + exp((z - finite) * FACTOR)
        maxima = higher
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(sums * exp((maxima - maximum) * FACTOR), axis=0)
    label_z = tl.load(logits_ptr + label).to(DTYPE)
    if SOFTCAP is not None:
        label_z = tanh(label_z * (LOGIT_SCALE / SOFTCAP))
    target_z = (label_z - maximum) * FACTOR
    if LABEL_SMOOTHING > 0.0:
        mean_z = (tl.sum(z_sums, axis=0) / V - maximum) * FACTOR
        target_z = (1.0 - LABEL_SMOOTHING) * target_z + LABEL_SMOOTHING * mean_z
    log_total = log(total)
    loss = log_total - target_z
    if Z_LOSS > 0.0:
        logsumexp = log_total + maximum * FACTOR
        loss += Z_LOSS * logsumexp * logsumexp
    tl.store(losses_ptr + row, loss)

    if HAS_SCALES:
        scale = tl.load(scales_ptr + row).to(DTYPE) * LOGIT_SCALE
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(DTYPE)
            if SOFTCAP is not None:
                inner = z * (LOGIT_SCALE / SOFTCAP)
                z = tanh(inner)
            p = divide(exp((z - maximum) * FACTOR), total)
            if Z_LOSS > 0.0:
                p *= 1.0 + 2.0 * Z_LOSS * logsumexp
            if LABEL_SMOOTHING > 0.0:
                p -= tl.full([], LABEL_SMOOTHING, dtype=DTYPE) / V
            dz = (p - tl.where(cols == label, 1.0 - LABEL_SMOOTHING, 0.0)) * scale
            if SOFTCAP is not None:
                dz *= tanh_slope(inner)
            tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), mask=cols < V)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """cross_entropy(hidden @ weightᵀ + bias, labels), differentiable once in hidden, weight and bias.

    Args:
        hidden: (..., D), any floating dtype and any strides.
        weight: (V, D), in hidden's dtype.
        labels: int64, one for each row of hidden, in [0, V) or ignore_index. Not shifted here.
        bias: (V,) or None, in hidden's dtype.
        ignore_index: the label of rows that count for nothing.
        reduction: "mean" over the labels that count (nan if there are none, as eager), "sum", or "none".
        logit_scale: what the logits are multiplied by, bias included.
        softcap: the bound c of logits that become c * tanh(logits / c), after logit_scale; None for no bound.
        label_smoothing: the share of each label that is spread evenly over the vocabulary, as for `cross_entropy`.
        z_loss: the weight of logsumexp(logits)², added to the loss of each row that counts.
        dtype: what the result is rounded to; None for float32 (float64 for float64 inputs).

    Returns:
        In `dtype`: a scalar, or labels' shape for "none".

    Raises:
        ValueError: an unknown reduction, an option out of its range, or shapes that do not fit each other.
        RuntimeError: dtypes that differ from hidden's, or labels that are not int64.
        IndexError: a label out of range (on a GPU a device-side assertion).
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction is {reduction!r}; it must be one of {', '.join(_REDUCTIONS)}"
        )
    check_options(
        "linear_cross_entropy",
        ("logit_scale", logit_scale, 0 < logit_scale < math.inf, "positive and finite"),
        ("softcap", softcap, softcap is None or 0 < softcap < math.inf, "None, or positive and finite"),
        ("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "between 0 and 1"),
        ("z_loss", z_loss, 0 <= z_loss < math.inf, "finite and not negative"),
    )
    check_head("linear_cross_entropy", hidden, weight, bias, labels)
    with_grad = torch.is_grad_enabled() and reduction != "none"
    dtype = dtype or compute_dtype(hidden)
    loss = _linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), ignore_index, reduction,
        logit_scale, softcap, label_smoothing, z_loss,
        with_grad and hidden.requires_grad,
        with_grad and weight.requires_grad,
        with_grad and bias is not None and bias.requires_grad,
    )[0].to(dtype)  # fmt: skip
    return loss.reshape(labels.shape) if reduction == "none" else loss


def _loss_and_grads(
    softmax_rows: SoftmaxRows, row_scales: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, ignore_index: int, reduction: str, logit_scale: float, softcap: float | None,
    label_smoothing: float, z_loss: float, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loop over chunks, which all devices share. Gradients that are not wanted come back empty."""
    options = _Options(logit_scale, softcap, label_smoothing, z_loss)
    dtype, wanted = compute_dtype(hidden), (want_hidden, want_weight, want_bias)
    rows = rows_that_count("linear_cross_entropy", hidden, weight, labels, ignore_index)
    scales: Tensor | None = None
    if any(wanted) and row_scales is not None:
        scales = rows.take(row_scales.to(dtype).contiguous())  # the gradient of a sum has stride 0
    elif any(wanted):
        scale = 1 / max(rows.num_kept, 1) if reduction == "mean" else 1.0
        scales = rows.take(hidden.new_full((rows.num_rows,), scale, dtype=dtype))
    losses = hidden.new_empty(rows.labels.shape, dtype=exact_dtype(hidden))
    parts = parts_of_logits(some_rows, rows, weight)
    gradients = HeadGradients(rows, weight, wanted, parts)
    for part, logits in logits_by_part(rows, weight, bias, parts):
        part_scales = None if scales is None else scales[part.rows]
        softmax_rows(logits, rows.labels[part.rows], part_scales, losses[part.rows], options)
        gradients.add(part, logits)

    if reduction == "none":
        loss = rows.put_back(losses)
    else:
        losses = losses[: rows.num_kept]
        loss = losses.sum() if reduction == "sum" else losses.mean()
    dhidden, dweight, dbias = gradients.result()
    if z_loss and reduction == "mean" and rows.num_rows and not rows.num_kept:  # a mean of no square: 0 / 0
        for gradient in (dhidden, dweight, dbias):
            gradient.fill_(math.nan)
    return loss.to(dtype), dhidden, dweight, dbias


def workspace_bytes(hidden: Tensor, weight: Tensor, *options: Any) -> int:
    """The most that the op holds at once beside its arguments and results; `options` are its other arguments."""
    *_, softcap, _, _, want_hidden, want_weight, want_bias = options
    copies = 2 if softcap is not None and (want_hidden or want_weight or want_bias) else 1
    return head_workspace_bytes(some_rows, hidden, weight, copies, want_hidden, want_weight)


def _softmax_rows(logits: Tensor, labels: Tensor, scales: Tensor | None, losses: Tensor, options: _Options) -> None:
    """SoftmaxRows in ATen calls, a few rows at a time so that the float32 copy stays in the cache.

    `torch.logsumexp` would be one call, and twenty times slower on the CPU.
    """
    num_rows, vocabulary = logits.shape
    logit_scale, softcap, smoothing, z_loss = options
    factor = logit_scale if softcap is None else softcap
    keep_tanh = softcap is not None and scales is not None
    step = softmax_step(vocabulary, 2 if keep_tanh else 1)
    scratch = logits.new_empty(min(step, num_rows), vocabulary, dtype=compute_dtype(logits))
    tanh_scratch = torch.empty_like(scratch) if keep_tanh else scratch
    for start in range(0, num_rows, step):
        block = slice(start, min(start + step, num_rows))
        label = labels[block].unsqueeze(1)
        z = scratch[: block.stop - block.start].copy_(logits[block])
        if softcap is not None:
            z = z.div_(softcap) if logit_scale == 1.0 else z.mul_(logit_scale).div_(softcap)
            tanh = torch.tanh(z, out=tanh_scratch[: z.shape[0]])
            if keep_tanh:
                z.copy_(tanh)
        # The factor multiplies differences of logits, which are exact.
        maximum = z.amax(1, keepdim=True)
        target_z = (z.gather(1, label) - maximum) * factor
        z.sub_(maximum)
        if factor != 1.0:
            z.mul_(factor)
        if smoothing:
            target_z = (1 - smoothing) * target_z + smoothing * z.mean(1, keepdim=True)
        total = z.exp_().sum(1, keepdim=True)
        log_total = total.log()
        loss = log_total - target_z
        if z_loss:
            logsumexp = log_total + maximum * factor
            loss += z_loss * logsumexp.square()
        losses[block] = loss.squeeze(1)
        if scales is not None:
            scale = scales[block].unsqueeze(1) * logit_scale
            z.mul_(scale / total if not z_loss else scale / total * (1 + 2 * z_loss * logsumexp))
            if smoothing:
                z.sub_(scale * (smoothing / vocabulary))
            z.scatter_add_(1, label, scale * (smoothing - 1))
            if softcap is not None:
                torch.ops.aten.tanh_backward.grad_input(z, tanh, grad_input=z)
            logits[block] = z


def _softmax_rows_triton(
    logits: Tensor, labels: Tensor, scales: Tensor | None, losses: Tensor, options: _Options
) -> None:
    launch(
        _softmax_rows_kernel, (logits.shape[0],),
        logits, labels, scales if scales is not None else losses, losses, logits.shape[1], logits.stride(0),
        HAS_SCALES=scales is not None, BLOCK=BLOCK, DTYPE=triton_dtype(logits), num_warps=8,
        **{name.upper(): value for name, value in options._asdict().items()},
    )  # fmt: skip


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, str reduction, "
    "float logit_scale, float? softcap, float label_smoothing, float z_loss, "
    "bool want_hidden, bool want_weight, bool want_bias"
)


@op("linear_cross_entropy", schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def _linear_cross_entropy(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _loss_and_grads(_softmax_rows, None, *args)


@_linear_cross_entropy.register_kernel(TRITON_DEVICES)
def _linear_cross_entropy_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _loss_and_grads(_softmax_rows_triton, None, *args)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, reduction: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty(labels.shape if reduction == "none" else (), dtype=compute_dtype(hidden))
    dhidden, dweight, dbias = empty_gradients(hidden, weight, rest[-3:])
    return loss, dhidden.to(hidden_grad_dtype(hidden)), dweight, dbias.to(exact_dtype(hidden))


# With reduction "none" the backward computes the gradients, from the gradients of the rows' losses.
@op("linear_cross_entropy_backward", schema=f"(Tensor dlosses, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _linear_cross_entropy_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return rounded(_loss_and_grads(_softmax_rows, *args)[1:], args[1].dtype)


@_linear_cross_entropy_backward.register_kernel(TRITON_DEVICES)
def _linear_cross_entropy_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return rounded(_loss_and_grads(_softmax_rows_triton, *args)[1:], args[1].dtype)


@_linear_cross_entropy_backward.register_fake
def _(dlosses: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, rest[-3:])


def _setup_context(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[:4], inputs[4:-3]  # ignore_index, reduction, and what is in _Options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype, ctx.reduction = inputs[0].dtype, inputs[5]
    if ctx.reduction == "none":
        ctx.save_for_backward(*tensors)
    else:
        ctx.save_for_backward(*output[1:])


def _backward(ctx, dloss: Tensor | None, *_: None):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy can be differentiated only once, and create_graph=True asks for more; "
            "use torch.nn.functional.cross_entropy on the logits there, and fxopt.restore(model) for a whole model"
        )
    wanted = ctx.needs_input_grad[:3]
    nothing_else = [None] * (1 + len(ctx.options) + 3)  # labels, options and the three flags have no gradient
    if dloss is None:
        return None, None, None, *nothing_else
    if ctx.reduction == "none":
        grads = _linear_cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options, *wanted)
    else:
        # Scaling in place spares a copy of the weight's gradient; not if the graph may be walked again or is traced.
        in_place = type(dloss) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
        grads = [(grad.mul_(dloss) if in_place else grad * dloss).to(ctx.dtype) for grad in ctx.saved_tensors]
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *nothing_else


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
