"""What the ops on a linear output head share: chunks, rows that count, gradients."""

import math
from itertools import pairwise

import pytest
import torch

from fxopt.kernels import linear_head
from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.kernels.linear_head import (
    HeadGradients,
    Split,
    logits_by_part,
    parts_of_logits,
    rows_that_count,
    some_columns,
    some_rows,
)
from fxopt.kernels.linear_log_prob import linear_log_prob


@pytest.mark.parametrize("split", [some_rows, some_columns])
@pytest.mark.parametrize(
    ("place", "most_bytes"), [("cpu", linear_head.CHUNK_BYTES), ("cuda", linear_head.GPU_CHUNK_BYTES)]
)
@pytest.mark.parametrize("size", [(1, 4), (5, 1), (513, 49152), (10_000, 262_144), (3, 2**28), (4096, 50257)], ids=str)
def test_parts_bound_the_buffer(split: Split, place: str, most_bytes: int, size: tuple[int, int]) -> None:
    """And each logit is in one of them."""
    parts = split(*size, 2, torch.device(place))
    widths = [[axis.stop - axis.start for axis in axes] for axes in zip(*parts, strict=True)]
    split_axis, whole_axis = (0, 1) if split is some_rows else (1, 0)
    assert set(widths[whole_axis]) == {size[whole_axis]} and sum(widths[split_axis]) == size[split_axis]
    bounds = [part[split_axis] for part in parts]
    assert bounds[0].start == 0 and all(a.stop == b.start for a, b in pairwise(bounds))
    assert all(n == 1 or n * size[whole_axis] * 2 <= most_bytes for n in widths[split_axis])
    assert split is some_columns or max(widths[0]) <= min(linear_head.CHUNK_ROWS, min(widths[0]) + 1)


def test_no_rows_have_no_parts() -> None:
    assert some_rows(0, 9, 2, torch.device("cpu")) == some_columns(0, 9, 2, torch.device("cpu")) == []


@pytest.mark.parametrize("ignore_index", [-100, None])
def test_values_of_rows_come_back_to_their_places(ignore_index: int | None) -> None:
    labels = torch.tensor([3, -100, 0, -100, 1]) if ignore_index else torch.tensor([3, 2, 0, 2, 1])
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    rows = rows_that_count("op", hidden, weight, labels, ignore_index)
    counts = torch.ones(5, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    assert rows.num_kept == int(counts.sum()) and rows.num_rows == 5
    assert rows.hidden.shape[0] == (5 if ignore_index is None else linear_head.ROW_MULTIPLE)
    torch.testing.assert_close(rows.put_back(rows.hidden), hidden * counts[:, None])
    torch.testing.assert_close(rows.put_back(rows.take(labels)), labels * counts)


@pytest.mark.parametrize("split", [some_rows, some_columns])
@pytest.mark.parametrize("most_bytes", [600, 10_000])
def test_gradients_are_those_of_the_products(split: Split, most_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several parts and in one, also with rows of zeros whose dlogits are NaN."""
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", most_bytes)
    hidden, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((10, 4), (7, 4), (7,)))
    labels = torch.arange(10).remainder(7).masked_fill(torch.arange(10) % 3 == 0, -100)
    rows = rows_that_count("op", hidden, weight, labels, -100)
    parts = parts_of_logits(split, rows, weight)
    assert (len(parts) == 1) == (most_bytes == 10_000)
    gradients = HeadGradients(rows, weight, (True, True, True), parts)
    dlogits = torch.randn(rows.hidden.shape[0], 7, dtype=torch.float64)
    for part, logits in logits_by_part(rows, weight, bias, parts):
        torch.testing.assert_close(logits, (rows.hidden @ weight.t() + bias)[part])
        logits[:] = dlogits[part]
        logits[max(rows.num_kept - part.rows.start, 0) :] = torch.nan
        gradients.add(part, logits)
    expected = torch.zeros(10, 7, dtype=torch.float64)
    expected[labels != -100] = dlogits[: rows.num_kept]
    dhidden, dweight, dbias = gradients.result()
    torch.testing.assert_close(dhidden, expected @ weight)
    torch.testing.assert_close(dweight, expected.t() @ hidden)
    torch.testing.assert_close(dbias, expected.sum(0))


@pytest.mark.parametrize("some_ignored", [False, True])
def test_nan_in_one_row_stays_there(some_ignored: bool, device: str) -> None:
    """With AMX, rows of logits that lie next to each other would carry it into the row before."""
    hidden = torch.randn(96, 64, device=device).bfloat16()
    weight = torch.randn(307, 64, device=device).bfloat16().requires_grad_()
    labels = torch.randint(0, 307, (96,), device=device)
    if some_ignored:
        labels[::7] = -100
    hidden[33] = math.nan
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, reduction="none").sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [33]
    hidden.grad = None
    linear_log_prob(hidden, weight, labels).log_prob.sum().backward()
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [33]
