"""How well each precision trains: held-out loss over 100 steps of fine-tuning SmolLM2-135M, numbers and a picture.

AdamW at 1e-5 without decay, gradients clipped at 1.0, five warm-up steps, eight problems a step; held-out loss over 64
problems every 20 steps, then answers to some of them. A seed is an order of the problems, the same for every variant,
and the noise of the rounding. ``--data`` names a folder with GSM8K's ``train.jsonl`` and ``test.jsonl``; without it,
generated word problems are used.

Every run is a process of its own and leaves ``<output>/<variant>-<seed>.json``, written anew after every evaluation.
One that is complete there is not run again; one that was interrupted goes on from its last evaluation, whose weights
and optimizer states lie beside it until then. On two cores a run of 100 steps takes five to fifteen minutes.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from rich.console import Console
from rich.table import Table

from examples.quiet import silence_libraries
from examples.variants import names_among, run_afresh
from fxopt.atomic_file import write, write_text

# What is not a preset of fxopt's, but what people do today.
BASELINES = {
    "autocast": "fp32 weights, bf16 autocast, torch.optim.AdamW: Trainer's bf16=True",
    "plain": "bf16 weights, torch.optim.AdamW",
    "torchao": "bf16 weights, torchao's _AdamW with stochastic rounding",
    "torchao-8bit": "bf16 weights, torchao's AdamW8bit with stochastic rounding",
    "bitsandbytes-8bit": "fp32 weights, bitsandbytes' AdamW8bit",
}
PRESETS = {
    "fp32": "the truth",
    "mixed": "fp32 weights, bf16 compute, nearest cast",
    "mixed-stochastic": "fp32 weights, bf16 compute, stochastic cast",
    "bf16": "bf16 weights, stochastic rounding",
    "bf16-islands": "the same, norms in fp32",
    "bf16-8bit": "the same, 8-bit states",
    "int8": "int8 matrices, fp32 norms, 8-bit states",
    "fp8": "bf16 weights, float8 products (emulated without hardware), 8-bit states",
}
VARIANTS = {name: f"fxopt {name}: {what}" for name, what in PRESETS.items()} | BASELINES
LEARNING_RATE = 1e-5
WARMUP_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on; kept in its file, so that a run of other settings is not taken for this one."""

    variant: str
    seed: int
    model: str
    data: str | None
    steps: int
    every: int
    batch_size: int
    eval_problems: int
    answers: int
    max_new_tokens: int
    release_gradients: bool


Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    console = Console()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    silence_libraries()
    from examples.smollm2 import smollm2_folder

    model = options.model or str(smollm2_folder())
    chosen: dict[str, Any] = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Settings)}

    def run(variant: str, seed: int) -> Record:
        settings = Settings(**chosen | {"variant": variant, "seed": seed, "model": model})
        file = output / f"{variant}-{seed}.json"
        known = _record_of(file, settings)
        if known is None:
            file.with_suffix(".pt").unlink(missing_ok=True)
            write_text(file, json.dumps({"settings": dataclasses.asdict(settings), "held_out_loss": {}}))
        if known is None or "exact_matches" not in known:
            run_afresh(f"{variant}, seed {seed}", __file__, "--worker", str(file))
        record: Record = json.loads(file.read_text())
        return record

    with ThreadPoolExecutor(options.jobs) as pool:
        # Seed by seed, so that an interrupted benchmark has whole rounds; a run that fails does not stop the others.
        started = [(variant, pool.submit(run, variant, seed)) for seed in options.seeds for variant in options.variants]
    runs: dict[str, list[Record]] = {variant: [] for variant in options.variants}
    for variant, done in started:
        runs[variant].append(done.result())

    console.print(losses_table(runs))
    console.print(costs_table(runs))
    write_text(output / "curves.json", json.dumps(runs, indent=2))
    draw(runs, output / "curves.png")
    console.print(f"drawn in {output / 'curves.png'}", soft_wrap=True)
    return 0


