"""Models whose code is not transformers' train as before, and the report says what of them was not optimized."""

import copy

import pytest
import torch

import fxopt
from tests.foreign_models import NanoGPT, RemoteConfig, RemoteModel, tokens


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_nanogpt_trains_alike(policy):
    torch.manual_seed(0)
    model = fxopt.optimize(NanoGPT(), policy)
    batches = [{"idx": tokens(seed=seed), "targets": tokens(seed=seed).roll(-1, 1)} for seed in range(3)]
    batches[0]["targets"][:, :5] = -1
    outcome = fxopt.verify(model, *batches)
    assert outcome.holds, outcome.failures
    report = fxopt.report(model)
    assert report.hits == {"layer_norm": 5, "add_layer_norm": 4} and not report.fallbacks
    assert any("also used by `output`" in miss.reason for miss in report.near_misses)


def test_nanogpt_takes_its_arguments_by_position():
    torch.manual_seed(0)
    model = fxopt.optimize(NanoGPT(), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    idx = tokens()
    for arguments in ((idx, idx), (idx,)):
        (logits, loss), (expected_logits, expected_loss) = model(*arguments), plain(*arguments)
        torch.testing.assert_close(logits, expected_logits)
        assert (loss is None) == (expected_loss is None)
    assert fxopt.report(model).uncovered == {"the call has no labels": 1}


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_custom_loss_trains_alike(policy):
    torch.manual_seed(0)
    model = fxopt.optimize(RemoteModel(RemoteConfig()), policy)
    outcome = fxopt.verify(model, *({"input_ids": tokens(seed=s), "labels": tokens(seed=s)} for s in range(3)))
    assert outcome.holds, outcome.failures
    report = fxopt.report(model)
    assert report.hits["swiglu"] == 1 and "linear_cross_entropy" not in report.hits
    assert any("FuseLinearCrossEntropy" in miss.rule for miss in report.near_misses)
    assert any("foreign_models.py" in graph_break for graph_break in report.graph_breaks)
    assert model.calls == 0  # verify gives it back
    model(input_ids=tokens(), labels=tokens())
    assert model.calls == 1
