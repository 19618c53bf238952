"""AdamW's Triton kernels, on a GPU or in Triton's interpreter, and compiled ahead of time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import adamw_8bit, adamw_triton
from fxopt.kernels.adamw import Hyper, Slot, adamw_reference
from fxopt.kernels.adamw_8bit import foreach_adamw_8bit_
from fxopt.kernels.rounding import Rounding
from fxopt.precision import moment_ranges, optimizer_states
from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_adamw import HYPER, neighbours, problem

on_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"
)


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


def is_a_rounding_of(stored: Tensor, value: Tensor) -> bool:
    """The reference's own float32 rounding may lie on the other side of a bfloat16: allow for it."""
    low, high = neighbours(value * (1 - 1e-6)), neighbours(value * (1 + 1e-6))
    return bool(torch.all(sum(stored == bound for bound in (*low, *high)) > 0))  # type: ignore[call-overload]


@on_triton
@pytest.mark.parametrize("numel", [1, 2047, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_matches_the_specification(dtype: torch.dtype, numel: int, device: str) -> None:
    p, g, m, v = on(device, *problem(numel, dtype))
    p32, m32, v32 = adamw_reference(p, g, m, v, **HYPER, step=3)
    guarded = torch.full((numel + 64,), float("nan"), dtype=dtype, device=device)
    guarded[:numel] = p
    slot = Slot(guarded[:numel], g, m, v, torch.tensor(3.0), 0)
    adamw_triton.launch_adamw([slot], 3, Hyper(**HYPER), "stochastic", 0)
    torch.testing.assert_close(m, m32, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(v, v32, rtol=1e-6, atol=1e-6)
    assert guarded[numel:].isnan().all()
    if dtype == torch.float32:
        torch.testing.assert_close(slot.param, p32, rtol=1e-6, atol=1e-6)
    else:
        assert is_a_rounding_of(slot.param, p32)


@on_triton
def test_its_rounding_is_unbiased(device: str) -> None:
    numel, up = 40_000, 0.25
    p = torch.ones(numel, dtype=torch.bfloat16, device=device)
    m, v = torch.zeros(2, numel, device=device)
    slot = Slot(p, -p, m, v, torch.tensor(1.0), 0)
    hyper = Hyper(lr=up * 2**-7, beta1=0.9, beta2=0.999, eps=0.0, weight_decay=0.0)
    adamw_triton.launch_adamw([slot], 1, hyper, "stochastic", 0)
    assert abs((p > 1).double().mean().item() - up) < 5 * (up * (1 - up) / numel) ** 0.5


@on_triton
def test_infinity_and_nan_stay(device: str) -> None:
    p = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0], dtype=torch.bfloat16, device=device)
    g = torch.tensor([1.0, 1.0, 1.0, float("nan")], dtype=torch.bfloat16, device=device)
    m, v = torch.zeros(2, 4, device=device)
    hyper = Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    adamw_triton.launch_adamw([Slot(p, g, m, v, torch.tensor(1.0), 0)], 1, hyper, "stochastic", 0)
    assert p[0] == float("inf") and p[1] == float("-inf") and p[2:].isnan().all()


@on_triton
def test_many_at_once_equal_one_by_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for many parameters is bit by bit a launch for each; odd addresses and mixed gradients included."""
    sizes = (7, 2048, 5008, 64, 576, 16, 4112)
    memory = torch.full((2, 2, len(sizes), 8192), float("nan"), dtype=torch.bfloat16, device=device)
    slots: list[list[Slot]] = [[], []]
    for index, size in enumerate(sizes):
        p, g, m, v = on(device, *problem(size, torch.bfloat16, index))
        start = 1 if index == 3 else 0  # not a multiple of 16 bytes
        for way in range(2):
            param, grad = memory[way, :, index, start : start + size]
            param.copy_(p), grad.copy_(g)
            grad = grad.float() if index == 4 else grad
            slots[way].append(Slot(param, grad, m.clone(), v.clone(), torch.tensor(3.0), index))
    hyper = Hyper(**HYPER)
    launches: list[int] = []
    launch_many = adamw_triton._launch_many
    with monkeypatch.context() as patch:
        patch.setattr(
            adamw_triton,
            "_launch_many",
            lambda group, *rest: (launches.append(len(group)), launch_many(group, *rest)),
        )
        adamw_triton.launch_adamw(slots[0], 3, hyper, "stochastic", 5)
    assert launches == [4]  # without 7 elements, the odd address, and the only float32 gradient
    for slot in slots[1]:
        adamw_triton.launch_adamw([slot], 3, hyper, "stochastic", 5)
    together, alone = memory.view(torch.int16)
    assert torch.equal(together, alone)
    for one, other in zip(*slots, strict=True):
        assert torch.equal(one.exp_avg, other.exp_avg) and torch.equal(one.exp_avg_sq, other.exp_avg_sq)
        assert not torch.equal(one.exp_avg, problem(one.param.numel(), torch.bfloat16, one.index)[2].to(device))


class In8Bits:
    """Parameters of all sizes with moments in 8 bits: a whole number of programs, less, and one block."""

    NUMELS = (4096, 256, 1280, 9216)

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        problems = [on(device, *problem(numel, dtype, seed)) for seed, numel in enumerate(self.NUMELS)]
        self.params, self.grads = [p for p, *_ in problems], [g for _, g, *_ in problems]
        self.moments = []
        for *_, m, v in problems:
            states = [optimizer_states.quantized_zeros(m, "8bit", signed=signed) for signed in (True, False)]
            for state, values in zip(states, (m, v), strict=True):
                moment_ranges.write(state, 0, values)
            self.moments.append(states)

    def step(self, rounding: Rounding, only: int | None = None) -> None:
        chosen = range(len(self.params)) if only is None else [only]
        first, second = ([moment_ranges.for_kernel(self.moments[place][kind]) for place in chosen] for kind in (0, 1))
        foreach_adamw_8bit_(
            [self.params[place] for place in chosen],
            [self.grads[place] for place in chosen],
            first,
            second,
            [torch.tensor(3.0)] * len(chosen),
            Hyper(**HYPER),
            rounding=rounding,
            seed=5,
            indices=chosen,
        )


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_8_bits_it_matches_the_specification(dtype: torch.dtype, device: str) -> None:
    trained = In8Bits(device, dtype)
    expected = [
        adamw_reference(p, g, m.dequantize(), v.dequantize(), **HYPER, step=3)
        for p, g, (m, v) in zip(trained.params, trained.grads, trained.moments, strict=True)
    ]
    trained.step("stochastic")
    for stored, states, (p, *moments) in zip(trained.params, trained.moments, expected, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(stored, p, rtol=1e-6, atol=1e-6)
        else:
            assert is_a_rounding_of(stored, p)
        for state, moment in zip(states, moments, strict=True):
            scale = state.scale.cpu()
            found, exact = state.dequantize().cpu().view(-1), moment.cpu().view(-1)
            values, shares = state.qmap.cpu().abs().unique(), (exact.view(-1, 256) / scale[:, None]).abs().view(-1)
            above = torch.searchsorted(values, shares).clamp(1, len(values) - 1)
            spacing = (values[above] - values[above - 1]) * scale.repeat_interleave(256)
            assert bool(((found - exact).abs() <= spacing * (1 + 1e-4)).all())  # the value below or the one above


@on_triton
def test_in_8_bits_it_stores_what_the_cpu_stores(device: str) -> None:
    """Values on the grid leave nothing to round: scales and codes are equal bit by bit, zeros and NaN included."""
    numel = 1 << 14
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(numel, generator=generator)
    values += 0.05 * values.sign()
    values *= 10.0 ** (torch.randint(-2, 1, (64, 256), generator=generator) - torch.arange(-3, 61)[:, None] // 2).view(
        -1
    )
    values[:256], values[700:730], values[2000] = 0.0, 0.0, float("nan")
    states = []
    for place in (device, "cpu"):
        pair = [
            optimizer_states.quantized_zeros(torch.empty(numel, device=place), "8bit", signed=s) for s in (True, False)
        ]
        for state, content in zip(pair, (values, values.abs()), strict=True):
            moment_ranges.write(state, 0, content.to(place, copy=True))
        states.append(pair)
    moments = [[moment_ranges.for_kernel(state)] for state in states[0]]
    zeros, hyper = torch.zeros(numel, device=device), Hyper(lr=0.1, eps=1.0, weight_decay=0.0, beta1=0.5, beta2=0.999)
    foreach_adamw_8bit_(
        [zeros.clone()], [zeros], *moments, [torch.tensor(1.0)], hyper, rounding="nearest", seed=0, indices=[0]
    )
    for state, right, decay in zip(*states, (0.5, 0.999), strict=True):
        moment_ranges.write(
            right, 0, moment_ranges.read(right, 0, numel) * decay, noise=moment_ranges.Noise(0, 1, 0), decay=decay
        )
        numbers = torch.ones(numel, dtype=torch.bool)
        numbers[1792:2048] = False  # the block with the NaN
        assert torch.equal(state.scale.cpu()[1:7], right.scale[1:7])
        assert torch.equal(state.dequantize().cpu()[numbers], right.dequantize()[numbers])
        assert bool(state.dequantize().cpu()[1792:2048].isnan().all()) and bool(
            right.dequantize()[1792:2048].isnan().all()
        )
        assert not state.dequantize()[:256].any() and not state.dequantize()[700:730].any()


@on_triton
def test_in_8_bits_the_mean_is_right(device: str) -> None:
    """Many equal elements: what is stored is right on average, of first and second moments alike."""
    numel = 1 << 15
    row = 10.0 ** -torch.linspace(0, 3, 256)
    (grad,) = on(device, row.repeat(numel // 256))
    pair = [optimizer_states.quantized_zeros(grad, "8bit", signed=signed) for signed in (True, False)]
    hyper = Hyper(lr=0.1, eps=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999)
    for step in (1.0, 2.0, 3.0):
        foreach_adamw_8bit_(
            [torch.zeros_like(grad)], [grad], *[[moment_ranges.for_kernel(state)] for state in pair],
            [torch.tensor(step)], hyper, rounding="nearest", seed=int(step), indices=[0],
        )  # fmt: skip
    for state, right in zip(pair, ((1 - 0.9**3) * row, (1 - 0.999**3) * row**2), strict=True):
        mean = (state.dequantize().cpu().view(-1, 256) / right).mean()
        assert abs(float(mean) - 1) < 0.002


@on_triton
def test_in_8_bits_many_at_once_equal_one_by_one(device: str) -> None:
    together, alone = In8Bits(device, torch.bfloat16), In8Bits(device, torch.bfloat16)
    before = [p.clone() for p in together.params]
    together.step("stochastic")
    for place in range(len(alone.params)):
        alone.step("stochastic", place)
    for one, other, old in zip(together.params, alone.params, before, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, old)
    for one_state, other_state in zip(together.moments, alone.moments, strict=True):
        for one, other in zip(one_state, other_state, strict=True):
            assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=str)
@pytest.mark.parametrize("param", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["one", "many", "8bit"])
def test_it_compiles(target: tuple[str, Any, int], param: str, kernel: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtype = triton.language.bfloat16 if param == "bf16" else triton.language.float32
    constexprs: dict[str, Any] = {"STOCHASTIC": param == "bf16", "PARAM": dtype, "GRAD": dtype}
    function, more = {
        "one": (adamw_triton._adamw_kernel, {"BLOCK": adamw_triton.BLOCK}),
        "many": (adamw_triton._many_adamw_kernel, {"BLOCK": adamw_triton.BLOCK}),
        "8bit": (adamw_8bit._adamw_8bit_kernel, {"NUMEL": adamw_8bit.NUMEL, "ROWS": adamw_8bit.ROWS}),
    }[kernel]
    constexprs = {name: value for name, value in (constexprs | more).items() if name in function.arg_names}
    pointers = {
        "param_ptr": f"*{param}",
        "grad_ptr": f"*{param}",
        "table_ptr": "*i64",
        "owner_ptr": "*i64",
        "numel": "i32",
        "seed": "i64",
    }
    signature = {
        name: "constexpr" if name in constexprs else pointers.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in function.arg_names
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(5)} if kernel == "one" else {}
    compiled = triton.compile(ASTSource(function, signature, constexprs=constexprs, attrs=aligned), GPUTarget(*target))
    if target[0] == "cuda":
        assert "ld.global.v" in compiled.asm["ptx"]  # wide loads
