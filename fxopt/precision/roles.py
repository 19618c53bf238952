"""Which role each parameter plays, found from the modules that hold it."""

import re
from collections.abc import Iterable
from enum import StrEnum

import torch
from torch import nn


class Role(StrEnum):
    """What a parameter does in the model."""

    NORM = "norm"
    EMBEDDING = "embedding"
    OUTPUT_HEAD = "output_head"
    LINEAR = "linear"
    BIAS = "bias"
    ROUTER = "router"
    OTHER = "other"


_NORM_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
_CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# transformers' modelling files: LlamaRMSNorm, T5LayerNorm; MixtralTopKRouter; Qwen3MoeExperts; GPT-2's Conv1D.
_NORM_NAME = re.compile(r"norm", re.IGNORECASE)
_ROUTER_NAME = re.compile(r"router", re.IGNORECASE)
_MIXTURE_NAME = re.compile(r"moe|expert|router", re.IGNORECASE)
_LINEAR_NAME = re.compile(r"linear|conv1d|expert", re.IGNORECASE)
_GATE_NAMES = {"gate", "router", "shared_expert_gate"}


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter by its name in `model.named_parameters()`.

    A weight shared by the embedding and the output head plays the embedding's role. A norm's bias is a norm.
    """
    modules = dict(model.named_modules())
    embeddings = called(modules.values(), "get_input_embeddings")
    heads = called(modules.values(), "get_output_embeddings")
    roles: dict[str, Role] = {}
    owners: dict[nn.Parameter, list[tuple[str, str]]] = {}
    for module_name, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module_name, leaf))
    for name, parameter in model.named_parameters():
        found = set()
        for module_name, leaf in owners[parameter]:
            parent = modules.get(module_name.rpartition(".")[0]) if module_name else None
            module = modules[module_name]
            if module in embeddings or isinstance(module, nn.Embedding):
                found.add(Role.EMBEDDING)
            elif module in heads and leaf != "bias":
                found.add(Role.OUTPUT_HEAD)
            else:
                found.add(_role(module, module_name.rpartition(".")[2], parent, leaf, parameter))
        roles[name] = Role.EMBEDDING if Role.EMBEDDING in found else sorted(found, key=list(Role).index)[0]
    return roles


def _role(module: nn.Module, module_leaf: str, parent: nn.Module | None, leaf: str, parameter: torch.Tensor) -> Role:
    kind = type(module).__name__
    if isinstance(module, _NORM_TYPES) or (_NORM_NAME.search(kind) and parameter.dim() <= 1):
        return Role.NORM
    if _ROUTER_NAME.search(kind) or (
        module_leaf in _GATE_NAMES and parent is not None and _MIXTURE_NAME.search(type(parent).__name__)
    ):
        return Role.ROUTER
    if leaf == "bias" or leaf.endswith("_bias"):
        return Role.BIAS
    if parameter.dim() >= 2 and (isinstance(module, (nn.Linear, *_CONV_TYPES)) or _LINEAR_NAME.search(kind)):
        return Role.LINEAR
    return Role.OTHER


def called(modules: Iterable[nn.Module], getter: str) -> set[nn.Module]:
    """What `module.getter()` answers over all modules that have it."""
    found: set[nn.Module] = set()
    for module in modules:
        if (method := getattr(module, getter, None)) is not None:
            try:
                answer = method()
            except (NotImplementedError, AttributeError):  # transformers: a model without such a layer
                continue
            if isinstance(answer, nn.Module):
                found.add(answer)
    return found
