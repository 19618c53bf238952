"""Quantized states are stored as they should be, cost their two bytes, and are kept through a resume."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from fxopt.kernels import moment_codes
from fxopt.precision.moment_ranges import Noise, is_quantized, read, write
from fxopt.precision.optimizer import Optimizer
from fxopt.precision.optimizer_states import MIN_NUMEL, convert, quantized_zeros
from fxopt.precision.quantized_moment import Moment4bit, Moment8bit

FORMS = [("8bit", Moment8bit), ("4bit", Moment4bit)]
SIZES = ((64, 128), (100, 50), (300,), ())  # the second is no whole number of blocks, the third too small


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float32).to(dtype)) for size in SIZES]


def train(params: list[nn.Parameter], opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_a_value_gets_the_nearest_code_or_one_of_its_neighbours(form: Any, kind: Any, signed: bool) -> None:
    """To the nearest without noise, below or above with it; over forty decades, block by block."""
    numel = 1 << 16
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-4, 3, (numel,), generator=generator)
    values = values if signed else values.abs()
    values.view(64, -1).mul_(10.0 ** torch.linspace(-34, 5, 64)[:, None])
    for noise in (None, Noise(1, 2, 3)):
        state = quantized_zeros(torch.empty(numel), form, signed=signed)
        write(state, 0, values.clone(), noise=noise)
        found = read(state, 0, numel)
        assert torch.equal(found, state.dequantize().view(-1))  # type: ignore[attr-defined]
        scale = state.scale.repeat_interleave(state.block_size)  # type: ignore[attr-defined]
        grid, share = state.qmap.double().abs().unique(), (values.double() / scale.double()).abs()  # type: ignore[attr-defined]
        above = torch.searchsorted(grid, share).clamp(1, len(grid) - 1)
        most = (grid[above] - grid[above - 1]) * (0.5 if noise is None else 1.0)
        most = torch.where((above == 1) & (not signed), grid[1], most)  # nothing positive becomes zero
        assert bool(
            ((found.double() / scale - values.double() / scale).abs() <= most * 1.01).all()
        )  # float16 rounds first, finely


@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_ranges_are_parts_of_the_whole(form: Any, kind: Any) -> None:
    whole, parts = (quantized_zeros(torch.empty(64, 128), form, signed=True) for _ in range(2))
    values = torch.randn(64 * 128)
    write(whole, 0, values.clone())
    for start in range(0, 64 * 128, 1024):
        write(parts, start, values[start : start + 1024].clone())
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(read(whole, 2048, 4096), whole.dequantize().view(-1)[2048:4096])


@pytest.mark.parametrize("form", ["8bit", "4bit"])
@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(default: torch.dtype, form: Any) -> None:
    def trained() -> list[nn.Parameter]:
        moment_codes._row.cache_clear()
        params = [*parameters(), *parameters(torch.float32)]
        train(params, Optimizer(params, optimizer_state=form), range(2))
        return params

    expected = trained()
    torch.set_default_dtype(default)
    try:
        found = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_nan_spreads_over_its_block_alone() -> None:
    state = quantized_zeros(torch.empty(MIN_NUMEL), "8bit", signed=True)
    values = torch.ones(MIN_NUMEL)
    values[300] = torch.nan
    write(state, 0, values.clone())
    assert read(state, 256, 512).isnan().all()
    assert torch.equal(read(state, 512, MIN_NUMEL), values[512:])


@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_small_and_uneven_tensors_keep_float32(form: Any, kind: Any) -> None:
    params = parameters()
    opt = Optimizer(params, optimizer_state=form)
    train(params, opt, range(1))
    for parameter in params:
        expected = kind if parameter.shape == (64, 128) else Tensor
        for moment in ("exp_avg", "exp_avg_sq"):
            state = opt.state[parameter][moment]
            assert type(state) is expected and state.shape == parameter.shape and state.dtype == torch.float32


def test_bytes_of_eight_bit_states() -> None:
    parameter = nn.Parameter(torch.randn(512, 512).bfloat16())
    opt = Optimizer([parameter], optimizer_state="8bit")
    train([parameter], opt, range(1))
    held = sum(
        getattr(opt.state[parameter][moment], part).nbytes
        for moment in ("exp_avg", "exp_avg_sq")
        for part in ("codes", "scale", "qmap")
    )
    assert held / parameter.numel() < 2.05


@pytest.mark.parametrize(("form", "distance", "bias"), [("8bit", 0.055, 0.005), ("4bit", 0.3, 0.06)])
def test_training_follows_float32_states(form: Any, distance: float, bias: float) -> None:
    """The distance between the two paths, against the length of the way: noise. And how far ours goes along the way."""
    ours, exact = parameters(torch.float32), parameters(torch.float32)
    start = [parameter.detach().clone() for parameter in exact]
    train(ours, Optimizer(ours, lr=1e-2, optimizer_state=form), range(20))
    train(exact, torch.optim.AdamW(exact, lr=1e-2), range(20))
    way, ours_way = (exact[0] - start[0]).detach(), (ours[0] - start[0]).detach()
    assert (ours_way - way).norm() / way.norm() < distance
    assert float((ours_way * way).sum() / way.square().sum()) == pytest.approx(1.0, abs=bias)
    for found, right in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_states_of_torchao_are_taken_over() -> None:
    """A checkpoint of an earlier fxopt has torchao's codes: each value gets our nearest code, and its tensors load."""
    values = torch.randn(64, 128)
    for form, theirs in (("8bit", OptimState8bit), ("4bit", OptimState4bit)):
        for signed in (True, False):
            block = 256 if form == "8bit" else 128
            old: Any = theirs.zeros((64, 128), signed=signed, block_size=block, dtype=torch.float32)
            old.copy_(values if signed else values.square())
            ours: Any = quantized_zeros(values, form, signed=signed)  # type: ignore[arg-type]
            ours.copy_(old)  # what a distributed checkpoint does
            converted: Any = convert(old, form, signed=signed)  # type: ignore[arg-type]
            assert torch.equal(ours.dequantize(), converted.dequantize())
            worst = 0.04 if form == "8bit" else 0.4
            assert ((ours.dequantize() - old.dequantize()).norm() / old.dequantize().norm()) < worst
            assert convert(converted, form, signed=signed) is converted  # type: ignore[arg-type]
    params = parameters()
    opt = Optimizer(params, optimizer_state="8bit")
    train(params, opt, range(1))
    saved = opt.state_dict()
    old = OptimState8bit.zeros((64, 128), signed=False, dtype=torch.float32)
    saved["state"][0]["exp_avg_sq"] = old.copy_(torch.ones(64, 128))
    opt.load_state_dict(saved)
    train(params, opt, range(1, 2))
    assert opt.state[params[0]]["exp_avg_sq"].dequantize().mean() == pytest.approx(1.0, abs=0.03)


