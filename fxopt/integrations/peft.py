"""PEFT on an int8 base: its ordinary LoRA layers, which train and merge there, and adapters that safetensors can hold.

    model = fxopt.optimize(model, "int8")
    model = get_peft_model(model, adapter_config(LoraConfig(...)))
    ...
    save_adapter(model, folder)
    model = PeftModel.from_pretrained(base, folder, config=adapter_config(LoraConfig.from_pretrained(folder)))

PEFT (0.21) by itself takes an int8 weight for one of torchao's, whose layers cannot merge and take an embedding for a
linear layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import dispatch_default
from torch import nn

from fxopt.precision.instance_methods import plain_state_dict
from fxopt.precision.int8_weight import Int8Weight
from fxopt.precision.parameter_storage import is_int8


class _HasInt8Weight(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, nn.Module) and isinstance(module._parameters.get("weight"), Int8Weight)


class Int8Layer(metaclass=_HasInt8Weight):
    """A layer of any class whose `weight` is fxopt's int8: what `isinstance` says. It has no instances of its own."""


def adapter_config(config: LoraConfig) -> LoraConfig:
    """`config`, changed in place and returned: layers with int8 weights then get PEFT's ordinary LoRA layers.

    All others get what PEFT takes for them. It is not saved with the configuration: call it again for what
    `LoraConfig.from_pretrained` returns.
    """
    # PEFT's own way to other layers, for this configuration alone. It asks these first, and as it asks its own.
    config._register_custom_module({Int8Layer: dispatch_default})  # type: ignore[dict-item]
    return config


def save_adapter(model: PeftModel, folder: str | Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)`, where what is saved may be int8 (`modules_to_save`, embeddings).

    Such a weight is written as a plain tensor in the dtype that it shows, which an int8 weight takes back bit by bit;
    safetensors cannot write it otherwise. Weights that are not saved are not widened. A trainer calls
    `save_pretrained` itself: with one, store what is in `modules_to_save` in bfloat16, by a Selector in the policy.
    """
    state: dict[str, Any] = options.get("state_dict") or model.state_dict()
    saved = {
        id(value)
        for adapter in options.get("selected_adapters") or model.peft_config
        for value in get_peft_model_state_dict(
            model,
            state_dict=state,
            adapter_name=adapter,
            save_embedding_layers=options.get("save_embedding_layers", "auto"),
        ).values()
    }
    int8 = {name: value for name, value in state.items() if id(value) in saved and is_int8(value)}
    if int8:  # PEFT does not check what it is given
        options["state_dict"] = {**state, **plain_state_dict(int8)}
    model.save_pretrained(str(folder), **options)
