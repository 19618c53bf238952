"""Rows of logits to log-probabilities and what else their softmax tells, and its gradient: `linear_log_prob`'s kernels.

Formulas and dtypes are in `linear_log_prob.py`. Logits x (n, V) in any floating dtype, contiguous; labels (n,) int64;
everything else (n,) in `compute_dtype`. The forward reads x once, in one pass that keeps the running maximum m,
Σ exp(z - m) and Σ exp(z - m) (z - m). The backward reads x and writes dx over it; there x may be some columns of all,
and labels, which count from the first of these, may lie outside.
Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.backend import compute_dtype, tl, triton, triton_dtype
from fxopt.kernels.elementary import divide, exp, log, tanh, tanh_slope
from fxopt.kernels.launch import launch
from fxopt.kernels.linear_head import BLOCK, softmax_step


class LogitOptions(NamedTuple):
    """What happens to the logits between the matrix product and the softmax; the defaults cost nothing."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def factor(self) -> float:
        """What gives z: of the logits, or of their tanh."""
        return (self.logit_scale if self.softcap is None else self.softcap) / self.temperature


class RowResults(NamedTuple):
    """What the forward finds of each row: of all rows, or of a chunk or a few of them."""

    log_prob: Tensor
    entropy: Tensor | None  # None where it is not wanted
    logsumexp: Tensor
    is_top: Tensor
    maximum: Tensor  # of the logits, with a softcap of their tanh; 0 where all are -inf
    total: Tensor  # Σ exp(z - the maximum's z)

    def of(self, rows: slice) -> "RowResults":
        return RowResults._make(None if result is None else result[rows] for result in self)


class RowGradients(NamedTuple):
    """A row's dz is p * (mass + slope * log p), and at_label in its label's column."""

    mass: Tensor
    at_label: Tensor
    slope: Tensor | None  # None where the entropy has no gradient

    def of(self, rows: slice) -> "RowGradients":
        return RowGradients._make(None if gradient is None else gradient[rows] for gradient in self)


