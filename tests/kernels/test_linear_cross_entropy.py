"""fxopt::linear_cross_entropy against its reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import linear_cross_entropy as kernel
from fxopt.kernels import linear_head
from fxopt.kernels.backend import compute_dtype
from fxopt.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.accuracy import assert_op_as_accurate, outputs_and_gradients

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
REDUCTIONS = ["mean", "sum", "none"]
ALL_OPTIONS = {"logit_scale": 1.5, "softcap": 2.0, "label_smoothing": 0.25, "z_loss": 0.125}
EACH_OPTION = [*({name: value} for name, value in ALL_OPTIONS.items()), ALL_OPTIONS]
each_option = pytest.mark.parametrize("options", EACH_OPTION, ids=[*ALL_OPTIONS, "all"])
# The kernel knows of no reduction, so one of them serves each option alone.
each_option_and_reduction = pytest.mark.parametrize(
    ("reduction", "options"),
    [*(("mean", options) for options in EACH_OPTION), ("sum", ALL_OPTIONS), ("none", ALL_OPTIONS)],
    ids=[*(f"mean-{name}" for name in [*ALL_OPTIONS, "all"]), "sum-all", "none-all"],
)


def inputs(
    num_rows: int, D: int, V: int, *, dtype: torch.dtype, device: str, ignored: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(num_rows, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) / math.sqrt(D)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (num_rows,), device=device)
    labels[torch.rand(num_rows, device=device) < ignored] = -100
    return hidden, weight, labels


def assert_accurate(*args: Any, **options: Any) -> None:
    assert_op_as_accurate(linear_cross_entropy, linear_cross_entropy_reference, *args, **options)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", 16)
    monkeypatch.setattr(linear_head, "SOFTMAX_BYTES", 5000)
    monkeypatch.setattr(linear_head, "SUM_BLOCK", 30)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 30, 70), (33, 40, 97), (20, 64, 5000)], ids=str)
def test_as_accurate_as_eager(shape: tuple[int, int, int], dtype: torch.dtype, reduction: str, device: str) -> None:
    assert_accurate(*inputs(*shape, dtype=dtype, device=device), reduction=reduction)


@pytest.mark.parametrize("ignored", [0.0, 0.6])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_many_chunks(dtype: torch.dtype, reduction: str, ignored: float, device: str) -> None:
    hidden, weight, labels = inputs(30, 24, 97, dtype=dtype, device=device, ignored=ignored)
    bias = torch.randn(97, device=device).to(dtype).requires_grad_()
    assert_accurate(hidden, weight, labels, bias=bias, reduction=reduction)


@each_option_and_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("small_chunks")
def test_options(dtype: torch.dtype, reduction: str, options: dict[str, float], device: str) -> None:
    hidden, weight, labels = inputs(30, 24, 107, dtype=dtype, device=device, ignored=0.4)
    bias = torch.randn(107, device=device).to(dtype).requires_grad_()
    assert_accurate(hidden, weight, labels, bias=bias, reduction=reduction, **options)


@each_option_and_reduction
def test_options_on_one_row(reduction: str, options: dict[str, float], device: str) -> None:
    hidden, weight, labels = inputs(1, 24, 97, dtype=torch.float32, device=device)
    values = {"bias": torch.randn(97, device=device).requires_grad_(), "reduction": reduction, **options}
    expected = outputs_and_gradients(linear_cross_entropy_reference, hidden, weight, labels, **values)
    found = outputs_and_gradients(linear_cross_entropy, hidden, weight, labels, **values)
    torch.testing.assert_close(found, expected)


@each_option
@pytest.mark.slow  # in the interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_options_on_a_large_vocabulary(dtype: torch.dtype, options: dict[str, float], device: str) -> None:
    """More columns than a Triton program holds at a time, and not a multiple of them."""
    assert_accurate(*inputs(20, 64, 5000, dtype=dtype, device=device), **options)


@each_option
@pytest.mark.usefixtures("small_chunks")
def test_options_in_float64(options: dict[str, float], device: str) -> None:
    """No constant and no intermediate result is narrower, and the logits lie on both sides of a cap's bend."""
    hidden, weight, labels = inputs(16, 24, 97, dtype=torch.float64, device=device, ignored=0.3)
    values = {"reduction": "none", **options}
    expected = outputs_and_gradients(linear_cross_entropy_reference, hidden, weight, labels, **values)
    found = outputs_and_gradients(linear_cross_entropy, hidden, weight, labels, **values)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_options_are_as_accurate_as_model_code(dtype: torch.dtype, device: str) -> None:
    """Cohere's and Gemma 2's code scales and caps in the model's dtype, before the cast."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight) * 1.5
        logits = torch.tanh(logits / 2.0) * 2.0
        return torch.nn.functional.cross_entropy(logits.to(compute_dtype(logits)), labels)

    assert_op_as_accurate(
        lambda *args: linear_cross_entropy(*args, logit_scale=1.5, softcap=2.0),
        loss,
        *inputs(40, 24, 97, dtype=dtype, device=device, ignored=0.4),
    )


@each_option_and_reduction
def test_ignored_rows_contribute_nothing(reduction: str, options: dict[str, float], device: str) -> None:
    """Not even NaN; nor do the rows of zeros that stand in their place, which a bias lets have a loss."""
    hidden, weight, labels = inputs(30, 8, 20, dtype=torch.float32, device=device, ignored=0.4)
    bias = torch.randn(20, device=device).requires_grad_()
    kept = labels != -100
    whole = hidden.detach().masked_fill(~kept[:, None], math.nan).requires_grad_()
    rows = hidden.detach()[kept].requires_grad_()
    loss = linear_cross_entropy(whole, weight, labels, bias=bias, reduction=reduction, **options)
    loss_of_rows = linear_cross_entropy(rows, weight, labels[kept], bias=bias, reduction=reduction, **options)
    grads = torch.autograd.grad(loss.sum(), (whole, weight, bias))
    grads_of_rows = torch.autograd.grad(loss_of_rows.sum(), (rows, weight, bias))
    assert not grads[0][~kept].any()
    if reduction == "none":
        assert not loss[~kept].any()
        loss = loss[kept]
    torch.testing.assert_close(loss, loss_of_rows)
    torch.testing.assert_close((grads[0][kept], *grads[1:]), grads_of_rows)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
@pytest.mark.usefixtures("small_chunks")
def test_only_the_gradients_that_are_needed(needed: str, reduction: str, device: str, monkeypatch: Any) -> None:
    """A frozen head, a frozen body; the flags keep the op from computing the other gradients."""
    hidden, weight, labels = inputs(40, 24, 97, dtype=torch.bfloat16, device=device, ignored=0.3)
    values = {"hidden": hidden, "weight": weight, "bias": torch.randn(97, device=device).bfloat16()}
    values = {name: value.detach().requires_grad_(name == needed) for name, value in values.items()}
    wanted = []
    loop = kernel._loss_and_grads
    monkeypatch.setattr(kernel, "_loss_and_grads", lambda *args: wanted.append(args[-3:]) or loop(*args))
    assert_accurate(values["hidden"], values["weight"], labels, bias=values["bias"], reduction=reduction)
    assert wanted[-1] == tuple(name == needed for name in values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_weight(dtype: torch.dtype, device: str) -> None:
    _, table, labels = inputs(30, 24, 97, dtype=dtype, device=device)
    tokens = torch.randint(0, 97, (30,), device=device)
    assert_op_as_accurate(
        lambda table: linear_cross_entropy(table[tokens], table, labels),
        lambda table: linear_cross_entropy_reference(table[tokens], table, labels),
        table,
    )


def test_strides_and_leading_dimensions(device: str) -> None:
    hidden, weight, labels = inputs(24, 16, 50, dtype=torch.bfloat16, device=device, ignored=0.3)
    hidden = hidden.detach().reshape(4, 6, 16).transpose(0, 1).requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    labels = labels.reshape(4, 6).t()
    for reduction in REDUCTIONS:
        assert_accurate(hidden, weight, labels, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels_and_gradients_that_are_not_contiguous(reduction: str, device: str) -> None:
    """The gradient that a sum sends back has stride 0, and a slice of labels its own."""
    hidden, weight, labels = inputs(24, 16, 50, dtype=torch.float32, device=device)
    hidden = hidden.detach()[::2].requires_grad_()
    losses = [
        loss(hidden, weight, labels[::2], reduction=reduction).sum()
        for loss in (linear_cross_entropy, linear_cross_entropy_reference)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses))


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["no options", "all options"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("num_rows", [0, 5])
def test_nothing_to_count(num_rows: int, reduction: str, options: dict[str, float], device: str) -> None:
    """No rows, or all of them ignored: eager code's loss (nan for "mean") and its gradients, zero or nan."""
    hidden, weight, labels = inputs(num_rows, 8, 20, dtype=torch.bfloat16, device=device, ignored=2.0)
    bias = torch.zeros(20, device=device).bfloat16().requires_grad_()
    values = {"bias": bias, "reduction": reduction, **options}
    expected = outputs_and_gradients(linear_cross_entropy_reference, hidden, weight, labels, **values)
    found = outputs_and_gradients(linear_cross_entropy, hidden, weight, labels, **values)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


