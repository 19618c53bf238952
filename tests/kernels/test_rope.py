"""fxopt::rope against its reference."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels.rope import rope, rope_reference
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(B: int, H: int, S: int, D: int, *, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x as attention has it, transposed; cos and sin with halves that differ."""
    x = torch.randn(B, S, H, D, device=device).to(dtype).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(B, 1, S, D, device=device).to(dtype) for _ in range(2))
    return x, cos, sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 64), (1, 9, 33, 80), (3, 1, 17, 6)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    assert_op_as_accurate(rope, rope_reference, *inputs(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [(1, 1, 7, 16), (2, 1, 7, 16), (7, 16), (1, 16), (2, 3, 7, 16)], ids=str)
def test_gradients_of_cos_and_sin(tables: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, _, _ = inputs(2, 3, 7, 16, dtype=dtype, device=device)
    cos, sin = (torch.randn(tables, device=device).to(dtype).requires_grad_() for _ in range(2))
    assert_op_as_accurate(rope, rope_reference, x, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, device: str) -> None:
    x, cos, sin = inputs(2, 6, 5, 32, dtype=dtype, device=device)
    wide = torch.randn(2, 5, 6, 64, device=device).to(dtype)
    views = (
        x.contiguous(),
        wide[..., :32].transpose(1, 2),
        wide[..., ::2].transpose(1, 2),
        x[:, :1].expand(2, 6, 5, 32),
    )
    for view in views:
        assert_op_as_accurate(rope, rope_reference, view.detach().requires_grad_(), cos, sin)
    tables = torch.stack([cos, sin], -1)
    assert_op_as_accurate(rope, rope_reference, x, tables[..., 0], tables[..., 1])


def test_keeps_the_strides_of_x(device: str) -> None:
    x, cos, sin = inputs(2, 3, 5, 16, dtype=torch.bfloat16, device=device)
    assert rope(x, cos, sin).stride() == x.stride()


def test_float32_tables_in_a_bfloat16_model(device: str) -> None:
    x, cos, sin = inputs(2, 3, 40, 16, dtype=torch.bfloat16, device=device)
    assert_op_as_accurate(rope, rope_reference, x, cos.float(), sin.float())


def test_gradients_in_float64(device: str) -> None:
    x, cos, sin = inputs(2, 3, 2, 6, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(rope, (x, cos.requires_grad_(), sin.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 3, 0, 8)], ids=str)
def test_no_rows(shape: tuple[int, int, int, int], device: str) -> None:
    assert_op_as_accurate(rope, rope_reference, *inputs(*shape, dtype=torch.bfloat16, device=device))


def test_registration(device: str) -> None:
    x, cos, sin = inputs(2, 3, 5, 8, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.fxopt.rope, (x, cos, sin))
    torch.library.opcheck(torch.ops.fxopt.rope, (x, cos.clone().requires_grad_(), sin))
    torch.library.opcheck(torch.ops.fxopt.rope_backward, (x.detach(), cos, sin))


def test_saves_the_tables_only(device: str) -> None:
    x, cos, sin = inputs(2, 3, 5, 8, dtype=torch.bfloat16, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(x, cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


def test_a_second_derivative_is_an_error(device: str) -> None:
    x, cos, sin = inputs(2, 3, 5, 8, dtype=torch.float32, device=device)
    dy = torch.ones_like(x).requires_grad_()
    (dx,) = torch.autograd.grad(rope(x, cos, sin), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="rope_backward"):
        dx.sum().backward()


def test_errors() -> None:
    table = torch.ones(1, 1, 5, 8)
    with pytest.raises(ValueError, match=r"must be \(B, H, S, D\) with an even D"):
        rope(torch.ones(2, 3, 5, 7), table, table)
    with pytest.raises(ValueError, match=r"sin has shape .* it must broadcast to x"):
        rope(torch.ones(2, 3, 5, 8), table, torch.ones(1, 1, 4, 8))
