"""AdamW's update as Triton kernels: all parameters of a dtype in one launch, states in float32.

Formula, shapes and dtypes: `fxopt.kernels.adamw`, which is where to call it. The noise is a pure function of (seed,
step, place of the parameter, element): training resumed from a checkpoint continues bit by bit.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxopt.kernels.backend import cdiv, tl, triton
from fxopt.kernels.launch import launch
from fxopt.kernels.rounding import Rounding, noise_key

if TYPE_CHECKING:
    from fxopt.kernels.adamw import Hyper, Slot

BLOCK = 512  # a program updates four times as many elements


@triton.jit
def update(
    p, g, m, v, random,
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """The new parameter, which a cast to its dtype rounds to nearest or, if it is cut already, leaves; and moments."""
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    p = p * decay - step_size * m / (tl.sqrt(v) / sqrt_correction2 + eps)
    if STOCHASTIC:
        bits = p.to(tl.uint32, bitcast=True) + (random.to(tl.uint32, bitcast=True) & 0xFFFF)
        cut = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        p = tl.where(p == p, cut, p)  # a NaN with all its bits set would carry into the sign; inf has none to cut
    return p, m, v


@triton.jit
def _update_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, numel, seed, block,
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates 4 * BLOCK elements of one parameter: one call of the random generator gives four numbers."""
    lane = tl.arange(0, BLOCK)
    random = tl.randint4x(seed, block * BLOCK + lane)
    for part in tl.static_range(4):
        offsets = (block * 4 + part) * BLOCK + lane
        mask = offsets < numel
        p = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
        p, m, v = update(
            p, g, m, v, random[part],
            decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps, STOCHASTIC,
        )  # fmt: skip
        tl.store(exp_avg_ptr + offsets, m, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, v, mask=mask)
        tl.store(param_ptr + offsets, p.to(param_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, numel, seed,
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _update_block(
        param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, numel, seed, tl.program_id(0).to(tl.int64),
        decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps, STOCHASTIC, BLOCK,
    )  # fmt: skip


@triton.jit
def _many_adamw_kernel(
    table_ptr, owner_ptr,
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A row of the table is one parameter (`_launch_many`); each program works for the parameter that owns it.
    row = table_ptr + tl.load(owner_ptr + tl.program_id(0)) * 7
    param_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(PARAM)), 16)
    grad_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRAD)), 16)
    exp_avg_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
    exp_avg_sq_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    numel, seed, first_program = tl.multiple_of(tl.load(row + 4), 16), tl.load(row + 5), tl.load(row + 6)
    _update_block(
        param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, numel, seed, tl.program_id(0).to(tl.int64) - first_program,
        decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps, STOCHASTIC, BLOCK,
    )  # fmt: skip


def launch_adamw(slots: list["Slot"], step: int, hyper: "Hyper", rounding: Rounding, seed: int) -> None:
    """One launch for all parameters of a dtype that Triton may read 16 bytes at a time, and one for each other."""
    alone: list[Slot] = []
    together: dict[torch.dtype, list[tuple[Slot, tuple[int, ...]]]] = {}
    for slot in slots:
        addresses = addresses_of(slot.param, slot.grad, slot.exp_avg, slot.exp_avg_sq)
        if are_aligned(slot.param.numel(), addresses):
            together.setdefault(slot.grad.dtype, []).append((slot, addresses))
        else:
            alone.append(slot)
    for group in together.values():
        if len(group) == 1:
            alone.append(group[0][0])
        else:
            _launch_many(group, step, hyper, rounding, seed)
    for slot in alone:
        _launch_one(slot, step, hyper, rounding, seed)


def _launch_one(slot: "Slot", step: int, hyper: "Hyper", rounding: Rounding, seed: int) -> None:
    numel = slot.param.numel()
    launch(
        _adamw_kernel, (cdiv(numel, 4 * BLOCK),),
        slot.param, slot.grad, slot.exp_avg, slot.exp_avg_sq, numel, triton_seed(seed, step, slot.index),
        *coefficients(step, hyper), STOCHASTIC=is_stochastic(slot.param, rounding), BLOCK=BLOCK,
    )  # fmt: skip


def _launch_many(
    slots: list[tuple["Slot", tuple[int, ...]]], step: int, hyper: "Hyper", rounding: Rounding, seed: int
) -> None:
    """`slots` with the addresses of their tensors."""
    first = slots[0][0]
    owner, first_programs = programs(tuple(slot.param.numel() for slot, _ in slots), 4 * BLOCK, first.param.device)
    rows = [
        (*addresses, slot.param.numel(), triton_seed(seed, step, slot.index), first_program)
        for (slot, addresses), first_program in zip(slots, first_programs, strict=True)
    ]
    launch(
        _many_adamw_kernel, (owner.numel(),),
        table_on(first.param.device, rows), owner, *coefficients(step, hyper),
        PARAM=triton_type(first.param), GRAD=triton_type(first.grad),
        STOCHASTIC=is_stochastic(first.param, rounding), BLOCK=BLOCK,
    )  # fmt: skip


def addresses_of(*tensors: Tensor) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


def are_aligned(numel: int, addresses: Sequence[int]) -> bool:
    """Whether Triton may read tensors of `numel` elements at these addresses 16 bytes at a time."""
    bits = numel
    for address in addresses:
        bits |= address
    return bits % 16 == 0


@functools.lru_cache(maxsize=8)
def programs(numels: tuple[int, ...], program_numel: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Which parameter each program works for, (programs,) int64, and the first program of each parameter."""
    counts = torch.tensor([cdiv(numel, program_numel) for numel in numels])
    first = counts.cumsum(0) - counts
    return torch.repeat_interleave(torch.arange(len(numels)), counts).to(device), first.tolist()


def table_on(device: torch.device, rows: Sequence[Sequence[int]]) -> Tensor:
    """(rows, columns) int64, one row per parameter."""
    table = torch.tensor(rows)
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)  # otherwise the copy would wait for all work before


def coefficients(step: int, hyper: "Hyper") -> tuple[float, ...]:
    """What the kernels take from `decay` to `eps`."""
    return (
        1 - hyper.lr * hyper.weight_decay,
        hyper.beta1,
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        hyper.lr / (1 - hyper.beta1**step),
        (1 - hyper.beta2**step) ** 0.5,
        hyper.eps,
    )


def is_stochastic(param: Tensor, rounding: Rounding) -> bool:
    return rounding == "stochastic" and param.dtype == torch.bfloat16


def triton_seed(seed: int, step: int, index: int) -> int:
    """Always 63 bits and odd, so that Triton compiles one kernel for all seeds."""
    return noise_key(seed, step, index) | (1 << 62) | 1


def triton_type(tensor: Tensor) -> Any:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[tensor.dtype]
