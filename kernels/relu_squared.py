"""Squared ReLU:  y = relu(x)².

Source: So et al., "Primer: Searching for Efficient Transformers for Language Modeling", arXiv:2109.08668;
transformers `ReLUSquaredActivation`.
Shapes: x (..., D) -> (..., D), in x's dtype.
Calculates in float32 (float64 for float64) and rounds once; the CPU in x's dtype, where a square rounds once too.
Gradient:  dx = 2 * dy * relu(x)
Bytes that must move: forward reads x and writes y; backward reads x and dy and writes dx. Saved: x only.
"""

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, as_rows, cdiv, tl, triton, triton_dtype
from fxopt.kernels.launch import launch
from fxopt.kernels.op import cheap_result, op

BLOCK = 1024
_aten = torch.ops.aten


def relu_squared_reference(x: Tensor) -> Tensor:
    """The specification, in plain PyTorch."""
    return torch.square(torch.nn.functional.relu(x))


@triton.jit
def _relu_squared_fwd_kernel(
    x_ptr, y_ptr, x_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D

    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(DTYPE)
    y = tl.where(x <= 0.0, 0.0, x * x)  # NaN stays NaN, which tl.maximum would make 0
    tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relu_squared_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, dy_stride, x_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D

    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(DTYPE)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(DTYPE)
    dx = tl.where(x <= 0.0, 0.0, 2.0 * dy * x)
    tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@cheap_result()
def relu_squared(x: Tensor) -> Tensor:
    """relu(x)², differentiable once in x.

    Args:
        x: (..., D), any floating dtype and any strides.

    Returns:
        (..., D), contiguous, in x's dtype.

    Raises:
        ValueError: the last dimension is empty.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"relu_squared: x has shape {tuple(x.shape)}; the last dimension must not be empty")
    return _relu_squared(x)


@op("relu_squared")
def _relu_squared(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0, out=x.new_empty(x.shape)).square_()


@_relu_squared.register_kernel(TRITON_DEVICES)
def _relu_squared_triton(x: Tensor) -> Tensor:
    x_rows, y = as_rows(x), x.new_empty(x.shape)
    num_rows, D = x_rows.shape
    if num_rows:
        launch(
            _relu_squared_fwd_kernel, (num_rows, cdiv(D, BLOCK)),
            x_rows, y, x_rows.stride(0),
            D=D, BLOCK=BLOCK, DTYPE=triton_dtype(x),
        )  # fmt: skip
    return y


@_relu_squared.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@op("relu_squared_backward")
def _relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.addcmul(x.new_zeros(()), dy, x, value=2, out=x.new_empty(x.shape))
    _aten.threshold_backward.grad_input(dx, x, 0, grad_input=dx)
    return dx


@_relu_squared_backward.register_kernel(TRITON_DEVICES)
def _relu_squared_backward_triton(dy: Tensor, x: Tensor) -> Tensor:
    dy_rows, x_rows, dx = as_rows(dy), as_rows(x), x.new_empty(x.shape)
    num_rows, D = x_rows.shape
    if num_rows:
        launch(
            _relu_squared_bwd_kernel, (num_rows, cdiv(D, BLOCK)),
            dy_rows, x_rows, dx, dy_rows.stride(0), x_rows.stride(0),
            D=D, BLOCK=BLOCK, DTYPE=triton_dtype(x),
        )  # fmt: skip
    return dx


@_relu_squared_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.recompute, ctx.recomputed_output = _recompute, 0


def _recompute(ctx) -> Tensor:
    """The result again, for those who did not keep it (`fxopt/rematerialize.py`)."""
    return _relu_squared(*ctx.saved_tensors)


def _backward(ctx, dy: Tensor) -> Tensor:
    return _relu_squared_backward(dy, *ctx.saved_tensors)


_relu_squared.register_autograd(_backward, setup_context=_setup_context)
