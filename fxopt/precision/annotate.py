"""The policy applied to the eager model: storage in place, casts at boundaries, each parameter's `Precision` noted."""

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxopt.arguments import require_module
from fxopt.kernels.rounding import Rounding
from fxopt.precision.adapters import warn_about_torchao_layers
from fxopt.precision.boundaries import place_boundaries, remove_boundaries
from fxopt.precision.instance_methods import give_methods
from fxopt.precision.parameter_storage import is_int8, is_wrapper
from fxopt.precision.policy import (
    FLOAT8,
    MATMUL_DTYPES,
    Policy,
    PolicyError,
    Precision,
    Selector,
    dtype_name,
)
from fxopt.precision.presets import resolve
from fxopt.precision.roles import parameter_roles
from fxopt.precision.saved_files import saved_policy, take_up_saved_bits
from fxopt.precision.stepping import watch

# What can be stored in another of these without a scale. An fp8 weight is quantized: its scale lies elsewhere.
_CONVERTIBLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def annotate(model: nn.Module, policy: str | Policy | None = None, *, emulate: bool = False) -> nn.Module:
    """Applies `policy` to `model` in place and returns it: the eager model then stores and computes as it says.

    Parameter objects stay the same, so an optimizer made before keeps working, and tied weights stay tied (there is one
    exception, with a warning: to or from int8 after the model was compiled). Where a
    parameter is computed in another dtype than it is stored in, or a module in another than its neighbours, forward
    hooks cast (`fxopt.precision.boundaries`); torchao's layers multiply in int8 and float8. Annotating again, with the
    same or another policy, undoes all of it first. A model that was optimized is optimized anew by `fxopt.optimize`.

    Left alone: parameters that are quantized already (tensor subclasses, integer and fp8 dtypes), and what their
    author keeps in float32. A frozen parameter is never widened and never quantized, since nothing is gained, unless a
    selector by name or `trainable` says so. What is not a weight gets the dtype that transformers'
    `from_pretrained(dtype=...)` gives it: rotary frequencies stay float32 (`model.to(torch.bfloat16)` rounds them,
    which moves every position). `config.dtype` follows the default's storage.

    The policy is noted in `model._fxopt_policy`, which copies and pickles with the model, and each parameter's
    precision in `parameter.fxopt_precision`. Another optimizer's first step warns where it would lose updates that the
    policy keeps. `model.save_pretrained(folder)` then writes `fxopt_policy.json` beside its
    files, and plain tensors for int8 weights.

    policy: a preset's name, "auto", or a Policy. None: the one that the model has, or that lies in the folder that it
        was loaded from; else "bf16".
    emulate: compute float8 products in wider arithmetic where the hardware has no float8.

    Raises PolicyError (unknown policy, a selector that matches nothing or asks for what cannot work, a parameter
    without data: on `meta` or lazy, hardware without float8), TypeError (no module), before anything is changed.
    """
    require_module("annotate", model)
    policy = _policy_for(model, policy)
    _require_data(model)
    author = _author_dtypes(model, policy.default.compute)
    precisions = _precisions(model, policy, author)
    if FLOAT8 in {precision.compute for precision in precisions.values()} and not emulate:
        from fxopt.precision.quantized import require_float8

        require_float8({parameter.device for parameter in model.parameters()})
    if policy_of(model) is None:
        _take_up_islands(model, precisions)
    remove_boundaries(model)
    _set_products(model, precisions, emulate)
    moved: dict[tuple[object, ...], Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        if name in precisions:
            _apply(model, parameter, precisions[name], moved)
    _set_buffers(model, policy.default.storage, author, moved)
    for module in model.modules():
        _set_config_dtype(module, policy.default.storage)
    covered = {p: precisions[name] for name, p in model.named_parameters() if name in precisions}
    # What its author keeps in float32 is cast by the author's code.
    kept = {name for name in precisions if author.get(name) == torch.float32}
    for name, parameter in model.named_parameters():
        if name in kept and precisions[name].storage == torch.float32:
            del covered[parameter]
    place_boundaries(model, covered, policy.default.compute)
    model._fxopt_policy = policy  # type: ignore[assignment]
    model._fxopt_precisions = precisions  # type: ignore[assignment]
    model._fxopt_emulate = emulate  # type: ignore[assignment]
    give_methods(model)
    warn_about_torchao_layers(model)
    watch(model)
    return model


def policy_of(model: nn.Module) -> Policy | None:
    """The policy that `annotate` applied to `model`, or None."""
    policy = getattr(model, "_fxopt_policy", None)
    return policy if isinstance(policy, Policy) else None


def parameter_precisions(model: nn.Module) -> dict[str, Precision]:
    """The precision of each floating-point or int8 training parameter, by its name in `model.named_parameters()`.

    Where nothing was annotated, storage decides: a bfloat16 parameter is rounded stochastically. A parameter whose
    dtype was changed after `annotate` counts as what it is now.
    """
    of_model = getattr(model, "_fxopt_precisions", {})
    found: dict[str, Precision] = {}
    for name, parameter in model.named_parameters():
        if (precision := parameter_precision(parameter, of_model.get(name))) is not None:
            found[name] = precision
    return found


def parameter_precision(parameter: Tensor, known: Precision | None = None) -> Precision | None:
    """The precision of one parameter, as `parameter_precisions` has it; `known` where nothing is noted on it."""
    held = _held_in(parameter)
    noted = getattr(parameter, "fxopt_precision", known)
    if isinstance(noted, Precision) and noted.storage == held:
        return noted
    if held in (torch.bfloat16, torch.float32):
        rounding: Rounding = "stochastic" if held == torch.bfloat16 else "nearest"
        return Precision(held, held, held, rounding, "float32")
    return None


def _policy_for(model: nn.Module, policy: str | Policy | None) -> Policy:
    if policy is not None:
        return resolve(policy, model)
    return policy_of(model) or saved_policy(model) or Policy.named("bf16")


def _precisions(model: nn.Module, policy: Policy, author: dict[str, torch.dtype]) -> dict[str, Precision]:
    """What each parameter that the policy covers gets: what the policy says, as far as the parameter allows it."""
    roles = parameter_roles(model)
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    names: dict[nn.Parameter, list[str]] = {}
    for module_name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, leaf))
                names.setdefault(parameter, []).append(f"{module_name}.{leaf}" if module_name else leaf)
    policy.check_selectors(roles, [alias for aliases in names.values() for alias in aliases])
    annotated = policy_of(model) is not None
    precisions: dict[str, Precision] = {}
    unmet: dict[str, str] = {}
    wide: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        held = _held_in(parameter)
        if held is None or (held == torch.int8 and not annotated):  # quantized by somebody else
            continue
        trainable, aliases = parameter.requires_grad, names[parameter]
        precision = policy.precision(name, roles[name], trainable, author.get(name), aliases)
        if not trainable and not policy.asks_for_storage(aliases, trainable):
            if precision.storage == torch.int8 and held != torch.int8:
                wide[name] = parameter.numel()
            precision = _frozen(precision, held)
        if precision.storage == torch.int8 and (parameter.dim() != 2 or hasattr(parameter, "to_local")):
            precision = Selector(name=name, storage=precision.activation).applied_to(precision)
            unmet[name] = "torchao's int8 weights are whole matrices"
        if precision.compute in MATMUL_DTYPES and not _can_multiply(parameter, precision.compute, owners[parameter]):
            unmet[name] = f"torchao's {dtype_name(precision.compute)} products are for nn.Linear, in multiples of 16"
            precision = replace(precision, compute=precision.activation)
        precisions[name] = precision
    if sum(wide.values()) > sum(p.numel() for p in model.parameters()) / 2:
        warnings.warn(
            f"policy {policy.name!r} quantizes what is trained: {len(wide)} frozen parameters, most of all, stay in "
            f"{dtype_name(policy.default.activation)}. To hold them in int8, apply it before the adapters are added "
            "(get_peft_model), or give policy 'bf16' a Selector(name='*.base_layer.weight', storage=torch.int8)",
            stacklevel=3,
        )
    if unmet:
        name, reason = next(iter(unmet.items()))
        warnings.warn(
            f"policy {policy.name!r}: {len(unmet)} of {len(precisions)} parameters stay in the precision around them, "
            f"such as {name!r}: {reason}",
            stacklevel=3,
        )
    return precisions


