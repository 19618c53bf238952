"""What the ops on a linear output head share: chunks, rows that count, gradients."""

import math

import pytest
import torch

from fxopt.kernels import linear_head
from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.kernels.linear_head import HeadGradients, head_chunks, logits_by_chunk, rows_that_count
from fxopt.kernels.linear_log_prob import linear_log_prob


@pytest.mark.parametrize(
    ("place", "most_bytes"), [("cpu", linear_head.CHUNK_BYTES), ("cuda", linear_head.GPU_CHUNK_BYTES)]
)
def test_chunks_bound_the_buffer(place: str, most_bytes: int) -> None:
    for num_rows, row_bytes in ((0, 8), (1, 8), (513, 98304), (10_000, 512 * 1024), (3, most_bytes * 2)):
        chunks = linear_head.chunks_of_rows(num_rows, row_bytes, torch.device(place))
        assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(num_rows))
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        assert all(n <= linear_head.CHUNK_ROWS and (n == 1 or n * row_bytes <= most_bytes) for n in lengths)
        assert not lengths or max(lengths) - min(lengths) <= 1


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


@pytest.mark.parametrize("chunk_rows", [4, 100])
def test_gradients_are_those_of_the_products(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with rows of zeros whose dlogits are NaN."""
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", chunk_rows)
    hidden, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((10, 4), (7, 4), (7,)))
    labels = torch.arange(10).remainder(7).masked_fill(torch.arange(10) % 3 == 0, -100)
    rows = rows_that_count("op", hidden, weight, labels, -100)
    chunks = head_chunks(rows, weight)
    gradients = HeadGradients(rows, weight, (True, True, True), len(chunks))
    dlogits = torch.randn(rows.hidden.shape[0], 7, dtype=torch.float64)
    for chunk, logits in logits_by_chunk(rows, weight, bias, chunks):
        torch.testing.assert_close(logits, rows.hidden[chunk] @ weight.t() + bias)
        logits[:] = dlogits[chunk]
        logits[max(rows.num_kept - chunk.start, 0) :] = torch.nan
        gradients.add(chunk, logits)
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
