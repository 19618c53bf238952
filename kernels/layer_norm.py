"""LayerNorm:  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias,  mean and variance over the last dimension.

Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450; `torch.nn.functional.layer_norm`.
Shapes: x (..., D), weight (D,), bias (D,) -> (..., D), in x's dtype. Weight and bias may have other dtypes than x.
Accumulates in float32 (float64 for float64 inputs) and rounds once, at the store. The variance is the biased one, taken
as the mean of (x - mean(x))²: the mean of x² less the squared mean loses its digits where the mean is large.
Gradient, with r = 1 / sqrt(var(x) + eps), x̂ = (x - mean(x)) * r and g = dy * weight:
    dx = r * (g - mean(g) - x̂ * mean(g * x̂)),    dweight = Σ_rows dy * x̂,    dbias = Σ_rows dy
Bytes that must move: forward reads x and writes y; backward reads x and dy and writes dx.
Saved: x, weight, bias, and the two statistics of each row.
"""

import torch
from torch import Tensor

from fxopt.kernels.backend import (
    MAX_PROGRAMS,
    TRITON_DEVICES,
    as_rows,
    cast,
    cdiv,
    check_rows,
    compute_dtype,
    contiguous,
    row_blocks,
    row_tile,
    tl,
    triton,
    triton_dtype,
)
from fxopt.kernels.launch import launch
from fxopt.kernels.op import cheap_result, op


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The specification, in plain PyTorch, rounded once.

    In two-byte dtypes it is better than `torch.nn.functional.layer_norm` on them, which rounds the statistics that it
    keeps for backward and, on the CPU, sums the gradients of weight and bias in that dtype.
    """
    h = x.to(compute_dtype(x))
    weight, bias = cast(weight, h.dtype), cast(bias, h.dtype)
    return torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, eps).to(x.dtype)


@triton.jit
def _mean_and_centred(x, mask, D: tl.constexpr):
    """(ROWS, 1) and (ROWS, BLOCK): the mean of each row, and what lies around it."""
    mean = tl.sum(x, axis=1, keep_dims=True) / D
    centred = tl.where(mask, x - mean, 0.0)
    # What the rounded sum has missed matters where the mean is large.
    missed = tl.sum(centred, axis=1, keep_dims=True) / D
    return mean + missed, tl.where(mask, centred - missed, 0.0)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, num_rows, x_stride,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EPS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < D)

    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(DTYPE)
    mean, centred = _mean_and_centred(x, mask, D)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / D + EPS)
    y = centred * rstd
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
    tl.store(y_ptr + rows * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr, num_rows, dy_stride, x_stride,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
        dweight = tl.zeros([ROWS, BLOCK], dtype=DTYPE)
    if HAS_BIAS:
        dbias = tl.zeros([ROWS, BLOCK], dtype=DTYPE)

    # A program takes every num_programs-th tile and writes one row of partial sums: no atomics, the same sum each run.
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (rows < num_rows) & (cols < D)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(DTYPE)
        dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(DTYPE)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)

        # Past the last column x_hat is not zero, but dy is, by which every x_hat is multiplied before it is summed.
        x_hat = (x - mean) * rstd
        dx_hat = dy
        if HAS_WEIGHT:
            dx_hat = dy * weight
            dweight += dy * x_hat
        if HAS_BIAS:
            dbias += dy
        dx = dx_hat - tl.sum(dx_hat, axis=1, keep_dims=True) / D
        dx = rstd * (dx - x_hat * (tl.sum(dx_hat * x_hat, axis=1, keep_dims=True) / D))
        tl.store(dx_ptr + rows * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if HAS_WEIGHT:
        tl.store(dweight_ptr + tl.program_id(0) * D + cols, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < D)
    if HAS_BIAS:
        tl.store(dbias_ptr + tl.program_id(0) * D + cols, tl.sum(dbias, axis=0, keep_dims=True), mask=cols < D)


@cheap_result()
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, differentiable once in x, weight and bias.

    Args:
        x: (..., D), any floating dtype and any strides.
        weight: (D,), any floating dtype; its gradient has this dtype. None: no factor.
        bias: (D,), any floating dtype; its gradient has this dtype. None: no summand.
        eps: added to the variance, which is the biased one.

    Returns:
        (..., D), contiguous, in x's dtype.

    Raises:
        ValueError: the last dimension is empty, or weight or bias does not have its length.
    """
    check_rows("layer_norm", x, weight=weight, bias=bias)
    return layer_norm_and_statistics(x, weight, bias, eps)[0]