def _frozen(precision: Precision, held: torch.dtype) -> Precision:
    """Without updates that could be lost, a wider storage holds the same values; quantizing would change them."""
    storage = precision.storage
    if storage == torch.int8 and held != torch.int8:
        storage = precision.activation
    if storage == torch.float32 and held == torch.bfloat16:
        storage = held
    return (
        precision if storage == precision.storage else Selector(trainable=False, storage=storage).applied_to(precision)
    )


def _can_multiply(parameter: nn.Parameter, compute: torch.dtype, owners: list[tuple[nn.Module, str]]) -> bool:
    from fxopt.precision.quantized import can_swap, is_swapped

    multiplied = all(leaf == "weight" and (can_swap(module) or is_swapped(module)) for module, leaf in owners)
    return multiplied and (compute != FLOAT8 or all(size % 16 == 0 for size in parameter.shape))


def _set_products(model: nn.Module, precisions: dict[str, Precision], emulate: bool) -> None:
    """Linear layers that multiply in int8 or float8, and no others."""
    compute_of = {p: precisions[name].compute for name, p in model.named_parameters() if name in precisions}
    quantized = any(compute in MATMUL_DTYPES for compute in compute_of.values())
    if not quantized and not any("_fxopt_product" in module.__dict__ for module in model.modules()):
        return  # without importing torchao
    from fxopt.precision.quantized import restore_products, swap_product

    restore_products(model)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None and compute_of.get(weight) in MATMUL_DTYPES:
            swap_product(module, compute_of[weight], emulate=emulate)