def resume_from_file(params: list[nn.Parameter], opt: Optimizer, twins: list[nn.Parameter], folder: Path) -> Optimizer:
    torch.save(opt.state_dict(), folder / "optimizer.pt")
    resumed = Optimizer(twins, lr=5.0, seed=99)
    resumed.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return resumed


def resume_from_pickle(
    params: list[nn.Parameter], opt: Optimizer, twins: list[nn.Parameter], folder: Path
) -> Optimizer:
    resumed = Optimizer(twins, lr=5.0, seed=99)
    resumed.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    return resumed


@pytest.mark.parametrize("resume", [resume_from_file, resume_from_pickle])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("form", ["float32", "8bit", "4bit"])
def test_resume_continues_bit_by_bit(
    form: Any, rounding: Any, resume: Callable[..., Optimizer], tmp_path: Path
) -> None:
    params = parameters()
    opt = Optimizer(params, rounding=rounding, optimizer_state=form, seed=7)
    train(params, opt, range(3))
    twins = copy.deepcopy(params)
    resumed = resume(params, opt, twins, tmp_path)
    train(params, opt, range(3, 6))
    train(twins, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    assert is_quantized(resumed.state[twins[0]]["exp_avg"]) == (form != "float32")


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("form", ["8bit", "4bit"])
def test_distributed_checkpoint_holds_them(form: Any, rounding: Any, tmp_path: Path) -> None:
    model = nn.ParameterList(parameters())
    opt = Optimizer(model.named_parameters(), rounding=rounding, optimizer_state=form)
    train(list(model), opt, range(3))
    twin = copy.deepcopy(model)
    dcp.save({"optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    resumed = Optimizer(twin.named_parameters(), rounding=rounding, optimizer_state=form, seed=99, lr=5.0)
    state = {"optimizer": get_optimizer_state_dict(twin, resumed)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, resumed, state["optimizer"])
    train(list(model), opt, range(3, 6))
    train(list(twin), resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model, twin, strict=True))


def test_a_float32_state_is_quantized_where_it_is_loaded() -> None:
    params = parameters(torch.float32)
    exact = torch.optim.AdamW(params)
    train(params, exact, range(2))
    opt = Optimizer(params, optimizer_state="8bit")
    opt.load_state_dict(exact.state_dict())
    state, right = opt.state[params[0]]["exp_avg"], exact.state[params[0]]["exp_avg"]
    torch.testing.assert_close(state.dequantize(), right, rtol=0.1, atol=0.02 * right.abs().max().item())
    assert convert(state, "8bit", signed=True) is state
    back = convert(state, "float32", signed=True)
    assert torch.equal(back, state.dequantize())
