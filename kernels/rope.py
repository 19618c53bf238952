"""Rotary position embedding:  y = x * cos + rotated * sin,  where a pair (x₁, x₂) of elements gives rotated (-x₂, x₁).

    y₁ = x₁ * cos₁ - x₂ * sin₁,   y₂ = x₂ * cos₂ + x₁ * sin₂

Source: Su et al., "RoFormer", arXiv:2104.09864; transformers `apply_rotary_pos_emb`. A pair, by layout:
    halves            j and j + D/2 (Llama)
    pairs             2j and 2j + 1 (GPT-J, Cohere; the complex numbers of Llama 4)
    pairs_to_halves   2j and 2j + 1 in x, j and j + D/2 in y (`apply_rotary_pos_emb_interleave` of DeepSeek-V3)
Shapes: x (B, H, S, D) of any strides, cos and sin broadcastable to x with last dimension D or D/2 -> (B, H, S, D), in
x's dtype and, where x is dense, with x's strides (queries and keys usually come as a transposed (B, S, H, D)).
Tables of width D are in the order of y, and the two entries of a pair may differ; tables of width D/2 hold one entry
for each pair (GPT-OSS; the real and the imaginary part of a complex table; the half that DeepSeek-V3 slices off).
Rounds once, from float32 (float64 for float64 inputs). But for halves with tables of x's dtype the CPU calculates in
x's dtype, and rounds once less than eager code.
Gradient:
    dx₁ = dy₁ * cos₁ + dy₂ * sin₂,   dx₂ = dy₂ * cos₂ - dy₁ * sin₁,   dcos = Σ dy * x,   dsin = Σ dy * rotated
Bytes that must move: forward reads x and writes y, backward reads dy and writes dx; all heads share cos and sin.
Saved: cos and sin; x only if cos or sin need a gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxopt.kernels.backend import (
    BLOCK_BYTES,
    TRITON_DEVICES,
    cdiv,
    compute_dtype,
    next_power_of_2,
    tl,
    triton,
    triton_dtype,
)
from fxopt.kernels.launch import launch
from fxopt.kernels.op import op

LAYOUTS = ("halves", "pairs", "pairs_to_halves")


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "halves") -> Tensor:
    """The specification, in plain PyTorch."""
    if layout == "pairs_to_halves":
        x = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    if layout == "pairs":
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        rotated = torch.cat((-second, first), -1)
    if cos.shape[-1] < x.shape[-1]:
        cos, sin = (t.repeat_interleave(2, -1) if layout == "pairs" else torch.cat((t, t), -1) for t in (cos, sin))
    return (x * cos + rotated * sin).to(x.dtype)


@triton.jit
def _load_row(row, inside, PAIRS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """The first and the second elements of all pairs: (ROWS, BLOCK) each."""
    if PAIRS:  # one load that is contiguous, and so in wide words; loads of every other element would be narrow
        cols = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(row + cols, mask=inside & (cols < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(both, (row.shape[0], BLOCK, 2)))
    else:
        cols = tl.arange(0, BLOCK)[None, :]
        first = tl.load(row + cols, mask=inside & (cols < HALF), other=0.0)
        second = tl.load(row + HALF + cols, mask=inside & (cols < HALF), other=0.0)
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def _load_table_row(
    row, inside,
    PAIRS: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    if WIDE:
        first, second = _load_row(row, inside, PAIRS, HALF, BLOCK, DTYPE)
    else:
        cols = tl.arange(0, BLOCK)[None, :]
        first = tl.load(row + cols, mask=inside & (cols < HALF), other=0.0).to(DTYPE)
        second = first
    return first, second


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, num_rows, H, S,
    x_stride_b, x_stride_h, x_stride_s, cos_stride_b, cos_stride_h, cos_stride_s,
    sin_stride_b, sin_stride_h, sin_stride_s, y_stride_b, y_stride_h, y_stride_s,
    BACKWARD: tl.constexpr, X_PAIRS: tl.constexpr, Y_PAIRS: tl.constexpr, TABLE_PAIRS: tl.constexpr,
    TABLE_WIDE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = rows < num_rows
    b, s, h = rows // (H * S), rows // H % S, rows % H  # heads fastest: neighbours share a row of cos and sin
    b, s, h = b.to(tl.int64), s.to(tl.int64), h.to(tl.int64)

    x = x_ptr + b * x_stride_b + h * x_stride_h + s * x_stride_s
    cos = cos_ptr + b * cos_stride_b + h * cos_stride_h + s * cos_stride_s
    sin = sin_ptr + b * sin_stride_b + h * sin_stride_h + s * sin_stride_s
    y = y_ptr + b * y_stride_b + h * y_stride_h + s * y_stride_s

    x_1, x_2 = _load_row(x, inside, X_PAIRS, HALF, BLOCK, DTYPE)
    cos_1, cos_2 = _load_table_row(cos, inside, TABLE_PAIRS, TABLE_WIDE, HALF, BLOCK, DTYPE)
    sin_1, sin_2 = _load_table_row(sin, inside, TABLE_PAIRS, TABLE_WIDE, HALF, BLOCK, DTYPE)
    if BACKWARD:
        sin_1, sin_2 = -sin_2, -sin_1  # the transposed rotation
    y_1 = (x_1 * cos_1 - x_2 * sin_1).to(y_ptr.dtype.element_ty)
    y_2 = (x_2 * cos_2 + x_1 * sin_2).to(y_ptr.dtype.element_ty)
    if Y_PAIRS:
        cols = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(y_1, y_2), (ROWS, 2 * BLOCK))
        tl.store(y + cols, both, mask=inside & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, BLOCK)[None, :]
        tl.store(y + cols, y_1, mask=inside & (cols < HALF))
        tl.store(y + HALF + cols, y_2, mask=inside & (cols < HALF))


def rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "halves") -> Tensor:
    """x * cos + rotated * sin, differentiable once in x, cos and sin.

    Args:
        x: (B, H, S, D), or with fewer axes before D, which is even; any floating dtype and any strides.
        cos: broadcastable to x, with last dimension D, in the order of the result, or D/2, one entry for each pair;
            (1, 1, S, D) or (B, 1, S, D) in transformers. Any floating dtype: float32 beside a bfloat16 x, for instance.
        sin: as cos, with the same last dimension.
        layout: "halves" rotates element j with j + D/2; "pairs" 2j with 2j + 1; "pairs_to_halves" reads pairs and
            writes halves.

    Returns:
        As x in shape and dtype, with x's strides where x is dense.

    Raises:
        ValueError: x has more than four dimensions or D is odd, cos or sin does not fit x, or the layout is another.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"rope: layout is {layout!r}; it must be one of {', '.join(map(repr, LAYOUTS))}")
    if not 1 <= x.dim() <= 4 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(f"rope: x has shape {tuple(x.shape)}; it must be (B, H, S, D), or less, with an even D > 0")
    D = x.shape[-1]
    for name, table in (("cos", cos), ("sin", sin)):
        fits = 1 <= table.dim() <= x.dim() and table.shape[-1] in (D, D // 2)
        leading = zip(reversed(table.shape[:-1]), reversed(x.shape[:-1]), strict=False)
        if not fits or not all(n in (1, m) for n, m in leading):
            raise ValueError(
                f"rope: {name} has shape {tuple(table.shape)}; it must broadcast to x, {tuple(x.shape)}, "
                "and have x's last dimension or half of it"
            )
    if cos.shape[-1] != sin.shape[-1]:
        raise ValueError(f"rope: cos has last dimension {cos.shape[-1]} and sin {sin.shape[-1]}; they must be equal")
    missing = (None,) * (4 - x.dim())
    if missing:
        return _rope(x[missing], cos, sin, layout).view(x.shape)
    return _rope(x, cos, sin, layout)


@op("rope")
def _rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return _rotate(x, cos, sin, layout, backward=False)


@_rope.register_kernel(TRITON_DEVICES)
def _rope_triton(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return _launch(x, cos, sin, layout, backward=False)


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return torch.empty_like(x)


@op("rope_backward")
def _rope_backward(dy: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return _rotate(dy, cos, sin, layout, backward=True)


@_rope_backward.register_kernel(TRITON_DEVICES)
def _rope_backward_triton(dy: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return _launch(dy, cos, sin, layout, backward=True)


@_rope_backward.register_fake
def _(dy: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return torch.empty_like(dy)


def _setup_context(ctx, inputs, output) -> None:
    x, cos, sin, ctx.layout = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, cos, sin)


def _backward(ctx, dy: Tensor):
    x, cos, sin = ctx.saved_tensors
    dx = _rope_backward(dy, cos, sin, ctx.layout) if ctx.needs_input_grad[0] else None
    dcos = dsin = None
    if any(ctx.needs_input_grad[1:3]):
        x_pairs, y_pairs = _orders(ctx.layout, backward=False)
        x_1, x_2 = _split(x, x_pairs)
        dy_1, dy_2 = _split(dy.to(compute_dtype(dy)), y_pairs)
        if ctx.needs_input_grad[1]:
            dcos = _table_gradient(dy_1 * x_1, dy_2 * x_2, cos, y_pairs)
        if ctx.needs_input_grad[2]:
            dsin = _table_gradient(-dy_1 * x_2, dy_2 * x_1, sin, y_pairs)
    return dx, dcos, dsin, None


_rope.register_autograd(_backward, setup_context=_setup_context)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, *, backward: bool) -> Tensor:
    """The rotation, or its gradient, on the CPU."""
    table_dtype = torch.promote_types(cos.dtype, sin.dtype)
    if layout == "halves" and torch.promote_types(table_dtype, x.dtype) == x.dtype:
        return _rotate_halves(x, cos, sin, backward)
    # All else by blocks in float32: bfloat16 is slower where PyTorch's loops are not vectorized, as over every other
    # element, and mixed dtypes would be widened as a whole.
    y = result = torch.empty_like(x)
    dtype = torch.promote_types(table_dtype, compute_dtype(x))
    wide, pairs, reorder = cos.shape[-1] == x.shape[-1], layout == "pairs", layout == "pairs_to_halves"
    cos, sin = cos.to(dtype), sin.to(dtype)
    if pairs and not wide:
        return _rotate_complex(x, torch.complex(cos, -sin if backward else sin))
    sin_1, sin_2 = _split(sin, pairs) if wide else (sin, sin)
    cos, sin = cos if wide else _join(cos, cos, pairs), _join(-sin_1, sin_2, pairs)
    x, y, cos, sin = _outermost_first(x, y, cos.expand(x.shape), sin.expand(x.shape))
    for block in _blocks(x):
        h = x[block].to(dtype)
        if backward:
            first, second = _split(h * sin[block], pairs)
            h = _join(second, first, pairs).addcmul_(h, cos[block])
            y[block] = _join(*_split(h, False), True) if reorder else h
        else:
            first, second = _split(h, pairs or reorder)
            h = _join(first, second, False) if reorder else h
            y[block] = _join(second, first, pairs).mul_(sin[block]).addcmul_(h, cos[block])
    return result


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    wide = cos.shape[-1] == x.shape[-1]
    y = torch.mul(x, cos if wide else _join(cos, cos, False), out=torch.empty_like(x))
    (x_1, x_2), (y_1, y_2) = _split(x, False), _split(y, False)
    sin_1, sin_2 = _split(sin, False) if wide else (sin, sin)
    if backward:
        y_1.addcmul_(x_2, sin_2)
        y_2.addcmul_(x_1, sin_1, value=-1)
    else:
        y_1.addcmul_(x_2, sin_1, value=-1)
        y_2.addcmul_(x_1, sin_2)
    return y


def _rotate_complex(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs as complex numbers: of all loops over pairs PyTorch vectorizes complex multiplication only."""
    y = result = torch.empty_like(x)
    x, y, rotation = _outermost_first(x, y, rotation.expand(*x.shape[:-1], -1))
    for block in _blocks(x):
        h = x[block].to(rotation.real.dtype, copy=True, memory_format=torch.contiguous_format)
        h = torch.view_as_complex(h.unflatten(-1, (-1, 2))).mul_(rotation[block])
        y[block] = torch.view_as_real(h).flatten(-2)
    return result


def _launch(x: Tensor, cos: Tensor, sin: Tensor, layout: str, *, backward: bool) -> Tensor:
    y = torch.empty_like(x)
    x_pairs, y_pairs = _orders(layout, backward)
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    out = y if y.stride(-1) == 1 else torch.empty_like(y, memory_format=torch.contiguous_format)
    width = cos.shape[-1]
    cos, sin = cos.expand(*x.shape[:-1], width), sin.expand(*x.shape[:-1], width)
    B, H, S, D = x.shape
    block = next_power_of_2(D // 2)
    rows = max(1, 1024 // block)
    if x.numel():
        launch(
            _rope_kernel, (cdiv(B * H * S, rows),),
            x, cos, sin, out, B * H * S, H, S,
            *x.stride()[:3], *cos.stride()[:3], *sin.stride()[:3], *out.stride()[:3],
            BACKWARD=backward, X_PAIRS=x_pairs, Y_PAIRS=y_pairs, TABLE_PAIRS=layout == "pairs",
            TABLE_WIDE=width == D, HALF=D // 2, ROWS=rows, BLOCK=block, DTYPE=triton_dtype(x),
        )  # fmt: skip
    return y if out is y else y.copy_(out)


def _orders(layout: str, backward: bool) -> tuple[bool, bool]:
    """Whether pairs lie side by side in what is read, and in what is written."""
    x_pairs, y_pairs = layout != "halves", layout == "pairs"
    return (y_pairs, x_pairs) if backward else (x_pairs, y_pairs)


def _split(x: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second elements of all pairs."""
    if pairs:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second


def _join(first: Tensor, second: Tensor, pairs: bool) -> Tensor:
    return torch.stack((first, second), -1).flatten(-2) if pairs else torch.cat((first, second), -1)


def _outermost_first(x: Tensor, *others: Tensor) -> list[Tensor]:
    """All with heads and positions changed over where x has positions outermost: loops then run along the memory."""
    change = x.stride(1) < x.stride(2)
    return [t.transpose(1, 2) if change else t for t in (x, *others)]


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the first two dimensions, each of which fits the cache in float32 if one row does."""
    row_bytes = max(1, 4 * x.shape[2] * x.shape[3])
    rows = max(1, BLOCK_BYTES // row_bytes)
    batches = max(1, rows // max(1, x.shape[1]))
    for b in range(0, x.shape[0], batches):
        for row in range(0, x.shape[1], rows):
            yield slice(b, b + batches), slice(row, row + rows)


def _table_gradient(first: Tensor, second: Tensor, table: Tensor, pairs: bool) -> Tensor:
    """The sum over all that used an entry of cos or sin, from what each element of a pair contributes."""
    if table.shape[-1] == first.shape[-1]:
        return (first + second).sum_to_size(table.shape).to(table.dtype)
    shape = (*table.shape[:-1], first.shape[-1])
    return _join(first.sum_to_size(shape), second.sum_to_size(shape), pairs).to(table.dtype)
