"""The little that all kernel files share: Triton where it exists, and how a tensor is cut into rows and tiles."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class _TritonMissing:
    """Lets a kernel file be imported where Triton is not installed (macOS); its kernels are then never launched."""

    constexpr = int

    @staticmethod
    def jit(function: Any) -> Any:
        return function


triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

    TRITON_DEVICES: tuple[str, ...] = ("cuda", "xpu")  # "cuda" is ROCm's name too
except ImportError:
    triton = tl = _TritonMissing
    TRITON_DEVICES = ()

MAX_PROGRAMS = 512  # programs that share a sum over rows: enough to fill a large GPU, few enough to add up cheaply
BLOCK_BYTES = 2**20  # float32 working set of one block of rows on the CPU: about one core's second-level cache


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to calculate in: float32, or float64 for a float64 tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def triton_dtype(tensor: Tensor) -> Any:
    """`compute_dtype` in Triton's words."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) -> (N, D) whose rows may lie apart but are contiguous themselves; a view where that is possible."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Consecutive slices of (N, D) rows, each of which fits the cache in float32."""
    step = max(1, BLOCK_BYTES // (4 * rows.shape[-1]))
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up. `triton.cdiv` takes 5 µs."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


@functools.cache
def row_tile(num_cols: int) -> dict[str, int]:
    """Launch arguments of a kernel that holds whole rows: ROWS x BLOCK elements in a program of `num_warps` warps."""
    block = next_power_of_2(num_cols)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def check_rows(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """ValueError unless x has rows, (..., D) with D > 0, and each parameter that is not None is (D,)."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; the last dimension must not be empty")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(parameter.shape)}; it must be ({x.shape[-1]},) as x's last dimension"
            )


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    """ValueError unless residual is as x, in shape and dtype."""
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"{op}: residual is {residual.dtype} {tuple(residual.shape)}; it must be as x, {x.dtype} {tuple(x.shape)}"
        )


def cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
