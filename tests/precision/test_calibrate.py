"""Islands are put where rounding hurts, training with them loses less than the bound, and the model stays as it was."""

import copy
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import fxopt
from fxopt import Policy, PolicyError, Selector
from fxopt.capture import OptimizedForward
from fxopt.precision.annotate import annotate, parameter_precisions
from fxopt.precision.calibration import BudgetError, Calibration
from fxopt.precision.footprint import footprint
from fxopt.precision.islands import (
    Candidate,
    Losses,
    Measured,
    candidates,
    choose,
    island_overrides,
    selectors,
)
from fxopt.precision.monitor import monitor
from fxopt.precision.optimizer import optimizer
from fxopt.precision.parameter_storage import is_int8
from fxopt.precision.roles import Role, parameter_roles

BF16 = Policy.named("bf16")
NEAREST = Policy("bf16-nearest", replace(BF16.default, rounding="nearest"))
LR = 1e-5


class TwoLayers(nn.Module):
    """`small` has weights that feel an update of 1e-5 in bfloat16; `large` has none. Noise in forward, a buffer too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("calls", torch.zeros(()))
        self.num_calls = 0
        with torch.no_grad():
            self.small.weight.copy_(torch.rand(32, 16) * 1e-4 + 1e-5)
            self.large.weight.copy_(torch.rand(8, 32) + 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls.add_(1)
        self.num_calls += 1
        y = self.large(self.dropout(self.small(x.to(self.small.weight.dtype))))
        random.random(), numpy.random.rand()
        return {"y": y} if labels is None else {"loss": (y - labels).float().square().mean()}


@pytest.fixture
def two_layers() -> TwoLayers:
    return TwoLayers()


def of_two_layers(num: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"x": (4, 16), "labels": (4, 8)}
    return [{name: torch.randn(size, generator=generator) for name, size in sizes.items()} for _ in range(num)]


def text(tokens: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens, "labels": tokens}]


def losses_in_training(model: nn.Module, policy: Policy, batches: list[Any], lr: float = LR) -> dict[str, float]:
    """The lost share by role, or what the cast hides, of training under `policy`, watched by the public monitor."""
    model = annotate(copy.deepcopy(model), policy).train()
    opt = optimizer(model, lr=lr)
    seen = monitor(opt, model, samples=1 << 20)
    for batch in itertools.islice(itertools.cycle(batches), 8):
        outputs = model(**batch)
        (outputs["loss"] if isinstance(outputs, dict) else outputs.loss).backward()
        opt.step()
        opt.zero_grad()
    return {row.name: row.lost if row.lost_in_cast is None else row.lost_in_cast for row in seen.rows}


# What is chosen ------------------------------------------------------------------------------------------------------


def test_the_one_tensor_that_loses_is_the_island(two_layers: TwoLayers) -> None:
    batches = of_two_layers()
    before = losses_in_training(two_layers, NEAREST, batches)
    assert before["0/linear"] > 0.25
    found = Policy.calibrate(two_layers, batches, LR, base=NEAREST)
    assert [island.names for island in found.islands] == [("large.weight",)]
    assert found.islands[0].before.lost > 0.95
    assert found.policy.selectors == (
        Selector(name="large.weight", storage=torch.float32, gradient=torch.bfloat16, cast="stochastic"),
    )
    assert found.policy.name == "bf16-nearest-calibrated" and found.holds
    after = losses_in_training(two_layers, found.policy, batches)
    assert max(after.values()) < found.bound.lost
    (row,) = found.rows
    assert row.before.lost == pytest.approx(before["0/linear"], abs=0.05)
    assert row.after.lost < 0.05 and row.num_in_islands == 256 and row.num_parameters == 256 + 512


def test_float32_storage_alone_would_move_the_loss_into_the_cast(two_layers: TwoLayers) -> None:
    """Why an island is more than its storage."""
    naive = NEAREST.with_selectors(Selector(name="large.weight", storage=torch.float32))
    assert losses_in_training(two_layers, naive, of_two_layers())["1/linear"] > 0.9


def test_a_larger_learning_rate_needs_no_island(two_layers: TwoLayers) -> None:
    found = Policy.calibrate(two_layers, of_two_layers(), 0.1, base=NEAREST)
    assert found.policy is NEAREST and not found.islands and found.added_bytes == 0 and found.alternative is None
    assert "no islands" in str(found)


def test_stochastic_rounding_loses_nothing_and_its_noise_counts(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """Norm weights of 1 lie 2⁻⁸ to 2⁻⁷ apart, twenty times the root of that over an update of 1e-5."""
    found = Policy.calibrate(llama, text(tokens), LR)
    assert found.base == BF16 and {row.before.lost for row in found.rows} == {0.0}
    assert [island.selector for island in found.islands] == [
        Selector(role=Role.NORM, storage=torch.float32, compute=torch.float32)
    ]
    rows = {row.role: row for row in found.rows}
    assert rows[Role.NORM].before.noise == pytest.approx((2**-7.5 / LR) ** 0.5, rel=0.35)
    assert rows[Role.NORM].after.noise == 0 and rows[Role.LINEAR].after.noise < 20
    assert Policy.calibrate(llama, text(tokens), LR, max_noise=math.inf).policy is not found.policy
    assert Policy.calibrate(llama, text(tokens), LR, max_noise=math.inf).policy == BF16


def test_nearest_rounding_needs_islands_or_stochastic_rounding(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    found = Policy.calibrate(llama, text(tokens), LR, base=NEAREST)
    assert {row.role for row in found.rows if row.num_in_islands} == {Role.NORM, Role.EMBEDDING, Role.LINEAR}
    assert found.added_bytes_per_parameter > 1.5 and found.holds
    assert max(losses_in_training(llama, found.policy, text(tokens)).values()) < 0.05
    # Cheaper: stochastic rounding where its noise is under the bound, which it is not in the norms.
    assert found.alternative is not None and found.advice is not None and "rounding='stochastic'" in found.advice
    assert max(losses_in_training(llama, found.alternative, text(tokens)).values()) < 0.02
    precisions = parameter_precisions(annotate(copy.deepcopy(llama), found.alternative))
    assert precisions["model.norm.weight"].storage == torch.float32
    assert precisions["model.embed_tokens.weight"].rounding == "stochastic"


def test_stochastic_rounding_is_no_alternative_to_itself(
    llama: LlamaForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.precision.calibrate._losses", lambda cost: Losses(0.5, 0.0))
    found = Policy.calibrate(llama, text(tokens), LR)
    assert found.islands and found.alternative is None and not found.holds


def test_mixed_precision_only_needs_another_cast(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    found = Policy.calibrate(llama, text(tokens), LR, base="mixed")
    assert found.added_bytes == 0 and found.holds
    assert {island.selector for island in found.islands} == {
        Selector(role=Role.EMBEDDING, cast="stochastic"),
        Selector(role=Role.LINEAR, cast="stochastic"),
    }
    assert max(losses_in_training(llama, found.policy, text(tokens)).values()) < 0.05


def test_float32_is_left_alone(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    found = Policy.calibrate(llama, text(tokens), LR, base="fp32", max_lost=0.0)
    assert found.policy == Policy.named("fp32") and found.holds


def test_int8(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """int8's steps are some ten times those of bfloat16 here: its noise is, too, and its islands cost three bytes."""
    found = Policy.calibrate(llama, text(tokens), LR, base="int8", max_noise=4.0)
    in_bf16 = Policy.calibrate(llama, text(tokens), LR, base="bf16-islands", max_noise=4.0)
    noise = {row.role: row.before.noise for row in found.rows}
    assert noise[Role.LINEAR] > 1.5 * {row.role: row.before.noise for row in in_bf16.rows}[Role.LINEAR]
    assert noise[Role.NORM] == 0 and found.holds
    linear = next(row for row in found.rows if row.role == Role.LINEAR)
    assert linear.num_in_islands > 0 and linear.after.noise < 4 < linear.before.noise
    assert linear.added_bytes == pytest.approx(3 * linear.num_in_islands, rel=0.05)


