"""The files that a model was loaded from: the policy that was saved beside it, and bits that loading has dropped.

transformers loads every parameter in the one dtype that config.json names. Of a model that is stored in bfloat16 with
islands in float32, the file holds each bit of the islands, and `from_pretrained` rounds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.precision.policy import Policy

POLICY_FILE = "fxopt_policy.json"
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def saved_policy(model: nn.Module) -> Policy | None:
    """The policy in the folder, or in the repository of the Hub, that `model` was loaded from, or None.

    Raises PolicyError for a file that holds no policy.
    """
    path = _file_beside(model, POLICY_FILE)
    return None if path is None else Policy.load(path)


def take_up_saved_bits(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Gives parameters the values of the file that they were loaded from, in the dtype that it has them in.

    names: of parameters in `model`, which hold what the file has in fewer bits. Changed are those that still do, in
        models that were saved with a policy.

    Returns the names of those in such models that were not changed: the file has no such tensor, or another.
    """
    left: list[str] = []
    parameters = dict(model.named_parameters())
    for prefix, part, of_part in _by_loaded_part(model, names):
        if not of_part or _file_beside(part, POLICY_FILE) is None:
            continue
        files = _SavedTensors(part)
        for name in of_part:
            saved, parameter = files.find(name.removeprefix(prefix)), parameters[name]
            if saved is not None and _is_rounded_to(parameter, saved):
                parameter.data = saved.to(parameter.device)
            else:
                left.append(name)
    return left


def _by_loaded_part(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Those of `names` that lie in a model of transformers, by the outermost one, with the prefix of its names."""
    rest = list(names)
    for name, module in model.named_modules():
        if hasattr(type(module), "from_pretrained") and hasattr(module, "config"):
            prefix = f"{name}." if name else ""
            inside = [each for each in rest if each.startswith(prefix)]
            rest = [each for each in rest if not each.startswith(prefix)]
            yield prefix, module, inside


class _SavedTensors:
    """The tensors of a checkpoint in safetensors, in one file or several."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._base = f"{getattr(model, 'base_model_prefix', '')}."
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] | None = None
        if (index := _file_beside(model, WEIGHTS_INDEX)) is not None:
            self._file_of = json.loads(index.read_text())["weight_map"]

    def find(self, name: str) -> Tensor | None:
        """The tensor that is loaded as `name`; a model without its head has no prefix in its names."""
        for key in dict.fromkeys((name, name.removeprefix(self._base), self._base + name)):
            file = WEIGHTS_FILE if self._file_of is None else self._file_of.get(key)
            saved = None if file is None else self._opened(file)
            if saved is not None and key in saved.keys():  # noqa: SIM118 (no mapping)
                found: Tensor = saved.get_tensor(key)
                return found
        return None

    def _opened(self, file: str) -> Any:
        """A file of the checkpoint, looked for and opened once; None where there is none."""
        if file not in self._open:
            from safetensors import safe_open

            path = _file_beside(self._model, file)
            self._open[file] = None if path is None else safe_open(path, framework="pt")
        return self._open[file]


def _is_rounded_to(parameter: Tensor, saved: Tensor) -> bool:
    """Whether `parameter` is what `saved` becomes in its dtype, which is narrower."""
    if saved.dtype.itemsize <= parameter.dtype.itemsize or saved.shape != parameter.shape:
        return False
    return torch.equal(saved.to(parameter.dtype), parameter.detach().cpu())


def _file_beside(model: nn.Module, name: str) -> Path | None:
    """A file of the folder or the repository, at its commit, that `model` was loaded from; None where there is none."""
    config = getattr(model, "config", None)
    place, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not place:
        return None
    if Path(place).is_dir():
        path = Path(place) / name
        return path if path.is_file() else None
    if commit is None:
        return None
    from transformers.utils.hub import cached_file

    found = cached_file(
        place,
        name,
        revision=commit,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
