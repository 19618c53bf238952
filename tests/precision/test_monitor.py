"""The monitor's shares are those that full float32 arithmetic over all elements gives, and it changes nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.quantized_training.int8 import Int8QuantizedTrainingLinearWeight
from transformers import LlamaForCausalLM

from fxopt.precision.annotate import annotate
from fxopt.precision.monitor import monitor
from fxopt.precision.optimizer import Optimizer, optimizer
from fxopt.precision.rounding_cost import RoundingCost


def weight(value: float | None = None, dtype: torch.dtype = torch.bfloat16, size: int = 4096) -> nn.Parameter:
    values = (
        torch.randn(size, generator=torch.Generator().manual_seed(0)) if value is None else torch.full((size,), value)
    )
    return nn.Parameter(values.to(dtype))


def train(parameter: nn.Parameter, opt: torch.optim.Optimizer, num_steps: int = 10) -> None:
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        opt.step()


def watched(opt: torch.optim.Optimizer, parameter: nn.Parameter, num_steps: int = 10, **options: Any) -> RoundingCost:
    seen = monitor(opt, **options)
    train(parameter, opt, num_steps)
    (row,) = seen.rows
    return row


def test_the_lost_share_is_that_of_the_whole_tensor() -> None:
    """torch's AdamW on bfloat16: every element compared with a float32 update of its own."""
    parameter, twin = weight(), weight()
    row = watched(torch.optim.AdamW([parameter], lr=1e-3), parameter, num_steps=1, samples=1024)
    exact = nn.Parameter(twin.detach().float())
    train(twin, torch.optim.AdamW([twin], lr=1e-3), 1)
    exact.grad = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    before = exact.detach().clone()
    torch.optim.AdamW([exact], lr=1e-3).step()
    lost = ((exact != before) & (twin.float() == before)).float().mean().item()
    assert 0.2 < lost < 0.9
    assert row.lost == pytest.approx(lost, abs=4 * (lost * (1 - lost) / 1024) ** 0.5)
    ratio = ((exact - before).norm() / before.norm()).item()
    assert row.update_to_weight == pytest.approx(ratio, rel=0.1)
    assert row.unchanged == row.lost and row.expected_unchanged is None


def test_samples_that_are_all_elements_are_exact() -> None:
    parameter = weight(1.0)
    row = watched(torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0), parameter, samples=1 << 20)
    assert (row.lost, row.arrived) == (1.0, 0.0)
    row = watched(torch.optim.AdamW([big := weight(1.0)], lr=0.5, weight_decay=0.0), big, num_steps=1)
    assert row.lost == 0.0 and row.arrived == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("released", [True, False])
def test_stochastic_rounding_loses_what_chance_leaves(released: bool) -> None:
    parameter = weight()
    opt = Optimizer([parameter], lr=1e-4, release_gradients=released)
    seen = monitor(opt, samples=4096)
    for step in range(10):
        noise = torch.randn(4096, generator=torch.Generator().manual_seed(step)).bfloat16()
        (parameter * noise).sum().backward()
        opt.step()
        opt.zero_grad()
    (row,) = seen.rows
    assert row.expected_unchanged is not None and row.arrived is not None and row.steps == 10
    assert row.unchanged > 0.5
    assert row.unchanged == pytest.approx(row.expected_unchanged, abs=0.01)
    assert row.lost < 0.01
    assert row.arrived == pytest.approx(1.0, abs=0.1)


def test_kahan_loses_nothing() -> None:
    parameter = weight(1.0)
    row = watched(Optimizer([parameter], lr=1e-4, weight_decay=0.0, rounding="kahan"), parameter)
    assert row.rounding == "kahan" and row.lost < 0.01 and row.arrived == pytest.approx(1.0, abs=0.05)


def test_the_cast_of_float32_weights() -> None:
    """A weight on bfloat16's grid must drift half a step before its copy moves."""
    parameter = weight(1.0, torch.float32)
    row = watched(torch.optim.AdamW([parameter], lr=1e-4), parameter, compute=torch.bfloat16)
    assert (row.lost, row.lost_in_cast) == (0.0, 1.0)
    assert watched(torch.optim.AdamW([parameter], lr=1e-4), parameter).lost_in_cast is None


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_float32_states_have_no_error(kind: Any) -> None:
    parameter = weight()
    row = watched(Optimizer([parameter], kind=kind, momentum=0.9), parameter)
    assert row.state_error and max(row.state_error.values()) < 1e-6


