"""Attention over repeated key and value heads: rewritten, as accurate, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import run_optimized, targets
from tests.passes.rewriting import DTYPES, assert_rewritten, leaf, near_misses
from tests.tiny_models import tiny_batch, tiny_llama


def repeated_attention(q, k, v, causal=True, dropout=0.0, mask=None):
    def repeat(x):
        batch, heads, length, width = x.shape
        return x[:, :, None, :, :].expand(batch, heads, 2, length, width).reshape(batch, heads * 2, length, width)

    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, dropout_p=dropout, is_causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_key_value_heads_are_shared(dtype, causal):
    def function(q, k, v):
        return repeated_attention(q, k, v, causal)

    torch.manual_seed(0)
    q, k, v = (leaf(2, heads, 9, 16, dtype=dtype) for heads in (4, 2, 2))
    graph, _ = run_optimized(EXACT, function, q, k, v)
    assert "expand" not in targets(graph)
    assert_rewritten("scaled_dot_product_attention", function, q, k, v)


def test_key_value_heads_stay_repeated_where_attention_drops_out():
    def function(q, k, v):
        return repeated_attention(q, k, v, dropout=0.1)

    misses = near_misses(function, *(leaf(2, heads, 9, 16, dtype=torch.bfloat16) for heads in (4, 2, 2)))
    assert any("drops out" in miss.reason for miss in misses)


def test_key_value_heads_stay_repeated_under_a_mask():
    def function(q, k, v, mask):
        return repeated_attention(q, k, v, causal=False, mask=mask)

    tensors = (leaf(2, heads, 9, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    misses = near_misses(function, *tensors, torch.rand(2, 4, 9, 9) < 0.5)
    assert any("there is a mask" in miss.reason for miss in misses)


def test_heads_are_shared_under_checkpointing():
    """There code asks each value for its sizes, and the repeated keys seemed to be used by that."""
    model = fxopt.optimize(tiny_llama(), "bf16")
    model.train()
    model.gradient_checkpointing_enable()
    model(**tiny_batch()).loss.backward()
    assert fxopt.report(model).hits["grouped_query_attention"] == model.config.num_hidden_layers
