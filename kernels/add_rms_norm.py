"""Residual addition and RMSNorm:  summed = x + residual,  normed = rms_norm(summed, weight, eps).

Source: the pre-norm residual stream of transformers `LlamaDecoderLayer.forward`; the norm as in `rms_norm.py`.
Shapes: x (..., D), residual (..., D), weight (D,) -> summed (..., D), normed (..., D), both in x's dtype.
The sum is rounded to x's dtype, as eager code rounds it; its norm accumulates in float32 (float64 for float64 inputs).
Gradient: both inputs receive dsummed + (the gradient of rms_norm at `summed`).
Bytes that must move: forward reads x and residual and writes summed and normed; backward reads summed, dsummed and
dnormed and writes one gradient for both inputs. Saved: summed and weight only.
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
from fxopt.kernels.op import cheap_result, op
from fxopt.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_reference


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch."""
    summed = x + residual
    return summed, rms_norm_reference(summed, weight, eps)


@triton.jit
def _add_rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, summed_ptr, normed_ptr, num_rows, x_stride, residual_stride,
    HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < D)

    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(DTYPE)
    residual = tl.load(residual_ptr + rows * residual_stride + cols, mask=mask, other=0.0).to(DTYPE)
    rounded = (x + residual).to(summed_ptr.dtype.element_ty)
    tl.store(summed_ptr + rows * D + cols, rounded, mask=mask)

    summed = rounded.to(DTYPE)
    normed = summed * tl.rsqrt(tl.sum(summed * summed, axis=1, keep_dims=True) / D + EPS)
    if HAS_WEIGHT:
        normed *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
    tl.store(normed_ptr + rows * D + cols, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_rms_norm_bwd_kernel(
    dsummed_ptr, dnormed_ptr, summed_ptr, weight_ptr, dx_ptr, dweight_ptr,
    num_rows, dsummed_stride, dnormed_stride, summed_stride,
    HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
        dweight = tl.zeros([ROWS, BLOCK], dtype=DTYPE)

    # A program takes every num_programs-th tile and writes one row of partial sums: no atomics, the same sum each run.
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (rows < num_rows) & (cols < D)
        summed = tl.load(summed_ptr + rows * summed_stride + cols, mask=mask, other=0.0).to(DTYPE)
        dsummed = tl.load(dsummed_ptr + rows * dsummed_stride + cols, mask=mask, other=0.0).to(DTYPE)
        dnormed = tl.load(dnormed_ptr + rows * dnormed_stride + cols, mask=mask, other=0.0).to(DTYPE)

        rstd = tl.rsqrt(tl.sum(summed * summed, axis=1, keep_dims=True) / D + EPS)
        x_hat = summed * rstd
        dx_hat = dnormed
        if HAS_WEIGHT:
            dx_hat = dnormed * weight
            dweight += dnormed * x_hat
        dx = rstd * (dx_hat - x_hat * (tl.sum(dx_hat * x_hat, axis=1, keep_dims=True) / D)) + dsummed
        tl.store(dx_ptr + rows * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if HAS_WEIGHT:
        tl.store(dweight_ptr + tl.program_id(0) * D + cols, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < D)


@cheap_result(1)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, rms_norm(x + residual, weight, eps)), differentiable once in x, residual and weight.

    Args:
        x: (..., D), any floating dtype and any strides.
        residual: as x, in shape and dtype.
        weight: (D,), any floating dtype; its gradient has this dtype. None: no factor.
        eps: added to the mean square.

    Returns:
        The sum and its norm, each (..., D), contiguous, in x's dtype.

    Raises:
        ValueError: the last dimension is empty, weight does not have its length, or residual differs from x.
    """
    check_rows("add_rms_norm", x, weight=weight)
    check_residual("add_rms_norm", x, residual)
    return _add_rms_norm(x, residual, weight, eps)


@op("add_rms_norm")
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    summed = torch.add(x, residual, out=x.new_empty(x.shape))
    return summed, rms_norm(summed, weight, eps)


@_add_rms_norm.register_kernel(TRITON_DEVICES)
def _add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    summed, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    num_rows, D = x_rows.shape
    tile = row_tile(D)
    if num_rows:
        launch(
            _add_rms_norm_fwd_kernel, (cdiv(num_rows, tile["ROWS"]),),
            x_rows, residual_rows, contiguous(weight), summed, normed,
            num_rows, x_rows.stride(0), residual_rows.stride(0),
            HAS_WEIGHT=weight is not None, EPS=eps, D=D, DTYPE=triton_dtype(x), **tile,
        )  # fmt: skip
    return summed, normed


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@op("add_rms_norm_backward")
def _add_rms_norm_backward(
    dsummed: Tensor, dnormed: Tensor, summed: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    dx, dweight = rms_norm_backward(dnormed, summed, weight, eps)
    return dx.add_(dsummed), dweight


@_add_rms_norm_backward.register_kernel(TRITON_DEVICES)
def _add_rms_norm_backward_triton(
    dsummed: Tensor, dnormed: Tensor, summed: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    dsummed_rows, dnormed_rows, summed_rows = as_rows(dsummed), as_rows(dnormed), as_rows(summed)
    dx = summed.new_empty(summed.shape)
    num_rows, D = summed_rows.shape
    tile = row_tile(D)
    num_programs = min(MAX_PROGRAMS, cdiv(num_rows, tile["ROWS"]))
    dweight = summed.new_empty(num_programs if weight is not None else 0, D, dtype=compute_dtype(summed))
    if num_rows:
        launch(
            _add_rms_norm_bwd_kernel, (num_programs,),
            dsummed_rows, dnormed_rows, summed_rows, contiguous(weight), dx, dweight,
            num_rows, dsummed_rows.stride(0), dnormed_rows.stride(0), summed_rows.stride(0),
            HAS_WEIGHT=weight is not None, EPS=eps, D=D, DTYPE=triton_dtype(summed), **tile,
        )  # fmt: skip
    return dx, summed.new_empty(0) if weight is None else dweight.sum(0).to(weight.dtype)


@_add_rms_norm_backward.register_fake
def _(dsummed: Tensor, dnormed: Tensor, summed: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return summed.new_empty(summed.shape), summed.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.set_materialize_grads(False)
    ctx.recompute, ctx.recomputed_output = _recompute, 1


def _recompute(ctx) -> Tensor:
    """The norm again, for those who did not keep it (`fxopt/rematerialize.py`)."""
    summed, weight = ctx.saved_tensors
    return rms_norm(summed, weight, ctx.eps)


def _backward(ctx, dsummed: Tensor | None, dnormed: Tensor | None):
    summed, weight = ctx.saved_tensors
    if dnormed is None:
        return dsummed, dsummed, None, None
    if dsummed is None:
        dx, dweight = rms_norm_backward(dnormed, summed, weight, ctx.eps)
    else:
        dx, dweight = _add_rms_norm_backward(dsummed, dnormed, summed, weight, ctx.eps)
    return dx, dx, dweight if ctx.needs_input_grad[2] else None, None


_add_rms_norm.register_autograd(_backward, setup_context=_setup_context)
