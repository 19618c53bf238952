"""TRL's trainers compute log-probabilities by themselves, from the backbone's output: everything below is fused."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import fxopt
from tests.stacks.runs import SHORT, assert_alike, both, losses_of
from tests.tiny_models import SIZES, tiny_llama

trl = pytest.importorskip("trl", "1.15")
datasets = pytest.importorskip("datasets")


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{number}": number for number in range(4, 307)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def words(start: int, count: int) -> str:
    return " ".join(f"w{4 + (start * 7 + place * 13) % 300}" for place in range(count))


TEXTS = [{"text": words(row, 20 + row % 5)} for row in range(8)]
COMPLETIONS = [{"prompt": words(row, 8), "completion": " " + words(row + 3, 12)} for row in range(8)]
PREFERENCES = [
    {"prompt": words(row, 6), "chosen": " " + words(row + 3, 8), "rejected": " " + words(row + 5, 8)}
    for row in range(8)
]
LIKED = [{**row, "label": number % 2 == 0} for number, row in enumerate(COMPLETIONS)]
PROMPTS = [{"prompt": words(row, 6)} for row in range(8)]


def settings(folder: Any, **options: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), **SHORT, "bf16": False, "gradient_checkpointing": False, **options}


def sft(model: nn.Module, rows: list[dict[str, Any]], folder: Any, **options: Any) -> Any:
    arguments = trl.SFTConfig(**settings(folder, max_length=32, **options))
    data = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer())


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (TEXTS, {}),
        (TEXTS, {"packing": True}),
        (COMPLETIONS, {"completion_only_loss": True}),
        (TEXTS, {"loss_type": "dft"}),
        (TEXTS, {"gradient_checkpointing": True}),
    ],
    ids=["text", "packing", "completion only", "dft", "checkpointing"],
)
def test_sft(rows, options, tmp_path):
    plain, optimized = both(lambda model: losses_of(sft(model, rows, tmp_path, **options)))
    assert_alike(plain, optimized, checkpointed="gradient_checkpointing" in options)
    assert optimized.report.optimized == {"model": 2}
    assert "add_fused_lm_head" in optimized.report.forward_replaced


def test_sft_of_a_model_that_is_optimized_after_its_trainer_was_made(tmp_path):
    def train(model: nn.Module) -> list[float]:
        if is_optimized := hasattr(model, "_fxopt_entry"):
            fxopt.restore(model)
        trainer = sft(model, TEXTS, tmp_path)
        if is_optimized:
            fxopt.optimize(trainer.model, "fp32")
        return losses_of(trainer)

    plain, optimized = both(train)
    assert_alike(plain, optimized)


def train_dpo(model: nn.Module, folder: Any) -> list[float]:
    arguments = trl.DPOConfig(**settings(folder))
    data = datasets.Dataset.from_list(PREFERENCES)
    return losses_of(trl.DPOTrainer(model, None, arguments, train_dataset=data, processing_class=tokenizer()))


def train_kto(model: nn.Module, folder: Any) -> list[float]:
    arguments = trl.KTOConfig(**settings(folder))
    data = datasets.Dataset.from_list(LIKED)
    return losses_of(trl.KTOTrainer(model, None, arguments, train_dataset=data, processing_class=tokenizer()))


def train_grpo(model: nn.Module, folder: Any) -> list[float]:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 17) for ids in completion_ids]

    options = {"max_completion_length": 6, "num_generations": 4, "beta": 0.0, "max_steps": 1}
    arguments = trl.GRPOConfig(**settings(folder, **options))
    data = datasets.Dataset.from_list(PROMPTS)
    return losses_of(trl.GRPOTrainer(model, reward, arguments, train_dataset=data, processing_class=tokenizer()))


@pytest.mark.parametrize("train", [train_dpo, train_kto, train_grpo])
def test_preferences_and_reinforcement(train, tmp_path):
    """Their models are saved first: DPO and KTO load the one that they compare with."""

    def of_folder(model: nn.Module) -> list[float]:
        model.save_pretrained(tmp_path / "base")
        model.config._name_or_path = str(tmp_path / "base")
        return train(model, tmp_path)

    plain, optimized = both(of_folder)
    assert_alike(plain, optimized, checkpointed=False)


def reward_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)
    return LlamaForSequenceClassification(config).train()


def test_a_reward_model(tmp_path):
    def train(model: nn.Module) -> list[float]:
        data = datasets.Dataset.from_list([{"chosen": r["chosen"], "rejected": r["rejected"]} for r in PREFERENCES])
        arguments = trl.RewardConfig(**settings(tmp_path))
        return losses_of(trl.RewardTrainer(model, arguments, train_dataset=data, processing_class=tokenizer()))

    plain, optimized = both(train, reward_model)
    assert_alike(plain, optimized, reads_logits=optimized.report.logits_computed > 0)
    assert optimized.report.optimized[""] == 2


def test_the_policys_optimizer_in_a_trainer_of_trl(tmp_path):
    from fxopt.integrations.transformers import PolicyOptimizerMixin

    class Trainer(PolicyOptimizerMixin, trl.SFTTrainer):  # type: ignore[misc]
        pass

    model = fxopt.optimize(tiny_llama(), "bf16")
    arguments = trl.SFTConfig(**settings(tmp_path, max_length=32))
    data = datasets.Dataset.from_list(TEXTS)
    losses_of(Trainer(model, arguments, train_dataset=data, processing_class=tokenizer()))
    report = fxopt.report(model)
    assert report.optimizer.startswith("fxopt.") and not report.optimizer_warning
