"""SGD, Adafactor and Muon compute what torch's classes do, round as asked, and resume; int8 weights train."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.quantized_training.int8 import Int8QuantizedTrainingLinearWeight
from transformers import LlamaForCausalLM

from fxopt.precision.annotate import annotate
from fxopt.precision.optimizer import Optimizer, optimizer
from fxopt.precision.parameter_storage import storage_of

LIBRARY: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, {}),
    "adafactor": (torch.optim.Adafactor, {}, {}),
    "muon": (torch.optim.Muon, {"momentum": 0.9}, {"adjust_lr_fn": "match_rms_adamw"}),
}


def gradient(parameter: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(params: list[nn.Parameter], opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for parameter in params:
            parameter.grad = gradient(parameter, step)
        opt.step()
        opt.zero_grad()


def matrix(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("kind", LIBRARY)
def test_float32_is_that_of_torch(kind: Any) -> None:
    library, options, fixed = LIBRARY[kind]
    ours, right = matrix(torch.float32), matrix(torch.float32)
    train([ours], Optimizer([ours], kind=kind, lr=1e-2, weight_decay=0.1, **options), range(4))
    train([right], library([right], lr=1e-2, weight_decay=0.1, **options, **fixed), range(4))
    assert torch.equal(ours, right)


def test_the_defaults_of_momentum_are_those_of_torch() -> None:
    for kind in ("sgd", "muon"):
        library, _, fixed = LIBRARY[kind]
        ours, right = matrix(torch.float32), matrix(torch.float32)
        train([ours], Optimizer([ours], kind=kind, lr=1e-2, weight_decay=0.0), range(3))  # type: ignore[arg-type]
        train([right], library([right], lr=1e-2, weight_decay=0.0, **fixed), range(3))
        assert torch.equal(ours, right)


@pytest.mark.parametrize("kind", LIBRARY)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "kahan"])
def test_bfloat16_is_the_float32_result_rounded_once(kind: Any, rounding: Any) -> None:
    library, options, fixed = LIBRARY[kind]
    ours, exact = matrix(torch.bfloat16), nn.Parameter(matrix(torch.bfloat16).float())
    train([ours], Optimizer([ours], kind=kind, lr=1e-2, weight_decay=0.1, rounding=rounding, **options), range(1))
    exact.grad = gradient(ours, 0).float()
    library([exact], lr=1e-2, weight_decay=0.1, **options, **fixed).step()
    nearest = exact.bfloat16()
    if rounding == "stochastic":
        up, down = (torch.nextafter(nearest, torch.full_like(nearest, sign)) for sign in (torch.inf, -torch.inf))
        assert torch.all((ours == nearest) | (ours == up) | (ours == down)) and not torch.equal(ours, nearest)
        assert (ours.float() - exact).mean().abs() < 1e-4
    else:
        assert torch.equal(ours, nearest)


@pytest.mark.parametrize("form", ["float32", "8bit"])
@pytest.mark.parametrize("kind", LIBRARY)
def test_resume_continues_bit_by_bit(kind: Any, form: Any, tmp_path: Path) -> None:
    _, options, _ = LIBRARY[kind]
    parameter = matrix(torch.bfloat16)
    opt = Optimizer([parameter], kind=kind, lr=1e-2, optimizer_state=form, **options)
    train([parameter], opt, range(3))
    twin = copy.deepcopy(parameter)
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    resumed = Optimizer([twin], lr=5.0, seed=9)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train([parameter], opt, range(3, 6))
    train([twin], resumed, range(3, 6))
    assert torch.equal(parameter, twin)
    if kind != "adafactor":
        assert (type(opt.state[parameter]["momentum_buffer"]) is Tensor) == (form == "float32")


@pytest.mark.parametrize("kind", ["adamw", *LIBRARY])
def test_awkward_parameters(kind: Any) -> None:
    """Transposed, empty, without a gradient, frozen: what can be updated is, the rest stays."""
    plain = matrix(torch.bfloat16)
    transposed = nn.Parameter(plain.detach().t().contiguous().t())
    empty, idle, frozen = nn.Parameter(torch.empty(0, 4)), matrix(torch.bfloat16), matrix(torch.bfloat16)
    frozen.requires_grad_(False)
    opt = Optimizer([transposed, empty, idle, frozen], kind=kind, lr=1e-2, rounding="nearest")
    twin = Optimizer([plain], kind=kind, lr=1e-2, rounding="nearest")
    empty.grad = torch.empty(0, 4)
    for step in range(2):
        plain.grad = gradient(plain, step)
        transposed.grad = gradient(plain, step).t().contiguous().t()
        opt.step()
        twin.step()
    assert not transposed.is_contiguous()
    torch.testing.assert_close(transposed, plain, rtol=2**-7, atol=0)
    assert torch.equal(idle, matrix(torch.bfloat16)) and torch.equal(frozen, matrix(torch.bfloat16))


def test_muon_takes_the_linear_weights(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    opt = optimizer(annotate(llama, "bf16"), lr=1e-2, kind="muon")
    names = {group["kind"]: group["param_names"] for group in opt.param_groups}
    assert set(names) == {"adamw", "muon"}
    assert all("proj" in name for name in names["muon"]) and not any("proj" in name for name in names["adamw"])
    losses = train_llama(llama, tokens, opt, 10)
    assert losses[-1] < 0.8 * losses[0]


def train_llama(llama: LlamaForCausalLM, tokens: Tensor, opt: Optimizer, num_steps: int) -> list[float]:
    """The loss of each step."""
    losses = []
    for _ in range(num_steps):
        loss = llama(input_ids=tokens, labels=tokens).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def test_muon_refuses_a_vector_by_name() -> None:
    with pytest.raises(ValueError, match=r"parameter 'bias' has shape \(4,\), and Muon updates matrices"):
        Optimizer([("bias", nn.Parameter(torch.ones(4)))], kind="muon")


def test_kahan_keeps_what_rounding_cuts_off() -> None:
    """A weight of 1.0 moves by 1e-4 a step, 100 times: sixteen bits of it are kept, and no noise."""
    parameter = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    opt = Optimizer([parameter], lr=1e-4, weight_decay=0.0, rounding="kahan")
    for _ in range(100):
        parameter.grad = -torch.ones_like(parameter)
        opt.step()
    compensation = opt.state[parameter]["compensation"]
    assert compensation.dtype == torch.bfloat16
    held = parameter.detach().float() + compensation.float()
    assert torch.all(held == held[0])
    assert held[0].item() - 1 == pytest.approx(100 * 1e-4, rel=0.05)


# --------------------------------------------------------------------------------------------------------- int8 weights


def int8_weight(rows: int = 96, columns: int = 80, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return nn.Parameter(Int8QuantizedTrainingLinearWeight.from_float(weight))


def dequantized(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float32).dequantize()  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["float32", "8bit"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_int8_is_within_one_rounding(kind: Any, form: Any) -> None:
    weight = int8_weight()
    before, step_width = dequantized(weight), weight.scale.float()[:, None]
    exact = nn.Parameter(before.clone())
    opt = Optimizer([weight], kind=kind, lr=1e-2, weight_decay=0.0, optimizer_state=form)
    right = Optimizer([exact], kind=kind, lr=1e-2, weight_decay=0.0)
    weight.grad, exact.grad = gradient(exact, 0).bfloat16(), gradient(exact, 0).bfloat16().float()
    opt.step()
    right.step()
    assert isinstance(weight, Int8QuantizedTrainingLinearWeight)
    off = (dequantized(weight) - exact).abs() / step_width
    kept = weight.scale.float()[:, None] == step_width
    assert 0.2 < kept.float().mean() < 0.9
    assert (off * kept).max() < 1.001
    assert off.max() < 2.05  # a row that its drawn codes outgrow is rounded once more, to steps a little wider


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_loses_no_update(dtype: torch.dtype) -> None:
    """Each step moves every weight by a hundredth of a code: 100 steps move the mean by one code, as in float32."""
    weight = int8_weight(512, 256, dtype)
    before, width = dequantized(weight), weight.scale.float().mean().item()
    opt = Optimizer([weight], lr=width / 100, weight_decay=0.0)
    for _ in range(100):
        weight.grad = -torch.ones(512, 256, dtype=dtype)
        opt.step()
    moved = (dequantized(weight) - before).mean().item()
    assert moved == pytest.approx(width, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_adds_no_noise_but_that_of_the_update(dtype: torch.dtype) -> None:
    """A value that moves by a part f of a code is rounded with the variance f (1 - f) codes², one that rests with none.

    A scale taken anew at each step would draw all codes of a row again, with ten times this variance.
    """
    weight = int8_weight(256, 256, dtype)
    exact, width = dequantized(weight), weight.scale.float()[:, None].clone()
    opt = Optimizer([weight], lr=width.mean().item() / 200, weight_decay=0.0)
    resting = torch.arange(256) % 4 == 0
    for _ in range(20):
        weight.grad = torch.where(resting, 0.0, 1.0).expand(256, 256).to(dtype)
        opt.step()
    moved = 20 / 200 * width.mean() / width
    kept = (weight.scale.float()[:, None] == width).expand(256, 256)
    assert kept.float().mean() > 0.9
    error = (dequantized(weight) - (exact - (~resting) * moved * width)) / width
    # A product with a float32 scale is itself rounded, by a millionth of a code.
    drawn = (error * kept)[:, resting].abs() > 0.5
    assert drawn.sum() <= (3 if dtype == torch.float32 else 0)
    assert error[kept & ~resting].square().mean().item() == pytest.approx(moved.mean().item(), rel=0.1)


def test_int8_rows_change_their_scale_with_their_values() -> None:
    """Rows that grow to the tenfold, shrink to nothing, were zero, or become NaN: within a step of their new scale."""
    before = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    before[3] = 0
    weight = Int8QuantizedTrainingLinearWeight.from_float(before.bfloat16())
    after = before * torch.tensor([10.0, 1e-32, 0.0, 1.0, 1.0])[:, None]
    after[3] = before[0]
    after[4, 7] = torch.nan
    storage_of(weight, "stochastic", seed=0, step=1, index=0).write(0, after.clone().view(-1))
    largest = after[:4].abs().amax(1, keepdim=True)
    assert ((dequantized(weight)[:4] - after[:4]).abs() <= largest / 120).all()
    assert dequantized(weight)[4].isnan().all()


def test_int8_gives_a_row_without_a_scale_one() -> None:
    weight = Int8QuantizedTrainingLinearWeight(torch.zeros(1, 64, dtype=torch.int8), torch.zeros(1))
    storage_of(weight, "stochastic", seed=0, step=1, index=0).write(0, torch.full((64,), 100.0))
    assert (dequantized(weight) == 100).all()


def test_int8_is_rounded_to_either_side_of_a_whole_number() -> None:
    """By 2⁻¹⁷ of a code: noise of 16 bits would round all of it down."""
    rows, columns = 512, 1024
    codes = torch.full((rows, columns), 5, dtype=torch.int8)
    codes[:, 0] = 100
    changed = []
    for sign in (-1, 1):
        found = 0
        for step in range(8):
            weight = Int8QuantizedTrainingLinearWeight(codes.clone(), torch.ones(rows))
            storage = storage_of(weight, "stochastic", seed=0, step=step, index=0)
            storage.write(0, (codes + sign * 2.0**-17).view(-1))
            found += int((weight.int_data != codes).sum())
        changed.append(found)
    assert all(12 < found < 60 for found in changed), changed  # 32 are expected of 2²²


def test_int8_resumes_bit_by_bit_and_leaves_the_generator_alone() -> None:
    weight = int8_weight()
    opt = Optimizer([weight], lr=1e-2, optimizer_state="8bit", seed=3)
    train_int8(weight, opt, range(2))
    twin = copy.deepcopy(weight)
    resumed = Optimizer([twin], lr=1.0)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    train_int8(weight, opt, range(2, 4))
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(7)
    train_int8(twin, resumed, range(2, 4))
    assert torch.equal(weight.int_data, twin.int_data) and torch.equal(weight.scale, twin.scale)


def test_int8_stays_without_a_learning_rate() -> None:
    weight = int8_weight()
    train_int8(weight, Optimizer([weight], lr=1e-2), range(1))
    before = copy.deepcopy(weight)
    train_int8(weight, Optimizer([weight], lr=0.0), range(1))
    assert torch.equal(weight.int_data, before.int_data) and torch.equal(weight.scale, before.scale)


def train_int8(weight: nn.Parameter, opt: Optimizer, steps: range) -> None:
    for step in steps:
        weight.grad = gradient(dequantized(weight), step).to(weight.dtype)
        opt.step()


def test_int8_model_trains(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    quantize_(annotate(llama, "bf16").model, int8_weight_only_quantized_training())
    opt = optimizer(llama, lr=1e-2)
    losses = train_llama(llama, tokens, opt, 8)
    assert losses[-1] < 0.8 * losses[0]
