"""Logits that nobody reads cost nothing; those that somebody reads are right."""

import copy
import pickle

import pytest
import torch

import fxopt
from tests.tiny_models import tiny_batch, tiny_llama
from tests.training import gradients


def test_logits_are_computed_when_touched_with_their_gradient():
    model = fxopt.optimize(tiny_llama(), "bf16")
    plain = fxopt.restore(copy.deepcopy(model))
    batch = tiny_batch()
    outputs, expected = model(**batch), plain(**batch, use_cache=False)
    assert type(outputs).__name__ == type(expected).__name__ and isinstance(outputs, type(expected))
    assert list(outputs.keys()) == list(expected.keys()) and len(outputs) == len(expected)
    assert not isinstance(dict.__getitem__(outputs, "logits"), torch.Tensor), "logits were computed"
    assert outputs[0] is outputs.loss and outputs["loss"] is outputs.loss
    assert not isinstance(dict.__getitem__(outputs, "logits"), torch.Tensor), "reading the loss computed the logits"
    for logits in (outputs.logits, outputs["logits"], outputs[1], outputs[1:][0], outputs.to_tuple()[1]):
        torch.testing.assert_close(logits, expected.logits, rtol=0.02, atol=0.02)
    assert outputs.logits is outputs[1]
    outputs.logits.float().square().mean().backward()
    expected.logits.float().square().mean().backward()
    for name, gradient in gradients(model).items():
        reference = dict(plain.named_parameters())[name].grad
        assert (gradient - reference).float().norm() <= 0.02 * reference.float().norm(), name


def test_logits_after_the_parameters_changed_are_an_error():
    model = fxopt.optimize(tiny_llama(), "bf16")
    outputs = model(**tiny_batch())
    outputs.loss.backward()
    fxopt.optimizer(model, lr=1e-3).step()
    with pytest.raises(RuntimeError, match=r"before `optimizer.step\(\)`"):
        _ = outputs.logits


def test_logits_after_a_fused_optimizers_step_are_an_error():
    model = fxopt.optimize(tiny_llama(), "bf16")
    outputs = model(**tiny_batch())
    outputs.loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step()
    with pytest.raises(RuntimeError, match=r"before `optimizer.step\(\)`"):
        _ = outputs.logits


def test_reading_logits_is_counted():
    model = fxopt.optimize(tiny_llama(), "bf16")
    outputs = model(**tiny_batch())
    assert fxopt.report(model).logits_computed == 0
    _ = outputs.logits, outputs.logits
    assert fxopt.report(model).logits_computed == 1


def test_an_output_can_be_pickled():
    model = fxopt.optimize(tiny_llama(), "bf16").eval()
    with torch.no_grad():
        outputs = model(**tiny_batch())
    copied = pickle.loads(pickle.dumps(outputs))
    assert torch.equal(copied.logits, outputs.logits)


def test_logits_of_a_model_made_under_inference_mode():
    with torch.inference_mode():
        model = fxopt.optimize(tiny_llama(), "fp32").eval()
        plain = fxopt.restore(copy.deepcopy(model))
        outputs, expected = model(**tiny_batch()), plain(**tiny_batch())
        torch.testing.assert_close(outputs.logits, expected.logits)
    assert not fxopt.report(model).fallbacks
