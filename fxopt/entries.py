"""The ways into a model: its own forward, and those of the Hugging Face models inside it.

A trainer may call the model, its backbone (TRL calls `model.base_model`), or the text model inside another. Each of
these modules gets a `forward` of its own, a method bound to it like any other, which asks the module's
`OptimizedForward`. That lies beside it as `_fxopt_entry`, and is found there whoever wraps, compiles, shards or
replaces the forward. A module that is called inside a call that is captured is part of that call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from fxopt.capture import Optimization, OptimizedForward, Settings, is_inside_captured_call
from fxopt.precision.instance_methods import ENTRY, is_optimized, original_forwards
from fxopt.training_call import LABELS


def enter(
    module: nn.Module, settings: Settings, replaced: Any, optimization: Optimization, name: str
) -> OptimizedForward:
    """Makes one way into a model: `module` gets its `OptimizedForward`, and the method that leads to it."""
    entry = OptimizedForward(module, settings, replaced, optimization, name)
    # In this order: while a module is unpickled, its attribute `forward` is looked up in what it has so far.
    module.__dict__.pop("forward", None)
    module.__dict__[ENTRY] = entry
    module.__dict__["forward"] = MethodType(_forward_for(entry), module)
    return entry


def optimize_entries(model: nn.Module, settings: Settings) -> None:
    """Makes all ways into `model`; those of an earlier call are undone first."""
    original_forwards(model)
    optimization = Optimization(type(model).__name__, settings)
    for name, module in model.named_modules():
        if module is model or _is_pretrained_model(module):
            enter(module, settings, module.__dict__.get("forward"), optimization, name)


def entry_of(module: nn.Module) -> OptimizedForward | None:
    entry = module.__dict__.get(ENTRY)
    return entry if isinstance(entry, OptimizedForward) else None


def entries_in(model: nn.Module) -> Iterator[tuple[str, OptimizedForward]]:
    """The ways into `model` or into what it wraps, by the names of their modules; outer ones first."""
    for name, module in model.named_modules():
        if (entry := entry_of(module)) is not None:
            yield name, entry


def find_entry(model: nn.Module) -> OptimizedForward | None:
    """The outermost way into the optimized model that `model` is or wraps.

    Raises ValueError where it wraps several.
    """
    if (own := entry_of(model)) is not None:
        return own
    outermost: dict[int, tuple[str, OptimizedForward]] = {}
    for name, entry in entries_in(model):
        outermost.setdefault(id(entry.optimization), (name, entry))
    if len(outermost) > 1:
        found = ", ".join(f"{name!r} ({entry.report.model})" for name, entry in outermost.values())
        raise ValueError(f"this {type(model).__name__} holds several optimized models: {found}; ask for one of them")
    return next((entry for _, entry in outermost.values()), None)


def replacement_of(entry: OptimizedForward) -> str:
    """Who has put another forward in the place of `entry`'s since, and whether that still leads to it; or ''."""
    forward = entry.model.__dict__.get("forward")
    if is_optimized(forward):
        return ""
    if forward is None:
        return "the class's own forward is back in its place"
    function = inspect.unwrap(forward, stop=is_optimized)
    innermost = getattr(function, "func", function)  # functools.partial, as accelerate's hooks are
    if is_optimized(innermost):
        outermost = getattr(forward, "func", forward)
        return f"wrapped by {_name_of(forward if is_optimized(outermost) else outermost)}"
    # The innermost that is not the class's own, which a replacement may name as what it wraps.
    own = _chain(type(entry.model).forward)
    foreign = [each for each in _chain(forward) if getattr(each, "__func__", each) not in own]
    return f"replaced by {_name_of((foreign or [innermost])[-1])}"


def _chain(function: Any) -> list[Any]:
    """A function, what it wraps, what that wraps, and so on."""
    found = [getattr(function, "func", function)]
    while (wrapped := getattr(found[-1], "__wrapped__", None)) is not None:
        found.append(wrapped)
    return found


def _name_of(function: Any) -> str:
    """The module and name of a function's code, not its own name, which is that of what it wraps."""
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if code is None:
        return f"a {type(function).__module__}.{type(function).__qualname__}"
    return f"{plain.__globals__.get('__name__', '?')}.{code.co_qualname}"


def _is_pretrained_model(module: nn.Module) -> bool:
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def _forward_for(entry: OptimizedForward) -> FunctionType:
    """The function behind the method that leads to `entry`, with the name and the signature of the original."""
    original, module = entry.original, entry.model
    function = getattr(original, "__func__", None)
    if function is not None and function is getattr(type(module), "forward", None):
        return _forward_of_class(function)
    forward: Any = _make_forward(_call_replaced)
    for name in functools.WRAPPER_ASSIGNMENTS:
        setattr(forward, name, getattr(original, name, getattr(forward, name)))
    bound = inspect.signature(original)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = bound.replace(parameters=[itself, *bound.parameters.values()])
    return forward


@functools.cache
def _forward_of_class(function: FunctionType) -> FunctionType:
    forward: Any = functools.update_wrapper(_make_forward(function), function)
    # accelerate's `unwrap_model` walks along `__wrapped__` to what it takes for the original.
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(function)
    return forward


def _make_forward(original: Callable[..., Any]) -> Any:
    """A function that stands for `original`, and knows no module: copies of a model share it."""

    def forward(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            is_seen = not torch.is_grad_enabled() and all(kwargs.get(name) is None for name in LABELS)
            if is_seen or _is_part_of_our_capture():
                return original(self, *args, **kwargs)
            return _call_under_another_compiler(self, args, kwargs)
        entry = self.__dict__.get(ENTRY)
        return original(self, *args, **kwargs) if entry is None else entry(*args, **kwargs)

    forward.fxopt_original = original  # type: ignore[attr-defined]
    return forward


def _call_replaced(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    entry = self.__dict__.get(ENTRY)
    return type(self).forward(self, *args, **kwargs) if entry is None else entry.replaced(*args, **kwargs)


# Asked while Dynamo traces, once: without a guard on the answer.
_is_part_of_our_capture = torch.compiler.assume_constant_result(is_inside_captured_call)


@torch.compiler.disable(
    reason="an optimized model runs fxopt's own graphs, also inside torch.compile: leave fullgraph=True off, compile "
    'these graphs further with fxopt.optimize(..., backend="inductor"), or use fxopt.restore(model)'
)
def _call_under_another_compiler(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    entry = entry_of(module)
    if entry is None:
        return type(module).forward(module, *args, **kwargs)
    entry.report.under_compiler += 1
    return entry(*args, **kwargs)
