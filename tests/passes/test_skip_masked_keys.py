"""Attention under masks of padding, packed sequences and windows: rewritten, as accurate, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import captured, targets
from tests.passes.rewriting import DTYPES, assert_proven, assert_rewritten, leaf, near_misses
from tests.tiny_models import tiny_batch, tiny_model
from tests.training import assert_trains_alike


def tensors(dtype: torch.dtype = torch.bfloat16, value_width: int = 16, key_heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    widths = (16, 16, value_width)
    return [leaf(3, h, 19, w, dtype=dtype) for h, w in zip((4, key_heads, key_heads), widths, strict=True)]


def padded(q, k, v, lengths, dropout=0.0):
    query, key = torch.arange(19)[:, None], torch.arange(19)
    mask = (key <= query) & (key < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=True)


LENGTHS = torch.tensor([19, 4, 11])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_skipped(dtype):
    assert_rewritten("interval_attention", padded, *tensors(dtype), LENGTHS)
    assert_proven("interval_attention", padded, *tensors(dtype), LENGTHS)


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(1, 1, 4), (8, 4, 8), (8, 8, 16), (4, 2, 64)])
def test_one_short_row_in_float32_is_proven(heads, key_heads, width):
    """The errors of so few numbers are draws; by the first one alone, three of these would be refused."""
    query, key, value = (leaf(1, h, 15, width, dtype=torch.float32) for h in (heads, key_heads, key_heads))
    mask = (torch.arange(15) <= torch.arange(15)[:, None])[None, None]
    assert_proven(
        "interval_attention",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=key_heads < heads),
        query, key, value, mask,
    )  # fmt: skip


def test_all_layers_share_the_lookup():
    def two_layers(q, k, v, lengths):
        return padded(padded(q, k, v, lengths), k, v, lengths)

    module = captured(two_layers, *tensors(), LENGTHS)
    EXACT.run(module, None)
    found = targets(module)
    assert (found.count("interval_attention"), found.count("visible_intervals")) == (2, 1)


def test_it_declines_and_says_why():
    def reasons(function, *inputs):
        return " ".join(miss.reason for miss in near_misses(function, *inputs))

    assert "drops out" in reasons(lambda *a: padded(*a, dropout=0.1), *tensors(), LENGTHS)
    assert "differ in shape" in reasons(padded, *tensors(value_width=8), LENGTHS)
    added = torch.zeros(3, 1, 19, 19).bfloat16()
    assert "added to the scores" in reasons(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *tensors(key_heads=4), added
    )
    of_heads = torch.rand(3, 4, 19, 19) < 0.5
    assert "masks of their own" in reasons(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *tensors(key_heads=4), of_heads
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padded_batches(kind, side):
    model, batch = fxopt.optimize(tiny_model(kind), "bf16"), tiny_batch(padding=6)
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    assert batch["attention_mask"].min() == 0
    assert_trains_alike(model, batch)
    assert fxopt.report(model).hits["interval_attention"] == model.config.num_hidden_layers


def test_packed_batches():
    model, batch = fxopt.optimize(tiny_model("llama"), "bf16"), tiny_batch()
    del batch["attention_mask"]
    batch["position_ids"] = torch.cat((torch.arange(6), torch.arange(11))).expand(3, 17)
    assert_trains_alike(model, batch)
    assert fxopt.report(model).hits["interval_attention"] == model.config.num_hidden_layers


def test_nothing_is_missed_where_there_is_no_padding():
    model = fxopt.optimize(tiny_model("llama"), "bf16")
    model(**tiny_batch()).loss.backward()
    report = fxopt.report(model)
    assert report.hits["causal_attention"] == model.config.num_hidden_layers
    assert not [miss for miss in report.near_misses if "ttention" in miss.rule or "Masked" in miss.rule]


def test_keys_with_fewer_rows_than_queries_are_left_alone():
    """One memory for all rows: `scaled_dot_product_attention` broadcasts it, torch's kernel would read past its end."""

    def shared_memory(q, k, v, lengths):
        return padded(q, k[:1], v[:1], lengths)

    misses = near_misses(shared_memory, *tensors(key_heads=4), LENGTHS)
    assert any("number of rows" in miss.reason for miss in misses)


def test_one_row_in_float32_is_proven():
    """Few numbers, whose errors are luck: see fxopt/rewrite/prove.py."""
    model, batch = fxopt.optimize(tiny_model("mistral"), "fp32"), tiny_batch(num_rows=1, padding=6)
    model(**batch).loss.backward()
    report = fxopt.report(model)
    assert not report.refused
    assert {"linear_cross_entropy", "interval_attention"} <= report.hits.keys()
