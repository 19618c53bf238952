"""fxopt::rope against its reference and against the functions of transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.olmo2 import modeling_olmo2 as olmo2

from fxopt.kernels.rope import LAYOUTS, rope, rope_reference
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_width = pytest.mark.parametrize("narrow", [False, True], ids=["D", "D/2"])


def inputs(
    B: int, H: int, S: int, D: int, *, dtype: torch.dtype, device: str, narrow: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x as attention has it, transposed; cos and sin whose two entries for a pair differ, or narrow ones."""
    x = torch.randn(B, S, H, D, device=device).to(dtype).transpose(1, 2).requires_grad_()
    width = D // 2 if narrow else D
    cos, sin = (torch.randn(B, 1, S, width, device=device).to(dtype) for _ in range(2))
    return x, cos, sin


@each_layout
@each_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 64), (1, 9, 33, 80), (3, 1, 17, 6)], ids=str)
def test_as_accurate_as_eager(
    shape: tuple[int, int, int, int], dtype: torch.dtype, narrow: bool, layout: str, device: str
) -> None:
    x, cos, sin = inputs(*shape, dtype=dtype, device=device, narrow=narrow)
    assert_op_as_accurate(rope, rope_reference, x, cos, sin, layout=layout)


@each_layout
@each_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [(1, 1, 7, 16), (2, 1, 7, 16), (7, 16), (1, 16), (2, 3, 7, 16), (16,)], ids=str)
def test_gradients_of_cos_and_sin(
    tables: tuple[int, ...], dtype: torch.dtype, narrow: bool, layout: str, device: str
) -> None:
    x, _, _ = inputs(2, 3, 7, 16, dtype=dtype, device=device)
    shape = (*tables[:-1], tables[-1] // 2) if narrow else tables
    cos, sin = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    assert_op_as_accurate(rope, rope_reference, x, cos, sin, layout=layout)
    assert_op_as_accurate(rope, rope_reference, x, cos.detach(), sin, layout=layout)


@each_layout
@each_width
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, narrow: bool, layout: str, device: str) -> None:
    x, cos, sin = inputs(2, 6, 5, 32, dtype=dtype, device=device, narrow=narrow)
    wide = torch.randn(2, 5, 6, 64, device=device).to(dtype)
    views = (
        x.contiguous(),
        wide[..., :32].transpose(1, 2),
        wide[..., 1:33].transpose(1, 2),  # starts at an odd element
        wide[..., ::2].transpose(1, 2),
        x[:, :1].expand(2, 6, 5, 32),
        x.transpose(2, 3).contiguous().transpose(2, 3),  # dense, but its last dimension is not innermost
    )
    for view in views:
        assert_op_as_accurate(rope, rope_reference, view.detach().requires_grad_(), cos, sin, layout=layout)
    tables = torch.stack([cos, sin], -1)
    assert_op_as_accurate(rope, rope_reference, x, tables[..., 0], tables[..., 1], layout=layout)


@each_layout
def test_keeps_the_strides_of_x(layout: str, device: str) -> None:
    x, cos, sin = inputs(2, 3, 5, 16, dtype=torch.bfloat16, device=device)
    innermost_positions = x.detach().transpose(2, 3).contiguous().transpose(2, 3)
    for view in (x, x.contiguous(), innermost_positions):
        for table_dtype in (torch.bfloat16, torch.float32):
            for width in (16, 8):
                tables = (table[..., :width].to(table_dtype) for table in (cos, sin))
                assert rope(view, *tables, layout).stride() == view.stride()


@each_layout
@each_width
@pytest.mark.parametrize("heads_first", [True, False], ids=["(B,H,S,D)", "(B,S,H,D)"])
def test_float32_tables_in_a_bfloat16_model(heads_first: bool, narrow: bool, layout: str, device: str) -> None:
    x, cos, sin = inputs(2, 3, 40, 16, dtype=torch.bfloat16, device=device, narrow=narrow)
    cos, sin = cos.float().requires_grad_(), sin.float().requires_grad_()
    if not heads_first:
        x, cos, sin = (t.detach().transpose(1, 2).requires_grad_() for t in (x, cos, sin))
    assert_op_as_accurate(rope, rope_reference, x, cos, sin, layout=layout)
    assert_op_as_accurate(rope, rope_reference, x, cos[:1].detach(), sin.detach(), layout=layout)


