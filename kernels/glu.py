"""SwiGLU:  y = silu(gate) * up,  silu(g) = g * sigmoid(g).

Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; transformers `LlamaMLP.forward`.
Shapes: gate (..., D), up (..., D) -> (..., D), in gate's dtype.
Triton calculates in float32 (float64 for float64) and rounds once; the CPU rounds silu(gate) too, as eager code does.
Gradient, with s = sigmoid(gate):
    dgate = dy * up * s * (1 + gate * (1 - s)),    dup = dy * silu(gate)
Bytes that must move: forward reads gate and up and writes y; backward reads dy, gate and up and writes dgate and dup.
Saved: gate and up only; the product silu(gate) is computed again.
"""

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, as_rows, on_device, tl, triton, triton_dtype

BLOCK = 1024


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification, in plain PyTorch."""
    return torch.nn.functional.silu(gate) * up


@triton.jit
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D

    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(DTYPE)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D

    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(DTYPE)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(DTYPE)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(dgate_ptr + row * D + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * D + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, differentiable once in gate and up.

    Args:
        gate: (..., D), any floating dtype and any strides (a half of a joint projection, for instance).
        up: as gate, in shape and dtype.

    Returns:
        (..., D), contiguous, in gate's dtype.

    Raises:
        ValueError: the last dimension is empty, or up differs from gate in shape or dtype.
    """
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(f"swiglu: gate has shape {tuple(gate.shape)}; the last dimension must not be empty")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"swiglu: up is {up.dtype} {tuple(up.shape)}; it must be as gate, {gate.dtype} {tuple(gate.shape)}"
        )
    return torch.ops.fxopt.swiglu(gate, up)


@torch.library.custom_op("fxopt::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.ops.aten.silu.out(gate, out=gate.new_empty(gate.shape))
    return y.mul_(up)


@_swiglu.register_kernel(TRITON_DEVICES)
def _swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    gate_rows, up_rows, y = as_rows(gate), as_rows(up), gate.new_empty(gate.shape)
    num_rows, D = gate_rows.shape
    if num_rows:
        with on_device(gate):
            _swiglu_fwd_kernel[(num_rows, triton.cdiv(D, BLOCK))](
                gate_rows, up_rows, y, gate_rows.stride(0), up_rows.stride(0),
                D=D, BLOCK=BLOCK, DTYPE=triton_dtype(gate),
            )  # fmt: skip
    return y


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("fxopt::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.mul(dy, up, out=gate.new_empty(gate.shape))
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    dup = torch.ops.aten.silu.out(gate, out=up.new_empty(up.shape))
    return dgate, dup.mul_(dy)


@_swiglu_backward.register_kernel(TRITON_DEVICES)
def _swiglu_backward_triton(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy_rows, gate_rows, up_rows = as_rows(dy), as_rows(gate), as_rows(up)
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    num_rows, D = gate_rows.shape
    if num_rows:
        with on_device(gate):
            _swiglu_bwd_kernel[(num_rows, triton.cdiv(D, BLOCK))](
                dy_rows, gate_rows, up_rows, dgate, dup, dy_rows.stride(0), gate_rows.stride(0), up_rows.stride(0),
                D=D, BLOCK=BLOCK, DTYPE=triton_dtype(gate),
            )  # fmt: skip
    return dgate, dup


@_swiglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.recompute, ctx.recomputed_output = _recompute, 0


def _recompute(ctx) -> Tensor:
    """The product again, for those who did not keep it (`fxopt/rematerialize.py`)."""
    return torch.ops.fxopt.swiglu(*ctx.saved_tensors)


def _backward(ctx, dy: Tensor):
    return torch.ops.fxopt.swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup_context)
