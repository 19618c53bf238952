"""Seconds and memory of one training step: eager bf16, fxopt, torch.compile and mixed precision.

Every measurement is a fresh process; the variants take turns, ``--repeats`` times, so that a slow minute of the machine
falls on all of them. Without options the batches are the demo's own; ``--sequence-length`` takes random tokens instead.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from rich.console import Console
from rich.table import Table

from benchmarks.progress_bar import progress_bar
from examples.quiet import silence_libraries
from examples.variants import names_among, run_afresh

VARIANTS = {
    "plain": "eager bf16",
    "fxopt": "fxopt bf16",
    "fxopt-inductor": "fxopt, Inductor",
    "compile": "compile",
    "mixed": "mixed",
}
Figures = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.worker:
        Path(options.worker).write_text(json.dumps(measure(options)))
        return 0
    console = Console(stderr=options.json)
    variants = options.variants
    compiled = {"compile", "fxopt-inductor"}.intersection(variants)
    if compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        console.print("torch.compile is left out: it needs a C++ compiler, and there is none")
        variants = [variant for variant in variants if variant not in compiled]

    rounds: dict[str, list[Figures]] = {variant: [] for variant in variants}
    with progress_bar(console) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=options.repeats * len(variants))
        for _ in range(options.repeats):
            for variant in variants:
                progress.update(task, description=VARIANTS[variant])
                result = Path(folder) / "result.json"
                own = ("--variants", variant, "--worker", str(result))
                run_afresh(variant, __file__, *(arguments or sys.argv[1:]), *own, quiet=True)
                rounds[variant].append(json.loads(result.read_text()))
                progress.advance(task)

    figures = {variant: summary(found) for variant, found in rounds.items()}
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        console.print(table(figures, next(iter(rounds.values()))[0]["workload"]))
    return 0


def measure(options: argparse.Namespace) -> Figures:
    """Trains one variant for a few steps in this process."""
    silence_libraries()
    import torch

    import fxopt
    from examples.process_memory import PeakMemory, resident_bytes

    torch.manual_seed(options.seed)
    (variant,) = options.variants
    folder = _weights(options.model)
    batches, workload = _batches(options, folder)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    idle_bytes = 0 if on_gpu else resident_bytes()

    model: Any = _model(folder, torch.float32 if variant == "mixed" else torch.bfloat16, device).train()
    autocast = torch.autocast(device.type, torch.bfloat16) if variant == "mixed" else contextlib.nullcontext()
    began = time.perf_counter()
    if variant.startswith("fxopt"):
        model = fxopt.optimize(model, "bf16", backend="inductor" if variant == "fxopt-inductor" else "auto")
        optimizer: torch.optim.Optimizer = fxopt.optimizer(model, lr=1e-5, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    if variant == "compile":
        model.compile()

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    phases: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    losses = []
    first_step_seconds = 0.0
    with PeakMemory() as memory:
        for number, batch in enumerate(batches):
            batch = {key: value.to(device) for key, value in batch.items()}
            start = clock()
            with autocast:
                loss = model(**batch, use_cache=False).loss
            after_forward = clock()
            loss.backward()
            after_backward = clock()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            end = clock()
            losses.append(loss.item())
            del loss
            if number == 0:
                first_step_seconds = end - began
            if number >= options.warmup:
                for phase, seconds in zip(
                    phases, (after_forward - start, after_backward - after_forward, end - after_backward), strict=True
                ):
                    phases[phase].append(seconds)
    return {
        "variant": variant,
        "workload": workload,
        "step_seconds": statistics.median(map(sum, zip(*phases.values(), strict=True))),
        **{f"{phase}_seconds": statistics.median(seconds) for phase, seconds in phases.items()},
        "first_step_seconds": first_step_seconds,
        "peak_memory_bytes": memory.peak_bytes - idle_bytes,
        "loss": losses[-1],
    }


def summary(found: list[Figures]) -> Figures:
    """The median over the repeats of one variant."""
    return {
        key: statistics.median(figures[key] for figures in found) if isinstance(value, float | int) else value
        for key, value in found[0].items()
    } | {"step_seconds_of_each_repeat": [figures["step_seconds"] for figures in found]}


def table(figures: dict[str, Figures], workload: str) -> Table:
    shown = Table(title=f"One training step: {workload}")
    shown.add_column("", no_wrap=True)
    for variant in figures:
        shown.add_column(VARIANTS[variant], justify="right")
    rows = (
        ("seconds per step", "step_seconds", "{:.3f}", 1.0),
        ("  forward", "forward_seconds", "{:.3f}", 1.0),
        ("  backward", "backward_seconds", "{:.3f}", 1.0),
        ("  clip, optimizer", "optimizer_seconds", "{:.3f}", 1.0),
        ("peak above idle, MB", "peak_memory_bytes", "{:.0f}", 1e-6),
        ("first step done after, s", "first_step_seconds", "{:.1f}", 1.0),
        ("loss at the last step", "loss", "{:.3f}", 1.0),
    )
    for label, key, form, scale in rows:
        cells = []
        for column in figures.values():
            ratio = column[key] / figures["plain"][key] if "plain" in figures and key != "loss" else None
            cells.append(form.format(column[key] * scale) + (f"  ({ratio:.2f})" if ratio is not None else ""))
        shown.add_row(label, *cells)
    shown.caption = "compile: torch.compile with Inductor; mixed: fp32 weights under bf16 autocast"
    if "plain" in figures:
        shown.caption += "; in brackets: the share of eager bf16"
    return shown


def _weights(model: str | None) -> str | None:
    """Where the weights are; None for SmolLM2's shape with random weights, where its package is not installed."""
    from examples.smollm2 import smollm2_folder

    if model is not None:
        return model
    try:
        return str(smollm2_folder())
    except FileNotFoundError:
        return None


