"""fxopt::clamped_swiglu against its reference."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.clamped_swiglu import clamped_swiglu, clamped_swiglu_reference
from fxopt.rematerialize import rematerializing
from tests.accuracy import assert_op_as_accurate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ALPHA, LIMIT = 1.702, 7.0  # as in gpt-oss
OP, REFERENCE = (partial(f, alpha=ALPHA, limit=LIMIT) for f in (clamped_swiglu, clamped_swiglu_reference))


def inputs(*shape: int, dtype: torch.dtype, device: str, size: float = 1.0) -> tuple[Tensor, Tensor]:
    gate, up = ((torch.randn(shape, device=device) * size).to(dtype).requires_grad_() for _ in range(2))
    return gate, up


@pytest.mark.parametrize("size", [1.0, 7.0], ids=["few clamped", "many clamped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 3, 64), (33, 97), (2, 4097)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, ...], dtype: torch.dtype, size: float, device: str) -> None:
    assert_op_as_accurate(OP, REFERENCE, *inputs(*shape, dtype=dtype, device=device, size=size))


@pytest.mark.parametrize(("alpha", "limit"), [(1.0, 2.5), (1.702, 0.0), (-0.5, 1.0), (0.0, 100.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype: torch.dtype, alpha: float, limit: float, device: str) -> None:
    op, reference = (partial(f, alpha=alpha, limit=limit) for f in (clamped_swiglu, clamped_swiglu_reference))
    assert_op_as_accurate(op, reference, *inputs(33, 97, dtype=dtype, device=device, size=2.0))


def test_strides(device: str) -> None:
    joint = torch.randn(6, 5, 96, device=device).bfloat16() * 4
    for gate, up in (
        (joint[..., ::2], joint[..., 1::2]),
        joint.chunk(2, -1),
        joint[:3].transpose(0, 1).chunk(2, -1),
        (joint[:, 1:, ::2], joint[:, 1:, 48:]),
        (joint.transpose(1, 2), joint.transpose(1, 2).contiguous()),
        (joint[..., :1].expand_as(joint), joint),
    ):
        assert_op_as_accurate(OP, REFERENCE, gate.detach().requires_grad_(), up.detach().requires_grad_())


def test_gradients_reach_both_halves_of_a_joint_projection(device: str) -> None:
    joint = (torch.randn(33, 194, device=device) * 4).bfloat16().requires_grad_()
    assert_op_as_accurate(*(lambda x, f=f: f(x[..., ::2], x[..., 1::2]) for f in (OP, REFERENCE)), joint)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    gate, up = ((torch.randn(5, 3, 33, device=device) * 4).to(dtype).requires_grad_() for dtype in dtypes)
    assert_op_as_accurate(OP, REFERENCE, gate, up)
    torch.library.opcheck(torch.ops.fxopt.clamped_swiglu, (gate, up, ALPHA, LIMIT))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bounds_lie_inside(dtype: torch.dtype, device: str) -> None:
    """Next to a bound, on the outside, the gradient is zero, and at it as in eager code: element by element."""
    bound = torch.tensor(LIMIT, dtype=dtype)
    outside, inside = (torch.nextafter(bound, torch.tensor(to, dtype=dtype)) for to in (float("inf"), 0.0))
    values = torch.stack([sign * value for sign in (1, -1) for value in (inside, bound, outside, 0 * bound)])
    gate, up = (grid.to(device).requires_grad_() for grid in torch.meshgrid(values, values, indexing="ij"))
    gradients = [torch.autograd.grad(f(gate, up).sum(), [gate, up]) for f in (OP, REFERENCE)]
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual == 0, expected == 0)
    assert_op_as_accurate(OP, REFERENCE, gate, up)


def test_large_values_do_not_overflow(device: str) -> None:
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]], device=device).requires_grad_()
    assert_op_as_accurate(OP, REFERENCE, gate, gate.detach().flip(-1).requires_grad_())


def test_nan_stays_nan(device: str) -> None:
    number, nan = (torch.full((1, 3), value, device=device) for value in (1.0, float("nan")))
    assert OP(nan, number).isnan().all() and OP(number, nan).isnan().all()


def test_gradients_in_float64(device: str) -> None:
    gate, up = inputs(3, 2, 9, dtype=torch.float64, device=device, size=7.0)
    assert torch.autograd.gradcheck(OP, (gate, up), fast_mode=True)


def test_no_rows(device: str) -> None:
    assert_op_as_accurate(OP, REFERENCE, *inputs(0, 8, dtype=torch.bfloat16, device=device))


def test_registration(device: str) -> None:
    gate, up = inputs(4, 3, 16, dtype=torch.float32, device=device)
    op = torch.ops.fxopt.clamped_swiglu
    torch.library.opcheck(op, (gate, up, ALPHA, LIMIT))
    torch.library.opcheck(op, (gate[..., ::2], up[..., 1::2], ALPHA, LIMIT))
    torch.library.opcheck(
        torch.ops.fxopt.clamped_swiglu_backward, (gate.detach(), gate.detach(), up.detach(), ALPHA, LIMIT)
    )


def test_saves_its_inputs_only_where_they_lie(device: str) -> None:
    joint = torch.randn(4, 32, device=device).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OP(joint[..., ::2], joint[..., 1::2])
    assert [t.data_ptr() - joint.data_ptr() for t in saved] == [0, joint.element_size()]
    assert all(t.stride() == (32, 2) for t in saved)


def test_its_result_is_not_kept_for_a_layer_but_computed_again(device: str) -> None:
    gate, up = inputs(4, 16, dtype=torch.bfloat16, device=device)
    weight = torch.randn(3, 16, device=device).bfloat16().requires_grad_()
    kept = torch.autograd.grad(F.linear(OP(gate, up), weight).sum(), [gate, up, weight])
    with rematerializing():
        y = OP(gate, up)
        result = F.linear(y, weight)
    freed = weakref.ref(y)
    del y
    assert freed() is None
    again = torch.autograd.grad(result.sum(), [gate, up, weight])
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_a_second_derivative_is_an_error(device: str) -> None:
    gate, up = inputs(4, 16, dtype=torch.float32, device=device)
    (dgate,) = torch.autograd.grad(OP(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="clamped_swiglu_backward"):
        dgate.sum().backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="last dimension must not be empty"):
        OP(torch.ones(3, 0), torch.ones(3, 0))
    with pytest.raises(ValueError, match=r"up has shape \(3, 1\); it must be as gate's, \(3, 5\)"):
        OP(torch.ones(3, 5), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"limit is -1\.0; it must not be negative"):
        clamped_swiglu(torch.ones(3, 5), torch.ones(3, 5), 1.0, -1.0)
