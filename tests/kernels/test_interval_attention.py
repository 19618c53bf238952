"""fxopt::interval_attention against its reference, for every kind of mask that causal models have."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import interval_attention as module
from fxopt.kernels.interval_attention import (
    always_in_blocks,
    interval_attention,
    interval_attention_reference,
    visible_intervals,
)
from tests.accuracy import assert_as_accurate, outputs_and_gradients

DTYPES = [torch.float32, torch.bfloat16]


def masks(num_rows: int, length: int) -> dict[str, Tensor]:
    """(B, 1, Q, Q), True where a query sees a key."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    causal = key <= query
    lengths = torch.linspace(length // 2, length, num_rows).long()[:, None, None, None]
    document = torch.arange(length) * torch.arange(1, num_rows + 1)[:, None] // max(1, length // 3)
    packed = causal & (document[:, None, :, None] == document[:, None, None, :])
    window = causal & (query - key < max(2, length // 4))
    prefix = causal | (key < length // 3)
    return {
        "causal": causal[None, None],
        "right padding": causal & (key < lengths),
        "left padding": causal & (key >= length - lengths),
        "packed": packed,
        "packed and padded": packed & (key < lengths),
        "window": window[None, None],
        "window and padding": window & (key >= length - lengths),
        "prefix": prefix[None, None],
        "chunks": (causal & (query // 5 == key // 5))[None, None],
        "nothing seen": torch.zeros(num_rows, 1, length, length, dtype=torch.bool),
        "everything seen": torch.ones(1, 1, length, length, dtype=torch.bool),
    }


KINDS = list(masks(2, 8))


def inputs(dtype: torch.dtype, num_rows: int = 3, length: int = 37, heads: int = 4, groups: int = 2) -> list[Tensor]:
    return [torch.randn(num_rows, h, length, 16).to(dtype).requires_grad_() for h in (heads, groups, groups)]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def assert_accurate(mask: Tensor, *tensors: Tensor, eager: Callable[..., Tensor] | None = None) -> None:
    intervals = visible_intervals(mask)
    ours = outputs_and_gradients(lambda *t: interval_attention(*t, mask, intervals), *tensors)
    original = outputs_and_gradients(eager or (lambda *t: sdpa(*t, mask)), *tensors)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truth = outputs_and_gradients(lambda *t: interval_attention_reference(*t, mask, 0.25), *doubles)
    for name, exact in truth.items():
        assert_as_accurate(ours[name], original[name], exact, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_eager(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 8)
    with always_in_blocks():
        assert_accurate(masks(3, 37)[kind], *inputs(dtype))
    assert_accurate(masks(3, 37)[kind], *inputs(dtype))


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (32, 1)])
def test_gradients_of_shared_heads(heads: int, groups: int) -> None:
    """As accurate as with keys and values repeated, which torch's kernel is not where heads share them."""
    mask, tensors = masks(2, 300)["right padding"], inputs(torch.bfloat16, 2, 300, heads, groups)

    def repeated(query: Tensor, *shared: Tensor) -> Tensor:
        key, value = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in shared)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    with always_in_blocks():
        assert_accurate(mask, *tensors, eager=repeated)


@pytest.mark.parametrize("length", [1, 2, 16, 130])
def test_lengths(length: int) -> None:
    for mask in masks(2, length).values():
        assert_accurate(mask, *inputs(torch.bfloat16, num_rows=2, length=length))


def test_a_mask_with_gaps_is_used_as_it_is() -> None:
    mask = masks(3, 37)["causal"].expand(3, 1, 37, 37).clone()
    mask[1, :, 20:, 7] = False
    assert (visible_intervals(mask) == -1).all()
    assert_accurate(mask, *inputs(torch.bfloat16))


def test_what_no_query_sees_is_not_computed() -> None:
    """NaN in masked keys spoils a computed score; here it spoils none."""
    query, key, value = inputs(torch.float32)
    mask = masks(3, 37)["right padding"]
    hidden = ~mask.any(dim=2)[:, 0]
    broken = [tensor.detach().masked_fill(hidden[:, None, :, None], torch.nan) for tensor in (key, value)]
    assert sdpa(query, *broken, mask).isnan().any()
    with always_in_blocks():
        result = interval_attention(query, *broken, mask, visible_intervals(mask))
    torch.testing.assert_close(result, sdpa(query, key, value, mask))


def test_strides_and_scale() -> None:
    """Heads that lie beside each other, as a projection leaves them, and another scale."""
    query, key, value = (torch.randn(2, 19, 4, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    mask = masks(2, 19)["left padding"]
    result = interval_attention(query, key, value, mask, visible_intervals(mask), 0.5)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
    torch.testing.assert_close(result, expected)


def test_a_last_axis_that_is_not_contiguous() -> None:
    mask = masks(3, 19)["right padding"]
    apart = [torch.randn(3, 4, 16, 19).bfloat16().transpose(2, 3).requires_grad_() for _ in range(2)]
    every_other = torch.randn(3, 4, 19, 32).bfloat16()[..., ::2].requires_grad_()
    with always_in_blocks():
        assert_accurate(mask, *apart, every_other)
    assert_accurate(mask, every_other, *apart)


def test_no_rows() -> None:
    assert_accurate(masks(1, 9)["causal"].expand(0, 1, 9, 9), *inputs(torch.bfloat16, num_rows=0, length=9))


def test_gradients_in_float64() -> None:
    mask = masks(2, 9)["packed"]
    tensors = inputs(torch.float64, num_rows=2, length=9)
    intervals = visible_intervals(mask)
    assert torch.autograd.gradcheck(lambda *t: interval_attention(*t, mask, intervals), tensors, fast_mode=True)


def test_registration() -> None:
    mask = masks(2, 9)["packed"]
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.fxopt.visible_intervals, (mask,), test_utils=tests)
    arguments = (*inputs(torch.float32, num_rows=2, length=9), mask, visible_intervals(mask), None)
    torch.library.opcheck(torch.ops.fxopt.interval_attention, arguments, test_utils=tests)


def test_shapes_that_do_not_fit() -> None:
    query, key, value = inputs(torch.float32)
    mask = masks(3, 37)["causal"]
    for other in (key[:, :, :, :8], key[:, :, :-1], key[:1], key[:, :1].expand(3, 3, 37, 16)):
        with pytest.raises(ValueError, match="do not fit"):
            interval_attention(query, other, value if other.shape[1] == 2 else other, mask, visible_intervals(mask))
    with pytest.raises(ValueError, match="mask is"):
        interval_attention(query, key, value, mask[..., 1:], visible_intervals(mask))