def _model(folder: str | None, dtype: Any, device: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from fxopt.inspection.configurations import configuration_of

    if folder is not None and not folder.endswith(".json"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    with device:
        return AutoModelForCausalLM.from_config(configuration_of(folder or "SmolLM2-135M"), dtype=dtype)


def _batches(options: argparse.Namespace, folder: str | None) -> tuple[list[dict[str, Any]], str]:
    """The batches and their description."""
    import torch

    if options.sequence_length is None and folder is not None:
        from transformers import AutoTokenizer

        from examples.chat_data import collator, load_conversations, tokenize

        tokenizer = AutoTokenizer.from_pretrained(folder)
        train, _ = load_conversations(None, None, options.steps * options.batch_size, 1, options.seed)
        examples, collate = tokenize(train, tokenizer), collator(tokenizer)
        starts = range(0, len(examples), options.batch_size)
        return (
            [collate(examples[start : start + options.batch_size]) for start in starts],
            f"{options.batch_size} word problems, chat template, answers labelled",
        )
    length = options.sequence_length or 256
    generator = torch.Generator().manual_seed(options.seed)
    batches = []
    for _ in range(options.steps):
        tokens = torch.randint(0, options.vocab_size, (options.batch_size, length), generator=generator)
        labels, mask = tokens.clone(), torch.ones_like(tokens)
        labels[:, : round(length * options.masked_fraction)] = -100
        num_padding = round(length * options.padding)
        if num_padding:  # every row but the first, which keeps the full length
            labels[1:, length - num_padding :] = -100
            mask[1:, length - num_padding :] = 0
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return batches, (
        f"{options.batch_size} x {length} random tokens, {options.masked_fraction:.0%} masked,"
        f" {options.padding:.0%} padding"
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model", help="name on the Hub, local path, or config.json for random weights; default: SmolLM2-135M-Instruct"
    )
    parser.add_argument(
        "--variants",
        type=names_among(VARIANTS),
        default="plain,fxopt,compile,mixed",
        help=f"comma-separated, of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, help="random tokens of this length, not the demo's batches")
    parser.add_argument("--masked-fraction", type=float, default=0.0, help="of each row's labels, from its start")
    parser.add_argument("--padding", type=float, default=0.0, help="fraction of each row but the first")
    parser.add_argument("--vocab-size", type=int, default=49152, help="random tokens are below this")
    parser.add_argument("--steps", type=int, default=8, help="of each process")
    parser.add_argument("--warmup", type=int, default=3, help="first steps of each process that are not counted")
    parser.add_argument("--repeats", type=int, default=2, help="fresh processes per variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (options.model or "").endswith(".json") and options.sequence_length is None:
        parser.error("a config.json has no tokenizer for the demo's batches: give --sequence-length")
    if options.steps <= options.warmup:
        parser.error("--steps must be greater than --warmup")
    return options


if __name__ == "__main__":
    sys.exit(main())
