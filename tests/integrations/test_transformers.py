"""The Trainer's log says what precision costs, and its arguments make the policy's optimizer."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxopt
from fxopt.integrations.transformers import MonitorCallback, PolicyOptimizerMixin, optimizer_cls_and_kwargs
from fxopt.integrations.transformers import Trainer as PolicyTrainer
from tests.training import assert_same_parameters


@pytest.mark.parametrize("own", [True, False])
def test_the_log_has_the_monitors_lines(own: bool, tmp_path: Path) -> None:
    """With fxopt's optimizer over bfloat16, and with the Trainer's own under autocast."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    tokens = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizers = (None, None)
    if own:
        optimizers = (fxopt.optimizer(fxopt.annotate(model, "bf16"), lr=1e-5), None)
    callback = MonitorCallback(save=tmp_path / "monitor.json")
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, max_steps=3, logging_steps=1, report_to=[], use_cpu=True, bf16=not own),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizers=optimizers,  # type: ignore[arg-type]
        callbacks=[callback],
    )
    trainer.train()
    assert callback.monitor is not None
    lines = [line for line in callback.monitor.summary() if line.startswith("rounding/0/linear/")]
    assert len(lines) == (2 if own else 3)  # a cast is measured where there is one
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(set(lines) <= set(entry) for entry in logged)
    entry = json.loads((tmp_path / "monitor.json").read_text())["rows"]
    assert {row["steps"] for row in entry} == {3}


# ----------------------------------------------------------------------------------------------- the policy's optimizer


def model_of(policy: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return fxopt.annotate(model, policy)  # type: ignore[return-value]


@pytest.fixture
def dataset() -> Any:
    tokens = torch.randint(0, 96, (24, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    of_all = {"report_to": [], "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "no"}
    return TrainingArguments(str(folder), **{**of_all, "learning_rate": 1e-3, "disable_tqdm": True, **options})


def groups(opt: Any) -> list[tuple[Any, ...]]:
    names = ("lr", "betas", "eps", "weight_decay", "kind", "rounding", "optimizer_state")
    return [(*(group[name] for name in names), len(group["params"])) for group in opt.param_groups]


@pytest.mark.parametrize("policy", ["bf16", "bf16-8bit", "int8"])
def test_all_ways_to_the_policys_optimizer_train_alike(policy: str, dataset: Any, tmp_path: Path) -> None:
    """By the mixin, by the class with the Trainer's own groups, and by `fxopt.optimizer`; the norms do not decay."""
    options = {"weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-7}
    models = [model_of(policy) for _ in range(3)]
    of_arguments = arguments(tmp_path, **options)
    by_hand = fxopt.optimizer(models[2], lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-7, no_decay="norm")
    trainers = [
        PolicyTrainer(models[0], of_arguments, train_dataset=dataset),
        Trainer(
            models[1], of_arguments, train_dataset=dataset,
            optimizer_cls_and_kwargs=(fxopt.Optimizer, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-7}),
        ),
        Trainer(models[2], of_arguments, train_dataset=dataset, optimizers=(by_hand, None)),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounds stochastically")
        for trainer in trainers:
            trainer.train()
    assert len({tuple(groups(trainer.optimizer.optimizer)) for trainer in trainers}) == 1  # type: ignore[union-attr]
    states = {(group["rounding"], group["optimizer_state"]) for group in by_hand.param_groups}
    assert states == {("stochastic", "float32")} | ({("stochastic", "8bit")} if policy != "bf16" else set())
    for model in models[1:]:
        assert_same_parameters(models[0], model)


@pytest.mark.parametrize("policy", ["bf16", "int8"])
def test_resumed_bit_by_bit(policy: str, dataset: Any, tmp_path: Path) -> None:
    """With two micro-batches a step, whose sum is the optimizer's."""
    whole, part = model_of(policy), model_of(policy)
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    saved = arguments(tmp_path, save_strategy="steps", save_steps=2, **options)
    PolicyTrainer(whole, saved, train_dataset=dataset).train()
    trainer = PolicyTrainer(part, arguments(tmp_path, **options), train_dataset=dataset)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_parameters(whole, part)


def test_who_passes_an_optimizer_has_it(dataset: Any, tmp_path: Path) -> None:
    model = model_of("fp32")
    mine = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = PolicyTrainer(model, arguments(tmp_path), train_dataset=dataset, optimizers=(mine, None))
    assert trainer.create_optimizer() is mine
    chosen = (torch.optim.Adagrad, {"lr": 1e-2})
    trainer = PolicyTrainer(model, arguments(tmp_path), train_dataset=dataset, optimizer_cls_and_kwargs=chosen)
    assert type(trainer.create_optimizer()) is torch.optim.Adagrad


def test_optim_is_respected(dataset: Any, tmp_path: Path) -> None:
    model = model_of("bf16")

    def made(**options: Any) -> Any:
        return PolicyTrainer(model, arguments(tmp_path, **options), train_dataset=dataset).create_optimizer()

    sgd = made(optim="sgd", optim_args="momentum=0.8, nesterov=True")
    assert {(g["kind"], g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {("sgd", 0.8, True)}
    assert {group["optimizer_state"] for group in made(optim="adamw_torch_8bit").param_groups} == {"8bit"}
    with pytest.warns(UserWarning, match="takes torch's formula"):
        assert {group["kind"] for group in made(optim="adafactor").param_groups} == {"adafactor"}
    with pytest.raises(ValueError, match="optim='lion_32bit' is none"):
        made(optim="lion_32bit")
    with pytest.raises(ValueError, match="no dampening"):
        made(optim="sgd", optim_args="dampening=0.1")


def test_for_a_trainer_that_takes_no_optimizer(tmp_path: Path) -> None:
    """What FSDP makes of parameters has no precisions: what they share is among the options."""
    kind, options = optimizer_cls_and_kwargs(model_of("bf16"), arguments(tmp_path, adam_beta1=0.8))
    assert kind is fxopt.Optimizer
    assert options == {
        "lr": 1e-3, "betas": (0.8, 0.999), "eps": 1e-8, "rounding": "stochastic", "optimizer_state": "float32",
    }  # fmt: skip
    assert "optimizer_state" not in optimizer_cls_and_kwargs(model_of("bf16-8bit"), arguments(tmp_path))[1]


def test_the_ready_made_trainer_is_a_trainer() -> None:
    assert issubclass(PolicyTrainer, (PolicyOptimizerMixin, transformers.Trainer))
    assert pickle.loads(pickle.dumps(PolicyTrainer)) is PolicyTrainer


@pytest.mark.filterwarnings("ignore")
def test_trls_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    class SFT(PolicyOptimizerMixin, trl.SFTTrainer):  # type: ignore[misc,name-defined]
        pass

    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(96)}, unk_token="t0"))
    options = vars(arguments(tmp_path, weight_decay=0.1))
    taken = ("max_steps", "use_cpu", "report_to", "save_strategy", "learning_rate", "weight_decay", "disable_tqdm")
    trainer = SFT(
        model_of("bf16-8bit"),
        trl.SFTConfig(
            str(tmp_path), **{name: options[name] for name in taken}, bf16=False, gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list([{"input_ids": list(range(n, n + 12))} for n in range(16)]),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t1", eos_token="t2"),
    )  # fmt: skip
    trainer.train()
    assert [(g[3], g[6]) for g in groups(trainer.optimizer.optimizer)] == [(0.1, "8bit"), (0.0, "float32")]
