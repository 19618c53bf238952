"""Attention in which each query sees an interval of the keys.

    out[q] = softmax(scale · query[q] · key[k] for starts[q] ≤ k < ends[q]) · value,   0 where that is empty

Masks of causal models are of this kind: padding on either side, packed sequences, sliding windows, chunks. What no
query sees is not computed. Source: transformers `masking_utils`; block masks as in Dong et al., "Flex Attention",
arXiv:2412.05496.

Shapes: query (B, H, Q, D), key and value (B, G, K, D) with H a multiple of G, mask (B or 1, 1, Q, K) bool
-> (B, H, Q, D), in query's dtype.
Calculates as `scaled_dot_product_attention` does: its kernel runs on each block of queries that see the same keys, or
one key more from each to the next. Gradients of keys that several blocks or several heads see are added in float32.
Bytes saved: query, key, value, the result and one number per row, as without a mask; the mask is shared by all layers.

On the CPU only: on a GPU the rule that calls this op leaves attention with a mask as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.backend import compute_dtype
from fxopt.kernels.op import op

_aten = torch.ops.aten
TILE = 128  # queries of one block where each sees other keys, as in a sliding window
# When blocks are worth their calls, in units of one head's score; measured with `benchmarks/kernels.py`.
COST_OF_A_BLOCK = 60_000
COST_OF_THE_MASK = 0.9  # of all scores: what blocks may cost at most
KEYS_AT_ONCE = 512  # torch's kernel skips what a causal mask hides in steps of so many keys


_always_in_blocks: ContextVar[bool] = ContextVar("_always_in_blocks", default=False)


@contextmanager
def always_in_blocks() -> Iterator[None]:
    """Blocks even where one call with the mask costs less: for tests and proofs, whose tensors are small."""
    token = _always_in_blocks.set(True)
    try:
        yield
    finally:
        _always_in_blocks.reset(token)


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
        """What the kernel computes of each head."""
        num_queries, num_keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        if self.is_causal:
            num_keys = min(num_keys, (num_keys + KEYS_AT_ONCE) // 2)
        return (self.rows.stop - self.rows.start) * num_queries * num_keys


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
    return _visible_intervals(mask)


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
    alike = key.shape == value.shape and query.shape[::3] == key.shape[::3]
    if not alike or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"interval_attention: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do "
            "not fit: key and value must be alike, with query's rows and width, and their heads must divide query's"
        )
    if mask.shape[1:] != (1, query.shape[2], key.shape[2]) or mask.shape[0] not in (1, query.shape[0]):
        raise ValueError(
            f"interval_attention: mask is {tuple(mask.shape)}; it must be "
            f"({query.shape[0]} or 1, 1, {query.shape[2]}, {key.shape[2]})"
        )
    return _interval_attention(query, key, value, mask, intervals, scale)[0]


@op("visible_intervals", device_types="cpu")
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


@op("interval_attention", device_types="cpu")
def _interval_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, intervals: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    query, key, value = _dense_rows(query, key, value)
    out, logsumexp = _empty_results(query)
    for block in _blocks_worth_it(query, mask, intervals):
        rows, queries = block.rows, block.queries
        options = _options(block, mask, query.dtype, scale)
        results = _aten._scaled_dot_product_flash_attention_for_cpu(
            query[rows, :, queries], key[rows, :, block.keys], value[rows, :, block.keys], **options
        )
        out[rows, :, queries], logsumexp[rows, :, queries] = results
    return out, logsumexp


@_interval_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, intervals: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    return _empty_results(query)


@op("interval_attention_backward", device_types="cpu")
def _interval_attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, mask: Tensor,
    intervals: Tensor, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dout, query, key, value = _dense_rows(dout, query, key, value)
    groups = query.shape[1] // key.shape[1]
    dquery = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dkey, dvalue = (torch.zeros(tensor.shape, dtype=compute_dtype(query)) for tensor in (key, value))
    for block in _blocks_worth_it(query, mask, intervals):
        rows, queries, keys = block.rows, block.queries, block.keys
        # Each head with keys and values of its own: torch's kernel would add the gradients of shared ones in bfloat16.
        own_keys, own_values = (tensor[rows, :, keys].repeat_interleave(groups, 1) for tensor in (key, value))
        part_dquery, *parts = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[rows, :, queries], query[rows, :, queries], own_keys, own_values, out[rows, :, queries],
            logsumexp[rows, :, queries], **_options(block, mask, query.dtype, scale),
        )  # fmt: skip
        dquery[rows, :, queries] = part_dquery
        for gradient, part in zip((dkey, dvalue), parts, strict=True):
            gradient[rows, :, keys] += part.unflatten(1, (-1, groups)).sum(2, dtype=gradient.dtype)
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


@_interval_attention_backward.register_fake
def _(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, mask: Tensor,
    intervals: Tensor, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, mask, intervals, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, mask, intervals)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout: Tensor, _: Tensor):
    gradients = _interval_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None)


_interval_attention.register_autograd(_backward, setup_context=_setup_context)


def _dense_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last axis is contiguous, as torch's kernel takes for granted."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each row's sum: zeros, which are right where no key is seen."""
    return query.new_zeros(query.shape), query.new_zeros(query.shape[:3], dtype=compute_dtype(query))


