"""The policy beside a model's files, and a vocabulary that grows."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import fxopt
from fxopt.precision.annotate import annotate, policy_of
from fxopt.precision.policy import Policy, PolicyError, Selector
from fxopt.precision.presets import policies

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("policy", list(policies()))
def test_save_load_continue(policy: str, llama: LlamaForCausalLM, tokens: Tensor, tmp_path: Path) -> None:
    annotate(llama, policy, emulate=True).eval()
    llama.save_pretrained(tmp_path)
    assert Policy.load(tmp_path / "fxopt_policy.json") == Policy.named(policy)
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} <= {FP32, BF16}
    assert set(saved) == set(llama.state_dict()) - {"lm_head.weight"}
    loaded = annotate(LlamaForCausalLM.from_pretrained(tmp_path, dtype=FP32), emulate=True)
    assert policy_of(loaded) == Policy.named(policy)
    assert torch.equal(loaded(tokens).logits, llama(tokens).logits)


def test_optimize_finds_the_policy(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    assert policy_of(fxopt.optimize(copy.deepcopy(llama))) == Policy.named("bf16")
    mine = Policy.named("bf16").with_selectors(Selector(role="norm", storage=FP32, compute=FP32), name="mine")
    fxopt.optimize(llama, mine).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=FP32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxopt.optimize(loaded)
    assert policy_of(loaded) == mine and fxopt.report(loaded).policy == "mine"
    assert policy_of(fxopt.optimize(loaded, "fp32")) == Policy.named("fp32")
    assert policy_of(fxopt.optimize(loaded)) == Policy.named("fp32")  # its own


def off_the_grid(model: nn.Module) -> nn.Module:
    """`model` with islands that bfloat16 cannot hold."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype == FP32:
                parameter.mul_(1 + 1e-4 * torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("policy", ["bf16-islands", "bf16-8bit", "int8"])
@pytest.mark.parametrize("given", [False, True])
def test_no_bit_of_an_island_is_lost_by_loading(
    policy: str, given: bool, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    saved = off_the_grid(annotate(llama, policy))
    saved.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if given else {}))
    assert given == (tmp_path / "model.safetensors.index.json").exists()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.norm.weight.dtype == BF16
    annotate(loaded, policy if given else None)
    for name, value in saved.named_parameters():
        if value.dtype == FP32:
            assert torch.equal(value, loaded.get_parameter(name)), name


