"""The clamped gated unit of gpt-oss:  y = (u + 1) * g * sigmoid(alpha * g),  g and u being gate and up clamped:
    g = min(gate, limit),    u = max(-limit, min(up, limit))

Source: transformers `GptOssExperts._apply_gate`; for the unit without clamps see `kernels/glu.py`.
Shapes: gate (..., D), up (..., D) -> (..., D), in the wider dtype of both.
Calculates in float32 (float64 for float64) and rounds once.
Gradient, with s = sigmoid(alpha * g), both bounds inside, as PyTorch's clamp has them:
    dgate = dy * (u + 1) * s * (1 + alpha * g * (1 - s))  where gate is not clamped, else 0
    dup = dy * g * s  where up is not clamped, else 0
Bytes that must move: forward reads gate and up and writes y; backward reads dy, gate and up and writes dgate and dup.
gate and up are read where they lie, also as every other element of one tensor.
Saved: gate and up only; all else is computed again.
"""

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, as_rows, cdiv, compute_dtype, row_blocks, tl, triton, triton_dtype
from fxopt.kernels.elementary import sigmoid
from fxopt.kernels.launch import launch
from fxopt.kernels.op import cheap_result, op

BLOCK = 1024


def _clamp_passes_gradients_at_bounds() -> bool:
    with torch.enable_grad():
        x = torch.ones(1, requires_grad=True)
        return bool(torch.autograd.grad(x.clamp(max=1.0).sum(), x)[0])


AT_BOUNDS = _clamp_passes_gradients_at_bounds()  # it does until torch 2.13, and not since 2.14


