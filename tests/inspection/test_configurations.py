"""Models from names: well-known, on disk, misspelt, and without internet."""

import json

import huggingface_hub
import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import fxopt
from fxopt.inspection.configurations import UnknownModelError, configuration_of, nearest_names, well_known_names
from tests.tiny_models import SIZES


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.1-8B", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("google/gemma-2-2b", 2_614_341_888),
        ("google/gemma-3-1b-pt", 999_885_952),
        ("google/gemma-3-1b-it", 999_885_952),
        ("SmolLM2-135M-Instruct", 134_515_008),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
    ],
)
def test_well_known_models_have_the_parameters_that_their_cards_say(name, num_parameters):
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_every_well_known_configuration_loads():
    for name in well_known_names():
        assert configuration_of(name).vocab_size > 0


def test_a_folder_a_file_and_a_model_type(tmp_path):
    fields = {"model_type": "llama", **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for place in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert configuration_of(place).hidden_size == SIZES["hidden_size"]
    assert fxopt.inspect(str(tmp_path), sequence_length=17, prove=False).model == "LlamaForCausalLM"
    assert configuration_of("qwen3").model_type == "qwen3"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Llama-3.2-1C", "nearest: meta-llama/Llama-3.2-1B"),
        ("smollm2-135", "nearest: HuggingFaceTB/SmolLM2-135M"),
        ("qwn3", "nearest: qwen3"),
        ("zzzzzzzz", "without internet: HuggingFaceTB/SmolLM2-135M"),
        ("nowhere/config.json", "no such file"),
        ("./nowhere", "no such file"),
        ("~/nowhere/model", "no such file"),
        ("some/folder/nowhere", "no such file"),
    ],
)
def test_a_misspelt_model(name, message):
    with pytest.raises(UnknownModelError, match=message):
        configuration_of(name)


def test_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (("{", "is not JSON"), ("[]", "no fields"), ('{"model_type": "lama"}', "nearest: 'llama'")):
        path.write_text(text)
        with pytest.raises(UnknownModelError, match=message):
            configuration_of(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "lacks model_type"),
        ({"model_type": "t5"}, "config.json: t5 is no causal language model"),
        ({"model_type": "llama", "vocab_size": 0}, "vocab_size is 0; it is a number from 1 on"),
        ({"model_type": "llama", "num_hidden_layers": -1}, "num_hidden_layers is -1; it is a number from 0 on"),
        ({"model_type": "llama", "num_attention_heads": 0}, "builds no model: ZeroDivisionError"),
        ({"model_type": "llama", "hidden_size": "wide"}, "builds no model: .*hidden_size"),
        ({"model_type": "llama", "hidden_size": -64}, "hidden_size is -64"),
        ({"model_type": "llama", "intermediate_size": -64}, "builds no model: RuntimeError"),
        ({"model_type": "llama", "hidden_act": "nope"}, "builds no model: KeyError: 'nope'"),
    ],
)
def test_a_configuration_that_builds_no_model(tmp_path, fields, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UnknownModelError, match=message):
        fxopt.inspect(str(path), sequence_length=16)


def test_an_initialization_that_looks_at_values():
    config = CONFIG_MAPPING["modernbert-decoder"](
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    diff = fxopt.inspect(config, sequence_length=16, prove=False)
    assert diff.graphs and diff.metrics["launches"] > 0


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"batch_size": -1}, {"sequence_length": 0}])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} is .*; it is a whole number from 1 on"):
        fxopt.inspect("llama", **sizes)


def test_no_internet(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownModelError, match=r"cannot be had: .*nearest: meta-llama/Llama-3.2-1B"):
        configuration_of("metallama/Llama-3.2-1B-Instructed")


def test_nearest_names():
    assert nearest_names("meta-lama/Llama-3.2-1B")[0] == "meta-llama/Llama-3.2-1B"
    assert nearest_names("zzzzzzzzz") == []


def test_without_internet_the_hub_is_asked_once(monkeypatch):
    asked = []

    def unreachable(self, url, **options):
        asked.append((str(url), options["timeout"]))
        raise OSError("no route to host")

    client = type(huggingface_hub.get_session())
    monkeypatch.setattr(client, "head", unreachable)
    monkeypatch.setattr(client, "request", unreachable)
    with pytest.raises(UnknownModelError, match=r"'somebody/something' cannot be had: .*without internet: Hugging"):
        configuration_of("somebody/something")
    assert asked == [(huggingface_hub.constants.ENDPOINT, 3)]
