"""Which optimizer states are kept in 8 or 4 bits, how they begin, and what becomes of those that are loaded.

Their expected value is that of float32 states, step after step (`fxopt.kernels.moment_codes`), which nearest rounding,
as in torchao and bitsandbytes, does not give.
"""

from typing import Any

from torch import Tensor

from fxopt.precision.moment_ranges import form_of, read
from fxopt.precision.policy import OptimizerState

# What torchao and bitsandbytes quantize: a small tensor wins nothing.
MIN_NUMEL = 4096
_BLOCK = {"8bit": 256, "4bit": 128}


def quantizes(numel: int, states: OptimizerState) -> bool:
    """Whether a tensor of `numel` elements gets quantized states; it gets float32 ones otherwise, never bfloat16."""
    return states != "float32" and numel >= MIN_NUMEL and numel % _BLOCK[states] == 0


def quantized_zeros(like: Tensor, states: OptimizerState, *, signed: bool) -> Tensor:
    """Zeros of the shape of `like`, a plain tensor, in 8 or 4 bits."""
    zeros: Tensor = _state_class(states).zeros(tuple(like.shape), signed, like.device)
    return zeros


def load(states: OptimizerState) -> None:
    """Imports the states' class, without which `torch.load` refuses a state that has such tensors in it."""
    if states != "float32":
        _state_class(states)


def _state_class(states: OptimizerState) -> Any:
    from fxopt.precision import quantized_moment

    return quantized_moment.Moment8bit if states == "8bit" else quantized_moment.Moment4bit


def convert(state: Tensor, states: OptimizerState, *, signed: bool) -> Tensor:
    """`state`, float32 or quantized, in the form that `states` gives a tensor of its size, in our codes.

    What has to be rounded for that is rounded to the nearest.
    """
    form = states if quantizes(state.numel(), states) else "float32"
    if form == "float32":
        return state if form_of(state) == form else read(state, 0, state.numel()).view(state.shape)
    from fxopt.precision.quantized_moment import has_our_codes

    kind = _state_class(form)
    if isinstance(state, kind) and has_our_codes(state):
        return state
    quantized = quantized_zeros(state, form, signed=signed)
    quantized.copy_(state)
    return quantized
