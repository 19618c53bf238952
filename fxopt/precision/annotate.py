"""The policy applied to the eager model: storage moved in place, each parameter's `Precision` noted on it."""

import copy
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxopt.precision.policy import Policy, PolicyError, Precision, Rounding, resolve
from fxopt.precision.roles import parameter_roles

# What can be stored in another of these without a scale. An fp8 weight is quantized: its scale lies elsewhere.
_CONVERTIBLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def annotate(model: nn.Module, policy: str | Policy) -> nn.Module:
    """Applies `policy` to `model` in place and returns it: storage in the policy's dtype, nothing else changed.

    Parameter objects stay the same, so an optimizer made before keeps working, and tied weights stay tied. Quantized
    parameters (tensor subclasses, integer and fp8 dtypes) are left alone. What is not a weight gets the dtype that
    transformers' `from_pretrained(dtype=...)` gives it: rotary frequencies stay float32 (`model.to(torch.bfloat16)`
    rounds them, which moves every position), and so does what the model's author keeps in float32. `config.dtype`
    follows. The policy is noted in `model._fxopt_policy`, which copies and pickles with the model, and each
    parameter's precision in `parameter.fxopt_precision`.

    Raises PolicyError (unknown policy, a parameter without data: on `meta` or lazy), before anything is changed.
    """
    policy = resolve(policy)
    _require_data(model)
    author = _author_dtypes(model, policy.default.storage)
    precisions = _precisions(model, policy, author)
    moved: dict[tuple[object, ...], Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in precisions:
            _store(parameter, precisions[name].storage, moved)
            parameter.fxopt_precision = precisions[name]  # type: ignore[attr-defined]
    rounded: list[str] = []
    for name, buffer, persistent in _named_buffers(model):
        if not _is_plain(buffer):
            continue
        is_frequency = not persistent and "freq" in name.rpartition(".")[2]
        dtype = author.get(name, torch.float32 if is_frequency else policy.default.storage)
        if is_frequency and buffer.dtype.itemsize < dtype.itemsize:
            rounded.append(name)
        _store(buffer, dtype, moved)
    if rounded:
        warnings.warn(
            "rotary frequencies were rounded to 16 bits before (by model.to()?), which moves every position: "
            f"{', '.join(rounded)}; load the model with from_pretrained(dtype=...) instead",
            stacklevel=2,
        )
    for module in model.modules():
        _set_config_dtype(module, policy.default.storage)
    model._fxopt_policy = policy  # type: ignore[assignment]
    return model


def policy_of(model: nn.Module) -> Policy | None:
    """The policy that `annotate` applied to `model`, or None."""
    policy = getattr(model, "_fxopt_policy", None)
    return policy if isinstance(policy, Policy) else None


def parameter_precisions(model: nn.Module) -> dict[str, Precision]:
    """The precision of each plain floating-point parameter, by its name in `model.named_parameters()`.

    Where nothing was annotated, storage decides: a bfloat16 parameter is rounded stochastically. A parameter whose
    dtype was changed after `annotate` counts as what it is now.
    """
    policy = policy_of(model)
    found: dict[str, Precision] = {}
    for name, parameter in model.named_parameters():
        if not _is_plain(parameter):
            continue
        # A deep copy of a model keeps its attributes, but not those of its parameters.
        noted = getattr(parameter, "fxopt_precision", policy.default if policy is not None else None)
        if isinstance(noted, Precision) and noted.storage == parameter.dtype:
            found[name] = noted
        elif parameter.dtype in (torch.bfloat16, torch.float32):
            rounding: Rounding = "stochastic" if parameter.dtype == torch.bfloat16 else "nearest"
            found[name] = Precision(parameter.dtype, parameter.dtype, rounding, torch.float32)
    return found


def _precisions(model: nn.Module, policy: Policy, author: dict[str, torch.dtype]) -> dict[str, Precision]:
    roles = parameter_roles(model)
    return {
        name: policy.precision(name, roles[name], kept_in=author.get(name))
        for name, parameter in model.named_parameters()
        if _is_plain(parameter)
    }


def _is_plain(tensor: Tensor) -> bool:
    """Floating-point values and nothing else; not quantized. Sharded (DTensor) counts as plain."""
    quantized = hasattr(type(tensor), "__tensor_flatten__") and not hasattr(tensor, "to_local")
    return tensor.dtype in _CONVERTIBLE and not quantized


def _require_data(model: nn.Module) -> None:
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise PolicyError(f"{kind} {name!r} is lazy and has no shape yet: run the model once, then annotate it")
            if tensor.device.type == "meta":
                raise PolicyError(
                    f"{kind} {name!r} is on the meta device and holds no values: load the model's weights first "
                    "(from_pretrained without device_map='meta' or offloading)"
                )


def _store(tensor: Tensor, dtype: torch.dtype, moved: dict[tuple[object, ...], Tensor]) -> None:
    """Changes the dtype of a parameter or buffer in place; two that share memory go on sharing it."""
    if tensor.dtype == dtype:
        return
    data = tensor.data
    place = (data.device, data.data_ptr(), data.dtype, tuple(data.shape), data.stride(), dtype)
    if hasattr(data, "to_local") or data.numel() == 0:
        converted = data.to(dtype)
    else:
        converted = moved.get(place)  # type: ignore[assignment]
        if converted is None:
            converted = moved[place] = data.to(dtype)
    gradient, tensor.grad = tensor.grad, None
    tensor.data = converted
    if gradient is not None:
        tensor.grad = gradient.to(dtype)


def _named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, buffer, whether it is in the state dict)"""
    for module_name, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                name = f"{module_name}.{leaf}" if module_name else leaf
                yield name, buffer, leaf not in module._non_persistent_buffers_set


def _author_dtypes(model: nn.Module, storage: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype, by name, that each parameter and buffer gets when transformers loads the model in `storage`.

    Asked of transformers itself: the model's class is built once more, on the meta device. Empty for float32, and for
    models that are not transformers'.
    """
    found: dict[str, torch.dtype] = {}
    if storage == torch.float32:
        return found
    roots: list[str] = []
    for prefix, module in model.named_modules():
        build = getattr(type(module), "_from_config", None)
        if build is None or any(prefix.startswith(root) for root in roots):
            continue
        root = f"{prefix}." if prefix else ""
        roots.append(root)
        try:
            # Building a model may draw random numbers; the caller's generator stays where it was.
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                loaded = build(copy.deepcopy(module.config), dtype=storage)
            found.update((root + name, tensor.dtype) for name, tensor in loaded.named_parameters())
            found.update((root + name, tensor.dtype) for name, tensor in loaded.named_buffers())
        except Exception as error:  # any modelling file runs here
            warnings.warn(
                f"{type(module).__name__} cannot be built on the meta device ({type(error).__name__}: {error}): what "
                "its author keeps in float32 is known from its _keep_in_fp32_modules_strict alone",
                stacklevel=3,
            )
        # from_pretrained searches these patterns in the names of what it loads; `*` stands for anything.
        if strict := getattr(module, "_keep_in_fp32_modules_strict", None):
            pattern = re.compile("|".join(sorted(strict)).replace("*", ".*"))
            loadable = [*module.named_parameters(), *((n, b) for n, b, saved in _named_buffers(module) if saved)]
            found.update((root + name, torch.float32) for name, _ in loadable if pattern.search(name))
    return found


def _set_config_dtype(module: nn.Module, storage: torch.dtype) -> None:
    """As transformers' from_pretrained does: the config of the model and of its parts."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "sub_configs"):  # not a transformers config
        return
    config.dtype = storage
    for part in config.sub_configs:
        if (sub_config := getattr(config, part, None)) is not None:
            sub_config.dtype = storage
