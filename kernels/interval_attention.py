"""Attention in which each query sees an interval of the keys.

    out[q] = softmax(scale · query[q] · key[k] for starts[q] ≤ k < ends[q]) · value,   0 where that is empty

Masks of causal models are of this kind: padding on either side, packed sequences, sliding windows, chunks. What no
query sees is not computed. Source: transformers `masking_utils`; block masks as in Dong et al., "Flex Attention",
arXiv:2412.05496.

Shapes: query (B, H, Q, D), key and value (B, G, K, D) with H a multiple of G, mask (B or 1, 1, Q, K) bool
-> (B, H, Q, D), in query's dtype.
Calculates as `scaled_dot_product_attention` does: its kernel runs on each block of queries that see the same keys, or
one key more from each to the next. Sums in float32; gradients of keys that several blocks see are added in float32.
Bytes saved: query, key, value, the result and one number per row, as without a mask; the mask is shared by all layers.

On the CPU only: on a GPU the rule that calls this op leaves attention with a mask as it was.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

_aten = torch.ops.aten
TILE = 128  # queries of one block where each sees other keys, as in a sliding window
MOST_SEEN = 0.8  # of all scores; beyond it, one call with the mask is as fast as many without


@dataclass(frozen=True)
class _Block:
    """Queries `queries` of the batch rows `rows`, and all the keys that any of them sees."""

    rows: slice
    queries: slice
    keys: slice
    is_causal: bool  # the first query sees the first key, each next one more
    is_masked: bool  # only part of `keys` is seen

    @property
    def num_scores(self) -> int:
        num_queries, num_keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        scores = num_queries * (num_queries + 1) // 2 if self.is_causal else num_queries * num_keys
        return (self.rows.stop - self.rows.start) * scores


def interval_attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The specification, in plain PyTorch."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (scale * query @ key.mT).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).masked_fill(~mask, 0.0) @ value


def visible_intervals(mask: Tensor) -> Tensor:
    """The first key that each query sees, and the one after the last: equal where it sees none.

    Args:
        mask: (B, 1, Q, K), True where a query sees a key.

    Returns:
        (2, B, Q) int64; -1 everywhere if some query sees keys with a gap between them.
    """
    return torch.ops.fxopt.visible_intervals(mask)


def interval_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, intervals: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of each query to the keys that `mask` lets through, differentiable once in query, key and value.

    Args:
        query: (B, H, Q, D), a floating dtype, on the CPU.
        key, value: (B, G, K, D), with H a multiple of G.
        mask: (B, 1, Q, K) or (1, 1, Q, K), True where a query sees a key.
        intervals: of the mask, `visible_intervals(mask)`. Where they are -1, the mask is used as it is.
        scale: of the scores; 1 / √D if None.

    Returns:
        (B, H, Q, D), in query's dtype; 0 where a query sees no key.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if query.shape[1] % key.shape[1] or key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"interval_attention: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "do not fit: key and value must be alike, and their heads divide query's"
        )
    if mask.shape[1:] != (1, query.shape[2], key.shape[2]) or mask.shape[0] not in (1, query.shape[0]):
        raise ValueError(
            f"interval_attention: mask is {tuple(mask.shape)}; it must be "
            f"({query.shape[0]} or 1, 1, {query.shape[2]}, {key.shape[2]})"
        )
    return torch.ops.fxopt.interval_attention(query, key, value, mask, intervals, scale)[0]


@torch.library.custom_op("fxopt::visible_intervals", mutates_args=(), device_types="cpu")
def _visible_intervals(mask: Tensor) -> Tensor:
    seen = mask[:, 0]
    count = seen.sum(-1)
    starts = seen.to(torch.uint8).argmax(-1) if seen.shape[-1] else count.clone()
    keys = torch.arange(seen.shape[-1])
    inside = (keys >= starts[..., None]) & (keys < (starts + count)[..., None])
    intervals = torch.stack((starts, starts + count))
    return intervals if torch.equal(inside, seen) else intervals.fill_(-1)


@_visible_intervals.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty((2, mask.shape[0], mask.shape[2]), dtype=torch.int64)


@torch.library.custom_op("fxopt::interval_attention", mutates_args=(), device_types="cpu")
def _interval_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, intervals: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    blocks = _blocks_of(query, mask, intervals)
    if blocks is None:
        return _flash(query, key, value, attn_mask=_additive(mask, query.dtype), scale=scale)
    out, logsumexp = torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=_accumulate_dtype(query))
    for block in blocks:
        part_out, part_logsumexp = _flash(
            *_parts(block, query, key, value), **_options(block, mask, query.dtype, scale)
        )
        out[block.rows, :, block.queries], logsumexp[block.rows, :, block.queries] = part_out, part_logsumexp
    return out, logsumexp


@_interval_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, intervals: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_accumulate_dtype(query))


@torch.library.custom_op("fxopt::interval_attention_backward", mutates_args=(), device_types="cpu")
def _interval_attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, mask: Tensor,
    intervals: Tensor, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    blocks = _blocks_of(query, mask, intervals)
    if blocks is None:
        additive = _additive(mask, query.dtype)
        return _flash_backward(dout, query, key, value, out, logsumexp, attn_mask=additive, scale=scale)
    dquery = torch.zeros_like(query)
    dkey, dvalue = (torch.zeros_like(tensor, dtype=_accumulate_dtype(query)) for tensor in (key, value))
    for block in blocks:
        rows, queries, keys = block.rows, block.queries, block.keys
        results = out[rows, :, queries], logsumexp[rows, :, queries]
        parts = (dout[rows, :, queries], *_parts(block, query, key, value), *results)
        part_dquery, part_dkey, part_dvalue = _flash_backward(*parts, **_options(block, mask, query.dtype, scale))
        dquery[rows, :, queries] = part_dquery
        dkey[rows, :, keys] += part_dkey
        dvalue[rows, :, keys] += part_dvalue
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


@_interval_attention_backward.register_fake
def _(dout, query, key, value, out, logsumexp, mask, intervals, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, mask, intervals, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, mask, intervals)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout: Tensor, _: Tensor):
    gradients = torch.ops.fxopt.interval_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None)


_interval_attention.register_autograd(_backward, setup_context=_setup_context)


def _flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **options) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, **options)


def _flash_backward(dout, query, key, value, out, logsumexp, is_causal: bool = False, **options):
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, query, key, value, out, logsumexp, 0.0, is_causal, **options
    )


def _accumulate_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _parts(block: _Block, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = block.rows, slice(None), block.keys
    return query[block.rows, :, block.queries], key[keys], value[keys]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _options(block: _Block, mask: Tensor, dtype: torch.dtype, scale: float | None) -> dict[str, Any]:
    rows = block.rows if mask.shape[0] > 1 else slice(None)
    additive = _additive(mask[rows, :, block.queries, block.keys], dtype) if block.is_masked else None
    return {"is_causal": block.is_causal, "attn_mask": additive, "scale": scale}


def _blocks_of(query: Tensor, mask: Tensor, intervals: Tensor) -> tuple[_Block, ...] | None:
    """The blocks to compute, or None where the mask had better be used as it is."""
    if intervals.numel() == 0 or bool((intervals < 0).any()):
        return None
    blocks = _blocks(intervals.numpy().tobytes(), intervals.shape[1], query.shape[0])
    num_seen, num_scores = sum(block.num_scores for block in blocks), query.shape[0] * mask.shape[2] * mask.shape[3]
    return blocks if num_seen <= MOST_SEEN * num_scores else None


@functools.lru_cache(maxsize=8)  # a model has few masks in a step, and a call in each layer for each
def _blocks(intervals: bytes, num_rows: int, batch_size: int) -> tuple[_Block, ...]:
    starts, ends = np.frombuffer(intervals, dtype=np.int64).reshape(2, num_rows, -1)
    blocks: list[_Block] = []
    first = 0
    for _, alike in groupby(np.concatenate((starts, ends), axis=1).tolist()):
        rows = slice(first, first + len(list(alike)))
        blocks += _blocks_of_row(rows if num_rows > 1 else slice(0, batch_size), starts[first], ends[first])
        first = rows.stop
    return tuple(blocks)


def _blocks_of_row(rows: slice, starts: np.ndarray, ends: np.ndarray) -> Iterator[_Block]:
    """Runs of queries that see the same keys, or each one key more; tiles where the first key changes too."""
    steps = np.stack((np.diff(starts), np.diff(ends)), axis=1)
    begin = 0
    while begin < len(starts):
        length = ends[begin] - starts[begin]
        wanted = (0, 0) if length != 1 else (0, 1)
        matches = _run_length(steps[begin:], wanted)
        if length == 1 and matches == 0:
            wanted, matches = (0, 0), _run_length(steps[begin:], (0, 0))
        stop = begin + 1 + matches
        if matches == 0 and length > 1:  # each query sees other keys
            stop = min(begin + TILE, len(starts))
            low, high = starts[begin:stop].min(), ends[begin:stop].max()
            yield _Block(rows, slice(begin, stop), slice(int(low), int(high)), False, True)
        elif length:
            keys = slice(int(starts[begin]), int(ends[stop - 1]))
            yield _Block(rows, slice(begin, stop), keys, wanted == (0, 1), False)
        begin = stop


def _run_length(steps: np.ndarray, wanted: tuple[int, int]) -> int:
    """How many of the first `steps` are as wanted."""
    other = np.flatnonzero((steps != wanted).any(axis=1))
    return int(other[0]) if len(other) else len(steps)
