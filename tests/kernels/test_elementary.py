"""The functions that kernels are made of, against float64: how far off they are, in units of float32's rounding."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels import elementary
from fxopt.kernels.backend import TRITON_DEVICES, cdiv, tl, triton
from fxopt.kernels.launch import launch
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(
    not (TRITON_DEVICES and (INTERPRETED or torch.cuda.is_available())), reason="needs a GPU or Triton's interpreter"
)
INF, NAN = float("inf"), float("nan")
REFERENCES = {
    "exp": torch.exp,
    "log": torch.log,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "tanh_slope": lambda x: x.cosh() ** -2,
}


@triton.jit
def _map_kernel(x_ptr, y_ptr, numel, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0)
    tl.store(y_ptr + offsets, FUNCTION(x), mask=offsets < numel)


def computed(name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    launch(_map_kernel, (cdiv(x.numel(), 8192),), x, y, x.numel(), FUNCTION=getattr(elementary, name), BLOCK=8192)
    return y


def roundings(name: str, x: Tensor) -> float:
    """The largest error, where the result is a normal number, in half units of its last place."""
    found, exact = computed(name, x).double(), REFERENCES[name](x.double())
    normal = exact.abs() >= torch.finfo(x.dtype).tiny
    return float(((found - exact) / exact)[normal].abs().max() * 2**24)


@pytest.mark.parametrize(
    ("name", "low", "high", "bound"),
    [
        ("exp", -1.0, 1.0, 2.0),
        ("exp", -87.3, 88.7, 2.0),
        ("log", 0.3, 3.0, 2.0),
        ("log", 1.0, 3e5, 2.0),
        ("sigmoid", -87.0, 30.0, 4.0),
        ("tanh", -0.99, 0.99, 3.0),
        ("tanh", 1.0, 30.0, 2.0),
        ("tanh_slope", -40.0, 40.0, 6.0),
    ],
)
def test_float32_is_off_by_roundings(name: str, low: float, high: float, bound: float, device: str) -> None:
    assert roundings(name, torch.linspace(low, high, 1_000_003, device=device)) <= bound


def test_special_values(device: str) -> None:
    x = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.0, 1e30, -1e30, 88.73, -104.5], device=device)
    for name in ("exp", "sigmoid", "tanh", "tanh_slope"):
        torch.testing.assert_close(computed(name, x), REFERENCES[name](x), rtol=1e-6, atol=0, equal_nan=True)
    x = torch.tensor([0.0, INF, NAN, -1.0, 1e-40, 1.0, 3e38], device=device)
    torch.testing.assert_close(computed("log", x), x.log(), rtol=1e-6, atol=0, equal_nan=True)
    assert computed("log", torch.ones(1, device=device)) == 0


def test_denormal_results_of_exp(device: str) -> None:
    x = torch.linspace(-103.9, -87.4, 1000, device=device)
    torch.testing.assert_close(computed("exp", x), x.double().exp().float(), rtol=1e-6, atol=2e-45)


@pytest.mark.parametrize("name", REFERENCES)
def test_float64_is_float64(name: str, device: str) -> None:
    x = torch.linspace(0.01, 20, 1000, dtype=torch.float64, device=device)
    torch.testing.assert_close(computed(name, x), REFERENCES[name](x), rtol=1e-14 if "tanh" in name else 1e-15, atol=0)
