"""RMSNorm:  y = x / sqrt(mean(x²) + eps) * weight,  the mean over the last dimension; or eps outside the root.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; transformers `LlamaRMSNorm`. With
epsilon outside, x / (sqrt(mean(x²)) + eps) * weight: that of the paper's authors.
Shapes: x (..., D), weight (D,) -> (..., D), in x's dtype. The weight may have another dtype than x.
Accumulates in float32 (float64 for float64 inputs) and rounds once, at the store.
Gradient, with r = 1 / sqrt(mean(x²) + eps) and x̂ = x * r:
    dx = r * (dy * weight - x̂ * mean(dy * weight * x̂)),    dweight = Σ_rows dy * x̂
With epsilon outside, r = 1 / (sqrt(mean(x²)) + eps), and the subtracted term is larger by 1 + eps / sqrt(mean(x²)). A
row of zeros has no gradient then; the op takes the term for 0, as `torch.norm` does.
Bytes that must move: forward reads x and writes y; backward reads x and dy and writes dx. Saved: x and weight only.
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
from fxopt.kernels.elementary import divide
from fxopt.kernels.launch import launch
from fxopt.kernels.op import cheap_result, op


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, eps_outside: bool = False) -> Tensor:
    """The specification, in plain PyTorch, with the two roundings of the modelling code."""
    h = x.to(compute_dtype(x))
    mean_square = h.pow(2).mean(-1, keepdim=True)
    h = (h / (mean_square.sqrt() + eps) if eps_outside else h * torch.rsqrt(mean_square + eps)).to(x.dtype)
    return h if weight is None else (weight * h).to(x.dtype)


@triton.jit
def _reciprocal_root(mean_square, EPS: tl.constexpr, EPS_OUTSIDE: tl.constexpr):
    return divide(1.0, tl.sqrt(mean_square) + EPS) if EPS_OUTSIDE else tl.rsqrt(mean_square + EPS)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, num_rows, x_stride,
    HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, EPS_OUTSIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < D)

    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(DTYPE)
    y = x * _reciprocal_root(tl.sum(x * x, axis=1, keep_dims=True) / D, EPS, EPS_OUTSIDE)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
    tl.store(y_ptr + rows * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, num_rows, dy_stride, x_stride,
    HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, EPS_OUTSIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(DTYPE)
        dweight = tl.zeros([ROWS, BLOCK], dtype=DTYPE)

    # A program takes every num_programs-th tile and writes one row of partial sums: no atomics, the same sum each run.
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (rows < num_rows) & (cols < D)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(DTYPE)
        dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(DTYPE)

        mean_square = tl.sum(x * x, axis=1, keep_dims=True) / D
        rstd = _reciprocal_root(mean_square, EPS, EPS_OUTSIDE)
        x_hat = x * rstd
        dx_hat = dy
        if HAS_WEIGHT:
            dx_hat = dy * weight
            dweight += dy * x_hat
        radial = tl.sum(dx_hat * x_hat, axis=1, keep_dims=True) / D
        if EPS_OUTSIDE:
            root = tl.sqrt(mean_square)
            radial = tl.where(root == 0.0, 0.0, radial + radial * divide(EPS, root))
        dx = rstd * (dx_hat - x_hat * radial)
        tl.store(dx_ptr + rows * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if HAS_WEIGHT:
        tl.store(dweight_ptr + tl.program_id(0) * D + cols, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < D)


@cheap_result()
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, eps_outside: bool = False) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight, differentiable once in x and weight.

    Args:
        x: (..., D), any floating dtype and any strides.
        weight: (D,), any floating dtype; its gradient has this dtype. None: no factor.
        eps: added to the mean square; with `eps_outside`, to the root of it.

    Returns:
        (..., D), contiguous, in x's dtype.

    Raises:
        ValueError: the last dimension is empty, or weight does not have its length.
    """
    check_rows("rms_norm", x, weight=weight)
    return _rms_norm(x, weight, eps, eps_outside)


@cheap_result()
def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(Σ x² + eps), differentiable once: what `rms_norm` is with a weight of 1 / sqrt(D); otherwise as it."""
    D = x.shape[-1]
    return rms_norm(x, x.new_full((D,), D**-0.5, dtype=compute_dtype(x)), eps / D)


@cheap_result()
def deviation_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / (std(x) + eps) * weight, differentiable once; otherwise as `rms_norm`.

    The standard deviation is that of a sample, over D - 1, and D > 1.
    """
    D = x.shape[-1]
    centered = x - x.mean(-1, keepdim=True)
    centered = centered - centered.mean(-1, keepdim=True)  # a row of one number is its mean but for a rounding
    shrunk = (1 - 1 / D) ** 0.5  # what the root of the mean square is of the deviation
    factor = x.new_full((D,), shrunk, dtype=compute_dtype(x))
    return rms_norm(centered, factor if weight is None else weight * factor, eps * shrunk, True)


