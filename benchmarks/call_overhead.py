"""What calling fxopt's ops costs: a training step of a Llama so small that only Python's time counts.

    python benchmarks/call_overhead.py

30 layers of width 16, bf16, 2 x 8 tokens, one thread. Where an op has Triton kernels it only allocates its results
here, as a GPU's queue would let it: what remains is the way to the kernel. Three ways take turns: transformers as it
is, fxopt calling its kernels directly, as in training, and by `torch.library.custom_op`, as under a dispatch mode.

A second table has what a call costs outside its graph, whether the model is called with labels, without, or by its
backbone: the way in, Dynamo's guards (5,800 for 30 layers), fetching 273 parameters, and the output. The plain model
pays for the calls of its modules instead: the first table has the difference, which must stay below 0.5 ms.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.capture import OptimizedForward
from fxopt.kernels.op import OPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=60, help="steps of each way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain, optimized = tiny_llama(options.layers), fxopt.optimize(tiny_llama(options.layers), "bf16")
    step(optimized)  # captures and proves, with the true kernels
    for op in OPS.values():
        if "cuda" in op.kernels and op.fake is not None:
            op.register_kernel("cpu")(op.fake)
    ways = {"plain": plain, "fxopt": optimized, "fxopt, by the dispatcher": optimized}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for repeat in range(options.repeats + 3):
        for way, model in ways.items():
            with watched(way.endswith("dispatcher")):
                measured = step(model)
            if repeat >= 3:
                times[way].append(measured)
    print_table(times)
    table = Table("a call", "outside its graph, ms")
    for name, elapsed_ms in time_outside_graphs(options.layers, options.repeats).items():
        table.add_row(name, f"{elapsed_ms:.2f}")
    Console().print(table)


def tiny_llama(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: nn.Module = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model


def step(model: nn.Module) -> tuple[float, float]:
    """Seconds of forward and backward."""
    tokens = torch.arange(16).reshape(2, 8)
    start = time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).loss
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - middle


def watched(yes: bool) -> AbstractContextManager[object]:
    """Within it, ops believe that a dispatch mode wants to see them."""
    return patch("fxopt.kernels.op._is_watched", lambda: True) if yes else nullcontext()


def time_outside_graphs(layers: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a call's forward that are not spent in its graph, by kind of call."""
    inside = 0.0

    def timed(self: OptimizedForward, graph: Any, record: Any) -> Any:
        run = counted(self, graph, record)

        def run_timed(*args: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            try:
                return run(*args)
            finally:
                inside += time.perf_counter() - start

        return run_timed

    counted = OptimizedForward._counted
    with patch.object(OptimizedForward, "_counted", timed):
        model: Any = fxopt.optimize(tiny_llama(layers), "bf16")
        tokens = torch.arange(16).reshape(2, 8)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        calls: dict[str, Callable[[], Any]] = {
            "with labels": lambda: model(**batch, labels=tokens),
            "without labels": lambda: model(**batch),
            "of the backbone": lambda: model.base_model(**batch),
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 3):
            for name, call in calls.items():
                inside, start = 0.0, time.perf_counter()
                call()
                if repeat >= 3:
                    found[name].append(1e3 * (time.perf_counter() - start - inside))
    return {name: statistics.median(times) for name, times in found.items()}


def print_table(times: dict[str, list[tuple[float, float]]]) -> None:
    table = Table("", "forward, ms", "backward, ms", "forward - plain, ms", "forward / plain", "backward / plain")
    medians = {way: [statistics.median(t) for t in zip(*pairs, strict=True)] for way, pairs in times.items()}
    for way, (forward, backward) in medians.items():
        ratios = [mine / plain for mine, plain in zip((forward, backward), medians["plain"], strict=True)]
        more = statistics.median(mine[0] - plain[0] for mine, plain in zip(times[way], times["plain"], strict=True))
        columns = (f"{1e3 * forward:.1f}", f"{1e3 * backward:.1f}", f"{1e3 * more:+.2f}")
        table.add_row(way, *columns, *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
