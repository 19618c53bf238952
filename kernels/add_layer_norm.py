"""Residual addition and LayerNorm:  summed = x + residual,  normed = layer_norm(summed, weight, bias, eps).

Source: the pre-norm residual stream of transformers `GPT2Block.forward`; the norm as in `layer_norm.py`.
Shapes: x (..., D), residual (..., D), weight (D,), bias (D,) -> summed (..., D), normed (..., D), both in x's dtype.
The sum is rounded to x's dtype, as eager code rounds it; its norm accumulates in float32 (float64 for float64 inputs).
Gradient: both inputs receive dsummed + (the gradient of layer_norm at `summed`).
Bytes that must move: forward reads x and residual and writes summed and normed; backward reads summed, dsummed and
dnormed and writes one gradient for both inputs. Saved: summed, weight, bias, and the two statistics of each row.
"""

import torch
from torch import Tensor

from fxopt.kernels.backend import (
    MAX_PROGRAMS,
    TRITON_DEVICES,
    as_rows,
    cdiv,
    check_residual,
    check_rows,
    compute_dtype,
    contiguous,
    row_tile,
    tl,
    triton,
    triton_dtype,
)
from fxopt.kernels.launch import launch
from fxopt.kernels.layer_norm import (
    _gradient,
    _mean_and_centred,
    layer_norm_and_statistics,
    layer_norm_backward,
    layer_norm_reference,
)
from fxopt.kernels.op import cheap_result, op


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch."""
    summed = x + residual
    return summed, layer_norm_reference(summed, weight, bias, eps)


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, summed_ptr, normed_ptr, mean_ptr, rstd_ptr,
    num_rows, x_stride, residual_stride,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EPS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < D)

    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(DTYPE)
    residual = tl.load(residual_ptr + rows * residual_stride + cols, mask=mask, other=0.0).to(DTYPE)
    rounded = (x + residual).to(summed_ptr.dtype.element_ty)
    tl.store(summed_ptr + rows * D + cols, rounded, mask=mask)

    mean, centred = _mean_and_centred(rounded.to(DTYPE), mask, D)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / D + EPS)
    normed = centred * rstd
    if HAS_WEIGHT:
        normed *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
    if HAS_BIAS:
        normed += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
    tl.store(normed_ptr + rows * D + cols, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def _add_layer_norm_bwd_kernel(
    dsummed_ptr, dnormed_ptr, summed_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    num_rows, dsummed_stride, dnormed_stride, summed_stride,
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
        summed = tl.load(summed_ptr + rows * summed_stride + cols, mask=mask, other=0.0).to(DTYPE)
        dsummed = tl.load(dsummed_ptr + rows * dsummed_stride + cols, mask=mask, other=0.0).to(DTYPE)
        dnormed = tl.load(dnormed_ptr + rows * dnormed_stride + cols, mask=mask, other=0.0).to(DTYPE)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)

        # Past the last column x_hat is not zero, but dnormed is, by which each is multiplied before it is summed.
        x_hat = (summed - mean) * rstd
        dx_hat = dnormed
        if HAS_WEIGHT:
            dx_hat = dnormed * weight
            dweight += dnormed * x_hat
        if HAS_BIAS:
            dbias += dnormed
        dx = dx_hat - tl.sum(dx_hat, axis=1, keep_dims=True) / D
        dx = rstd * (dx - x_hat * (tl.sum(dx_hat * x_hat, axis=1, keep_dims=True) / D)) + dsummed
        tl.store(dx_ptr + rows * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if HAS_WEIGHT:
        tl.store(dweight_ptr + tl.program_id(0) * D + cols, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < D)
    if HAS_BIAS:
        tl.store(dbias_ptr + tl.program_id(0) * D + cols, tl.sum(dbias, axis=0, keep_dims=True), mask=cols < D)


@cheap_result(1)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + residual, layer_norm(x + residual, weight, bias, eps)), differentiable once in all four tensors.

    Args:
        x: (..., D), any floating dtype and any strides.
        residual: as x, in shape and dtype.
        weight: (D,), any floating dtype; its gradient has this dtype. None: no factor.
        bias: (D,), any floating dtype; its gradient has this dtype. None: no summand.
        eps: added to the variance, which is the biased one.

    Returns:
        The sum and its norm, each (..., D), contiguous, in x's dtype.

    Raises:
        ValueError: the last dimension is empty, weight or bias does not have its length, or residual differs from x.
    """
    check_rows("add_layer_norm", x, weight=weight, bias=bias)
    check_residual("add_layer_norm", x, residual)
    summed, normed, _, _ = _add_layer_norm(x, residual, weight, bias, eps)
    return summed, normed


