"""fxopt::linear_log_prob against its reference."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import linear_head
from fxopt.kernels import linear_log_prob as kernel
from fxopt.kernels.linear_log_prob import (
    LogProbs,
    linear_log_prob,
    linear_log_prob_backward,
    linear_log_prob_forward,
    linear_log_prob_reference,
)
from tests.accuracy import assert_op_as_accurate, outputs_and_gradients
from tests.kernels.conftest import INTERPRETED

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ALL_OPTIONS = {"temperature": 0.7, "softcap": 2.0, "logit_scale": 1.5}
EACH_OPTION = [*({name: value} for name, value in ALL_OPTIONS.items()), ALL_OPTIONS]
each_option = pytest.mark.parametrize("options", EACH_OPTION, ids=[*ALL_OPTIONS, "all"])
entropy_or_not = pytest.mark.parametrize("with_entropy", [False, True], ids=["", "entropy"])


def inputs(
    num_rows: int, D: int, V: int, *, dtype: torch.dtype, device: str, ignored: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(num_rows, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) / math.sqrt(D)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (num_rows,), device=device)
    labels[torch.rand(num_rows, device=device) < ignored] = -100
    return hidden, weight, labels


def differentiable(results: LogProbs) -> tuple[Tensor, ...]:
    return tuple(result for result in results[:3] if result is not None)


def floats_of(function: Callable[..., LogProbs]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args, **options: differentiable(function(*args, **options))


def assert_accurate(*args: Any, **options: Any) -> None:
    assert_op_as_accurate(floats_of(linear_log_prob), floats_of(linear_log_prob_reference), *args, **options)
    is_top, expected = (function(*args, **options).is_top for function in (linear_log_prob, linear_log_prob_reference))
    assert is_top.dtype == torch.bool and torch.equal(is_top, expected)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", 32)
    for name in ("CHUNK_BYTES", "GPU_CHUNK_BYTES", "SOFTMAX_BYTES"):
        monkeypatch.setattr(linear_head, name, 5000)
    monkeypatch.setattr(linear_head, "SUM_BLOCK", 30)


@entropy_or_not
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 30, 70), (33, 40, 97), (20, 64, 5000)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, int, int], dtype: torch.dtype, with_entropy: bool, device: str) -> None:
    assert_accurate(*inputs(*shape, dtype=dtype, device=device), with_entropy=with_entropy)


@entropy_or_not
@pytest.mark.parametrize("ignored", [0.0, 0.6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_many_chunks(dtype: torch.dtype, ignored: float, with_entropy: bool, device: str) -> None:
    hidden, weight, labels = inputs(30, 24, 131, dtype=dtype, device=device, ignored=ignored)
    bias = torch.randn(131, device=device).to(dtype).requires_grad_()
    assert_accurate(hidden, weight, labels, bias=bias, with_entropy=with_entropy)


@each_option
@pytest.mark.parametrize("with_entropy", [True] if INTERPRETED else [False, True], ids=str)  # with it is all of it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_options(dtype: torch.dtype, options: dict[str, float], with_entropy: bool, device: str) -> None:
    hidden, weight, labels = inputs(90, 24, 107, dtype=dtype, device=device, ignored=0.4)
    bias = torch.randn(107, device=device).to(dtype).requires_grad_()
    assert_accurate(hidden, weight, labels, bias=bias, with_entropy=with_entropy, **options)


@each_option
def test_options_on_one_row(options: dict[str, float], device: str) -> None:
    hidden, weight, labels = inputs(1, 24, 97, dtype=torch.float32, device=device)
    values = {"bias": torch.randn(97, device=device).requires_grad_(), "with_entropy": True, **options}
    expected = outputs_and_gradients(floats_of(linear_log_prob_reference), hidden, weight, labels, **values)
    found = outputs_and_gradients(floats_of(linear_log_prob), hidden, weight, labels, **values)
    torch.testing.assert_close(found, expected)


@each_option
@pytest.mark.slow  # in the interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_options_on_a_large_vocabulary(dtype: torch.dtype, options: dict[str, float], device: str) -> None:
    """More columns than a Triton program holds at a time, and not a multiple of them."""
    assert_accurate(*inputs(20, 64, 5000, dtype=dtype, device=device), with_entropy=True, **options)


@each_option
@entropy_or_not
@pytest.mark.usefixtures("small_chunks")
def test_options_in_float64(options: dict[str, float], with_entropy: bool, device: str) -> None:
    """No constant and no intermediate result is narrower, and the logits lie on both sides of a cap's bend."""
    hidden, weight, labels = inputs(16, 24, 97, dtype=torch.float64, device=device, ignored=0.3)
    values = {"with_entropy": with_entropy, **options}
    expected = outputs_and_gradients(floats_of(linear_log_prob_reference), hidden, weight, labels, **values)
    found = outputs_and_gradients(floats_of(linear_log_prob), hidden, weight, labels, **values)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_as_accurate_as_training_code(dtype: torch.dtype, device: str) -> None:
    """What is usually written: scales in the model's dtype, log_softmax, and the entropy from it."""

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden, weight) * 1.5
        log_probs = (logits / 0.7).to(torch.promote_types(dtype, logits.dtype)).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).float().to(entropy.dtype), entropy

    def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        results = linear_log_prob(hidden, weight, labels, logit_scale=1.5, temperature=0.7, with_entropy=True)
        assert results.entropy is not None
        return results.log_prob.to(hidden.dtype), results.entropy.to(hidden.dtype)

    assert_op_as_accurate(fused, eager, *inputs(40, 24, 97, dtype=dtype, device=device))


