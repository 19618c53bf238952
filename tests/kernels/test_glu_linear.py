"""fxopt::swiglu_linear against its reference."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels.glu_linear import swiglu_linear, swiglu_linear_reference
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(*shape: int, width: int, dtype: torch.dtype, device: str, bias: bool = True) -> tuple[Tensor, ...]:
    shapes = [shape, shape, (width, shape[-1]), *([(width,)] if bias else [])]
    return tuple(torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 64), (33, 97)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, device: str) -> None:
    values = inputs(*shape, width=31, dtype=dtype, device=device, bias=bias)
    assert_op_as_accurate(swiglu_linear, swiglu_linear_reference, *values)


def test_gradients_in_float64(device: str) -> None:
    values = inputs(3, 2, 9, width=5, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(swiglu_linear, values, fast_mode=True)


def test_no_rows(device: str) -> None:
    values = inputs(0, 8, width=4, dtype=torch.bfloat16, device=device)
    assert_op_as_accurate(swiglu_linear, swiglu_linear_reference, *values)


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_gets_no_gradient_and_the_others_the_right_one(frozen: int, device: str) -> None:
    values = list(inputs(6, 5, 32, width=7, dtype=torch.float32, device=device))
    values[frozen] = values[frozen].detach()
    assert_op_as_accurate(swiglu_linear, swiglu_linear_reference, *values)


def test_registration(device: str) -> None:
    values = inputs(4, 3, 16, width=5, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.fxopt.swiglu_linear, values)


def test_does_not_save_the_product(device: str) -> None:
    gate, up, weight = inputs(4, 16, width=5, dtype=torch.bfloat16, device=device, bias=False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu_linear(gate, up, weight)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr(), weight.data_ptr()}


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"it must be torch.float32 \(N, 5\)"):
        swiglu_linear(torch.ones(3, 5), torch.ones(3, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match="it must be as gate"):
        swiglu_linear(torch.ones(3, 5), torch.ones(3, 4), torch.ones(2, 5))