def test_another_ignore_index(device: str) -> None:
    hidden, weight, labels = inputs(30, 8, 20, dtype=torch.float32, device=device)
    assert_accurate(hidden, weight, labels, ignore_index=int(labels[0]))


def test_extreme_logits(device: str) -> None:
    hidden, weight, labels = inputs(20, 8, 20, dtype=torch.float32, device=device)
    for options in ({}, ALL_OPTIONS):
        assert_accurate((hidden.detach() * 1000).requires_grad_(), weight, labels, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("small_chunks")
def test_gradients_in_float64(reduction: str, device: str) -> None:
    hidden, weight, labels = inputs(20, 4, 6, dtype=torch.float64, device=device, ignored=0.3)
    bias = torch.randn(6, dtype=torch.float64, device=device).requires_grad_()
    assert linear_cross_entropy(hidden, weight, labels).dtype == torch.float64

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_gradients_again(reduction: str, device: str) -> None:
    hidden, weight, labels = inputs(12, 8, 20, dtype=torch.float32, device=device)
    loss = 3 * linear_cross_entropy(hidden, weight, labels, reduction=reduction).mean()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for grad, total in zip(first, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(total, 3 * grad)


def test_without_gradients_none_is_computed(device: str) -> None:
    hidden, weight, labels = inputs(12, 8, 20, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("softmax", ["_softmax_rows", "_softmax_rows_triton"])
@pytest.mark.usefixtures("small_chunks")
def test_never_holds_the_logits(softmax: str, device: str, monkeypatch: Any) -> None:
    """One buffer of a chunk's rows is all there is, and of the ignored rows none but a few zeros enter it."""
    seen: list[tuple[int, int]] = []
    original = getattr(kernel, softmax)

    def spy(logits: Tensor, *args: Any) -> None:
        seen.append((logits.shape[0], logits.data_ptr()))
        original(logits, *args)

    monkeypatch.setattr(kernel, softmax, spy)
    hidden, weight, labels = inputs(100, 8, 20, dtype=torch.bfloat16, device=device, ignored=0.5)
    linear_cross_entropy(hidden, weight, labels).backward()
    if not seen:
        pytest.skip(f"{softmax} is not what this device runs")
    num_kept = int((labels != -100).sum())
    assert sum(rows for rows, _ in seen) == -(-num_kept // linear_head.ROW_MULTIPLE) * linear_head.ROW_MULTIPLE < 100
    assert max(rows for rows, _ in seen) <= linear_head.CHUNK_ROWS
    assert len({address for _, address in seen}) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registration(reduction: str, device: str) -> None:
    hidden, weight, labels = inputs(6, 4, 10, dtype=torch.float32, device=device, ignored=0.3)
    bias = torch.randn(10, device=device).requires_grad_()
    flags = [reduction != "none"] * 3
    options = ALL_OPTIONS.values()
    args = (hidden, weight, bias, labels, -100, reduction, *options, *flags)
    torch.library.opcheck(torch.ops.fxopt.linear_cross_entropy, args)
    args = (hidden.detach(), weight.detach(), None, labels, -100, "none", *options, True, True, False)
    torch.library.opcheck(torch.ops.fxopt.linear_cross_entropy_backward, (torch.ones(6, device=device), *args))


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["no options", "all options"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_traced_gradients_are_the_same(reduction: str, options: dict[str, float], device: str) -> None:
    hidden, weight, labels = inputs(5, 8, 20, dtype=torch.float32, device=device, ignored=0.3)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, reduction=reduction, **options).sum() / 7

    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for _ in range(2):
        found = torch.autograd.grad(traced(hidden, weight), (hidden, weight))
        torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_an_error(device: str) -> None:
    hidden, weight, labels = inputs(6, 4, 10, dtype=torch.float32, device=device)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)


@pytest.mark.parametrize("label", [20, 1000, -1, -101])
def test_labels_out_of_range(label: int) -> None:
    hidden, weight, labels = inputs(6, 4, 20, dtype=torch.float32, device="cpu")
    labels[3] = label
    for function in (linear_cross_entropy_reference, linear_cross_entropy):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds."):
            function(hidden, weight, labels)


def test_errors() -> None:
    hidden, weight, labels = inputs(6, 4, 20, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="reduction is 'avg'; it must be one of mean, sum, none"):
        linear_cross_entropy(hidden, weight, labels, reduction="avg")
    with pytest.raises(ValueError, match=r"must have shapes \(\.\.\., D\) and \(V, D\)"):
        linear_cross_entropy(hidden, weight.t(), labels)
    with pytest.raises(ValueError, match=r"has 6 rows, but labels .* has 5 elements"):
        linear_cross_entropy(hidden, weight, labels[:5])
    with pytest.raises(ValueError, match="bias has shape"):
        linear_cross_entropy(hidden, weight, labels, bias=torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"weight torch\.bfloat16.*must have one dtype"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(RuntimeError, match=r"labels are torch\.int32"):
        linear_cross_entropy(hidden, weight, labels.int())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("logit_scale", 0.0, "positive and finite"),
        ("logit_scale", math.inf, "positive and finite"),
        ("softcap", 0.0, "None, or positive and finite"),
        ("softcap", -30.0, "None, or positive and finite"),
        ("softcap", math.nan, "None, or positive and finite"),
        ("label_smoothing", -0.1, "between 0 and 1"),
        ("label_smoothing", 1.1, "between 0 and 1"),
        ("z_loss", -1e-4, "finite and not negative"),
        ("z_loss", math.inf, "finite and not negative"),
    ],
)
def test_options_out_of_range(option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}; it must be {message}"):
        linear_cross_entropy(*inputs(6, 4, 20, dtype=torch.float32, device="cpu"), **{option: value})
