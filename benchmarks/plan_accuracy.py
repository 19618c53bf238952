"""How close `fxopt.plan` comes: predicted peak memory of a training step beside that of real steps.

A real step runs in a fresh process, on random tokens. Measured is what PyTorch's allocator hands out, added up from its
own events over one step, on top of the weights and optimizer states that are held. On the CPU the process's resident
set is shown beside it, above what it was before the model was made and after a step of a tiny one: without the
libraries, but with their caches and with what the C library keeps of freed memory, which no plan knows.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from rich.console import Console
from rich.table import Table

from benchmarks.progress_bar import progress_bar
from examples.quiet import silence_libraries
from examples.variants import run_afresh
from fxopt.atomic_file import write_text

POLICIES = ("fp32", "mixed", "bf16", "bf16-islands", "bf16-8bit")
SHAPES = ("4x128", "2x512", "1x1024")
Figures = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.worker:
        (case,) = _cases(options)
        Path(options.worker).write_text(json.dumps(measure(options.model, **case)))
        return 0
    console = Console(stderr=options.json)
    figures: list[Figures] = []
    cases = _cases(options)
    with progress_bar(console) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            name = f"{case['policy']} {case['batch_size']}x{case['sequence_length']}"
            progress.update(task, description=name)
            result = Path(folder) / "result.json"
            own = ["--policies", case["policy"], "--shapes", name.split()[1], "--worker", str(result)]
            own += ["--checkpointing"] * case["checkpointing"] + ["--release-gradients"] * case["release_gradients"]
            run_afresh(name, __file__, "--model", options.model, *own, quiet=True)
            figures.append({**case, **json.loads(result.read_text())})
            progress.advance(task)
    if options.save:
        write_text(options.save, json.dumps(figures, indent=2))
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        console.print(table(figures))
    return int(any(abs(error(row)) > options.within / 100 for row in figures))


def measure(
    model: str, policy: str, batch_size: int, sequence_length: int, checkpointing: bool, release_gradients: bool
) -> Figures:
    """The plan's figure and the measured ones, in bytes."""
    silence_libraries()
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import fxopt
    from examples.process_memory import PeakMemory, resident_bytes
    from fxopt.inspection.configurations import configuration_of

    config = configuration_of(model)
    plan = fxopt.plan(config, [policy], batch_size=batch_size, sequence_length=sequence_length)
    row = next(
        r for r in plan.rows if (r.checkpointing, r.release_gradients) == (checkpointing, release_gradients)
    )  # fmt: skip

    def train(config: Any, shape: tuple[int, int], num_steps: int) -> Figures:
        idle_bytes = resident_bytes()
        fitted = fxopt.optimize(AutoModelForCausalLM.from_config(config, dtype=torch.float32), policy)
        fitted.train()
        if checkpointing:
            fitted.gradient_checkpointing_enable()
        optimizer = fxopt.optimizer(fitted, lr=1e-5, release_gradients=release_gradients)
        ids = torch.randint(0, config.vocab_size, shape)

        def step() -> None:
            fitted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(num_steps - 2):
            step()
        with PeakMemory() as resident:
            step()
        held = fxopt.footprint(fitted, optimizer).total
        return {
            "measured": held + allocated_at_most(step),
            "resident": resident.peak_bytes - idle_bytes,
        }

    tiny = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    train(tiny, (2, 16), 3)
    return {"predicted": row.peak, "place": row.place, **train(config, (batch_size, sequence_length), 4)}


def allocated_at_most(step: Any) -> int:
    """The most bytes that PyTorch's allocator had handed out during `step` beyond what it had before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def error(row: Figures) -> float:
    return float(row["predicted"] / row["measured"] - 1)


def table(figures: list[Figures]) -> Table:
    shown = Table(title="peak memory of a training step, MB")
    for name in ("policy", "rows x tokens", "predicted", "measured", "difference", "resident", "where the peak is"):
        shown.add_column(name, justify="left" if name in ("policy", "where the peak is") else "right")
    for row in figures:
        shape = f"{row['batch_size']}x{row['sequence_length']}"
        numbers = [f"{row[name] / 1e6:.0f}" for name in ("predicted", "measured")]
        place = row["place"].partition(" (")[0]
        shown.add_row(
            row["policy"], shape, *numbers, f"{error(row):+.1%}", f"{row['resident'] / 1e6:.0f}", place
        )  # fmt: skip
    return shown


def _cases(options: argparse.Namespace) -> list[Figures]:
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    return [
        {
            "policy": policy,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "checkpointing": options.checkpointing,
            "release_gradients": options.release_gradients,
        }
        for policy in options.policies.split(",")
        for batch_size, sequence_length in shapes
    ]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan_accuracy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="only its configuration is read")
    parser.add_argument("--policies", default=",".join(POLICIES), help="default: %(default)s")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="rows x tokens; default: %(default)s")
    parser.add_argument("--checkpointing", action="store_true", help="activations computed again")
    parser.add_argument("--release-gradients", action="store_true", help="gradients used up inside backward")
    parser.add_argument("--within", type=float, default=5.0, metavar="PERCENT", help="exit with 1 beyond; %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to FILE too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
