"""Rotary position embedding:  y = x * cos + rotate_half(x) * sin,  rotate_half([a, b]) = [-b, a].

Source: Su et al., "RoFormer", arXiv:2104.09864; transformers `apply_rotary_pos_emb` of Llama.
Shapes: x (B, H, S, D) of any strides, cos and sin broadcastable to x with last dimension D -> (B, H, S, D), in x's
dtype and, where x is dense, with x's strides (queries and keys usually come as a transposed (B, S, H, D)).
The two halves of cos and sin may differ. Triton calculates in float32 (float64 for float64 inputs) and rounds once; the
CPU calculates in x's dtype and rounds once less than eager code.
Gradient, with halves 1 and 2 of the last dimension:
    dx₁ = dy₁ * cos₁ + dy₂ * sin₂,   dx₂ = dy₂ * cos₂ - dy₁ * sin₁,   dcos = Σ dy * x,   dsin = Σ dy * rotate_half(x)
Bytes that must move: forward reads x and writes y, backward reads dy and writes dx; all heads share cos and sin.
Saved: cos and sin; x only if cos or sin need a gradient.
"""

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, compute_dtype, on_device, tl, triton, triton_dtype


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The specification, in plain PyTorch."""
    return (x * cos + _rotate_half(x) * sin).to(x.dtype)


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, num_rows, H, S,
    x_stride_b, x_stride_h, x_stride_s, cos_stride_b, cos_stride_h, cos_stride_s,
    sin_stride_b, sin_stride_h, sin_stride_s, y_stride_b, y_stride_h, y_stride_s,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < HALF)
    b, s, h = rows // (H * S), rows // H % S, rows % H  # heads fastest: neighbours share a row of cos and sin
    b, s, h = b.to(tl.int64), s.to(tl.int64), h.to(tl.int64)

    x = x_ptr + b * x_stride_b + h * x_stride_h + s * x_stride_s + cols
    cos = cos_ptr + b * cos_stride_b + h * cos_stride_h + s * cos_stride_s + cols
    sin = sin_ptr + b * sin_stride_b + h * sin_stride_h + s * sin_stride_s + cols
    y = y_ptr + b * y_stride_b + h * y_stride_h + s * y_stride_s + cols

    x_1 = tl.load(x, mask=mask, other=0.0).to(DTYPE)
    x_2 = tl.load(x + HALF, mask=mask, other=0.0).to(DTYPE)
    cos_1 = tl.load(cos, mask=mask, other=0.0).to(DTYPE)
    cos_2 = tl.load(cos + HALF, mask=mask, other=0.0).to(DTYPE)
    sin_1 = tl.load(sin, mask=mask, other=0.0).to(DTYPE)
    sin_2 = tl.load(sin + HALF, mask=mask, other=0.0).to(DTYPE)
    if BACKWARD:
        sin_1, sin_2 = -sin_2, -sin_1  # the transposed rotation
    tl.store(y, (x_1 * cos_1 - x_2 * sin_1).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + HALF, (x_2 * cos_2 + x_1 * sin_2).to(y_ptr.dtype.element_ty), mask=mask)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, differentiable once in x, cos and sin.

    Args:
        x: (B, H, S, D), D even, any floating dtype and any strides.
        cos: broadcastable to x, with last dimension D; (1, 1, S, D) or (B, 1, S, D) in transformers.
        sin: as cos.

    Returns:
        (B, H, S, D), in x's dtype, with x's strides where x is dense.

    Raises:
        ValueError: x does not have four dimensions or D is odd, or cos or sin does not fit x.
    """
    if x.dim() != 4 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(f"rope: x has shape {tuple(x.shape)}; it must be (B, H, S, D) with an even D > 0")
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() <= 4 and table.shape[-1:] == x.shape[-1:]
        fits = fits and all(n in (1, m) for n, m in zip(reversed(table.shape), reversed(x.shape), strict=False))
        if not fits:
            raise ValueError(
                f"rope: {name} has shape {tuple(table.shape)}; it must broadcast to x, {tuple(x.shape)}, "
                "and have x's last dimension"
            )
    return torch.ops.fxopt.rope(x, cos, sin)


@torch.library.custom_op("fxopt::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x_1, x_2 = x.chunk(2, -1)
    sin_1, sin_2 = sin.chunk(2, -1)
    y = torch.mul(x, cos, out=torch.empty_like(x))
    y_1, y_2 = y.chunk(2, -1)
    y_1.addcmul_(x_2, sin_1, value=-1)
    y_2.addcmul_(x_1, sin_2)
    return y


@_rope.register_kernel(TRITON_DEVICES)
def _rope_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch(x, cos, sin, backward=False)


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fxopt::rope_backward", mutates_args=())
def _rope_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dy_1, dy_2 = dy.chunk(2, -1)
    sin_1, sin_2 = sin.chunk(2, -1)
    dx = torch.mul(dy, cos, out=torch.empty_like(dy))
    dx_1, dx_2 = dx.chunk(2, -1)
    dx_1.addcmul_(dy_2, sin_2)
    dx_2.addcmul_(dy_1, sin_1, value=-1)
    return dx


@_rope_backward.register_kernel(TRITON_DEVICES)
def _rope_backward_triton(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch(dy, cos, sin, backward=True)


@_rope_backward.register_fake
def _(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(dy)


def _setup_context(ctx, inputs, output) -> None:
    x, cos, sin = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, cos, sin)


def _backward(ctx, dy: Tensor):
    x, cos, sin = ctx.saved_tensors
    dx = torch.ops.fxopt.rope_backward(dy, cos, sin) if ctx.needs_input_grad[0] else None
    dcos = dsin = None
    if ctx.needs_input_grad[1]:
        dcos = (dy.to(compute_dtype(dy)) * x).sum_to_size(cos.shape).to(cos.dtype)
    if ctx.needs_input_grad[2]:
        dsin = (dy.to(compute_dtype(dy)) * _rotate_half(x)).sum_to_size(sin.shape).to(sin.dtype)
    return dx, dcos, dsin


_rope.register_autograd(_backward, setup_context=_setup_context)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    y = torch.empty_like(x)
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    cos, sin = cos.expand(x.shape), sin.expand(x.shape)
    B, H, S, D = x.shape
    block = triton.next_power_of_2(D // 2)
    rows = max(1, 1024 // block)
    if x.numel():
        with on_device(x):
            _rope_kernel[(triton.cdiv(B * H * S, rows),)](
                x, cos, sin, y, B * H * S, H, S,
                *x.stride()[:3], *cos.stride()[:3], *sin.stride()[:3], *y.stride()[:3],
                BACKWARD=backward, HALF=D // 2, ROWS=rows, BLOCK=block, DTYPE=triton_dtype(x),
            )  # fmt: skip
    return y


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
