"""Seconds of one optimizer step, and the bytes that it keeps: fxopt, torch, torchao.

All variants update equal bfloat16 parameters, with the shapes of SmolLM2-135M, one after the other in each round; a
figure is the median over the rounds. torch keeps its moments in the parameters' bfloat16, which moves fewer bytes, and
rounds to nearest, which loses small updates: it is the yardstick of speed alone.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from examples.variants import names_among
from fxopt.precision.optimizer import Optimizer

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Figures = dict[str, Any]


def torchao_optimizer(name: str, **options: Any) -> Make:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        import torchao.optim

        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            torch.compiler.set_stance("force_eager")  # torchao compiles its step, and needs a C++ compiler for it
        made: torch.optim.Optimizer = getattr(torchao.optim, name)(parameters, **options)
        return made

    return make


VARIANTS: dict[str, tuple[str, Make]] = {
    "torch": ("torch AdamW, fused", partial(torch.optim.AdamW, fused=True)),
    "fxopt": ("fxopt, stochastic", Optimizer),
    "nearest": ("fxopt, nearest", partial(Optimizer, rounding="nearest")),
    "kahan": ("fxopt, Kahan", partial(Optimizer, rounding="kahan")),
    "8bit": ("fxopt, 8-bit states", partial(Optimizer, optimizer_state="8bit")),
    "4bit": ("fxopt, 4-bit states", partial(Optimizer, optimizer_state="4bit")),
    "sgd": ("fxopt SGD, momentum", partial(Optimizer, kind="sgd", momentum=0.9)),
    "torchao": ("torchao _AdamW, stochastic", torchao_optimizer("_AdamW", bf16_stochastic_round=True)),
    "torchao-8bit": ("torchao AdamW8bit, stochastic", torchao_optimizer("AdamW8bit", bf16_stochastic_round=True)),
}


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    figures = measure(options.variants, options.scale, options.repeats, options.warmup, device)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        where = f"{options.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        Console().print(table(figures, where))
    return 0


def measure(variants: list[str], scale: float, repeats: int, warmup: int, device: torch.device) -> dict[str, Figures]:
    """Seconds per step and bytes of state per parameter of each variant, taken in turns."""
    made = {}
    for variant in variants:
        parameters = smollm2_parameters(scale, device)
        for parameter in parameters:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        made[variant] = parameters, VARIANTS[variant][1](parameters)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(warmup + repeats):
        for variant, (_, optimizer) in made.items():
            start = time.perf_counter()
            optimizer.step()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number >= warmup:
                seconds[variant].append(time.perf_counter() - start)
    numels = {variant: sum(parameter.numel() for parameter in parameters) for variant, (parameters, _) in made.items()}
    return {
        variant: {
            "name": VARIANTS[variant][0],
            "parameters": numels[variant],
            "seconds": statistics.median(seconds[variant]),
            "fastest_seconds": min(seconds[variant]),
            "state_bytes_per_parameter": state_bytes(optimizer) / numels[variant],
        }
        for variant, (_, optimizer) in made.items()
    }


def smollm2_parameters(scale: float, device: torch.device) -> list[nn.Parameter]:
    """bfloat16 parameters of SmolLM2-135M's shapes; `scale` is the share of its layers and of its vocabulary."""
    layer = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
    shapes = [(64 * round(768 * scale), 576), *layer * round(30 * scale), (576,)]
    return [nn.Parameter(0.05 * torch.randn(shape, dtype=torch.bfloat16, device=device)) for shape in shapes]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimizer's state; those of a quantized state are its parts'."""
    total = 0
    for state in optimizer.state.values():
        for value in state.values():
            if hasattr(value, "__tensor_flatten__"):
                total += sum(getattr(value, part).nbytes for part in value.__tensor_flatten__()[0])
            elif torch.is_tensor(value):
                total += value.nbytes
    return total


def table(figures: dict[str, Figures], where: str) -> Table:
    count = next(iter(figures.values()))["parameters"]
    shown = Table(title=f"One optimizer step over {count / 1e6:.1f}M bfloat16 parameters, {where}")
    for heading in ("", "ms", "ratio", "fastest, ms", "state, bytes per parameter"):
        shown.add_column(heading, justify="right" if heading else "left")
    yardstick = figures.get("torch", next(iter(figures.values())))["seconds"]
    for column in figures.values():
        shown.add_row(
            column["name"],
            f"{column['seconds'] * 1e3:.3g}",
            f"{column['seconds'] / yardstick:.2f}",
            f"{column['fastest_seconds'] * 1e3:.3g}",
            f"{column['state_bytes_per_parameter']:.2f}",
        )
    shown.caption = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return shown


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="optimizer_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--variants",
        type=names_among(VARIANTS),
        default=",".join(VARIANTS),
        help=f"comma-separated, of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scale", type=float, default=1.0, help="share of SmolLM2-135M's layers and vocabulary")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="first rounds that are not counted")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
