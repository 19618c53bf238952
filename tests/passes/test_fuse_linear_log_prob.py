"""The output head and log-probabilities of labels: rewritten, as accurate, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes.pipelines import EXACT
from tests.captured_graphs import run_optimized, targets
from tests.passes.rewriting import DTYPES, assert_rewritten, leaf, near_misses, proven


def gathered(values, labels):
    return values.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def log_prob_of(logits, labels):
    return gathered(F.log_softmax(logits, -1), labels)


def cast_log_prob_of(logits, labels):
    return gathered(F.log_softmax(logits, -1, dtype=torch.float32), labels)


def difference_of(logits, labels):
    return gathered(logits, labels) - torch.logsumexp(logits, -1)


def of_trl(logits, labels):
    return torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)


def masked_of_trl(logits, labels):
    logits, labels = logits[:, :-1, :], labels[:, 1:].clone()
    mask = labels != -100
    return (of_trl(logits.float(), labels.masked_fill(~mask, 0)) * mask).sum(-1)


def capped(logits, cap):
    return torch.tanh(logits / cap) * cap


WAYS = {
    "in the dtype of the logits": lambda h, w, b, labels: log_prob_of(F.linear(h, w, b), labels),
    "in float32": lambda h, w, b, labels: log_prob_of(F.linear(h, w, b).float(), labels),
    "cast by log_softmax": lambda h, w, b, labels: cast_log_prob_of(F.linear(h, w, b), labels),
    "without a bias": lambda h, w, b, labels: log_prob_of(F.linear(h, w).float(), labels),
    "scaled": lambda h, w, b, labels: log_prob_of((F.linear(h, w, b) * 0.0625).float(), labels),
    "scaled in float32": lambda h, w, b, labels: log_prob_of(F.linear(h, w, b).float() * 0.0625, labels),
    "divided": lambda h, w, b, labels: log_prob_of(F.linear(h, w, b).float() / 0.9, labels),
    "soft-capped": lambda h, w, b, labels: log_prob_of(capped(F.linear(h, w, b), 3.0).float(), labels),
    "difference": lambda h, w, b, labels: difference_of(F.linear(h, w, b), labels),
    "difference in float32": lambda h, w, b, labels: difference_of(F.linear(h, w, b).float(), labels),
    "difference, scaled": lambda h, w, b, labels: difference_of(F.linear(h, w, b).float() * 0.0625, labels),
    "difference, divided": lambda h, w, b, labels: difference_of((F.linear(h, w, b) / 0.9).float(), labels),
    "difference, soft-capped": lambda h, w, b, labels: difference_of(capped(F.linear(h, w, b), 3.0).float(), labels),
    "axes by number": lambda h, w, b, labels: of_trl(F.linear(h, w, b).float(), labels),
    "shifted": lambda h, w, b, labels: log_prob_of(F.linear(h, w, b)[:, :-1].float(), labels[:, 1:]),
    "shifted last": lambda h, w, b, labels: log_prob_of(F.linear(h, w, b).float()[..., :-1, :], labels[:, 1:]),
    "difference, shifted": lambda h, w, b, labels: difference_of(F.linear(h, w, b)[:, :-1].float(), labels[:, 1:]),
    "clamped labels": lambda h, w, b, labels: log_prob_of(F.linear(h, w, b).float(), (labels - 9).clamp(min=0)),
    "masked": lambda h, w, b, labels: masked_of_trl(F.linear(h, w, b), labels),
    "of rows": lambda h, w, b, labels: log_prob_of(F.linear(h.view(-1, 32), w, b).float(), labels.view(-1)),
    "a product with w.T": lambda h, w, b, labels: log_prob_of((h @ w.T).float(), labels),
}  # fmt: skip


def inputs(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(61, 32) / 32**0.5).to(dtype).requires_grad_()
    return leaf(3, 7, 32, dtype=dtype), weight, leaf(61, dtype=dtype), torch.randint(0, 61, (3, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_proven(way, dtype):
    graph, ops = proven(WAYS[way], *inputs(dtype))
    assert ops[-1] == "linear_log_prob" and targets(graph).count("linear_log_prob") == 1
    assert not {"linear", "log_softmax", "logsumexp", "gather"} & set(targets(graph))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["in float32", "difference in float32", "axes by number", "masked"])
def test_as_accurate_and_done_once(way, dtype):
    hidden, weight, _, labels = inputs(dtype)
    assert_rewritten("linear_log_prob", lambda h, w, labels: WAYS[way](h, w, None, labels), hidden, weight, labels)


@pytest.mark.parametrize("label", [-1, -100, 61])
@pytest.mark.parametrize("way", ["in float32", "difference in float32"])
def test_labels_out_of_range_are_errors_before_and_after(way, label):
    *rest, labels = inputs(torch.float32)
    labels[1, 2] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        WAYS[way](*rest, labels)
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        run_optimized(EXACT, WAYS[way], *rest, labels)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda h, w, labels: log_prob_of((F.linear(h, w) * h.mean()).float(), labels), "is not a number"),
        (lambda h, w, labels: log_prob_of((F.linear(h, w) * -1.0).float(), labels), "scale of the logits is -1.0"),
        (lambda h, w, labels: log_prob_of(torch.sin(F.linear(h, w)).float(), labels), "`sin`"),
        (lambda h, w, labels: log_prob_of(F.linear(h, w).float(), labels[:, :4]), "not one for each row"),
        (lambda h, w, labels: gathered(F.linear(h, w).log_softmax(1), labels), "not over the vocabulary"),
        (lambda h, w, labels: (log_prob_of(z := F.linear(h, w).float(), labels), z.argmax(-1)), "also used by"),
        (lambda h, w, labels: (difference_of(z := F.linear(h, w).float(), labels), z.argmax(-1)), "also used by"),
        (lambda h, w, labels: difference_of(torch.sin(F.linear(h, w)).float(), labels), "`sin`"),
    ],
)
def test_what_stays_has_a_reason(function, reason):
    hidden, weight, _, labels = inputs(torch.bfloat16)
    misses = near_misses(function, hidden, weight, labels)
    assert any(reason in miss.reason for miss in misses), misses


def test_float16_is_declined():
    hidden, weight, _, labels = inputs(torch.float16)
    misses = near_misses(lambda h, w, labels: log_prob_of(F.linear(h, w).float(), labels), hidden, weight, labels)
    assert any("float16" in miss.reason for miss in misses)
