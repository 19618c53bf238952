"""Gated linear unit and projection:  y = (silu(gate) * up) @ weightᵀ + bias.

Source: the MLP of transformers `LlamaMLP.forward`; saving less and computing again is Chen et al., "Training Deep Nets with
Sublinear Memory Cost", arXiv:1604.06174.
Shapes: gate (..., D), up (..., D), weight (N, D), bias (N,) -> (..., N), in gate's dtype.
Every step is rounded as eager code rounds it: the product to gate's dtype, the result of the projection once.
Gradient, with h = silu(gate) * up, which is computed again:
    dh = dy @ weight,   dweight = dyᵀ @ h,   dbias = Σ_rows dy,   (dgate, dup) = the gradient of swiglu at dh
Bytes that must move: those of swiglu, twice in the forward's direction, and of the projection. Saved: gate, up and weight;
eager code saves silu(gate) and h, both (..., D), as well.
"""

import torch
from torch import Tensor

import fxopt.kernels.glu  # noqa: F401 — registers fxopt::swiglu and its backward, whose Triton kernels serve here
from fxopt.kernels.glu import swiglu_reference


def swiglu_linear_reference(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification, in plain PyTorch."""
    return torch.nn.functional.linear(swiglu_reference(gate, up), weight, bias)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(silu(gate) * up) @ weightᵀ + bias, differentiable once in all four.

    Args:
        gate: (..., D), any floating dtype and any strides.
        up: as gate, in shape and dtype.
        weight: (N, D), in gate's dtype.
        bias: (N,) or None, in gate's dtype.

    Returns:
        (..., N), contiguous, in gate's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"swiglu_linear: up is {up.dtype} {tuple(up.shape)}; it must be as gate, {gate.dtype} {tuple(gate.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != gate.shape[-1] or weight.dtype != gate.dtype:
        raise ValueError(
            f"swiglu_linear: weight is {weight.dtype} {tuple(weight.shape)}; "
            f"it must be {gate.dtype} (N, {gate.shape[-1]}), as gate's last dimension"
        )
    return torch.ops.fxopt.swiglu_linear(gate, up, weight, bias)


@torch.library.custom_op("fxopt::swiglu_linear", mutates_args=())
def _swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(torch.ops.fxopt.swiglu(gate, up), weight, bias)


@_swiglu_linear.register_fake
def _(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], weight.shape[0])


@torch.library.custom_op("fxopt::swiglu_linear_backward", mutates_args=())
def _swiglu_linear_backward(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, want_input: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, dweight); what is not wanted comes back empty."""
    dgate, dup, dweight = gate.new_empty(0), up.new_empty(0), weight.new_empty(0)
    dy_rows = dy.reshape(-1, weight.shape[0])
    if want_weight:
        h = torch.ops.fxopt.swiglu(gate, up)
        dweight = dy_rows.t() @ h.view(-1, weight.shape[1])
        del h
    if want_input:
        dgate, dup = torch.ops.fxopt.swiglu_backward((dy_rows @ weight).view(gate.shape), gate, up)
    return dgate, dup, dweight


@_swiglu_linear_backward.register_fake
def _(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, want_input: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gate.new_empty(gate.shape if want_input else 0),
        up.new_empty(up.shape if want_input else 0),
        weight.new_empty(weight.shape if want_weight else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, dy: Tensor):
    want_gate, want_up, want_weight, want_bias = ctx.needs_input_grad
    dgate, dup, dweight = torch.ops.fxopt.swiglu_linear_backward(
        dy, *ctx.saved_tensors, want_gate or want_up, want_weight
    )
    return (
        dgate if want_gate else None,
        dup if want_up else None,
        dweight if want_weight else None,
        dy.flatten(0, -2).sum(0) if want_bias else None,
    )


_swiglu_linear.register_autograd(_backward, setup_context=_setup_context)
