"""The proof refuses every planted bug: each rule of the pipeline with a rewrite that is wrong in one place."""

# ruff: noqa: E501 — a mutant a line

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.add_layer_norm import add_layer_norm
from fxopt.kernels.add_rms_norm import add_rms_norm
from fxopt.kernels.clamped_swiglu import clamped_swiglu
from fxopt.kernels.glu import geglu, reglu, swiglu
from fxopt.kernels.interval_attention import interval_attention, visible_intervals
from fxopt.kernels.layer_norm import layer_norm
from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.kernels.linear_log_prob import linear_log_prob
from fxopt.kernels.relu_squared import relu_squared
from fxopt.kernels.rms_norm import l2_norm, rms_norm
from fxopt.kernels.rope import rope
from fxopt.passes.canonicalize import CANONICALIZE
from fxopt.passes.fuse_add_norm import FuseAddLayerNorm, FuseAddRMSNorm
from fxopt.passes.fuse_glu import FuseClampedSwiGLU, FuseGeGLU, FuseReGLU, FuseSwiGLU
from fxopt.passes.fuse_layer_norm import FUSE_LAYER_NORM, FuseDeviationLayerNorm, FuseLayerNorm, FuseVarianceLayerNorm
from fxopt.passes.fuse_linear_cross_entropy import (
    FuseDividedLinearCrossEntropy,
    FuseLinearCrossEntropy,
    FuseLinearCrossEntropyWithZLoss,
    FuseRowsLinearCrossEntropy,
    FuseScaledLinearCrossEntropy,
    FuseSoftcappedLinearCrossEntropy,
    FuseTransposedLinearCrossEntropy,
    SliceBeforeCastLinear,
    SliceBeforeLinear,
)
from fxopt.passes.fuse_linear_log_prob import (
    FuseCastingLinearLogProb,
    FuseDividedLinearLogitMinusLogSumExp,
    FuseDividedLinearLogProb,
    FuseLinearLogitMinusLogSumExp,
    FuseLinearLogProb,
    FuseScaledLinearLogitMinusLogSumExp,
    FuseScaledLinearLogProb,
    FuseSoftcappedLinearLogitMinusLogSumExp,
    FuseSoftcappedLinearLogProb,
)
from fxopt.passes.fuse_relu_squared import FuseReLUSquared
from fxopt.passes.fuse_rms_norm import (
    FUSE_RMS_NORM,
    FuseFloat32WeightRMSNorm,
    FuseL2Norm,
    FuseOuterEpsilonRMSNorm,
    FuseRMSNorm,
    FuseUnweightedRMSNorm,
)
from fxopt.passes.fuse_rope import (
    FuseComplexRoPE,
    FuseHalvesRoPE,
    FusePairsRoPE,
    FusePairsToHalvesRoPE,
    FuseRoPE,
    FuseSlicedPairsRoPE,
)
from fxopt.passes.recognize_functions import (
    RECOGNIZE_FUNCTIONS,
    RecognizeCrossEntropy,
    RecognizeGELU,
    RecognizeLinear,
    RecognizeMean,
    RecognizeReciprocalRoot,
    RecognizeScaledNorm,
    RecognizeSiLU,
    RecognizeTanhGELU,
)
from fxopt.passes.share_key_value_heads import ShareKeyValueHeads
from fxopt.passes.skip_masked_keys import SkipMaskedKeys
from fxopt.rewrite.match import Rule
from fxopt.rewrite.pipeline import rules_pass
from fxopt.rewrite.prove import Prover
from tests.captured_graphs import captured

ROWS, WIDTH, VOCABULARY = (3, 7), 32, 61


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16().requires_grad_()


def normed_inputs() -> list[torch.Tensor]:
    return [leaf(*ROWS, WIDTH), leaf(WIDTH)]


def gated_inputs() -> list[torch.Tensor]:
    return [leaf(*ROWS, WIDTH), leaf(*ROWS, WIDTH)]


def rotated_inputs() -> list[torch.Tensor]:
    angles = torch.randn(2, 1, 9, 16)
    return [leaf(2, 4, 9, 16), angles.cos().bfloat16(), angles.sin().bfloat16()]


