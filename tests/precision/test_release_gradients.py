"""Updates inside backward: the same training without gradients, and a refusal where it would not be."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

import fxopt
from fxopt.precision.annotate import annotate
from fxopt.precision.optimizer import Optimizer, optimizer
from tests.training import assert_same_parameters


def train(model: nn.Module, opt: torch.optim.Optimizer, tokens: Tensor, num_steps: int, **schedule: Any) -> list[float]:
    scheduler = get_cosine_schedule_with_warmup(opt, 2, num_steps) if schedule else None
    losses = []
    for _ in range(num_steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_the_same_training_bit_by_bit(llama: LlamaForCausalLM, tokens: Tensor, policy: str, kind: Any) -> None:
    """Tied embeddings, which get their gradient from two places, and a schedule included."""
    annotate(llama, policy)
    twin = copy.deepcopy(llama)
    released = optimizer(llama, lr=1e-3, kind=kind, release_gradients=True)
    train(llama, released, tokens, 4, schedule=True)
    train(twin, optimizer(twin, lr=1e-3, kind=kind), tokens, 4, schedule=True)
    assert_same_parameters(llama, twin)


def test_gradients_do_not_exist_together(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """While backward runs, at most one gradient is alive; afterwards none."""
    opt = optimizer(annotate(llama, "bf16"), release_gradients=True)
    most = 0

    def count(module: nn.Module, *_: object) -> None:
        nonlocal most
        most = max(most, sum(parameter.grad is not None for parameter in llama.parameters()))

    for layer in llama.model.layers:
        layer.register_full_backward_hook(count)
    llama(input_ids=tokens, labels=tokens).loss.backward()
    assert most <= 1
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert all(state["step"] == 1 for state in opt.state.values())


def test_an_optimized_model_trains_alike(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = fxopt.optimize(llama, "bf16", prove=False)
    twin = copy.deepcopy(model)
    train(model, optimizer(model, lr=1e-3, release_gradients=True), tokens, 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    train(twin, optimizer(twin, lr=1e-3), tokens, 3)
    assert_same_parameters(model, twin)


def test_checkpointing_trains_alike(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    annotate(llama, "bf16").train()
    twin = copy.deepcopy(llama)
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    train(llama, optimizer(llama, lr=1e-3, release_gradients=True), tokens, 3)
    train(twin, optimizer(twin, lr=1e-3), tokens, 3)
    assert_same_parameters(llama, twin)


def test_accumulation_is_refused_and_has_its_context(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    annotate(llama, "bf16")
    twin = copy.deepcopy(llama)
    opt, right = optimizer(llama, lr=1e-3, release_gradients=True), optimizer(twin, lr=1e-3)

    def backward(model: nn.Module, row: int) -> None:
        model(input_ids=tokens[row : row + 1], labels=tokens[row : row + 1]).loss.backward()

    for _ in range(2):
        with opt.no_update():
            backward(llama, 0)
        backward(llama, 1)
        opt.step()
        for row in (0, 1):
            backward(twin, row)
        right.step()
        right.zero_grad()
    assert_same_parameters(llama, twin)

    backward(llama, 0)
    with pytest.raises(RuntimeError, match=r"with optimizer\.no_update\(\):"):
        backward(llama, 1)
    opt.zero_grad()  # starts over
    backward(llama, 0)
    opt.step()


def test_step_updates_what_backward_left() -> None:
    """A gradient that a caller sets by hand, as torch.distributed.checkpoint does, or that of a thawed parameter."""
    parameter, right = (nn.Parameter(torch.ones(4)) for _ in range(2))
    for twin, released in ((parameter, True), (right, False)):
        opt = Optimizer([twin.requires_grad_(False)], lr=0.1, release_gradients=released)
        twin.requires_grad_(True)
        twin.square().sum().backward()
        opt.step()
    assert torch.equal(parameter, right) and not torch.all(parameter == 1)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_release_too(llama: LlamaForCausalLM, tokens: Tensor, clone: Callable[..., Any]) -> None:
    opt = optimizer(annotate(llama, "bf16"), lr=1e-3, release_gradients=True)
    train(llama, opt, tokens, 2)
    twin, twin_opt = clone((llama, opt))
    train(llama, opt, tokens, 2)
    loss = twin(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert all(parameter.grad is None for parameter in twin.parameters())
    twin_opt.step()
    train(twin, twin_opt, tokens, 1)
    assert_same_parameters(llama, twin)


def test_resume_continues_bit_by_bit(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    options: dict[str, Any] = {"release_gradients": True, "clip_grad_norm": 0.5, "clip_by": "previous"}
    opt = optimizer(annotate(llama, "bf16"), lr=1e-3, **options)
    train(llama, opt, tokens, 3)
    twin = copy.deepcopy(llama)
    resumed = optimizer(twin, lr=5.0, **options)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(llama, opt, tokens, 3)
    train(twin, resumed, tokens, 3)
    assert_same_parameters(llama, twin)


def test_a_later_optimizer_takes_over() -> None:
    parameter = nn.Parameter(torch.ones(4))
    first = Optimizer([parameter], lr=0.5, release_gradients=True)
    second = Optimizer([parameter], lr=0.1, release_gradients=True)
    parameter.sum().backward()
    assert not first.state and second.state[parameter]["step"] == 1


def test_hooks_do_not_keep_the_optimizer() -> None:
    parameter = nn.Parameter(torch.ones(4))
    opt = Optimizer([parameter], release_gradients=True)
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None
    parameter.sum().backward()
    assert parameter.grad is not None and torch.all(parameter == 1)


def test_groups_added_later_release_too() -> None:
    first, later = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = Optimizer([first], lr=0.1, release_gradients=True)
    opt.add_param_group({"params": [later], "lr": 0.5})
    (first.sum() + later.sum()).backward()
    assert first.grad is None and later.grad is None
    assert later[0].item() == pytest.approx(0.495) and first[0].item() == pytest.approx(0.899)


def test_a_closure_releases() -> None:
    parameter = nn.Parameter(torch.ones(4))
    opt = Optimizer([parameter], lr=0.1, release_gradients=True)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure) == 4.0  # type: ignore[arg-type]
    assert opt.state[parameter]["step"] == 1


@pytest.mark.parametrize("policy", ["bf16", "int8"])
def test_trainer_takes_it(policy: str, llama: LlamaForCausalLM, tokens: Tensor, tmp_path: Path) -> None:
    annotate(llama, policy)
    twin = copy.deepcopy(llama)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(tmp_path, max_steps=3, report_to=[], use_cpu=True, max_grad_norm=0.0, save_steps=50)
    for model, released in ((llama, True), (twin, False)):
        opt = optimizer(model, lr=1e-3, release_gradients=released)
        Trainer(model, arguments, train_dataset=rows, optimizers=(opt, None)).train()
    assert_same_parameters(llama, twin)


def test_a_model_that_was_moved_releases_again(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """What int8 weights are moved to has no hooks: the next step updates them, and they are hooked anew."""
    opt = optimizer(annotate(llama, "int8"), release_gradients=True)
    llama._apply(torch.clone)  # as llama.to(another device) does
    missing = []
    for _ in range(2):
        llama(input_ids=tokens, labels=tokens).loss.backward()
        missing.append(sum(parameter.grad is not None for parameter in llama.parameters()))
        opt.step()
        opt.zero_grad()
    assert missing[0] > 0 and missing[1] == 0
    assert {float(state["step"]) for state in opt.state.values()} == {2.0}


# ------------------------------------------------------------------------------------------------------------- clipping


def two(released: bool, **options: Any) -> tuple[list[nn.Parameter], Optimizer]:
    """SGD with a learning rate of 1 from zero: minus the clipped gradient is what the parameter shows."""
    params = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    return params, Optimizer(params, lr=1.0, weight_decay=0.0, kind="sgd", release_gradients=released, **options)


def backward(params: list[nn.Parameter], norms: tuple[float, float]) -> None:
    """Gradients of these norms."""
    sum(norm / 2 * parameter.sum() for parameter, norm in zip(params, norms, strict=True)).backward()  # type: ignore[union-attr]


def moved(params: list[nn.Parameter]) -> list[float]:
    lengths = [parameter.norm().item() for parameter in params]
    for parameter in params:
        parameter.data.zero_()
    return lengths


def test_clipping_by_the_global_norm() -> None:
    params, opt = two(released=False, clip_grad_norm=1.0)
    backward(params, (3.0, 4.0))
    opt.step()
    assert moved(params) == pytest.approx([0.6, 0.8], rel=1e-5)
    opt.zero_grad()
    backward(params, (0.3, 0.4))
    opt.step()
    assert moved(params) == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("released", [True, False])
def test_clipping_by_the_parameters_norm(released: bool) -> None:
    params, opt = two(released, clip_grad_norm=1.0, clip_by="parameter")
    backward(params, (3.0, 0.4))
    opt.step()
    assert moved(params) == pytest.approx([1.0, 0.4], rel=1e-5)


@pytest.mark.parametrize("released", [True, False])
def test_clipping_by_the_previous_norm(released: bool) -> None:
    params, opt = two(released, clip_grad_norm=1.0, clip_by="previous")
    for norms, expected in (
        ((3.0, 0.4), [1.0, 0.4]),  # the first step: by the parameter's
        ((3.0, 4.0), [3.0 / 9.16**0.5, 4.0 / 9.16**0.5]),
        ((0.3, 0.4), [0.06, 0.08]),
        ((3.0, 4.0), [3.0, 4.0]),
    ):
        backward(params, norms)
        opt.step()
        opt.zero_grad()
        assert moved(params) == pytest.approx(expected, rel=1e-4)


def test_clipping_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="clip_by='previous'"):
        two(released=True, clip_grad_norm=1.0)
    with pytest.raises(ValueError, match="clip_by='norm' is none of global, previous, parameter"):
        two(released=True, clip_by="norm")
    with pytest.raises(ValueError, match="clip_grad_norm=0 must be a number above 0"):
        two(released=False, clip_grad_norm=0)
