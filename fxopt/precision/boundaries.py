"""Casts in the eager model, where a module computes in another dtype than its parameters or its neighbours have.

A module that owns parameters computes in one dtype. Where that is not the dtype of the activations between modules, the
module is an island: its inputs are cast on the way in and its outputs on the way out. Where it is not the dtype that a
parameter is stored in, the module's forward sees a cast of the parameter, under the parameter's name, and gradients
arrive at the parameter in its own dtype. Outside the forward nothing changes: `module.weight` is the parameter, and
state-dict keys, tied weights and classes are what they were.

Both are forward hooks: they copy and pickle with the module, and Dynamo traces them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.precision.policy import Cast, Precision
from fxopt.precision.roles import called


@dataclass(frozen=True)
class Boundary:
    """What the hooks of one module do.

    inputs, outputs: the dtype that floating-point inputs and outputs are cast to, or None.
    compute: the dtype in which the module computes.
    lent: the parameters that are seen in `compute` while a forward runs, each with the way to round.
    looks_up: an embedding: its own forward reads the table as it is and casts the rows that it has looked up. Another
        module that reads the table sees the cast.
    """

    inputs: torch.dtype | None
    outputs: torch.dtype | None
    compute: torch.dtype
    lent: tuple[tuple[str, Cast], ...] = ()
    looks_up: bool = False

    @property
    def rounds_outputs_stochastically(self) -> bool:
        return self.looks_up and any(cast == "stochastic" for _, cast in self.lent)


def place_boundaries(model: nn.Module, precisions: Mapping[nn.Parameter, Precision], stream: torch.dtype) -> None:
    """Hooks the modules of `model` that need it; those of an earlier call are removed first.

    precisions: of the parameters that the policy covers. Modules with none of them are left alone.
    stream: the dtype of the activations between modules.
    """
    remove_boundaries(model)
    heads = called(model.modules(), "get_output_embeddings")
    embeddings = called(model.modules(), "get_input_embeddings")
    inside_islands: set[nn.Module] = set()
    lenders: dict[nn.Module, tuple[str, ...]] = {}
    for module in model.modules():  # parents first
        owned = [(leaf, p) for leaf, p in module._parameters.items() if p is not None and p in precisions]
        if not owned:
            continue
        compute = _compute_dtype([(p, precisions[p]) for _, p in owned])
        lent = tuple((leaf, precisions[p].cast) for leaf, p in owned if p.dtype != compute)
        if lent:
            lenders[module] = tuple(leaf for leaf, _ in lent)
        is_island = compute != stream
        # Not a table of positions with a forward of its own, whose rows nobody knows; it is small, and cast whole.
        is_table = type(module).forward is nn.Embedding.forward
        looks_up = module not in heads and (module in embeddings or is_table)
        # Logits may stay as wide as they are, and what the whole model returns is no activation.
        casts_outputs = looks_up or (is_island and module not in heads and module is not model)
        inputs, outputs = None if looks_up else compute, stream if casts_outputs else None
        if lent or is_island or module in inside_islands:
            _hook(module, Boundary(inputs, outputs, compute, lent, looks_up))
        if is_island:
            inside_islands.update(module.modules())
    for reader, names in _readers(model, lenders):
        _remember(reader, _fxopt_lenders=names)
        _keep(
            reader,
            reader.register_forward_pre_hook(_open_lenders),
            reader.register_forward_hook(_close_lenders, always_call=True, prepend=True),
        )


def remove_boundaries(model: nn.Module) -> None:
    """Takes the hooks of `place_boundaries` out."""
    for module in model.modules():
        for handle in module.__dict__.pop("_fxopt_handles", ()):
            handle.remove()
        for attribute in ("_fxopt_boundary", "_fxopt_readers", "_fxopt_own", "_fxopt_lenders"):
            module.__dict__.pop(attribute, None)


def has_boundaries(model: nn.Module) -> bool:
    """Whether `place_boundaries` has hooked a module of `model`."""
    return any("_fxopt_handles" in vars(module) for module in model.modules())


def _compute_dtype(owned: list[tuple[nn.Parameter, Precision]]) -> torch.dtype:
    """The dtype in which a module computes: that of most of its numbers. A float32 bias follows a bfloat16 weight."""
    numbers: dict[torch.dtype, int] = {}
    for parameter, precision in owned:
        numbers[precision.activation] = numbers.get(precision.activation, 0) + parameter.numel()
    return max(numbers, key=lambda dtype: numbers[dtype])


def _hook(module: nn.Module, boundary: Boundary) -> None:
    _remember(module, _fxopt_boundary=boundary, _fxopt_readers=0, _fxopt_own={})
    # Always called: a forward that fails, or that checkpointing stops early, gives its parameters back as well.
    _keep(
        module,
        module.register_forward_pre_hook(_enter, with_kwargs=True),
        # Earlier hooks see the parameters.
        module.register_forward_hook(_leave, with_kwargs=True, always_call=True, prepend=True),
    )


def _remember(module: nn.Module, **attributes: object) -> None:
    module.__dict__.update(attributes)


def _keep(module: nn.Module, *handles: Any) -> None:
    module.__dict__.setdefault("_fxopt_handles", []).extend(handles)


# The hooks -----------------------------------------------------------------------------------------------------------


def _enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    boundary: Boundary = module._fxopt_boundary
    if not boundary.looks_up:
        _lend(module)
    if boundary.inputs is None:
        return args, kwargs
    return _cast_all(args, boundary.inputs), _cast_all(kwargs, boundary.inputs)


def _leave(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    boundary: Boundary = module._fxopt_boundary
    if not boundary.looks_up:
        _take_back(module)
    if boundary.outputs is None:
        return output
    if boundary.rounds_outputs_stochastically and isinstance(output, Tensor):
        noise = new_noise(output) if module.training else _still_noise_of_rows(output, (*args, *kwargs.values()))
        return cast_stochastically(output, boundary.outputs, noise)
    return _cast_all(output, boundary.outputs)


def _open_lenders(module: Any, args: tuple[Any, ...]) -> None:
    for name in module._fxopt_lenders:
        _lend(module.get_submodule(name))


def _close_lenders(module: Any, args: tuple[Any, ...], output: Any) -> None:
    for name in module._fxopt_lenders:
        _take_back(module.get_submodule(name))


def _lend(module: Any) -> None:
    """Casts take the parameters' places. As attributes, the Dynamo of torch 2.11 could not take them away again."""
    if module._fxopt_readers == 0:
        boundary: Boundary = module._fxopt_boundary
        for leaf, cast in boundary.lent:
            parameter = module._parameters[leaf]
            if parameter is None:
                continue
            if cast == "stochastic":
                noise = new_noise(parameter) if module.training else still_noise(parameter.shape, parameter.device)
                lent = cast_stochastically(parameter, boundary.compute, noise)
            else:
                lent = parameter.to(boundary.compute)
            module._fxopt_own[leaf] = parameter
            module._parameters[leaf] = lent
    module._fxopt_readers += 1


