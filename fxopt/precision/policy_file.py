"""Policies as JSON and YAML: data only, exact both ways, nothing unknown accepted.

name: mine
default: {storage: bfloat16, compute: bfloat16, gradient: bfloat16, rounding: stochastic, optimizer_state: float32}
selectors:
  - {role: norm, storage: float32, compute: float32}
  - {name: "model.layers.*.mlp.*", optimizer_state: 8bit}
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from fxopt.atomic_file import write_text
from fxopt.precision.policy import Policy, PolicyError, Precision, Selector, dtype_name, nearest_name
from fxopt.precision.roles import Role

_DTYPE_FIELDS = ("storage", "compute", "gradient")


def to_json(policy: Policy) -> str:
    return json.dumps(_to_data(policy), indent=2) + "\n"


def to_yaml(policy: Policy) -> str:
    return str(yaml.safe_dump(_to_data(policy), sort_keys=False))


def from_json(text: str) -> Policy:
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise PolicyError(f"not JSON: {error}") from None
    return _from_data(data)


def from_yaml(text: str) -> Policy:
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise PolicyError(f"not YAML of plain data: {error}") from None
    return _from_data(data)


def _without_duplicates(pairs: Iterable[tuple[object, object]]) -> dict[object, object]:
    """A mapping of the pairs, of which JSON and YAML would keep the last where a key stands twice."""
    data: dict[object, object] = {}
    for key, value in pairs:
        if key in data:
            raise PolicyError(f"the key {key!r} stands twice in one mapping")
        data[key] = value
    return data


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain data, with no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _without_duplicates((str(key.value), value) for key, value in node.value)
        return super().construct_mapping(node, deep)


def save(policy: Policy, path: str | Path) -> Path:
    path = Path(path)
    return write_text(path, _of_suffix(path, to_json, to_yaml)(policy))


def load(path: str | Path) -> Policy:
    path = Path(path)
    read = _of_suffix(path, from_json, from_yaml)
    try:
        return read(path.read_text(encoding="utf-8"))
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def _of_suffix(path: Path, for_json: Callable[..., Any], for_yaml: Callable[..., Any]) -> Callable[..., Any]:
    functions = {".json": for_json, ".yaml": for_yaml, ".yml": for_yaml}
    if path.suffix not in functions:
        raise PolicyError(f"{path}: a policy's file is named .json, .yaml or .yml")
    return functions[path.suffix]


def _to_data(policy: Policy) -> dict[str, Any]:
    """Plain data; what is None in a selector is left out."""

    def plain(part: Precision | Selector) -> dict[str, Any]:
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        return {name: _plain(value) for name, value in values.items() if value is not None}

    return {"name": policy.name, "default": plain(policy.default), "selectors": [plain(s) for s in policy.selectors]}


def _plain(value: object) -> object:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return str(value) if isinstance(value, Role) else value


def _from_data(data: object) -> Policy:
    top = _mapping("a policy", data, ("name", "default", "selectors"), required=("name", "default"))
    selectors = top.get("selectors") or []
    if not isinstance(selectors, list):
        raise PolicyError(f"selectors must be a list, got {type(selectors).__name__}")
    return Policy(
        top["name"],
        _part("default", Precision, top["default"]),
        tuple(_part(f"selectors[{place}]", Selector, selector) for place, selector in enumerate(selectors)),
    )


def _part(where: str, kind: type[Any], data: object) -> Any:
    known = tuple(field.name for field in fields(kind))
    required = tuple(field.name for field in fields(kind) if field.default is MISSING)
    values = _mapping(where, data, known, required)
    try:
        return kind(**{name: _dtype(value) if name in _DTYPE_FIELDS else value for name, value in values.items()})
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def _mapping(where: str, data: object, known: tuple[str, ...], required: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PolicyError(f"{where} must be a mapping of {', '.join(known)}; got {type(data).__name__}")
    for key in data:
        if key not in known:
            nearest = nearest_name(str(key), known, likeness=0.6)
            raise PolicyError(f"{where} has an unknown key {key!r}{nearest}; known: {', '.join(known)}")
    if missing := [key for key in required if key not in data]:
        raise PolicyError(f"{where} lacks {', '.join(missing)}")
    return data


def _dtype(name: object) -> object:
    """The dtype of that name; anything else as it is, for `Precision` to refuse."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else name
