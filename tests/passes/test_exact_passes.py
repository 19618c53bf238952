"""The passes that remove and restore: they change no value."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes.cleanup import CLEANUP
from fxopt.passes.pipelines import EXACT
from fxopt.passes.separate_logits import deferred
from tests.captured_graphs import captured, run_optimized, targets
from tests.passes.rewriting import optimized_targets

X = torch.randn(3, 8)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.float() + 1, ["add"]),  # already float32
        (lambda x: x.bfloat16().float().bfloat16() + 1, ["cast", "add"]),  # widened and narrowed back
        (lambda x: x.bfloat16().float().double() + 1, ["cast", "cast", "add"]),  # widened twice
        (lambda x: x.double().float() + 1, ["add"]),  # widened and narrowed back
        (lambda x: x.bfloat16().half() + 1, ["cast", "cast", "add"]),  # float16 does not hold every bfloat16
        (lambda x: x.bfloat16().float() + 1, ["cast", "cast", "add"]),  # narrowing changes values
        (lambda x: F.softmax(x.bfloat16().float(), -1, dtype=torch.float32), ["cast", "softmax"]),  # widens by itself
        (lambda x: F.softmax(x.bfloat16().float(), -1), ["cast", "cast", "softmax"]),
    ],
)
def test_only_redundant_casts_go(function, expected):
    graph, result = run_optimized(EXACT, function, X)
    assert targets(graph) == expected
    assert torch.equal(result, function(X))


def test_equal_nodes_are_computed_once():
    graph, result = run_optimized(EXACT, lambda x: torch.sin(x) + torch.sin(x), X)
    assert targets(graph) == ["sin", "add"]
    assert torch.equal(result, 2 * X.sin())


def test_a_write_in_an_inner_graph_stays():
    """The result of the write is not used; the tensor that it writes to is."""

    class Inner(torch.nn.Module):
        def forward(self, x):
            h = x * 2
            h.add_(1)
            return h

    outer = torch.fx.Graph()
    outer.output(outer.call_function(call_inner, (outer.get_attr("inner"), outer.placeholder("x"))))
    module = torch.fx.GraphModule({"inner": torch.fx.symbolic_trace(Inner())}, outer)
    CLEANUP.run(module.graph, None)
    module.recompile()
    assert targets(module.inner) == ["mul", "add_"]
    assert torch.equal(module(X), X * 2 + 1)


def call_inner(body, x):
    return body(x)


def test_random_nodes_are_not_merged():
    graph, _ = run_optimized(EXACT, lambda x: torch.rand_like(x) - torch.rand_like(x), X)
    assert targets(graph).count("rand_like") == 2


def test_dropout_that_drops_nothing_goes():
    graph, _ = run_optimized(EXACT, lambda x: F.dropout(x, 0.0, True) + F.dropout(x, 0.5, False), X)
    assert targets(graph) == ["add"]
    graph, _ = run_optimized(EXACT, lambda x: F.dropout(x, 0.5, True), X)
    assert targets(graph) == ["dropout"]


def test_nothing_is_merged_across_a_write():
    def function(x):
        before = torch.sin(x)
        x.add_(1)
        return before + torch.sin(x)

    graph, result = run_optimized(EXACT, function, X.clone())
    assert targets(graph).count("sin") == 2
    assert torch.equal(result, function(X.clone()))


def test_logits_are_copied_for_the_loss_and_merged_again_where_it_is_not_fused():
    def function(hidden, weight, labels):
        logits = F.linear(hidden, weight)
        loss = F.cross_entropy(logits.float().view(-1, 61), labels)
        return loss, deferred(logits)

    def with_another_loss(hidden, weight, labels):
        logits = F.linear(hidden, weight)
        return (logits.float().view(-1, 61).logsumexp(-1) - labels).square().mean(), deferred(logits)

    inputs = torch.randn(3, 7, 32).bfloat16(), torch.randn(61, 32).bfloat16(), torch.randint(0, 61, (21,))
    graph, _ = run_optimized(EXACT, function, *inputs)
    assert {"linear_cross_entropy", "linear", "deferred"} <= set(targets(graph))
    graph, _ = run_optimized(EXACT, with_another_loss, *inputs)
    assert targets(graph).count("linear") == 1


def attention(mask_of):
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(q.shape[-2]))

    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    for value in (q, k, v):
        torch._dynamo.mark_dynamic(value, 2)
    return function, q, k, v


def causal_attention(mask_of):
    function, *inputs = attention(mask_of)
    module = captured(function, *inputs)
    records = EXACT.run(module, None)
    restored = sum(len(r.outcome.changes) for r in records if r.name == "restore_causal_attention")
    return restored, [miss.reason for record in records for miss in record.outcome.near_misses], function, inputs


def positions(length):
    return torch.arange(length)


def test_a_causal_mask_becomes_is_causal():
    restored, _, function, inputs = causal_attention(lambda n: positions(n)[None, :] <= positions(n)[:, None])
    assert restored == 1
    _, result = run_optimized(EXACT, function, *inputs)
    torch.testing.assert_close(result, function(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mask_of", "reason"),
    [
        (lambda n: positions(n)[None, :] < positions(n)[:, None] + 2, "not the lower triangle"),
        (
            lambda n: (
                (positions(n)[None, :] <= positions(n)[:, None]) & (positions(n)[None, :] > positions(n)[:, None] - 64)
            ),
            "not the lower triangle",
        ),
        (
            lambda n: (
                (positions(n)[None, :] <= positions(n)[:, None])
                & (positions(n)[None, :] > positions(n)[:, None] - 4096)
            ),
            "a sliding window",
        ),
        (lambda n: torch.zeros(n, n), "added to the scores"),
    ],
    ids=["looks ahead", "short window", "long window", "additive"],
)
def test_another_mask_stays(mask_of, reason):
    restored, reasons, _, _ = causal_attention(mask_of)
    assert restored == 0
    assert any(reason in found for found in reasons)


def offsets(n):
    return positions(n)[:, None] - positions(n)[None, :]


def window(within):
    return lambda n: (offsets(n) >= 0) & within(offsets(n), n)


@pytest.mark.parametrize(
    "mask_of",
    [
        window(lambda d, n: d < 40.0),
        window(lambda d, n: d / 16 < 2.5),
        window(lambda d, n: (positions(n)[:, None] // 8 - positions(n)[None, :] // 8) < 5),
        window(lambda d, n: (d >> 4) < 3),
        window(lambda d, n: d * d < 1600),
        window(lambda d, n: torch.log2(d.clamp(min=1).float()) < 5.0),
        window(lambda d, n: d < n // 2 + 30),
        window(lambda d, n: d < 20 + positions(n)[:, None] - positions(n)[:, None] + 20),
    ],
    ids=["fraction", "quotient", "blocks", "shift", "square", "function", "half the size", "sum of numbers"],
)
def test_a_mask_that_is_causal_for_short_rows_alone_stays(mask_of):
    """Each is the lower triangle for the nine tokens that were captured, and not for two hundred."""
    assert torch.equal(mask_of(9), torch.ones(9, 9, dtype=torch.bool).tril())
    assert not torch.equal(mask_of(200), torch.ones(200, 200, dtype=torch.bool).tril())
    restored, reasons, _, _ = causal_attention(mask_of)
    assert restored == 0 and reasons


def test_a_mask_that_depends_on_a_tensor_stays():
    def function(q, k, v, padding):
        causal = positions(q.shape[-2])[None, :] <= positions(q.shape[-2])[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & padding[:, None, None, :])

    inputs = [*(torch.randn(2, 4, 9, 16) for _ in range(3)), torch.ones(2, 9, dtype=torch.bool)]
    records = EXACT.run(captured(function, *inputs), None)
    (miss,) = [miss for record in records for miss in record.outcome.near_misses]
    assert "padding" in miss.reason


@pytest.mark.parametrize("around", [False, True], ids=["inside", "inside and around"])
def test_dtypes_are_those_of_an_autocast_in_the_forward(around):
    def function(a, b):
        with torch.autocast("cpu", torch.bfloat16):
            c = a @ b.t()
            d = c.float() * 1.001
        with torch.autocast("cpu", enabled=False):
            return c.float(), d, (a @ b.t()).float()

    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        expected = function(a, b)
        _, found = run_optimized(EXACT, function, a, b)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_nothing_is_merged_across_autocast():
    linear = torch.nn.Linear(8, 8)

    def function(x):
        outside = linear(x)
        with torch.autocast("cpu", torch.bfloat16):
            inside = linear(x)
        return outside - inside

    _, result = run_optimized(EXACT, function, X)
    assert torch.equal(result, function(X)) and result.abs().max() > 0


def test_what_has_nothing_to_do_with_a_write_is_merged():
    def function(x, y):
        counted = torch.zeros(8)
        counted += 1
        return x.sin() * y, x.sin() + counted

    graph, (product, total) = run_optimized(EXACT, function, X, X)
    assert targets(graph).count("sin") == 1
    assert torch.equal(product, X.sin() * X) and torch.equal(total, X.sin() + torch.ones(8))


def test_a_copy_of_a_linear_layers_result_goes():
    assert optimized_targets(lambda x, w: F.linear(x, w).contiguous(), X, torch.randn(4, 8)) == ["linear"]
    assert "contiguous" in optimized_targets(lambda x: x.t().contiguous(), X)


def test_operators_named_for_keywords_are_no_writes():
    """`and_` and `or_` end like an in-place method, and write nothing: equal ones are computed once."""

    def masks(x):
        positive, small = x > 0, x < 1
        return x.where(positive & small, x) + x.where(positive & small, x) * x.where(positive | small, x)

    graph, result = run_optimized(EXACT, masks, X)
    assert (targets(graph).count("and_"), targets(graph).count("or_"), targets(graph).count("where")) == (1, 1, 2)
    assert torch.equal(result, masks(X))
