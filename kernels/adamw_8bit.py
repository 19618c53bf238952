"""AdamW with moments in 8 bits, as one Triton launch for all parameters of a dtype.

A block of 256 moments is read as `values[code] * scale`, updated in float32, and stored in the codes of
`fxopt.kernels.moment_codes`, rounded so that they are right on average; formula and roundings of the parameter are
those of `fxopt.kernels.adamw`. A GPU's kernel alone: on a CPU `fxopt.precision.optimizer_kinds` does the same update
through float32, a chunk at a time. The noise, here and there, is a pure function of (seed, step, place).

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861; codes: `moment_codes`.

Shapes: param, grad (...) of N elements, N a multiple of 256; moments as `QuantizedMoment`; step () float32, from 1.
Dtypes: param and grad bfloat16 or float32; all arithmetic float32.
Bytes moved: 10 per bfloat16 element (param 4, grad 2, codes 4), and 16 per block of 256 for the scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxopt.kernels import adamw, moment_codes
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
_V = moment_codes.UNSIGNED[8]
V_STEPS, V_FIRST, V_SECOND = tl.constexpr(_V.steps), tl.constexpr(_V.first), tl.constexpr(_V.second)
V_FIRST_BITS = tl.constexpr(_V.first_bits)
M_SHIFT, M_MASK = tl.constexpr(moment_codes.SIGNED[8].shift), tl.constexpr((1 << moment_codes.SIGNED[8].shift) - 1)
LARGEST = tl.constexpr(moment_codes.LARGEST)
ROWS = 4  # a program updates four times as many blocks


@dataclass(frozen=True)
class QuantizedMoment:
    """A moment in 8 bits: codes (...) uint8, of N elements; scale (N / 256,) and values (256,) float32."""

    codes: Tensor
    scale: Tensor
    values: Tensor


@triton.jit
def _dequantize(codes_ptr, scale_ptr, values_ptr, offsets, rows, mask):
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + rows, mask=mask, other=0.0)
    return tl.load(values_ptr + codes) * scale


@triton.jit
def _is_finite(largest):
    return (largest < LARGEST) & (largest == largest)


@triton.jit
def _quantize_first(moment, random, codes_ptr, scale_ptr, offsets, rows, mask):
    """Stores first moments (ROWS, 256) as `moment_codes.write_signed` does; `random` (ROWS, 256) int32."""
    largest = _largest(tl.abs(moment), moment)
    bits = (largest.to(tl.int32, bitcast=True) + (1 << 21)) & 0x7F800000
    scale = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23).to(tl.float32, bitcast=True)
    scale = tl.where(_is_finite(largest), scale, float("nan"))[:, None]
    half = (moment * divide(1.0, scale)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    code = (((half & 0x7FFF) + (random & M_MASK)) >> M_SHIFT) | ((half >> 8) & 0x80)
    tl.store(codes_ptr + offsets, code.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=mask)


@triton.jit
def _quantize_second(moment, random, beta2, codes_ptr, scale_ptr, offsets, rows, mask):
    """Stores second moments (ROWS, 256) as `moment_codes.write_unsigned` does; `random` (ROWS, 256) int32."""
    largest = _largest(moment, moment)[:, None]
    before = tl.load(scale_ptr + rows, mask=mask, other=0.0)
    base = tl.maximum(before * beta2, 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    doublings = (largest.to(tl.int32, bitcast=True) - base + ((1 << 22) + (1 << 15))) >> 23
    scale = tl.minimum(tl.maximum(base + (doublings << 23), 1 << 23), 253 << 23).to(tl.float32, bitcast=True)
    scale = tl.where(_is_finite(largest), scale, float("nan"))
    share = tl.maximum(moment * divide(1.0, scale) + V_FIRST, V_SECOND)
    place = (share.to(tl.int32, bitcast=True) - V_FIRST_BITS) * V_STEPS + (random & 0x7FFFFF)
    code = tl.where(moment == 0, 0, place >> 23)
    tl.store(codes_ptr + offsets, code.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=mask)


@triton.jit
def _largest(magnitude, moment):
    """The largest of each block (ROWS,); NaN if one is in it."""
    has_nan = tl.max((moment != moment).to(tl.int32), 1) > 0
    return tl.where(has_nan, float("nan"), tl.max(magnitude, 1))


@triton.jit
def _adamw_8bit_kernel(
    table_ptr, owner_ptr, m_values_ptr, v_values_ptr,
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
    random_v = tl.randint4x(seed ^ 2, program * ROWS * NUMEL + lane)  # its own bits: 7 for m, 16 for p, 23 for v
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
        _quantize_first(m, random[part] >> 16, m_codes_ptr, m_scale_ptr, offsets, rows, mask)
        _quantize_second(v, random_v[part], beta2, v_codes_ptr, v_scale_ptr, offsets, rows, mask)
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

    `has_kernel` holds for each parameter. The moments of a kind share `values`.
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
            table_on(param.device, rows), owner, m.values, v.values,
            *coefficients(step_count, hyper),
            PARAM=triton_type(param), GRAD=triton_type(grad), STOCHASTIC=is_stochastic(param, rounding),
            NUMEL=NUMEL, ROWS=ROWS,
        )  # fmt: skip
