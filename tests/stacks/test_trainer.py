"""transformers' Trainer, and what people switch on there: the same losses and gradients, every fusion, no logits."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import fxopt
from tests.stacks.runs import SHORT, assert_alike, both, losses_of
from tests.tiny_models import tiny_batch, tiny_llama


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, vary: bool = False) -> None:
        batch = tiny_batch(num_rows=16, length=20)
        self.rows = [
            {name: value[row, : 20 - (row % 5 if vary else 0)] for name, value in batch.items()} for row in range(16)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.rows[row]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }


def trainer_of(model: nn.Module, folder: Any, trainer: dict[str, Any] | None = None, **arguments: Any) -> Trainer:
    options = {"train_dataset": Rows(arguments.pop("vary", False)), "data_collator": collate, **(trainer or {})}
    return Trainer(model, TrainingArguments(str(folder), **SHORT | arguments), **options)


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


EVALUATION = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize(
    ("arguments", "trainer", "expected"),
    [
        ({}, {}, {"loss_is_fused": True}),
        ({"vary": True, "gradient_accumulation_steps": 2}, {}, {"loss_is_fused": True}),
        ({"vary": True, "train_sampling_strategy": "group_by_length"}, {}, {"loss_is_fused": True}),
        ({"gradient_checkpointing": True}, {}, {"loss_is_fused": True, "checkpointed": True}),
        ({"label_smoothing_factor": 0.1}, {}, {"reads_logits": True}),
        ({}, {"compute_loss_func": own_loss}, {"reads_logits": True}),
        (EVALUATION, {"eval_dataset": Rows()}, {"loss_is_fused": True}),
        (
            EVALUATION,
            {"eval_dataset": Rows(), "compute_metrics": lambda seen: {"size": float(seen.predictions.sum())}},
            {"loss_is_fused": True, "reads_logits": True},
        ),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, {}, {"loss_is_fused": True}),
    ],
    ids=[
        "plain",
        "accumulation",
        "group by length",
        "checkpointing",
        "label smoothing",
        "compute_loss_func",
        "evaluation",
        "metrics",
        "torch_compile",
    ],
)
def test_a_run_is_that_of_the_plain_model(arguments, trainer, expected, tmp_path):
    plain, optimized = both(lambda model: losses_of(trainer_of(model, tmp_path, trainer, **dict(arguments))))
    assert_alike(plain, optimized, **expected)
    assert optimized.report.under_compiler == (2 if "torch_compile" in arguments else 0)
    if "torch_compile" in arguments:
        assert "from inside torch.compile" in str(optimized.report)


def test_neftune_is_trained_through(tmp_path):
    """Its hook draws noise in the embedding: losses are others each time."""
    model = fxopt.optimize(tiny_llama(), "fp32")
    assert len(losses_of(trainer_of(model, tmp_path, neftune_noise_alpha=5.0))) == 2
    report = fxopt.report(model)
    assert report.hits["linear_cross_entropy"] == 1 and report.hits["rms_norm"] == 5 and not report.fallbacks


def test_the_best_model_is_loaded_and_evaluates_as_it_did(tmp_path):
    model = fxopt.optimize(tiny_llama(), "int8")
    trainer = trainer_of(
        model,
        tmp_path,
        {"eval_dataset": Rows(), "optimizers": (fxopt.optimizer(model, lr=1e-3), None)},
        **EVALUATION,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    losses_of(trainer)
    assert abs(trainer.evaluate()["eval_loss"] - trainer.state.best_metric) < 1e-3
    assert fxopt.report(model).logits_computed == 0


def test_a_run_goes_on_bit_by_bit_from_a_checkpoint(tmp_path):
    states = []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        model = fxopt.optimize(tiny_llama(), "bf16")
        optimizers = (fxopt.optimizer(model, lr=1e-3), None)
        trainer = trainer_of(model, tmp_path, {"optimizers": optimizers}, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_autocast_beside_a_policy_is_told(tmp_path):
    model = fxopt.optimize(tiny_llama(), "bf16")
    trainer = trainer_of(model, tmp_path, {"optimizers": (fxopt.optimizer(model), None)}, bf16=True)
    with pytest.warns(UserWarning, match=r"autocast.*bf16=False"):
        trainer.train()
    report = fxopt.report(model)
    assert report.autocast and "under autocast" in str(report)
    assert report.logits_computed == 0 and report.hits["linear_cross_entropy"] == 1
    assert report.forward_replaced.startswith("wrapped by accelerate.")


@pytest.mark.parametrize("policy", ["bf16", "int8"])
def test_the_trainers_own_optimizer_is_told(policy, tmp_path):
    """`fxopt.optimize` alone: it updates as fxopt's optimizer does, or says that it does not."""
    model = fxopt.optimize(tiny_llama(), policy)
    with pytest.warns(UserWarning, match=r"AdamW(.|\n)*fxopt\.optimizer\(model"):
        trainer_of(model, tmp_path).train()
    report = fxopt.report(model)
    assert "AdamW" in report.optimizer and "fxopt.optimizer" in str(report)
