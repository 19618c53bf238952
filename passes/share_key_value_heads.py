"""Attention over repeated key and value heads  →  grouped-query attention, which does not repeat them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx

from fxopt.rewrite.graph import dtype_of, shape_of, tensor_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class ShareKeyValueHeads(Rule):
    """sdpa(query, repeat_kv(key), repeat_kv(value))

    Source: transformers.integrations.sdpa_attention.repeat_kv, which eager code calls only where there is a mask.
    """

    op = "grouped_query_attention"

    @staticmethod
    def pattern(
        query: Any, key: Any, value: Any, batch: Any, kv_heads: Any, groups: Any, length: Any, width: Any, heads: Any,
        value_width: Any, mask: Any, dropout: Any, causal: Any, scale: Any,
    ) -> Any:  # fmt: skip
        key = key[:, :, None, :, :].expand((batch, kv_heads, groups, length, width))
        value = value[:, :, None, :, :].expand((batch, kv_heads, groups, length, value_width))
        return F.scaled_dot_product_attention(
            query,
            key.reshape((batch, heads, length, width)),
            value.reshape((batch, heads, length, value_width)),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
        )

    @staticmethod
    def check(query: fx.Node, key: fx.Node, value: fx.Node, mask: Any, dropout: float) -> None:
        require(mask is None, "there is a mask: shared heads are slow with one on a GPU, and less accurate on a CPU")
        tensor = tensor_of(query)
        fused = tensor is None or tensor.device.type == "cpu" or tensor.dtype.itemsize == 2
        require(fused, f"a GPU's fused attention takes shared heads in two-byte dtypes alone, not in {dtype_of(query)}")
        require(dropout == 0.0, "attention drops out at random, so the rewrite cannot be proven")
        require(shape_of(key)[-1] == shape_of(value)[-1], "keys and values have different widths")
        require(shape_of(query)[1] % shape_of(key)[1] == 0, "the key heads do not divide the query heads")

    @staticmethod
    def rewrite(query: Any, key: Any, value: Any, causal: Any, scale: Any) -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=True)


SHARE_KEY_VALUE_HEADS = rules_pass("share_key_value_heads", ShareKeyValueHeads)
