"""torchao's quantized training on a model's own modules and parameters: int8 weights, int8 and float8 products.

int8 weights: `fxopt.precision.int8_weight.Int8Weight`, made from torchao's, rows of int8 with a scale each.
Products: torchao's `int8_mixed_precision_training(module_swap=True)` and `convert_to_float8_training`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchao.prototype.quantized_training import int8_mixed_precision_training
from torchao.quantization import quantize_

from fxopt.precision.int8_weight import dequantized, quantized
from fxopt.precision.parameter_storage import is_int8
from fxopt.precision.policy import FLOAT8, PolicyError

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
        if not torch.is_tensor(loaded) or is_int8(loaded):
            continue
        if is_int8(parameter) and loaded.shape == parameter.shape:
            state_dict[prefix + name] = quantized(loaded.detach().to(parameter.dtype))


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
