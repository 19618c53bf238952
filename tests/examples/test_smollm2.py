"""SmolLM2 from its package: a checkpoint that loads, saves and trains like any other."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import gguf_file, is_whole, smollm2_folder

pytestmark = pytest.mark.xdist_group("smollm2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        gguf_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return smollm2_folder(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_it_speaks(folder: Path) -> None:
    """The loss of an English sentence tells a rightly unpacked model from noise (which gives 10.8)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = tokenizer("The capital of France is Paris, and the capital of Germany is Berlin.", return_tensors="pt")
    with torch.no_grad():
        assert float(model(**ids, labels=ids["input_ids"]).loss) < 3.0
    assert tokenizer.chat_template


@pytest.mark.slow
def test_torn_checkpoint_is_noticed(folder: Path) -> None:
    assert is_whole(folder)
    assert smollm2_folder(folder.parent) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "the folder that it was made in is gone"
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text[:50])
    assert not is_whole(folder)
    config.write_text(text)


def test_whole_needs_every_file(tmp_path: Path) -> None:
    assert not is_whole(tmp_path)
    (tmp_path / "sizes.json").write_text('{"model.safetensors": 3}')
    assert not is_whole(tmp_path)
    (tmp_path / "model.safetensors").write_text("abc")
    assert is_whole(tmp_path)