def train(file: Path) -> None:
    """Runs what ``file`` describes and adds what it measures to the file."""
    silence_libraries()
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fxopt
    from examples.chat_data import collator, tokenize
    from examples.fine_tune import exact_matches, held_out_loss
    from examples.process_memory import PeakMemory, resident_bytes
    from fxopt.precision.quantized import has_float8

    record = json.loads(file.read_text())
    settings = Settings(**record["settings"])
    label = f"{settings.variant}, seed {settings.seed}"
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    train_set, test_set = _conversations(settings)
    collate, size = collator(tokenizer), settings.batch_size
    train_rows, test_rows = (tokenize(rows, tokenizer, chat=False) for rows in (train_set, test_set))
    held_out = [collate(test_rows[start : start + size]) for start in range(0, len(test_rows), size)]
    idle_bytes = 0 if torch.cuda.is_available() else resident_bytes()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_narrow = settings.variant in ("plain", "torchao", "torchao-8bit")
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.bfloat16 if is_narrow else torch.float32
    )
    model.to(device)
    if settings.variant in PRESETS:
        fxopt.annotate(model, settings.variant, emulate=settings.variant == "fp8" and not has_float8(device))
        model = fxopt.optimize(model, None)
    optimizer = _optimizer(settings, model)

    def autocast() -> contextlib.AbstractContextManager[Any]:
        is_cast = settings.variant == "autocast"
        return torch.autocast(device.type, torch.bfloat16) if is_cast else contextlib.nullcontext()

    checkpoint = file.with_suffix(".pt")
    before: list[float] = []  # seconds of the steps before an interruption, and since, without those that warm up
    seconds: list[float] = []
    first = 1

    def settled() -> list[float]:
        return before + seconds[min(3, len(seconds) - 1) :]

    def evaluate(step: int) -> None:
        record["held_out_loss"][str(step)] = held_out_loss(model, held_out, autocast)
        write_text(file, json.dumps(record, indent=2))
        if step:
            state = {
                "step": step,
                "seconds": settled(),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            write(checkpoint, lambda place: torch.save(state, place))

    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before = state["step"] + 1, state["seconds"]
        del state
    else:
        evaluate(0)
    with PeakMemory() as memory:
        bar = tqdm(range(first, settings.steps + 1), desc=label, unit="step", initial=first - 1, total=settings.steps)
        for step in bar:
            began = time.perf_counter()
            _set_learning_rate(optimizer, LEARNING_RATE * min(1.0, step / WARMUP_STEPS))
            rows = train_rows[(step - 1) * size : step * size]
            batch = {key: value.to(device) for key, value in collate(rows).items()}
            with autocast():
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            if not settings.release_gradients:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step == first:
                held = fxopt.footprint(model, optimizer)
                record["bytes_per_parameter"] = {
                    kind: getattr(held, kind) / held.num_parameters for kind in ("weights", "gradients", "optimizer")
                }
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if step % settings.every == 0 or step == settings.steps:
                evaluate(step)
    if seconds:
        record["peak_memory_bytes"] = memory.peak_bytes - idle_bytes
        record["seconds_per_step"] = statistics.median(settled())
        write_text(file, json.dumps(record, indent=2))
    asked = test_set[: settings.answers]
    record["exact_matches"] = exact_matches(
        model, tokenizer, asked, autocast, label, 2 * size, settings.max_new_tokens, chat=False
    )
    write_text(file, json.dumps(record, indent=2))
    checkpoint.unlink(missing_ok=True)


def losses_table(runs: dict[str, list[Record]]) -> Table:
    """Held-out loss: mean over the seeds, a column per evaluated step, and at the end how far the seeds lie apart."""
    shown = Table(title="Held-out loss after so many steps: mean of the seeds")
    shown.add_column("")
    steps = sorted({int(step) for records in runs.values() for record in records for step in record["held_out_loss"]})
    for step in steps:
        shown.add_column(str(step), justify="right")
    shown.add_column("spread of the seeds at the end", justify="right")
    shown.add_column("above fp32, seed by seed", justify="right")
    for variant, records in runs.items():
        curves = [record["held_out_loss"] for record in records]
        means = (statistics.mean(curve[str(step)] for curve in curves) for step in steps)
        ends = [curve[str(steps[-1])] for curve in curves]
        truth = [record["held_out_loss"][str(steps[-1])] for record in runs.get("fp32", ())]
        gaps = [end - right for end, right in zip(ends, truth, strict=True)] if len(truth) == len(ends) else []
        shown.add_row(
            VARIANTS[variant],
            *(f"{mean:.3f}" for mean in means),
            f"{min(ends):.3f} to {max(ends):.3f}",
            ", ".join(f"{gap:+.4f}" for gap in gaps),
        )
    return shown


def costs_table(runs: dict[str, list[Record]]) -> Table:
    """What each variant holds and takes: medians of its runs. And what its model answers."""
    shown = Table(title="What it costs")
    for heading in ("", "weights", "gradients", "optimizer", "peak memory, MB", "s per step", "exact answers"):
        shown.add_column(heading, justify="right" if heading else "left")
    for variant, records in runs.items():
        held = records[0]["bytes_per_parameter"]
        asked = min(records[0]["settings"]["answers"], records[0]["settings"]["eval_problems"])
        shown.add_row(
            VARIANTS[variant],
            *(f"{held[kind]:.2f} B" for kind in ("weights", "gradients", "optimizer")),
            f"{statistics.median(record['peak_memory_bytes'] for record in records) / 1e6:.0f}",
            f"{statistics.median(record['seconds_per_step'] for record in records):.2f}",
            ", ".join(str(record["exact_matches"]) for record in records) + f" of {asked}",
        )
    return shown


def draw(runs: dict[str, list[Record]], file: Path) -> None:
    """A line for each variant, the mean of its seeds; a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for variant, records in runs.items():
        steps = [int(step) for step in records[0]["held_out_loss"]]
        columns = [[record["held_out_loss"][str(step)] for record in records] for step in steps]
        style: dict[str, Any] = {"linestyle": "--", "color": "black", "zorder": 3} if variant == "fp32" else {}
        style |= {"linestyle": ":"} if variant in BASELINES else {}
        (line,) = axes.plot(steps, [statistics.mean(c) for c in columns], label=VARIANTS[variant], marker=".", **style)
        lowest, highest = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
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


def _optimizer(settings: Settings, model: Any) -> Any:
    import torch

    if settings.variant in PRESETS:
        import fxopt

        clipping: Any = {"clip_grad_norm": 1.0, "clip_by": "previous"} if settings.release_gradients else {}
        return fxopt.optimizer(
            model,
            lr=LEARNING_RATE,
            weight_decay=0.0,
            seed=settings.seed,
            release_gradients=settings.release_gradients,
            **clipping,
        )
    if settings.variant == "torchao":
        from torchao.optim import _AdamW

        return _AdamW(model.parameters(), lr=torch.tensor(LEARNING_RATE), weight_decay=0.0, bf16_stochastic_round=True)
    if settings.variant == "torchao-8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(
            model.parameters(), lr=torch.tensor(LEARNING_RATE), weight_decay=0.0, bf16_stochastic_round=True
        )
    if settings.variant == "bitsandbytes-8bit":
        library = importlib.import_module("bitsandbytes")  # pip install bitsandbytes
        return library.optim.AdamW8bit(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def _set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def _record_of(file: Path, settings: Settings) -> Record | None:
    """What `file` holds of a run with these settings, complete or not; None where it holds none."""
    try:
        record: Record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if record["settings"] == dataclasses.asdict(settings) else None


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training_curve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl; default: generated word problems")
    parser.add_argument("--model", help="name on the Hub or local path; default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--variants",
        type=names_among(VARIANTS),
        default="fp32,mixed,mixed-stochastic,bf16,bf16-islands,bf16-8bit,int8,autocast,plain",
        help=f"of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--seeds", type=_seeds, default="0,1,2", help="numbers, separated by commas")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--batch-size", type=int, default=8, help="problems a step")
    parser.add_argument("--eval-problems", type=int, default=64)
    parser.add_argument("--answers", type=int, default=32, help="held-out problems that the trained model answers")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="of an answer")
    parser.add_argument(
        "--release-gradients",
        action="store_true",
        help="fxopt's updates run inside backward, clipped by the norm of the step before",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with several, seconds mean little")
    parser.add_argument("--output", default=str(ROOT / "runs" / "training_curve"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = _options(None)
    if chosen.worker:
        train(Path(chosen.worker))
    else:
        sys.exit(main())
