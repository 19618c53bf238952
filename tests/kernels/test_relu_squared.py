"""fxopt::relu_squared against its reference."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.relu_squared import relu_squared, relu_squared_reference
from fxopt.rematerialize import rematerializing
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 3, 64), (33, 97), (2, 4097)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_op_as_accurate(relu_squared, relu_squared_reference, inputs(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, device: str) -> None:
    joint = torch.randn(6, 5, 96, device=device).to(dtype)
    for x in (
        joint[..., :48],
        joint.transpose(0, 1),
        joint.transpose(1, 2),
        joint[..., ::2],
        joint[:, :1].expand_as(joint),
    ):
        assert_op_as_accurate(relu_squared, relu_squared_reference, x.detach().requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_eager_code_is_exact_so_is_the_op(dtype: torch.dtype, device: str) -> None:
    """Zeros of both signs, infinities and NaN, on both sides of zero, and their gradients."""
    special = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-30, -1e-30, 200.0]
    x = torch.tensor([special], device=device).to(dtype).requires_grad_()
    dy = torch.full_like(x, 0.5)
    y, expected = relu_squared(x), relu_squared_reference(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    gradients = [torch.autograd.grad(result, x, dy)[0] for result in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)


def test_gradients_in_float64(device: str) -> None:
    assert torch.autograd.gradcheck(relu_squared, inputs(3, 2, 9, dtype=torch.float64, device=device), fast_mode=True)


def test_no_rows(device: str) -> None:
    assert_op_as_accurate(relu_squared, relu_squared_reference, inputs(0, 8, dtype=torch.bfloat16, device=device))


def test_registration(device: str) -> None:
    x = inputs(4, 3, 16, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.fxopt.relu_squared, (x,))
    torch.library.opcheck(torch.ops.fxopt.relu_squared, (x.transpose(0, 1),))
    torch.library.opcheck(torch.ops.fxopt.relu_squared_backward, (x.detach(), x.detach()))


def test_saves_its_input_only(device: str) -> None:
    x = inputs(4, 16, dtype=torch.bfloat16, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        relu_squared(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_its_result_is_not_kept_for_a_layer_but_computed_again(device: str) -> None:
    x, weight = (inputs(*shape, dtype=torch.bfloat16, device=device) for shape in ((4, 16), (3, 16)))
    kept = torch.autograd.grad(F.linear(relu_squared(x), weight).sum(), [x, weight])
    with rematerializing():
        y = relu_squared(x)
        result = F.linear(y, weight)
    freed = weakref.ref(y)
    del y
    assert freed() is None
    again = torch.autograd.grad(result.sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_a_second_derivative_is_an_error(device: str) -> None:
    x = inputs(4, 16, dtype=torch.float32, device=device)
    (dx,) = torch.autograd.grad(relu_squared(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="relu_squared_backward"):
        dx.sum().backward()


def test_errors() -> None:
    for x in (torch.ones(3, 0), torch.ones(())):
        with pytest.raises(ValueError, match="last dimension must not be empty"):
            relu_squared(x)
