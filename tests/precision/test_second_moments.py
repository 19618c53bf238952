"""Second moments in 8 and 4 bits follow their gradients, over thousands of steps, as float32 ones do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.precision.moment_ranges import Noise, read, write
from fxopt.precision.optimizer import Optimizer
from fxopt.precision.optimizer_states import quantized_zeros

ROWS, COLUMNS, BETA2 = 16, 256, 0.999
Factor = Callable[[int], float]


def shrinks(step: int) -> float:
    return 1.0 if step < 1000 else 0.1


def grows(step: int) -> float:
    return 0.1 if step < 1000 else 1.0


def rests(step: int) -> float:
    return 1.0


def vanishes(step: int) -> float:
    return 1.0 if step < 1000 else 0.0


def moments(form: Any, factor: Factor, *, scale: float = 1.0, steps: int = 3000) -> tuple[Tensor, Tensor]:
    """Second moments in float32 and `form`, of the half of each block whose gradients change: (ROWS, COLUMNS / 2)."""
    generator = torch.Generator().manual_seed(0)
    sizes = scale * 10 ** (-2 * torch.rand(ROWS, COLUMNS, generator=generator))
    exact = torch.zeros(ROWS * COLUMNS)
    state = quantized_zeros(exact, form, signed=False)
    for step in range(steps):
        gradient = torch.randn(ROWS, COLUMNS, generator=generator) * sizes
        gradient[:, 1::2] *= factor(step)
        added = (1 - BETA2) * gradient.view(-1) ** 2
        exact.mul_(BETA2).add_(added)
        values = read(state, 0, exact.numel()).mul_(BETA2).add_(added)
        write(state, 0, values, noise=Noise(0, step, 0), decay=BETA2)
    return exact.view(ROWS, COLUMNS)[:, 1::2], read(state, 0, exact.numel()).view(ROWS, COLUMNS)[:, 1::2]


def check_mean(exact: Tensor, found: Tensor) -> None:
    """Right on average to four standard errors, which are under 1.5 %."""
    ratio = found / exact
    error = float(ratio.std()) / ratio.numel() ** 0.5
    assert error < 0.0045 and abs(float(ratio.mean()) - 1) < 4 * error


@pytest.mark.parametrize("factor", [shrinks, grows, rests])
def test_they_follow(factor: Factor) -> None:
    exact, found = moments("8bit", factor)
    low, median, high = (exact / found).sqrt().quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert 0.95 < median < 1.05 and low > 0.85 and high < 1.2
    check_mean(exact, found)


@pytest.mark.parametrize("scale", [1e-12, 1e3])
def test_gradients_of_any_size(scale: float) -> None:
    exact, found = moments("8bit", rests, scale=scale, steps=300)
    check_mean(exact, found)


def test_a_gradient_that_has_become_zero_is_forgotten() -> None:
    exact, found = moments("8bit", vanishes, steps=2500)
    check_mean(exact, found)


def test_in_4_bits_the_mean_follows() -> None:
    for factor in (shrinks, grows):
        exact, found = moments("4bit", factor, steps=2500)
        assert found.sum() / exact.sum() == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(("signed", "decay"), [(False, BETA2), (False, 1.0), (True, 1.0)])
def test_a_store_is_right_to_a_thousandth(signed: bool, decay: float) -> None:
    """Of equal elements in all decades: a scale that is wrong by 1 % would show ten times over."""
    row = 10.0 ** -torch.linspace(0, 4, 256)
    values = row.repeat(512)
    state: Any = quantized_zeros(values, "8bit", signed=signed)
    write(state, 0, values.clone(), noise=Noise(0, 1, 0), decay=decay)
    for step in range(2, 12):
        now = read(state, 0, values.numel()) * decay
        write(state, 0, now, noise=Noise(0, step, 0), decay=decay)
    mean = (state.dequantize().view(512, 256) / (row * decay**10)).mean()
    assert float(mean) == pytest.approx(1.0, abs=1e-3)


def test_what_decays_alone_has_no_noise() -> None:
    """A grid that decays with its values: 500 steps without a gradient leave every code where it is."""
    state: Any = quantized_zeros(torch.empty(4096), "8bit", signed=False)
    write(state, 0, torch.rand(4096, generator=torch.Generator().manual_seed(0)), noise=Noise(0, 0, 0))
    before = read(state, 0, 4096)
    for step in range(1, 501):
        write(state, 0, read(state, 0, 4096) * BETA2, noise=Noise(0, step, 0), decay=BETA2)
    shares = read(state, 0, 4096) / (before * BETA2**500)
    assert float((shares - 1).abs().quantile(0.99)) < 1e-3


@pytest.mark.parametrize("form", ["8bit", "4bit"])
def test_zero_stays_zero_and_nothing_else_becomes_it(form: Any) -> None:
    """Rows of an embedding that are never hit, and elements far smaller than the largest of their block."""
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    values[:512], values[600:700], values[1000:1100] = 0.0, 0.0, 1e-30
    state: Any = quantized_zeros(values, form, signed=False)
    for step in range(50):
        write(state, 0, values.clone(), noise=Noise(0, step, 0), decay=BETA2)
        assert torch.equal(state.dequantize() == 0, values == 0)


def test_what_is_not_finite_stays_in_its_block() -> None:
    for signed in (True, False):
        values = torch.ones(4096)
        values[300], values[700] = torch.nan, torch.inf
        state: Any = quantized_zeros(values, "8bit", signed=signed)
        write(state, 0, values.clone(), noise=Noise(0, 1, 0))
        found = state.dequantize().view(-1, 256)
        assert bool(found[1:3].isnan().all()) and torch.allclose(found[3:], torch.ones(13, 256), rtol=1e-6)


def trained(policy: str, steps: int, **options: Any) -> tuple[list[Tensor], Optimizer]:
    """A model with a frozen parameter, an empty one, one of one element, and one that is no whole number of blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 100), nn.Linear(100, 1))
    model[0].bias.requires_grad_(False)
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 4)))
    fxopt.annotate(model, policy)
    opt = fxopt.optimizer(model, lr=1e-3, seed=3, **options)
    for step in range(steps):
        x = torch.randn(16, 128, generator=torch.Generator().manual_seed(step)).to(next(iter(model.parameters())).dtype)
        model(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()], opt


@pytest.mark.parametrize("policy", ["bf16-8bit", "int8"])
@pytest.mark.parametrize("release_gradients", [False, True])
def test_a_run_repeats_bit_by_bit(policy: str, release_gradients: bool) -> None:
    first, opt = trained(policy, 4, release_gradients=release_gradients)
    again, other = trained(policy, 4, release_gradients=release_gradients)
    for state, twin in zip(opt.state.values(), other.state.values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            parts = [(s.codes, s.scale) if hasattr(s, "codes") else (s,) for s in (state[name], twin[name])]
            assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(getattr(a, "int_data", a), getattr(b, "int_data", b))
    copied = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(copied)


def test_another_seed_draws_other_noise() -> None:
    values = torch.rand(4096)
    codes = []
    for noise in (Noise(0, 1, 0), Noise(1, 1, 0), Noise(0, 2, 0), Noise(0, 1, 1)):
        state: Any = quantized_zeros(values, "8bit", signed=False)
        write(state, 0, values.clone(), noise=noise)
        codes.append(state.codes)
    assert not any(torch.equal(codes[0], other) for other in codes[1:])
