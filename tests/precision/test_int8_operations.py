"""What can be done to an int8 weight: reading, and writing with the right rounding."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.precision.int8_weight import Int8Weight, dequantized
from fxopt.precision.parameter_storage import is_int8
from fxopt.precision.quantized import quantize_parameter
from tests.accuracy import assert_as_accurate

BF16 = torch.bfloat16
INDICES = torch.tensor([1, 4])


def int8_weight(*, frozen: bool = False, num_rows: int = 16, width: int = 32) -> Any:
    torch.manual_seed(0)
    linear = nn.Linear(width, num_rows, bias=False).to(BF16).requires_grad_(not frozen)
    return quantize_parameter(linear, linear.weight, BF16)


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_the_lookup_is_as_accurate_as_a_dequantized_table(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(40, 16, padding_idx=padding_idx).to(BF16)
    ids = torch.tensor([[0, 39, 7], [7, 7, 1]])
    weight = quantize_parameter(embedding, embedding.weight, BF16)
    upstream = torch.randn(2, 3, 16).to(BF16)
    results = []
    for values, table in (
        (True, weight),
        (False, dequantized(weight, BF16)),
        (False, dequantized(weight, torch.float64)),
    ):
        table = table if values else table.detach().requires_grad_()
        out = F.embedding(ids, table, embedding.padding_idx)
        (gradient,) = torch.autograd.grad(out, table, upstream.to(out.dtype))
        results.append((out.detach(), gradient))
    for actual, eager, truth in zip(*results, strict=True):
        assert_as_accurate(actual, eager, truth)


def in_groups(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.view(2, 8, 16).transpose(1, 2)).transpose(0, 1).reshape(len(x), 16)


@pytest.mark.parametrize(
    "product",
    [
        torch.matmul,
        lambda x, w: w @ x.t(),
        F.linear,
        lambda x, w: x @ w.T,
        lambda x, w: x @ w.mT.clamp(-9, 9),
        in_groups,
    ],
)
def test_products_with_an_int8_weight_and_their_gradients(product: object) -> None:
    torch.manual_seed(0)
    square = nn.Linear(16, 16, bias=False).to(BF16)
    weight = quantize_parameter(square, square.weight, BF16)
    plain = dequantized(weight, torch.float32).requires_grad_()
    x = torch.randn(16, 5).to(BF16).t()  # not contiguous
    found, expected = product(x, weight), product(x.float(), plain)  # type: ignore[operator]
    assert found.dtype == BF16 and (found - expected).norm() < 0.01 * expected.norm()
    upstream = torch.randn(*expected.shape[::-1]).t()
    (gradient,) = torch.autograd.grad(found, weight, upstream.to(BF16))
    (truth,) = torch.autograd.grad(expected, plain, upstream.to(BF16).float())
    assert (gradient - truth).norm() < 0.01 * truth.norm()


def test_what_a_linear_layer_returns_may_be_written_to() -> None:
    linear = nn.Linear(16, 16, bias=False).to(BF16)
    weight = quantize_parameter(linear, linear.weight, BF16)
    product = F.linear(torch.ones(3, 16, dtype=BF16), weight)
    product *= 2
    (gradient,) = torch.autograd.grad(product.sum(), weight)
    assert torch.equal(gradient, torch.full_like(gradient, 6))


@pytest.mark.parametrize("index", [3, -1, (3, slice(None)), (3, 5), (slice(2), 5), torch.tensor([1, 1, 4]), None, ...])
def test_what_is_taken_out_of_an_int8_table(index: Any) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(40, 16).to(BF16)
    weight = quantize_parameter(embedding, embedding.weight, BF16)
    plain = dequantized(weight, BF16).requires_grad_()
    found, expected = weight[index], plain[index]
    assert type(found) is Tensor and torch.equal(found, expected)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, table, upstream)[0] for out, table in ((found, weight), (expected, plain))]
    assert torch.equal(*gradients)
    with pytest.raises(IndexError):
        weight[40]


@pytest.mark.parametrize("limits", [(-0.05, 0.08), (None, 0.02), (-0.03,), (-10.0, 10.0)])
def test_an_int8_weight_is_clipped_to_what_int8_has_within_the_limits(limits: tuple[float | None, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 8, bias=False).to(BF16)
    linear.weight.data[3] = 0
    weight = quantize_parameter(linear, linear.weight, BF16)
    before, steps = dequantized(weight, torch.float32), weight.scale.float().unsqueeze(1)
    weight.data.clamp_(*limits)
    after, clipped = dequantized(weight, torch.float32), before.clamp(*limits)
    assert ((after - clipped).abs() < steps).logical_or(after == clipped).all()
    assert torch.equal(after.clamp(*limits), after) and torch.equal(after[before == clipped], before[before == clipped])


def test_rows_of_an_int8_matrix_stay_int8() -> None:
    linear = nn.Linear(16, 8, bias=False).to(BF16)
    assert is_int8(quantize_parameter(linear, linear.weight, BF16)[2:6])


@pytest.mark.parametrize(
    "read",
    [
        torch.equal,
        torch.allclose,
        lambda w, _: w.norm(),
        lambda w, _: torch.linalg.norm(w, dim=1),
        lambda w, _: w > 0,
        lambda w, other: w == other,
        lambda w, _: w.abs().mean(0),
        lambda w, _: w.isfinite().all(),
        lambda w, other: torch.where(w > 0, w, other),
        lambda w, other: w.index_copy(0, INDICES, other[:2]),
        lambda w, other: torch.cat([w, other]),
        lambda w, _: torch.cat([w, w], dim=1),
        lambda w, _: w.split(8, dim=1)[1],
        lambda w, _: w.unsqueeze(0) + 1,
        lambda w, _: w.reshape(-1),
        lambda w, _: w.flatten(),
        lambda w, _: w.ravel(),
        lambda w, _: w.view(32, 16),
        lambda w, _: w[:, 3:9],
        lambda w, _: w[w > 0],
        lambda w, other: torch.einsum("nd,kd->nk", w, other),
        lambda w, _: w.to(torch.int32),
        lambda w, _: w.detach().tolist(),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_what_reads_an_int8_weight_finds_its_values(read: Callable[..., Any], frozen: bool) -> None:
    weight = int8_weight(frozen=frozen)
    plain = dequantized(weight, BF16).requires_grad_(not frozen)
    other = torch.randn(16, 32).to(BF16)
    found, expected = read(weight, other), read(plain, other)
    if not isinstance(expected, Tensor):
        assert found == expected
        return
    assert type(found) is Tensor and found.dtype == expected.dtype and torch.equal(found, expected)
    assert found.requires_grad == expected.requires_grad
    if expected.requires_grad:
        upstream = torch.randn_like(expected)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y, x in ((found, weight), (expected, plain))]
        assert type(gradients[0]) is Tensor and torch.equal(*gradients)


def test_a_wider_copy_has_the_exact_values() -> None:
    weight = int8_weight()
    assert torch.equal(weight.float() + 0, dequantized(weight, torch.float32))
    assert torch.equal(weight.double() + 0, dequantized(weight, torch.float64))
    assert torch.equal(copy.deepcopy(weight), weight)


def test_a_frozen_weight_keeps_no_input_and_gets_no_gradient() -> None:
    """What the product leaves behind is the weight itself: no input, nothing widened."""
    kept: list[Tensor] = []
    for frozen in (True, False):
        weight = int8_weight(frozen=frozen)
        x = torch.randn(4, 32, dtype=BF16, requires_grad=True)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = F.linear(x, weight, torch.ones(16, dtype=BF16))
        assert [type(t) for t in kept] == [Int8Weight] if frozen else [Tensor, Int8Weight]
        plain = dequantized(weight, torch.float64)
        upstream = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, x, upstream)
        truth = upstream.double() @ plain
        assert (gradient - truth).norm() < 0.005 * truth.norm()
    assert weight.grad is None


# Writing -------------------------------------------------------------------------------------------------------------

DELTA = torch.randn(16, 32, generator=torch.Generator().manual_seed(3)) * 0.02


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(DELTA),
        lambda w: w.sub_(DELTA, alpha=0.5),
        lambda w: w.mul_(1.3),
        lambda w: w.copy_(DELTA),
        lambda w: w.copy_(DELTA[3]),
        lambda w: w.fill_(2.0),
        lambda w: w.zero_(),
        lambda w: w.addcdiv_(DELTA, DELTA.abs() + 1),
        lambda w: w.masked_fill_(DELTA > 0, 0.0),
        lambda w: w.index_copy_(0, INDICES, DELTA[:2].to(BF16).to(w.dtype)),
        lambda w: w.__setitem__(3, DELTA[0]),
        lambda w: w.__setitem__(INDICES, DELTA[:2].to(BF16).float()),
        lambda w: w.__setitem__((slice(2), 5), 0.01),
        lambda w: w[2:4].copy_(DELTA[:2]),
        lambda w: w[2:4].zero_(),
        lambda w: torch.mul(DELTA, 2, out=w),
        lambda w: torch._foreach_add_([w], [DELTA]),
        lambda w: setattr(w, "data", w.data + DELTA),
        lambda w: setattr(w, "data", DELTA.clone()),
        lambda w: w.data.__iadd__(DELTA),
    ],
)
def test_what_is_written_arrives_with_the_right_rounding(write: Callable[[Any], Any]) -> None:
    """Half a step at most where frozen; where trained less than one, the sum of all being right."""
    for frozen in (True, False):
        weight = int8_weight(frozen=frozen)
        codes, expected = weight.int_data.data_ptr(), dequantized(weight, torch.float32)
        torch.manual_seed(1)
        with torch.no_grad():
            write(weight)
            write(expected)
        assert is_int8(weight) and weight.int_data.data_ptr() == codes
        steps = (dequantized(weight, torch.float32) - expected) / weight.scale.float().clamp(min=1e-30)[:, None]
        limit = 0.5 if frozen else 1.0
        assert steps.abs().max() <= limit + 0.01
        assert steps.mean().abs() < 0.05


def test_rows_keep_their_scale_and_get_a_new_one_where_they_outgrow_it() -> None:
    weight = int8_weight(frozen=True)
    before, scale = weight.int_data.clone(), weight.scale.clone()
    with torch.no_grad():
        weight[5] *= 2
        weight[7] *= 0.5
    others = torch.tensor([row for row in range(16) if row not in (5, 7)])
    assert torch.equal(weight.int_data[others], before[others]) and torch.equal(weight.scale[others], scale[others])
    for row, factor in ((5, 2), (7, 0.5)):
        assert torch.equal(weight.scale[row], scale[row] * factor) and weight.int_data[row].abs().max() == 127


def test_an_update_smaller_than_a_step_is_lost_only_to_what_is_frozen() -> None:
    for frozen in (True, False):
        weight = int8_weight(frozen=frozen, num_rows=8, width=4096)
        before = dequantized(weight, torch.float32)
        step = weight.scale.float()[:, None]
        torch.manual_seed(2)
        with torch.no_grad():
            weight.add_((0.1 * step).expand(8, 4096) * (before.abs() < 100 * step))
        moved = ((dequantized(weight, torch.float32) - before) / step)[before.abs() < 100 * step].mean()
        assert moved == 0 if frozen else abs(moved - 0.1) < 0.01


def test_a_clone_and_the_data_of_what_is_frozen_are_rounded_to_the_nearest() -> None:
    """PEFT's `safe_merge` adds to a clone."""
    weight = int8_weight(frozen=True)
    for taken in (weight.data, weight.detach().clone(), weight.data[2:9]):
        values = dequantized(taken, torch.float32) + 0.001
        taken += 0.001
        assert ((dequantized(taken, torch.float32) - values).abs() <= 0.501 * taken.scale.float()[:, None]).all()


def test_what_cannot_be_done_names_the_mend() -> None:
    weight = int8_weight(frozen=True)
    with pytest.raises(
        NotImplementedError, match=r"aten\.t_\.default cannot be done to an int8 weight.*Selector\(name="
    ):
        weight.t_()
    with pytest.raises(RuntimeError, match=r"\(16, 32\) cannot take data of the shape \(3, 32\)"):
        weight.data = torch.zeros(3, 32)
    with pytest.raises(RuntimeError, match="no_grad"):
        int8_weight()[3] = 0
