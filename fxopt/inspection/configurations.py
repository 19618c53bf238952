"""A model from its configuration alone, without weights: by name, from a folder or a JSON file, or as an object.

The sizes of some well-known models ship in `well_known.json`, so that these need no internet.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, SupportsIndex

from huggingface_hub import constants, get_session
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SEQUENCE_LENGTH = 2048
MOST_TOKENS = 1 << 24  # of a batch on one device: their hidden states alone, 4096 wide in bfloat16, are 137 GB
HUB_TIMEOUT_S = 3


class UnknownModelError(ValueError):
    """There is no such model, or its configuration cannot be had here. The message says what to do."""


def configuration_of(model: PretrainedConfig | str | Path) -> PretrainedConfig:
    """The configuration that `model` names.

    A name is looked up in this order: a folder or JSON file on disk; a well-known model or one tuned from it, with or
    without its organization ("Llama-3.2-1B-Instruct"); a model type of transformers ("qwen3": its default sizes); the
    Hub and its cache.
    Raises UnknownModelError.
    """
    if isinstance(model, PretrainedConfig):
        return model
    if not isinstance(model, str | Path):
        raise UnknownModelError(f"{model!r} is no model, configuration, name or path")
    name, path = str(model), Path(model).expanduser()
    if path.is_file():
        return _from_fields(_read(path), name)
    if (path / "config.json").is_file():
        return _from_fields(_read(path / "config.json"), name)
    is_path = isinstance(model, Path) or path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if is_path or path.is_dir() or path.suffix == ".json":
        raise UnknownModelError(f"{name}: there is no such file, or no config.json in that folder")
    if (fields := _well_known(name)) is not None:
        return _from_fields(fields, name)
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CONFIG_MAPPING[name]()
    if name in CONFIG_MAPPING:
        raise no_causal_lm(name)
    return _from_hub(name)


def check_sizes(**sizes: int | None) -> None:
    """Raises ValueError for a size that is no whole number, or below 1, by its name."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, SupportsIndex) or int(size) < 1):
            raise ValueError(f"{name} is {size!r}; it is a whole number from 1 on")


def check_batch(batch_size: int, sequence_length: int) -> None:
    """Raises ValueError for more tokens than any device computes at once.

    What is found on fake tensors takes no memory for them, but some for each chunk of a loss that goes by chunks.
    """
    if batch_size * sequence_length > MOST_TOKENS:
        raise ValueError(
            f"batch_size is {batch_size}; with sequence_length {sequence_length} it is at most "
            f"{MOST_TOKENS // sequence_length}, {MOST_TOKENS} tokens: give the rows of one micro-batch on one device"
        )


def longest_sequence(config: Any) -> int | None:
    """The most tokens that a model of this configuration takes in a row, if it says so."""
    if not isinstance(config, PretrainedConfig):
        return None
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def sequence_for(config: Any, sequence_length: int | None) -> int:
    """The tokens in a row: those asked for; otherwise 2048, or the most that a model of this configuration takes.

    Raises ValueError for more than it takes.
    """
    longest = longest_sequence(config)
    if sequence_length is None:
        return min(SEQUENCE_LENGTH, longest or SEQUENCE_LENGTH)
    check_sizes(sequence_length=sequence_length)
    if longest is not None and sequence_length > longest:
        raise ValueError(
            f"sequence_length is {sequence_length}; this {config.model_type} model takes {longest} at most "
            "(max_position_embeddings)"
        )
    return sequence_length


def well_known_names() -> list[str]:
    """The models whose sizes ship with fxopt."""
    return list(_table())


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = resources.files("fxopt.inspection").joinpath("well_known.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table


def _well_known(name: str) -> dict[str, Any] | None:
    wanted = _untuned(name)
    for known, fields in _table().items():
        if wanted in (_untuned(known), _untuned(known).rpartition("/")[2]):
            return fields
    return None


def _untuned(name: str) -> str:
    """Without what tells a tuned model from the one that it was tuned from: they are of one size."""
    return re.sub(r"-(instruct|it|pt)(?=-|$)", "", name.lower())


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnknownModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UnknownModelError(f"{path} is not a model's configuration: it holds no fields")
    return fields


def _from_fields(fields: dict[str, Any], name: str) -> PretrainedConfig:
    if "model_type" not in fields:
        raise UnknownModelError(f"{name}: its configuration lacks model_type, which says what model it is of")
    model_type = str(fields["model_type"])
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1)
        nearest = f"; nearest: {near[0]!r}" if near else ""
        raise UnknownModelError(f"{name}: transformers knows no model_type {model_type!r}{nearest}")
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # each model type checks its fields in its own way
        raise builds_no_model(name, error) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise no_causal_lm(f"{name}: {model_type}")
    for field, least in (("num_hidden_layers", 0), ("hidden_size", 1), ("vocab_size", 1), ("num_attention_heads", 1)):
        value = getattr(config.get_text_config(decoder=True), field, None)
        if isinstance(value, int) and value < least:
            raise UnknownModelError(f"{name}: {field} is {value}; it is a number from {least} on")
    return config


def no_causal_lm(name: str) -> UnknownModelError:
    """For a model of transformers' that is something else."""
    return UnknownModelError(f"{name} is no causal language model of transformers'")


def builds_no_model(name: str, error: Exception) -> UnknownModelError:
    """For a configuration with which transformers' code fails, in whatever way."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UnknownModelError(f"{name}: this configuration builds no model: {type(error).__name__}: {' '.join(lines)}")


def _from_hub(name: str) -> PretrainedConfig:
    near = nearest_names(name)
    hint = f"; nearest: {', '.join(near)}" if near else f"; without internet: {', '.join(well_known_names())}"
    if "/" not in name:
        raise UnknownModelError(f"unknown model {name!r}{hint}; give org/name, a model type, a folder or a config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, local_files_only=not _hub_answers())
    except Exception as error:  # the Hub's client raises anything from OSError to its own HTTP errors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnknownModelError(f"the configuration of {name!r} cannot be had: {reason.strip()}{hint}") from None
    return config


def _hub_answers() -> bool:
    """Whether the Hub can be asked: where there is no internet, its client goes on trying for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # from OSError to the HTTP library's own errors
        return False
    return True


def nearest_names(name: str) -> list[str]:
    """Names that are close to a misspelt one: of well-known models, with and without organization, and model types."""
    short = {known.rpartition("/")[2]: known for known in well_known_names()}
    candidates = {item.lower(): item for item in (*well_known_names(), *short, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    wanted = name.lower()
    found = difflib.get_close_matches(wanted, candidates, n=3, cutoff=0.6)
    found += difflib.get_close_matches(wanted.rpartition("/")[2], candidates, n=3, cutoff=0.6)
    return list(dict.fromkeys(short.get(candidates[item], candidates[item]) for item in found))[:3]
