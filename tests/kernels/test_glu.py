"""fxopt::glu, as swiglu, geglu and reglu, against their references."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import glu
from fxopt.kernels.glu import geglu, swiglu
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNITS = {
    "silu": (glu.swiglu, glu.swiglu_reference),
    "gelu": (glu.geglu, glu.geglu_reference),
    "gelu_tanh": tuple(partial(f, approximate="tanh") for f in (glu.geglu, glu.geglu_reference)),
    "relu": (glu.reglu, glu.reglu_reference),
}


def inputs(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    gate, up = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    return gate, up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", UNITS)
@pytest.mark.parametrize("shape", [(7,), (5, 3, 64), (33, 97), (2, 4097)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], activation: str, dtype: torch.dtype, device: str) -> None:
    assert_op_as_accurate(*UNITS[activation], *inputs(*shape, dtype=dtype, device=device))


def test_strides(device: str) -> None:
    joint = torch.randn(6, 5, 96, device=device).bfloat16()
    for gate, up in (joint.chunk(2, -1), joint[:3].transpose(0, 1).chunk(2, -1), (joint[..., ::2], joint[..., 48:])):
        for unit in UNITS.values():
            assert_op_as_accurate(*unit, gate.detach().requires_grad_(), up.detach().requires_grad_())


@pytest.mark.parametrize("activation", UNITS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], activation: str, device: str) -> None:
    gate, up = (torch.randn(5, 3, 33, device=device).to(dtype).requires_grad_() for dtype in dtypes)
    assert_op_as_accurate(*UNITS[activation], gate, up)
    torch.library.opcheck(torch.ops.fxopt.glu, (gate, up, activation))


@pytest.mark.parametrize("activation", UNITS)
def test_large_values_do_not_overflow(activation: str, device: str) -> None:
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]], device=device).requires_grad_()
    assert_op_as_accurate(*UNITS[activation], gate, torch.ones_like(gate).requires_grad_())


@pytest.mark.parametrize("activation", UNITS)
def test_gradients_in_float64(activation: str, device: str) -> None:
    unit: Any = UNITS[activation][0]
    assert torch.autograd.gradcheck(unit, inputs(3, 2, 9, dtype=torch.float64, device=device), fast_mode=True)


def test_no_rows(device: str) -> None:
    for unit in UNITS.values():
        assert_op_as_accurate(*unit, *inputs(0, 8, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("activation", UNITS)
def test_registration(activation: str, device: str) -> None:
    gate, up = inputs(4, 3, 16, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.fxopt.glu, (gate, up, activation))
    torch.library.opcheck(torch.ops.fxopt.glu, (gate.transpose(0, 1), up.transpose(0, 1), activation))
    torch.library.opcheck(torch.ops.fxopt.glu_backward, (gate.detach(), gate.detach(), up.detach(), activation))


def test_saves_its_inputs_only(device: str) -> None:
    gate, up = inputs(4, 16, dtype=torch.bfloat16, device=device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


def test_a_second_derivative_is_an_error(device: str) -> None:
    gate, up = inputs(4, 16, dtype=torch.float32, device=device)
    (dgate,) = torch.autograd.grad(swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="glu_backward"):
        dgate.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="last dimension must not be empty"):
        swiglu(torch.ones(3, 0), torch.ones(3, 0))
    with pytest.raises(ValueError, match=r"up has shape \(3, 1\); it must be as gate's, \(3, 5\)"):
        swiglu(torch.ones(3, 5), torch.ones(3, 1))
    with pytest.raises(ValueError, match="approximate is 'erf'; it must be 'none' or 'tanh'"):
        geglu(torch.ones(3, 5), torch.ones(3, 5), "erf")