def _take_back(module: Any) -> None:
    # Not below zero, where another pre-hook failed before ours ran.
    module._fxopt_readers = max(module._fxopt_readers - 1, 0)
    if module._fxopt_readers == 0:
        module._parameters.update(module._fxopt_own)
        module._fxopt_own.clear()


def _cast_all(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `dtype`, inside tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    if type(value) in (tuple, list):
        return type(value)(_cast_all(part, dtype) for part in value)
    if type(value) is dict:
        return {key: _cast_all(part, dtype) for key, part in value.items()}
    return value


def cast_stochastically(value: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """float32 (...) → bfloat16 (...), rounded up or down so that it is right on average; the gradient passes through.

    noise: int32, even in [0, 2¹⁶), broadcast to `value`. Other dtypes are cast as `Tensor.to` does.
    Source: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551.
    """
    if value.dtype != torch.float32 or dtype != torch.bfloat16:
        return value.to(dtype)
    exact = value.detach()  # not under no_grad, which in a graph would keep rules from what lies around it
    rounded = ((exact.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    if not (value.requires_grad and torch.is_grad_enabled()):
        # Infinities, and a NaN that arithmetic makes, have no bits that noise could carry from.
        return rounded.to(dtype)
    correction = torch.where(exact.isfinite(), rounded - exact, 0.0)
    # Exact: both lie on float32's grid, less than a step of bfloat16 apart.
    return (value + correction).to(dtype)


def new_noise(value: Tensor) -> Tensor:
    """Noise for a training forward: int32 (...) as `value`, from torch's generator.

    As dropout's it follows `torch.manual_seed`, is drawn again in a checkpoint's second forward, and continues where a
    trainer restores the random state.
    """
    return torch.randint_like(value, 1 << 16, dtype=torch.int32)


def still_noise(shape: torch.Size, device: torch.device) -> Tensor:
    """Noise for evaluation: int32 `shape`, the same at each call, spread evenly over every part of a matrix.

    Rounding to the nearest would hide what float32 weights have learned until it passes half a step of bfloat16.
    Source: the additive recurrence R₂ of Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018:
    the fractions of row · 0.7549 + column · 0.5698, in units of 2⁻¹⁶.
    """
    num_columns = shape[-1] if shape else 1
    return _noise_of_rows(torch.arange(shape[:-1].numel(), device=device), num_columns).view(shape)


def _still_noise_of_rows(output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """`still_noise` of the rows of a table that were looked up: as its matrix is rounded where it is the head's too."""
    for rows in inputs:
        is_index = isinstance(rows, Tensor) and not rows.is_floating_point() and rows.shape == output.shape[:-1]
        if is_index:
            return _noise_of_rows(rows, output.shape[-1])
    return still_noise(output.shape, output.device)  # of a lookup that works its indices out itself


def _noise_of_rows(rows: Tensor, num_columns: int) -> Tensor:
    """(...) → int32 (..., num_columns). Half a step at the origin: a single number is rounded to the nearest."""
    columns = torch.arange(num_columns, dtype=torch.int32, device=rows.device) * 37345 + (1 << 15)
    return (rows.to(torch.int32).unsqueeze(-1) * 49472 + columns) & ((1 << 16) - 1)


# Who reads the parameters of another module --------------------------------------------------------------------------


def _readers(model: nn.Module, lenders: Mapping[nn.Module, tuple[str, ...]]) -> Iterator[tuple[nn.Module, list[str]]]:
    """Modules whose code may read a lent parameter of a module below (`self.dt_proj.weight @ x`), with its name.

    They see the cast as well while their forward runs. A module counts as a reader if the code of its forward has both
    names in it, the child's and the parameter's.
    """
    words_of: dict[type[nn.Module], set[str]] = {}
    found: dict[nn.Module, list[str]] = {}
    for reader in model.modules():
        if type(reader) not in words_of:
            words_of[type(reader)] = _words(type(reader))
        words = words_of[type(reader)]
        for name, module in _called_directly(reader):
            if module in lenders and name.partition(".")[0] in words and words.intersection(lenders[module]):
                found.setdefault(reader, []).append(name)
    yield from found.items()


def _called_directly(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children, and the children of those that are mere containers."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_directly(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _words(kind: type[nn.Module]) -> set[str]:
    """The names that the code of a class's forward uses, and that of its methods which it calls."""
    words: set[str] = set()
    pending, seen = {"forward"}, set()
    while pending:
        seen.add(name := pending.pop())
        function = inspect.unwrap(getattr(kind, name, None) or kind)
        if isinstance(function, FunctionType) and function.__module__ != nn.Module.__module__:
            names = set(_names(function.__code__))
            words |= names
            pending |= {name for name in names if name not in seen}
    return words


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
