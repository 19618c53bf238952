"""NaN, infinity and a huge number go where the references let them go: every op, every input, forward and backward."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.kernels import (
    add_layer_norm,
    add_rms_norm,
    clamped_swiglu,
    glu,
    layer_norm,
    linear_cross_entropy,
    linear_log_prob,
    relu_squared,
    rms_norm,
    rope,
)
from tests.accuracy import outputs_and_gradients

SHAPE, WIDTH, VOCABULARY = (4, 32), 32, 50
ALL_OPTIONS = {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3}


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def loss_inputs() -> list[Any]:
    return [leaf(6, WIDTH), leaf(VOCABULARY, WIDTH), torch.randint(0, VOCABULARY, (6,))]


def floats_of(function: Callable[..., linear_log_prob.LogProbs]) -> Callable[..., tuple[Any, ...]]:
    return lambda *args, **options: function(*args, with_entropy=True, **options)[:3]


Case = tuple[Callable[..., Any], Callable[..., Any], Callable[[], list[Any]], dict[str, Any]]
# The op, its reference, what they are given, and options.
CASES: dict[str, Case] = {
    "rms_norm": (rms_norm.rms_norm, rms_norm.rms_norm_reference, lambda: [leaf(*SHAPE), leaf(WIDTH), 1e-5], {}),
    "layer_norm": (
        layer_norm.layer_norm,
        layer_norm.layer_norm_reference,
        lambda: [leaf(*SHAPE), leaf(WIDTH), leaf(WIDTH), 1e-5],
        {},
    ),
    "add_rms_norm": (
        add_rms_norm.add_rms_norm,
        add_rms_norm.add_rms_norm_reference,
        lambda: [leaf(*SHAPE), leaf(*SHAPE), leaf(WIDTH), 1e-5],
        {},
    ),
    "add_layer_norm": (
        add_layer_norm.add_layer_norm,
        add_layer_norm.add_layer_norm_reference,
        lambda: [leaf(*SHAPE), leaf(*SHAPE), leaf(WIDTH), leaf(WIDTH), 1e-5],
        {},
    ),
    "swiglu": (glu.swiglu, glu.swiglu_reference, lambda: [leaf(*SHAPE), leaf(*SHAPE)], {}),
    "geglu": (glu.geglu, glu.geglu_reference, lambda: [leaf(*SHAPE), leaf(*SHAPE)], {}),
    "geglu, tanh": (glu.geglu, glu.geglu_reference, lambda: [leaf(*SHAPE), leaf(*SHAPE)], {"approximate": "tanh"}),
    "reglu": (glu.reglu, glu.reglu_reference, lambda: [leaf(*SHAPE), leaf(*SHAPE)], {}),
    "clamped_swiglu": (
        clamped_swiglu.clamped_swiglu,
        clamped_swiglu.clamped_swiglu_reference,
        lambda: [leaf(*SHAPE), leaf(*SHAPE), 1.7, 7.0],
        {},
    ),
    "relu_squared": (relu_squared.relu_squared, relu_squared.relu_squared_reference, lambda: [leaf(*SHAPE)], {}),
    "rope": (
        rope.rope,
        rope.rope_reference,
        lambda: [leaf(2, 3, 4, 16), torch.randn(2, 1, 4, 16), torch.randn(2, 1, 4, 16)],
        {},
    ),
    "linear_cross_entropy": (
        linear_cross_entropy.linear_cross_entropy,
        linear_cross_entropy.linear_cross_entropy_reference,
        loss_inputs,
        {},
    ),
    "linear_cross_entropy, all options": (
        linear_cross_entropy.linear_cross_entropy,
        linear_cross_entropy.linear_cross_entropy_reference,
        loss_inputs,
        ALL_OPTIONS,
    ),
    "linear_log_prob": (
        floats_of(linear_log_prob.linear_log_prob),
        floats_of(linear_log_prob.linear_log_prob_reference),
        loss_inputs,
        {},
    ),
    "linear_log_prob, all options": (
        floats_of(linear_log_prob.linear_log_prob),
        floats_of(linear_log_prob.linear_log_prob_reference),
        loss_inputs,
        {"softcap": 5.0, "temperature": 0.7},
    ),
}


@pytest.mark.parametrize("planted", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("case", CASES)
def test_finite_where_the_reference_is(case: str, planted: float, device: str) -> None:
    op, reference, draw, options = CASES[case]
    inputs = [value.to(device).detach() if isinstance(value, Tensor) else value for value in draw()]
    for index, value in enumerate(inputs):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        arguments = [v.clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v for v in inputs]
        with torch.no_grad():
            arguments[index].view(-1)[5] = planted
        found = outputs_and_gradients(op, *arguments, **options)
        for name, expected in outputs_and_gradients(reference, *arguments, **options).items():
            differ = found[name].isfinite() != expected.isfinite()
            if device == "cuda" and "layer_norm" in case and math.isfinite(planted):
                differ &= expected.isfinite()  # torch's own kernel makes NaN of what overflows; on the CPU it does not
            if name == f"gradient of input {index}":
                differ &= ~arguments[index].isnan()  # what the gradient of NaN is, does not matter
            assert not differ.any(), (
                f"{planted} in input {index}: {name} is {found[name][differ]}, must be {expected[differ]}"
            )


def test_rows_that_pad_a_chunk_make_no_nan_of_infinite_weights(device: str) -> None:
    """Rows without a label leave room for rows of zeros; a soft cap keeps the loss finite."""
    hidden, weight, _ = (value.detach().to(device) for value in loss_inputs())
    labels = torch.tensor([3, 1, 4, 1, 5, -100], device=device)
    weight[7, 2] = math.inf
    both = [
        outputs_and_gradients(op, hidden.clone().requires_grad_(), weight.clone().requires_grad_(), labels, softcap=5.0)
        for op in (linear_cross_entropy.linear_cross_entropy, linear_cross_entropy.linear_cross_entropy_reference)
    ]
    for name, expected in both[1].items():
        rows = slice(5) if name == "gradient of input 0" else slice(None)  # the last has 0 * infinity in the reference
        found, wanted = (value if value.ndim == 0 else value[rows] for value in (both[0][name], expected))
        torch.testing.assert_close(found, wanted, equal_nan=True)
        assert found.isfinite().any()
