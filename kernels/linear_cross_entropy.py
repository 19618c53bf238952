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
Rows whose label is ignore_index are left out before the first matrix product and cost nothing (on a GPU, finding them
waits for the device once); rows of zeros take the rest to a multiple of ROW_MULTIPLE. They go through one reused buffer
of at most CHUNK_ROWS rows and CHUNK_BYTES (on a GPU GPU_CHUNK_BYTES), in which dx replaces the logits. For "mean" and
"sum" the gradients are computed with the loss, saved, and scaled in the backward (where a GPU multiplies matrices into
float32, dhidden waits in it and is rounded once); for "none" they are computed there, chunk by chunk again.
Bytes that must move: hidden and weight, their gradients, and 3 passes over the buffer for each chunk.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, compute_dtype, tl, triton, triton_dtype
from fxopt.kernels.elementary import divide, exp, log, tanh, tanh_slope
from fxopt.kernels.launch import launch
from fxopt.kernels.op import op

CHUNK_ROWS = 4096  # matrix products are at full speed long before; for small vocabularies
CHUNK_BYTES = 64 * 2**20  # one chunk needs no float32 sum of the weight's gradient, so not smaller than this
GPU_CHUNK_BYTES = 256 * 2**20  # each chunk reads and writes that sum: fewer chunks, and larger matrix products
# Every step keeps another number of rows, and for each new shape of a matrix product oneDNN holds on to half a MB.
ROW_MULTIPLE = 64
_SOFTMAX_BYTES = 8 * 2**20  # float32 working set of the softmax on the CPU: a share of the last-level cache
_VOCABULARY_BLOCK = 4096  # rows of the weight's gradient that the CPU adds up at a time
BLOCK = 2048  # columns that a Triton program holds at a time
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
    logits_ptr, labels_ptr, scales_ptr, losses_ptr, V,
    HAS_SCALES: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
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
    for name, value, fits, range_of_values in (
        ("logit_scale", logit_scale, 0 < logit_scale < math.inf, "positive and finite"),
        ("softcap", softcap, softcap is None or 0 < softcap < math.inf, "None, or positive and finite"),
        ("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "between 0 and 1"),
        ("z_loss", z_loss, 0 <= z_loss < math.inf, "finite and not negative"),
    ):
        if not fits:
            raise ValueError(f"linear_cross_entropy: {name} is {value}; it must be {range_of_values}")
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} "
            "must have shapes (..., D) and (V, D)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy: bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    if math.prod(hidden.shape[:-1]) != labels.numel():  # not Size.numel, which fixes dynamic sizes
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} has {math.prod(hidden.shape[:-1])} rows, "
            f"but labels {tuple(labels.shape)} has {labels.numel()} elements"
        )
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise RuntimeError(
            f"linear_cross_entropy: hidden is {hidden.dtype}, weight {weight.dtype}"
            + (f", bias {bias.dtype}" if bias is not None else "")
            + "; they must have one dtype, as for torch.nn.functional.linear"
        )
    if labels.dtype != torch.int64:
        raise RuntimeError(f"linear_cross_entropy: labels are {labels.dtype}; they must be torch.int64")
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
    dtype = compute_dtype(hidden)
    num_rows, vocabulary = hidden.shape[0], weight.shape[0]
    labels = labels.contiguous()
    kept = labels != ignore_index
    kept_rows = kept.nonzero().squeeze(1)
    num_kept = kept_rows.numel()
    all_kept = num_kept == num_rows
    want_grads = want_hidden or want_weight or want_bias
    scales: Tensor | None = None
    if want_grads and row_scales is not None:
        scales = row_scales.to(dtype).contiguous()  # the gradient of a sum has stride 0
    elif want_grads:
        scales = hidden.new_full((num_rows,), 1 / max(num_kept, 1) if reduction == "mean" else 1.0, dtype=dtype)
    if not all_kept:
        hidden, labels = _take_rows(hidden, kept_rows), _take_rows(labels, kept_rows)
        scales = None if scales is None else _take_rows(scales, kept_rows)
    _check_labels(labels, vocabulary)

    chunks = _chunks(labels.shape[0], vocabulary * hidden.element_size(), hidden.device)
    # With one chunk its product is the weight's gradient; a sum over several is kept in float32.
    summed = len(chunks) != 1
    losses = hidden.new_empty(labels.shape, dtype=_exact_dtype(hidden))
    buffer = hidden.new_empty(max((chunk.stop - chunk.start for chunk in chunks), default=0), vocabulary)
    dhidden = hidden.new_empty(hidden.shape if want_hidden else 0, dtype=_hidden_grad_dtype(hidden))
    dweight = weight.new_empty(weight.shape if want_weight else 0, dtype=dtype if summed else weight.dtype)
    if summed:
        dweight.zero_()
    dbias = weight.new_zeros(vocabulary if want_bias else 0, dtype=_exact_dtype(hidden))

    for chunk in chunks:
        h, logits = hidden[chunk], buffer[: chunk.stop - chunk.start]
        if bias is None:
            torch.mm(h, weight.t(), out=logits)
        else:
            torch.addmm(bias, h, weight.t(), out=logits)
        softmax_rows(logits, labels[chunk], None if scales is None else scales[chunk], losses[chunk], options)
        logits[max(num_kept - chunk.start, 0) :] = 0.0  # where infinite weights make NaN of rows of zeros
        if want_hidden:
            _product(logits, weight, dhidden[chunk])
        if want_weight and summed:
            _add_product(dweight, logits.t(), h)
        elif want_weight:
            torch.mm(logits.t(), h, out=dweight)
        if want_bias:
            dbias += logits.sum(0, dtype=dtype)

    losses = losses[:num_kept]
    if want_hidden and not all_kept:
        dhidden = dhidden.new_zeros(num_rows, hidden.shape[1]).index_copy_(0, kept_rows, dhidden[:num_kept])
    if reduction == "none":
        loss = losses if all_kept else losses.new_zeros(num_rows).index_copy_(0, kept_rows, losses)
    else:
        loss = losses.sum() if reduction == "sum" else losses.mean()
    if z_loss and reduction == "mean" and num_rows and not num_kept:  # a mean of no square: 0 / 0, its gradient too
        for gradient in (dhidden, dweight, dbias):
            gradient.fill_(math.nan)
    return loss.to(dtype), dhidden, dweight.to(weight.dtype), dbias