@pytest.mark.parametrize("planted", ["log_prob", "entropy", "logsumexp", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_error_of_one_percent_is_found(dtype: torch.dtype, planted: str, device: str) -> None:
    class OnePercentMore(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 1.01

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        results = linear_log_prob(*args, **options)
        if planted == "backward":
            results = results._replace(log_prob=OnePercentMore.apply(results.log_prob))
        else:
            results = results._replace(**{planted: getattr(results, planted) * 1.01})
        return differentiable(results)

    args = inputs(33, 40, 97, dtype=dtype, device=device)
    with pytest.raises(AssertionError, match="error"):
        assert_op_as_accurate(wrong, floats_of(linear_log_prob_reference), *args, with_entropy=True)


@each_option
@entropy_or_not
def test_ignored_rows_contribute_nothing(options: dict[str, float], with_entropy: bool, device: str) -> None:
    """Not even NaN; nor do the rows of zeros that stand in their place, which have probabilities."""
    hidden, weight, labels = inputs(30, 8, 20, dtype=torch.float32, device=device, ignored=0.4)
    bias = torch.randn(20, device=device).requires_grad_()
    kept = labels != -100
    whole = hidden.detach().masked_fill(~kept[:, None], math.nan).requires_grad_()
    rows = hidden.detach()[kept].requires_grad_()
    of_all = linear_log_prob(whole, weight, labels, bias=bias, with_entropy=with_entropy, **options)
    of_rows = linear_log_prob(rows, weight, labels[kept], bias=bias, with_entropy=with_entropy, **options)
    for found, expected in zip(of_all, of_rows, strict=True):
        if found is None:
            assert expected is None and not with_entropy
            continue
        assert not found[~kept].any()
        torch.testing.assert_close(found[kept], expected)
    grads = torch.autograd.grad(sum(x.sum() for x in differentiable(of_all)), (whole, weight, bias))
    grads_of_rows = torch.autograd.grad(sum(x.sum() for x in differentiable(of_rows)), (rows, weight, bias))
    assert not grads[0][~kept].any()
    torch.testing.assert_close((grads[0][kept], *grads[1:]), grads_of_rows)


@entropy_or_not
@pytest.mark.parametrize("num_rows", [0, 5])
def test_nothing_to_count(num_rows: int, with_entropy: bool, device: str) -> None:
    """No rows, or all of them ignored: zeros, and gradients of zeros."""
    hidden, weight, labels = inputs(num_rows, 8, 20, dtype=torch.bfloat16, device=device, ignored=2.0)
    bias = torch.zeros(20, device=device).bfloat16().requires_grad_()
    values = {"bias": bias, "with_entropy": with_entropy}
    expected = outputs_and_gradients(floats_of(linear_log_prob_reference), hidden, weight, labels, **values)
    found = outputs_and_gradients(floats_of(linear_log_prob), hidden, weight, labels, **values)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert not linear_log_prob(hidden, weight, labels).is_top.any()


def test_another_ignore_index_and_none(device: str) -> None:
    hidden, weight, labels = inputs(30, 8, 20, dtype=torch.float32, device=device)
    assert_accurate(hidden, weight, labels, ignore_index=int(labels[0]))
    assert_accurate(hidden, weight, labels, ignore_index=None)


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 6), (7,), ()], ids=str)
def test_shapes_are_those_of_the_labels(shape: tuple[int, ...], device: str) -> None:
    hidden = torch.randn(*shape, 8, device=device).requires_grad_()
    weight = torch.randn(20, 8, device=device).requires_grad_()
    labels = torch.randint(0, 20, shape, device=device)
    results = linear_log_prob(hidden, weight, labels, with_entropy=True)
    assert all(result is not None and result.shape == shape for result in results)
    assert_accurate(hidden, weight, labels, with_entropy=True)


