"""Optimizer states in 8 and 4 bits: torchao's block-wise quantized tensors, read and written a range at a time.

A block of elements (256 in 8 bits, 128 in 4) shares one float32 scale, its largest magnitude; a code is the nearest of
256 or 16 values. Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861; Li et al.,
"Memory Efficient Optimizers with 4-bit States", arXiv:2309.01507. Codes are bit for bit those of
`torchao.optim.quant_utils`, whose binary search takes 60 ns an element on a CPU; a table takes 1.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxopt.kernels.adamw_8bit import QuantizedMoment
from fxopt.precision.policy import OptimizerState

# What torchao and bitsandbytes quantize: a small tensor wins nothing.
MIN_NUMEL = 4096
_BLOCK = {"8bit": 256, "4bit": 128}


def is_quantized(state: object) -> bool:
    """Whether `state` is one of torchao's quantized optimizer states."""
    return hasattr(state, "codes") and hasattr(state, "qmap")


def quantizes(numel: int, states: OptimizerState) -> bool:
    """Whether a tensor of `numel` elements gets quantized states; it gets float32 ones otherwise, never bfloat16."""
    return states != "float32" and numel >= MIN_NUMEL and numel % _BLOCK[states] == 0


def quantized_zeros(like: Tensor, states: OptimizerState, *, signed: bool) -> Tensor:
    """Zeros of the shape of `like`, a plain tensor, in 8 or 4 bits."""
    shape = tuple(like.shape)
    options = {"signed": signed, "block_size": _BLOCK[states], "device": like.device, "dtype": torch.float32}
    return _state_class(states).zeros(shape, **options)


def load(states: OptimizerState) -> None:
    """Imports torchao's class, without which `torch.load` refuses a state that has such tensors in it."""
    if states != "float32":
        _state_class(states)


