"""The optimizer follows float32, loses no update, resumes bit by bit, and fits where torch.optim.AdamW does."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

import fxopt
from fxopt.precision.annotate import annotate
from fxopt.precision.optimizer import Optimizer, optimizer
from tests.tiny_models import tiny_llama
from tests.training import assert_same_parameters

Train = Callable[[int], list[float]]


def trainer(model: nn.Module, opt: torch.optim.Optimizer, tokens: Tensor) -> Train:
    def train(num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        return losses

    return train


def vector(value: float = 1.0, dtype: torch.dtype = torch.bfloat16, size: int = 4096) -> nn.Parameter:
    return nn.Parameter(torch.full((size,), value, dtype=dtype))


# ----------------------------------------------------------------------------------------------------------- the update


def test_float32_equals_torch(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    twin = copy.deepcopy(llama)
    options = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    ours = trainer(annotate(llama, "fp32"), optimizer(llama, **options), tokens)(10)
    torchs = trainer(twin, torch.optim.AdamW(twin.parameters(), **options), tokens)(10)
    assert ours == pytest.approx(torchs, rel=1e-6)
    for found, right in zip(llama.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def test_defaults_are_those_of_torch(llama: LlamaForCausalLM) -> None:
    torchs = torch.optim.AdamW(llama.parameters()).defaults
    ours = optimizer(llama).param_groups[0]
    assert all(ours[option] == torchs[option] for option in ("lr", "betas", "eps", "weight_decay"))


def test_no_update_is_lost() -> None:
    """A weight of 1.0, whose step in bfloat16 is 2**-7 upwards, moves by 1e-4 a step, 100 times."""
    ours, torchs = vector(), vector()
    for parameter, opt in (
        (ours, Optimizer([ours], lr=1e-4, weight_decay=0.0)),
        (torchs, torch.optim.AdamW([torchs], lr=1e-4, weight_decay=0.0)),
    ):
        for _ in range(100):
            parameter.grad = -torch.ones_like(parameter)
            opt.step()
    moved = ours.float().mean().item() - 1
    assert moved == pytest.approx(100 * 1e-4, rel=0.05)
    assert torch.all(torchs == 1)


def test_bfloat16_follows_float32(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """A small learning rate, where torch's bfloat16 AdamW stands still."""
    annotate(llama, "bf16")
    exact, plain = copy.deepcopy(llama).float(), copy.deepcopy(llama)
    truth = trainer(exact, torch.optim.AdamW(exact.parameters(), lr=1e-5, weight_decay=0.0), tokens)(40)
    ours = trainer(llama, optimizer(llama, lr=1e-5, weight_decay=0.0), tokens)(40)
    lost = trainer(plain, torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.0), tokens)(40)
    fallen = truth[0] - truth[-1]
    assert ours[0] - ours[-1] == pytest.approx(fallen, rel=0.3)
    assert lost[0] - lost[-1] < 0.7 * (ours[0] - ours[-1])


def test_steps_without_a_change_leave_parameters_alone(llama: LlamaForCausalLM) -> None:
    """torch.distributed.checkpoint makes a state by a step with zero gradients and no learning rate."""
    annotate(llama, "bf16")
    before = copy.deepcopy(llama)
    for parameter in llama.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer(llama, lr=0.0).step()
    assert_same_parameters(llama, before)


# ----------------------------------------------------------------------------------------------------- state and resume