@triton.jit
def _log_prob_fwd_kernel(
    logits_ptr, labels_ptr, log_prob_ptr, entropy_ptr, logsumexp_ptr, is_top_ptr, maximum_ptr, total_ptr, V, row_stride,
    HAS_ENTROPY: tl.constexpr, TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    label_x = tl.load(logits_ptr + label).to(DTYPE)
    # z is what FACTOR multiplies: the logits, or their tanh. It comes last, so that differences of logits are exact.
    FACTOR: tl.constexpr = (LOGIT_SCALE if SOFTCAP is None else SOFTCAP) / TEMPERATURE

    # One pass keeps, per lane, the running maximum m, Σ exp(z - m), and Σ exp(z - m) * (z - m) (online softmax).
    maxima = tl.full([BLOCK], float("-inf"), dtype=DTYPE)
    sums = tl.zeros([BLOCK], dtype=DTYPE)
    products = tl.zeros([BLOCK], dtype=DTYPE)
    outranked = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(DTYPE)
        # As for argmax, NaN is more than all numbers, and of equal ones the first counts.
        is_nan = x != x
        more = tl.where(label_x == label_x, (x > label_x) | is_nan, False)
        before = tl.where(cols < label, (x == label_x) | is_nan, False)
        outranked = outranked | (more | before).to(tl.int32)
        z = x
        if SOFTCAP is not None:
            z = tl.where(cols < V, tanh(x * (LOGIT_SCALE / SOFTCAP)), float("-inf"))
        higher = tl.maximum(maxima, z)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        fall = tl.where(maxima == float("-inf"), 0.0, (maxima - finite) * FACTOR)
        shrink = exp(fall)
        below = (z - finite) * FACTOR
        e = exp(below)
        if HAS_ENTROPY:
            products = shrink * (products + sums * fall) + tl.where(cols < V, e * below, 0.0)
        sums = sums * shrink + e
        maxima = higher
    maximum = tl.max(maxima, axis=0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    fall = tl.where(maxima == float("-inf"), 0.0, (maxima - maximum) * FACTOR)
    shrink = exp(fall)
    total = tl.sum(sums * shrink, axis=0)
    log_total = log(total)
    label_z = label_x
    if SOFTCAP is not None:
        label_z = tanh(label_x * (LOGIT_SCALE / SOFTCAP))
    tl.store(log_prob_ptr + row, (label_z - maximum) * FACTOR - log_total)
    logsumexp = tl.where(maximum == float("inf"), maximum, log_total + maximum * FACTOR)
    tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(is_top_ptr + row, (tl.max(outranked, axis=0) == 0).to(tl.int8))
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
    if HAS_ENTROPY:
        product = tl.sum(shrink * (products + sums * fall), axis=0)
        tl.store(entropy_ptr + row, log_total - divide(product, total))


@triton.jit
def _log_prob_bwd_kernel(
    logits_ptr, labels_ptr, maximum_ptr, total_ptr, mass_ptr, at_label_ptr, slope_ptr, V, row_stride,
    HAS_SLOPE: tl.constexpr, TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    total = tl.load(total_ptr + row)
    FACTOR: tl.constexpr = (LOGIT_SCALE if SOFTCAP is None else SOFTCAP) / TEMPERATURE
    mass = tl.load(mass_ptr + row) * (LOGIT_SCALE / TEMPERATURE)
    at_label = tl.load(at_label_ptr + row) * (LOGIT_SCALE / TEMPERATURE)
    if HAS_SLOPE:
        slope = tl.load(slope_ptr + row) * (LOGIT_SCALE / TEMPERATURE)
        log_total = log(total)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + cols, mask=cols < V, other=0.0).to(DTYPE)
        z = x
        if SOFTCAP is not None:
            inner = x * (LOGIT_SCALE / SOFTCAP)
            z = tanh(inner)
        below = (z - maximum) * FACTOR
        p = divide(exp(below), total)
        weight = mass
        if HAS_SLOPE:
            weight += slope * (below - log_total)
        dz = p * weight
        dz = tl.where(cols == label, at_label, dz)
        if SOFTCAP is not None:
            dz *= tanh_slope(inner)
        tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), mask=cols < V)


def forward_rows(logits: Tensor, labels: Tensor, results: RowResults, options: LogitOptions) -> None:
    """In ATen calls, a few rows at a time so that the float32 copies stay in the cache."""
    num_rows, vocabulary = logits.shape
    step = softmax_step(vocabulary, 1 if results.entropy is None else 2)
    scratch = logits.new_empty(min(step, num_rows), vocabulary, dtype=compute_dtype(logits))
    powers = scratch if results.entropy is None else torch.empty_like(scratch)
    for start in range(0, num_rows, step):
        block = slice(start, min(start + step, num_rows))
        label, found = labels[block].unsqueeze(1), results.of(block)
        z = scratch[: block.stop - block.start].copy_(logits[block])
        label_z = z.gather(1, label)
        # `argmax` takes ten times as long as `amax`: it looks only where the label's logit is as large as another.
        others = z.scatter_(1, label, -math.inf).amax(1, keepdim=True)
        z.scatter_(1, label, label_z)
        is_top = label_z > others
        ties = (~is_top & ~(label_z < others)).squeeze(1).nonzero().squeeze(1)
        is_top[ties] = z[ties].argmax(1, keepdim=True) == label[ties]
        maximum = torch.maximum(label_z, others)
        if options.softcap is not None:
            for values in (z, label_z, maximum):
                _scale_(values, options).tanh_()
        maximum.masked_fill_(maximum == -math.inf, 0.0)
        # The factor multiplies differences of logits, which are exact.
        below = z.sub_(maximum)
        if options.factor != 1.0:
            below.mul_(options.factor)
        power = torch.exp(below, out=powers[: z.shape[0]])
        total = power.sum(1, keepdim=True)
        log_total = total.log()
        log_prob = (label_z - maximum) * options.factor - log_total
        logsumexp = torch.where(maximum == math.inf, maximum, log_total + maximum * options.factor)
        if found.entropy is not None:
            entropy = log_total - below.mul_(power).sum(1, keepdim=True) / total
            found.entropy.copy_(entropy.squeeze(1))
        for target, values in (
            (found.log_prob, log_prob), (found.logsumexp, logsumexp), (found.is_top, is_top),
            (found.maximum, maximum), (found.total, total),
        ):  # fmt: skip
            target.copy_(values.squeeze(1))


