"""torchao's quantized training on a model's own modules and parameters: int8 weights, int8 and float8 products.

int8 weights: `torchao.prototype.quantized_training.Int8QuantizedTrainingLinearWeight`, rows of int8 with a scale each.
It shows the dtype of its scales, its gradient is a plain tensor, what is written to it is rounded stochastically.
Products: torchao's `int8_mixed_precision_training(module_swap=True)` and `convert_to_float8_training`.

torchao knows `F.linear` with an int8 weight and contiguous factors. Added here, in torchao's own table: any strides;
`F.embedding`, which gathers int8 rows and their scales; and other matrix products (GPT-2's `addmm`, Mamba's
`weight @ x`), for which the weight is widened.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight as Int8Weight
from torchao.prototype.quantized_training import int8_mixed_precision_training
from torchao.prototype.quantized_training.int8 import _Int8WeightOnlyLinear
from torchao.quantization import quantize_

from fxopt.precision.policy import FLOAT8, PolicyError

# So that torch.load, which accepts what it knows, gives back a state dict with int8 weights bit by bit.
torch.serialization.add_safe_globals([Int8Weight])


# Weights -------------------------------------------------------------------------------------------------------------


def quantize_parameter(model: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Stores a matrix (N, D) of `model` as int8 with a scale for each row; operations see it in `dtype`.

    In place: the object stays the same, so weights stay tied and an optimizer keeps it. Only where the compiler holds
    on to the object, another takes its place throughout `model`, with a warning. Returns the parameter.
    """
    return become(model, parameter, quantized(parameter.detach().to(dtype)))


