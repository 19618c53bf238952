"""A second bound for two-byte dtypes, which does not depend on how good the original is: two roundings.

The accuracy rule compares with eager code, and torch's own is bad in places: on a CPU, sums of two-byte numbers are
kept in two bytes. Here each result is compared with what its terms allow: an element that is one product, with itself;
one that is a sum, as GELU's x/2 + x/2 * erf(x/√2) is, with the sum of its terms' magnitudes. Results in float32, which
is what is calculated in, round as often as their formula has steps; for them the rule alone holds.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.clamped_swiglu import AT_BOUNDS, clamped_swiglu
from fxopt.kernels.embedding import embedding
from fxopt.kernels.glu import geglu, reglu, swiglu
from fxopt.kernels.layer_norm import layer_norm
from fxopt.kernels.relu_squared import relu_squared
from fxopt.kernels.rms_norm import rms_norm
from fxopt.kernels.rope import rope

ROWS, WIDTH, EPS = 700, 48, 1e-5  # so many rows that a sum over them in two bytes stalls
DTYPES = [torch.bfloat16, torch.float16]
Results = dict[str, Tensor]


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def of_rms_norm(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Results, Results]:
    """Results and gradients in float64, and the sums of their terms' magnitudes."""
    return _normed(dy, x, weight, torch.rsqrt(mean(x * x) + EPS), 1.0)


def of_outer_epsilon(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Results, Results]:
    root = mean(x * x).sqrt()
    return _normed(dy, x, weight, 1 / (root + 0.1), 1 + 0.1 / root)


def _normed(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, radial: Tensor | float) -> tuple[Results, Results]:
    x_hat, g = x * r, dy * weight
    results = {
        "y": x_hat * weight,
        "x": r * (g - radial * x_hat * mean(g * x_hat)),
        "weight": (dy * x_hat).sum(0),
    }
    terms = {
        "y": results["y"].abs(),
        "x": r * (g.abs() + radial * x_hat.abs() * mean((g * x_hat).abs())),
        "weight": (dy * x_hat).abs().sum(0),
    }
    return results, terms


def of_layer_norm(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Results, Results]:
    r = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)
    x_hat, g, terms_of_x_hat = (x - mean(x)) * r, dy * weight, (x.abs() + mean(x).abs()) * r
    results = {
        "y": x_hat * weight + bias,
        "x": r * (g - mean(g) - x_hat * mean(g * x_hat)),
        "weight": (dy * x_hat).sum(0),
        "bias": dy.sum(0),
    }
    terms = {
        "y": terms_of_x_hat * weight.abs() + bias.abs(),
        "x": r * (g.abs() + mean(g.abs()) + terms_of_x_hat * mean((g * terms_of_x_hat).abs())),
        "weight": (dy * terms_of_x_hat).abs().sum(0),
        "bias": dy.abs().sum(0),
    }
    return results, terms


Unit = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # value and slope, each with its terms' magnitudes


def of_glu(unit: Callable[[Tensor], Unit]) -> Any:
    def results_and_terms(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Results, Results]:
        (value, of_value), (slope, of_slope) = unit(gate)
        results = {"y": value * up, "gate": dy * up * slope, "up": dy * value}
        terms = {"y": of_value * up.abs(), "gate": (dy * up).abs() * of_slope, "up": dy.abs() * of_value}
        return results, terms

    return results_and_terms


def silu(g: Tensor, alpha: float = 1.0) -> Unit:
    s, rest = torch.sigmoid(alpha * g), torch.sigmoid(-alpha * g)
    return (g * s, g.abs() * s), (s * (1 + alpha * g * rest), s * (1 + alpha * g.abs() * rest))


def gelu(g: Tensor) -> Unit:
    erf, slope = torch.erf(g / 2**0.5), g * torch.exp(-g * g / 2) / (2 * torch.pi) ** 0.5
    share, of_share = torch.erfc(-g / 2**0.5) / 2, (1 + erf.abs()) / 2
    return (g * share, g.abs() * of_share), (share + slope, of_share + slope.abs())


def relu(g: Tensor) -> Unit:
    step = (g > 0).double()
    return (F.relu(g), F.relu(g)), (step, step)


def of_clamped_swiglu(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Results, Results]:
    g, u = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    (unit, _), (slope, of_slope) = silu(g, 1.702)
    of_gate, of_up = gate < 7.0, up.abs() < 7.0
    if AT_BOUNDS:  # as PyTorch's clamp has them, which differs from release to release
        of_gate, of_up = gate <= 7.0, up.abs() <= 7.0
    results = {"y": (u + 1) * unit, "gate": dy * (u + 1) * slope * of_gate, "up": dy * unit * of_up}
    terms = {
        "y": (u.abs() + 1) * unit.abs(),
        "gate": dy.abs() * (u.abs() + 1) * of_slope * of_gate,
        "up": results["up"].abs(),
    }
    return results, terms


