"""fxopt::layer_norm against its reference."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels.layer_norm import layer_norm, layer_norm_reference
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-5


def inputs(*shape: int, dtype: torch.dtype, device: str, mean: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    x = (mean + torch.randn(shape, device=device)).to(dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    bias = (0.1 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    return x, weight, bias


def leaf(view: Tensor) -> Tensor:
    return view.detach().requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 3, 64), (33, 97), (2, 600, 130), (1, 4097)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_op_as_accurate(layer_norm, layer_norm_reference, *inputs(*shape, dtype=dtype, device=device), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(6, 5, 96, dtype=dtype, device=device)
    for view in (x.transpose(0, 1), x[:, ::2], x[..., ::2], x[..., 32:], x[:1].expand(6, 5, 96)):
        D = view.shape[-1]
        assert_op_as_accurate(layer_norm, layer_norm_reference, leaf(view), leaf(weight[:D]), leaf(bias[:D]), EPS)
    weight, bias = leaf(weight.repeat(2)[::2]), leaf(bias.repeat(2)[::2])
    assert_op_as_accurate(layer_norm, layer_norm_reference, x, weight, bias, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_weight, with_bias", [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(with_weight: bool, with_bias: bool, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(40, 64, dtype=dtype, device=device)
    assert_op_as_accurate(
        layer_norm, layer_norm_reference, x, weight if with_weight else None, bias if with_bias else None, EPS
    )


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "x_dtype, weight_dtype, bias_dtype",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
    ],
    ids=str,
)
def test_dtypes_of_their_own(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype, with_bias: bool, device: str
) -> None:
    x, weight, bias = inputs(40, 64, dtype=torch.float32, device=device)
    x, weight, bias = leaf(x.to(x_dtype)), leaf(weight.to(weight_dtype)), leaf(bias.to(bias_dtype))
    assert_op_as_accurate(layer_norm, layer_norm_reference, x, weight, bias if with_bias else None, EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_parameters", [True, False])
def test_large_mean(with_parameters: bool, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(40, 97, dtype=dtype, device=device, mean=100.0)
    parameters = (weight, bias) if with_parameters else (None, None)
    assert_op_as_accurate(layer_norm, layer_norm_reference, x, *parameters, EPS)


def test_large_mean_in_float32(device: str) -> None:
    """float32 holds a mean of 100 to 4e-6; E[x²] - E[x]² would be wrong by 1e-3."""
    x, weight, bias = inputs(40, 97, dtype=torch.float32, device=device, mean=100.0)
    grads = torch.autograd.grad(layer_norm(x, weight, bias, EPS).square().sum(), (x, weight, bias))
    wide = [leaf(t.double()) for t in (x, weight, bias)]
    expected = torch.autograd.grad(layer_norm_reference(*wide, EPS).square().sum(), wide)
    y = layer_norm_reference(*wide, EPS)
    torch.testing.assert_close(layer_norm(x, weight, bias, EPS).double(), y, rtol=1e-5, atol=2e-5)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-4)


def test_many_rows_of_bfloat16(device: str) -> None:
    """Sums over rows are float32: torch's own kernel, on the CPU, sums them in bfloat16 and is 5 % wrong."""
    x, weight, bias = inputs(4096, 24, dtype=torch.bfloat16, device=device)
    assert_op_as_accurate(layer_norm, layer_norm_reference, x, weight, bias, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_column(dtype: torch.dtype, device: str) -> None:
    """x less its mean is zero: the result is the bias, and x and weight have no gradient."""
    x, weight, bias = inputs(9, 1, dtype=dtype, device=device)
    y = layer_norm(x, weight, bias, EPS)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    torch.testing.assert_close(y, bias.expand(9, 1).contiguous(), rtol=0, atol=1e-4)
    torch.testing.assert_close(dx, torch.zeros_like(x), rtol=0, atol=1e-3)
    torch.testing.assert_close(dweight, torch.zeros_like(weight), rtol=0, atol=1e-3)
    torch.testing.assert_close(dbias, torch.full_like(bias, 9))


def test_gradients_in_float64(device: str) -> None:
    x, weight, bias = inputs(3, 2, 9, dtype=torch.float64, device=device)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias
    torch.testing.assert_close(layer_norm(x, weight, bias, EPS), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer_norm_reference(x, weight, bias, EPS), expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *args: layer_norm(*args, EPS), (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, None, None, EPS), (x,), fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_rows(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(*shape, dtype=dtype, device=device)
    assert_op_as_accurate(layer_norm, layer_norm_reference, x, weight, bias, EPS)
    assert_op_as_accurate(layer_norm, layer_norm_reference, x, None, None, EPS)


@pytest.mark.parametrize("with_weight, with_bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_registration(with_weight: bool, with_bias: bool, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(4, 3, 16, dtype=dtype, device=device)
    parameters = (weight if with_weight else None, bias if with_bias else None)
    torch.library.opcheck(torch.ops.fxopt.layer_norm, (x, *parameters, EPS))
    x, *parameters = (None if t is None else t.detach() for t in (x, *parameters))
    _, mean, rstd = torch.ops.fxopt.layer_norm(x, *parameters, EPS)
    torch.library.opcheck(torch.ops.fxopt.layer_norm_backward, (x, x, mean, rstd, *parameters))


def test_saves_its_inputs_and_two_numbers_a_row(device: str) -> None:
    x, weight, bias = inputs(4, 16, dtype=torch.bfloat16, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias, EPS)
    statistics = [t for t in saved if t.data_ptr() not in {x.data_ptr(), weight.data_ptr(), bias.data_ptr()}]
    assert [(t.dtype, t.numel()) for t in statistics] == [(torch.float32, 4)] * 2
    assert len(saved) == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_parameters", [True, False])
def test_recomputes_its_result_bit_by_bit(with_parameters: bool, dtype: torch.dtype, device: str) -> None:
    x, *parameters = inputs(33, 97, dtype=dtype, device=device)
    y = layer_norm(x, *(parameters if with_parameters else (None, None)), EPS)
    assert y.output_nr == y.grad_fn.recomputed_output
    assert torch.equal(y.grad_fn.recompute(y.grad_fn), y)


def test_a_second_derivative_is_an_error(device: str) -> None:
    x, weight, bias = inputs(4, 16, dtype=torch.float32, device=device)
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias, EPS).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_backward"):
        dx.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="last dimension must not be empty"):
        layer_norm(torch.ones(3, 0), torch.ones(0), None, EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\); it must be \(5,\)"):
        layer_norm(torch.ones(3, 5), torch.ones(4), torch.ones(5), EPS)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\); it must be \(5,\)"):
        layer_norm(torch.ones(3, 5), None, torch.ones(1), EPS)
