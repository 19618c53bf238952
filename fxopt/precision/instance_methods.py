"""Methods that one model has its own of: saving, resizing, moving where it is annotated, `forward` if it is optimized.

They are attributes of the model's instance, which copy and pickle with it; no class is patched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.precision.parameter_storage import is_int8
from fxopt.precision.saved_files import POLICY_FILE


class _Method:
    """Stands for a method of the model's class."""

    def __init__(self, model: nn.Module):
        # While a model is unpickled this runs before the model has any attribute.
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Method:
        for parameter in self.model.parameters():  # which have been copied, without their attributes
            if (copied := memo.get(id(parameter))) is not None and hasattr(parameter, "fxopt_precision"):
                copied.fxopt_precision = parameter.fxopt_precision
        return type(self)(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> Any:
        return type(self), (self.model,)


class SavePretrained(_Method):
    """transformers' `save_pretrained`, and the policy's file.

    Int8 weights are written as plain tensors in the dtype that they show: a checkpoint that everybody can load.
    (`torch.save(model.state_dict())` keeps int8.)
    """

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        original: Any = type(self.model).save_pretrained  # type: ignore[attr-defined]
        call = inspect.signature(original).bind(self.model, save_directory, *args, **kwargs)
        state: dict[str, Any] | None = call.arguments.get("state_dict") or kwargs.get("state_dict")
        if any(is_int8(value) for value in (state or dict(self.model.named_parameters())).values()):
            kwargs["state_dict"] = plain_state_dict(state or self.model.state_dict())
        policy = getattr(self.model, "_fxopt_policy", None)
        if policy is None or not call.arguments.get("is_main_process", True):
            return original(self.model, save_directory, *args, **kwargs)

        def save_policy_and_upload(folder: Any, *args: Any, **kwargs: Any) -> Any:
            policy.save(Path(folder) / POLICY_FILE)
            return type(self.model)._upload_modified_files(self.model, folder, *args, **kwargs)  # type: ignore[attr-defined]

        # With push_to_hub=True the folder, or one in it, is uploaded by a method of its own before this one returns.
        self.model.__dict__["_upload_modified_files"] = save_policy_and_upload
        try:
            result = original(self.model, save_directory, *args, **kwargs)
        finally:
            self.model.__dict__.pop("_upload_modified_files", None)
        policy.save(Path(save_directory) / POLICY_FILE)
        return result


class ResizeTokenEmbeddings(_Method):
    """transformers' `resize_token_embeddings`, which may build a new output head: the policy is applied to it too.

    Gradients that are there go on, with zeros for new tokens. Where transformers raises, the policy holds as before.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fxopt.precision.annotate import annotate

        model: Any = self.model
        ends = [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
        int8 = [weight for weight in dict.fromkeys(ends) if is_int8(weight)]
        if int8:
            from fxopt.precision.quantized import dequantize_parameter

            for parameter in int8:
                dequantize_parameter(model, parameter, parameter.dtype)
        before = {parameter: (name, parameter.shape) for name, parameter in model.named_parameters()}
        gradients: dict[str, Tensor] = {}
        for parameter, (name, _) in before.items():
            if parameter.grad is not None:
                gradients[name], parameter.grad = parameter.grad, None
        try:
            result = type(model).resize_token_embeddings(model, *args, **kwargs)
        finally:
            for parameter, (_, shape) in before.items():
                if parameter.shape != shape:
                    _renew_accumulator(parameter)
            annotate(model, model._fxopt_policy, emulate=bool(model._fxopt_emulate))
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter.grad = _resized(gradients[name], parameter)
        return result


def _renew_accumulator(parameter: Tensor) -> None:
    """Lets the next graph that reaches `parameter` ask its shape anew.

    torch knows the shape of a parameter's gradient from the node that accumulates it, and keeps the node while a graph
    leads there: that of a loss which somebody holds, or of a call whose frame is garbage that Dynamo has left, and not
    collected yet. Another shape in `.data` leaves the node as it is; another dtype makes a new one.
    """
    data = parameter.data
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data


def _resized(gradient: Tensor, parameter: Tensor) -> Tensor:
    """`gradient`, with the elements that `parameter` still has; new ones are 0."""
    dtype = parameter.grad_dtype or gradient.dtype
    if gradient.shape == parameter.shape:
        return gradient.to(dtype)
    kept = tuple(slice(min(sizes)) for sizes in zip(gradient.shape, parameter.shape, strict=True))
    resized = gradient.new_zeros(parameter.shape, dtype=dtype)
    resized[kept] = gradient[kept].to(dtype)
    return resized


class Apply(_Method):
    """torch's `_apply`, behind `model.to` and `model.cuda`, without int8 weights, which are converted here.

    torch swaps every tensor that is made of others for what became of it, even if that is itself, which fails where
    something refers to it weakly, as Dynamo's guards do.
    """

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        from fxopt.precision.quantized import become

        places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for module in self.model.modules() if recurse else (self.model,):
            for leaf, parameter in module._parameters.items():
                if parameter is not None and is_int8(parameter):
                    places.append((module, leaf, parameter))
        for parameter in dict.fromkeys(parameter for _, _, parameter in places):
            with torch.no_grad():
                converted = fn(parameter)
            if converted is not parameter:
                become(self.model, parameter, converted)
        kept = [(module, leaf, module._parameters[leaf]) for module, leaf, _ in places]
        try:
            for module, leaf, _ in kept:
                module._parameters[leaf] = None
            return type(self.model)._apply(self.model, fn, recurse)
        finally:
            for module, leaf, now in kept:
                module._parameters[leaf] = now


def give_methods(model: nn.Module) -> None:
    """Gives an annotated model those of the methods that its class has, and that it needs."""
    for name, method in (("save_pretrained", SavePretrained), ("resize_token_embeddings", ResizeTokenEmbeddings)):
        if hasattr(type(model), name):
            model.__dict__[name] = method(model)
    if any(is_int8(parameter) for parameter in model.parameters()):
        from fxopt.precision.quantized import keep_int8

        model.__dict__["_apply"] = Apply(model)
        keep_int8(model)


def plain_state_dict(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with plain tensors for int8 weights; what is shared stays shared."""
    from fxopt.precision.int8_weight import dequantized

    widened: dict[int, Tensor] = {}
    plain = dict(state)
    for name, value in state.items():
        if is_int8(value):
            memory: int = value.data.int_data.untyped_storage()._cdata
            if memory not in widened:
                widened[memory] = dequantized(value, value.dtype)
            plain[name] = widened[memory]
    return plain


# Where a module that fxopt.optimize has prepared holds what its forward asks (`fxopt/entries.py`).
ENTRY = "_fxopt_entry"


def is_optimized(forward: Any) -> bool:
    """Whether `forward` is the method that fxopt.optimize gave a module."""
    return hasattr(getattr(forward, "__func__", forward), "fxopt_original")


def original_forwards(model: nn.Module) -> nn.Module:
    """`model`, and every module in it, with the forward that `fxopt.optimize` found, in place.

    Who has replaced it since stays. A policy is about the eager model, which no compiler delays.
    """
    for module in model.modules():
        entry = module.__dict__.pop(ENTRY, None)
        if entry is not None and is_optimized(module.__dict__.get("forward")):
            del module.__dict__["forward"]
            if entry.replaced is not None:
                module.__dict__["forward"] = entry.replaced
    return model