def of_rope(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Results, Results]:
    def turned(x: Tensor, sign: float) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-sign * second, sign * first), -1)

    results = {"y": x * cos + turned(x, 1.0) * sin, "x": dy * cos + turned(dy * sin, -1.0)}
    terms = {
        "y": (x * cos).abs() + (turned(x, 1.0) * sin).abs(),
        "x": (dy * cos).abs() + turned(dy * sin, -1.0).abs(),
    }
    return results, terms


def of_relu_squared(dy: Tensor, x: Tensor) -> tuple[Results, Results]:
    results = {"y": F.relu(x) ** 2, "x": 2 * dy * F.relu(x)}
    return results, {name: value.abs() for name, value in results.items()}


def of_embedding(dy: Tensor, weight: Tensor) -> tuple[Results, Results]:
    def summed(dy: Tensor) -> Tensor:
        return torch.zeros_like(weight).index_add_(0, IDS, dy)

    return {"y": weight[IDS], "weight": summed(dy)}, {"y": weight[IDS].abs(), "weight": summed(dy.abs())}


IDS = torch.arange(ROWS).clamp(max=3)  # almost all of them one token


def random(dtype: torch.dtype, size: float, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Numbers around a mean that is not 0, so that sums grow."""
    return [((torch.randn(shape) + 0.5) * size).to(dtype).requires_grad_() for shape in shapes]


def rotated(dtype: torch.dtype, size: float) -> list[Tensor]:
    angles = torch.randn(ROWS, WIDTH // 2).repeat(1, 2)
    return [*random(dtype, size, (ROWS, WIDTH)), angles.cos().to(dtype), angles.sin().to(dtype)]


X, W = (ROWS, WIDTH), (WIDTH,)
# name -> the op, its inputs, and what is true of it
CASES: dict[str, tuple[Callable[..., Any], Callable[..., list[Tensor]], Callable[..., tuple[Results, Results]]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), lambda *of: random(*of, X, W), of_rms_norm),
    "rms_norm, outer": (lambda x, w: rms_norm(x, w, 0.1, True), lambda *of: random(*of, X, W), of_outer_epsilon),
    "layer_norm": (lambda *inputs: layer_norm(*inputs, EPS), lambda *of: random(*of, X, W, W), of_layer_norm),
    "swiglu": (swiglu, lambda *of: random(*of, X, X), of_glu(silu)),
    "geglu": (geglu, lambda *of: random(*of, X, X), of_glu(gelu)),
    "reglu": (reglu, lambda *of: random(*of, X, X), of_glu(relu)),
    "clamped_swiglu": (lambda *x: clamped_swiglu(*x, 1.702, 7.0), lambda *of: random(*of, X, X), of_clamped_swiglu),
    "relu_squared": (
        relu_squared,
        lambda *of: random(*of, X),
        of_relu_squared,
    ),
    "rope": (rope, rotated, of_rope),
    "embedding": (lambda w: embedding(IDS, w), lambda *of: random(*of, (5, WIDTH)), of_embedding),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-2, 1.0, 8.0])
@pytest.mark.parametrize("name", CASES)
def test_two_roundings(name: str, size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    op, inputs_of, exact = CASES[name]
    inputs = inputs_of(dtype, size)
    leaves = [value for value in inputs if value.requires_grad]
    y = op(*inputs)
    (dy,) = random(dtype, 1.0, tuple(y.shape))
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy.detach())]
    results, terms = exact(dy.detach().double(), *(value.detach().double() for value in inputs))
    assert len(found) == len(results)
    allowed = 2 * torch.finfo(dtype).eps / 2 * 1.02
    # Below the smallest normal number the spacing is that of the dtype, not of the value, and factors make it larger.
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    spacing *= 1 + max(float(value.detach().abs().max()) for value in (dy, *inputs)) ** 2
    for what, value in zip(results, found, strict=True):
        error = (value.double() - results[what]).abs()
        bound = allowed * terms[what] + spacing
        assert bool((terms[what] >= 0).all())
        worst = float((error / bound).max())
        assert worst <= 1.0, f"{what}: {2 * worst:.2f} roundings"
        planted = value.double() + 0.01 * terms[what]
        assert bool(((planted - results[what]).abs() > bound).any()), f"{what}: an error of a percent would pass"
