"""fxopt::add_rms_norm against its reference."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


def inputs(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    return x, residual, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 3, 64), (33, 97), (1, 4097)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_op_as_accurate(add_rms_norm, add_rms_norm_reference, *inputs(*shape, dtype=dtype, device=device), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, device: str) -> None:
    x, residual, weight = inputs(6, 6, 96, dtype=dtype, device=device)
    residual = residual.detach().transpose(0, 1).requires_grad_()
    assert_op_as_accurate(add_rms_norm, add_rms_norm_reference, x, residual, weight, EPS)
    x = x.detach().repeat(1, 1, 2)[..., ::2].requires_grad_()
    assert_op_as_accurate(add_rms_norm, add_rms_norm_reference, x, residual, weight, EPS)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used: int, device: str) -> None:
    args = inputs(9, 40, dtype=torch.bfloat16, device=device)

    def used_output(x: Tensor, residual: Tensor, weight: Tensor, function) -> Tensor:  # type: ignore[no-untyped-def]
        # Multiplied by the weight, so that the weight has a gradient in either case.
        return function(x, residual, weight, EPS)[used] * weight

    assert_op_as_accurate(
        lambda *args: used_output(*args, add_rms_norm), lambda *args: used_output(*args, add_rms_norm_reference), *args
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weight(dtype: torch.dtype, device: str) -> None:
    x, residual, _ = inputs(40, 65, dtype=dtype, device=device)
    assert_op_as_accurate(add_rms_norm, add_rms_norm_reference, x, residual, None, EPS)
    torch.library.opcheck(torch.ops.fxopt.add_rms_norm, (x, residual, None, EPS))


def test_gradients_in_float64(device: str) -> None:
    args = inputs(3, 2, 9, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda *args: add_rms_norm(*args, EPS), args, fast_mode=True)


def test_no_rows(device: str) -> None:
    args = inputs(0, 8, dtype=torch.bfloat16, device=device)
    assert_op_as_accurate(add_rms_norm, add_rms_norm_reference, *args, EPS)


def test_registration(device: str) -> None:
    x, residual, weight = inputs(4, 3, 16, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.fxopt.add_rms_norm, (x, residual, weight, EPS))
    x, residual, weight = x.detach(), residual.detach(), weight.detach()
    torch.library.opcheck(torch.ops.fxopt.add_rms_norm_backward, (x, residual, x, weight, EPS))


def test_saves_the_sum_and_the_weight_only(device: str) -> None:
    x, residual, weight = inputs(4, 16, dtype=torch.bfloat16, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        summed, _ = add_rms_norm(x, residual, weight, EPS)
    assert {t.data_ptr() for t in saved} == {summed.data_ptr(), weight.data_ptr()}


def test_a_second_derivative_is_an_error(device: str) -> None:
    x, residual, weight = inputs(4, 16, dtype=torch.float32, device=device)
    (dx,) = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS)[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_backward"):
        dx.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="last dimension must not be empty"):
        add_rms_norm(torch.ones(3, 0), torch.ones(3, 0), torch.ones(0), EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\); it must be \(5,\)"):
        add_rms_norm(torch.ones(3, 5), torch.ones(3, 5), torch.ones(4), EPS)
    with pytest.raises(ValueError, match=r"residual is torch.float32 \(3, 4\); it must be as x"):
        add_rms_norm(torch.ones(3, 5), torch.ones(3, 4), torch.ones(5), EPS)
