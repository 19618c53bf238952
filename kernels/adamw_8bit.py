"""AdamW with moments in 8 bits, as one Triton launch for all parameters of a dtype.

A block of 256 moments is read as `values[code] * scale`, updated in float32, and stored as the codes of the values
nearest to `moment / scale`, where `scale` is the block's largest magnitude; formula and roundings of the parameter are
those of `fxopt.kernels.adamw`. Codes are torchao's bit for bit. A GPU's kernel alone: on a CPU
`fxopt.precision.optimizer_kinds` does the same update through float32, a chunk at a time.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.

Shapes: param, grad (...) of N elements, N a multiple of 256; moments as `QuantizedMoment`; step () float32, from 1.
Dtypes: param and grad bfloat16 or float32; all arithmetic float32.
Bytes moved: 10 per bfloat16 element (param 4, grad 2, codes 4), and 16 per block of 256 for the scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxopt.kernels import adamw
from fxopt.kernels.adamw_triton import (
    addresses_of,
    are_aligned,
    coefficients,
    is_stochastic,
    programs,
    table_on,
    triton_seed,
    triton_type,
    update,
)
from fxopt.kernels.backend import tl, triton
from fxopt.kernels.elementary import divide
from fxopt.kernels.launch import launch
from fxopt.kernels.rounding import Rounding

NUMEL = 256  # elements that share a scale
ROWS = 4  # a program updates four times as many blocks


@dataclass(frozen=True)
class QuantizedMoment:
    """A moment in 8 bits.

    codes (...) uint8, of N elements; scale (N / 256,) float32; values (256,) float32, ascending.
    thresholds (2¹⁶,) int32, by the upper 16 bits of a float: with its lower 16 bits added, which are inverted first if
    it is negative, its code is in the upper 16 bits.
    """

    codes: Tensor
    scale: Tensor
    values: Tensor
    thresholds: Tensor


@triton.jit
def _dequantize(codes_ptr, scale_ptr, values_ptr, offsets, rows, mask):
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + rows, mask=mask, other=0.0)
    return tl.load(values_ptr + codes) * scale


@triton.jit
def _quantize(moment, codes_ptr, scale_ptr, thresholds_ptr, offsets, rows, mask):
    """Stores a moment (ROWS, 256). A NaN spreads over its block, as it does in torchao."""
    scale = tl.maximum(tl.max(tl.abs(moment), 1), 1e-12)
    scale = tl.where(tl.max((moment != moment).to(tl.int32), 1) > 0, float("nan"), scale)[:, None]
    share = divide(moment, tl.broadcast_to(scale, moment.shape))
    bits = share.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0xFFFF
    codes = (tl.load(thresholds_ptr + ((bits >> 16) & 0xFFFF)) + (bits & 0xFFFF)) >> 16
    tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=mask)


@triton.jit
def _adamw_8bit_kernel(
    table_ptr, owner_ptr, m_values_ptr, v_values_ptr, m_thresholds_ptr, v_thresholds_ptr,
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STOCHASTIC: tl.constexpr, NUMEL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A row of the table is one parameter (`foreach_adamw_8bit_`); each program works for the parameter that owns it.
    row = table_ptr + tl.load(owner_ptr + tl.program_id(0)) * 9
    param_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(PARAM)), 16)
    grad_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRAD)), 16)
    m_codes_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.uint8)), 16)
    v_codes_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.uint8)), 16)
    m_scale_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    v_scale_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    num_blocks, seed, first_program = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)

    program = tl.program_id(0).to(tl.int64) - first_program
    lane = tl.arange(0, ROWS)[:, None] * NUMEL + tl.arange(0, NUMEL)[None, :]
    random = tl.randint4x(seed, program * ROWS * NUMEL + lane)  # one call of the generator gives four numbers
    for part in tl.static_range(4):
        rows = (program * 4 + part) * ROWS + tl.arange(0, ROWS)[:, None]
        offsets = (program * 4 + part) * ROWS * NUMEL + lane
        mask = rows < num_blocks
        p = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        m = _dequantize(m_codes_ptr, m_scale_ptr, m_values_ptr, offsets, rows, mask)
        v = _dequantize(v_codes_ptr, v_scale_ptr, v_values_ptr, offsets, rows, mask)
        p, m, v = update(
            p, g, m, v, random[part],
            decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, sqrt_correction2, eps, STOCHASTIC,
        )  # fmt: skip
        _quantize(m, m_codes_ptr, m_scale_ptr, m_thresholds_ptr, offsets, rows, mask)
        _quantize(v, v_codes_ptr, v_scale_ptr, v_thresholds_ptr, offsets, rows, mask)
        tl.store(param_ptr + offsets, p.to(param_ptr.dtype.element_ty), mask=mask)


def has_kernel(param: Tensor, grad: Tensor, rounding: Rounding) -> bool:
    """Whether `foreach_adamw_8bit_` can update `param`: on a GPU, without a compensation, 16 bytes at a time."""
    return (
        adamw.has_kernel(param.device, rounding)
        and param.is_contiguous()
        and grad.is_contiguous()
        and are_aligned(param.numel(), addresses_of(param, grad))
    )


def foreach_adamw_8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[QuantizedMoment],
    exp_avg_sqs: Sequence[QuantizedMoment],
    steps: Sequence[Tensor],
    hyper: adamw.Hyper,
    *,
    rounding: Rounding,
    seed: int,
    indices: Sequence[int],
) -> None:
    """Updates `params` and both moments in place; arguments as those of `foreach_adamw_`, moments as at the top.

    `has_kernel` holds for each parameter. The moments of a kind share `values` and `thresholds`.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, (param, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        groups.setdefault((param.device, param.dtype, grad.dtype, int(step)), []).append(place)
    for places in groups.values():
        param, grad, step_count = params[places[0]], grads[places[0]], int(steps[places[0]])
        numels = tuple(params[place].numel() for place in places)
        owner, first_programs = programs(numels, 4 * ROWS * NUMEL, param.device)
        rows = []
        for place, first_program in zip(places, first_programs, strict=True):
            m, v = exp_avgs[place], exp_avg_sqs[place]
            rows.append((
                *addresses_of(params[place], grads[place], m.codes, v.codes, m.scale, v.scale),
                m.scale.numel(),
                triton_seed(seed, step_count, indices[place]),
                first_program,
            ))  # fmt: skip
        m, v = exp_avgs[places[0]], exp_avg_sqs[places[0]]
        launch(
            _adamw_8bit_kernel, (owner.numel(),),
            table_on(param.device, rows), owner, m.values, v.values, m.thresholds, v.thresholds,
            *coefficients(step_count, hyper),
            PARAM=triton_type(param), GRAD=triton_type(grad), STOCHASTIC=is_stochastic(param, rounding),
            NUMEL=NUMEL, ROWS=ROWS,
        )  # fmt: skip
