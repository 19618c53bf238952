import copy

import pytest
import torch
from transformers import LlamaForCausalLM

import fxopt
from fxopt.passes.pipelines import EXACT
from fxopt.rewrite.pipeline import Pipeline, simple_pass
from tests.tiny_models import tiny_batch, tiny_llama


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(fxopt.PolicyError, match="'bf16'"):
        fxopt.optimize(tiny_llama(), "bf61")


def test_an_unknown_backend_names_the_known():
    with pytest.raises(ValueError, match="eager, inductor"):
        fxopt.optimize(tiny_llama(), "bf16", backend="inducktor")


def test_what_is_no_pipeline_is_refused_before_anything_changes():
    model = tiny_llama()
    with pytest.raises(TypeError, match=r"got tuple: .*EXACT\.with_rules"):
        fxopt.optimize(model, "bf16", pipeline=EXACT.passes)
    assert "forward" not in model.__dict__ and model.dtype == torch.float32
    with pytest.raises(TypeError, match="simple_pass"):
        Pipeline((*EXACT.passes, lambda graph: None))


def move_a_node_before_what_it_reads(graph):
    calls = [node for node in graph.nodes if node.op == "call_function"]
    calls[5].prepend(calls[-2])


def raise_an_error(graph):
    raise KeyError("hidden")


@pytest.mark.parametrize(
    ("change", "reason"),
    [(move_a_node_before_what_it_reads, "left a broken graph: RuntimeError: Argument"), (raise_an_error, "'hidden'")],
)
def test_a_pass_that_fails_is_named(change, reason):
    first, *rest = EXACT.passes
    model = fxopt.optimize(tiny_llama(), "fp32", pipeline=Pipeline((first, simple_pass("mine", change), *rest)))
    loss = model(**tiny_batch()).loss
    assert torch.equal(loss, fxopt.restore(copy.deepcopy(model))(**tiny_batch(), use_cache=False).loss)
    (fallback,) = fxopt.report(model).fallbacks
    assert "the pass 'mine'" in fallback and reason in fallback


def test_a_model_on_meta_says_what_to_do():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(fxopt.PolicyError, match="meta"):
        fxopt.optimize(model, "bf16")


def test_a_name_is_not_a_model():
    with pytest.raises(TypeError, match="load the model first"):
        fxopt.optimize("meta-llama/Llama-3.2-1B", "bf16")


def test_a_failed_optimize_leaves_the_model_alone():
    model = tiny_llama()
    with pytest.raises(ValueError):
        fxopt.optimize(model, "bf16", backend="inducktor")
    assert "forward" not in model.__dict__ and model.dtype == torch.float32


def test_the_report_reads_well_and_goes_into_json():
    import json

    model = fxopt.optimize(tiny_llama(), "bf16")
    assert "no graph captured yet" in str(fxopt.report(model))
    model(**tiny_batch()).loss.backward()
    report = fxopt.report(model)
    text = str(report)
    assert "rms_norm" in text and "modeling_llama.py" in text
    assert json.loads(json.dumps(report.to_dict()))["hits"] == report.hits


@pytest.mark.parametrize("policy", list(fxopt.policies()))
def test_verify_compares_loss_and_every_gradient(policy):
    model = fxopt.optimize(tiny_llama(), policy, emulate=True)
    outcome = fxopt.verify(model, tiny_batch())
    assert outcome.holds, outcome.failures
    assert {c.name for c in outcome.comparisons} == {"loss", *dict(model.named_parameters())}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inspect_shows_what_changed(tmp_path):
    model = fxopt.optimize(tiny_llama(), "bf16")
    with pytest.raises(ValueError, match="call it once with labels"):
        fxopt.inspect(model)
    model(**tiny_batch())
    diff = fxopt.inspect(model)
    text = str(diff)
    assert "fuse_rms_norm" in text and "modeling_llama.py" in text
    for ending in (".html", ".txt", ".json", ".graphml", ".model-explorer.json"):
        assert diff.save(tmp_path / f"diff{ending}").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"\.html"):
        diff.save(tmp_path / "diff.pdf")
    for option in ({"policy": "no-such-policy"}, {"batch_size": -5}, {"training": False}, {"pipeline": EXACT}):
        with pytest.raises(ValueError, match="in the calls that it ran"):
            fxopt.inspect(model, **option)


def test_verify_refuses_a_batch_that_is_not_optimized():
    model = fxopt.optimize(tiny_llama(), "bf16")
    with pytest.raises(ValueError, match="no labels"):
        fxopt.verify(model, {"input_ids": tiny_batch()["input_ids"]})
