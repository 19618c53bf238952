"""Attention with a mask of padding, packed sequences, windows or chunks  →  attention to the keys that are seen.

The attention API takes a mask as a tensor, and computes what it hides. Such a mask lets each query see an interval of
the keys. Which one, is looked up when the step runs, once for all layers; a mask that is none of this kind is used
as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.kernels.interval_attention import always_in_blocks, interval_attention, visible_intervals
from fxopt.passes.share_key_value_heads import ShareKeyValueHeads
from fxopt.rewrite.graph import dtype_of, shape_of, value_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass
from fxopt.rewrite.sample import Example


class SkipMaskedKeys(Rule):
    """sdpa(query, key, value, attn_mask=mask)  →  fxopt::interval_attention

    Source: transformers.integrations.sdpa_attention, with a mask from transformers.masking_utils.
    """

    op = "interval_attention"
    proof_context = staticmethod(always_in_blocks)
    keeps_nan = False  # nor does torch's kernel: a row of few scores, all NaN, becomes 0 without a mask, NaN with one

    @staticmethod
    def pattern(
        query: Any, key: Any, value: Any, mask: Any, dropout: Any, causal: Any, scale: Any, grouped: Any
    ) -> Any:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    @staticmethod
    def check(
        query: fx.Node, key: fx.Node, value: fx.Node, mask: Any, dropout: float, causal: bool, grouped: bool
    ) -> None:
        check_attention(query, key, value, mask, dropout, causal)
        is_broadcast = not grouped and shape_of(query)[1] != shape_of(key)[1]
        wide = dtype_of(query) == torch.float32 or not is_broadcast
        require(wide, "one key head is broadcast to all query heads, and torch calculates that in float32")

    @staticmethod
    def examples() -> dict[str, Example | list[Example]]:
        def packed_and_padded(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
            batch_size, _, num_queries, num_keys = shape
            query, key = torch.arange(num_queries)[:, None], torch.arange(num_keys)
            middle, window = num_keys // 2, max(2, num_keys // 3)
            packed = (query < middle) == (key < middle)
            kinds = packed, key > 0, key < num_keys - 1, query - key < window  # the second hides a row as a whole
            first = int(torch.randint(0, len(kinds), (), generator=generator))  # a batch of one gets one of the kinds
            masks = [(key <= query) & kinds[(first + row) % len(kinds)] for row in range(batch_size)]
            return torch.stack(masks)[:, None].to(dtype)

        def gaps_in_the(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
            return (torch.rand(shape, generator=generator) < 0.5).to(dtype)

        def moderate(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        # Where scores are large, each row sees one key, and the gradients of query and key are rounding alone.
        return {"mask": [packed_and_padded, gaps_in_the], "query": moderate, "key": moderate}

    @staticmethod
    def rewrite(query: Any, key: Any, value: Any, mask: Any, scale: Any) -> Any:
        return interval_attention(query, key, value, mask, visible_intervals(mask), scale)


def check_attention(query: fx.Node, key: fx.Node, value: fx.Node, mask: Any, dropout: float, causal: bool) -> None:
    """What the op needs: a boolean mask for all heads, keys and values alike, no dropout, a CPU."""
    require(isinstance(mask, fx.Node) and not causal, "")  # nothing is missed
    require(value_of(query).device.type == "cpu", "the model is not on a CPU")
    require(dtype_of(mask) == torch.bool, f"the mask is {dtype_of(mask)}: added to the scores, not chosen by")
    require(len(shape_of(query)) == len(shape_of(mask)) == 4, "query or mask is not four-dimensional")
    require(shape_of(mask)[1] == 1, "the heads have masks of their own")
    require(shape_of(mask)[-2:] == (shape_of(query)[-2], shape_of(key)[-2]), "the mask is broadcast")
    require(shape_of(query)[0] == shape_of(key)[0], "queries and keys differ in their number of rows")
    require(shape_of(mask)[0] in (1, shape_of(query)[0]), "queries and mask differ in their number of rows")
    require(dropout == 0.0, "attention drops out at random, so the rewrite cannot be proven")
    require(shape_of(key) == shape_of(value), "keys and values differ in shape")
    require(dtype_of(query) == dtype_of(key) == dtype_of(value), "query, key and value differ in dtype")


class SkipMaskedKeysOfSharedHeads(SkipMaskedKeys):
    """sdpa(query, repeat_kv(key), repeat_kv(value), attn_mask=mask)

    Source: transformers.integrations.sdpa_attention.repeat_kv, which is called where there is a mask.
    """

    pattern = staticmethod(ShareKeyValueHeads.pattern)  # type: ignore[assignment]  # it binds other names
    check = staticmethod(check_attention)  # type: ignore[assignment]


SKIP_MASKED_KEYS = rules_pass(
    "skip_masked_keys",
    SkipMaskedKeysOfSharedHeads,  # before the one that is its last part
    SkipMaskedKeys,
)
