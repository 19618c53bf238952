"""fxopt::embedding against its reference, and against what a sum of many equal terms must be."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels.embedding import embedding, embedding_reference
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(*shape: int, dtype: torch.dtype, rows: int = 11, width: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randint(0, rows, shape), torch.randn(rows, width).to(dtype).requires_grad_()


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (4, 50), (2, 0), (3, 5, 700)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], dtype: torch.dtype, padding_idx: int | None) -> None:
    torch.manual_seed(0)
    assert_op_as_accurate(embedding, embedding_reference, *inputs(*shape, dtype=dtype), padding_idx)


@pytest.mark.parametrize("number", [255, 257, 10_000])
def test_many_equal_gradients_do_not_stall(number: int) -> None:
    """torch 2.13's own gradient stops at 256: bfloat16 has no 257."""
    ids, (_, weight) = torch.full((number,), 2), inputs(dtype=torch.bfloat16)
    embedding(ids, weight).sum().backward()
    assert weight.grad is not None and float(weight.grad[2, 0]) == float(torch.tensor(float(number)).bfloat16())
    assert weight.grad.count_nonzero() == weight.shape[1]


def test_rows_of_one_and_two_tokens_are_exact() -> None:
    ids, (_, weight) = torch.tensor([[4, 5, 4], [9, 0, 7]], dtype=torch.int32), inputs(dtype=torch.bfloat16)
    gradient = torch.randn(2, 3, 16).bfloat16()
    embedding(ids, weight).backward(gradient)
    assert weight.grad is not None
    assert torch.equal(weight.grad[5], gradient[0, 1])
    assert torch.equal(weight.grad[4], (gradient[0, 0].float() + gradient[0, 2].float()).bfloat16())


def test_gradients_that_do_not_lie_densely() -> None:
    ids, (_, weight) = torch.zeros(3, 8, dtype=torch.long), inputs(dtype=torch.bfloat16)
    embedding(ids, weight).backward(torch.ones((), dtype=torch.bfloat16).expand(3, 8, 16))
    assert weight.grad is not None and bool((weight.grad[0] == 24).all())


def test_gradients_in_float64() -> None:
    ids, weight = inputs(4, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda weight: embedding(ids, weight), (weight,), fast_mode=True)


def test_registration() -> None:
    ids, weight = inputs(4, 9, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fxopt.embedding, (ids, weight, -1))
    torch.library.opcheck(torch.ops.fxopt.embedding_backward, (torch.randn(4, 9, 16).bfloat16(), ids, 11, 5))


def test_a_number_outside() -> None:
    _, weight = inputs(dtype=torch.bfloat16)
    with pytest.raises(IndexError, match="out of range"):
        embedding(torch.tensor([11]), weight)
