"""fxopt::add_layer_norm against its reference."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-5


def inputs(*shape: int, dtype: torch.dtype, device: str, mean: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual = ((mean + torch.randn(shape, device=device)).to(dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    bias = (0.1 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    return x, residual, weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 3, 64), (33, 97), (1, 4097)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_op_as_accurate(add_layer_norm, add_layer_norm_reference, *inputs(*shape, dtype=dtype, device=device), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, device: str) -> None:
    x, residual, weight, bias = inputs(6, 6, 96, dtype=dtype, device=device)
    residual = residual.detach().transpose(0, 1).requires_grad_()
    assert_op_as_accurate(add_layer_norm, add_layer_norm_reference, x, residual, weight, bias, EPS)
    x = x.detach().repeat(1, 1, 2)[..., ::2].requires_grad_()
    assert_op_as_accurate(add_layer_norm, add_layer_norm_reference, x, residual, weight, bias, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_weight, with_bias", [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(with_weight: bool, with_bias: bool, dtype: torch.dtype, device: str) -> None:
    x, residual, weight, bias = inputs(40, 64, dtype=dtype, device=device)
    parameters = (weight if with_weight else None, bias if with_bias else None)
    assert_op_as_accurate(add_layer_norm, add_layer_norm_reference, x, residual, *parameters, EPS)


def test_float32_parameters_in_a_bfloat16_model(device: str) -> None:
    x, residual, weight, bias = inputs(40, 64, dtype=torch.bfloat16, device=device)
    weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    assert_op_as_accurate(add_layer_norm, add_layer_norm_reference, x, residual, weight, bias, EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_mean(dtype: torch.dtype, device: str) -> None:
    args = inputs(40, 97, dtype=dtype, device=device, mean=50.0)
    assert_op_as_accurate(add_layer_norm, add_layer_norm_reference, *args, EPS)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used: int, device: str) -> None:
    args = inputs(9, 40, dtype=torch.bfloat16, device=device)

    def used_output(x, residual, weight, bias, function) -> Tensor:  # type: ignore[no-untyped-def]
        # With weight and bias once more, so that they have a gradient in either case.
        return function(x, residual, weight, bias, EPS)[used] * weight + bias

    assert_op_as_accurate(
        lambda *args: used_output(*args, add_layer_norm),
        lambda *args: used_output(*args, add_layer_norm_reference),
        *args,
    )


def test_gradients_in_float64(device: str) -> None:
    args = inputs(3, 2, 9, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda *args: add_layer_norm(*args, EPS), args, fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_no_rows(shape: tuple[int, ...], device: str) -> None:
    args = inputs(*shape, dtype=torch.bfloat16, device=device)
    assert_op_as_accurate(add_layer_norm, add_layer_norm_reference, *args, EPS)


@pytest.mark.parametrize("with_parameters", [True, False])
def test_registration(with_parameters: bool, device: str) -> None:
    x, residual, *parameters = inputs(4, 3, 16, dtype=torch.float32, device=device)
    parameters = parameters if with_parameters else [None, None]
    torch.library.opcheck(torch.ops.fxopt.add_layer_norm, (x, residual, *parameters, EPS))
    x, residual, *parameters = (None if t is None else t.detach() for t in (x, residual, *parameters))
    summed, _, mean, rstd = torch.ops.fxopt.add_layer_norm(x, residual, *parameters, EPS)
    torch.library.opcheck(torch.ops.fxopt.add_layer_norm_backward, (x, residual, summed, mean, rstd, *parameters))


def test_saves_the_sum_the_parameters_and_two_numbers_a_row(device: str) -> None:
    x, residual, weight, bias = inputs(4, 16, dtype=torch.bfloat16, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        summed, _ = add_layer_norm(x, residual, weight, bias, EPS)
    statistics = [t for t in saved if t.data_ptr() not in {summed.data_ptr(), weight.data_ptr(), bias.data_ptr()}]
    assert [(t.dtype, t.numel()) for t in statistics] == [(torch.float32, 4)] * 2
    assert len(saved) == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_parameters", [True, False])
def test_recomputes_its_norm_bit_by_bit(with_parameters: bool, dtype: torch.dtype, device: str) -> None:
    x, residual, *parameters = inputs(33, 97, dtype=dtype, device=device)
    _, normed = add_layer_norm(x, residual, *(parameters if with_parameters else (None, None)), EPS)
    assert normed.output_nr == normed.grad_fn.recomputed_output
    assert torch.equal(normed.grad_fn.recompute(normed.grad_fn), normed)


def test_a_second_derivative_is_an_error(device: str) -> None:
    x, residual, weight, bias = inputs(4, 16, dtype=torch.float32, device=device)
    (dx,) = torch.autograd.grad(add_layer_norm(x, residual, weight, bias, EPS)[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_backward"):
        dx.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="last dimension must not be empty"):
        add_layer_norm(torch.ones(3, 0), torch.ones(3, 0), torch.ones(0), None, EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\); it must be \(5,\)"):
        add_layer_norm(torch.ones(3, 5), torch.ones(3, 5), torch.ones(4), torch.ones(5), EPS)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\); it must be \(5,\)"):
        add_layer_norm(torch.ones(3, 5), torch.ones(3, 5), None, torch.ones(1), EPS)
    with pytest.raises(ValueError, match=r"residual is torch.float32 \(3, 4\); it must be as x"):
        add_layer_norm(torch.ones(3, 5), torch.ones(3, 4), torch.ones(5), None, EPS)