@functools.cache
def _state_class(states: OptimizerState) -> Any:
    """torchao's class; it is taught to be cloned, which `copy.deepcopy` of an optimizer or of its state asks for."""
    if states == "8bit":
        from torchao.optim.subclass_8bit import OptimState8bit as State
    else:
        from torchao.optim.subclass_4bit import OptimState4bit as State

    def clone(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names, context = args[0].__tensor_flatten__()
        return State.__tensor_unflatten__({name: getattr(args[0], name).clone() for name in names}, context)

    State.implements(torch.ops.aten.clone.default)(clone)
    # torchao works its tables of codes out once and keeps them: not with fake tensors, which have no values.
    with unset_fake_temporarily():
        for signed in (True, False):
            State.zeros((_BLOCK[states],), signed=signed, block_size=_BLOCK[states])
    return State


def convert(state: Tensor, states: OptimizerState, *, signed: bool) -> Tensor:
    """`state`, float32 or quantized, in the form that `states` gives a tensor of its size."""
    form = states if quantizes(state.numel(), states) else "float32"
    if form == form_of(state):
        return state
    values = read(state, 0, state.numel())
    if form == "float32":
        return values.view(state.shape)
    values = values.clone() if form_of(state) == "float32" else values
    quantized = quantized_zeros(state, form, signed=signed)
    write(quantized, 0, values)
    return quantized


def form_of(state: Tensor) -> OptimizerState:
    """ "float32", "8bit" or "4bit"."""
    if not is_quantized(state):
        return "float32"
    return "8bit" if state.codes.numel() == state.numel() else "4bit"  # type: ignore[attr-defined]


class Scratch:
    """What a range of up to `numel` elements passes through between codes and values; for range after range.

    Memory of its own for each range would be mapped and unmapped each time, which takes as long as the arithmetic.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self._indices = torch.empty(numel, dtype=torch.int64, device=device)
        self._codes = torch.empty(numel, dtype=torch.int32, device=device)

    def indices(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) int64."""
        return self._indices[: rows * columns].view(rows, columns)

    def codes(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) int32."""
        return self._codes[: rows * columns].view(rows, columns)


def read(state: Any, start: int, stop: int, out: Tensor | None = None, scratch: Scratch | None = None) -> Tensor:
    """Elements `start` to `stop` in float32, flat and contiguous, on their own memory unless `state` is float32.

    Both ends lie on a block's edge. A quantized state's are written to `out` (stop - start,), if given;
    `scratch` is for at least as many elements.
    """
    if not is_quantized(state):
        return state.view(-1)[start:stop].float()
    if form_of(state) == "8bit":
        codes = state.codes.view(-1)[start:stop]
    else:
        packed = state.codes[start // 2 : stop // 2]
        codes = torch.stack([packed >> 4, packed & 0b1111], dim=-1)
    block = state.block_size
    shape = (stop - start) // block, block
    indices = (scratch or Scratch(stop - start, codes.device)).indices(*shape).copy_(codes.view(shape))
    out = torch.empty(shape, dtype=torch.float32, device=codes.device) if out is None else out.view(shape)
    values = _look_up(state.qmap, indices, out)
    return values.mul_(state.scale[start // block : stop // block, None]).view(-1)


def pick(state: Any, positions: Tensor) -> Tensor:
    """Elements of a quantized state in float32 (n,), at `positions` (n,) int64 of its flat form."""
    if form_of(state) == "8bit":
        codes = state.codes.view(-1)[positions]
    else:
        codes = (state.codes[positions // 2] >> (4 * (1 - positions % 2))) & 0b1111
    return state.qmap[codes.int()] * state.scale[positions // state.block_size]


def write(state: Any, start: int, values: Tensor, scratch: Scratch | None = None) -> None:
    """Stores float32 `values`, flat, contiguous, scratch afterwards, from element `start` on: to the nearest code."""
    stop = start + values.numel()
    if not is_quantized(state):
        kept = state.view(-1)[start:stop]
        if kept.data_ptr() != values.data_ptr():  # else they were updated where they lie
            kept.copy_(values)
        return
    block = state.block_size
    blocks = values.view(-1, block)
    scratch = scratch or Scratch(values.numel(), values.device)
    scale = torch.abs(blocks, out=scratch.codes(*blocks.shape).view(torch.float32)).amax(1).clip_(1e-12)
    codes = _codes(blocks.div_(scale[:, None]), form_of(state), state.signed, scratch)
    state.scale[start // block : stop // block] = scale
    if form_of(state) == "8bit":
        state.codes.view(-1)[start:stop] = codes
    else:
        packed = codes.to(torch.uint8)
        state.codes[start // 2 : stop // 2] = (packed[::2] << 4) | packed[1::2]


def for_kernel(state: Any) -> QuantizedMoment:
    """An 8-bit state as AdamW's kernel for a GPU takes it; it shares its memory."""
    return QuantizedMoment(state.codes, state.scale, *_kernel_tables(state.signed, state.codes.device))


@functools.cache
def _kernel_tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """`values` and `thresholds` of `QuantizedMoment`."""
    values = quantized_zeros(torch.empty(_BLOCK["8bit"], device=device), "8bit", signed=signed).qmap  # type: ignore[attr-defined]
    return values, _thresholds("8bit", signed, device)


def _codes(scaled: Tensor, form: OptimizerState, signed: bool, scratch: Scratch) -> Tensor:
    """torchao's codes (n,) int32 of float32 values (blocks, block) in [-1, 1], which are scratch afterwards."""
    bits, codes = scaled.view(torch.int32), scratch.codes(*scaled.shape)
    if signed:
        torch.bitwise_right_shift(bits, 31, out=codes)
        bits.bitwise_xor_(codes.bitwise_and_(_LOWER_16))
    torch.bitwise_right_shift(bits, 16, out=codes)
    upper = scratch.indices(*scaled.shape).copy_(codes.bitwise_and_(_LOWER_16))
    _look_up(_thresholds(form, signed, scaled.device), upper, codes)
    return codes.add_(bits.bitwise_and_(_LOWER_16)).bitwise_right_shift_(16).view(-1)


def _look_up(table: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """`table[indices]` for a table (n,) and indices (rows, columns): of torch's ways, the one that uses all threads."""
    return torch.gather(table.expand(indices.shape[0], -1), 1, indices, out=out)


_LOWER_16 = (1 << 16) - 1


@functools.cache
def _thresholds(form: OptimizerState, signed: bool, device: torch.device) -> Tensor:
    """`thresholds` (2¹⁶,) int32 of `QuantizedMoment`, for 8 or 4 bits.

    Floats that agree in their upper 16 bits have one code or two: no such range below 1 is wide enough for more. Where
    the second begins is found by bisection, by asking torchao.
    """
    from torchao.optim import quant_utils, subclass_4bit, subclass_8bit

    source = subclass_8bit if form == "8bit" else subclass_4bit
    quantize = quant_utils.quantize_8bit_with_qmap if form == "8bit" else quant_utils.quantize_4bit_with_qmap
    qmap = torch.tensor(source.get_qmap_signed() if signed else source.get_qmap_unsigned())
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).roll(1 << 15) << 16
    inverted = (upper >> 31) & _LOWER_16  # the bits of a negative number grow as it falls

    def codes(lower: Tensor) -> Tensor:
        return quantize((upper | lower ^ inverted).view(torch.float32), qmap).int()

    low, high = torch.zeros_like(upper), torch.full_like(upper, _LOWER_16)
    first, last = codes(low), codes(high)
    while int((high - low).max()) > 1:
        middle = (low + high) // 2
        is_first = codes(middle) == first
        low, high = torch.where(is_first, middle, low), torch.where(is_first, high, middle)
    carry = torch.where(first == last, 0, (1 << 16) - high)
    return ((first << 16) + carry).to(device)
