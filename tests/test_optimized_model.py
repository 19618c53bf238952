"""An optimized model is still the user's: it copies, pickles, saves, restores and takes adapters as before."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import fxopt
from fxopt.entries import entry_of
from fxopt.passes.pipelines import EXACT
from tests.tiny_models import LLAMA_HITS_IN_BF16, tiny_batch, tiny_llama


def test_copies_and_pickles_are_optimized_models_of_their_own():
    model = fxopt.optimize(tiny_llama(), "bf16")
    batch = tiny_batch()
    loss = model(**batch).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.__self__ is other and entry_of(other).model is other
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        assert other(**batch).loss != loss
        assert fxopt.report(other).hits == LLAMA_HITS_IN_BF16
    assert model(**batch).loss == loss


def test_a_model_with_a_pipeline_of_its_own_can_be_pickled():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16", pipeline=EXACT.without("fuse_rope"))
    copied = pickle.loads(pickle.dumps(model))
    copied(**tiny_batch())
    assert "rope" not in fxopt.report(copied).hits and fxopt.report(copied).hits["rms_norm"] == 3


def test_saves_and_loads_as_before(tmp_path):
    plain = tiny_llama()
    model = fxopt.optimize(copy.deepcopy(plain), "bf16")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model) is type(plain)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_optimizing_again_starts_over():
    model = fxopt.optimize(tiny_llama(), "fp32")
    original = entry_of(model).original
    fxopt.optimize(model, "bf16")
    assert model.dtype == torch.bfloat16 and entry_of(model).original == original
    assert fxopt.report(model).policy == "bf16"


def test_restore_gives_the_original_back():
    model = tiny_llama()
    fxopt.restore(fxopt.optimize(model, "bf16"))
    assert "forward" not in model.__dict__
    with pytest.raises(ValueError, match="not optimized"):
        fxopt.report(model)


def test_an_instances_own_forward_is_kept():
    model = tiny_llama()
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return type(model).forward(model, *args, **kwargs)

    model.forward = counting
    fxopt.optimize(model, "bf16")
    assert model(**tiny_batch()).loss.isfinite() and calls
    assert fxopt.restore(model).forward is counting


@torch._dynamo.config.patch(recompile_limit=2)
def test_many_models_stay_optimized_side_by_side():
    plain = tiny_llama().to(torch.bfloat16)
    batch = tiny_batch()
    before = plain(**batch).loss
    models = [fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16") for _ in range(4)]
    for model in models:
        model(**batch)
    assert all(fxopt.report(model).hits["linear_cross_entropy"] == 1 for model in models)
    assert not any(fxopt.report(model).fallbacks or fxopt.report(model).recompiles for model in models)
    assert torch.equal(plain(**batch).loss, before) and entry_of(plain) is None


def test_models_with_other_numbers_do_not_disturb_each_other():
    """Dynamo remembers by name which numbers changed, and would capture the second epsilon as an unknown."""
    for eps in (1e-5, 1e-6):
        model = fxopt.optimize(tiny_llama(num_hidden_layers=1, rms_norm_eps=eps), "bf16")
        model(**tiny_batch())
        assert fxopt.report(model).hits["rms_norm"] == 3, eps


@pytest.mark.parametrize("optimize_first", [True, False])
def test_peft_before_and_after(optimize_first):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    base = tiny_llama()
    if optimize_first:
        model = get_peft_model(fxopt.optimize(base, "bf16"), lora)
    else:
        model = get_peft_model(base, lora)
        fxopt.optimize(model, "bf16")
    model(**tiny_batch()).loss.backward()
    report = fxopt.report(model)
    assert report.hits["rms_norm"] == 5 and report.hits["linear_cross_entropy"] == 1
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
