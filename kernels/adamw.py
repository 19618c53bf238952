"""AdamW for parameters stored in two bytes: float32 arithmetic and states, one rounding at the store.

    p ← p · (1 − lr · weight_decay)
    m ← beta1 · m + (1 − beta1) · g
    v ← beta2 · v + (1 − beta2) · g²
    p ← p − lr / (1 − beta1ᵗ) · m / (√v / √(1 − beta2ᵗ) + eps)
    p is stored:  round(p)

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, as in `torch.optim.AdamW`.
Roundings, and the noise of the stochastic one: `fxopt.kernels.rounding`.

Shapes: param, grad, exp_avg, exp_avg_sq (...) alike; step () float32, counted from 1.
Dtypes: param and grad bfloat16 or float32; states float32; compensation, of kahan rounding, bfloat16; all arithmetic
float32.
Bytes moved: 22 per bfloat16 element (param 4, grad 2, states 16; a compensation 4 more), 28 per float32 element.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxopt.kernels import adamw_triton
from fxopt.kernels.backend import TRITON_DEVICES
from fxopt.kernels.rounding import NOISE_NUMEL, Rounding, add_noise_, cut_, noise_key, step_noise

# One chunk of a parameter is updated while it lies in the cache. Smaller chunks pay for launches: a bare loop over
# 134.5 M parameters took 104 ms with 128 Ki elements and 81 ms with 512 Ki, on two cores.
CHUNK_NUMEL = 1 << 19
# With quantized states, which pass through three times as much scratch.
QUANTIZED_CHUNK_NUMEL = 1 << 19


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: one AdamW update in the dtype of the states (float32 or float64), before any rounding.

    Returns the new parameter, exp_avg and exp_avg_sq, all (...) in the dtype of `exp_avg`; changes no argument.
    """
    p, g = param.to(exp_avg.dtype), grad.to(exp_avg.dtype)
    p = p * (1 - lr * weight_decay)
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    p = p - lr / (1 - beta1**step) * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)
    return p, m, v


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: Rounding,
    seed: int = 0,
    index: int = 0,
    compensation: Tensor | None = None,
) -> None:
    """Updates `param`, `exp_avg` and `exp_avg_sq` in place; formula, shapes and dtypes: at the top of this file.

    `step` already counts this update. `rounding` matters to bfloat16 parameters alone. `index` tells the noise of one
    parameter from another's. `compensation` is updated too, and "kahan" needs it. Raises TypeError for a dtype other
    than bfloat16 and float32.
    """
    foreach_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [step],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        rounding=rounding,
        seed=seed,
        indices=[index],
        compensations=[compensation],
    )


def foreach_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: Rounding,
    seed: int,
    indices: Sequence[int],
    compensations: Sequence[Tensor | None] | None = None,
) -> None:
    """`adamw_` for many parameters: small ones share a pass. Equal, bit by bit, to `adamw_` one by one."""
    hyper = Hyper(lr, beta1, beta2, eps, weight_decay)
    slots: dict[tuple[torch.device, torch.dtype, int], list[Slot]] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    compensations = compensations or [None] * len(params)
    for param, grad, m, v, step, index, compensation in zip(
        params, grads, exp_avgs, exp_avg_sqs, steps, indices, compensations, strict=True
    ):
        if param.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"adamw_ updates bfloat16 and float32 parameters, got {param.dtype}")
        if m.dtype != torch.float32 or v.dtype != torch.float32:
            raise TypeError(f"adamw_ keeps its states in float32, got {m.dtype} and {v.dtype}")
        if not (m.is_contiguous() and v.is_contiguous()):
            raise ValueError(f"adamw_ keeps its states contiguous, got strides {m.stride()} and {v.stride()}")
        if param.numel() == 0:
            continue
        dense = param.contiguous()
        if dense is not param:
            copies.append((param, dense))
        if has_kernel(param.device, rounding):
            slot = Slot(dense, grad.contiguous(), m, v, step, index)
        else:
            cut_off = compensation.view(-1) if compensation is not None else None
            slot = Slot(dense.view(-1), grad.reshape(-1), m.view(-1), v.view(-1), step, index, cut_off)
        slots.setdefault((param.device, param.dtype, int(step)), []).append(slot)
    for (device, dtype, step_count), group in slots.items():
        if has_kernel(device, rounding):
            adamw_triton.launch_adamw(group, step_count, hyper, rounding, seed)
        elif dtype == torch.float32:
            _update([replace(slot, grad=slot.grad.float()) for slot in group], step_count, hyper)
        else:
            _update_in_chunks(group, step_count, hyper, rounding, seed)
    for param, dense in copies:
        param.copy_(dense)


def has_kernel(device: torch.device, rounding: Rounding) -> bool:
    """Whether this device updates by a Triton kernel."""
    return device.type in TRITON_DEVICES and rounding != "kahan"


def workspace_bytes(numel: int, *, stochastic: bool, num_states: int = 0) -> int:
    """What the update of `numel` elements of two bytes holds at most beside its arguments, on the CPU.

    It goes through float32 copies of a chunk, and draws the noise of a step; quantized states, of which there are
    `num_states` for each element, through copies too, and through 8 bytes between values and codes, with noise of
    their own: for two chunks, 2 bytes of draws, 2 for first moments and 4 for second ones.
    """
    noise = NOISE_NUMEL * 6 if stochastic else 0
    if num_states:
        return (4 * (2 + num_states) + 8) * min(numel, QUANTIZED_CHUNK_NUMEL) + 8 * 2 * QUANTIZED_CHUNK_NUMEL + noise
    return 8 * min(numel, CHUNK_NUMEL) + noise


