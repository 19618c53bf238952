"""What calling fxopt's ops costs: a training step of a Llama so small that only Python's time counts.

    python benchmarks/call_overhead.py

30 layers of width 16, bf16, 2 x 8 tokens, one thread. Where an op has Triton kernels it only allocates its results
here, as a GPU's queue would let it: what remains is the way to the kernel. Three ways take turns: transformers as it
is, fxopt calling its kernels directly, as in training, and by `torch.library.custom_op`, as under a dispatch mode.
"""

import argparse
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
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


def print_table(times: dict[str, list[tuple[float, float]]]) -> None:
    table = Table("", "forward, ms", "backward, ms", "forward / plain", "backward / plain")
    medians = {way: [statistics.median(t) for t in zip(*pairs, strict=True)] for way, pairs in times.items()}
    for way, (forward, backward) in medians.items():
        ratios = [mine / plain for mine, plain in zip((forward, backward), medians["plain"], strict=True)]
        table.add_row(way, f"{1e3 * forward:.1f}", f"{1e3 * backward:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