def loss_inputs() -> list[torch.Tensor]:
    labels = torch.randint(0, VOCABULARY, (21,))
    labels[::3] = -100
    return [leaf(*ROWS, WIDTH), leaf(VOCABULARY, WIDTH), leaf(VOCABULARY), labels]


def rms(x: Any, eps: float = 1e-5) -> Any:
    h = x.to(torch.float32)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def outer(x: Any) -> Any:
    h = x.to(torch.float32)
    return h / (h.norm(dim=-1, keepdim=True) * WIDTH**-0.5 + 1e-2)


def variance_norm(x: Any) -> Any:
    h = x.to(torch.float32)
    variance = h.var(dim=-1, keepdim=True, unbiased=False)
    return ((h - h.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def by_hand(x: Any, eps: float) -> Any:
    centered = x - x.mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)


def without_gaps(mask: Any) -> Any:
    return mask.cumsum(-1).bool() & mask.flip(-1).cumsum(-1).flip(-1).bool()


def turned(x: Any) -> Any:
    return torch.cat((-x[..., 8:], x[..., :8]), dim=-1)


def neighbours_turned(x: Any) -> Any:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def halves_one_by_one(x: Any, cos: Any, sin: Any) -> Any:
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def pairs_to_halves(x: Any, cos: Any, sin: Any) -> Any:
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def pairs_one_by_one(x: Any, cos: Any, sin: Any) -> Any:
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def clamped_unit(gate: Any, up: Any) -> Any:
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def loss(logits: Any, labels: Any) -> Any:
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), labels)


def loss_with_z(rows: Any, labels: Any) -> Any:
    counts = labels != -100
    return F.cross_entropy(rows, labels) + 1e-3 * ((rows.logsumexp(-1).pow(2) * counts).sum() / counts.sum())


def labelled_inputs() -> list[torch.Tensor]:
    return [leaf(*ROWS, WIDTH), leaf(VOCABULARY, WIDTH), leaf(VOCABULARY), torch.randint(0, VOCABULARY, ROWS)]


def log_prob(logits: Any, labels: Any) -> Any:
    return F.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def log_prob_cast_inside(logits: Any, labels: Any) -> Any:
    return F.log_softmax(logits, -1, dtype=torch.float32).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def log_prob_as_difference(logits: Any, labels: Any) -> Any:
    rows = logits.float()
    return rows.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(rows, -1)


def capped(logits: Any) -> Any:
    return torch.tanh(logits / 3.0) * 3.0


def residual_rms(x: Any, residual: Any, weight: Any) -> Any:
    summed = x + residual
    return summed * 2, weight * rms(summed).to(x.dtype)


