"""Gated linear units:  y = f(gate) * up,  with f silu (SwiGLU), gelu (GeGLU) or relu (ReGLU).

Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; transformers `LlamaMLP` and `GemmaMLP`.
Shapes: gate (..., D), up (..., D) -> (..., D), in the wider dtype of both.
Triton calculates in float32 (float64 for float64) and rounds once; the CPU rounds f(gate) too, as eager code does.
    silu(g) = g * sigmoid(g),    gelu(g) = g * Φ(g), or by tanh: g * sigmoid(2 * sqrt(2/π) * (g + 0.044715 g³))
Gradient:
    dgate = dy * up * f'(gate),    dup = dy * f(gate)
Bytes that must move: forward reads gate and up and writes y; backward reads dy, gate and up and writes dgate and dup.
Saved: gate and up only; f(gate) is computed again.
"""

import torch
from torch import Tensor

from fxopt.kernels.backend import TRITON_DEVICES, as_rows, cdiv, tl, triton, triton_dtype
from fxopt.kernels.elementary import exp, sigmoid
from fxopt.kernels.launch import launch
from fxopt.kernels.op import cheap_result, op

BLOCK = 1024
_aten = torch.ops.aten


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification, in plain PyTorch."""
    return torch.nn.functional.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """The specification, in plain PyTorch."""
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def reglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification, in plain PyTorch."""
    return torch.nn.functional.relu(gate) * up


@triton.jit
def _value_and_slope(g, ACTIVATION: tl.constexpr):
    """f(g) and f'(g)."""
    if ACTIVATION == "silu":
        share = sigmoid(g)
        value, slope = g * share, share * (1.0 + g * sigmoid(-g))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value, slope = g * cdf, cdf + g * 0.3989422804014327 * exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        share = sigmoid(z)
        dz = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        value, slope = g * share, share + g * share * sigmoid(-z) * dz
    else:
        value, slope = tl.where(g <= 0.0, 0.0, g), tl.where(g <= 0.0, 0.0, 1.0)  # tl.maximum would make NaN 0
    return value, slope


@triton.jit
def _glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D

    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(DTYPE)
    value, _ = _value_and_slope(gate, ACTIVATION)
    tl.store(y_ptr + row * D + cols, (value * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D

    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(DTYPE)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(DTYPE)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(DTYPE)
    value, slope = _value_and_slope(gate, ACTIVATION)
    dgate = dy * up * slope
    if ACTIVATION == "relu":
        dgate = tl.where(slope == 0.0, 0.0, dgate)  # of NaN and infinity too
    tl.store(dgate_ptr + row * D + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * D + cols, (dy * value).to(dup_ptr.dtype.element_ty), mask=mask)


@cheap_result()
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, differentiable once in gate and up.

    Args:
        gate: (..., D), any floating dtype and any strides (a half of a joint projection, for instance).
        up: as gate in shape, any floating dtype.

    Returns:
        (..., D), contiguous, in the wider dtype of both, as PyTorch promotes them.

    Raises:
        ValueError: the last dimension is empty, or up differs from gate in shape.
    """
    return _checked_glu("swiglu", gate, up, "silu")


@cheap_result()
def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, differentiable once in gate and up; otherwise as `swiglu`.

    approximate: "none" or "tanh", as for `torch.nn.functional.gelu`; ValueError for another.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate is {approximate!r}; it must be 'none' or 'tanh'")
    return _checked_glu("geglu", gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


@cheap_result()
def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate) * up, differentiable once in gate and up; otherwise as `swiglu`."""
    return _checked_glu("reglu", gate, up, "relu")


def _checked_glu(name: str, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(f"{name}: gate has shape {tuple(gate.shape)}; the last dimension must not be empty")
    if up.shape != gate.shape:
        raise ValueError(f"{name}: up has shape {tuple(up.shape)}; it must be as gate's, {tuple(gate.shape)}")
    return _glu(gate, up, activation)


@op("glu")
def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    value = _activate(gate, activation)
    return torch.mul(value, up, out=value if value.dtype == _result_dtype(gate, up) else None)


@_glu.register_kernel(TRITON_DEVICES)
def _glu_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate_rows, up_rows, y = as_rows(gate), as_rows(up), gate.new_empty(gate.shape, dtype=_result_dtype(gate, up))
    num_rows, D = gate_rows.shape
    if num_rows:
        launch(
            _glu_fwd_kernel, (num_rows, cdiv(D, BLOCK)),
            gate_rows, up_rows, y, gate_rows.stride(0), up_rows.stride(0),
            ACTIVATION=activation, D=D, BLOCK=BLOCK, DTYPE=triton_dtype(y),
        )  # fmt: skip
    return y


@_glu.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape, dtype=_result_dtype(gate, up))


@op("glu_backward")
def _glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if not gate.dtype == up.dtype == dy.dtype:
        wide = _glu_backward(dy, gate.to(dy.dtype), up.to(dy.dtype), activation)
        return wide[0].to(gate.dtype), wide[1].to(up.dtype)
    dgate = torch.mul(dy, up, out=gate.new_empty(gate.shape))
    if activation == "silu":
        _aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    elif activation == "relu":
        _aten.threshold_backward.grad_input(dgate, gate, 0, grad_input=dgate)
    else:
        _aten.gelu_backward.grad_input(dgate, gate, approximate=_approximate(activation), grad_input=dgate)
    return dgate, _activate(gate, activation).mul_(dy)


@_glu_backward.register_kernel(TRITON_DEVICES)
def _glu_backward_triton(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dy_rows, gate_rows, up_rows = as_rows(dy), as_rows(gate), as_rows(up)
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    num_rows, D = gate_rows.shape
    if num_rows:
        launch(
            _glu_bwd_kernel, (num_rows, cdiv(D, BLOCK)),
            dy_rows, gate_rows, up_rows, dgate, dup, dy_rows.stride(0), gate_rows.stride(0), up_rows.stride(0),
            ACTIVATION=activation, D=D, BLOCK=BLOCK, DTYPE=triton_dtype(dy),
        )  # fmt: skip
    return dgate, dup


@_glu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)
    ctx.recompute, ctx.recomputed_output = _recompute, 0


def _recompute(ctx) -> Tensor:
    """The product again, for those who did not keep it (`fxopt/rematerialize.py`)."""
    return _glu(*ctx.saved_tensors, ctx.activation)


def _backward(ctx, dy: Tensor):
    return *_glu_backward(dy, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(_backward, setup_context=_setup_context)


def _result_dtype(gate: Tensor, up: Tensor) -> torch.dtype:
    return torch.promote_types(gate.dtype, up.dtype)


def _activate(gate: Tensor, activation: str) -> Tensor:
    """f(gate), contiguous, rounded to gate's dtype."""
    out = gate.new_empty(gate.shape)
    if activation == "silu":
        return _aten.silu.out(gate, out=out)
    if activation == "relu":
        return torch.clamp(gate, min=0, out=out)
    return _aten.gelu.out(gate, approximate=_approximate(activation), out=out)


def _approximate(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"
