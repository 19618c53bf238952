"""fxopt::rms_norm against its reference."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels.backend import compute_dtype
from fxopt.kernels.rms_norm import deviation_norm, l2_norm, rms_norm, rms_norm_reference
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


def inputs(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    return x, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 3, 64), (33, 97), (2, 600, 130), (1, 4097)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_op_as_accurate(rms_norm, rms_norm_reference, *inputs(*shape, dtype=dtype, device=device), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, device: str) -> None:
    x, weight = inputs(6, 5, 96, dtype=dtype, device=device)
    for view in (x.transpose(0, 1), x[:, ::2], x[..., ::2], x[..., 32:], x[:1].expand(6, 5, 96)):
        leaf = view.detach().requires_grad_()
        assert_op_as_accurate(
            rms_norm, rms_norm_reference, leaf, weight[: view.shape[-1]].detach().requires_grad_(), EPS
        )
    assert_op_as_accurate(rms_norm, rms_norm_reference, x, weight.detach().repeat(2)[::2].requires_grad_(), EPS)


def test_float32_weight_in_a_bfloat16_model(device: str) -> None:
    x, weight = inputs(40, 64, dtype=torch.bfloat16, device=device)
    weight = weight.detach().float().requires_grad_()
    assert_op_as_accurate(rms_norm, rms_norm_reference, x, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weight(dtype: torch.dtype, device: str) -> None:
    x, _ = inputs(40, 65, dtype=dtype, device=device)
    assert_op_as_accurate(rms_norm, rms_norm_reference, x, None, EPS)
    torch.library.opcheck(torch.ops.fxopt.rms_norm, (x, None, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_norm(dtype: torch.dtype, device: str) -> None:
    def reference(x: Tensor, eps: float) -> Tensor:
        h = x.to(compute_dtype(x))
        return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)).to(x.dtype)

    x, _ = inputs(40, 65, dtype=dtype, device=device)
    assert_op_as_accurate(l2_norm, reference, x, 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 3, 64), (33, 97)], ids=str)
def test_epsilon_outside_the_root(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight = inputs(*shape, dtype=dtype, device=device)
    assert_op_as_accurate(rms_norm, rms_norm_reference, x, weight, 0.1, True)
    assert_op_as_accurate(rms_norm, rms_norm_reference, x, None, 0.1, True)


def test_a_row_of_zeros_with_epsilon_outside_the_root(device: str) -> None:
    """As `torch.norm`: of the root itself there is no gradient, and the row's is that of x / eps."""
    x, weight = inputs(3, 8, dtype=torch.float32, device=device)
    x = x.detach().index_fill(0, torch.tensor([1], device=device), 0.0).requires_grad_()
    rms_norm(x, weight, 0.5, True).sum().backward()
    assert x.grad is not None and torch.equal(x.grad[1], weight.detach() / 0.5) and x.grad.isfinite().all()


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deviation_norm(dtype: torch.dtype, has_weight: bool, device: str) -> None:
    def reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        h = x.to(compute_dtype(x))
        h = h - h.mean(-1, keepdim=True)
        h = (h / (h.std(-1, keepdim=True) + eps)).to(x.dtype)
        return h if weight is None else (weight * h).to(x.dtype)

    x, weight = inputs(40, 65, dtype=dtype, device=device)
    assert_op_as_accurate(deviation_norm, reference, x, weight if has_weight else None, 1e-2)


def test_deviation_of_a_row_of_one_number(device: str) -> None:
    """Whose mean is that number but for a rounding, which is not to be taken for a deviation."""
    x = torch.full((4, 64), 3.3, device=device).requires_grad_()
    y = deviation_norm(x, None, 1e-6)
    y.backward(torch.linspace(-1.0, 1.0, 64, device=device).expand(4, 64))
    exact = torch.linspace(-1.0, 1.0, 64, device=device) / 1e-6
    assert x.grad is not None and y.abs().max() < 1e-6
    torch.testing.assert_close(x.grad, exact.expand(4, 64), rtol=1e-4, atol=1.0)


def test_gradients_in_float64(device: str) -> None:
    x, weight = inputs(3, 2, 9, dtype=torch.float64, device=device)
    torch.testing.assert_close(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.3, True), (x, weight), fast_mode=True)


def test_no_rows(device: str) -> None:
    x, weight = inputs(0, 8, dtype=torch.bfloat16, device=device)
    assert_op_as_accurate(rms_norm, rms_norm_reference, x, weight, EPS)


def test_registration(device: str) -> None:
    x, weight = inputs(4, 3, 16, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.fxopt.rms_norm, (x, weight, EPS))
    torch.library.opcheck(torch.ops.fxopt.rms_norm, (x, weight, EPS, True))
    torch.library.opcheck(torch.ops.fxopt.rms_norm_backward, (x.detach(), x.detach(), weight.detach(), EPS))


def test_saves_its_inputs_only(device: str) -> None:
    x, weight = inputs(4, 16, dtype=torch.bfloat16, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


def test_a_second_derivative_is_an_error(device: str) -> None:
    x, weight = inputs(4, 16, dtype=torch.float32, device=device)
    (dx,) = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_backward"):
        dx.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="last dimension must not be empty"):
        rms_norm(torch.ones(3, 0), torch.ones(0), EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\); it must be \(5,\)"):
        rms_norm(torch.ones(3, 5), torch.ones(4), EPS)
