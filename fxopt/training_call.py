"""A call of a forward: which ones are optimized, and in which form they are captured."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from itertools import chain, compress
from operator import itemgetter
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

Call = dict[str, Any]  # arguments by name

# What a forward may call its labels: transformers' name, and those of models in the manner of nanoGPT.
LABELS = ("labels", "targets", "target")
NOT_DIFFERENTIATED = "the call has no labels, and nothing is differentiated"
NOTHING_REQUIRES_GRAD = "the call has no labels, and nothing requires a gradient"
MAY_WANT_CACHE = "the call has no labels, and may be asked for its cache in evaluation"
EMPTY = "the batch is empty"
IN_TRANSFORM = "the call is inside a torch.func transform"
IN_MODE = "the call is inside a TorchDispatchMode or torch.export, which want to see the original's operations"
# What nobody is surprised by: no step of training, or somebody who looks at the original.
EXPECTED = (NOT_DIFFERENTIATED, NOTHING_REQUIRES_GRAD, MAY_WANT_CACHE, EMPTY, IN_TRANSFORM, IN_MODE)
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GET_HOOKS, _GET_MODULES = itemgetter(*_HOOKS), itemgetter("_modules")


def named_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Call) -> Call | None:
    """A call's arguments by name, or None where they have none. TypeError for what `signature` does not allow."""
    call = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
        elif parameter.kind is parameter.VAR_POSITIONAL and call.pop(name, ()):
            return None
    return call


def labels_of(call: Mapping[str, Any]) -> torch.Tensor | None:
    return next((call[name] for name in LABELS if isinstance(call.get(name), torch.Tensor)), None)


def why_not_covered(model: nn.Module, call: Call | None) -> str:
    """Why a call is neither differentiated nor asked for a loss, or wants more than graphs can give; or ''."""
    if call is None:
        return "the call's arguments have no names"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return IN_TRANSFORM
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_exporting():
        return IN_MODE
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__:
        # It counts what is saved, and ends its second forward by an error in the middle.
        return "the call is inside a checkpoint; checkpoint the model's layers instead: gradient_checkpointing_enable()"
    labels = labels_of(call)
    if labels is None:
        if not torch.is_grad_enabled():
            return NOT_DIFFERENTIATED
        tensors = [value for value in call.values() if isinstance(value, torch.Tensor)]
        if not any(tensor.requires_grad for tensor in chain(tensors, model.parameters())):
            return NOTHING_REQUIRES_GRAD
        if not model.training and call.get("use_cache") is None and would_cache(model):
            return MAY_WANT_CACHE
    if any(value.numel() == 0 for value in ([labels] if labels is not None else tensors[:1])):
        return EMPTY
    for name in ("use_cache", "output_hidden_states", "output_attentions"):
        if call.get(name):
            return f"the call asks for {name}"
    if call.get("past_key_values") is not None:
        return "the call continues a cache"
    config = getattr(model, "config", None)
    asks_for_tuple = call.get("return_dict", getattr(config, "return_dict", True)) is False
    if asks_for_tuple and call.get("use_cache") is None and would_cache(model):
        return "the call asks for a tuple, with a cache in it"
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name, False):
            return f"the model's config asks for {name}"
    return ""


def is_autocast() -> bool:
    """Whether autocast is on, on a CPU or on an accelerator."""
    return any(torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES)


def as_captured(model: nn.Module, signature: inspect.Signature, call: Call) -> Call:
    """The call in the form that needs the fewest graphs and builds no needless mask, with the result it had."""
    call = {name: value for name, value in call.items() if value is not None or not _means_none(signature, name)}
    if follows_transformers(model):
        _spare_the_mask(model, signature, call)
        if _takes(signature, "use_cache"):
            call["use_cache"] = False  # training has no use for a key-value cache, and building one breaks the graph
    if isinstance(call.get("num_items_in_batch"), int):
        call["num_items_in_batch"] = torch.tensor(call["num_items_in_batch"])  # a number would be a new graph each
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            call[name] = value.contiguous()  # strides that vary would be a new graph each
    mark_dynamic(call)
    return call