def clamped_swiglu_reference(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """The specification, in plain PyTorch."""
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@triton.jit
def _clamped_swiglu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, gate_col_stride, up_stride, up_col_stride,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = cols < D

    gate = tl.load(gate_ptr + row * gate_stride + cols * gate_col_stride, mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + row * up_stride + cols * up_col_stride, mask=mask, other=0.0).to(DTYPE)
    # Not tl.minimum and tl.maximum, which would make a limit of NaN.
    g = tl.where(gate > LIMIT, LIMIT, gate)
    u = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    y = (u + 1.0) * g * sigmoid(ALPHA * g)
    tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _clamped_swiglu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    dy_stride, gate_stride, gate_col_stride, up_stride, up_col_stride,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, AT_BOUNDS: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = cols < D

    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(DTYPE)
    gate = tl.load(gate_ptr + row * gate_stride + cols * gate_col_stride, mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + row * up_stride + cols * up_col_stride, mask=mask, other=0.0).to(DTYPE)
    g = tl.where(gate > LIMIT, LIMIT, gate)
    u = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    share = sigmoid(ALPHA * g)
    slope = share * (1.0 + ALPHA * g * sigmoid(-ALPHA * g))
    if AT_BOUNDS:
        gate_passes, up_passes = gate <= LIMIT, (up >= -LIMIT) & (up <= LIMIT)
    else:
        gate_passes, up_passes = gate < LIMIT, (up > -LIMIT) & (up < LIMIT)
    dgate = tl.where(gate_passes, dy * (u + 1.0) * slope, 0.0)
    dup = tl.where(up_passes, dy * g * share, 0.0)
    tl.store(dgate_ptr + row * D + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * D + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


@cheap_result()
def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """(u + 1) * g * sigmoid(alpha * g) of the clamped gate and up, differentiable once in gate and up.

    Args:
        gate: (..., D), any floating dtype and any strides (every other element of a joint projection, for instance).
        up: as gate in shape, any floating dtype and any strides.
        alpha: steepness of the sigmoid.
        limit: bound of gate from above and of up from both sides; not negative.

    Returns:
        (..., D), contiguous, in the wider dtype of both, as PyTorch promotes them.

    Raises:
        ValueError: the last dimension is empty, up differs from gate in shape, or limit is negative.
    """
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(f"clamped_swiglu: gate has shape {tuple(gate.shape)}; the last dimension must not be empty")
    if up.shape != gate.shape:
        raise ValueError(f"clamped_swiglu: up has shape {tuple(up.shape)}; it must be as gate's, {tuple(gate.shape)}")
    if not limit >= 0:
        raise ValueError(f"clamped_swiglu: limit is {limit}; it must not be negative")
    return _clamped_swiglu(gate, up, alpha, limit)


@op("clamped_swiglu")
def _clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate_rows, up_rows, y = _as_strided_rows(gate), _as_strided_rows(up), _new_result(gate, up)
    y_rows, dtype = as_rows(y), compute_dtype(y)
    for block in row_blocks(y_rows):
        g = gate_rows[block].to(dtype, copy=True).clamp_(max=limit)
        u = up_rows[block].to(dtype, copy=True).clamp_(-limit, limit)
        sigmoid = torch.mul(g, alpha).sigmoid_()
        y_rows[block] = u.add_(1).mul_(g).mul_(sigmoid)
    return y


@_clamped_swiglu.register_kernel(TRITON_DEVICES)
def _clamped_swiglu_triton(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate_rows, up_rows, y = _as_strided_rows(gate), _as_strided_rows(up), _new_result(gate, up)
    num_rows, D = gate_rows.shape
    if num_rows:
        launch(
            _clamped_swiglu_fwd_kernel, (num_rows, cdiv(D, BLOCK)),
            gate_rows, up_rows, y, *gate_rows.stride(), *up_rows.stride(),
            ALPHA=alpha, LIMIT=limit, D=D, BLOCK=BLOCK, DTYPE=triton_dtype(y),
        )  # fmt: skip
    return y


@_clamped_swiglu.register_fake
def _(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    return _new_result(gate, up)


@op("clamped_swiglu_backward")
def _clamped_swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    dy_rows, gate_rows, up_rows = _as_strided_rows(dy), _as_strided_rows(gate), _as_strided_rows(up)
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    dgate_rows, dup_rows, dtype = as_rows(dgate), as_rows(dup), compute_dtype(dy)
    for block in row_blocks(dgate_rows):
        d = dy_rows[block].to(dtype)
        gate_, up_ = gate_rows[block].to(dtype, copy=True), up_rows[block].to(dtype, copy=True)
        g, u = gate_.clamp(max=limit), up_.clamp(-limit, limit)
        sigmoid = torch.mul(g, alpha).sigmoid_()
        value = g * sigmoid
        # Not g - value, which is small and has the rounding error of g.
        slope = torch.addcmul(sigmoid, value, 1 - sigmoid, value=alpha)
        # Comparing in place leaves 0.0 or 1.0: faster to multiply with than booleans are to select by.
        gate_, up_ = (
            (gate_.le_(limit), up_.abs_().le_(limit)) if AT_BOUNDS else (gate_.lt_(limit), up_.abs_().lt_(limit))
        )
        dgate_rows[block] = u.add_(1).mul_(slope).mul_(d).mul_(gate_)
        dup_rows[block] = value.mul_(d).mul_(up_)
    return dgate, dup


@_clamped_swiglu_backward.register_kernel(TRITON_DEVICES)
def _clamped_swiglu_backward_triton(
    dy: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    dy_rows, gate_rows, up_rows = as_rows(dy), _as_strided_rows(gate), _as_strided_rows(up)
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    num_rows, D = gate_rows.shape
    if num_rows:
        launch(
            _clamped_swiglu_bwd_kernel, (num_rows, cdiv(D, BLOCK)),
            dy_rows, gate_rows, up_rows, dgate, dup,
            dy_rows.stride(0), *gate_rows.stride(), *up_rows.stride(),
            ALPHA=alpha, LIMIT=limit, AT_BOUNDS=AT_BOUNDS, D=D, BLOCK=BLOCK, DTYPE=triton_dtype(dy),
        )  # fmt: skip
    return dgate, dup


@_clamped_swiglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output) -> None:
    gate, up, ctx.alpha, ctx.limit = inputs
    ctx.save_for_backward(gate, up)
    ctx.recompute, ctx.recomputed_output = _recompute, 0


def _recompute(ctx) -> Tensor:
    """The product again, for those who did not keep it (`fxopt/rematerialize.py`)."""
    return _clamped_swiglu(*ctx.saved_tensors, ctx.alpha, ctx.limit)


def _backward(ctx, dy: Tensor):
    return *_clamped_swiglu_backward(dy, *ctx.saved_tensors, ctx.alpha, ctx.limit), None, None


_clamped_swiglu.register_autograd(_backward, setup_context=_setup_context)


def _new_result(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _as_strided_rows(tensor: Tensor) -> Tensor:
    """(..., D) -> (N, D), a view where that is possible; other than `as_rows`, elements of a row may lie apart."""
    return tensor.reshape(-1, tensor.shape[-1])
