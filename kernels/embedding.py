"""Embedding:  y[t] = weight[ids[t]], with a gradient that is summed in float32.

Source: `torch.nn.functional.embedding`. On a CPU its gradient in a two-byte dtype is summed in that dtype, a token
after the other: bfloat16 stalls at 256 equal gradients, and a frequent token's row comes out several percent wrong.
Shapes: ids (...), weight (V, D) -> (..., D), in weight's dtype.
Gradient:  dweight[v] = Σ_{t: ids[t] = v} dy[t], in float32 (float64 for float64) where a row has more than two terms,
and rounded once; two terms round once in any dtype.
Bytes that must move: forward reads and writes the rows of the tokens; backward reads dy and writes dweight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.backend import compute_dtype
from fxopt.kernels.op import op

TOKENS_AT_ONCE = 4096  # whose gradients are held in float32


def embedding_reference(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """The specification, in plain PyTorch."""
    return F.embedding(ids, weight, padding_idx)


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """The rows of weight that ids name, differentiable once in weight.

    Args:
        ids: (...), int64 or int32, in [0, V).
        weight: (V, D), any floating dtype.
        padding_idx: the row that gets no gradient, counted from the end if negative; None: all get one.

    Returns:
        (..., D), in weight's dtype.

    Raises:
        IndexError: ids has a number outside [0, V).
    """
    return _embedding(ids, weight, -1 if padding_idx is None else padding_idx % weight.shape[0])


@op("embedding")
def _embedding(ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    # Not F.embedding: its result is a view of rows, and what an op returns as a view may not be written to.
    y = weight.new_empty(*ids.shape, weight.shape[-1])
    torch.index_select(weight, 0, ids.reshape(-1), out=y.view(ids.numel(), weight.shape[-1]))
    return y


@_embedding.register_fake
def _(ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[-1])


@op("embedding_backward")
def _embedding_backward(dy: Tensor, ids: Tensor, num_rows: int, padding_idx: int) -> Tensor:
    dweight = torch.ops.aten.embedding_dense_backward(dy, ids, num_rows, padding_idx, False)
    tokens = ids.flatten()
    order = tokens.argsort(stable=True)
    rows, counts = tokens[order].unique_consecutive(return_counts=True)
    is_long = (counts > 2) & (rows != padding_idx)
    order = order[is_long.repeat_interleave(counts)]
    rows, counts = rows[is_long], counts[is_long]
    if rows.numel():
        places = torch.arange(rows.numel(), device=ids.device).repeat_interleave(counts)
        sums = dy.new_zeros(rows.numel(), dy.shape[-1], dtype=compute_dtype(dy))
        dy_rows = dy.reshape(-1, dy.shape[-1])
        for some, where in zip(order.split(TOKENS_AT_ONCE), places.split(TOKENS_AT_ONCE), strict=True):
            sums.index_add_(0, where, dy_rows[some].to(sums.dtype))
        dweight[rows] = sums.to(dweight.dtype)
    return dweight


@_embedding_backward.register_fake
def _(dy: Tensor, ids: Tensor, num_rows: int, padding_idx: int) -> Tensor:
    return dy.new_empty(num_rows, dy.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    ids, weight, ctx.padding_idx = inputs
    ctx.num_rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, dy: Tensor):
    (ids,) = ctx.saved_tensors
    return None, _embedding_backward(dy, ids, ctx.num_rows, ctx.padding_idx), None


_embedding.register_autograd(_backward, setup_context=_setup_context)
