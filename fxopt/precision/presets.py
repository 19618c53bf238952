"""The presets by name, and the choice among them."""

import math
import os

import torch
from torch import nn

from fxopt.precision.policy import FLOAT8, Policy, PolicyError, Precision, Selector, nearest_name
from fxopt.precision.roles import Role

# Bytes that weights, gradients and optimizer states hold per parameter: `fxopt.precision.footprint`, on real models.
BYTES_PER_PARAMETER = {"bf16-islands": 12.0, "bf16-8bit": 6.1, "int8": 5.1}
# The rest of the memory is for activations.
SHARE_OF_MEMORY = 0.6


def policies() -> dict[str, Policy]:
    """The presets by name. `auto` is not among them: it is a choice for one model (`choose`)."""
    fp32, bf16, int8 = torch.float32, torch.bfloat16, torch.int8
    master = Precision(fp32, bf16, fp32, "nearest", "float32")
    two_bytes = Precision(bf16, bf16, bf16, "stochastic", "float32")
    small_states = Precision(bf16, bf16, bf16, "stochastic", "8bit")
    # Norm weights are few: their float32 costs nothing.
    norm_island = Selector(role=Role.NORM, storage=fp32, compute=fp32, optimizer_state="float32")
    computed_in_float32 = (Selector(role=Role.NORM, compute=fp32), Selector(role=Role.ROUTER, compute=fp32))
    matrices = (Role.LINEAR, Role.EMBEDDING, Role.OUTPUT_HEAD)
    presets = (
        Policy("fp32", Precision(fp32, fp32, fp32, "nearest", "float32")),
        Policy("mixed", master, computed_in_float32),
        Policy(
            "mixed-stochastic",
            Precision(fp32, bf16, fp32, "nearest", "float32", cast="stochastic"),
            computed_in_float32,
        ),
        Policy("bf16", two_bytes),
        Policy("bf16-islands", two_bytes, (norm_island,)),
        Policy("bf16-8bit", small_states, (norm_island,)),
        Policy("int8", small_states, (norm_island, *(Selector(role=role, storage=int8) for role in matrices))),
        Policy("fp8", small_states, (Selector(role=Role.LINEAR, compute=FLOAT8),)),
    )
    return {policy.name: policy for policy in presets}


def named(name: str) -> Policy:
    """The preset called `name`. Raises PolicyError, with the nearest name, where there is none."""
    presets = policies()
    if not isinstance(name, str):
        raise PolicyError(f"a preset is called by its name, one of {', '.join(presets)}; got {name!r}")
    if name in presets:
        return presets[name]
    if name == "auto":
        raise PolicyError("'auto' is a choice for one model: fxopt.annotate(model, 'auto'), or presets.choose(model)")
    nearest = nearest_name(name.lower(), presets, likeness=0.5)
    raise PolicyError(f"unknown policy {name!r}{nearest}; known: {', '.join(presets)}, auto")


def resolve(policy: str | Policy, model: nn.Module | None = None) -> Policy:
    """A Policy from itself or from a preset's name ("auto" needs the model).

    Raises PolicyError (unknown name), TypeError (another type).
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a Policy or the name of one ({', '.join(policies())}, auto), got {policy!r}")
    if policy == "auto" and model is not None:
        return choose(model)[0]
    return Policy.named(policy)


def choose(model: nn.Module, device: torch.device | str | None = None, memory: int | None = None) -> tuple[Policy, str]:
    """The preset for training `model` on `device` (default: where its parameters are), and why, in two sentences.

    Of those that follow float32 training closest, the first whose weights, gradients and optimizer states fit into
    60 % of the device's memory, or of `memory` bytes. float8 is never chosen by itself: it buys speed and no memory.
    """
    parameters = list(model.parameters())
    device = torch.device(device) if device is not None else parameters[0].device
    if not computes_bfloat16(device):
        return named("fp32"), "This GPU has no bfloat16 arithmetic. Float32 is the only preset that runs well on it."
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen_bytes = 2 * sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    memory = device_memory(device) if memory is None else memory
    room = SHARE_OF_MEMORY * memory
    needs = {name: each * trainable + frozen_bytes for name, each in BYTES_PER_PARAMETER.items()}
    name = next((name for name, needed in needs.items() if needed <= room), list(needs)[-1])
    fits = "fit" if needs[name] <= room else "do not fit"
    return named(name), (
        f"{trainable / 1e6:,.0f} M trainable parameters need about {needs[name] / 1e9:.1f} GB in {name}, which {fits} "
        f"into {SHARE_OF_MEMORY:.0%} of the {memory / 1e9:.1f} GB of {device.type}. "
        "Of the presets that fit it is the one closest to float32 training; where none fits it is the smallest."
    )


def limits(device: torch.device | str) -> dict[str, float]:
    """Trainable parameters up to which `choose` takes each preset on `device`, in its order; infinite for the last."""
    device = torch.device(device)
    if not computes_bfloat16(device):
        return {"fp32": math.inf}
    room = SHARE_OF_MEMORY * device_memory(device)
    most = {name: room / each for name, each in BYTES_PER_PARAMETER.items()}
    return {**most, list(most)[-1]: math.inf}


def computes_bfloat16(device: torch.device) -> bool:
    """Whether `device` has bfloat16 arithmetic."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def device_memory(device: torch.device | None = None) -> int:
    """Bytes of memory of `device`; of the first GPU, or of this machine where there is none, if None."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