def workspace_bytes(hidden: Tensor, weight: Tensor, *options: Any) -> int:
    """The most that the op holds at once beside its arguments and results, if some rows are left out.

    `options` are its other arguments. Rows without a label at the end of each sequence are left out where a model
    shifts its labels.
    """
    *_, softcap, _, _, want_hidden, want_weight, want_bias = options
    itemsize, width, wide = hidden.element_size(), hidden.shape[1], compute_dtype(hidden).itemsize
    num_rows, vocabulary = -(-hidden.shape[0] // ROW_MULTIPLE) * ROW_MULTIPLE, weight.shape[0]
    chunks = _chunks(num_rows, vocabulary * itemsize, hidden.device)
    chunk_rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    gradient = _hidden_grad_dtype(hidden).itemsize if want_hidden else 0
    held = chunk_rows * vocabulary * itemsize + num_rows * width * (itemsize + gradient)
    copies = 2 if softcap is not None and (want_hidden or want_weight or want_bias) else 1
    scratch = copies * min(chunk_rows, _softmax_step(vocabulary, copies)) * vocabulary * wide
    if not want_weight or len(chunks) == 1 or wide == itemsize:
        return held + scratch
    # The weight's gradient is summed in float32; its result comes when the softmax is done.
    return held + weight.numel() * wide + max(0, scratch - weight.numel() * itemsize)


def _softmax_step(vocabulary: int, copies: int) -> int:
    """Rows whose float32 copies fit the softmax's working set on the CPU."""
    return max(1, _SOFTMAX_BYTES // (4 * vocabulary * copies))


def _take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Those rows, then zeros up to a multiple of ROW_MULTIPLE; as their scale is zero, so are their dlogits."""
    taken = tensor.new_zeros(-(-rows.numel() // ROW_MULTIPLE) * ROW_MULTIPLE, *tensor.shape[1:])
    torch.index_select(tensor, 0, rows, out=taken[: rows.numel()])
    return taken


def _chunks(num_rows: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Slices of nearly equal length, none longer than CHUNK_ROWS or, with its logits, larger than CHUNK_BYTES.

    On a GPU the bound is GPU_CHUNK_BYTES.
    """
    most_bytes = CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    most = max(1, min(CHUNK_ROWS, most_bytes // row_bytes))
    num_chunks = -(-num_rows // most)
    bounds = [num_rows * i // num_chunks for i in range(num_chunks + 1)] if num_chunks else []
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _exact_dtype(hidden: Tensor) -> torch.dtype:
    """Of a row's loss, and of sums of few numbers over rows: no luck in the last digit where the device has float64."""
    return torch.float64 if hidden.device.type in ("cpu", "cuda") else compute_dtype(hidden)


def _has_wide_products(device: torch.device) -> bool:
    """Whether matrix products of two-byte numbers can have a float32 result."""
    return device.type == "cuda" and torch.version.hip is None


def _hidden_grad_dtype(hidden: Tensor) -> torch.dtype:
    """What the gradient is kept in until backward scales and rounds it."""
    return compute_dtype(hidden) if _has_wide_products(hidden.device) else hidden.dtype


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b. cuBLAS may add up a long sum's parts in two bytes; not where the result has four."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. Where total is wider than a and b: as cuBLAS does it, without rounding; else in blocks of rows.

    No product of total's size is held on the CPU.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    if _has_wide_products(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    step = _VOCABULARY_BLOCK if total.device.type == "cpu" else total.shape[0]
    for start in range(0, total.shape[0], step):
        total[start : start + step] += a[start : start + step] @ b


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    out_of_range = (labels < 0) | (labels >= vocabulary)
    if labels.device.type != "cpu":
        torch._assert_async(~out_of_range.any(), "linear_cross_entropy: a label is out of range")
    elif out_of_range.any():
        raise IndexError(f"Target {labels[out_of_range][0]} is out of bounds.")


def _softmax_rows(logits: Tensor, labels: Tensor, scales: Tensor | None, losses: Tensor, options: _Options) -> None:
    """SoftmaxRows in ATen calls, a few rows at a time so that the float32 copy stays in the cache.

    `torch.logsumexp` would be one call, and twenty times slower on the CPU.
    """
    num_rows, vocabulary = logits.shape
    logit_scale, softcap, smoothing, z_loss = options
    factor = logit_scale if softcap is None else softcap
    keep_tanh = softcap is not None and scales is not None
    step = _softmax_step(vocabulary, 2 if keep_tanh else 1)
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
        logits, labels, scales if scales is not None else losses, losses, logits.shape[1],
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
    dhidden, dweight, dbias = _fake_grads(hidden, weight, *rest[-3:])
    return loss, dhidden.to(_hidden_grad_dtype(hidden)), dweight, dbias.to(_exact_dtype(hidden))


# With reduction "none" the backward computes the gradients, from the gradients of the rows' losses.
@op("linear_cross_entropy_backward", schema=f"(Tensor dlosses, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
def _linear_cross_entropy_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _rounded(args[1], _loss_and_grads(_softmax_rows, *args)[1:])


@_linear_cross_entropy_backward.register_kernel(TRITON_DEVICES)
def _linear_cross_entropy_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _rounded(args[1], _loss_and_grads(_softmax_rows_triton, *args)[1:])


@_linear_cross_entropy_backward.register_fake
def _(dlosses: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_grads(hidden, weight, *rest[-3:])


def _fake_grads(
    hidden: Tensor, weight: Tensor, want_hidden: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


def _rounded(hidden: Tensor, grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = (grad.to(hidden.dtype) for grad in grads)
    return dhidden, dweight, dbias


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
            "use torch.nn.functional.cross_entropy on the logits there"
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