def mark_dynamic(call: Call) -> None:
    """Let Dynamo take batch and sequence for sizes that vary."""
    for value in call.values():
        if isinstance(value, torch.Tensor):
            for axis in range(min(value.ndim, 2)):
                if value.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(value, axis)


def follows_transformers(model: nn.Module) -> bool:
    """Whether transformers' conventions hold: what a mask of ones means, and that `**kwargs` take `use_cache`."""
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)


def _spare_the_mask(model: nn.Module, signature: inspect.Signature, call: Call) -> None:
    mask, packed = call.get("attention_mask"), "position_ids" in call
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not packed and _may_lack(signature, "attention_mask"):
        if bool(mask.all()):
            del call["attention_mask"]  # as eager transformers does with a mask that masks nothing
    elif mask is None and packed and "use_cache" not in call and would_cache(model):
        # With a cache, transformers takes a row for one sequence; without one, it looks for several in `position_ids`.
        tokens = call.get("input_ids", call.get("inputs_embeds"))
        if isinstance(tokens, torch.Tensor):
            call["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)


def kind_of(model: nn.Module, call: Call, hooks: Hashable) -> Hashable:
    """What calls have in common that can share their graphs: everything that Dynamo would capture anew for.

    `hooks`: which modules have any. Dynamo does not look at hooks again once it has captured a module.
    """
    shapes = tuple(
        (name, tuple(size == 1 for size in value.shape[:2]) if isinstance(value, torch.Tensor) else None)
        for name, value in sorted(call.items())
    )
    autocast = tuple(torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES)
    modes = model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    process_wide = tuple(len(getattr(torch.nn.modules.module, f"_global{name}")) for name in _HOOKS)
    return shapes, autocast, modes, hooks, process_wide


class HookedModules:
    """Which modules inside a model have hooks, asked in each call: what a walk over the modules finds is kept.

    The model's own run outside of its forward, and are not what is captured.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._walk()

    def _walk(self) -> None:
        modules = list(self._model.modules())[1:]
        # `torch.jit.trace` makes modules that keep hooks or children elsewhere, and do not change their children.
        plain = [all(name in module.__dict__ for name in ("_modules", *_HOOKS)) for module in modules]
        self._attributes = [module.__dict__ for module in compress(modules, plain)]
        self._traced = [module for module, is_plain in zip(modules, plain, strict=True) if not is_plain]
        self._children = self._children_now()

    def _children_now(self) -> list[nn.Module | None]:
        own = list(self._model.children())
        return own + list(chain.from_iterable(map(dict.values, map(_GET_MODULES, self._attributes))))

    def __call__(self) -> tuple[tuple[int, int], ...]:
        """For each place that has hooks, its number in the order of the modules, and how many it has."""
        if self._children_now() != self._children:  # the same modules: they have no equality of their own
            self._walk()
        counts = list(map(len, chain.from_iterable(map(_GET_HOOKS, self._attributes))))
        counts += [len(getattr(module, name)) for module in self._traced for name in _HOOKS]
        return tuple((place, count) for place, count in enumerate(counts) if count) if any(counts) else ()


def _takes(signature: inspect.Signature, name: str) -> bool:
    return name in signature.parameters or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _means_none(signature: inspect.Signature, name: str) -> bool:
    """Whether leaving an argument out is the same as giving None."""
    parameter = signature.parameters.get(name)
    return parameter is None or parameter.default is None


def _may_lack(signature: inspect.Signature, name: str) -> bool:
    parameter = signature.parameters.get(name)
    return parameter is None or parameter.default is not parameter.empty


def would_cache(model: nn.Module) -> bool:
    new, old = "is_activation_checkpointing", "is_gradient_checkpointing"  # renamed in transformers; the old one warns
    name = new if hasattr(model, new) else old
    checkpointing = model.training and getattr(model, name, False)
    return bool(getattr(getattr(model, "config", None), "use_cache", False)) and not checkpointing
