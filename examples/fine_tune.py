"""One fine-tuning run of the demo, in a process of its own so that its memory can be measured.

``python examples/fine_tune.py settings.json`` reads a ``Settings``, trains, and writes ``<folder>/<variant>.json``, and
for fxopt the rewrite report and the graph diff beside it.
"""

import contextlib
import dataclasses
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from examples.quiet import silence_libraries

silence_libraries()

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fxopt
from examples.chat_data import Conversation, collator, load_conversations, prompts, tokenize
from examples.process_memory import PeakMemory, resident_bytes

Batch = dict[str, torch.Tensor]

# How each variant stores its weights, and whether it computes under bf16 autocast.
STORAGE = {"plain": torch.bfloat16, "mixed": torch.float32, "fxopt": torch.bfloat16, "fp32": torch.float32}
AUTOCAST = {"mixed"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a run depends on. Two runs with the same settings see the same batches in the same order."""

    variant: str
    model: str
    folder: str
    dataset: str | None
    dataset_config: str | None
    steps: int
    batch_size: int
    learning_rate: float
    eval_problems: int
    max_new_tokens: int
    seed: int


class StepClock(TrainerCallback):
    """Times every optimizer step, from fetching its batch to the updated weights, and shows progress."""

    def __init__(self, label: str, steps: int) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._bar = tqdm(total=steps, desc=f"{label}: training", unit="step")
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._bar.close()


def run(settings: Settings) -> dict[str, Any]:
    """Trains and evaluates; returns the figures of one column of the demo's table."""
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    train, test = load_conversations(
        settings.dataset,
        settings.dataset_config,
        settings.steps * settings.batch_size,
        settings.eval_problems,
        settings.seed,
    )
    examples, collate = tokenize(train, tokenizer), collator(tokenizer)
    held_out = [collate(chunk) for chunk in _chunks(tokenize(test, tokenizer), settings.batch_size)]
    idle_bytes = resident_bytes()

    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=STORAGE[settings.variant])
    optimizer = None
    if settings.variant == "fxopt":
        model = fxopt.optimize(model, "bf16")
        optimizer = fxopt.optimizer(model, lr=settings.learning_rate, weight_decay=0.0)
    clock = StepClock(settings.variant, settings.steps)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=settings.folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(5, settings.steps // 4),
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=settings.variant in AUTOCAST,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=settings.seed,
        ),
        train_dataset=examples,
        data_collator=collate,
        callbacks=[clock],
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)

    autocast = _autocast(settings, trainer.args.device)
    before = held_out_loss(model, held_out, autocast)
    with PeakMemory() as memory:
        trainer.train()
    after = held_out_loss(model, held_out, autocast)
    num_exact = exact_matches(
        model, tokenizer, test, autocast, settings.variant, 2 * settings.batch_size, settings.max_new_tokens
    )

    parameters = list(model.parameters())
    steady = clock.seconds[min(3, settings.steps - 1) :]
    figures = {
        "seconds_per_step": statistics.median(steady),
        "first_step_seconds": clock.seconds[0],
        "peak_memory_bytes": memory.peak_bytes - (0 if torch.cuda.is_available() else idle_bytes),
        "bytes_per_parameter": sum(p.nbytes for p in parameters) / sum(p.numel() for p in parameters),
        "training_loss": statistics.mean(clock.losses[-5:]),
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "exact_matches": num_exact,
        "eval_problems": len(test),
        "losses": clock.losses,
        "step_seconds": clock.seconds,
    }
    if settings.variant == "fxopt":
        figures |= _explain(model, Path(settings.folder))
    return figures


@torch.no_grad()
def held_out_loss(model: Any, batches: list[Batch], autocast: Callable[[], Any]) -> float:
    """Mean loss per labelled token over all batches."""
    model.eval()
    total = count = 0.0
    for batch in batches:
        num_labels = int((batch["labels"][:, 1:] != -100).sum())
        with autocast():
            loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss
        total += float(loss) * num_labels
        count += num_labels
    model.train()
    return total / count


@torch.no_grad()
def exact_matches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    test: list[Conversation],
    autocast: Callable[[], Any],
    label: str,
    batch_size: int,
    max_new_tokens: int,
    *,
    chat: bool = True,
) -> int:
    """How many problems the model answers, greedily, with the reference's final number. `chat` as in `tokenize`."""
    model.eval()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    num_exact = 0
    for batch in tqdm(list(_chunks(test, batch_size)), desc=f"{label}: answering", unit="batch"):
        texts = prompts(batch, tokenizer, chat=chat)
        encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
        with autocast():
            generated = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        num_exact += sum(
            final_answer(answer) == final_answer(item.answer) for answer, item in zip(answers, batch, strict=True)
        )
    return num_exact


def final_answer(text: str) -> str:
    """What stands after ``####``; without that, the last number; without a number, the text."""
    found = re.findall(r"####\s*(-?[\d,.]*\d)", text) or re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else text.strip()


def _explain(model: Any, folder: Path) -> dict[str, str]:
    """Writes what fxopt changed: the report as text, and the graph before and after."""
    report, diff = folder / "report.txt", folder / "graph_diff.html"
    report.write_text(f"{fxopt.report(model)}\n")
    fxopt.inspect(model).save(diff)
    return {"report": str(report), "graph_diff": str(diff)}


def _autocast(settings: Settings, device: torch.device) -> Callable[[], Any]:
    if settings.variant in AUTOCAST:
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


if __name__ == "__main__":
    chosen = Settings(**json.loads(Path(sys.argv[1]).read_text()))
    result = run(chosen)
    (Path(chosen.folder) / f"{chosen.variant}.json").write_text(json.dumps(result, indent=2))