def test_added_bytes_are_those_that_tensors_hold(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    for base in (NEAREST, Policy.named("int8")):
        found = Policy.calibrate(llama, text(tokens), LR, base=base, max_noise=1.0)
        held = {}
        for policy in (base, found.policy):
            model = annotate(copy.deepcopy(llama), policy).train()
            model(input_ids=tokens, labels=tokens).loss.backward()
            counted = footprint(model)
            held[policy.name] = counted.weights + counted.gradients
        assert found.islands and held[found.policy.name] - held[base.name] == found.added_bytes
        assert sum(island.added_bytes for island in found.islands) == found.added_bytes


def test_tied_weights_are_one_island(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    found = Policy.calibrate(llama, text(tokens), LR, base=NEAREST)
    embedding = [island for island in found.islands if "model.embed_tokens.weight" in island.names]
    assert len(embedding) == 1 and embedding[0].added_bytes == 2 * 96 * 32
    annotate(llama, found.policy)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert llama.lm_head.weight.dtype == torch.float32


def test_frozen_parameters_are_ignored(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    llama.model.layers[0].requires_grad_(False)
    found = Policy.calibrate(llama, text(tokens), LR, base=NEAREST)
    named = {name for island in found.islands for name in island.names}
    assert named and not any(name.startswith("model.layers.0.") for name in named)
    assert sum(row.num_parameters for row in found.rows) == sum(
        p.numel() for p in llama.parameters() if p.requires_grad
    )
    precisions = parameter_precisions(annotate(llama, found.policy))
    islands = {name for name, precision in precisions.items() if precision.storage == torch.float32}
    assert islands == named


def test_what_gets_no_gradient_is_told(two_layers: TwoLayers) -> None:
    two_layers.idle = nn.Linear(4, 4)
    found = Policy.calibrate(two_layers, of_two_layers(), LR, base=NEAREST)
    assert found.unmeasured == ("idle.weight", "idle.bias") and "'idle.weight'" in str(found)


def test_options_reach_the_optimizer(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """Muon mixes elements: what stayed is counted, and there is no noise to bound."""
    found = Policy.calibrate(llama, text(tokens), 1e-6, base=NEAREST, kind="muon", weight_decay=0.0, steps=2)
    linear = next(row for row in found.rows if row.role == Role.LINEAR)
    assert linear.before.lost > 0.5 and linear.after.lost < 0.05
    with pytest.raises(TypeError, match="no_such_option"):
        Policy.calibrate(llama, text(tokens), no_such_option=1)


# A budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.7])
def test_a_budget_that_is_too_small_says_what_it_reached(
    llama: LlamaForCausalLM, tokens: Tensor, budget: float
) -> None:
    with pytest.raises(BudgetError, match=rf"budget={budget} bytes per parameter is too small") as caught:
        Policy.calibrate(llama, text(tokens), LR, base=NEAREST, budget=budget)
    reached = caught.value.calibration
    assert isinstance(caught.value, PolicyError) and not reached.holds
    assert reached.added_bytes <= budget * sum(p.numel() for p in llama.parameters())
    assert reached.added_bytes_per_parameter == pytest.approx(budget, abs=0.02 + budget / 3)
    assert bool(reached.islands) == bool(budget)
    if budget:  # norms take most of what is lost away for each byte
        assert next(row for row in reached.rows if row.role == Role.NORM).after.lost == 0
    advised = float(str(caught.value).partition("A budget of ")[2].split()[0])
    found = Policy.calibrate(llama, text(tokens), LR, base=NEAREST, budget=advised)
    assert found.holds and found.added_bytes_per_parameter <= advised


# Nothing moved -------------------------------------------------------------------------------------------------------


def everything_of(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        held = tensor.detach()
        values = (held.int_data.clone(), held.scale.clone()) if is_int8(tensor) else held.clone()
        found[name] = (id(tensor), tensor.dtype, values)
        found[f"{name} gradient"] = (id(tensor.grad), None if tensor.grad is None else tensor.grad.clone())
        found[f"{name} attributes"] = {k: v for k, v in vars(tensor).items() if not isinstance(v, Tensor)}
    for name, module in model.named_modules():
        hooks = [list(vars(module)[kind]) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool)}
        found[f"module {name}"] = (set(vars(module)), plain, hooks, type(module))
    found["random"] = (torch.get_rng_state(), random.getstate(), str(numpy.random.get_state()))
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def batches_that_end_badly() -> Iterator[dict[str, Tensor]]:
    good, bad = of_two_layers(2)
    yield good
    yield {**bad, "labels": torch.full((4, 8), torch.nan)}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_as_they_were(two_layers: TwoLayers, fails: bool) -> None:
    two_layers.eval()
    two_layers(**of_two_layers(1)[0])["loss"].backward()
    before = everything_of(two_layers)
    if fails:
        with pytest.raises(ValueError, match="nan"):
            Policy.calibrate(two_layers, batches_that_end_badly(), LR, base=NEAREST)
    else:
        assert Policy.calibrate(two_layers, of_two_layers(), LR, base=NEAREST).islands
    after = everything_of(two_layers)
    assert [name for name in before if not same(before[name], after[name])] == [] and before.keys() == after.keys()


def test_an_optimized_model_stays_optimized(
    llama: LlamaForCausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the probe runs the original forward: nothing is compiled."""
    fxopt.optimize(llama, "int8")
    monkeypatch.setattr(OptimizedForward, "__call__", lambda *_, **__: pytest.fail("the probe ran graphs"))
    before, forward = everything_of(llama), llama.forward
    found = Policy.calibrate(llama, text(tokens), LR)
    after = everything_of(llama)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert llama.forward is forward and not fxopt.report(llama).graphs
    assert found.islands[0].selector.role == Role.NORM


def test_it_is_repeatable(two_layers: TwoLayers) -> None:
    first, second = (Policy.calibrate(two_layers, of_two_layers(1) * 3, LR, base=NEAREST).rows for _ in range(2))
    assert first == second


def test_only_as_many_batches_are_drawn_as_there_are_steps(two_layers: TwoLayers) -> None:
    drawn = []
    batches = (drawn.append(n) or batch for n, batch in enumerate(of_two_layers(9)))
    Policy.calibrate(two_layers, batches, LR, base=NEAREST, steps=3)
    assert drawn == [0, 1, 2]


# What is said --------------------------------------------------------------------------------------------------------


def test_what_is_shown(two_layers: TwoLayers, capsys: pytest.CaptureFixture[str]) -> None:
    found = Policy.calibrate(two_layers, of_two_layers(), LR, base=NEAREST)
    shown = str(found)
    assert isinstance(found, Calibration)
    for part in ("bf16-nearest", "linear", "large.weight", "512 bytes", f"{found.rows[0].before.lost:.1%}", "kept"):
        assert part in shown
    assert capsys.readouterr() == ("", "")  # no bar where there is no terminal
    data = found.to_dict()
    assert data["added_bytes"] == 512 and data["islands"][0]["names"] == ["large.weight"] and data["holds"] is True
    assert Policy.from_json(found.policy.to_json()) == found.policy


def test_wrong_calls_say_what_to_do(two_layers: TwoLayers, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    good = of_two_layers()
    wrong: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ValueError, "no batches.*give at least one", [], {}),
        (TypeError, "batches is one batch: give a list", good[0], {}),
        (TypeError, "batch 0 is a tuple: give mappings", [(1, 2)], {}),
        (ValueError, "returned no loss for batch 0, which has 'x', and no 'labels'", [{"x": good[0]["x"]}], {}),
        (ValueError, r"the loss of probe step 2 is nan.*batch 1, or lower lr=1e-05", batches_that_end_badly(), {}),
        (ValueError, r"max_lost=1\.5 is out of range", good, {"max_lost": 1.5}),
        (ValueError, r"max_noise=0 is out of range", good, {"max_noise": 0}),
        (ValueError, r"budget=-1 is out of range", good, {"budget": -1}),
        (ValueError, r"steps=0 is out of range", good, {"steps": 0}),
        (ValueError, r"lr=0\.0 is out of range", good, {"lr": 0.0}),
        (PolicyError, "unknown policy 'bf61'", good, {"base": "bf61"}),
    ]
    for error, message, batches, options in wrong:
        with pytest.raises(error, match=message):
            Policy.calibrate(two_layers, batches, **options)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not dict"):
        Policy.calibrate({}, good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"returned no loss for batch 0.*'input_ids', and no 'labels'"):
        Policy.calibrate(llama, [{"input_ids": tokens}])


# Choosing ------------------------------------------------------------------------------------------------------------


def some_candidates(seed: int) -> list[Candidate]:
    numbers = random.Random(seed)
    measured = []
    for place in range(numbers.randrange(3, 12)):
        numel = numbers.choice([8, 64, 512])
        losses = Losses(numbers.random() / 5, 0.0) if numbers.random() < 0.5 else Losses(0.0, 10 * numbers.random())
        role = numbers.choice([Role.LINEAR, Role.NORM])
        measured.append(Measured(f"{place}.weight", role, numel, NEAREST.default, numel * numbers.random(), losses))
    return candidates(measured, {one.name: (one.numel,) for one in measured})


@pytest.mark.parametrize("seed", range(20))
def test_chosen_is_what_loses_too_much_and_a_budget_is_kept(seed: int) -> None:
    bound, possible = Losses(0.1, 5.0), some_candidates(seed)
    chosen = choose(possible, bound)
    assert {c.name for c in chosen} == {c.name for c in possible if c.losses.lost > 0.1 or c.losses.noise > 5}
    needed = sum(candidate.added_bytes for candidate in chosen)
    some = choose(possible, bound, needed / 2)
    spent = sum(candidate.added_bytes for candidate in some)
    assert spent <= needed / 2 and set(some) <= set(chosen)
    assert not any(candidate.added_bytes <= needed / 2 - spent for candidate in set(chosen) - set(some))


def test_a_budget_goes_where_most_is_lost_for_each_byte() -> None:
    def measured(name: str, role: Role, numel: int, lost: float, moving: float = 1.0) -> Measured:
        return Measured(name, role, numel, NEAREST.default, numel * moving, Losses(lost, 0.0))

    every = [
        measured("a.weight", Role.LINEAR, 100, 0.3),
        measured("b.weight", Role.LINEAR, 100, 0.9),
        measured("c.weight", Role.LINEAR, 100, 1.0, moving=0.1),  # an embedding's rows that no token asks for
        measured("norm.weight", Role.NORM, 10, 0.2),
    ]
    possible = candidates(every, {one.name: (one.numel,) for one in every})
    assert [c.name for c in choose(possible, Losses(0.05, 10))] == ["norm.weight", "b.weight", "a.weight", "c.weight"]
    assert [c.name for c in choose(possible, Losses(0.05, 10), 239)] == ["norm.weight"]
    assert [c.name for c in choose(possible, Losses(0.05, 10), 240)] == ["norm.weight", "b.weight"]


def test_few_selectors_mean_the_chosen_and_nothing_else() -> None:
    names = [f"model.layers.{n}.{kind}.weight" for n in range(12) for kind in ("up", "down")]
    names += ["model.h1.weight", "head.weight", "norm.weight"]
    roles = {name: Role.NORM if name == "norm.weight" else Role.LINEAR for name in names}
    aliases = {name: [name, "tied.weight"] if name == "head.weight" else [name] for name in names}

    def found(*wanted: str) -> list[tuple[str, int]]:
        chosen = [Candidate((Measured(name, roles[name], 4, NEAREST.default, 4, Losses(1, 0)),), 8) for name in wanted]
        result = selectors(chosen, roles, aliases)
        for selector, meant in result:
            assert {n for n in names if selector.matches(aliases[n], roles[n], True)} == set(meant)
        assert sorted(name for _, meant in result for name in meant) == sorted(wanted)
        return [(selector.where, len(meant)) for selector, meant in result]

    assert found("norm.weight") == [("role='norm'", 1)]
    assert found(*(n for n in names if n != "norm.weight")) == [("role='linear'", 26)]
    assert found(*(n for n in names if ".up." in n)) == [("name='model.layers.*.up.weight'", 12)]
    assert len(found(*(n for n in names if ".up." in n and ".7." not in n))) == 11
    assert found("model.h1.weight", "head.weight") == [("name='model.h1.weight'", 1), ("name='head.weight'", 1)]


def test_a_norm_is_an_island_as_a_whole(two_layers: TwoLayers) -> None:
    """Its weight and its bias are computed in one dtype: one alone would be cast."""
    two_layers.norm = nn.LayerNorm(4)
    roles = parameter_roles(two_layers)
    measured = [
        Measured(name, roles[name], 4, NEAREST.default, 4, Losses(float(name == "norm.bias"), 0.0))
        for name in ("norm.weight", "norm.bias", "small.weight")
    ]
    chosen = choose(candidates(measured, {one.name: (4,) for one in measured}), Losses(0.05, 10))
    assert [[one.name for one in candidate.measured] for candidate in chosen] == [["norm.weight", "norm.bias"]]
    assert island_overrides(NEAREST.default, Role.NORM) == {"storage": torch.float32, "compute": torch.float32}
