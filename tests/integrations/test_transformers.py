"""The Trainer's log says what precision costs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxopt
from fxopt.integrations.transformers import MonitorCallback


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