def test_state_errors_grow_with_fewer_bits() -> None:
    errors = {}
    for form in ("8bit", "4bit"):
        parameter = weight()
        errors[form] = watched(Optimizer([parameter], optimizer_state=form), parameter).state_error  # type: ignore[arg-type]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert 1e-4 < errors["8bit"][moment] < 0.12 < errors["4bit"][moment] < 0.8


def test_a_frozen_bfloat16_moment_shows() -> None:
    """torch's second moment in bfloat16 does not fall: 0.999 of a value rounds to that value."""
    parameter = weight()
    opt = torch.optim.AdamW([parameter])
    seen = monitor(opt)
    train(parameter, opt, 1)
    for _ in range(200):
        parameter.grad = torch.zeros_like(parameter)
        opt.step()
    assert seen.rows[0].state_error["exp_avg_sq"] == pytest.approx(0.999**-200 - 1, rel=0.05)


def test_int8_weights() -> None:
    values = torch.randn(96, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameter = nn.Parameter(Int8QuantizedTrainingLinearWeight.from_float(values))
    opt = Optimizer([parameter], lr=1e-2)
    seen = monitor(opt, samples=4096)
    for _ in range(5):
        parameter.grad = torch.randn(96, 80).bfloat16()
        opt.step()
    (row,) = seen.rows
    assert (row.storage, row.rounding) == ("int8", "stochastic")
    assert row.arrived == pytest.approx(1.0, abs=0.15) and row.lost < 0.15


def test_extreme_values_are_counted() -> None:
    parameter = weight(1.0, size=8)
    opt = torch.optim.AdamW([parameter], lr=0.0)
    with torch.no_grad():
        parameter[:2], parameter[2] = 1e-39, torch.inf
    seen = monitor(opt)
    parameter.grad = torch.tensor([1e-39, 1, 1, 1, 1, 1, torch.nan, 3.3895e38]).bfloat16()
    opt.step()
    (row,) = seen.rows
    assert row.subnormal_weights == 2 / 8 and row.subnormal_gradients == 1 / 8
    assert row.saturated_gradients == 2 / 8
    assert row.saturated_weights == 2 / 8  # the infinite one, and the one that the NaN has reached


def test_a_rule_that_mixes_elements_is_estimated() -> None:
    parameter = nn.Parameter(torch.randn(64, 64).bfloat16())
    row = watched(Optimizer([parameter], kind="muon", lr=1e-6, rounding="nearest", weight_decay=0.0), parameter)
    assert row.is_estimated and row.lost > 0.8 and row.arrived is None and row.state_error == {}


def test_rows_are_roles(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """Awkward parameters too: tied, frozen, without a gradient, in a group added later."""
    annotate(llama, "bf16")
    llama.model.layers[0].requires_grad_(False)
    later = weight()
    opt = optimizer(llama, lr=1e-5, no_decay="norm")
    seen = monitor(opt, llama)
    opt.add_param_group({"params": [("later", later), ("idle", weight())]})
    for _ in range(2):
        (llama(input_ids=tokens, labels=tokens).loss + later.sum()).backward()
        opt.step()
        opt.zero_grad()
    rows = {row.name: row for row in seen.rows}
    assert set(rows) == {"0/embedding", "0/linear", "1/norm", "2/all"}
    assert rows["0/embedding"].num_parameters == llama.lm_head.weight.numel()
    assert rows["1/norm"].num_parameters == 3 * 32
    assert rows["2/all"].num_parameters == 4096


def test_watching_changes_nothing(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    twin = copy.deepcopy(annotate(llama, "bf16"))
    for model, is_watched in ((llama, True), (twin, False)):
        opt = optimizer(model, lr=1e-3)
        if is_watched:
            monitor(opt, model)
        torch.manual_seed(0)
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            opt.step()
            opt.zero_grad()
        drawn = torch.rand(1)
        if is_watched:
            expected = drawn
    assert torch.equal(drawn, expected)
    for a, b in zip(llama.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_closures_and_close() -> None:
    parameter = weight()
    opt = torch.optim.AdamW([parameter], lr=1e-4)
    seen = monitor(opt)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = parameter.float().square().sum()
        loss.backward()
        return loss

    opt.step(closure)  # type: ignore[arg-type]
    assert seen.rows[0].steps == 1
    seen.close()
    opt.step(closure)  # type: ignore[arg-type]
    assert seen.rows[0].steps == 1
    own = Optimizer([parameter])
    seen = monitor(own)
    seen.close()
    seen.close()
    own.step(closure)  # type: ignore[arg-type]
    assert seen.rows == ()


def test_updates_that_are_no_numbers_are_drawn_too(tmp_path: Path) -> None:
    parameter = weight()
    opt = Optimizer([parameter])
    seen = monitor(opt)
    parameter.grad = torch.full_like(parameter, torch.nan)
    opt.step()
    seen.plot(tmp_path / "rounding.png")
    assert (tmp_path / "rounding.png").stat().st_size > 1000
    seen.save(tmp_path / "rounding.json")
    saved = json.loads((tmp_path / "rounding.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert saved["history"]["0/all"]["update_to_weight"] == [None]


def test_what_is_shown(tmp_path: Path) -> None:
    parameter = weight()
    opt = torch.optim.AdamW([parameter], lr=1e-4)
    seen = monitor(opt)
    assert "print the monitor after optimizer.step()" in str(seen)
    train(parameter, opt, 3)
    assert "0/all" in str(seen) and "nearest" in str(seen) and f"{seen.rows[0].lost:.1%}" in str(seen)
    seen.save(tmp_path / "monitor.json")
    saved = json.loads((tmp_path / "monitor.json").read_text())
    assert saved["rows"][0]["lost"] == seen.rows[0].lost
    assert len(saved["history"]["0/all"]["lost"]) == 3
    assert seen.summary()["rounding/0/all/lost"] == seen.rows[0].lost
    pytest.importorskip("matplotlib")
    seen.plot(tmp_path / "monitor.png")
    assert (tmp_path / "monitor.png").stat().st_size > 5000


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"watches a torch\.optim\.Optimizer, got Linear"):
        monitor(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples=0"):
        monitor(torch.optim.AdamW([weight()]), samples=0)


def test_a_group_of_two_dtypes_has_two_rows() -> None:
    params = [weight(1.0), weight(1.0, torch.float32)]
    opt = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0)
    seen = monitor(opt)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    assert {row.name: row.lost for row in seen.rows} == {"0/all": 1.0, "0/all/float32": 0.0}


def test_noise_is_what_stochastic_rounding_adds() -> None:
    """Expected from one step, against errors of many draws; the same under nearest rounding, and none in float32."""
    row = watched(Optimizer([stored := weight()], lr=1e-4, weight_decay=0.0), stored, num_steps=1, samples=4096)
    exact = nn.Parameter(weight().detach().float())
    gradient = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact.grad = gradient.float()
    before = exact.detach().clone()
    torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.0).step()
    errors = []
    for seed in range(30):
        drawn = weight()
        drawn.grad = gradient
        Optimizer([drawn], lr=1e-4, weight_decay=0.0, seed=seed).step()
        errors.append((drawn.detach().float() - exact.detach()).square().mean())
    noise = (torch.stack(errors).mean().sqrt() / (exact.detach() - before).square().mean().sqrt()).item()
    assert noise > 1 and row.noise == pytest.approx(noise, rel=0.03)
    opt = torch.optim.AdamW([nearest := weight()], lr=1e-4, weight_decay=0.0)
    assert watched(opt, nearest, num_steps=1, samples=4096).noise == pytest.approx(row.noise, rel=1e-3)
    for rounding, dtype in (("kahan", torch.bfloat16), ("stochastic", torch.float32)):
        opt = Optimizer([other := weight(dtype=dtype)], lr=1e-4, rounding=rounding)  # type: ignore[arg-type]
        assert watched(opt, other).noise is None


def test_the_standard_error_of_the_lost_share() -> None:
    """Samples of one tensor at many places scatter by it."""
    rows = []
    for seed in range(30):
        values = torch.randn(256, generator=torch.Generator().manual_seed(seed)).bfloat16()
        opt = torch.optim.AdamW([parameter := nn.Parameter(values)], lr=1e-3)
        rows.append(watched(opt, parameter, num_steps=1))
    lost = torch.tensor([row.lost for row in rows])
    assert sum(row.lost_error for row in rows) / 30 == pytest.approx(lost.std().item(), rel=0.4)
    assert all(row.moving == 1.0 for row in rows)