def _is_plain(tensor: Tensor) -> bool:
    """Floating-point values and nothing else; not quantized. Sharded (DTensor) counts as plain."""
    return tensor.dtype in _CONVERTIBLE and not is_wrapper(tensor)


def _held_in(parameter: Tensor) -> torch.dtype | None:
    """The dtype that a parameter is stored in, or None where no policy can change it."""
    return parameter.dtype if _is_plain(parameter) else torch.int8 if is_int8(parameter) else None


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


def _apply(
    model: nn.Module, parameter: nn.Parameter, precision: Precision, moved: dict[tuple[object, ...], Tensor]
) -> None:
    """Storage and gradient of one parameter as its precision says, in place."""
    gradient, parameter.grad = parameter.grad, None
    if precision.storage == torch.int8 and not (is_int8(parameter) and parameter.dtype == precision.activation):
        from fxopt.precision.quantized import quantize_parameter

        parameter = quantize_parameter(model, parameter, precision.activation)
    elif precision.storage != torch.int8 and is_int8(parameter):
        from fxopt.precision.quantized import dequantize_parameter

        parameter = dequantize_parameter(model, parameter, precision.storage)
    elif precision.storage != torch.int8:
        _store(parameter, precision.storage, moved)
    if parameter.grad_dtype != precision.gradient:
        parameter.grad_dtype = precision.gradient
    if gradient is not None:
        parameter.grad = gradient.to(precision.gradient)
    parameter.fxopt_precision = precision  # type: ignore[attr-defined]


def _store(tensor: Tensor, dtype: torch.dtype, moved: dict[tuple[object, ...], Tensor]) -> None:
    """Changes the dtype of a parameter or buffer in place; two that share memory go on sharing it."""
    if tensor.dtype == dtype:
        return
    data = tensor.data
    if hasattr(data, "to_local") or data.numel() == 0:
        tensor.data = data.to(dtype)
        return
    memory = data.untyped_storage()._cdata  # an address, that a fake tensor has as well
    place = (memory, data.storage_offset(), data.dtype, tuple(data.shape), data.stride(), dtype)
    if place not in moved:
        moved[place] = data.to(dtype)
    tensor.data = moved[place]


def _set_buffers(
    model: nn.Module, storage: torch.dtype, author: dict[str, torch.dtype], moved: dict[tuple[object, ...], Tensor]
) -> None:
    rounded: list[str] = []
    for name, buffer, persistent in _named_buffers(model):
        if not _is_plain(buffer):
            continue
        is_frequency = not persistent and "freq" in name.rpartition(".")[2]
        dtype = author.get(name, torch.float32 if is_frequency else storage)
        if storage == torch.float32:
            dtype = torch.float32
        if is_frequency and buffer.dtype.itemsize < dtype.itemsize:
            rounded.append(name)
        _store(buffer, dtype, moved)
    if rounded:
        warnings.warn(
            "rotary frequencies were rounded to 16 bits before (by model.to()?), which moves every position: "
            f"{', '.join(rounded)}; load the model with from_pretrained(dtype=...) instead",
            stacklevel=3,
        )


def _take_up_islands(model: nn.Module, precisions: dict[str, Precision]) -> None:
    """Islands in float32 that were saved so and loaded in bfloat16 get back what loading has rounded off."""
    parameters = dict(model.named_parameters())
    narrow = [n for n, p in precisions.items() if p.storage == torch.float32 and parameters[n].dtype == torch.bfloat16]
    if left := take_up_saved_bits(model, narrow):
        warnings.warn(
            f"{len(left)} parameters that the policy keeps in float32, as the one beside their file did, were loaded "
            f"in bfloat16, such as {left[0]!r}, and the file has other values or none under this name: to continue "
            "training exactly, load with from_pretrained(..., dtype=torch.float32)",
            stacklevel=3,
        )


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
            of_parts = {root + name: tensor.dtype for name, tensor in loaded.named_parameters()}
            if not _mixes_dtypes(loaded):
                found.update(of_parts)
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


def _mixes_dtypes(loaded: nn.Module) -> bool:
    """Whether the code of a model on the meta device fails on parameters that it declares in another dtype.

    Then nobody meant that dtype: XLNet's come from `torch.FloatTensor`, which no default dtype reaches.
    """
    declared = {parameter.dtype for parameter in loaded.parameters() if parameter.is_floating_point()}
    kept = getattr(loaded, "_keep_in_fp32_modules_strict", None) or getattr(loaded, "_keep_in_fp32_modules", None)
    if len(declared) < 2 or kept:
        return False
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"):
            loaded(input_ids=tokens)
    except Exception as error:  # any modelling file runs here, and some ask for values, which meta tensors lack
        return isinstance(error, RuntimeError) and ("scalar type" in str(error) or "dtype" in str(error))
    return False


def _set_config_dtype(module: nn.Module, storage: torch.dtype) -> None:
    """As transformers' from_pretrained does: the config of the model and of its parts."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "sub_configs"):  # not a transformers config
        return
    config.dtype = storage
    for part in config.sub_configs:
        if (sub_config := getattr(config, part, None)) is not None:
            sub_config.dtype = storage
