"""Launching a Triton kernel without Triton's own way to it, which takes longer than many kernels run.

`kernel[grid](…)` binds and inspects all arguments again in each call, to find out which of its compiled variants they
take: 15 to 60 µs of Python. `launch` looks the variant up by what Triton's inspection depends on.
"""

from typing import Any

import torch
from torch import Tensor

Grid = tuple[int] | tuple[int, int]

# (kernel, device, arguments' specialization, constants) -> the compiled kernel, and its constants in order
_COMPILED: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}


def launch(kernel: Any, grid: Grid, *args: Tensor | int | float | None, **constants: object) -> None:
    """`kernel[grid](*args, **constants)` on the device of the first argument, a tensor.

    `args` are the kernel's arguments that are no `tl.constexpr`, in order and ahead of all that are. `constants` are
    those, and Triton's options such as `num_warps`.
    """
    first = args[0]
    assert isinstance(first, Tensor)
    device = first.device.index
    key = (id(kernel), device, *[_specialization(arg) for arg in args], *constants.items())
    with torch.accelerator.device_index(device):  # it need not be the current one
        found = _COMPILED.get(key)
        if found is not None:
            compiled, in_order = found
            compiled[grid + (1,) * (3 - len(grid))](*args, *in_order)
            return
        compiled = kernel[grid](*args, **constants)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled  # Triton may compile in the background
    if hasattr(compiled, "packed_metadata"):  # nothing is compiled in Triton's interpreter
        _COMPILED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def _specialization(arg: Tensor | int | float | None) -> object:
    """What Triton compiles variants for: dtype and alignment; whether an integer is 1, a multiple of 16, or wide."""
    if arg is None:
        return None
    if isinstance(arg, Tensor):
        aligned = arg.data_ptr() % 16 == 0
        if torch.version.hip is None:
            return arg.dtype, aligned
        return arg.dtype, aligned, arg.untyped_storage().nbytes() < 1 << 31  # AMD: offsets of 32 bits
    if type(arg) is int:
        return arg == 1, arg % 16 == 0, -(1 << 31) <= arg < 1 << 31, arg < 1 << 63
    return type(arg)
