"""Linear layer and cross-entropy without the logits:  loss = cross_entropy(hidden @ weightᵀ + bias, labels).

Source: `torch.nn.functional.cross_entropy`; computing the gradient chunk by chunk beside the loss follows Hsu et al.,
"Liger Kernel", arXiv:2410.10989; compare Wijmans et al., "Cut Your Losses", arXiv:2411.09009.
Shapes: hidden (..., D), weight (V, D), bias (V,), labels (...) int64 -> loss, float32 (float64 for float64 inputs): a
scalar, or labels' shape for reduction "none". Labels are already shifted.
Softmax statistics are float32 (float64 for float64 inputs). The logits are rounded to hidden's dtype, as eager code
rounds them; dlogits are scaled in float32 and rounded once; dweight is summed over chunks in float32.
Gradient, with p = softmax(logits) of a row and s the row's share of the loss (1 / number of labels for "mean"):
    dlogits = s * (p - onehot(label)), dhidden = dlogits @ weight, dweight = dlogitsᵀ @ hidden, dbias = Σ_rows dlogits
Rows whose label is ignore_index are left out before the first matrix product and cost nothing (on a GPU, finding them
waits for the device once); rows of zeros take the rest to a multiple of ROW_MULTIPLE. They go through one reused buffer
of at most CHUNK_ROWS rows and CHUNK_BYTES bytes, in which dlogits replace the logits. For "mean" and "sum" the
gradients are computed with the loss and saved; for "none" they are computed in the backward, chunk by chunk again.
Bytes that must move: hidden and weight, their gradients, and 3 passes over the buffer for each chunk.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, compute_dtype, on_device, tl, triton, triton_dtype

CHUNK_ROWS = 4096  # matrix products are at full speed long before; for small vocabularies
CHUNK_BYTES = 64 * 2**20  # one chunk needs no float32 sum of the weight's gradient, so not smaller than this
# Every step keeps another number of rows, and for each new shape of a matrix product oneDNN holds on to half a MB.
ROW_MULTIPLE = 64
_SOFTMAX_BYTES = 8 * 2**20  # float32 working set of the softmax on the CPU: a share of the last-level cache
_VOCABULARY_BLOCK = 4096  # rows of the weight's gradient that the CPU adds up at a time
BLOCK = 4096  # columns that a Triton program holds at a time
_REDUCTIONS = ("mean", "sum", "none")

# (logits (n, V), labels (n,), scales (n,) or None, losses (n,)): fills losses; with scales, replaces logits by dlogits.
SoftmaxRows = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The specification, in plain PyTorch: the loss of transformers' `ForCausalLMLoss` on a linear head."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(compute_dtype(logits)).reshape(-1, weight.shape[0])
    losses = torch.nn.functional.cross_entropy(
        logits, labels.reshape(-1), ignore_index=ignore_index, reduction=reduction
    )
    return losses.reshape(labels.shape) if reduction == "none" else losses


@triton.jit
def _softmax_rows_kernel(
    logits_ptr, labels_ptr, scales_ptr, losses_ptr, V,
    HAS_SCALES: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(labels_ptr + row)

    # One pass keeps, per lane, the running maximum and the sum of exponentials below it (online softmax).
    maxima = tl.full([BLOCK], float("-inf"), dtype=DTYPE)
    sums = tl.zeros([BLOCK], dtype=DTYPE)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(DTYPE)
        higher = tl.maximum(maxima, z)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(maxima - finite) + tl.exp(z - finite)
        maxima = higher
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
    tl.store(losses_ptr + row, tl.log(total) - (tl.load(logits_ptr + label).to(DTYPE) - maximum))

    if HAS_SCALES:
        scale = tl.load(scales_ptr + row).to(DTYPE)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(DTYPE)
            dz = (tl.exp(z - maximum) / total - tl.where(cols == label, 1.0, 0.0)) * scale
            tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), mask=cols < V)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(hidden @ weightᵀ + bias, labels), differentiable once in hidden, weight and bias.

    Args:
        hidden: (..., D), any floating dtype and any strides.
        weight: (V, D), in hidden's dtype.
        labels: int64, one for each row of hidden, in [0, V) or ignore_index. Not shifted here.
        bias: (V,) or None, in hidden's dtype.
        ignore_index: the label of rows that count for nothing.
        reduction: "mean" over the labels that count (nan if there are none, as eager), "sum", or "none".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or labels' shape for "none".

    Raises:
        ValueError: an unknown reduction, or shapes that do not fit each other.
        RuntimeError: dtypes that differ from hidden's, or labels that are not int64.
        IndexError: a label out of range (on a GPU a device-side assertion).
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction is {reduction!r}; it must be one of {', '.join(_REDUCTIONS)}"
        )
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
    loss = torch.ops.fxopt.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), ignore_index, reduction,
        with_grad and hidden.requires_grad,
        with_grad and weight.requires_grad,
        with_grad and bias is not None and bias.requires_grad,
    )[0]  # fmt: skip
    return loss.reshape(labels.shape) if reduction == "none" else loss


def _loss_and_grads(
    softmax_rows: SoftmaxRows, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    reduction: str, row_scales: Tensor | None, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loop over chunks, which all devices share. Gradients that are not wanted come back empty."""
    dtype = compute_dtype(hidden)
    num_rows, vocabulary = hidden.shape[0], weight.shape[0]
    kept = labels != ignore_index
    kept_rows = kept.nonzero().squeeze(1)
    num_kept = kept_rows.numel()
    all_kept = num_kept == num_rows
    want_grads = want_hidden or want_weight or want_bias
    scales: Tensor | None = None
    if want_grads and row_scales is not None:
        scales = row_scales.to(dtype)
    elif want_grads:
        scales = hidden.new_full((num_rows,), 1 / max(num_kept, 1) if reduction == "mean" else 1.0, dtype=dtype)
    if not all_kept:
        hidden, labels = _take_rows(hidden, kept_rows), _take_rows(labels, kept_rows)
        scales = None if scales is None else _take_rows(scales, kept_rows)
    _check_labels(labels, vocabulary)

    chunks = _chunks(labels.shape[0], vocabulary * hidden.element_size())
    # With one chunk its product is the weight's gradient; a sum over several is kept in float32.
    summed = len(chunks) != 1
    # A row's loss and their sum are float64 where the device has it: few numbers, and no luck in the last digit.
    losses = hidden.new_empty(labels.shape, dtype=torch.float64 if hidden.device.type in ("cpu", "cuda") else dtype)
    buffer = hidden.new_empty(max((chunk.stop - chunk.start for chunk in chunks), default=0), vocabulary)
    dhidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    dweight = weight.new_empty(weight.shape if want_weight else 0, dtype=dtype if summed else weight.dtype)
    if summed:
        dweight.zero_()
    dbias = weight.new_zeros(vocabulary if want_bias else 0, dtype=dtype)

    for chunk in chunks:
        h, logits = hidden[chunk], buffer[: chunk.stop - chunk.start]
        if bias is None:
            torch.mm(h, weight.t(), out=logits)
        else:
            torch.addmm(bias, h, weight.t(), out=logits)
        softmax_rows(logits, labels[chunk], None if scales is None else scales[chunk], losses[chunk])
        if want_hidden:
            torch.mm(logits, weight, out=dhidden[chunk])
        if want_weight and summed:
            _add_product(dweight, logits.t(), h)
        elif want_weight:
            torch.mm(logits.t(), h, out=dweight)
        if want_bias:
            dbias += logits.sum(0, dtype=dtype)

    losses = losses[:num_kept]
    if want_hidden and not all_kept:
        dhidden = hidden.new_zeros(num_rows, hidden.shape[1]).index_copy_(0, kept_rows, dhidden[:num_kept])
    if reduction == "none":
        loss = losses if all_kept else losses.new_zeros(num_rows).index_copy_(0, kept_rows, losses)
    else:
        loss = losses.sum() if reduction == "sum" else losses.mean()
    return loss.to(dtype), dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Those rows, then zeros up to a multiple of ROW_MULTIPLE; as their scale is zero, so are their dlogits."""
    taken = tensor.new_zeros(-(-rows.numel() // ROW_MULTIPLE) * ROW_MULTIPLE, *tensor.shape[1:])
    torch.index_select(tensor, 0, rows, out=taken[: rows.numel()])
    return taken


def _chunks(num_rows: int, row_bytes: int) -> list[slice]:
    """Slices of nearly equal length, none longer than CHUNK_ROWS or, with its logits, larger than CHUNK_BYTES."""
    most = max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
    num_chunks = -(-num_rows // most)
    bounds = [num_rows * i // num_chunks for i in range(num_chunks + 1)] if num_chunks else []
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; where total is wider than a and b, in blocks of rows: no product of total's size is held."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
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


def _softmax_rows(logits: Tensor, labels: Tensor, scales: Tensor | None, losses: Tensor) -> None:
    """SoftmaxRows in ATen calls, a few rows at a time so that the float32 copy stays in the cache.

    `torch.logsumexp` would be one call, and twenty times slower on the CPU.
    """
    num_rows = logits.shape[0]
    step = max(1, _SOFTMAX_BYTES // (4 * logits.shape[1]))
    scratch = logits.new_empty(min(step, num_rows), logits.shape[1], dtype=compute_dtype(logits))
    for start in range(0, num_rows, step):
        block = slice(start, min(start + step, num_rows))
        label = labels[block].unsqueeze(1)
        z = scratch[: block.stop - block.start].copy_(logits[block])
        label_logit = z.gather(1, label)
        maximum = z.amax(1, keepdim=True)
        total = z.sub_(maximum).exp_().sum(1, keepdim=True)
        losses[block] = (total.log() - (label_logit - maximum)).squeeze(1)  # in this order, as the difference is exact
        if scales is not None:
            scale = scales[block].unsqueeze(1)
            logits[block] = z.mul_(scale / total).scatter_add_(1, label, -scale)


def _softmax_rows_triton(logits: Tensor, labels: Tensor, scales: Tensor | None, losses: Tensor) -> None:
    with on_device(logits):
        _softmax_rows_kernel[(logits.shape[0],)](
            logits, labels, scales if scales is not None else losses, losses, logits.shape[1],
            HAS_SCALES=scales is not None, BLOCK=BLOCK, DTYPE=triton_dtype(logits), num_warps=8,
        )  # fmt: skip


@torch.library.custom_op("fxopt::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, reduction: str,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _loss_and_grads(
        _softmax_rows, hidden, weight, bias, labels, ignore_index, reduction, None, want_hidden, want_weight, want_bias
    )


@_linear_cross_entropy.register_kernel(TRITON_DEVICES)
def _linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, reduction: str,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _loss_and_grads(
        _softmax_rows_triton, hidden, weight, bias, labels, ignore_index, reduction, None,
        want_hidden, want_weight, want_bias,
    )  # fmt: skip


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, reduction: str,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(labels.shape if reduction == "none" else (), dtype=compute_dtype(hidden)),
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


@torch.library.custom_op("fxopt::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _loss_and_grads(
        _softmax_rows, hidden, weight, bias, labels, ignore_index, "none", dlosses, want_hidden, want_weight, want_bias
    )[1:]


@_linear_cross_entropy_backward.register_kernel(TRITON_DEVICES)
def _linear_cross_entropy_backward_triton(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _loss_and_grads(
        _softmax_rows_triton, hidden, weight, bias, labels, ignore_index, "none", dlosses,
        want_hidden, want_weight, want_bias,
    )[1:]  # fmt: skip


@_linear_cross_entropy_backward.register_fake
def _(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, ctx.ignore_index, ctx.reduction, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    if ctx.reduction == "none":
        ctx.save_for_backward(hidden, weight, bias, labels)
    else:
        ctx.save_for_backward(*output[1:])


def _backward(ctx, dloss: Tensor | None, *_: None):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy can be differentiated only once, and create_graph=True asks for more; "
            "use torch.nn.functional.cross_entropy on the logits there"
        )
    wanted = ctx.needs_input_grad[:3]
    nothing_else = [None] * 6  # labels, ignore_index, reduction and the three flags have no gradient
    if dloss is None:
        return None, None, None, *nothing_else
    if ctx.reduction == "none":
        hidden, weight, bias, labels = ctx.saved_tensors
        grads = torch.ops.fxopt.linear_cross_entropy_backward(
            dloss, hidden, weight, bias, labels, ctx.ignore_index, *wanted
        )
    else:
        # Scaling in place spares a copy of the weight's gradient; not if the graph may be walked again or is traced.
        in_place = type(dloss) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
        grads = [grad.mul_(dloss) if in_place else grad * dloss for grad in ctx.saved_tensors]
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *nothing_else


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