def test_inputs_that_are_not_contiguous(device: str) -> None:
    hidden, weight, labels = inputs(24, 16, 50, dtype=torch.float32, device=device)
    hidden = hidden.detach().reshape(4, 6, 16).transpose(0, 1).requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    assert_accurate(hidden, weight, labels.reshape(4, 6).t(), with_entropy=True)


def test_gradients_that_are_not_contiguous(device: str) -> None:
    """The gradient that a sum sends back has stride 0, and a slice of labels its own."""
    hidden, weight, labels = inputs(24, 16, 50, dtype=torch.float32, device=device)
    hidden = hidden.detach()[::2].requires_grad_()
    grads = []
    for function in (linear_log_prob, linear_log_prob_reference):
        results = differentiable(function(hidden, weight, labels[::2], with_entropy=True))
        total = sum(weight * result.sum() for weight, result in zip((1.0, 0.3, -0.7), results, strict=True))
        grads.append(torch.autograd.grad(total, (hidden, weight)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_of_some_results(which: tuple[int, ...], device: str) -> None:
    hidden, weight, labels = inputs(12, 8, 20, dtype=torch.float64, device=device, ignored=0.3)

    def some(function: Callable[..., LogProbs]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *args: tuple(differentiable(function(*args, with_entropy=True))[index] for index in which)

    found, expected = (
        outputs_and_gradients(some(f), hidden, weight, labels) for f in (linear_log_prob, linear_log_prob_reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_of_some_inputs(wanted: tuple[bool, bool, bool], device: str) -> None:
    hidden, weight, labels = inputs(12, 8, 20, dtype=torch.float64, device=device, ignored=0.3)
    bias = torch.randn(20, dtype=torch.float64, device=device)
    leaves = [x.detach().requires_grad_(want) for x, want in zip((hidden, weight, bias), wanted, strict=True)]
    found, expected = (
        outputs_and_gradients(floats_of(f), *leaves[:2], labels, bias=leaves[2])
        for f in (linear_log_prob, linear_log_prob_reference)
    )
    assert len(found) == 3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1000.0, 1e4])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["no options", "all options"])
def test_extreme_logits(options: dict[str, float], scale: float, device: str) -> None:
    hidden, weight, labels = inputs(100, 8, 20, dtype=torch.float32, device=device)
    labels[::2] = torch.nn.functional.linear(hidden, weight).argmax(-1)[::2]
    assert_accurate((hidden.detach() * scale).requires_grad_(), weight, labels, with_entropy=True, **options)


SPECIAL_ROWS = [
    [1.0, 2.0, 3.0, 4.0],
    [3.0, 3.0, 1.0, 3.0],
    [math.nan, 1.0, 2.0, 3.0],
    [1.0, math.nan, 2.0, math.nan],
    [math.nan] * 4,
    [-math.inf] * 4,
    [-math.inf, 0.0, 1.0, 2.0],
    [math.inf, 0.0, 1.0, 2.0],
    [0.0, math.inf, math.inf, 1.0],
    [1e4, 9999.0, -1e4, 0.0],
    [0.0, -0.0, 0.0, -0.0],
]


@pytest.mark.parametrize("row", SPECIAL_ROWS, ids=str)
def test_ties_infinities_and_nan_are_as_in_eager_code(row: list[float], device: str) -> None:
    hidden, weight = torch.ones(4, 1, device=device), torch.zeros(4, 1, device=device)
    bias = torch.tensor(row, device=device).requires_grad_()
    labels = torch.arange(4, device=device)
    found, expected = (f(hidden, weight, labels, bias=bias, with_entropy=True) for f in (
        linear_log_prob, linear_log_prob_reference))  # fmt: skip
    torch.testing.assert_close(tuple(found), tuple(expected), equal_nan=True)
    gradients = [torch.autograd.grad(results.log_prob.sum(), bias)[0] for results in (found, expected)]
    torch.testing.assert_close(*gradients, equal_nan=True)


def test_the_first_of_equal_logits_is_the_top(device: str) -> None:
    """bfloat16 logits of a small head are often equal."""
    hidden = torch.randint(-1, 2, (200, 4), device=device).bfloat16()
    weight = torch.randint(-1, 2, (30, 4), device=device).bfloat16()
    logits = torch.nn.functional.linear(hidden, weight)
    for labels in (logits.argmax(-1), 29 - logits.flip(-1).argmax(-1)):  # the first of the largest, and the last
        found = linear_log_prob(hidden, weight, labels).is_top
        assert torch.equal(found, logits.argmax(-1) == labels) and found.any()


@entropy_or_not
@pytest.mark.usefixtures("small_chunks")
def test_gradients_in_float64(with_entropy: bool, device: str) -> None:
    hidden, weight, labels = inputs(20, 4, 6, dtype=torch.float64, device=device, ignored=0.3)
    bias = torch.randn(6, dtype=torch.float64, device=device).requires_grad_()
    assert linear_log_prob(hidden, weight, labels).log_prob.dtype == torch.float64

    def results(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return differentiable(linear_log_prob(hidden, weight, labels, bias=bias, with_entropy=with_entropy))

    assert torch.autograd.gradcheck(results, (hidden, weight, bias), fast_mode=True)


def test_a_retained_graph_gives_the_same_gradients_again(device: str) -> None:
    hidden, weight, labels = inputs(12, 8, 20, dtype=torch.float32, device=device)
    loss = linear_log_prob(hidden, weight, labels).log_prob.mean()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for grad, total in zip(first, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(total, 2 * grad)


@entropy_or_not
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["no options", "all options"])
def test_without_autograd(options: dict[str, float], with_entropy: bool, device: str) -> None:
    """The two plain functions give what the op and its autograd give."""
    hidden, weight, labels = inputs(12, 8, 20, dtype=torch.bfloat16, device=device, ignored=0.3)
    hidden, labels = hidden.detach().reshape(3, 4, 8).requires_grad_(), labels.reshape(3, 4)
    bias = torch.randn(20, device=device).bfloat16().requires_grad_()
    results = linear_log_prob(hidden, weight, labels, bias=bias, with_entropy=with_entropy, **options)
    plain, saved = linear_log_prob_forward(hidden, weight, labels, bias=bias, with_entropy=with_entropy, **options)
    assert not plain.log_prob.requires_grad
    for found, expected in zip(plain, results, strict=True):
        assert found is expected is None or torch.equal(found, expected)
    upstream = [torch.randn_like(result) for result in differentiable(results)]
    expected = torch.autograd.grad(differentiable(results), (hidden, weight, bias), upstream)
    dlog_prob, *between, dlogsumexp = upstream
    dentropy = between[0] if between else None
    found = linear_log_prob_backward(
        dlog_prob, dentropy, dlogsumexp, hidden, weight, labels, saved, bias=bias, **options
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    some = linear_log_prob_backward(
        dlog_prob, None, None, hidden, weight, labels, saved, wanted=(True, False, True), **options
    )
    assert some[0] is not None and some[1] is None and some[2] is None  # without a bias there is no gradient of it
    with pytest.raises(ValueError, match="the forward must compute the entropy"):
        linear_log_prob_backward(
            dlog_prob, dlog_prob, None, hidden, weight, labels, saved._replace(entropy=None), **options
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("small_chunks")
def test_rows_that_the_model_is_sure_of(dtype: torch.dtype, device: str) -> None:
    """In parts of other shapes than the forward's, where logits may be rounded otherwise."""
    hidden, weight, labels = inputs(40, 16, 300, dtype=dtype, device=device)
    with torch.no_grad():
        hidden.mul_(2.0)
        labels[::2] = torch.nn.functional.linear(hidden, weight).argmax(-1)[::2]
    assert_accurate(hidden, weight, labels, temperature=0.3, logit_scale=1.7)


def test_results_that_are_written_to(device: str) -> None:
    """Their gradients are those of the values before, as of eager code's, which keeps the softmax."""
    hidden, weight, labels = inputs(12, 8, 20, dtype=torch.float32, device=device)
    found = []
    for change in (lambda value: value * 2, lambda value: value.mul_(2)):
        log_prob, entropy, *_ = linear_log_prob(hidden, weight, labels, with_entropy=True)
        assert entropy is not None
        found.append(torch.autograd.grad((change(log_prob) + change(entropy)).sum(), (hidden, weight)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.usefixtures("small_chunks")
def test_never_holds_the_logits(ignored: float, device: str, monkeypatch: Any) -> None:
    """One buffer for a part of them is all there is, and of the ignored rows none but a few zeros enter it."""
    seen: list[tuple[int, int, int]] = []
    original = kernel.logits_by_part

    def spy(*args: Any) -> Any:
        for part, logits in original(*args):
            seen.append((*logits.shape, logits.data_ptr()))
            yield part, logits

    monkeypatch.setattr(kernel, "logits_by_part", spy)
    hidden, weight, labels = inputs(100, 8, 70, dtype=torch.bfloat16, device=device, ignored=ignored)
    log_prob = linear_log_prob(hidden, weight, labels).log_prob
    num_kept = int((labels != -100).sum())
    multiple = linear_head.ROW_MULTIPLE
    num_rows = 100 if num_kept == 100 else -(-num_kept // multiple) * multiple
    for _ in range(2):
        assert sum(rows * columns for rows, columns, _ in seen) == num_rows * 70 and len(seen) > 1
        assert max(rows * columns * 2 for rows, columns, _ in seen) <= linear_head.CHUNK_BYTES
        assert len({address for *_, address in seen}) == 1
        seen.clear()
        log_prob.sum().backward(retain_graph=True)


@entropy_or_not
def test_registration(with_entropy: bool, device: str) -> None:
    hidden, weight, labels = inputs(6, 4, 10, dtype=torch.float32, device=device, ignored=0.3)
    bias = torch.randn(10, device=device).requires_grad_()
    options = ALL_OPTIONS.values()
    torch.library.opcheck(torch.ops.fxopt.linear_log_prob, (hidden, weight, bias, labels, -100, *options, with_entropy))
    rows = torch.rand(6, device=device)
    entropy = rows if with_entropy else rows.new_empty(0)
    args = (
        hidden.detach(),
        weight.detach(),
        None,
        labels,
        entropy,
        rows,
        rows,
        -rows,
        None,
        *options,
        True,
        True,
        False,
    )
    labels.clamp_(min=0)
    torch.library.opcheck(torch.ops.fxopt.linear_log_prob_backward, (rows, rows if with_entropy else None, None, *args))


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["no options", "all options"])
def test_traced_gradients_are_the_same(options: dict[str, float], device: str) -> None:
    hidden, weight, labels = inputs(5, 8, 20, dtype=torch.float32, device=device, ignored=0.3)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        results = linear_log_prob(hidden, weight, labels, with_entropy=True, **options)
        assert results.entropy is not None
        return (results.log_prob * results.is_top.logical_not() + 0.1 * results.entropy).sum() / 7

    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for _ in range(2):
        found = torch.autograd.grad(traced(hidden, weight), (hidden, weight))
        torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_an_error(device: str) -> None:
    hidden, weight, labels = inputs(6, 4, 10, dtype=torch.float32, device=device)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        torch.autograd.grad(linear_log_prob(hidden, weight, labels).log_prob.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("label", [20, 1000, -1, -101])
def test_labels_out_of_range(label: int, ignore_index: int | None) -> None:
    hidden, weight, labels = inputs(6, 4, 20, dtype=torch.float32, device="cpu")
    labels[3] = label
    with pytest.raises(IndexError, match=f"linear_log_prob: Target {label} is out of bounds"):
        linear_log_prob(hidden, weight, labels, ignore_index=ignore_index)


def test_without_an_ignore_index_no_label_is_ignored() -> None:
    hidden, weight, labels = inputs(6, 4, 20, dtype=torch.float32, device="cpu")
    labels[3] = -100
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        linear_log_prob(hidden, weight, labels, ignore_index=None)


def test_errors() -> None:
    hidden, weight, labels = inputs(6, 4, 20, dtype=torch.float32, device="cpu")
    for function in (linear_log_prob, linear_log_prob_forward):
        with pytest.raises(ValueError, match=r"must have shapes \(\.\.\., D\) and \(V, D\)"):
            function(hidden, weight.t(), labels)
        with pytest.raises(ValueError, match=r"has 6 rows, but labels .* has 5 elements"):
            function(hidden, weight, labels[:5])
        with pytest.raises(ValueError, match="bias has shape"):
            function(hidden, weight, labels, bias=torch.zeros(4))
        with pytest.raises(RuntimeError, match=r"weight torch\.bfloat16.*must have one dtype"):
            function(hidden, weight.bfloat16(), labels)
        with pytest.raises(RuntimeError, match=r"labels are torch\.int32"):
            function(hidden, weight, labels.int())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", 0.0, "positive and finite"),
        ("temperature", -1.0, "positive and finite"),
        ("temperature", math.nan, "positive and finite"),
        ("logit_scale", 0.0, "positive and finite"),
        ("logit_scale", math.inf, "positive and finite"),
        ("softcap", 0.0, "None, or positive and finite"),
        ("softcap", -30.0, "None, or positive and finite"),
        ("softcap", math.nan, "None, or positive and finite"),
    ],
)
def test_options_out_of_range(option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}; it must be {message}"):
        linear_log_prob(*inputs(6, 4, 20, dtype=torch.float32, device="cpu"), **{option: value})