@op("add_layer_norm")
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum and its norm, and mean and 1 / sqrt(var + eps) of each row of the sum (..., 1)."""
    summed = torch.add(x, residual, out=x.new_empty(x.shape))
    return summed, *layer_norm_and_statistics(summed, weight, bias, eps)


@_add_layer_norm.register_kernel(TRITON_DEVICES)
def _add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    summed, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x)) for _ in range(2))
    num_rows, D = x_rows.shape
    tile = row_tile(D)
    if num_rows:
        launch(
            _add_layer_norm_fwd_kernel, (cdiv(num_rows, tile["ROWS"]),),
            x_rows, residual_rows, contiguous(weight), contiguous(bias), summed, normed, mean, rstd,
            num_rows, x_rows.stride(0), residual_rows.stride(0),
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            EPS=eps, D=D, DTYPE=triton_dtype(x), **tile,
        )  # fmt: skip
    return summed, normed, mean, rstd


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@op("add_layer_norm_backward")
def _add_layer_norm_backward(
    dsummed: Tensor, dnormed: Tensor, summed: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x and residual alike, weight and bias; empty ones for a weight or bias that is None."""
    dx, dweight, dbias = layer_norm_backward(dnormed, summed, mean, rstd, weight, bias)
    return dx.add_(dsummed), dweight, dbias


@_add_layer_norm_backward.register_kernel(TRITON_DEVICES)
def _add_layer_norm_backward_triton(
    dsummed: Tensor, dnormed: Tensor, summed: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dsummed_rows, dnormed_rows, summed_rows = as_rows(dsummed), as_rows(dnormed), as_rows(summed)
    dx = summed.new_empty(summed.shape)
    num_rows, D = summed_rows.shape
    tile = row_tile(D)
    num_programs = min(MAX_PROGRAMS, cdiv(num_rows, tile["ROWS"]))
    dweight, dbias = (
        None if p is None else summed.new_empty(num_programs, D, dtype=mean.dtype) for p in (weight, bias)
    )
    if num_rows:
        launch(
            _add_layer_norm_bwd_kernel, (num_programs,),
            dsummed_rows, dnormed_rows, summed_rows, mean, rstd, contiguous(weight), dx, dweight, dbias,
            num_rows, dsummed_rows.stride(0), dnormed_rows.stride(0), summed_rows.stride(0),
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, D=D, DTYPE=triton_dtype(summed), **tile,
        )  # fmt: skip
    return dx, _gradient(dweight, weight, summed), _gradient(dbias, bias, summed)


@_add_layer_norm_backward.register_fake
def _(
    dsummed: Tensor, dnormed: Tensor, summed: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dweight, dbias = (summed.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return summed.new_empty(summed.shape), dweight, dbias


def _setup_context(ctx, inputs, output) -> None:
    _, _, weight, bias, ctx.eps = inputs
    summed, _, mean, rstd = output
    ctx.save_for_backward(summed, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.recompute, ctx.recomputed_output = _recompute, 1


def _recompute(ctx) -> Tensor:
    """The norm again, for those who did not keep it (`fxopt/rematerialize.py`)."""
    summed, _, _, weight, bias = ctx.saved_tensors
    return layer_norm_and_statistics(summed, weight, bias, ctx.eps)[0]


def _backward(ctx, dsummed: Tensor | None, dnormed: Tensor | None, *_: None):
    if dnormed is None:
        return dsummed, dsummed, None, None, None
    saved = ctx.saved_tensors
    if dsummed is None:
        dx, dweight, dbias = layer_norm_backward(dnormed, *saved)
    else:
        dx, dweight, dbias = _add_layer_norm_backward(dsummed, dnormed, *saved)
    *_, weight, bias = saved
    return dx, dx, None if weight is None else dweight, None if bias is None else dbias, None


_add_layer_norm.register_autograd(_backward, setup_context=_setup_context)