@each_layout
@each_width
def test_rounds_once(narrow: bool, layout: str, device: str) -> None:
    x, cos, sin = inputs(2, 3, 40, 16, dtype=torch.bfloat16, device=device, narrow=narrow)
    cos, sin = torch.randn_like(cos, dtype=torch.float32), torch.randn_like(sin, dtype=torch.float32)
    x, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y, truth = rope(x, cos, sin, layout), rope_reference(wide, cos.double(), sin.double(), layout)
    dy = torch.randn_like(y)
    pairs = (y, truth), (*torch.autograd.grad(y, x, dy), *torch.autograd.grad(truth, wide, dy.double()))
    for actual, exact in pairs:
        # Half a unit in the last place, and float32's own error.
        assert ((actual - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_mixed(dtype: torch.dtype, other: torch.dtype, device: str) -> None:
    for layout in LAYOUTS:
        x, cos, sin = inputs(2, 3, 5, 8, dtype=dtype, device=device)
        cos, sin = cos.to(other).requires_grad_(), sin.to(other).requires_grad_()
        assert_op_as_accurate(rope, rope_reference, x, cos, sin, layout=layout)
        assert_op_as_accurate(rope, rope_reference, x, cos, sin.detach().float(), layout=layout)


@each_layout
@each_width
@pytest.mark.parametrize("block_bytes", [1, 3 * 4 * 3 * 8, 7 * 4 * 3 * 8, 2 * 5 * 4 * 3 * 8])
def test_blocks(block_bytes: int, narrow: bool, layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one position, of some, of a batch with some left over, and of two batches of three."""
    monkeypatch.setattr("fxopt.kernels.rope.BLOCK_BYTES", block_bytes)
    x, cos, sin = inputs(3, 3, 5, 8, dtype=torch.bfloat16, device=device, narrow=narrow)
    for view in (x, x.detach().contiguous().requires_grad_()):
        assert_op_as_accurate(rope, rope_reference, view, cos.float(), sin.float(), layout=layout)


def test_an_infinite_element_reaches_its_pair_only(device: str) -> None:
    for layout in LAYOUTS:
        for width in (8, 4):
            x, cos, sin = inputs(1, 2, 3, 8, dtype=torch.float32, device=device)
            x = x.detach().index_fill(-1, torch.tensor([2], device=device), float("inf"))
            tables = cos[..., :width], sin[..., :width]
            expected = rope_reference(x, *tables, layout)
            torch.testing.assert_close(rope(x, *tables, layout), expected)
            assert expected.isinf().sum() == 2 * 2 * 3


# transformers ---------------------------------------------------------------------------------------------------------


def twice(table: Tensor) -> Tensor:
    return torch.cat((table, table), -1)


def each_twice(table: Tensor) -> Tensor:
    return table.repeat_interleave(2, -1)


Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]
# name -> the function of transformers, our op, and the dtype of the tables in a bfloat16 model. x is (B, H, S, D) or,
# as GPT-J and Llama 4 have it, (B, S, H, D); cos and sin are (B, S, D/2).
TRANSFORMERS: dict[str, tuple[Rotation, Rotation, torch.dtype]] = {
    "llama": (
        lambda x, cos, sin: llama.apply_rotary_pos_emb(x, x, twice(cos), twice(sin))[0],
        lambda x, cos, sin: rope(x, twice(cos)[:, None], twice(sin)[:, None]),
        torch.bfloat16,
    ),
    "olmo2": (
        lambda x, cos, sin: olmo2.apply_rotary_pos_emb(x, x, twice(cos), twice(sin))[0],
        lambda x, cos, sin: rope(x, twice(cos)[:, None], twice(sin)[:, None]),
        torch.float32,
    ),
    "gpt_oss": (
        lambda x, cos, sin: gpt_oss.apply_rotary_pos_emb(x, x, cos, sin)[0],
        lambda x, cos, sin: rope(x, cos[:, None], sin[:, None]),
        torch.bfloat16,
    ),
    "gptj": (
        lambda x, cos, sin: gptj.apply_rotary_pos_emb(x, sin, cos),
        lambda x, cos, sin: rope(x, cos[:, :, None], sin[:, :, None], "pairs"),
        torch.bfloat16,
    ),
    "cohere": (
        lambda x, cos, sin: cohere.apply_rotary_pos_emb(x, x, each_twice(cos), each_twice(sin))[0],
        lambda x, cos, sin: rope(x, each_twice(cos)[:, None], each_twice(sin)[:, None], "pairs"),
        torch.bfloat16,
    ),
    "deepseek_v2": (
        lambda x, cos, sin: deepseek_v2.apply_rotary_emb(x, x, torch.complex(cos, sin))[0],
        lambda x, cos, sin: rope(x, cos[:, None], sin[:, None], "pairs"),
        torch.float32,
    ),
    "llama4": (
        lambda x, cos, sin: llama4.apply_rotary_emb(x, x, torch.complex(cos, sin))[0],
        lambda x, cos, sin: rope(x, cos[:, :, None], sin[:, :, None], "pairs"),
        torch.float32,
    ),
    "deepseek_v3": (
        lambda x, cos, sin: deepseek_v3.apply_rotary_pos_emb_interleave(x, x, twice(cos), twice(sin))[0],
        lambda x, cos, sin: rope(x, twice(cos)[:, None], twice(sin)[:, None], "pairs_to_halves"),
        torch.bfloat16,
    ),
    "deepseek_v3, sliced": (
        lambda x, cos, sin: deepseek_v3.apply_rotary_pos_emb_interleave(x, x, twice(cos), twice(sin))[0],
        lambda x, cos, sin: rope(x, cos[:, None], sin[:, None], "pairs_to_halves"),
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_as_accurate_as_transformers(name: str, device: str) -> None:
    """In bfloat16 only: some of the functions calculate in float32 even where the truth is asked for."""
    theirs, ours, table_dtype = TRANSFORMERS[name]
    x, cos, _ = inputs(2, 5, 5, 16, dtype=torch.bfloat16, device=device, narrow=True)  # as many heads as positions
    angles = torch.rand_like(cos[:, 0], dtype=torch.float32) * 6.3
    cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
    assert_op_as_accurate(ours, theirs, x, cos, sin)


# The op --------------------------------------------------------------------------------------------------------------


@each_layout
@each_width
def test_gradients_in_float64(narrow: bool, layout: str, device: str) -> None:
    x, cos, sin = inputs(2, 3, 2, 6, dtype=torch.float64, device=device, narrow=narrow)
    tensors = (x, cos.requires_grad_(), sin.requires_grad_())
    assert torch.autograd.gradcheck(lambda *tensors: rope(*tensors, layout), tensors, fast_mode=True)


@each_layout
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 3, 0, 8)], ids=str)
def test_no_rows(shape: tuple[int, int, int, int], layout: str, device: str) -> None:
    for narrow in (False, True):
        x, cos, sin = inputs(*shape, dtype=torch.bfloat16, device=device, narrow=narrow)
        assert_op_as_accurate(rope, rope_reference, x, cos, sin, layout=layout)
        assert_op_as_accurate(rope, rope_reference, x, cos.float(), sin.float(), layout=layout)


@each_layout
@each_width
def test_registration(narrow: bool, layout: str, device: str) -> None:
    x, cos, sin = inputs(2, 3, 5, 8, dtype=torch.float32, device=device, narrow=narrow)
    torch.library.opcheck(torch.ops.fxopt.rope, (x, cos, sin, layout))
    torch.library.opcheck(torch.ops.fxopt.rope, (x, cos.clone().requires_grad_(), sin, layout))
    torch.library.opcheck(torch.ops.fxopt.rope_backward, (x.detach(), cos, sin, layout))


@each_layout
def test_saves_the_tables_only(layout: str, device: str) -> None:
    x, cos, sin = inputs(2, 3, 5, 8, dtype=torch.bfloat16, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(x, cos, sin, layout)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


def test_a_second_derivative_is_an_error(device: str) -> None:
    x, cos, sin = inputs(2, 3, 5, 8, dtype=torch.float32, device=device)
    dy = torch.ones_like(x).requires_grad_()
    (dx,) = torch.autograd.grad(rope(x, cos, sin), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="rope_backward"):
        dx.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_axes(layout: str, device: str) -> None:
    x, cos, sin = inputs(1, 2, 3, 8, dtype=torch.bfloat16, device=device)
    expected = rope(x, cos, sin, layout)
    assert torch.equal(rope(x[0], cos[0], sin[0], layout), expected[0])
    assert torch.equal(rope(x[0, 1], cos[0, 0], sin[0, 0], layout), expected[0, 1])
    (gradient,) = torch.autograd.grad(rope(x[0], cos[0], sin[0], layout).sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), x)[0])


def test_errors() -> None:
    x, table = torch.ones(2, 3, 5, 8), torch.ones(1, 1, 5, 8)
    with pytest.raises(ValueError, match=r"must be \(B, H, S, D\), or less, with an even D"):
        rope(torch.ones(2, 3, 5, 7), table, table)
    with pytest.raises(ValueError, match=r"sin has shape .* it must broadcast to x"):
        rope(x, table, torch.ones(1, 1, 4, 8))
    with pytest.raises(ValueError, match=r"cos has shape .* x's last dimension or half of it"):
        rope(x, table[..., :2], table)
    with pytest.raises(ValueError, match=r"cos has shape \(\)"):
        rope(x, torch.tensor(1.0), table)
    with pytest.raises(ValueError, match="cos has last dimension 8 and sin 4; they must be equal"):
        rope(x, table, table[..., :4])
    with pytest.raises(
        ValueError, match="layout is 'quarters'; it must be one of 'halves', 'pairs', 'pairs_to_halves'"
    ):
        rope(x, table, table, "quarters")
