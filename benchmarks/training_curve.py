"""How well each precision trains: held-out loss over 80 steps of fine-tuning SmolLM2-135M, as numbers and as a picture.

AdamW at 1e-5 without decay, gradients clipped at 1.0, five warm-up steps, eight problems a step, the same problems in
the same order for every variant; held-out loss over 64 problems every 20 steps. ``--data`` names a folder with GSM8K's
``train.jsonl`` and ``test.jsonl``; without it, generated word problems are used.

Every variant runs in a process of its own and leaves ``<output>/<variant>.json``, written anew after every evaluation.
A variant that is complete there is not run again. On two cores the whole takes an hour or two.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from rich.console import Console
from rich.table import Table

from examples.quiet import silence_libraries
from examples.variants import names_among, run_afresh

VARIANTS = {
    "fp32": "fp32 weights, fp32 compute, nearest: the truth",
    "fxopt": "bf16 weights, fxopt.optimize + fxopt.optimizer",
    "mixed": "fp32 weights, bf16 autocast, nearest (Trainer's bf16=True)",
    "plain": "bf16 weights, bf16 compute, nearest (torch.optim.AdamW)",
    "torchao": "bf16 weights, bf16 compute, stochastic (torchao _AdamW)",
}
LEARNING_RATE = 1e-5
WARMUP_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a curve depends on; kept in its file, so that a curve of other settings is not taken for this one."""

    variant: str
    model: str
    data: str | None
    steps: int
    every: int
    batch_size: int
    eval_problems: int
    seed: int


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    console = Console()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    silence_libraries()
    from examples.smollm2 import smollm2_folder

    model = options.model or str(smollm2_folder())
    curves: dict[str, dict[str, float]] = {}
    for variant in options.variants:
        settings = Settings(
            variant,
            model,
            options.data,
            options.steps,
            options.every,
            options.batch_size,
            options.eval_problems,
            options.seed,
        )
        file = output / f"{variant}.json"
        if not _is_complete(file, settings):
            file.write_text(json.dumps({"settings": dataclasses.asdict(settings), "held_out_loss": {}}))
            run_afresh(variant, __file__, "--worker", str(file))
        curves[variant] = json.loads(file.read_text())["held_out_loss"]

    console.print(table(curves))
    (output / "curves.json").write_text(json.dumps(curves, indent=2))
    draw(curves, output / "curves.png")
    console.print(f"drawn in {output / 'curves.png'}", soft_wrap=True)
    return 0


def train(file: Path) -> None:
    """Runs the variant that ``file`` describes and adds its losses to the file."""
    silence_libraries()
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.chat_data import collator, tokenize
    from examples.fine_tune import held_out_loss

    record = json.loads(file.read_text())
    settings = Settings(**record["settings"])
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    train_set, test_set = _conversations(settings)
    collate, size = collator(tokenizer), settings.batch_size
    train_rows, test_rows = (tokenize(rows, tokenizer, chat=False) for rows in (train_set, test_set))
    held_out = [collate(test_rows[start : start + size]) for start in range(0, len(test_rows), size)]

    storage = torch.float32 if settings.variant in ("fp32", "mixed") else torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=storage)
    model.to(device)
    if settings.variant == "fxopt":
        import fxopt

        model = fxopt.optimize(model, "bf16")
    optimizer = _optimizer(settings.variant, model)

    def autocast() -> contextlib.AbstractContextManager[Any]:
        is_mixed = settings.variant == "mixed"
        return torch.autocast(device.type, torch.bfloat16) if is_mixed else contextlib.nullcontext()

    def evaluate(step: int) -> None:
        record["held_out_loss"][str(step)] = held_out_loss(model, held_out, autocast)
        file.write_text(json.dumps(record, indent=2))

    evaluate(0)
    bar = tqdm(range(1, settings.steps + 1), desc=settings.variant, unit="step")
    for step in bar:
        _set_learning_rate(optimizer, LEARNING_RATE * min(1.0, step / WARMUP_STEPS))
        batch = {key: value.to(device) for key, value in collate(train_rows[(step - 1) * size : step * size]).items()}
        with autocast():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % settings.every == 0 or step == settings.steps:
            evaluate(step)


def table(curves: dict[str, dict[str, float]]) -> Table:
    """Held-out loss: one row per variant, one column per evaluated step."""
    shown = Table(title="Held-out loss after so many steps")
    shown.add_column("")
    steps = sorted({int(step) for curve in curves.values() for step in curve})
    for step in steps:
        shown.add_column(str(step), justify="right")
    for variant, curve in curves.items():
        shown.add_row(VARIANTS[variant], *(f"{curve[str(step)]:.3f}" if str(step) in curve else "" for step in steps))
    return shown


def draw(curves: dict[str, dict[str, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for variant, curve in curves.items():
        style = {"linestyle": "--", "color": "black", "zorder": 3} if variant == "fp32" else {"marker": "o"}
        axes.plot([int(step) for step in curve], list(curve.values()), label=VARIANTS[variant], **style)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _conversations(settings: Settings) -> tuple[list[Any], list[Any]]:
    from datasets import Dataset

    from examples.chat_data import conversation, load_conversations

    num_train, num_test = settings.steps * settings.batch_size, settings.eval_problems
    if settings.data is None:
        return load_conversations(None, None, num_train, num_test, settings.seed)
    train = Dataset.from_list(_rows(Path(settings.data) / "train.jsonl")).shuffle(seed=settings.seed)
    test = _rows(Path(settings.data) / "test.jsonl")
    return (
        [conversation(row, settings.data) for row in train.select(range(num_train))],
        [conversation(row, settings.data) for row in test[:num_test]],
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _optimizer(variant: str, model: Any) -> Any:
    import torch

    if variant == "fxopt":
        import fxopt

        return fxopt.optimizer(model, lr=LEARNING_RATE, weight_decay=0.0)
    if variant == "torchao":
        from torchao.optim import _AdamW

        return _AdamW(model.parameters(), lr=torch.tensor(LEARNING_RATE), weight_decay=0.0, bf16_stochastic_round=True)
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def _set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def _is_complete(file: Path, settings: Settings) -> bool:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return record["settings"] == dataclasses.asdict(settings) and str(settings.steps) in record["held_out_loss"]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training_curve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl; default: generated word problems")
    parser.add_argument("--model", help="name on the Hub or local path; default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--variants", type=names_among(VARIANTS), default="fp32,fxopt,mixed,plain", help=f"of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--batch-size", type=int, default=8, help="problems a step")
    parser.add_argument("--eval-problems", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "runs" / "training_curve"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = _options(None)
    if chosen.worker:
        train(Path(chosen.worker))
    else:
        sys.exit(main())
