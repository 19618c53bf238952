"""The tensors that hold quantized moments: torchao's classes, with codes of `fxopt.kernels.moment_codes`.

A moment is `qmap[codes] * scale`, as in torchao, whose checkpointing and `dequantize` therefore serve; which code a
value gets is ours. Importing this file imports torchao, and lets `torch.load` read the tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from fxopt.kernels import moment_codes
from fxopt.precision.moment_ranges import is_quantized, write

_BLOCK = {8: 256, 4: 128}


class _Follows:
    """What both classes share: operations give the class itself, and what is copied into it is stored in its codes."""

    bits: int

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = args[0]
        if func is torch.ops.aten.clone.default:  # which `copy.deepcopy` of an optimizer asks for
            names, context = held.__tensor_flatten__()
            return cls.__tensor_unflatten__({name: getattr(held, name).clone() for name in names}, context)  # type: ignore[attr-defined]
        if func is torch.ops.aten.copy_.default and isinstance(held, _Follows):
            return _copy(held, args[1])
        out = super().__torch_dispatch__(func, types, args, kwargs or {})  # type: ignore[misc]
        if isinstance(out, OptimState8bit | OptimState4bit) and not isinstance(out, _Follows):
            names, context = out.__tensor_flatten__()
            out = cls.__tensor_unflatten__({name: getattr(out, name) for name in names}, context)  # type: ignore[attr-defined]
        return out

    @classmethod
    def zeros(cls, shape: Any, signed: bool = True, device: Any = None) -> Any:
        """Zeros of this shape, whose number of elements is a whole number of blocks."""
        codes = torch.zeros(shape, dtype=torch.uint8, device=device)
        numel, block = codes.numel(), _BLOCK[cls.bits]
        scale = torch.zeros(numel // block, dtype=torch.float32, device=device)
        qmap = torch.tensor(_code_values(cls.bits, signed), dtype=torch.float32, device=device)
        if cls.bits == 8:
            return cls(codes, scale, qmap, signed, dtype=torch.float32)  # type: ignore[call-arg]
        packed = torch.zeros(numel // 2, dtype=torch.uint8, device=device)
        return cls(packed, scale, qmap, signed, torch.Size(shape), dtype=torch.float32)  # type: ignore[call-arg]


class Moment8bit(_Follows, OptimState8bit):  # type: ignore[misc]
    """A moment (...) in 8 bits: codes (...) uint8, scale (numel / 256,) float32, qmap (256,) float32. Shows float32."""

    bits = 8


class Moment4bit(_Follows, OptimState4bit):  # type: ignore[misc]
    """A moment (...) in 4 bits: codes (numel / 2,) uint8, two in each, scale (numel / 128,), qmap (16,) float32."""

    bits = 4


torch.serialization.add_safe_globals([Moment8bit, Moment4bit])


@functools.cache
def _code_values(bits: int, signed: bool) -> list[float]:
    with unset_fake_temporarily():
        values: list[float] = moment_codes.code_values(bits, signed).tolist()
        return values


def has_our_codes(state: Any) -> bool:
    """Whether a quantized state's codes are those of `moment_codes`; torchao's own are in older checkpoints."""
    bits = 8 if state.qmap.numel() == 256 else 4
    values = _code_values(bits, state.signed)
    return state.block_size == _BLOCK[bits] and bool(state.qmap.tolist() == values)


def _copy(held: Any, source: Any) -> Any:
    if type(source) is type(held) and has_our_codes(source):
        held.codes.copy_(source.codes)
        held.scale.copy_(source.scale)
    else:
        values = source.dequantize() if is_quantized(source) else source
        values = values.to(held.device, torch.float32).expand(held.shape).clone().view(-1)
        held.scale.zero_()
        write(held, 0, values)
    return held