def residual_layer_norm(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
    summed = x + residual
    return summed * 2, F.layer_norm(summed, (WIDTH,), weight, bias, 1e-5)


def repeated(x: Any) -> Any:
    return x[:, :, None, :, :].expand(2, 2, 2, 9, 16).reshape(2, 4, 9, 16)


def rotated_complex(x: Any, rotation: Any) -> Any:
    numbers = torch.view_as_complex(x.float().reshape(2, 9, 4, -1, 2))
    return torch.view_as_real(numbers * rotation).flatten(3).to(x.dtype)


# Each rule with code in which it applies, and that code's inputs.
SITES: dict[type[Rule], tuple[Callable[..., Any], Callable[[], list[torch.Tensor]]]] = {
    FuseRMSNorm: (lambda x, weight: weight * rms(x).to(x.dtype), normed_inputs),
    FuseOuterEpsilonRMSNorm: (lambda x, weight: weight * outer(x).to(x.dtype), normed_inputs),
    RecognizeScaledNorm: (lambda x: x.norm(dim=-1, keepdim=True) * WIDTH**-0.5, lambda: normed_inputs()[:1]),
    FuseDeviationLayerNorm: (lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-2), lambda: normed_inputs()[:1]),
    FuseFloat32WeightRMSNorm: (lambda x, weight: (weight * rms(x)).to(x.dtype), normed_inputs),
    FuseL2Norm: (
        lambda x: (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + 1e-6)).to(x.dtype),
        lambda: normed_inputs()[:1],
    ),
    FuseUnweightedRMSNorm: (lambda x: rms(x).to(x.dtype), lambda: normed_inputs()[:1]),
    FuseLayerNorm: (
        lambda x, weight, bias: F.layer_norm(x, (WIDTH,), weight, bias, 1e-5),
        lambda: [*normed_inputs(), leaf(WIDTH)],
    ),
    FuseVarianceLayerNorm: (variance_norm, lambda: normed_inputs()[:1]),
    FuseAddRMSNorm: (residual_rms, lambda: [*gated_inputs(), leaf(WIDTH)]),
    FuseAddLayerNorm: (residual_layer_norm, lambda: [*gated_inputs(), leaf(WIDTH), leaf(WIDTH)]),
    FuseSwiGLU: (lambda gate, up: F.silu(gate) * up, gated_inputs),
    FuseGeGLU: (lambda gate, up: F.gelu(gate) * up, gated_inputs),
    FuseReGLU: (lambda gate, up: F.relu(gate) * up, gated_inputs),
    FuseClampedSwiGLU: (clamped_unit, gated_inputs),
    FuseReLUSquared: (lambda x: F.relu(x).square(), lambda: gated_inputs()[:1]),
    FuseRoPE: (lambda x, cos, sin: x * cos + turned(x) * sin, rotated_inputs),
    FusePairsRoPE: (lambda x, cos, sin: x * cos + neighbours_turned(x) * sin, rotated_inputs),
    FuseComplexRoPE: (rotated_complex, lambda: [leaf(2, 9, 4, 16), torch.polar(torch.ones(9, 1, 8), leaf(9, 1, 8).float().detach())]),
    FuseLinearCrossEntropy: (lambda h, w, b, labels: loss(F.linear(h, w, b), labels), loss_inputs),
    FuseScaledLinearCrossEntropy: (lambda h, w, b, labels: loss(F.linear(h, w, b) * 0.25, labels), loss_inputs),
    FuseDividedLinearCrossEntropy: (lambda h, w, b, labels: loss(F.linear(h, w, b) / 4.0, labels), loss_inputs),
    FuseSoftcappedLinearCrossEntropy: (
        lambda h, w, b, labels: loss(torch.tanh(F.linear(h, w, b) / 3.0) * 3.0, labels),
        loss_inputs,
    ),
    FuseLinearCrossEntropyWithZLoss: (
        lambda h, w, b, labels: loss_with_z(F.linear(h, w, b).float().view(-1, VOCABULARY), labels),
        loss_inputs,
    ),
    FuseLinearLogProb: (lambda h, w, b, labels: log_prob(F.linear(h, w, b), labels), labelled_inputs),
    FuseCastingLinearLogProb: (lambda h, w, b, labels: log_prob_cast_inside(F.linear(h, w, b), labels), labelled_inputs),
    FuseScaledLinearLogProb: (lambda h, w, b, labels: log_prob(F.linear(h, w, b) * 0.25, labels), labelled_inputs),
    FuseDividedLinearLogProb: (lambda h, w, b, labels: log_prob(F.linear(h, w, b) / 4.0, labels), labelled_inputs),
    FuseSoftcappedLinearLogProb: (lambda h, w, b, labels: log_prob(capped(F.linear(h, w, b)), labels), labelled_inputs),
    FuseLinearLogitMinusLogSumExp: (lambda h, w, b, labels: log_prob_as_difference(F.linear(h, w, b), labels), labelled_inputs),
    FuseScaledLinearLogitMinusLogSumExp: (lambda h, w, b, labels: log_prob_as_difference(F.linear(h, w, b) * 0.25, labels), labelled_inputs),
    FuseDividedLinearLogitMinusLogSumExp: (lambda h, w, b, labels: log_prob_as_difference(F.linear(h, w, b) / 4.0, labels), labelled_inputs),
    FuseSoftcappedLinearLogitMinusLogSumExp: (lambda h, w, b, labels: log_prob_as_difference(capped(F.linear(h, w, b)), labels), labelled_inputs),
    SliceBeforeLinear: (lambda h, w, b, labels: F.linear(h, w, b)[..., :-1, :] * 2, loss_inputs),
    FuseHalvesRoPE: (halves_one_by_one, lambda: [leaf(2, 9, 4, 16), *(leaf(9, 1, 8).detach() for _ in range(2))]),
    FusePairsToHalvesRoPE: (pairs_to_halves, lambda: [leaf(2, 9, 4, 16), *(leaf(9, 1, 8).detach() for _ in range(2))]),
    SliceBeforeCastLinear: (lambda h, w, b, labels: F.linear(h, w, b).float()[..., :-1, :] * 2, loss_inputs),
    FuseRowsLinearCrossEntropy: (lambda h, w, b, labels: F.cross_entropy(F.linear(h.view(-1, WIDTH), w, b).float(), labels), loss_inputs),
    FuseTransposedLinearCrossEntropy: (
        lambda h, w, b, labels: F.cross_entropy(F.linear(h, w, b).float().transpose(1, 2), labels.view(*ROWS)),
        loss_inputs,
    ),
    FuseSlicedPairsRoPE: (pairs_one_by_one, lambda: [leaf(2, 9, 4, 16), *(leaf(9, 1, 8).detach() for _ in range(2))]),
    RecognizeReciprocalRoot: (lambda x: x / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5), lambda: normed_inputs()[:1]),
    RecognizeMean: (lambda x: x.float().sum(-1, keepdim=True) / WIDTH, lambda: normed_inputs()[:1]),
    RecognizeSiLU: (lambda x: x * torch.sigmoid(x), lambda: gated_inputs()[:1]),
    RecognizeGELU: (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), lambda: gated_inputs()[:1]),
    RecognizeTanhGELU: (lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))), lambda: gated_inputs()[:1]),
    RecognizeLinear: (lambda h, w: h @ w.t(), lambda: loss_inputs()[:2]),
    RecognizeCrossEntropy: (
        lambda h, w, b, labels: F.nll_loss(F.log_softmax(F.linear(h, w).view(-1, VOCABULARY).float(), -1), labels),
        loss_inputs,
    ),
    ShareKeyValueHeads: (
        lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True),
        lambda: [leaf(2, 4, 9, 16), leaf(2, 2, 9, 16), leaf(2, 2, 9, 16)],
    ),
    SkipMaskedKeys: (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        lambda: [leaf(3, 4, 9, 16), leaf(3, 2, 9, 16), leaf(3, 2, 9, 16), torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()],
    ),
}  # fmt: skip


