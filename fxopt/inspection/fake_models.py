"""Models on fake tensors: everything of a model but its numbers, and so without memory."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fxopt.inspection.configurations import builds_no_model, configuration_of, no_causal_lm
from fxopt.precision.annotate import annotate
from fxopt.precision.instance_methods import original_forwards
from fxopt.precision.policy import Policy


def source_of(
    model: nn.Module | PretrainedConfig | str | Path,
) -> tuple[PretrainedConfig | nn.Module, PretrainedConfig | None]:
    """What `fake_model` makes the like of, and its configuration, which a model from elsewhere may lack."""
    if isinstance(model, nn.Module):
        return model, getattr(model, "config", None)
    config = configuration_of(model)
    return config, config


def fake_model(source: PretrainedConfig | nn.Module, policy: str | Policy | None) -> tuple[Any, FakeTensorMode]:
    """A configuration's causal LM, or the like of a model, under `policy`, and the mode that its tensors live in.

    A model on the meta device will do. Raises what `fxopt.annotate` raises.
    """
    mode = FakeTensorMode()
    if isinstance(source, nn.Module):
        model: Any = original_forwards(_like(source, mode))
    else:
        model = _of_configuration(source, mode)
    with warnings.catch_warnings():
        # Of an optimizer that holds the weights: there is none.
        warnings.filterwarnings("ignore", message="weights of a model that was compiled became other objects")
        annotate(model, policy, emulate=True)  # what is not computed needs no hardware for it
    _cast_constants(model)
    return model, mode


def _cast_constants(model: nn.Module) -> None:
    """A fake scalar that was made of a number computes with it: in the dtype that a policy gave the scalar since."""
    for tensor in (*model.parameters(), *model.buffers()):
        constant = getattr(tensor, "constant", None)
        if constant is not None and constant.dtype != tensor.dtype:
            tensor.constant = constant.to(tensor.dtype)  # type: ignore[attr-defined]


def _of_configuration(config: PretrainedConfig, mode: FakeTensorMode) -> Any:
    """Raises UnknownModelError where transformers builds no causal LM of it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise no_causal_lm(config.model_type)

    def build() -> Any:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)

    with contextlib.suppress(Exception), mode:
        return build()
    try:
        with torch.device("meta"):  # some models' initialization looks at values, which it skips there
            model = build()
    except Exception as error:
        raise builds_no_model(config.model_type, error) from error
    return _like(model, mode)


def _like(model: nn.Module, mode: FakeTensorMode) -> Any:
    """A copy of `model` on fake tensors; of one on the meta device, too."""
    with FakeCopyMode(mode):
        copied = copy.deepcopy(model)
    with mode:
        _leave_the_meta_device(copied)
    return copied


def _leave_the_meta_device(model: nn.Module) -> None:
    moved: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in moved:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = moved[tensor]  # type: ignore[assignment]


def checkpoint_activations(model: nn.Module) -> None:
    """Let `model` compute activations again in the backward. Raises ValueError if it cannot."""
    name = "activation_checkpointing_enable"  # as transformers now calls it
    enable = getattr(model, name, None) or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(f"{type(model).__name__} has no activation checkpointing; leave checkpointing off")
    enable()


def labelled_batch(batch_size: int, sequence_length: int) -> dict[str, Any]:
    """A training call's arguments, on fake tensors where such a mode is on: tokens, and a label for each."""
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
    return {"input_ids": ids, "labels": torch.zeros_like(ids), "use_cache": False}
