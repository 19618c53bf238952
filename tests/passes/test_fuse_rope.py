"""Rotary embeddings of the real transformers functions: rewritten, as accurate, declined with a reason."""

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llama4 import modeling_llama4
from transformers.models.modernbert_decoder import modeling_modernbert_decoder
from transformers.models.nanochat import modeling_nanochat
from transformers.models.olmo2 import modeling_olmo2

from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import run_optimized, targets
from tests.passes.rewriting import DTYPES, assert_rewritten, leaf, near_misses, proven


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_llama(dtype):
    def rotated(q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)

    torch.manual_seed(0)
    angles = torch.randn(2, 9, 16)
    q, k = leaf(2, 9, 4, 16, dtype=dtype), leaf(2, 9, 2, 16, dtype=dtype)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    graph, _ = run_optimized(EXACT, rotated, q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert targets(graph).count("rope") == 2
    assert_rewritten("rope", rotated, q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def test_rope_declines_a_rotation_of_unequal_parts():
    def rotated(x, cos, sin):
        return x * cos + torch.cat((-x[..., 6:], x[..., :6]), dim=-1) * sin

    inputs = [leaf(2, 4, 9, 16, dtype=torch.bfloat16) for _ in range(3)]
    (miss,) = near_misses(rotated, *inputs)
    assert "not in halves" in miss.reason


def tables(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(*shape)
    return angles.cos().to(dtype), angles.sin().to(dtype)


ROTATIONS = {
    "halves, the other way round": modeling_nanochat.apply_rotary_pos_emb,
    "in float32": modeling_modernbert_decoder.apply_rotary_pos_emb,
    "cast back": modeling_olmo2.apply_rotary_pos_emb,
    "pairs in float32": modeling_cohere.apply_rotary_pos_emb,
    "pairs, repeated tables": modeling_glm.apply_rotary_pos_emb,
    "pairs, cast after the turn": modeling_ernie4_5.apply_rotary_pos_emb,
    "pairs to halves": modeling_deepseek_v3.apply_rotary_pos_emb_interleave,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROTATIONS)
def test_rope_of_every_kind(kind, dtype):
    torch.manual_seed(0)
    q, k = (leaf(2, 9, heads, 16, dtype=dtype).transpose(1, 2) for heads in (4, 2))
    # Tables in float32 where the code calculates in float32, as its models have them.
    wide = kind in ("in float32", "cast back", "pairs, cast after the turn")
    assert_all_rotated(ROTATIONS[kind], q, k, *tables(2, 9, 16, dtype=torch.float32 if wide else dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_gpt_oss(dtype):
    q, k = (leaf(2, heads, 9, 16, dtype=dtype) for heads in (4, 2))
    assert_all_rotated(modeling_gpt_oss.apply_rotary_pos_emb, q, k, *tables(2, 9, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_gptj(dtype):
    def rotated(q, k, cos, sin):
        return modeling_gptj.apply_rotary_pos_emb(q, sin, cos), modeling_gptj.apply_rotary_pos_emb(k, sin, cos)

    q, k = (leaf(2, 9, heads, 16, dtype=dtype) for heads in (4, 2))
    assert_all_rotated(rotated, q, k, *tables(2, 9, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_llama4(dtype):
    q, k = (leaf(2, 9, heads, 16, dtype=dtype) for heads in (4, 2))
    angles = torch.polar(torch.ones(2, 9, 8), torch.randn(2, 9, 8))
    assert_all_rotated(modeling_llama4.apply_rotary_emb, q, k, angles)


def test_a_rotation_that_promotes_its_input_is_one_in_float32():
    def rotated(x, cos, sin):
        return x * cos + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin

    inputs = leaf(2, 4, 9, 16, dtype=torch.bfloat16), *tables(2, 1, 9, 16, dtype=torch.float32)
    graph, result = run_optimized(EXACT, rotated, *inputs)
    assert targets(graph) == ["cast", "rope"] and result.dtype == torch.float32


def in_chunks(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    both = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return x * both[0] + torch.cat((-second, first), dim=-1) * both[1]


def in_slices(x, cos, sin):
    half = x.shape[3] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos + second * sin, first * (-sin) + second * cos], 3)


def in_slices_forward(x, cos, sin):
    first, second = x[..., :8], x[..., 8:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def unbound(x, cos, sin):
    first, second = x.float().reshape((*x.shape[:-1], -1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(3).type_as(x)


def indexed(x, cos, sin):
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(3).type_as(x)


def strided(x, cos, sin):
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def filled_in_halves(x, cos, sin):
    out, half = torch.empty_like(x), x.shape[-1] // 2
    out[..., :half] = x[..., :half] * cos - x[..., half:] * sin
    out[..., half:] = x[..., half:] * cos + x[..., :half] * sin
    return out


def filled_in_turns(x, cos, sin):
    out = x.new_zeros(x.shape)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return out


def every_two(x, cos, sin):
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
    return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "function",
    [
        in_chunks, in_slices, in_slices_forward, unbound, indexed, strided, every_two, filled_in_halves,
        filled_in_turns,
    ],
)  # fmt: skip
def test_rope_written_by_hand(function, dtype):
    torch.manual_seed(0)
    _, ops = proven(function, leaf(2, 9, 4, 16, dtype=dtype), *tables(9, 1, 8, dtype=dtype))
    assert ops == ["rope"]


def assert_all_rotated(function, q, k, *tables: torch.Tensor) -> None:
    """Queries and keys each become one op, which is proven."""
    graph, ops = proven(function, q, k, *tables)
    assert ops == ["rope", "rope"]
    assert not {"mul", "add", "view_as_complex"} & set(targets(graph))
