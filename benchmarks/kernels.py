"""The ops against eager code on the CPU, and what their Triton kernels take of a GPU, which need not be there.

Milliseconds are the best of ``--repeats`` runs of forward, and of forward + backward, in bfloat16 at SmolLM2-135M's
sizes. Registers, spills and shared memory are the assembler's own figures for the kernels compiled ahead of time.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fxopt.kernels import (
    add_layer_norm,
    add_rms_norm,
    clamped_swiglu,
    glu,
    interval_attention,
    layer_norm,
    linear_cross_entropy,
    linear_head,
    linear_log_prob,
    log_prob_rows,
    relu_squared,
    rms_norm,
    rope,
)
from fxopt.kernels.backend import TRITON_DEVICES, row_tile, tl, triton

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, VOCABULARY = 576, 1536, 9, 64, 49152

TARGETS = {"cuda:80": ("cuda", 80, 32), "cuda:90": ("cuda", 90, 32), "hip:gfx942": ("hip", "gfx942", 64)}
FLOAT32 = getattr(tl, "float32", None)
TILE = {"D": HIDDEN, "DTYPE": FLOAT32} | (row_tile(HIDDEN) if TRITON_DEVICES else {})
NORM = TILE | {"EPS": 1e-6}
WEIGHTED, UNWEIGHTED = (NORM | {"HAS_WEIGHT": has} for has in (True, False))
INSIDE, OUTSIDE = (WEIGHTED | {"EPS_OUTSIDE": is_outside} for is_outside in (False, True))
BOTH, NEITHER = ({"HAS_WEIGHT": has, "HAS_BIAS": has} for has in (True, False))
SUMS = dict.fromkeys(("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr"), "*fp32")
GLU = {"D": INTERMEDIATE, "BLOCK": glu.BLOCK, "DTYPE": FLOAT32}
CLAMPED = GLU | {"BLOCK": clamped_swiglu.BLOCK, "ALPHA": 1.702, "LIMIT": 7.0}
CLAMPED_BACKWARD = CLAMPED | {"AT_BOUNDS": True}
SQUARED = GLU | {"BLOCK": relu_squared.BLOCK}
CONTIGUOUS = {"gate_col_stride": 1, "up_col_stride": 1}  # a launch makes a stride of 1 a constant, and no other
ROPE = {"HALF": HEAD_DIM // 2, "ROWS": 32, "BLOCK": 32, "DTYPE": FLOAT32}
ROPE |= {"X_PAIRS": False, "Y_PAIRS": False, "TABLE_PAIRS": False, "TABLE_WIDE": True}  # as in Llama
LOSS_OPTIONS = {name.upper(): value for name, value in linear_cross_entropy._Options()._asdict().items()}
ROWS_OF_LOGITS = {"BLOCK": linear_head.BLOCK, "DTYPE": FLOAT32, "num_warps": 8}
SOFTMAX = ROWS_OF_LOGITS | LOSS_OPTIONS
LOG_PROB = ROWS_OF_LOGITS | {name.upper(): value for name, value in log_prob_rows.LogitOptions()._asdict().items()}
NUMBERS_OF_ROWS = ("log_prob", "entropy", "logsumexp", "maximum", "total", "mass", "at_label", "slope")
OF_ROWS = {"labels_ptr": "*i64", "is_top_ptr": "*i8"} | {f"{name}_ptr": "*fp32" for name in NUMBERS_OF_ROWS}

# name -> kernel, constants, and pointers to another type than the tensors'
KERNELS: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
    "rms_norm forward": (rms_norm._rms_norm_fwd_kernel, INSIDE, {}),
    "rms_norm backward": (rms_norm._rms_norm_bwd_kernel, INSIDE, {"dweight_ptr": "*fp32"}),
    "rms_norm without weight forward": (rms_norm._rms_norm_fwd_kernel, INSIDE | UNWEIGHTED, {}),
    "rms_norm without weight backward": (rms_norm._rms_norm_bwd_kernel, INSIDE | UNWEIGHTED, {"dweight_ptr": "*fp32"}),
    "rms_norm, epsilon outside, forward": (rms_norm._rms_norm_fwd_kernel, OUTSIDE, {}),
    "rms_norm, epsilon outside, backward": (rms_norm._rms_norm_bwd_kernel, OUTSIDE, {"dweight_ptr": "*fp32"}),
    "add_rms_norm forward": (add_rms_norm._add_rms_norm_fwd_kernel, WEIGHTED, {}),
    "add_rms_norm backward": (add_rms_norm._add_rms_norm_bwd_kernel, WEIGHTED, {"dweight_ptr": "*fp32"}),
    "layer_norm forward": (layer_norm._layer_norm_fwd_kernel, NORM | BOTH, SUMS),
    "layer_norm backward": (layer_norm._layer_norm_bwd_kernel, TILE | BOTH, SUMS),
    "layer_norm forward, no parameters": (layer_norm._layer_norm_fwd_kernel, NORM | NEITHER, SUMS),
    "layer_norm backward, no parameters": (layer_norm._layer_norm_bwd_kernel, TILE | NEITHER, SUMS),
    "add_layer_norm forward": (add_layer_norm._add_layer_norm_fwd_kernel, NORM | BOTH, SUMS),
    "add_layer_norm backward": (add_layer_norm._add_layer_norm_bwd_kernel, TILE | BOTH, SUMS),
    "swiglu forward": (glu._glu_fwd_kernel, GLU | {"ACTIVATION": "silu"}, {}),
    "swiglu backward": (glu._glu_bwd_kernel, GLU | {"ACTIVATION": "silu"}, {}),
    "geglu forward": (glu._glu_fwd_kernel, GLU | {"ACTIVATION": "gelu"}, {}),
    "geglu backward": (glu._glu_bwd_kernel, GLU | {"ACTIVATION": "gelu"}, {}),
    "geglu (tanh) backward": (glu._glu_bwd_kernel, GLU | {"ACTIVATION": "gelu_tanh"}, {}),
    "clamped_swiglu forward": (clamped_swiglu._clamped_swiglu_fwd_kernel, CLAMPED | CONTIGUOUS, {}),
    "clamped_swiglu backward": (clamped_swiglu._clamped_swiglu_bwd_kernel, CLAMPED_BACKWARD | CONTIGUOUS, {}),
    "clamped_swiglu of pairs forward": (clamped_swiglu._clamped_swiglu_fwd_kernel, CLAMPED, {}),
    "clamped_swiglu of pairs backward": (clamped_swiglu._clamped_swiglu_bwd_kernel, CLAMPED_BACKWARD, {}),
    "relu_squared forward": (relu_squared._relu_squared_fwd_kernel, SQUARED, {}),
    "relu_squared backward": (relu_squared._relu_squared_bwd_kernel, SQUARED, {}),
    "rope forward": (rope._rope_kernel, ROPE | {"BACKWARD": False}, {}),
    "rope backward": (rope._rope_kernel, ROPE | {"BACKWARD": True}, {}),
    "linear_cross_entropy loss": (
        linear_cross_entropy._softmax_rows_kernel,
        SOFTMAX | {"HAS_SCALES": False},
        {"labels_ptr": "*i64", "scales_ptr": "*fp64", "losses_ptr": "*fp64"},
    ),
    "linear_cross_entropy loss and gradient": (
        linear_cross_entropy._softmax_rows_kernel,
        SOFTMAX | {"HAS_SCALES": True},
        {"labels_ptr": "*i64", "scales_ptr": "*fp32", "losses_ptr": "*fp64"},
    ),
    "linear_log_prob": (log_prob_rows._log_prob_fwd_kernel, LOG_PROB | {"HAS_ENTROPY": False}, OF_ROWS),
    "linear_log_prob with entropy": (log_prob_rows._log_prob_fwd_kernel, LOG_PROB | {"HAS_ENTROPY": True}, OF_ROWS),
    "linear_log_prob backward": (log_prob_rows._log_prob_bwd_kernel, LOG_PROB | {"HAS_SLOPE": False}, OF_ROWS),
    "linear_log_prob with entropy backward": (
        log_prob_rows._log_prob_bwd_kernel,
        LOG_PROB | {"HAS_SLOPE": True},
        OF_ROWS,
    ),
}


def compile_ahead(name: str, dtype: str, target: str) -> Any:
    """The compiled kernel: `.asm` (ttir, ptx, cubin, amdgcn, hsaco) and `.metadata`."""
    kernel, constants, pointers = KERNELS[name]
    constants = dict(constants)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": constants.pop("num_warps", 4)}
    signature = {
        arg: "constexpr" if arg in constants else pointers.get(arg, f"*{dtype}" if arg.endswith("_ptr") else "i32")
        for arg in kernel.arg_names
    }
    # As at a launch: torch aligns its tensors to 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="rows of one batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each, the best counts (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()
    console.print(time_table(options.tokens, options.repeats))
    if TRITON_DEVICES:
        console.print(resource_table())
    return 0


def time_table(tokens: int, repeats: int) -> Table:
    table = Table(
        "op", "forward: eager", "fxopt", "forward + backward: eager", "fxopt", title=f"ms, {tokens} tokens, CPU"
    )
    for name, (op, reference, inputs) in cases(tokens).items():
        row = []
        for backward in (False, True):
            for function in (reference, op):
                row.append(f"{best_ms(function, inputs, backward, repeats):.2f}")
        table.add_row(name, *row)
    return table


def cases(tokens: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Any]]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16().requires_grad_()

    x, residual, weight, bias = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN), random(HIDDEN)
    queries = random(1, tokens, HEADS, HEAD_DIM).detach().transpose(1, 2).requires_grad_()
    cos, sin = random(1, 1, tokens, HEAD_DIM).detach(), random(1, 1, tokens, HEAD_DIM).detach()
    labels = torch.randint(0, VOCABULARY, (tokens,))
    masked = labels.masked_fill(torch.rand(tokens) < 0.6, -100)
    loss = (linear_cross_entropy.linear_cross_entropy, linear_cross_entropy.linear_cross_entropy_reference)
    head = random(VOCABULARY, HIDDEN)
    clamped = (clamped_swiglu.clamped_swiglu, clamped_swiglu.clamped_swiglu_reference)
    joint = random(tokens, 2 * INTERMEDIATE).detach()
    halves = [half.requires_grad_() for half in joint.chunk(2, -1)]
    pairs = [part.requires_grad_() for part in (joint[..., ::2], joint[..., 1::2])]
    heads = [random(2, count, tokens // 2, HEAD_DIM) for count in (HEADS, HEADS // 3, HEADS // 3)]
    masks = {kind: (mask, interval_attention.visible_intervals(mask)) for kind, mask in attention_masks(tokens // 2)}
    return {
        "rms_norm": (rms_norm.rms_norm, rms_norm.rms_norm_reference, [x, weight, 1e-5]),
        "add_rms_norm": (
            add_rms_norm.add_rms_norm,
            add_rms_norm.add_rms_norm_reference,
            [x, residual, weight, 1e-5],
        ),
        # Eager code is torch's own here: the references calculate in float32 throughout.
        "layer_norm": (layer_norm.layer_norm, eager_layer_norm, [x, weight, bias, 1e-5]),
        "add_layer_norm": (add_layer_norm.add_layer_norm, eager_add_layer_norm, [x, residual, weight, bias, 1e-5]),
        "swiglu": (glu.swiglu, glu.swiglu_reference, [random(tokens, INTERMEDIATE), random(tokens, INTERMEDIATE)]),
        "clamped_swiglu, halves": (*clamped, [*halves, 1.702, 7.0]),
        "clamped_swiglu, pairs": (*clamped, [*pairs, 1.702, 7.0]),
        "relu_squared": (
            relu_squared.relu_squared,
            relu_squared.relu_squared_reference,
            [random(tokens, INTERMEDIATE)],
        ),
        "rope": (rope.rope, rope.rope_reference, [queries, cos, sin]),
        **{
            f"interval_attention, {kind}": (interval_attention.interval_attention, eager_attention, [*heads, *mask])
            for kind, mask in masks.items()
        },
        "linear_cross_entropy": (*loss, [x, head, labels]),
        "linear_cross_entropy, 60 % ignored": (*loss, [x, head, masked]),
        "linear_log_prob": (fused_log_prob, eager_log_prob, [x, head, labels]),
        "linear_log_prob, entropy": (fused_log_prob_and_entropy, eager_log_prob_and_entropy, [x, head, labels]),
    }


def fused_log_prob(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_log_prob.linear_log_prob(hidden, weight, labels).log_prob


def fused_log_prob_and_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_prob, entropy, *_ = linear_log_prob.linear_log_prob(hidden, weight, labels, with_entropy=True)
    assert entropy is not None
    return log_prob, entropy


def eager_log_prob(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_probs = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager_log_prob_and_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def eager_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return summed, eager_layer_norm(summed, weight, bias, eps)


def attention_masks(length: int) -> Iterator[tuple[str, Tensor]]:
    """(2, 1, Q, Q), True where a query sees a key: rows of which a quarter is padding, of four sequences, …"""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    causal = (key <= query).expand(2, 1, length, length)
    yield "padded", causal & (key < torch.tensor([length // 2, length]).view(2, 1, 1, 1))
    yield "packed", causal & (query * 4 // length == key * 4 // length)
    yield "window", causal & (query - key < length // 4)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, _: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def best_ms(function: Callable[..., Any], inputs: list[Any], backward: bool, repeats: int) -> float:
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            outputs = function(*inputs)
        if backward:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def resource_table() -> Table:
    table = Table("kernel (bf16)", "target", "registers", "spilled bytes", "shared bytes", title="ahead of time")
    for name in KERNELS:
        for target in TARGETS:
            table.add_row(name, target, *(str(figure) for figure in resources(name, target)))
    return table


def resources(name: str, target: str) -> tuple[int, int, int]:
    """Registers a thread (vector registers on AMD), bytes spilled a thread, bytes of shared memory a program."""
    binary = compile_ahead(name, "bf16", target)
    shared = int(binary.metadata.shared)
    if target.startswith("hip"):
        text = binary.asm["amdgcn"]
        return _figure(r"\.vgpr_count:\s*(\d+)", text), _figure(r"\.private_segment_fixed_size:\s*(\d+)", text), shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _figure(r"REG:(\d+)", text), _figure(r"STACK:(\d+)", text), shared


def _figure(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the assembler's figures:\n{text}")
    return int(match[1])


if __name__ == "__main__":
    sys.exit(main())
