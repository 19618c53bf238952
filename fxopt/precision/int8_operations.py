"""What models, adapters and their users do to an int8 weight: the tables of `Int8Weight`, and nobody else's.

torchao knows `F.linear` with contiguous factors and some twenty operations. Here: any strides; no gradient and no
kept input for a frozen weight; `F.embedding`, which gathers int8 rows and their scales; and three rules for the rest.
torchao's own weights, which may stand beside these, are read and copied from as these are.

Reading: an operation that is not known gets the weight's values, widened for as long as it runs. What it returns, and
so a row, a column or a transpose, is a plain tensor with memory of its own: to write to a part, assign to it
(`weight[3] = row`). Slices of whole rows are int8 and share memory.

Writing in place (`add_`, `mul_`, `index_copy_`, `weight[i] = x`, `out=`): computed in float32 on the values, and stored
by `fxopt.precision.int8_weight.store`. What is trained is rounded stochastically, so that no update is lost; a frozen
parameter, which is only written to because somebody merges an adapter or loads values, to the nearest. So is what
`.data`, `detach` and `clone` take from it.

Taking another content (`copy_`, `weight.data = x`): as writing. The weight stays int8.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight as AnyInt8Weight

from fxopt.precision.int8_weight import Int8Weight, dequantized, fill, store, wide_dtype

aten = torch.ops.aten

# Reading it as models do ---------------------------------------------------------------------------------------------


class _Lookup(torch.autograd.Function):
    """Rows of an int8 weight (V, D) by their indices (...) → (..., D), in the dtype of the scales."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Any, padding_idx: int, scale_by_frequency: bool) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.num_rows, ctx.padding_idx, ctx.scale_by_frequency = weight.shape[0], padding_idx, scale_by_frequency
        return F.embedding(indices, weight.int_data) * F.embedding(indices, weight.scale.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (indices,) = ctx.saved_tensors
        table = torch.ops.aten.embedding_dense_backward(
            gradients[0], indices, ctx.num_rows, ctx.padding_idx, ctx.scale_by_frequency
        )
        return None, table, None, None


class _Widen(torch.autograd.Function):
    """An int8 weight as a plain tensor; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        return weight.dequantize()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def widened(weight: Tensor) -> Tensor:
    """A plain tensor (N, D) of an int8 weight's values, in the dtype of its scales. Its gradient is the weight's."""
    return cast(Tensor, _Widen.apply(weight))


class _Linear(torch.autograd.Function):
    """torchao's product (…, D) x (N, D) → (…, N), for an input and a gradient of any strides.

    torchao's own keeps the input and computes the weight's gradient (N, D) also where nobody wants it.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        out = (input @ weight.int_data.T.to(input.dtype)) * weight.scale
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        input, weight = ctx.saved_tensors
        upstream = gradients[0].contiguous()  # what was transposed (Mamba's scan) is no matrix otherwise
        rows = upstream.view(-1, weight.shape[0])
        for_input, for_weight, for_bias = ctx.needs_input_grad
        return (
            (upstream * weight.scale) @ weight.int_data.to(upstream.dtype) if for_input else None,
            rows.T @ input.reshape(-1, weight.shape[1]) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


@Int8Weight.implements_torch_function(F.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _linear(*args, **kwargs)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, AnyInt8Weight):
        return F.linear(widened(input), weight, bias)
    return cast(Tensor, _Linear.apply(input, weight, bias))


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or sparse:
        raise NotImplementedError("an int8 embedding has neither max_norm nor sparse gradients: store it in bfloat16")
    padding_idx = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Lookup.apply(input, weight, padding_idx, scale_grad_by_freq)


@Int8Weight.implements_torch_function(F.embedding)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _embedding(*args, **kwargs)


_PRODUCTS = [torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.addmm]
# What else a model does with its weight before it multiplies: Falcon turns it, Gemma-3n clips it.
_BEFORE_PRODUCTS: list[Any] = [
    *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
    *(
        getattr(owner, name)
        for owner in (Tensor, torch)
        for name in ("t", "transpose", "permute", "clamp", "dequantize")
    ),
]


@Int8Weight.implements_torch_function([*_PRODUCTS, *_BEFORE_PRODUCTS])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return func(*(widened(arg) if isinstance(arg, AnyInt8Weight) else arg for arg in args), **kwargs)


@Int8Weight.implements_torch_function(
    [Tensor.view, *(getattr(owner, name) for owner in (Tensor, torch) for name in ("reshape", "flatten", "ravel"))]
)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    shape = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
    if (func is Tensor.view and tuple(shape) == (-1,)) or _is_shape_of(args[0], shape):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)  # FSDP's, or the matrix as it is
    return func(widened(args[0]), *args[1:], **kwargs)


@Int8Weight.implements_torch_function([Tensor.tolist, Tensor.numpy])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return func(widened(args[0]), *args[1:], **kwargs)


@Int8Weight.implements_torch_function(Tensor.__getitem__)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    weight, index = args
    parts = index if isinstance(index, tuple) else (index,)
    if all(isinstance(part, slice) for part in parts):
        with torch._C.DisableTorchFunctionSubclass():
            return func(weight, index)
    if isinstance(parts[0], int):  # one row, such as the padding token's: the whole table need not be widened
        row = range(weight.shape[0])[parts[0]]
        return widened(weight[row : row + 1])[(0, *parts[1:])]
    return func(widened(weight), index)


# Everything else -----------------------------------------------------------------------------------------------------


def by_rule(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What is in no table, by the rules above. Raises NotImplementedError for what has no values to read or write."""
    if func.namespace != "aten" or torch.Tag.inplace_view in func.tags or func in _TAKES_MEMORY:
        raise NotImplementedError(
            f"{func} cannot be done to an int8 weight {tuple(args[0].shape) if args else ''}: store this parameter in "
            "bfloat16, with Selector(name=..., storage=torch.bfloat16) in the policy, or do it to `weight.dequantize()`"
        )
    written = list(_written(func, args, kwargs))
    if written:
        return _write(func, written, args, kwargs)
    return _read(func, args, kwargs)


_TAKES_MEMORY = {
    aten.set_.source_Tensor,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.default,
    aten.resize_.default,
    aten.resize_as_.default,
}


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The int8 weights among the arguments that an operation writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, AnyInt8Weight))


def _write(func: Any, written: Sequence[Any], args: Any, kwargs: Any) -> Any:
    wide = {id(weight): dequantized(weight, wide_dtype(weight)) for weight in written}

    def as_values(value: Any) -> Any:
        if isinstance(value, AnyInt8Weight):
            return wide[id(value)] if id(value) in wide else dequantized(value, wide_dtype(value))
        is_narrow = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4
        return value.float() if is_narrow else value

    result = func(*tree_map(as_values, args), **tree_map(as_values, kwargs))
    for weight in written:
        store(weight, wide[id(weight)], stochastic=_is_trained(weight))
    weights = {id(wide[id(weight)]): weight for weight in written}
    return tree_map(lambda value: weights.get(id(value), value), result)


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """With the values that the weights show; exact ones beside a float32 tensor, to which they would be promoted."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    wide = functools.reduce(torch.promote_types, (x.dtype for x in leaves if x.dim() > 0), torch.bfloat16)

    def as_values(value: Any) -> Any:
        if not isinstance(value, AnyInt8Weight):
            return value
        return value.dequantize() if wide.itemsize <= value.dtype.itemsize else dequantized(value, wide)

    return func(*tree_map(as_values, args), **tree_map(as_values, kwargs))


_OF_FROZEN = "_fxopt_of_frozen"


def _is_trained(weight: Any) -> bool:
    """Not a frozen parameter, nor what was taken from one by `.data`, `detach` or `clone`."""
    return weight.requires_grad if isinstance(weight, nn.Parameter) else not getattr(weight, _OF_FROZEN, False)


@Int8Weight.implements([aten.detach.default, aten.clone.default, aten.alias.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return _as_taken_from(args[0], _of_both(func, args, kwargs))


def _of_both(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on whole rows, done to the codes and to the scales of `args[0]`."""
    weight, *rest = args
    out = Int8Weight(func(weight.int_data, *rest, **kwargs), func(weight.scale, *rest, **kwargs))
    return return_and_correct_aliasing(func, args, kwargs, out)


def _as_taken_from(weight: Any, part: Any) -> Any:
    if not _is_trained(weight):
        setattr(part, _OF_FROZEN, True)
    return part


@Int8Weight.implements(
    [
        getattr(getattr(torch.ops, namespace), name).default
        for namespace in ("c10d_functional", "_c10d_functional")
        for name in ("all_gather_into_tensor", "wait_tensor")
    ]
)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return _of_both(func, args, kwargs)


@Int8Weight.implements([aten.slice.Tensor, aten.split.Tensor, aten.cat.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Whole rows stay int8; columns, and rows beside others that are not int8, are values."""
    place = 2 if func is aten.split.Tensor else 1
    dim = args[place] if len(args) > place else kwargs.get("dim", 0)
    parts = args[0] if func is aten.cat.default else args[:1]
    if dim not in (0, -2) or not all(isinstance(part, AnyInt8Weight) for part in parts):
        return _read(func, args, kwargs)
    args = (*args[:place], 0, *args[place + 1 :])
    kwargs = {name: value for name, value in kwargs.items() if name != "dim"}
    if func is aten.cat.default:
        return Int8Weight(*(func([getattr(part, held) for part in parts], 0) for held in ("int_data", "scale")))
    if func is aten.slice.Tensor:
        return _as_taken_from(args[0], _of_both(func, args, kwargs))
    codes, scales = (func(held, *args[1:], **kwargs) for held in (args[0].int_data, args[0].scale))
    return [_as_taken_from(args[0], Int8Weight(*part)) for part in zip(codes, scales, strict=True)]


@Int8Weight.implements(aten._to_copy.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """The scales' dtype is the one that is shown."""
    weight, dtype, device = args[0], kwargs.get("dtype"), kwargs.get("device")
    if not (dtype or weight.dtype).is_floating_point:
        return _read(func, args, kwargs)
    out = Int8Weight(weight.int_data.to(device=device), weight.scale.to(device=device, dtype=dtype))
    return return_and_correct_aliasing(func, args, kwargs, out)


@Int8Weight.implements(aten.new_zeros.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """A matrix is int8, as FSDP2 wants it to pad a rank's rows."""
    weight, size = args[:2]
    device, dtype = kwargs.get("device") or weight.device, kwargs.get("dtype") or weight.dtype
    if len(size) != 2:
        return torch.zeros(size, device=device, dtype=dtype)
    return Int8Weight(
        torch.zeros(size, device=device, dtype=torch.int8), torch.zeros(size[:1], device=device, dtype=dtype)
    )


@Int8Weight.implements([aten.view.default, aten.as_strided.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What FSDP2 asks for, `view(-1)` and `as_strided`, is the matrix as it is, as torchao has it."""
    if func is aten.as_strided.default or list(args[1]) == [-1] or _is_shape_of(args[0], args[1]):
        out = Int8Weight(args[0].int_data, args[0].scale)
        return return_and_correct_aliasing(func, args, kwargs, out)
    return _read(func, args, kwargs)


def _is_shape_of(weight: Tensor, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and all(size in (-1, own) for size, own in zip(shape, weight.shape, strict=True))


@Int8Weight.implements(aten.copy_.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if not isinstance(target, AnyInt8Weight):
        target.copy_(source.dequantize(), *args[2:], **kwargs)
    elif isinstance(source, AnyInt8Weight):
        target.int_data.copy_(source.int_data, *args[2:], **kwargs)
        target.scale.copy_(source.scale, *args[2:], **kwargs)
    else:
        fill(target, source, stochastic=_is_trained(target))
    return target


@Int8Weight.implements([aten.sub.Tensor, aten.mul.Tensor])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return _read(func, args, kwargs)


@Int8Weight.implements([aten.add_.Tensor, aten.addcdiv_.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """On the row's own scale; torchao takes a new one each time, and so draws codes anew whose values did not move."""
    written = list(_written(func, args, kwargs))
    return _write(func, written, args, kwargs) if written else _read(func, args, kwargs)


@Int8Weight.implements_torch_function(Tensor.__setitem__)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> None:
    target, index, value = args
    if not isinstance(target, AnyInt8Weight):
        func(target, index, widened(value))
        return
    if torch.is_grad_enabled() and target.requires_grad:
        raise RuntimeError("an int8 weight that requires grad is written to: do it under torch.no_grad()")
    values = dequantized(target, wide_dtype(target))
    if isinstance(value, Tensor):
        value = dequantized(value, values.dtype) if isinstance(value, AnyInt8Weight) else value.to(values.dtype)
    values[index] = value
    store(target, values, stochastic=_is_trained(target))


@Int8Weight.implements_torch_function(cast(Any, Tensor).data.__set__)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> None:
    """`weight.data = values`, as PEFT merges DoRA: the int8 weight stays one, with these values."""
    weight, value = args
    if isinstance(weight, Int8Weight) and isinstance(value, AnyInt8Weight):
        value = Int8Weight(value.int_data, value.scale)
    if not isinstance(weight, Int8Weight) or isinstance(value, Int8Weight):
        with torch._C.DisableTorchFunctionSubclass():
            func(weight, value)
        if isinstance(weight, Int8Weight):
            weight.int_data, weight.scale = value.int_data, value.scale
        return
    if value.shape != weight.shape:
        raise RuntimeError(f"an int8 weight {tuple(weight.shape)} cannot take data of the shape {tuple(value.shape)}")
    with torch.no_grad():
        fill(weight, value, stochastic=_is_trained(weight))


@Int8Weight.implements(aten.clamp_.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """To what int8 has within the limits, row by row: Gemma-3n clips weights in its forward."""
    weight = args[0]
    least, most = [*args[1:], None, None][:2]
    scale = weight.scale.float().unsqueeze(1)
    for bound, towards_zero, clamp in ((least, torch.ceil, torch.maximum), (most, torch.floor, torch.minimum)):
        if bound is not None:
            limit = torch.where(scale > 0, towards_zero(bound / scale).clamp(-128, 127), 0).to(torch.int8)
            weight.int_data.copy_(clamp(weight.int_data, limit))
    return weight


@Int8Weight.implements(aten.is_pinned.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return bool(args[0].int_data.is_pinned())  # torch.distributed.checkpoint asks