@op("layer_norm")
def layer_norm_and_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and 1 / sqrt(var + eps) of each row (..., 1): on the CPU, backward is slower without."""
    x_rows, dtype = as_rows(x), compute_dtype(x)
    shape, weight, bias = x_rows.shape[-1:], cast(weight, dtype), cast(bias, dtype)
    if x.dtype == dtype or weight is not None or bias is not None:
        y, mean, rstd = torch.ops.aten.native_layer_norm(x_rows, shape, weight, bias, eps)
    else:  # torch keeps the statistics in the parameters' dtype; without parameters it would round them to x's
        y = x_rows.new_empty(x_rows.shape)
        mean, rstd = (x.new_empty(x_rows.shape[0], 1, dtype=dtype) for _ in range(2))
        for block in row_blocks(x_rows):
            y[block], mean[block], rstd[block] = torch.ops.aten.native_layer_norm(
                x_rows[block].to(dtype), shape, None, None, eps
            )
    statistics_shape = (*x.shape[:-1], 1)
    return y.view(x.shape), mean.view(statistics_shape), rstd.view(statistics_shape)


@layer_norm_and_statistics.register_kernel(TRITON_DEVICES)
def _layer_norm_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x_rows, y = as_rows(x), x.new_empty(x.shape)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x)) for _ in range(2))
    num_rows, D = x_rows.shape
    tile = row_tile(D)
    if num_rows:
        launch(
            _layer_norm_fwd_kernel, (cdiv(num_rows, tile["ROWS"]),),
            x_rows, contiguous(weight), contiguous(bias), y, mean, rstd, num_rows, x_rows.stride(0),
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            EPS=eps, D=D, DTYPE=triton_dtype(x), **tile,
        )  # fmt: skip
    return y, mean, rstd


@layer_norm_and_statistics.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@op("layer_norm_backward")
def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; empty ones for a weight or bias that is None."""
    dy_rows, x_rows, dtype = as_rows(dy), as_rows(x), compute_dtype(x)
    mean, rstd, weight_, bias_ = mean.view(-1, 1), rstd.view(-1, 1), cast(weight, dtype), cast(bias, dtype)

    def native(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        wanted = [True, weight is not None, bias is not None]
        return torch.ops.aten.native_layer_norm_backward(dy, x, x.shape[-1:], mean, rstd, weight_, bias_, wanted)

    if x.dtype == dtype:
        dx, dweight, dbias = native(dy_rows, x_rows, mean, rstd)
        return dx.view(x.shape), _gradient(dweight, weight, x), _gradient(dbias, bias, x)

    # In blocks of float32: torch sums dweight and dbias in x's dtype, some 5 % wrong after 2048 rows of bfloat16.
    dx = x_rows.new_empty(x_rows.shape)
    dweight, dbias = (None if p is None else p.new_zeros(p.shape) for p in (weight_, bias_))
    for block in row_blocks(x_rows):
        dx[block], *sums = native(dy_rows[block].to(dtype), x_rows[block].to(dtype), mean[block], rstd[block])
        for total, of_block in zip((dweight, dbias), sums, strict=True):
            if total is not None and of_block is not None:
                total += of_block
    return dx.view(x.shape), _gradient(dweight, weight, x), _gradient(dbias, bias, x)


@layer_norm_backward.register_kernel(TRITON_DEVICES)
def _layer_norm_backward_triton(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dy_rows, x_rows, dx = as_rows(dy), as_rows(x), x.new_empty(x.shape)
    num_rows, D = x_rows.shape
    tile = row_tile(D)
    num_programs = min(MAX_PROGRAMS, cdiv(num_rows, tile["ROWS"]))
    dweight, dbias = (None if p is None else x.new_empty(num_programs, D, dtype=mean.dtype) for p in (weight, bias))
    if num_rows:
        launch(
            _layer_norm_bwd_kernel, (num_programs,),
            dy_rows, x_rows, mean, rstd, contiguous(weight), dx, dweight, dbias,
            num_rows, dy_rows.stride(0), x_rows.stride(0),
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, D=D, DTYPE=triton_dtype(x), **tile,
        )  # fmt: skip
    return dx, _gradient(dweight, weight, x), _gradient(dbias, bias, x)


@layer_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return x.new_empty(x.shape), dweight, dbias


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.recompute, ctx.recomputed_output = _recompute, 0


def _recompute(ctx) -> Tensor:
    """The result again, for those who did not keep it (`fxopt/rematerialize.py`)."""
    x, _, _, weight, bias = ctx.saved_tensors
    return layer_norm_and_statistics(x, weight, bias, ctx.eps)[0]


def _backward(ctx, dy: Tensor | None, *_: None):
    if dy is None:
        return None, None, None, None
    x, mean, rstd, weight, bias = ctx.saved_tensors  # once: activation checkpointing gives them out no second time
    dx, dweight, dbias = layer_norm_backward(dy, x, mean, rstd, weight, bias)
    return dx, None if weight is None else dweight, None if bias is None else dbias, None


layer_norm_and_statistics.register_autograd(_backward, setup_context=_setup_context)


def _gradient(total: Tensor | None, parameter: Tensor | None, x: Tensor) -> Tensor:
    """The gradient (D,) from its sum (D,), or its partial sums (P, D), in the compute dtype; empty without a parameter.

    An op cannot return None.
    """
    if total is None or parameter is None:
        return x.new_empty(0)
    return total.sum_to_size(parameter.shape).to(parameter.dtype)
