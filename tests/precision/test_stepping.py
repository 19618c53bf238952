"""Another optimizer's first step warns, once, before it loses what the policy keeps; ours and harmless ones do not."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torchs
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import fxopt
from fxopt.precision.annotate import annotate
from fxopt.precision.optimizer import Optimizer, optimizer
from fxopt.precision.stepping import stepped_by

LOST = "bfloat16 parameters to nearest, which loses most of their updates"


def step(model: Any, opt: torch.optim.Optimizer, tokens: Tensor) -> list[str]:
    """The warnings of a training step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(input_ids=tokens, labels=tokens).loss.backward()
        opt.step()
        opt.zero_grad()
    return [str(warning.message) for warning in caught if "rounds stochastically" in str(warning.message)]


def test_one_warning_before_anything_is_lost(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = annotate(llama, "bf16")
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
    assert stepped_by(model) is None
    model(input_ids=tokens, labels=tokens).loss.backward()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=LOST) as raised:
            opt.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = str(raised.value)
    for part in ("torch.optim.AdamW steps a LlamaForCausalLM", "'bf16'", "1.518 instead of 0.870",
                 "optimizer = fxopt.optimizer(model, lr=...)", "PolicyOptimizerMixin"):  # fmt: skip
        assert part in text
    assert step(model, opt, tokens) == []  # it was said
    (again,) = step(model, torch.optim.SGD(model.parameters(), lr=1e-5), tokens)
    assert again.startswith("torch.optim.SGD steps")
    found = stepped_by(model)
    assert found is not None and found.optimizer == "torch.optim.AdamW, torch.optim.SGD"
    assert found.warning == f"{text}\n{again}"


class WithMasters(torch.optim.SGD):
    master_weights = True

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.master_weights = True


def torchaos(params: Any, stochastic: bool) -> Any:
    from torchao.optim import _AdamW

    return _AdamW(params, lr=1e-5, bf16_stochastic_round=stochastic)


HARMLESS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "ours": ("bf16", lambda model: optimizer(model, lr=1e-5)),
    "the class": ("int8", lambda model: Optimizer(model.parameters(), lr=1e-5)),
    "fp32": ("fp32", lambda model: torch.optim.AdamW(model.parameters())),
    "mixed": ("mixed", lambda model: torch.optim.AdamW(model.parameters())),
    "float32 islands alone": (
        "bf16-islands",
        lambda model: torch.optim.AdamW([p for p in model.parameters() if p.dtype == torch.float32]),
    ),
    "masters": ("bf16", lambda model: WithMasters(model.parameters(), lr=1e-5)),
    "torchao, stochastic": ("bf16", lambda model: torchaos(model.parameters(), True)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_loses_nothing_is_left_alone(name: str, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    policy, build = HARMLESS[name]
    model = annotate(llama, policy)
    opt = build(model)
    if name.startswith("torchao"):  # whose step compiles for half a minute; without gradients it has nothing to do
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.step()
    else:
        assert step(model, opt, tokens) == []
    found = stepped_by(model)
    assert found is not None and found.warning == ""
    assert found.optimizer.endswith(type(opt).__qualname__)


def test_torchaos_that_rounds_to_nearest_is_told_apart(llama: LlamaForCausalLM) -> None:
    model = annotate(llama, "bf16")
    opt = torchaos(model.parameters(), False)
    with pytest.warns(UserWarning, match=f"torchao.*_AdamW steps.*{LOST}"):
        opt.step()


def test_frozen_weights_lose_nothing(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = annotate(llama, "bf16")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert step(adapted, torch.optim.AdamW(adapted.parameters()), tokens) == []
    annotate(adapted, "bf16")
    assert len(step(adapted, torch.optim.AdamW(adapted.parameters()), tokens)) == 1


def test_a_policy_that_asks_for_nearest_gets_it(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    from dataclasses import replace

    preset = fxopt.Policy.named("bf16")
    model = annotate(llama, replace(preset, default=replace(preset.default, rounding="nearest")))
    assert step(model, torch.optim.AdamW(model.parameters()), tokens) == []


def test_fused_sgd_says_what_it_does(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = annotate(llama, "bf16")
    (text,) = step(model, torch.optim.SGD(model.parameters(), lr=1e-5, fused=True), tokens)
    assert "fused SGD leaves" in text and "bfloat16 parameters as they are" in text


@pytest.mark.parametrize("fused", [False, True])
def test_states_of_int8_weights(fused: bool, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = annotate(llama, "int8")
    (text,) = step(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused), tokens)
    assert "states of 15 int8 weights are bfloat16" in text


def test_of_several_optimizers_each_is_told(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = annotate(llama, "bf16")
    first, *others = model.parameters()
    step(model, torch.optim.SGD(others, lr=1e-3), tokens)
    step(model, Optimizer([first], lr=1e-3), tokens)
    found = stepped_by(model)
    assert found is not None and found.optimizer == "torch.optim.SGD, fxopt.precision.optimizer.Optimizer"
    assert "torch.optim.SGD steps" in found.warning


def test_copies_and_pickles_are_watched(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = annotate(llama, "bf16")
    step(model, torch.optim.AdamW(model.parameters()), tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert stepped_by(twin) is None
        assert len(step(twin, torch.optim.AdamW(twin.parameters()), tokens)) == 1
        assert {p.fxopt_precision for p in twin.parameters()} == {p.fxopt_precision for p in model.parameters()}


def test_wrappers_are_seen_as_what_is_inside(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    from accelerate import Accelerator

    model = annotate(llama, "bf16")
    wrapped = Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(model.parameters()))
    (text,) = step(model, wrapped, tokens)
    assert text.startswith("torch.optim.AdamW steps")


def test_annotating_after_the_first_step_is_seen(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    opt = torch.optim.AdamW(llama.parameters())
    annotate(llama, "fp32")
    assert step(llama, opt, tokens) == []
    annotate(llama, "bf16")
    opt.state.clear()
    assert len(step(llama, opt, tokens)) == 1


def test_the_hook_goes_with_the_last_model() -> None:
    gc.collect()
    before = len(torchs._global_optimizer_pre_hooks)
    models = [annotate(nn.Linear(2, 2), "bf16") for _ in range(2)]
    with_hook = len(torchs._global_optimizer_pre_hooks)
    assert with_hook == max(before, 1)
    gc.disable()
    try:
        del models
        assert len(torchs._global_optimizer_pre_hooks) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", ["bf16", "int8"])
def test_the_trainer_alone(policy: str, llama: LlamaForCausalLM, tokens: Tensor, tmp_path: Path) -> None:
    """`annotate` and no optimizer."""
    model = annotate(llama, policy)
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=rows)
    with pytest.warns(UserWarning, match="torch.optim.AdamW steps a LlamaForCausalLM"):
        trainer.train()
