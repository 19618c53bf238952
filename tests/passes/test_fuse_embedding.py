"""The embedding of the tokens: rewritten where torch sums its gradient in two bytes, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes.pipelines import EXACT
from fxopt.rewrite.prove import Prover
from tests.captured_graphs import captured, run_optimized, targets
from tests.passes.rewriting import leaf, near_misses, optimized_targets, proven

IDS = torch.tensor([[3, 1, 3, 3, 0], [3, 2, 3, 5, 5]])


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embedding(dtype, padding_idx):
    torch.manual_seed(0)
    graph, ops = proven(lambda ids, w: F.embedding(ids, w, padding_idx), IDS, leaf(7, 16, dtype=dtype))
    assert ops == ["embedding"]
    weight = leaf(7, 16, dtype=dtype)
    (gradient,) = torch.autograd.grad(graph(IDS, weight)[0].float().square().sum(), weight)
    truth = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.embedding(IDS, truth, padding_idx).square().sum(), truth)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


def test_the_module_writes_to_the_result():
    """As Gemma's older code: a result that is scaled in place."""

    def function(ids, weight):
        hidden = F.embedding(ids, weight)
        hidden *= 4.0
        return hidden

    weight = leaf(7, 16, dtype=torch.bfloat16)
    assert "embedding" in proven(function, IDS, weight)[1]
    graph, found = run_optimized(EXACT, function, IDS, weight)
    assert "embedding" in targets(graph) and torch.equal(found, function(IDS, weight))
    found.sum().backward()
    assert weight.grad is not None and bool((weight.grad[3] == 20).all())


@pytest.mark.parametrize("case", ["float32", "frozen"])
def test_what_gains_nothing_is_left_alone(case):
    weight = leaf(7, 16, dtype=torch.float32) if case == "float32" else torch.randn(7, 16).bfloat16()
    captured = optimized_targets(lambda ids, w: F.embedding(ids, w) * 2, IDS, weight)
    assert captured == ["embedding", "mul"]  # torch's own has the same name
    assert not near_misses(lambda ids, w: F.embedding(ids, w) * 2, IDS, weight)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"scale_grad_by_freq": True}, "frequency"), ({"sparse": True}, "sparse"), ({"max_norm": 1.0}, "max_norm")],
    ids=["by frequency", "sparse", "max_norm"],
)
def test_declined(options, reason):
    (miss,) = near_misses(lambda ids, w: F.embedding(ids, w, **options), IDS, leaf(7, 16, dtype=torch.bfloat16))
    assert reason in miss.reason


def test_the_proof_says_what_is_gained():
    graph = captured(lambda ids, w: F.embedding(ids, w), IDS.repeat(1, 20), leaf(7, 16, dtype=torch.bfloat16))
    (change,) = [change for record in EXACT.run(graph, Prover()) for change in record.outcome.changes]
    assert change.proof is not None and change.proof.gain is not None
    name, was, now = change.proof.gain
    assert name == "gradient of weight" and was > 1.5 * now
