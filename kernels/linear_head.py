"""What the ops on a linear output head share: logits a part at a time, and gradients from the logits'.

logits = hidden @ weightᵀ + bias, rounded to hidden's dtype, for hidden (N, D), weight (V, D), bias (V,), labels (N,).
Rows whose label is ignore_index are left out before the first matrix product and cost nothing (on a GPU, finding them
waits for the device once); rows of zeros take the rest to a multiple of ROW_MULTIPLE. Their logits go through a buffer
of at most CHUNK_BYTES (on a GPU GPU_CHUNK_BYTES), in which an op replaces them by their gradient:
- some rows, at most CHUNK_ROWS, with all their columns, where a softmax is to be found first;
- some columns, of all rows, where the softmax is known: then not dweight is the sum over parts, but the small dhidden.
    dhidden = dlogits @ weight,  dweight = dlogitsᵀ @ hidden,  dbias = Σ_rows dlogits
What is summed over parts is summed in float32.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.kernels.backend import compute_dtype

CHUNK_ROWS = 4096  # matrix products are at full speed long before; for small vocabularies
CHUNK_BYTES = 64 * 2**20  # one chunk needs no float32 sum of the weight's gradient, so not smaller than this
GPU_CHUNK_BYTES = 256 * 2**20  # each chunk reads and writes that sum: fewer chunks, and larger matrix products
# Every step keeps another number of rows, and for each new shape of a matrix product oneDNN holds on to half a MB.
ROW_MULTIPLE = 64
# With AMX, oneDNN (3.12, in torch 2.13) reads the rows of a bf16 factor in whole tiles: past the end of one into the
# next, times zero. If that one begins with NaN or infinity, both rows of the product become NaN. Nor can a GPU load
# rows that are not aligned by more than two bytes at a time.
ROW_ALIGNMENT = 64
SOFTMAX_BYTES = 8 * 2**20  # float32 working set of the softmax on the CPU: a share of the last-level cache
SUM_BLOCK = 4096  # rows of a gradient that the CPU adds up at a time
BLOCK = 2048  # columns that a Triton program holds at a time

Wanted = tuple[bool, bool, bool]  # which gradients: of hidden, of weight, of bias


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """ValueError or RuntimeError unless shapes and dtypes are those of a head and one int64 label for each row."""
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must have shapes (..., D) and (V, D)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    if math.prod(hidden.shape[:-1]) != labels.numel():  # not Size.numel, which fixes dynamic sizes
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} has {math.prod(hidden.shape[:-1])} rows, "
            f"but labels {tuple(labels.shape)} has {labels.numel()} elements"
        )
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise RuntimeError(
            f"{op}: hidden is {hidden.dtype}, weight {weight.dtype}"
            + (f", bias {bias.dtype}" if bias is not None else "")
            + "; they must have one dtype, as for torch.nn.functional.linear"
        )
    if labels.dtype != torch.int64:
        raise RuntimeError(f"{op}: labels are {labels.dtype}; they must be torch.int64")


def check_options(op: str, *options: tuple[str, float | None, bool, str]) -> None:
    """ValueError for the first of the options (name, value, whether it fits, range) that does not fit."""
    for name, value, fits, range_of_values in options:
        if not fits:
            raise ValueError(f"{op}: {name} is {value}; it must be {range_of_values}")


class HeadRows(NamedTuple):
    """The rows that count, then rows of zeros up to a multiple of ROW_MULTIPLE; without them where all rows count."""

    hidden: Tensor
    labels: Tensor
    num_rows: int  # of all
    num_kept: int
    kept: Tensor | None  # their numbers; None where all count

    def take(self, values: Tensor) -> Tensor:
        """(N, ...) values of all rows, of these."""
        return values if self.kept is None else _take_rows(values, self.kept)

    def put_back(self, values: Tensor) -> Tensor:
        """Values of these rows, of all (N, ...): zeros for those that do not count."""
        if self.kept is None:
            return values
        return values.new_zeros(self.num_rows, *values.shape[1:]).index_copy_(0, self.kept, values[: self.num_kept])


def rows_that_count(op: str, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None) -> HeadRows:
    """Those whose label is not ignore_index. IndexError for a label out of range (on a GPU a device-side assertion)."""
    num_rows = num_kept = labels.shape[0]
    labels, kept = labels.contiguous(), None
    if ignore_index is not None:
        kept = (labels != ignore_index).nonzero().squeeze(1)
        num_kept = kept.numel()
        if num_kept == num_rows:
            kept = None
        else:
            hidden, labels = _take_rows(hidden, kept), _take_rows(labels, kept)
    _check_labels(op, labels, weight.shape[0])
    return HeadRows(hidden, labels, num_rows, num_kept, kept)


def _take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Those rows, then zeros up to a multiple of ROW_MULTIPLE; as their scale is zero, so are their dlogits."""
    num_rows = -(-rows.numel() // ROW_MULTIPLE) * ROW_MULTIPLE
    if tensor.ndim == 1:
        taken = tensor.new_zeros(num_rows)
    else:
        taken = tensor.new_zeros(num_rows, aligned_width(tensor.shape[1]))[:, : tensor.shape[1]]
    torch.index_select(tensor, 0, rows, out=taken[: rows.numel()])
    return taken


def _check_labels(op: str, labels: Tensor, vocabulary: int) -> None:
    out_of_range = (labels < 0) | (labels >= vocabulary)
    if labels.device.type != "cpu":
        torch._assert_async(~out_of_range.any(), f"{op}: a label is out of range")
    elif out_of_range.any():
        raise IndexError(f"{op}: Target {labels[out_of_range][0]} is out of bounds.")


class Part(NamedTuple):
    """The logits that are in the buffer at once: a tile of all rows that count and all columns."""

    rows: slice
    columns: slice


def aligned_width(width: int) -> int:
    """How far apart rows of this width are laid."""
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _most_bytes(device: torch.device) -> int:
    return CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES


def some_rows(num_rows: int, vocabulary: int, itemsize: int, device: torch.device) -> list[Part]:
    """Parts of nearly equal numbers of rows; none with more than CHUNK_ROWS or, if it can be, the buffer's bytes."""
    most = max(1, min(CHUNK_ROWS, _most_bytes(device) // max(1, vocabulary * itemsize)))
    num_parts = -(-num_rows // most)
    bounds = [num_rows * i // num_parts for i in range(num_parts + 1)] if num_parts else []
    return [Part(slice(start, stop), slice(0, vocabulary)) for start, stop in pairwise(bounds)]


def some_columns(num_rows: int, vocabulary: int, itemsize: int, device: torch.device) -> list[Part]:
    """Parts of nearly equal numbers of columns; none with more than the buffer's bytes, if it can be."""
    if not num_rows:
        return []
    most = max(1, _most_bytes(device) // (num_rows * itemsize))
    width = -(-vocabulary // -(-vocabulary // most)) if vocabulary else 1
    if ROW_ALIGNMENT < width < vocabulary:
        width -= width % ROW_ALIGNMENT
    bounds = [*range(0, vocabulary, width), vocabulary]
    return [Part(slice(0, num_rows), slice(start, stop)) for start, stop in pairwise(bounds)]


Split = Callable[[int, int, int, torch.device], list[Part]]  # `some_rows` or `some_columns`


def parts_of_logits(split: Split, rows: HeadRows, weight: Tensor) -> list[Part]:
    """The parts that the rows' logits are computed in."""
    return split(rows.hidden.shape[0], weight.shape[0], rows.hidden.element_size(), rows.hidden.device)


def _most_rows_and_columns(parts: list[Part]) -> tuple[int, int]:
    num_rows = max((part.rows.stop - part.rows.start for part in parts), default=0)
    return num_rows, max((part.columns.stop - part.columns.start for part in parts), default=0)


def logits_by_part(
    rows: HeadRows, weight: Tensor, bias: Tensor | None, parts: list[Part]
) -> Iterator[tuple[Part, Tensor]]:
    """Each part with its logits, all in one buffer: what is done with them must be done before the next.

    The buffer's rows are a multiple of ROW_ALIGNMENT apart, with zeros between them.
    """
    num_rows, num_columns = _most_rows_and_columns(parts)
    buffer = rows.hidden.new_empty(num_rows, aligned_width(num_columns))
    for part in parts:
        logits = buffer[: part.rows.stop - part.rows.start, : part.columns.stop - part.columns.start]
        buffer[: logits.shape[0], logits.shape[1] : aligned_width(logits.shape[1])] = 0.0
        if bias is None:
            torch.mm(rows.hidden[part.rows], weight[part.columns].t(), out=logits)
        else:
            torch.addmm(bias[part.columns], rows.hidden[part.rows], weight[part.columns].t(), out=logits)
        yield part, logits


class HeadGradients:
    """The gradients of hidden, weight and bias, from the logits' part by part. Those not wanted are empty."""

    def __init__(self, rows: HeadRows, weight: Tensor, wanted: Wanted, parts: list[Part]):
        self._rows, self._weight, self._wanted = rows, weight, wanted
        # What one part gives as a whole is its product; what several add to is kept in float32.
        self._sums_hidden = len({part.columns.start for part in parts}) > 1
        self._sums_weight = len({part.rows.start for part in parts}) != 1
        hidden, (want_hidden, want_weight, want_bias) = rows.hidden, wanted
        wide = compute_dtype(hidden)
        dtype = wide if self._sums_hidden else hidden_grad_dtype(hidden)
        self._dhidden = hidden.new_empty(hidden.shape if want_hidden else 0, dtype=dtype)
        if self._sums_hidden:
            self._dhidden.zero_()
        self._dweight = weight.new_empty(
            weight.shape if want_weight else 0, dtype=wide if self._sums_weight else weight.dtype
        )
        if self._sums_weight:
            self._dweight.zero_()
        self._dbias = weight.new_zeros(weight.shape[0] if want_bias else 0, dtype=exact_dtype(hidden))

    def add(self, part: Part, dlogits: Tensor) -> None:
        """One part's share; overwrites what dlogits has for rows of zeros."""
        want_hidden, want_weight, want_bias = self._wanted
        # Infinite weights make NaN of rows of zeros.
        dlogits[max(self._rows.num_kept - part.rows.start, 0) :] = 0.0
        if want_hidden and self._sums_hidden:
            _add_product(self._dhidden[part.rows], dlogits, self._weight[part.columns])
        elif want_hidden:
            _product(dlogits, self._weight, self._dhidden[part.rows])
        if want_weight and self._sums_weight:
            _add_product(self._dweight[part.columns], dlogits.t(), self._rows.hidden[part.rows])
        elif want_weight:
            torch.mm(dlogits.t(), self._rows.hidden, out=self._dweight[part.columns])
        if want_bias:
            self._dbias[part.columns] += dlogits.sum(0, dtype=compute_dtype(dlogits))

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dhidden of all rows in `hidden_grad_dtype`, dweight in the weight's dtype, dbias in `exact_dtype`."""
        dhidden = self._dhidden.to(hidden_grad_dtype(self._rows.hidden))
        return (
            self._rows.put_back(dhidden) if self._wanted[0] else dhidden,
            self._dweight.to(self._weight.dtype),
            self._dbias,
        )


def empty_gradients(hidden: Tensor, weight: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients' shapes, in their inputs' dtypes, for fake tensors. Those not wanted are empty."""
    want_hidden, want_weight, want_bias = wanted
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


def rounded(gradients: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients in their inputs' dtype."""
    dhidden, dweight, dbias = (gradient.to(dtype) for gradient in gradients)
    return dhidden, dweight, dbias


def softmax_step(vocabulary: int, copies: int) -> int:
    """Rows of which so many float32 copies fit the softmax's working set on the CPU."""
    return max(1, SOFTMAX_BYTES // (4 * max(vocabulary, 1) * copies))


def head_workspace_bytes(
    split: Split, hidden: Tensor, weight: Tensor, copies: int, want_hidden: bool, want_weight: bool
) -> int:
    """The most that an op holds at once beside its arguments and results, if some rows are left out.

    `copies` is how many float32 copies of a few rows of logits the softmax takes. Rows without a label at the end of
    each sequence are left out where a model shifts its labels.
    """
    itemsize, width, wide = hidden.element_size(), hidden.shape[1], compute_dtype(hidden).itemsize
    num_rows = -(-hidden.shape[0] // ROW_MULTIPLE) * ROW_MULTIPLE
    parts = split(num_rows, weight.shape[0], itemsize, hidden.device)
    part_rows, part_columns = _most_rows_and_columns(parts)
    sums_hidden, sums_weight = part_columns < weight.shape[0], part_rows < num_rows
    gradient = (wide if sums_hidden else hidden_grad_dtype(hidden).itemsize) if want_hidden else 0
    held = part_rows * aligned_width(part_columns) * itemsize + num_rows * (
        aligned_width(width) * itemsize + width * gradient
    )
    scratch = copies * min(part_rows, softmax_step(part_columns, copies)) * part_columns * wide
    if not want_weight or not sums_weight or wide == itemsize:
        return held + scratch
    # The weight's gradient is summed in float32; its result comes when the softmax is done.
    return held + weight.numel() * wide + max(0, scratch - weight.numel() * itemsize)


def exact_dtype(hidden: Tensor) -> torch.dtype:
    """Of a row's loss, and of sums of few numbers over rows: no luck in the last digit where the device has float64."""
    return torch.float64 if hidden.device.type in ("cpu", "cuda") else compute_dtype(hidden)


def _has_wide_products(device: torch.device) -> bool:
    """Whether matrix products of two-byte numbers can have a float32 result."""
    return device.type == "cuda" and torch.version.hip is None


def hidden_grad_dtype(hidden: Tensor) -> torch.dtype:
    """What the gradient is kept in until backward scales and rounds it."""
    return compute_dtype(hidden) if _has_wide_products(hidden.device) else hidden.dtype


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b. cuBLAS may add up a long sum's parts in two bytes; not where the result has four."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. Where total is wider than a and b: as cuBLAS does it, without rounding; else in blocks of rows.

    No product of total's size is held on the CPU.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    if _has_wide_products(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    step = SUM_BLOCK if total.device.type == "cpu" else total.shape[0]
    for start in range(0, total.shape[0], step):
        total[start : start + step] += a[start : start + step] @ b
