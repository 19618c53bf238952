"""Every wrong rule must be refused, and the right one must not."""

import re

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.glu import swiglu
from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.kernels.rms_norm import rms_norm
from fxopt.kernels.rope import rope
from fxopt.passes.fuse_glu import FuseSwiGLU
from fxopt.passes.fuse_linear_cross_entropy import FuseLinearCrossEntropy
from fxopt.passes.fuse_rms_norm import FuseRMSNorm
from fxopt.passes.fuse_rope import FuseRoPE
from fxopt.rewrite.match import find_matches
from fxopt.rewrite.prove import Prover, compare
from fxopt.rewrite.replace import rewrite_of
from fxopt.rewrite.spelling import spell_out
from tests.captured_graphs import captured

BF16 = torch.bfloat16


def leaf(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def norm_code(x, weight):
    h = x.to(torch.float32)
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(BF16)


def glu_code(gate, up):
    return F.silu(gate) * up


def rope_code(x, cos, sin):
    return x * cos + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin


def loss_code(hidden, weight, labels):
    logits = F.linear(hidden, weight).float().view(-1, 50)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="mean")


NORM = norm_code, lambda: (leaf(4, 6, 32), leaf(32))
GLU = glu_code, lambda: (leaf(4, 6, 32), leaf(4, 6, 32))
ROPE = rope_code, lambda: (leaf(2, 3, 6, 16), leaf(2, 1, 6, 16), leaf(2, 1, 6, 16))
LOSS = loss_code, lambda: (leaf(4, 6, 32), leaf(50, 32), torch.randint(0, 50, (24,)))


def proof_of(rule, code):
    function, inputs = code
    graph = captured(function, *inputs()).graph
    spell_out(graph)
    (match,), _ = find_matches(graph, rule)
    return Prover().prove(rewrite_of(match))


@pytest.mark.parametrize(
    ("rule", "code"),
    [(FuseRMSNorm, NORM), (FuseSwiGLU, GLU), (FuseRoPE, ROPE), (FuseLinearCrossEntropy, LOSS)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_right_rule_is_proven(rule, code):
    proof = proof_of(rule, code)
    assert proof.holds, proof.reason
    assert proof.num_inputs > 0


def test_two_names_may_be_bound_to_one_node():
    proof = proof_of(FuseSwiGLU, (lambda x: F.silu(x) * x, lambda: GLU[1]()[:1]))
    assert proof.holds, proof.reason


class WrongEpsilon(FuseRMSNorm):
    @staticmethod
    def rewrite(x, weight, eps):
        return rms_norm(x, weight, 10 * eps)


class DroppedWeight(FuseRMSNorm):
    @staticmethod
    def rewrite(x, weight, eps):
        return rms_norm(x, torch.ones_like(weight), eps)


class OnePercentOff(FuseRMSNorm):
    @staticmethod
    def rewrite(x, weight, eps):
        return rms_norm(x, weight * 1.01, eps)


class DetachedWeight(FuseRMSNorm):
    @staticmethod
    def rewrite(x, weight, eps):
        return rms_norm(x, weight.detach(), eps)


class AnotherResultDtype(FuseRMSNorm):
    @staticmethod
    def rewrite(x, weight, eps):
        return rms_norm(x, weight, eps).to(torch.float32)


class RoundedTooMuch(FuseRMSNorm):
    """The same function in exact arithmetic, with a cast too many: only the comparison of errors can see it."""

    @staticmethod
    def rewrite(x, weight, eps, dtype):
        return rms_norm(x.to(torch.float8_e5m2).to(dtype), weight, eps)


class SwappedHalves(FuseSwiGLU):
    @staticmethod
    def rewrite(gate, up):
        return swiglu(up, gate)


class OppositeRotation(FuseRoPE):
    @staticmethod
    def rewrite(x, cos, sin):
        return rope(x, cos, -sin)


class AnotherReduction(FuseLinearCrossEntropy):
    @staticmethod
    def rewrite(hidden, weight, labels, ignore_index):
        return linear_cross_entropy(hidden.flatten(0, -2), weight, labels, ignore_index=ignore_index, reduction="sum")


class ShiftedLabels(FuseLinearCrossEntropy):
    @staticmethod
    def rewrite(hidden, weight, labels, ignore_index, reduction):
        rolled = labels.roll(1)
        return linear_cross_entropy(
            hidden.flatten(0, -2), weight, rolled, ignore_index=ignore_index, reduction=reduction
        )


class ForgottenIgnoreIndex(FuseLinearCrossEntropy):
    @staticmethod
    def rewrite(hidden, weight, labels, reduction):
        kept = labels.clamp(min=0)
        return linear_cross_entropy(hidden.flatten(0, -2), weight, kept, reduction=reduction)


@pytest.mark.parametrize(
    ("mutant", "code", "reason"),
    [
        (WrongEpsilon, NORM, "another function"),
        (DroppedWeight, NORM, "another function"),
        (OnePercentOff, NORM, "another function"),
        (DetachedWeight, NORM, "gradient of weight"),
        (AnotherResultDtype, NORM, "float32"),
        (RoundedTooMuch, NORM, "less accurate"),
        (SwappedHalves, GLU, "another function"),
        (OppositeRotation, ROPE, "another function"),
        (AnotherReduction, LOSS, "another function"),
        (ShiftedLabels, LOSS, "another function"),
        (ForgottenIgnoreIndex, LOSS, "another function"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_planted_bug_is_refused(mutant, code, reason):
    proof = proof_of(mutant, code)
    assert not proof.holds
    assert reason in proof.reason


def test_equal_rewrites_are_proven_once():
    def twice(x, weight):
        return norm_code(norm_code(x, weight), weight)

    graph = captured(twice, leaf(4, 6, 32), leaf(32)).graph
    spell_out(graph)
    matches, _ = find_matches(graph, FuseRMSNorm)
    prover = Prover()
    for match in matches:
        assert prover.prove(rewrite_of(match)).holds
    assert len(matches) == 2 and len(prover.known) == 1


def test_a_proof_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    proof_of(FuseSwiGLU, GLU)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_large_vocabularies_are_cut():
    def wide_loss(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float().view(-1, 60_000), labels)

    proof = proof_of(
        FuseLinearCrossEntropy,
        (wide_loss, lambda: (leaf(2, 6, 64), leaf(60_000, 64), torch.randint(0, 60_000, (12,)))),
    )
    assert proof.holds, proof.reason


def test_two_functions_are_compared_as_two_graphs_are():
    def draw_inputs(seed, wide):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(size, generator=generator).to(BF16) for size in ((32, 64), (48, 64))]
        return tuple((value.double() if wide else value).requires_grad_() for value in drawn)

    right = compare(F.linear, F.linear, draw_inputs)
    assert right.holds and 0 < right.original_error == right.replacement_error < 0.01
    for wrong, reason in (
        (lambda hidden, weight: 1.01 * F.linear(hidden, weight), "another function: result"),
        (
            lambda hidden, weight: F.linear(hidden, 1.01 * weight - 0.01 * weight.detach()),
            "function: gradient 1",
        ),
        (lambda hidden, weight: F.linear(hidden, weight).double(), "result is torch.float64"),
        (lambda hidden, weight: F.linear(hidden, weight + 16 - 16), "less accurate"),
    ):
        assert re.search(reason, compare(F.linear, wrong, draw_inputs).reason)