# The rules that read what other passes put in.
PASSES_BEFORE = {
    FuseOuterEpsilonRMSNorm: (RECOGNIZE_FUNCTIONS,),
    FuseAddRMSNorm: (FUSE_RMS_NORM,),
    FuseAddLayerNorm: (FUSE_LAYER_NORM,),
}

# The mutants: what the rewrite should be, with one thing wrong.
MUTANTS: list[tuple[type[Rule], str, Callable[..., Any]]] = [
    (FuseRMSNorm, "another epsilon", lambda x, weight, eps: rms_norm(x, weight, eps * 1.01)),
    (FuseOuterEpsilonRMSNorm, "epsilon inside", lambda x, weight, eps: rms_norm(x, weight, eps)),
    (FuseOuterEpsilonRMSNorm, "epsilon squared inside", lambda x, weight, eps: rms_norm(x, weight, eps * eps)),
    (FuseOuterEpsilonRMSNorm, "another epsilon", lambda x, weight, eps: rms_norm(x, weight, eps * 1.01, True)),
    (RecognizeScaledNorm, "NaN at zero", lambda x: torch.sqrt(torch.square(x).mean(-1, keepdim=True))),
    (FuseDeviationLayerNorm, "the biased deviation", lambda x, eps: rms_norm(x - x.mean(-1, keepdim=True), None, eps, True)),
    (FuseRMSNorm, "no weight", lambda x, eps: rms_norm(x, None, eps)),
    (FuseRMSNorm, "one plus weight", lambda x, weight, eps: rms_norm(x, weight + 1, eps)),
    (FuseRMSNorm, "a percent too much", lambda x, weight, eps: rms_norm(x, weight, eps) * 1.01),
    (FuseRMSNorm, "no gradient of the weight", lambda x, weight, eps: rms_norm(x, weight.detach(), eps)),
    (FuseRMSNorm, "no gradient of the input", lambda x, weight, eps: rms_norm(x.detach(), weight, eps)),
    (FuseRMSNorm, "LayerNorm", lambda x, weight, eps: layer_norm(x, weight, None, eps)),
    (FuseRMSNorm, "zeros for NaN", lambda x, weight, eps: rms_norm(x.nan_to_num(nan=0.0), weight, eps)),
    (FuseRMSNorm, "zeros for NaN in the weight", lambda x, weight, eps: rms_norm(x, weight.nan_to_num(nan=0.0), eps)),
    (FuseRMSNorm, "numbers for infinity", lambda x, weight, eps: rms_norm(x.clamp(-1e5, 1e5), weight, eps)),
    (FuseFloat32WeightRMSNorm, "float16 inside", lambda x, weight, eps: rms_norm(x.half(), weight, eps).to(x.dtype)),
    (FuseFloat32WeightRMSNorm, "another dtype", lambda x, weight, eps: rms_norm(x.float(), weight, eps)),
    (FuseUnweightedRMSNorm, "epsilon after the root", lambda x, eps: rms_norm(x, None, 0.0) / (1 + eps)),
    (FuseUnweightedRMSNorm, "another shape", lambda x, eps: rms_norm(x, None, eps)[None]),
    (FuseL2Norm, "the mean for the sum", lambda x, eps: rms_norm(x, None, eps)),
    (FuseL2Norm, "another epsilon", lambda x, eps: l2_norm(x, eps * 1.01)),
    (FuseLayerNorm, "no bias", lambda x, weight, eps: layer_norm(x, weight, None, eps)),
    (FuseLayerNorm, "no weight", lambda x, bias, eps: layer_norm(x, None, bias, eps)),
    (FuseLayerNorm, "bfloat16 inside", lambda x, weight, bias, eps: by_hand(x, eps) * weight + bias),
    (FuseLayerNorm, "another epsilon", lambda x, weight, bias, eps: layer_norm(x, weight, bias, eps * 2)),
    (FuseLayerNorm, "RMSNorm", lambda x, weight, bias, eps: rms_norm(x, weight, eps) + bias),
    (FuseVarianceLayerNorm, "not centered", lambda x, eps: rms_norm(x, None, eps)),
    (FuseVarianceLayerNorm, "another epsilon", lambda x, eps: layer_norm(x, None, None, eps * 2)),
    (FuseAddRMSNorm, "a sum that is a difference", lambda x, residual, weight, eps: add_rms_norm(x, -residual, weight, eps)),
    (FuseAddRMSNorm, "the norm of one addend", lambda x, residual, weight, eps: (x + residual, rms_norm(x, weight, eps))),
    (FuseAddRMSNorm, "results swapped", lambda x, residual, weight, eps: add_rms_norm(x, residual, weight, eps)[::-1]),
    (FuseAddRMSNorm, "a residual without gradient", lambda x, residual, weight, eps: add_rms_norm(x, residual.detach(), weight, eps)),
    (FuseAddLayerNorm, "no bias", lambda x, residual, weight, eps: add_layer_norm(x, residual, weight, None, eps)),
    (FuseSwiGLU, "gate and up swapped", lambda gate, up: swiglu(up, gate)),
    (FuseSwiGLU, "gelu", lambda gate, up: geglu(gate, up)),
    (FuseSwiGLU, "a percent too much", lambda gate, up: swiglu(gate, up * 1.01)),
    (FuseSwiGLU, "no gradient of the gate", lambda gate, up: swiglu(gate.detach(), up)),
    (FuseSwiGLU, "float16 inside", lambda gate, up: swiglu(gate.half(), up.half()).to(gate.dtype)),
    (FuseSwiGLU, "two roundings more", lambda gate, up: (gate * 3) * (torch.sigmoid(gate) / 3) * up),
    (FuseSwiGLU, "numbers for infinity", lambda gate, up: swiglu(gate.clamp(-1e5, 1e5), up)),
    (FuseGeGLU, "by tanh", lambda gate, up: geglu(gate, up, "tanh")),
    (FuseReGLU, "silu", lambda gate, up: swiglu(gate, up)),
    (FuseClampedSwiGLU, "gate and up swapped", lambda gate, up, alpha, limit: clamped_swiglu(up, gate, alpha, limit)),
    (FuseClampedSwiGLU, "another alpha", lambda gate, up, alpha, limit: clamped_swiglu(gate, up, alpha * 1.01, limit)),
    (FuseClampedSwiGLU, "another limit", lambda gate, up, alpha, limit: clamped_swiglu(gate, up, alpha, limit * 1.01)),
    (FuseClampedSwiGLU, "no gradient of up", lambda gate, up, alpha, limit: clamped_swiglu(gate, up.detach(), alpha, limit)),
    (FuseClampedSwiGLU, "a gate that is clamped from below", lambda gate, up, alpha, limit: clamped_swiglu(gate.clamp(min=-limit), up, alpha, limit)),
    (FuseClampedSwiGLU, "SwiGLU", lambda gate, up: swiglu(gate, up + 1)),
    (FuseReLUSquared, "not squared", lambda x: F.relu(x)),
    (FuseReLUSquared, "the square of x", lambda x: torch.square(x)),
    (FuseReLUSquared, "a percent too much", lambda x: relu_squared(x) * 1.01),
    (FuseReLUSquared, "zeros for NaN", lambda x: relu_squared(x.nan_to_num(nan=0.0))),
    (FuseReLUSquared, "two roundings more", lambda x: relu_squared(x * 3) / 9),
    (FuseReLUSquared, "half the gradient", lambda x: reglu(x, x.detach())),
    (FuseRoPE, "sine and cosine swapped", lambda x, cos, sin: rope(x, sin, cos)),
    (FuseRoPE, "the other way round", lambda x, cos, sin: rope(x, cos, -sin)),
    (FuseRoPE, "one position late", lambda x, cos, sin: rope(x, cos.roll(1, -2), sin.roll(1, -2))),
    (FuseRoPE, "neighbours", lambda x, cos, sin: rope(x, cos, sin, layout="pairs")),
    (FusePairsRoPE, "halves", lambda x, cos, sin: rope(x, cos, sin)),
    (FusePairsRoPE, "pairs to halves", lambda x, cos, sin: rope(x, cos, sin, layout="pairs_to_halves")),
    (FuseComplexRoPE, "conjugate", lambda x, rotation: rope(x, torch.real(rotation), -torch.imag(rotation), layout="pairs")),
    (FuseLinearCrossEntropy, "labels off by one", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels.roll(1), bias=bias)),
    (FuseLinearCrossEntropy, "no bias", lambda hidden, weight, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels)),
    (FuseLinearCrossEntropy, "a sum", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias, reduction="sum")),
    (FuseLinearCrossEntropy, "smoothed", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias, label_smoothing=0.01)),
    (FuseLinearCrossEntropy, "no gradient of the head", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight.detach(), labels, bias=bias)),
    (FuseLinearCrossEntropy, "a bfloat16 softmax", lambda hidden, weight, bias, labels: F.cross_entropy(F.linear(hidden.flatten(0, -2), weight, bias), labels).to(torch.float32)),
    (FuseLinearCrossEntropy, "ignored labels count", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels.clamp(min=0), bias=bias)),
    (FuseLinearCrossEntropy, "zero where all are ignored", lambda hidden, weight, bias, labels, ignore_index: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias, reduction="sum") / (labels != ignore_index).sum().clamp(min=1)),
    (FuseLinearCrossEntropy, "zero for NaN", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias).nan_to_num(nan=0.0)),
    (FuseLinearCrossEntropy, "zero for NaN in the input", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).flatten(0, -2), weight, labels, bias=bias)),
    (FuseLinearCrossEntropy, "the first label is ignored", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels.masked_fill(labels == 0, -100), bias=bias)),
    (FuseLinearCrossEntropy, "the last label is ignored", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels.masked_fill(labels == VOCABULARY - 1, -100), bias=bias)),
    (FuseLinearCrossEntropy, "the first labels alone", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels.clamp(max=40), bias=bias)),
    (FuseScaledLinearCrossEntropy, "no scale", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias)),
    (FuseDividedLinearCrossEntropy, "times", lambda hidden, weight, bias, labels, scale: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias, logit_scale=scale)),
    (FuseSoftcappedLinearCrossEntropy, "no cap", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias)),
    (FuseSoftcappedLinearCrossEntropy, "another cap", lambda hidden, weight, bias, labels, scale: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias, softcap=scale * 1.01)),
    (FuseLinearCrossEntropyWithZLoss, "no z-loss", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias)),
    (FuseLinearCrossEntropyWithZLoss, "half of it", lambda hidden, weight, bias, labels, scale: linear_cross_entropy(hidden.flatten(0, -2), weight, labels, bias=bias, z_loss=scale / 2)),
    (FuseLinearLogProb, "labels off by one", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels.roll(1, 1), bias=bias, ignore_index=None)[0]),
    (FuseLinearLogProb, "no bias", lambda hidden, weight, labels: linear_log_prob(hidden, weight, labels, ignore_index=None)[0]),
    (FuseLinearLogProb, "logsumexp", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[2]),
    (FuseLinearLogProb, "the loss", lambda hidden, weight, bias, labels: -linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[0]),
    (FuseLinearLogProb, "a percent too much", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[0] * 1.01),
    (FuseLinearLogProb, "a temperature", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None, temperature=1.01)[0]),
    (FuseLinearLogProb, "no gradient of the head", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight.detach(), labels, bias=bias, ignore_index=None)[0]),
    (FuseLinearLogProb, "no gradient of the input", lambda hidden, weight, bias, labels: linear_log_prob(hidden.detach(), weight, labels, bias=bias, ignore_index=None)[0]),
    (FuseLinearLogProb, "the first label is ignored", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=0)[0]),
    (FuseLinearLogProb, "the last label is ignored", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=VOCABULARY - 1)[0]),
    (FuseLinearLogProb, "the first labels alone", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels.clamp(max=40), bias=bias, ignore_index=None)[0]),
    (FuseLinearLogProb, "another shape", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[0][None]),
    (FuseLinearLogProb, "zeros for NaN", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[0].nan_to_num(nan=0.0)),
    (FuseCastingLinearLogProb, "in the dtype of the logits", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None, dtype=torch.bfloat16)[0]),
    (FuseScaledLinearLogProb, "no scale", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[0]),
    (FuseScaledLinearLogProb, "a temperature", lambda hidden, weight, bias, labels, scale: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None, temperature=scale)[0]),
    (FuseDividedLinearLogProb, "times", lambda hidden, weight, bias, labels, scale: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None, logit_scale=scale)[0]),
    (FuseSoftcappedLinearLogProb, "no cap", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[0]),
    (FuseSoftcappedLinearLogProb, "another cap", lambda hidden, weight, bias, labels, scale: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None, softcap=scale * 1.01)[0]),
    (FuseLinearLogitMinusLogSumExp, "the logit alone", lambda hidden, weight, bias, labels: torch.gather(F.linear(hidden, weight, bias), -1, labels.unsqueeze(-1)).squeeze(-1).to(torch.float32)),
    (FuseLinearLogitMinusLogSumExp, "labels off by one", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels.roll(1, 1), bias=bias, ignore_index=None)[0]),
    (FuseLinearLogitMinusLogSumExp, "a percent too much", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[0] * 1.01),
    (FuseLinearLogitMinusLogSumExp, "the first label is ignored", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=0)[0]),
    (FuseScaledLinearLogitMinusLogSumExp, "no scale", lambda hidden, weight, bias, labels: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None)[0]),
    (FuseDividedLinearLogitMinusLogSumExp, "times", lambda hidden, weight, bias, labels, scale: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None, logit_scale=scale)[0]),
    (FuseSoftcappedLinearLogitMinusLogSumExp, "another cap", lambda hidden, weight, bias, labels, scale: linear_log_prob(hidden, weight, labels, bias=bias, ignore_index=None, softcap=scale * 1.01)[0]),
    (SliceBeforeLinear, "the other rows", lambda hidden, weight, bias: F.linear(hidden[..., 1:, :], weight, bias)),
    (SliceBeforeCastLinear, "no cast", lambda hidden, weight, bias, rows: F.linear(hidden[..., rows, :], weight, bias)),
    (FuseRowsLinearCrossEntropy, "labels off by one", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden, weight, labels.roll(1), bias=bias)),
    (FuseTransposedLinearCrossEntropy, "labels across", lambda hidden, weight, bias, labels: linear_cross_entropy(hidden, weight, labels.t().reshape(3, 7), bias=bias)),
    (FuseHalvesRoPE, "pairs", lambda x, cos, sin: rope(x, cos, sin, layout="pairs")),
    (FuseHalvesRoPE, "the other way round", lambda x, cos, sin: rope(x, cos, -sin)),
    (FusePairsToHalvesRoPE, "halves", lambda x, cos, sin: rope(x, cos, sin)),
    (FuseSlicedPairsRoPE, "pairs to halves", lambda x, cos, sin: rope(x, cos, sin, layout="pairs_to_halves")),
    (FuseSlicedPairsRoPE, "the other way round", lambda x, cos, sin: rope(x, cos, -sin, layout="pairs")),
    (RecognizeReciprocalRoot, "no epsilon", lambda x, variance: x * torch.rsqrt(variance)),
    (RecognizeReciprocalRoot, "the root", lambda x, variance, eps: x * torch.sqrt(variance + eps)),
    (RecognizeMean, "a sum", lambda x: torch.sum(x, -1, keepdim=True)),
    (RecognizeMean, "over the rows", lambda x: torch.mean(x, 0, keepdim=True)[..., :1].expand(3, 7, 1)),
    (RecognizeSiLU, "gelu", lambda x: F.gelu(x)),
    (RecognizeGELU, "by tanh", lambda x: F.gelu(x, approximate="tanh")),
    (RecognizeTanhGELU, "exact", lambda x: F.gelu(x)),
    (RecognizeLinear, "no gradient of the weight", lambda hidden, weight: F.linear(hidden, weight.detach())),
    (RecognizeCrossEntropy, "a sum", lambda rows, labels: F.cross_entropy(rows, labels, reduction="sum")),
    (RecognizeCrossEntropy, "zero where all are ignored", lambda rows, labels: F.cross_entropy(rows, labels).nan_to_num(nan=0.0)),
    (ShareKeyValueHeads, "keys for values", lambda query, key, value, causal: F.scaled_dot_product_attention(query, key, key, is_causal=causal, enable_gqa=True)),
    (ShareKeyValueHeads, "not causal", lambda query, key, value: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)),
    (ShareKeyValueHeads, "another scale", lambda query, key, value, causal: F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.2525, enable_gqa=True)),
    (ShareKeyValueHeads, "heads in another order", lambda query, key, value, causal: F.scaled_dot_product_attention(query, key.flip(1), value.flip(1), is_causal=causal, enable_gqa=True)),
    (SkipMaskedKeys, "only causal", lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)),
    (SkipMaskedKeys, "intervals one key late", lambda query, key, value, mask, scale: interval_attention(query, key, value, mask, (visible_intervals(mask) + 1).clamp(max=mask.shape[-1]), scale)),
    (SkipMaskedKeys, "gaps closed", lambda query, key, value, mask, scale: interval_attention(query, key, value, without_gaps(mask), visible_intervals(without_gaps(mask)), scale)),
    (SkipMaskedKeys, "another scale", lambda query, key, value, mask: interval_attention(query, key, value, mask, visible_intervals(mask), 0.2525)),
    (SkipMaskedKeys, "keys without gradient", lambda query, key, value, mask, scale: interval_attention(query, key.detach(), value, mask, visible_intervals(mask), scale)),
]  # fmt: skip


def outcome_of(rule: type[Rule], site: type[Rule]) -> Any:
    function, inputs = SITES[site]
    torch.manual_seed(0)
    module = captured(function, *inputs())
    for earlier in (CANONICALIZE, *PASSES_BEFORE.get(site, ())):
        earlier.run(module.graph, None)
    return rules_pass("only", rule).run(module.graph, Prover())


@pytest.mark.parametrize("rule", SITES, ids=lambda rule: rule.__name__)
def test_the_rule_itself_is_proven(rule: type[Rule]) -> None:
    outcome = outcome_of(rule, rule)
    assert outcome.changes and not outcome.refused


@pytest.mark.parametrize(("rule", "bug", "rewrite"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_mutant_is_refused(rule: type[Rule], bug: str, rewrite: Callable[..., Any]) -> None:
    mutant = type("Mutant", (rule,), {"rewrite": staticmethod(rewrite), "op": bug})
    outcome = outcome_of(mutant, rule)
    assert outcome.refused and not outcome.changes
    assert not any("could not be run" in refused.reason for refused in outcome.refused)
