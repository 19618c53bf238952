"""Do small optimizer states follow their gradients? fxopt, bitsandbytes and torchao beside float32 states.

Two measurements, both with float32 weights, so that only states differ, and equal gradients or equal data for all:

states: sqrt(v of float32 states / v), by how much too long or too short each element's step is, after 3000 steps in
    which half of each block's gradients shrink tenfold, grow tenfold, become zero, or stay, at step 1000; and the error
    of m as a share of the largest of its block.
curves: held-out loss of a tiny network that learns what another computes, so that its gradients shrink with its loss.
    --task change: at step 1000 every other input becomes ten times smaller, and means something else from then on:
    what is to be learned anew has small gradients beside large ones. --task spread: inputs differ in size by two
    decades, and stay as they are.

A library that is not installed is named and left out: pip install bitsandbytes.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fxopt.precision.optimizer import Optimizer

Params = list[nn.Parameter]
Figures = dict[str, dict[str, Any]]

BLOCK = 256
CHANGE = 1000  # the step at which gradients change
CASES: dict[str, float] = {"shrink tenfold": 0.1, "grow tenfold": 10.0, "become zero": 0.0, "stay": 1.0}


def _float32(params: Params, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def _fxopt(form: Any) -> Callable[[Params, float], torch.optim.Optimizer]:
    return lambda params, lr: Optimizer(params, lr=lr, weight_decay=0.0, optimizer_state=form)


def _bitsandbytes(params: Params, lr: float) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(
        params, lr=lr, weight_decay=0.0
    )
    return made


def _torchao(params: Params, lr: float) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = importlib.import_module("torchao.optim").AdamW8bit(params, lr=lr, weight_decay=0.0)
    return made


VARIANTS: dict[str, tuple[str, str, Callable[[Params, float], torch.optim.Optimizer]]] = {
    "float32": ("float32 states (torch AdamW)", "torch", _float32),
    "fxopt-8bit": ("fxopt, 8 bits", "fxopt", _fxopt("8bit")),
    "fxopt-4bit": ("fxopt, 4 bits", "fxopt", _fxopt("4bit")),
    "bitsandbytes": ("bitsandbytes AdamW8bit", "bitsandbytes", _bitsandbytes),
    "torchao": ("torchao AdamW8bit", "torchao", _torchao),
}


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    variants, missing = installed(options.variants)
    for name in missing:
        console.print(f"{name} is not installed: its rows are missing (pip install {name})", style="yellow")
    results: dict[str, Any] = {"settings": vars(options), "missing": missing}
    if not options.only or options.only == "states":
        results["states"] = {case: measure_states(variants, case, options.steps) for case in CASES}
        console.print(states_table(results["states"], options.steps))
    if not options.only or options.only == "curves":
        results["curves"] = {
            variant: [train(variant, options.curve_steps, seed, options.task) for seed in range(options.seeds)]
            for variant in variants
        }
        console.print(curves_table(results["curves"]))
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "optimizer_states.json").write_text(json.dumps(results, indent=1))
        if "curves" in results:
            draw(results["curves"], folder / "optimizer_states.png")
        console.print(f"written to {folder}", soft_wrap=True)
    return 0


def installed(variants: list[str]) -> tuple[list[str], list[str]]:
    """Those of `variants` that can be run, and the libraries that are missing for the others."""
    found, missing = [], []
    for variant in variants:
        library = VARIANTS[variant][1]
        try:
            importlib.import_module(library)
            found.append(variant)
        except ImportError:
            missing.append(library)
    return found, missing


def measure_states(variants: list[str], case: str, steps: int) -> Figures:
    """Statistics of each variant's moments after `steps` steps on the gradients that all variants get alike."""
    shape, after = (64, BLOCK), CASES[case]
    before = 0.1 if after > 1 else 1.0
    sizes = 10 ** (-2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    made: dict[str, tuple[nn.Parameter, torch.optim.Optimizer]] = {}
    for variant in {"float32": None} | dict.fromkeys(variants):
        parameter = nn.Parameter(torch.zeros(shape))
        made[variant] = parameter, VARIANTS[variant][2]([parameter], 1e-6)
    for step in range(steps):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * sizes
        gradient[:, 1::2] *= before if step < CHANGE else before * after
        for parameter, optimizer in made.values():
            parameter.grad = gradient.clone()
            _step(optimizer)
    exact_m, exact_v = (moment(made["float32"], number) for number in (1, 2))
    figures: Figures = {}
    for variant in variants:
        m, v = moment(made[variant], 1), moment(made[variant], 2)
        changed, exact = v[:, 1::2], exact_v[:, 1::2]
        ratio = (exact / changed)[changed > 0].sqrt()
        share = (m - exact_m).view(-1, BLOCK) / exact_m.view(-1, BLOCK).abs().amax(1, keepdim=True)
        low, median, high = ratio.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        figures[variant] = {
            "median": median,
            "low": low,
            "high": high,
            "mean_v": float(changed[exact > 0].div(exact[exact > 0]).mean()),
            "zeros": float((changed == 0).float().mean()),
            "m_error": float(share.square().mean().sqrt()),
            "m_worst": float(share.abs().max()),
        }
    return figures


def moment(made: tuple[nn.Parameter, torch.optim.Optimizer], number: int) -> Tensor:
    """The first or second moment of a parameter, in float32, whatever its optimizer keeps it in."""
    parameter, optimizer = made
    state = optimizer.state[parameter]
    if f"state{number}" in state:
        functional = importlib.import_module("bitsandbytes").functional
        found: Tensor = functional.dequantize_blockwise(
            state[f"state{number}"],
            absmax=state[f"absmax{number}"],
            code=state[f"qmap{number}"],
            blocksize=state[f"state{number}"].numel() // state[f"absmax{number}"].numel(),
        )
        return found.view(parameter.shape).float()
    kept = state["exp_avg" if number == 1 else "exp_avg_sq"]
    return (kept.dequantize() if hasattr(kept, "codes") else kept).float()


def train(variant: str, steps: int, seed: int, task: str) -> dict[str, float]:
    """Held-out loss by step, on inputs as they are then. The student has its teacher's shape."""
    made = TASKS[task](seed)
    optimizer = VARIANTS[variant][2](made.weights, 1e-3)
    losses: dict[str, float] = {}
    for step in range(steps + 1):
        made.at(step)
        if step % max(1, steps // 40) == 0:
            with torch.no_grad():
                losses[str(step)] = float(made.error(made.held_out))
        loss = made.error(torch.randn(64, 256, generator=made.generator))
        for weight, gradient in zip(made.weights, torch.autograd.grad(loss, made.weights), strict=True):
            weight.grad = gradient
        _step(optimizer)
    return losses


class _Task:
    """Two layers of 256 and 16, to be learned from a network of the same shape."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = torch.ones(256)
        self.teacher = [torch.randn(256, 256, generator=self.generator) / 16]
        self.later = torch.randn(256, 256, generator=self.generator) / 16
        self.teacher.append(torch.randn(16, 256, generator=self.generator) / 16)
        self.weights = [
            nn.Parameter(torch.randn(shape, generator=self.generator) / 16) for shape in ((256, 256), (16, 256))
        ]
        self.held_out = torch.randn(1024, 256, generator=self.generator)

    def at(self, step: int) -> None:
        """The task as it is at this step."""
        if step == CHANGE:
            self.sizes[1::2] = 0.1
            self.teacher[0][:, 1::2] = self.later[:, 1::2] * 10  # as strong an influence as before, by smaller inputs

    def error(self, inputs: Tensor) -> Tensor:
        x = inputs * self.sizes
        return (_network(x, self.weights) - _network(x, self.teacher)).square().mean()


class _Spread(_Task):
    """Inputs of very different sizes, which do not change."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = 10 ** (-2 * torch.rand(256, generator=self.generator))
        self.teacher = [torch.randn(rows, 256, generator=self.generator) / 16 for rows in (256, 16)]
        self.teacher[0] /= self.sizes.square().mean().sqrt()
        start = torch.Generator().manual_seed(100 + seed)
        self.weights = [nn.Parameter(torch.randn(shape, generator=start) / 16) for shape in ((256, 256), (16, 256))]
        self.held_out = torch.randn(1024, 256, generator=self.generator)

    def at(self, step: int) -> None:
        """The same at all steps."""

    def error(self, inputs: Tensor) -> Tensor:
        x = inputs * self.sizes
        return (_network(x / 0.1, self.weights) - _network(x, self.teacher)).square().mean()


TASKS: dict[str, Callable[[int], _Task]] = {"change": _Task, "spread": _Spread}


def _network(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return torch.tanh(x @ weights[0].T) @ weights[1].T


def _step(optimizer: torch.optim.Optimizer) -> None:
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which would take longer than the rest
        optimizer.step()


def states_table(results: dict[str, Figures], steps: int) -> Table:
    shown = Table(title=f"sqrt(v of float32 states / v) where gradients changed at step {CHANGE}, after {steps} steps")
    for heading in ("gradients", "", "median", "5 % to 95 %", "mean of v / exact", "zeros", "m: rms, worst"):
        shown.add_column(heading)
    for case, figures in results.items():
        for variant, row in figures.items():
            shown.add_row(
                case,
                VARIANTS[variant][0],
                f"{row['median']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                f"{row['mean_v']:.3f}",
                f"{row['zeros']:.1%}",
                f"{row['m_error']:.2%}, {row['m_worst']:.1%}",
            )
        shown.add_section()
    shown.caption = "m: error as a share of the largest of its block"
    return shown


def curves_table(runs: dict[str, list[dict[str, float]]]) -> Table:
    steps = list(next(iter(runs.values()))[0])
    chosen = [steps[round(share * (len(steps) - 1))] for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
    shown = Table(title=f"Held-out loss, mean of {len(next(iter(runs.values())))} seeds, by step")
    for heading in ("", *chosen, "end / float32's"):
        shown.add_column(heading, justify="right" if heading else "left")
    yardstick = runs.get("float32")
    for variant, records in runs.items():
        ratio = (
            math.exp(
                statistics.mean(
                    math.log(r[steps[-1]] / exact[steps[-1]]) for r, exact in zip(records, yardstick, strict=True)
                )
            )
            if yardstick
            else math.nan
        )
        means = (statistics.mean(record[step] for record in records) for step in chosen)
        shown.add_row(VARIANTS[variant][0], *(f"{mean:.3g}" for mean in means), f"{ratio:.3f}")
    return shown


def draw(runs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """A line for each variant, the mean of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for variant, records in runs.items():
        steps = list(records[0])
        means = [statistics.mean(record[step] for record in records) for step in steps]
        style: dict[str, Any] = {"linestyle": "--", "color": "black", "zorder": 3} if variant == "float32" else {}
        axes.plot([int(step) for step in steps], means, label=VARIANTS[variant][0], **style)
    axes.set(xlabel="optimizer steps", ylabel="held-out loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="optimizer_states", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--only", choices=("states", "curves"), help="one of the two measurements")
    parser.add_argument("--steps", type=int, default=3000, help="of the states (default: %(default)s)")
    parser.add_argument("--curve-steps", type=int, default=4000, help="of the curves (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="of the curves (default: %(default)s)")
    parser.add_argument("--task", choices=list(TASKS), default="change", help="of the curves (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="folder for the numbers and the picture")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