def dequantize_parameter(model: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Stores an int8 weight as a plain (N, D) of `dtype` again, in place as `quantize_parameter` does."""
    return become(model, parameter, dequantized(parameter, dtype))


def quantized(values: Tensor) -> Any:
    """An int8 weight of `values` (N, D), rounded to the nearest by torchao; its scales have the dtype of `values`.

    A row that int8 can hold exactly is held exactly. So is what was int8 before, and came here by way of a checkpoint.
    """
    weight: Any = Int8Weight.from_float(values)
    if isinstance(values, FakeTensor):  # without values to look at
        return weight
    scale = _exact_scales(values)
    is_exact = scale > 0
    if is_exact.any():
        codes = (values[is_exact].float() / scale[is_exact, None].float()).round()
        weight.int_data[is_exact] = codes.to(torch.int8)
        weight.scale[is_exact] = scale[is_exact]
    return weight


def _exact_scales(values: Tensor) -> Tensor:
    """The scale (N,) of each row of `values` (N, D) whose values are all `dequantized` from int8 with it; 0 if none is.

    The largest of a row of int8 is 96 to 127 scales (`fxopt.precision.parameter_storage` keeps it there), and a scale
    a number of 8 significant bits, or of float32's 24: few enough to try. A few columns rule nearly all of them out.
    """
    scales = values.new_zeros(values.shape[0])
    if values.numel() == 0:
        return scales
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    largest = values.abs().amax(1)
    few = values[:, :: max(1, values.shape[1] // 8)][:, :8]
    for code in range(127, 95, -1):
        nearest = (largest.float() / code).to(values.dtype)
        for step in (-1, 0, 1):  # the largest value is itself rounded
            scale = (nearest.view(bits) + step).view(values.dtype)
            fits = (scales == 0) & (largest > 0) & ((largest.float() / scale.float()).round() <= 127)
            is_candidate = (_multiples(few, scale) == few).all(1) & fits
            rows = is_candidate.nonzero().squeeze(1)
            rows = rows[(_multiples(values[rows], scale[rows]) == values[rows]).all(1)]
            scales[rows] = scale[rows]
    return scales


def _multiples(values: Tensor, scale: Tensor) -> Tensor:
    """The multiples of `scale` (N,) next to `values` (N, D), rounded to their dtype."""
    scale = scale.float().unsqueeze(1)
    return ((values.float() / scale).round() * scale).to(values.dtype)


def keep_int8(model: nn.Module) -> None:
    """`model.load_state_dict` then quantizes plain tensors for int8 weights as `quantized` does.

    torchao would round them stochastically, on a scale of its own.
    """
    hooks: Iterable[Any] = model._load_state_dict_pre_hooks.values()
    if not any(hook.hook is _quantize_loaded for hook in hooks):
        model.register_load_state_dict_pre_hook(_quantize_loaded)


def _quantize_loaded(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        loaded = state_dict.get(prefix + name)
        is_int8 = isinstance(parameter, Int8Weight) and not isinstance(loaded, Int8Weight)
        if is_int8 and torch.is_tensor(loaded) and loaded.shape == parameter.shape:
            state_dict[prefix + name] = quantized(loaded.detach().to(parameter.dtype))


def dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain tensor (N, D) of the values that an int8 weight has, rounded once to `dtype`."""
    held: Any = weight.data
    return (held.int_data.float() * held.scale.float().unsqueeze(1)).to(dtype)


def become(model: nn.Module, parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Gives a parameter of `model` another content, int8 or plain, as `quantize_parameter` says."""
    gradient, parameter.grad = parameter.grad, None
    new = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
    new.__dict__.update({n: noted for n, noted in vars(parameter).items() if n not in ("int_data", "scale")})
    try:
        torch.utils.swap_tensors(parameter, new)
        new = parameter
    except RuntimeError:  # Dynamo's guards refer to it weakly
        for module in model.modules():
            for leaf, owned in module._parameters.items():
                if owned is parameter:
                    module._parameters[leaf] = new
        warnings.warn(
            "weights of a model that was compiled became other objects when they changed to or from int8: an optimizer "
            "made before holds the old ones, make it anew",
            stacklevel=5,
        )
    if gradient is not None:
        new.grad = gradient.to(new.device, new.dtype)
    return new


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


class _Linear(_Int8WeightOnlyLinear):  # type: ignore[misc]
    """torchao's product (…, D) x (N, D) → (…, N), for an input and a gradient of any strides."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # torchao views it as a matrix, which fails for what was transposed (Mamba's scan).
        return _Int8WeightOnlyLinear.backward(ctx, gradients[0].contiguous())


@Int8Weight.implements_torch_function(F.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _linear(*args, **kwargs)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    return cast(Tensor, _Linear.apply(input.contiguous(), weight, bias))


@Int8Weight.implements(torch.ops.aten.clamp_.default)
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


@Int8Weight.implements(torch.ops.aten.is_pinned.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return bool(args[0].int_data.is_pinned())  # torch.distributed.checkpoint asks


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
    *(getattr(owner, name) for owner in (Tensor, torch) for name in ("t", "transpose", "permute", "clamp")),
]


@Int8Weight.implements_torch_function([*_PRODUCTS, *_BEFORE_PRODUCTS])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return func(*(widened(arg) if isinstance(arg, Int8Weight) else arg for arg in args), **kwargs)


@Int8Weight.implements_torch_function([Tensor.view, Tensor.reshape])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    shape = args[1:] if len(args) > 2 else args[-1]
    if isinstance(shape, Sequence) and len(shape) > 2:  # groups of rows, as DeepSeek-V4 takes them
        return func(widened(args[0]), *args[1:], **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)  # FSDP's: torchao gives back the matrix as it is


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


# What torchao's two kinds of linear layers hold beside what nn.Linear does.
_SETTINGS = ("config", "linear_mm_config", "scaling_type_input", "scaling_type_weight", "scaling_type_grad_output")
_MARK = "_fxopt_product"

# Products ------------------------------------------------------------------------------------------------------------


def can_swap(module: nn.Module) -> bool:
    """Whether torchao's quantized products know this module: `nn.Linear` itself, whose forward is known."""
    return type(module) is nn.Linear


def swap_product(module: nn.Linear, compute: torch.dtype, *, emulate: bool = False) -> None:
    """Makes a linear layer multiply in int8 or float8_e4m3fn, in place: the same object, parameters and hooks.

    emulate: compute float8 products in wider arithmetic, for hardware without float8.
    """
    if compute == FLOAT8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        swapped: nn.Module = convert_to_float8_training(module, config=Float8LinearConfig(emulate=emulate))
        # torchao returns a new module around the same parameters; its settings are what is new.
        module.__dict__.update({name: value for name, value in vars(swapped).items() if name not in vars(module)})
        module.__class__ = type(swapped)  # type: ignore[assignment]
    else:
        quantize_(module, int8_mixed_precision_training(module_swap=True))
    module.__dict__[_MARK] = True


def restore_products(model: nn.Module) -> None:
    """Undoes `swap_product` in all of `model`, in place."""
    for module in model.modules():
        if is_swapped(module):
            for name in (*_SETTINGS, _MARK):
                module.__dict__.pop(name, None)
            module.__class__ = nn.Linear


def is_swapped(module: nn.Module) -> bool:
    """Whether `swap_product` made it what it is. A torchao layer of the user's own is not ours to change."""
    return _MARK in module.__dict__


def has_float8(device: torch.device) -> bool:
    """Whether it multiplies float8 matrices: any AMD GPU that torch runs on, NVIDIA's of capability 8.9 or later."""
    return device.type == "cuda" and (bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 9))


def require_float8(devices: Iterable[torch.device]) -> None:
    """Raises PolicyError where a device has no float8 products."""
    for device in devices:
        if has_float8(device):
            continue
        raise PolicyError(
            f"{device} has no float8 products (they need a GPU of compute capability 8.9 or later): use the policy "
            "'bf16-8bit', which holds the same bytes, or emulate=True to try float8's accuracy out, slowly"
        )