def test_states_are_float32(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    opt = optimizer(annotate(llama, "bf16"))
    trainer(llama, opt, tokens)(1)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for state in opt.state.values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    held = sum(state[moment].nbytes for state in opt.state.values() for moment in ("exp_avg", "exp_avg_sq"))
    assert held == 8 * sum(parameter.numel() for parameter in llama.parameters())


def resume_from_file(model: nn.Module, opt: Optimizer, twin: nn.Module, folder: Path) -> Optimizer:
    torch.save(opt.state_dict(), folder / "optimizer.pt")
    resumed = optimizer(twin, lr=5.0, seed=99)  # the checkpoint's options hold
    resumed.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return resumed


def resume_from_distributed_checkpoint(model: nn.Module, opt: Optimizer, twin: nn.Module, folder: Path) -> Optimizer:
    dcp.save({"optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=folder)
    resumed = optimizer(twin, lr=5.0, seed=99)
    state = {"optimizer": get_optimizer_state_dict(twin, resumed)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(twin, resumed, state["optimizer"])
    return resumed


@pytest.mark.parametrize("resume", [resume_from_file, resume_from_distributed_checkpoint])
def test_resume_continues_bit_by_bit(
    llama: LlamaForCausalLM, tokens: Tensor, tmp_path: Path, resume: Callable[..., Optimizer]
) -> None:
    opt = optimizer(annotate(llama, "bf16"), lr=1e-3, seed=7)
    trainer(llama, opt, tokens)(3)
    twin = copy.deepcopy(llama)
    resumed = resume(llama, opt, twin, tmp_path)
    trainer(llama, opt, tokens)(3)
    trainer(twin, resumed, tokens)(3)
    assert_same_parameters(llama, twin)


def test_the_seed_matters_and_repeats(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    annotate(llama, "bf16")
    same, other = copy.deepcopy(llama), copy.deepcopy(llama)
    for model, seed in ((llama, 1), (same, 1), (other, 2)):
        trainer(model, optimizer(model, seed=seed), tokens)(2)
    assert_same_parameters(llama, same)
    assert any(not torch.equal(a, b) for a, b in zip(llama.parameters(), other.parameters(), strict=True))


def test_equal_parameters_round_differently() -> None:
    first, second = vector(), vector()
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    Optimizer([first, second]).step()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_train_on_alike(llama: LlamaForCausalLM, tokens: Tensor, clone: Callable[..., object]) -> None:
    opt = optimizer(annotate(llama, "bf16"))
    trainer(llama, opt, tokens)(2)
    twin, twin_opt = clone((llama, opt))  # type: ignore[misc]
    trainer(llama, opt, tokens)(2)
    trainer(twin, twin_opt, tokens)(2)
    assert_same_parameters(llama, twin)


def test_a_state_of_torchs_adamw_is_taken_over(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    twin = copy.deepcopy(llama)
    torchs = torch.optim.AdamW(twin.parameters())
    trainer(twin, torchs, tokens)(3)
    llama.load_state_dict(twin.state_dict())
    opt = optimizer(llama, lr=7.0)
    opt.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert trainer(llama, opt, tokens)(3) == pytest.approx(trainer(twin, torchs, tokens)(3), rel=1e-5)
    assert opt.param_groups[0]["rounding"] == "stochastic"


def test_hooks_on_loading_are_kept(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    opt = optimizer(annotate(llama, "bf16"))
    trainer(llama, opt, tokens)(1)
    seen: list[torch.dtype] = []

    def before(_: torch.optim.Optimizer, state: dict[str, object]) -> dict[str, object]:
        changed = copy.deepcopy(state)
        changed["param_groups"][0]["lr"] = 0.125  # type: ignore[index]
        return changed

    opt.register_load_state_dict_pre_hook(before)
    opt.register_load_state_dict_post_hook(lambda o: seen.extend(s["exp_avg"].dtype for s in o.state.values()))
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.125
    assert set(seen) == {torch.float32}


# ------------------------------------------------------------------------------------------------------ as an optimizer


def test_groups_follow_the_roles(llama: LlamaForCausalLM) -> None:
    opt = optimizer(annotate(llama, "bf16"), weight_decay=0.1, no_decay="norm, bias")
    decayed, exempt = opt.param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert exempt["param_names"] == [name for name, _ in llama.named_parameters() if "norm" in name]
    assert decayed["rounding"] == exempt["rounding"] == "stochastic"


@pytest.mark.parametrize("policy", ["bf16", "bf16-islands", "bf16-8bit", "int8", "fp32"])
def test_the_class_asks_each_parameters_policy(policy: str, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """`Optimizer(model.parameters())` is `optimizer(model)`, also of a deep copy; what is given wins."""
    annotate(llama, policy)
    twins = [copy.deepcopy(llama) for _ in range(2)]
    made = [optimizer(llama), Optimizer(twins[0].parameters()), Optimizer([*twins[1].named_parameters()])]

    def choices(opt: Optimizer) -> list[tuple[object, ...]]:
        return [(g["rounding"], g["optimizer_state"], len(g["params"])) for g in opt.param_groups]

    assert choices(made[0]) == choices(made[1]) == choices(made[2])
    for model, opt in zip((llama, *twins), made, strict=True):
        trainer(model, opt, tokens)(2)
    for twin in twins:
        assert_same_parameters(llama, twin)
    given = Optimizer(twins[0].parameters(), rounding="nearest", optimizer_state="float32")
    assert choices(given) == [("nearest", "float32", len(list(twins[0].parameters())))]


def test_a_group_that_becomes_several_keeps_its_options(llama: LlamaForCausalLM) -> None:
    annotate(llama, "bf16-8bit")
    first, second = llama.model.layers
    opt = Optimizer([{"params": first.named_parameters(), "lr": 0.5, "weight_decay": 0.25}], lr=0.125)
    opt.add_param_group({"params": second.named_parameters(), "rounding": "nearest"})
    assert [
        (group["lr"], group["weight_decay"], group["rounding"], group["optimizer_state"]) for group in opt.param_groups
    ] == [
        (0.5, 0.25, "stochastic", "8bit"),
        (0.5, 0.25, "stochastic", "float32"),
        (0.125, 1e-2, "nearest", "8bit"),
        (0.125, 1e-2, "nearest", "float32"),
    ]
    assert opt.param_groups[1]["param_names"] == ["input_layernorm.weight", "post_attention_layernorm.weight"]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [*nn.Linear(2, 2).named_parameters(), *second.named_parameters()]})
    assert len(opt.param_groups) == 4  # none of it
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        opt.add_param_group({"params": [("number", 1.0)]})


def test_an_optimizer_made_before_its_policy_loses_no_update(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    opt = optimizer(llama, lr=1e-5, weight_decay=0.0)
    annotate(llama, "bf16")
    watched = fxopt.monitor(opt, llama)
    trainer(llama, opt, tokens)(3)
    assert all(row.rounding == "stochastic" and row.lost < 0.05 for row in watched.rows)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    trained, frozen, later = vector(), vector().requires_grad_(False), vector()
    opt = Optimizer([trained, frozen])
    trained.grad = torch.ones_like(trained)
    opt.step()
    assert not torch.all(trained == 1) and torch.all(frozen == 1)
    assert list(opt.state) == [trained]
    opt.add_param_group({"params": [later], "lr": 0.5})
    later.grad = torch.ones_like(later)
    trained.grad = None
    opt.step()
    assert torch.all((later - 0.5).abs() < 0.02)
    assert [opt.state[parameter]["step"].item() for parameter in (trained, later)] == [1.0, 1.0]


def test_a_closure_is_called_with_gradients() -> None:
    parameter = vector(dtype=torch.float32)
    opt = Optimizer([parameter])

    def closure() -> Tensor:
        opt.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure) == 4096  # type: ignore[arg-type]
    assert torch.all(parameter < 1)


def test_schedulers_drive_it(llama: LlamaForCausalLM) -> None:
    opt = optimizer(llama, lr=1.0)
    warmup = get_cosine_schedule_with_warmup(opt, num_warmup_steps=4, num_training_steps=8)
    opt.step()
    warmup.step()
    assert opt.param_groups[0]["lr"] == 0.25
    opt = optimizer(llama, lr=torch.tensor(1.0))
    halving = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    opt.step()
    halving.step()
    assert float(opt.param_groups[0]["lr"]) == 0.5


@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16", "bf16-islands", "bf16-8bit", "int8"])
def test_trainer_takes_it_and_resumes_bit_by_bit(
    policy: str, llama: LlamaForCausalLM, tokens: Tensor, tmp_path: Path
) -> None:
    opt = optimizer(annotate(llama, policy), lr=1e-3)
    before = copy.deepcopy(llama)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(tmp_path, max_steps=4, save_steps=2, report_to=[], use_cpu=True, logging_steps=1)
    Trainer(llama, arguments, train_dataset=rows, optimizers=(opt, None)).train()
    with pytest.raises(AssertionError):
        assert_same_parameters(llama, before)
    resumed = Trainer(before, arguments, train_dataset=rows, optimizers=(optimizer(before, lr=1e-3), None))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_parameters(llama, before)


def test_accelerate_prepares_it(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt = accelerator.prepare(llama, optimizer(annotate(llama, "bf16"), lr=1e-2))
    losses = trainer(model, opt, tokens)(5)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_nothing_to_train_is_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no parameter that requires a gradient"):
        optimizer(llama.requires_grad_(False))


def test_float16_is_refused_by_name(llama: LlamaForCausalLM) -> None:
    llama.model.norm.half()
    with pytest.raises(TypeError, match=r"parameter 'model\.norm\.weight' is torch\.float16"):
        optimizer(llama)
    llama.model.norm.requires_grad_(False)
    opt = optimizer(llama)
    llama.model.norm.requires_grad_(True)
    llama.model.norm.weight.grad = torch.zeros_like(llama.model.norm.weight)
    with pytest.raises(TypeError, match=r"parameter 'model\.norm\.weight' is torch\.float16"):
        opt.step()
    assert not opt.state


def test_a_quantized_parameter_is_refused_by_name() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig())
    model[0].weight.requires_grad_(True)
    with pytest.raises(TypeError, match=r"parameter '0\.weight' is a Int8Tensor, not a plain tensor"):
        optimizer(model)
    model[0].weight.requires_grad_(False)
    optimizer(model)


def test_a_sparse_gradient_is_refused_before_any_change() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4))
    opt = optimizer(model)
    model(torch.tensor([1])).sum().backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"the gradient of parameter '0\.weight' is sparse"):
        opt.step()
    assert_same_parameters(model, before)
    assert not opt.state


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1e-8), ("weight_decay", -0.1), ("rounding", "up"), ("seed", 0.5)],
)
def test_an_option_out_of_range_is_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"fxopt.optimizer: {option}="):
        Optimizer([vector()], **{option: value})  # type: ignore[arg-type]


def test_an_unknown_role_is_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"no_decay='nrom': .*roles: norm, embedding"):
        optimizer(llama, no_decay="nrom")


def test_two_parameters_in_one_memory_are_refused() -> None:
    """`assign=True` gives each name of a tied weight a parameter of its own, and each would be updated."""
    model = tiny_llama(tie_word_embeddings=True)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"embed_tokens.*'lm_head.weight' lie in the same memory.*tie_weights"):
        fxopt.optimizer(model, lr=1e-3)
    model.tie_weights()
    fxopt.optimizer(model, lr=1e-3)
    frozen = tiny_llama(tie_word_embeddings=True)
    frozen.load_state_dict(frozen.state_dict(), assign=True)
    frozen.lm_head.requires_grad_(False)
    fxopt.optimizer(frozen, lr=1e-3)