def test_islands_inside_a_wrapper_are_taken_up(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    off_the_grid(annotate(llama, "bf16-islands")).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    annotate(nn.ModuleDict({"policy": loaded}), "bf16-islands")
    assert torch.equal(loaded.model.norm.weight, llama.model.norm.weight)
    again = annotate(LlamaForCausalLM.from_pretrained(tmp_path).model, "bf16-islands")
    assert torch.equal(again.norm.weight, llama.model.norm.weight)  # the backbone of a file with a head


def test_islands_that_are_not_those_of_the_file_are_pointed_out(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    off_the_grid(annotate(llama, "bf16-islands")).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.model.norm.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"1 parameters .* were loaded in bfloat16, .*dtype=torch\.float32"):
        annotate(loaded)
    assert torch.equal(loaded.model.norm.weight, 2 * llama.model.norm.weight.bfloat16())


def test_a_broken_policy_file_is_named(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    annotate(llama, "bf16").save_pretrained(tmp_path)
    path = tmp_path / "fxopt_policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "defualt": {}}))
    with pytest.raises(PolicyError, match=r"fxopt_policy\.json: a policy has an unknown key 'defualt'"):
        annotate(LlamaForCausalLM.from_pretrained(tmp_path))


def test_a_given_state_dict_is_saved(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """As Trainer calls it."""
    annotate(llama, "int8")
    state = {name: value for name, value in llama.state_dict().items() if "layers.1" not in name}
    llama.save_pretrained(tmp_path, state_dict=state)
    assert set(load_file(tmp_path / "model.safetensors")) == set(state) - {"lm_head.weight"}
    annotate(llama, "bf16").save_pretrained(tmp_path / "b", state_dict={"model.norm.weight": torch.ones(32)})
    assert set(load_file(tmp_path / "b" / "model.safetensors")) == {"model.norm.weight"}


@pytest.mark.parametrize("again", [False, True])
def test_what_is_pushed_has_the_policy(
    again: bool, llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploaded are the files of the folder that are new, before `save_pretrained` returns; or changed, if `again`."""
    uploaded: list[str] = []

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations: list[Any], **options: Any) -> None:
            uploaded.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **kwargs: ModelCard(""))
    annotate(llama, "bf16-islands")
    if again:
        llama.save_pretrained(tmp_path)
    llama.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/model")
    assert {"fxopt_policy.json", "model.safetensors", "config.json"} <= set(uploaded)
    assert "_upload_modified_files" not in vars(llama)


def test_copies_save_themselves(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    annotate(llama, "bf16")
    for place, twin in enumerate((copy.deepcopy(llama), pickle.loads(pickle.dumps(llama)))):
        with torch.no_grad():
            twin.model.norm.weight.fill_(7)
        twin.save_pretrained(tmp_path / str(place))
        assert (load_file(tmp_path / str(place) / "model.safetensors")["model.norm.weight"] == 7).all()
        assert (tmp_path / str(place) / "fxopt_policy.json").is_file()
    assert "save_pretrained" not in vars(LlamaForCausalLM)


@pytest.mark.parametrize("policy", ["mixed", "bf16-islands", "int8", "fp8"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_grows(policy: str, tied: bool, llama: LlamaForCausalLM, tokens: Tensor) -> None:
    llama.config.tie_word_embeddings = tied
    model = annotate(LlamaForCausalLM(llama.config), policy, emulate=True)
    storage = model.lm_head.weight.fxopt_precision.storage
    model.resize_token_embeddings(128)
    assert model(tokens).logits.shape == (2, 12, 128)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.fxopt_precision.storage == storage and model.lm_head.weight.shape == (128, 32)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("policy", ["fp32", "bf16-8bit", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_changes_while_gradients_and_a_loss_are_there(
    policy: str, tied: bool, llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    llama.config.tie_word_embeddings = tied
    model = annotate(LlamaForCausalLM(llama.config), policy)
    query, tokens = model.model.layers[0].self_attn.q_proj.weight, tokens % 80
    for size in (128, 80):
        loss = model(input_ids=tokens, labels=tokens).loss  # held, as a loop's variable is
        loss.backward()
        before = {name: parameter.grad for name, parameter in model.named_parameters()}
        codes = query.int_data.clone() if policy == "int8" else None
        model.resize_token_embeddings(size, mean_resizing=False)
        if codes is not None:  # what has nothing to do with the vocabulary keeps its codes
            assert torch.equal(query.int_data, codes)
        for name, parameter in model.named_parameters():
            assert parameter.grad.shape == parameter.shape and parameter.fxopt_precision.storage is not None
            rows = min(len(parameter), len(before[name]))
            assert torch.equal(parameter.grad[:rows], before[name][:rows]) and not parameter.grad[rows:].any()
        again = model(input_ids=tokens, labels=tokens).loss
        again.backward()
        assert model.get_input_embeddings().weight.grad.shape == (size, 32)
        fxopt.optimizer(model).step()


def test_a_resize_that_fails_leaves_the_policy(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    model = annotate(llama, "int8")
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(ValueError, match="not and integer"):
        model.resize_token_embeddings(128, pad_to_multiple_of=0.5)
    for parameter in model.parameters():
        held = torch.int8 if hasattr(parameter, "int_data") else parameter.dtype
        assert parameter.fxopt_precision.storage == held and parameter.grad is not None
    model(input_ids=tokens, labels=tokens).loss.backward()