@dataclass(frozen=True)
class Hyper:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(slots=True)
class Slot:
    """One parameter, or a chunk of one, and what belongs to it; the tensors are contiguous, and flat on a CPU."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    index: int
    compensation: Tensor | None = None
    chunk: int = 0

    def chunks(self) -> Iterator["Slot"]:
        numel = self.param.numel()
        if numel <= CHUNK_NUMEL:
            yield self
            return
        for chunk, start in enumerate(range(0, numel, CHUNK_NUMEL)):
            part = slice(start, min(start + CHUNK_NUMEL, numel))
            yield Slot(
                self.param[part],
                self.grad[part],
                self.exp_avg[part],
                self.exp_avg_sq[part],
                self.step,
                self.index,
                self.compensation[part] if self.compensation is not None else None,
                chunk,
            )


def _update_in_chunks(slots: list[Slot], step: int, hyper: Hyper, rounding: Rounding, seed: int) -> None:
    """The update of two-byte parameters: chunk by chunk through float32 scratch that stays in the cache."""
    batches = list(_batches(slots))
    numel = max(sum(slot.param.numel() for slot in batch) for batch in batches)
    device = slots[0].param.device
    p32, g32 = torch.empty(2, numel, dtype=torch.float32, device=device)
    bits = p32.view(torch.int32)
    noise = step_noise(seed, step, device) if rounding == "stochastic" else None
    for batch in batches:
        sizes = [slot.param.numel() for slot in batch]
        total = sum(sizes)
        stored, values, grads = [slot.param for slot in batch], _pieces(p32, sizes), _pieces(g32, sizes)
        cut_off = [slot.compensation for slot in batch if slot.compensation is not None]
        torch._foreach_copy_(values, stored)
        torch._foreach_copy_(grads, [slot.grad for slot in batch])
        if rounding == "kahan":
            torch._foreach_add_(values, cut_off)
        _update([replace(slot, param=p, grad=g) for slot, p, g in zip(batch, values, grads, strict=True)], step, hyper)
        if noise is not None:
            for slot, piece in zip(batch, _pieces(bits, sizes), strict=True):
                add_noise_(piece, noise, noise_key(noise_key(seed, step, slot.index), slot.chunk, 0))
            cut_(bits[:total])
        torch._foreach_copy_(stored, values)
        if rounding == "kahan":
            torch._foreach_sub_(values, stored)
            torch._foreach_copy_(cut_off, values)


def _batches(slots: list[Slot]) -> Iterator[list[Slot]]:
    """The chunks of all parameters in order, small ones together, at most CHUNK_NUMEL elements a batch."""
    batch: list[Slot] = []
    numel = 0
    for slot in slots:
        for chunk in slot.chunks():
            if batch and numel + chunk.param.numel() > CHUNK_NUMEL:
                yield batch
                batch, numel = [], 0
            batch.append(chunk)
            numel += chunk.param.numel()
    if batch:
        yield batch


def _pieces(scratch: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(torch.split(scratch[: sum(sizes)], sizes))


def _update(slots: Sequence[Slot], step: int, hyper: Hyper) -> None:
    """The float32 update in place, without rounding: one vectorized pass where PyTorch has it."""
    if slots[0].param.device.type == "cpu" and _fused_is_right():
        _update_fused(slots, hyper)
    else:
        _update_plain(slots, step, hyper)


def _update_fused(slots: Sequence[Slot], hyper: Hyper) -> None:
    torch._fused_adamw_(
        [slot.param for slot in slots],
        [slot.grad for slot in slots],
        [slot.exp_avg for slot in slots],
        [slot.exp_avg_sq for slot in slots],
        [],
        [slot.step for slot in slots],
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
    )


def _update_plain(slots: Sequence[Slot], step: int, hyper: Hyper) -> None:
    step_size = hyper.lr / (1 - hyper.beta1**step)
    correction2 = (1 - hyper.beta2**step) ** 0.5
    for slot in slots:
        slot.exp_avg.lerp_(slot.grad, 1 - hyper.beta1)
        slot.exp_avg_sq.mul_(hyper.beta2).addcmul_(slot.grad, slot.grad, value=1 - hyper.beta2)
        slot.param.mul_(1 - hyper.lr * hyper.weight_decay)
        slot.param.addcdiv_(slot.exp_avg, slot.exp_avg_sq.sqrt().div_(correction2).add_(hyper.eps), value=-step_size)


@functools.cache
def _fused_is_right() -> bool:
    """Whether `torch._fused_adamw_`, which is private, exists here and computes what we think it does."""
    p, g, m = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -4.0], [0.1, 0.2, -0.3]])
    v = m * m
    hyper = Hyper(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.2)
    expected = adamw_reference(p, g, m, v, **vars(hyper), step=3)
    slot = Slot(p.clone(), g.clone(), m.clone(), v.clone(), torch.tensor(3.0), 0)
    try:
        _update_fused([slot], hyper)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return all(
        torch.allclose(found, right, rtol=1e-5, atol=1e-7)
        for found, right in zip((slot.param, slot.exp_avg, slot.exp_avg_sq), expected, strict=True)
    )