def _scale_(logits: Tensor, options: LogitOptions) -> Tensor:
    """What a soft cap takes the tanh of, in place."""
    assert options.softcap is not None
    if options.logit_scale != 1.0:
        logits.mul_(options.logit_scale)
    return logits.div_(options.softcap)


def backward_rows(
    logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, gradients: RowGradients, options: LogitOptions
) -> None:
    """In ATen calls, a few rows at a time so that the float32 copies stay in the cache: logits become dlogits."""
    num_rows, vocabulary = logits.shape
    is_here = ((labels >= 0) & (labels < vocabulary)).unsqueeze(1)
    has_slope, has_cap = gradients.slope is not None, options.softcap is not None
    step = softmax_step(vocabulary, 1 + has_slope + has_cap)
    scratch = logits.new_empty(min(step, num_rows), vocabulary, dtype=compute_dtype(logits))
    powers, tanh_scratch = (torch.empty_like(scratch) if needed else scratch for needed in (has_slope, has_cap))
    scale = options.logit_scale / options.temperature
    for start in range(0, num_rows, step):
        block = slice(start, min(start + step, num_rows))
        row_total, label = total[block].unsqueeze(1), labels[block].unsqueeze(1).where(is_here[block], 0)
        z = scratch[: block.stop - block.start].copy_(logits[block])
        if has_cap:
            tanh = torch.tanh(_scale_(z, options), out=tanh_scratch[: z.shape[0]])
            z.copy_(tanh)
        z.sub_(maximum[block].unsqueeze(1))
        if options.factor != 1.0:
            z.mul_(options.factor)
        mass, at_label = (each[block].unsqueeze(1) * scale for each in (gradients.mass, gradients.at_label))
        if gradients.slope is None:
            dz = z.exp_().mul_(mass / row_total)
        else:
            slope = gradients.slope[block].unsqueeze(1) * scale
            power = torch.exp(z, out=powers[: z.shape[0]])
            dz = z.sub_(row_total.log()).mul_(slope / row_total).add_(mass / row_total).mul_(power)
        dz.scatter_(1, label, at_label.where(is_here[block], dz[:, :1]))
        if has_cap:
            torch.ops.aten.tanh_backward.grad_input(dz, tanh, grad_input=dz)
        logits[block] = dz


def forward_rows_triton(logits: Tensor, labels: Tensor, results: RowResults, options: LogitOptions) -> None:
    entropy = results.entropy
    launch(
        _log_prob_fwd_kernel, (logits.shape[0],),
        logits, labels, results.log_prob, results.log_prob if entropy is None else entropy, results.logsumexp,
        results.is_top.view(torch.int8), results.maximum, results.total, logits.shape[1], logits.stride(0),
        HAS_ENTROPY=entropy is not None, **_constants(logits, options),
    )  # fmt: skip


def backward_rows_triton(
    logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, gradients: RowGradients, options: LogitOptions
) -> None:
    mass, at_label, slope = gradients
    launch(
        _log_prob_bwd_kernel, (logits.shape[0],),
        logits, labels, maximum, total, mass, at_label, mass if slope is None else slope, logits.shape[1],
        logits.stride(0),
        HAS_SLOPE=slope is not None, **_constants(logits, options),
    )  # fmt: skip


def _constants(logits: Tensor, options: LogitOptions) -> dict[str, Any]:
    named = {name.upper(): value for name, value in options._asdict().items()}
    return named | {"BLOCK": BLOCK, "DTYPE": triton_dtype(logits), "num_warps": 8}
