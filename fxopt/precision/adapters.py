"""What fxopt asks and prepares of PEFT's adapters on a model's layers, told by names: PEFT is not imported."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.precision.parameter_storage import is_int8

_WARNED = "_fxopt_warned"


def warn_about_torchao_layers(model: nn.Module) -> None:
    """Warns, once for each layer that is met, where PEFT took its layers for torchao's weights on fxopt's int8.

    They train. But they cannot merge, and there are none for embeddings.
    """
    found = [layer for layer in model.modules() if type(layer).__name__ == "TorchaoLoraLinear" and _is_ours(layer)]
    if all(_WARNED in vars(layer) for layer in found):
        return
    for layer in found:
        layer.__dict__[_WARNED] = True
    warnings.warn(
        f"{len(found)} adapters are PEFT's layers for torchao's weights, which train but cannot merge. Its ordinary "
        "layers serve int8 weights: get_peft_model(model, fxopt.integrations.peft.adapter_config(LoraConfig(...)))",
        stacklevel=3,
    )


def _is_ours(layer: nn.Module) -> bool:
    weight = getattr(getattr(layer, "base_layer", None), "weight", None)
    if not is_int8(weight):
        return False
    from fxopt.precision.int8_weight import Int8Weight

    return isinstance(weight, Int8Weight)


def prepare_dora(model: nn.Module) -> None:
    """Lets Dynamo see through DoRA (`use_dora=True`) on plain and int8 weights, in place; again is harmless.

    PEFT's `dequantize_module_weight` asks for the name of the module of the weight's class, where Dynamo breaks the
    graph, but first whether the layer has a `W_q`, as HQQ's have: then it takes what `layer.dequantize()` returns. Both
    are given to the layers themselves. Of `W_q` PEFT asks nothing else but its device.
    """
    for adapter in model.modules():
        base = getattr(adapter, "base_layer", None)
        if not (getattr(adapter, "lora_magnitude_vector", None) and isinstance(base, nn.Module)):
            continue
        weight = base._parameters.get("weight")
        is_known = weight is not None and (type(weight) is nn.Parameter or is_int8(weight))
        if is_known and not hasattr(base, "W_q") and not hasattr(base, "dequantize"):
            base.__dict__.update(W_q=_Weight(base), dequantize=_Dequantize(base))


class _OfLayer:
    """An attribute of a layer's instance that refers to the layer, and copies and pickles with it."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfLayer:
        return type(self)(copy.deepcopy(self.layer, memo))

    def __reduce__(self) -> Any:
        return type(self), (self.layer,)


class _Weight(_OfLayer):
    """Stands for HQQ's `W_q`."""

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device  # type: ignore[return-value]


class _Dequantize(_OfLayer):
    """The layer's weight (N, D), as PEFT has it where nothing is quantized."""

    def __call__(self) -> Tensor:
        return self.layer.weight  # type: ignore[return-value]