def _options(block: _Block, mask: Tensor, dtype: torch.dtype, scale: float | None) -> dict[str, Any]:
    additive = None
    if block.is_masked:
        hidden = ~mask[block.rows if mask.shape[0] > 1 else slice(None), :, block.queries, block.keys]
        additive = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return {"dropout_p": 0.0, "is_causal": block.is_causal, "attn_mask": additive, "scale": scale}


def _blocks_worth_it(query: Tensor, mask: Tensor, intervals: Tensor) -> tuple[_Block, ...]:
    """The blocks to compute: those that are seen, or one with the whole mask where that costs less."""
    batch_size, num_heads, num_queries, _ = query.shape
    everything = _Block(slice(0, batch_size), slice(0, num_queries), slice(0, mask.shape[-1]), False, True)
    if query.numel() == 0 or bool((intervals < 0).any()):
        return (everything,)
    blocks = _blocks_seen(intervals, batch_size)
    cost = num_heads * sum(block.num_scores for block in blocks) + COST_OF_A_BLOCK * len(blocks)
    is_worth_it = cost <= COST_OF_THE_MASK * num_heads * everything.num_scores
    return blocks if is_worth_it or _always_in_blocks.get() else (everything,)


# By address; holding the tensor keeps its address its own. A model has few masks in a step, and asks in each layer.
_known: dict[tuple[int, int], tuple[Tensor, tuple[_Block, ...]]] = {}


def _blocks_seen(intervals: Tensor, batch_size: int) -> tuple[_Block, ...]:
    key = intervals.data_ptr(), batch_size
    if key not in _known or _known[key][0].shape != intervals.shape:
        while len(_known) >= 8:
            _known.pop(next(iter(_known)), None)
        starts, ends = intervals.tolist()
        _known[key] = intervals.detach(), tuple(_cut(starts, ends, batch_size))
    return _known[key][1]


def _cut(starts: list[list[int]], ends: list[list[int]], batch_size: int) -> Iterator[_Block]:
    first = 0
    for row, alike in groupby(zip(starts, ends, strict=True)):
        rows = slice(first, first + len(list(alike)))
        yield from _blocks_in_rows(rows if len(starts) > 1 else slice(0, batch_size), *row)
        first = rows.stop


def _blocks_in_rows(rows: slice, starts: list[int], ends: list[int]) -> Iterator[_Block]:
    """Runs of queries that see the same keys, or each one key more; tiles where the first key changes too."""
    begin = 0
    while begin < len(starts):
        num_keys, is_causal = ends[begin] - starts[begin], False
        length = _run_length(starts, ends, begin, more_keys=0)
        if num_keys == 1 and length == 1:
            length, is_causal = _run_length(starts, ends, begin, more_keys=1), True
        is_tile = num_keys > 1 and length == 1  # each query sees other keys
        stop = min(begin + (TILE if is_tile else length), len(starts))
        if num_keys:
            keys = slice(min(starts[begin:stop]), max(ends[begin:stop]))
            yield _Block(rows, slice(begin, stop), keys, is_causal, is_tile)
        begin = stop


def _run_length(starts: list[int], ends: list[int], begin: int, more_keys: int) -> int:
    """How many queries from `begin` on see keys from the same one on, each `more_keys` more than the one before."""
    stop = begin + 1
    while stop < len(starts) and starts[stop] == starts[begin] and ends[stop] == ends[stop - 1] + more_keys:
        stop += 1
    return stop - begin