@op("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, eps_outside: bool = False) -> Tensor:
    x_rows, y = as_rows(x), x.new_empty(x.shape)
    y_rows, dtype = as_rows(y), compute_dtype(x)
    weight = cast(weight, dtype)
    for block in row_blocks(x_rows):
        h = x_rows[block].to(dtype, copy=True)
        h.mul_(_reciprocal_rms(h, eps, eps_outside))
        y_rows[block] = h if weight is None else h.mul_(weight)
    return y


@_rms_norm.register_kernel(TRITON_DEVICES)
def _rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float, eps_outside: bool = False) -> Tensor:
    x_rows, y = as_rows(x), x.new_empty(x.shape)
    num_rows, D = x_rows.shape
    tile = row_tile(D)
    if num_rows:
        launch(
            _rms_norm_fwd_kernel, (cdiv(num_rows, tile["ROWS"]),),
            x_rows, contiguous(weight), y, num_rows, x_rows.stride(0),
            HAS_WEIGHT=weight is not None, EPS=eps, EPS_OUTSIDE=eps_outside, D=D, DTYPE=triton_dtype(x), **tile,
        )  # fmt: skip
    return y


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, eps_outside: bool = False) -> Tensor:
    return x.new_empty(x.shape)


@op("rms_norm_backward")
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, eps_outside: bool = False
) -> tuple[Tensor, Tensor]:
    dy_rows, x_rows, dx = as_rows(dy), as_rows(x), x.new_empty(x.shape)
    dx_rows = as_rows(dx)
    dtype, D = compute_dtype(x), x.shape[-1]
    weight_ = cast(weight, dtype)
    dweight = x.new_zeros(0 if weight is None else D, dtype=dtype)
    for block in row_blocks(x_rows):
        x_hat = x_rows[block].to(dtype, copy=True)
        root = _root_mean_square(x_hat) if eps_outside else None
        rstd = _reciprocal_rms(x_hat, eps, False) if root is None else (root + eps).reciprocal_()
        x_hat.mul_(rstd)
        d = dy_rows[block].to(dtype, copy=True)
        product = d * x_hat
        if weight_ is None:
            correction = product.sum(-1, keepdim=True)
        else:
            dweight += product.sum(0)
            correction = (product @ weight_).unsqueeze(-1)
            d.mul_(weight_)
        if root is not None:
            correction = torch.where(root == 0, 0, correction + correction * (eps / root))
        dx_rows[block] = d.addcmul_(x_hat, correction.div_(-D)).mul_(rstd)
    return dx, dweight.to(x.dtype if weight is None else weight.dtype)


@rms_norm_backward.register_kernel(TRITON_DEVICES)
def _rms_norm_backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, eps_outside: bool = False
) -> tuple[Tensor, Tensor]:
    dy_rows, x_rows, dx = as_rows(dy), as_rows(x), x.new_empty(x.shape)
    num_rows, D = x_rows.shape
    tile = row_tile(D)
    num_programs = min(MAX_PROGRAMS, cdiv(num_rows, tile["ROWS"]))
    dweight = x.new_empty(num_programs if weight is not None else 0, D, dtype=compute_dtype(x))
    if num_rows:
        launch(
            _rms_norm_bwd_kernel, (num_programs,),
            dy_rows, x_rows, contiguous(weight), dx, dweight,
            num_rows, dy_rows.stride(0), x_rows.stride(0),
            HAS_WEIGHT=weight is not None, EPS=eps, EPS_OUTSIDE=eps_outside, D=D, DTYPE=triton_dtype(x), **tile,
        )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else dweight.sum(0).to(weight.dtype)


@rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, eps_outside: bool = False) -> tuple[Tensor, Tensor]:
    # No elements where there is no weight, since an op cannot return None.
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, ctx.eps, ctx.eps_outside = inputs
    ctx.save_for_backward(x, weight)
    ctx.recompute, ctx.recomputed_output = _recompute, 0


def _recompute(ctx) -> Tensor:
    """The result again, for those who did not keep it (`fxopt/rematerialize.py`)."""
    return _rms_norm(*ctx.saved_tensors, ctx.eps, ctx.eps_outside)


def _backward(ctx, dy: Tensor):
    dx, dweight = rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.eps_outside)
    return dx, dweight if ctx.needs_input_grad[1] else None, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def _root_mean_square(h: Tensor) -> Tensor:
    """(N, D) -> (N, 1): sqrt(mean(h²))."""
    return h.square().mean(-1, keepdim=True).sqrt_()


def _reciprocal_rms(h: Tensor, eps: float, eps_outside: bool) -> Tensor:
    """(N, D) -> (N, 1): 1 / sqrt(mean(h²) + eps), or 1 / (sqrt(mean(h²)) + eps)."""
    if eps_outside:
        return _root_mean_square(h).add_(eps).reciprocal_()
    return h.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
