"""Logits that nobody reads cost nothing; those that somebody reads are right."""

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.operations import recursively_apply
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.trainer_pt_utils import nested_detach

import fxopt
from tests.tiny_models import tiny_batch, tiny_llama
from tests.training import gradients


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_logits_are_computed_when_read_with_their_gradient():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    plain = fxopt.restore(copy.deepcopy(model))
    batch = tiny_batch()
    outputs, expected = model(**batch), plain(**batch, use_cache=False)
    assert type(outputs) is type(expected) and list(outputs.keys()) == list(expected.keys())
    assert outputs[0] is outputs.loss and outputs["loss"] is outputs.loss
    logits = outputs.logits
    assert logits is outputs["logits"] is outputs[1] is outputs.to_tuple()[1]
    like = logits.shape, logits.dtype, logits.device, logits.requires_grad
    assert like == (expected.logits.shape, expected.logits.dtype, expected.logits.device, True)
    assert not logits.is_computed
    torch.testing.assert_close(logits.detach()[:], expected.logits, rtol=0.02, atol=0.02)
    assert logits.is_computed
    logits.float().square().mean().backward()
    expected.logits.float().square().mean().backward()
    for name, gradient in gradients(model).items():
        reference = dict(plain.named_parameters())[name].grad
        assert (gradient - reference).float().norm() <= 0.02 * reference.float().norm(), name


def walk(outputs):
    """What trainers and wrappers do to a model's outputs without reading them."""
    leaves, structure = tree_flatten(outputs)
    tree_unflatten(leaves, structure)
    for value in outputs.values():
        (
            value.detach(),
            value.float(),
            value.to(torch.float64),
            value.cpu(),
            value.clone(),
            value.data,
            value.view_as(value),
        )
    recursively_apply(lambda tensor: tensor.float(), outputs)
    nested_detach(tuple(outputs.values()))
    return [leaf for leaf in leaves if leaf.ndim > 1]


@pytest.mark.parametrize("labelled", [True, False])
def test_walking_moving_and_casting_an_output_computes_nothing(labelled):
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    batch = tiny_batch() if labelled else without_labels(tiny_batch())
    outputs = model(**batch)
    (logits,) = walk(outputs)
    assert not logits.is_computed and fxopt.report(model).logits_computed == 0
    assert logits.grad_fn is not None, "who searches for unused parameters finds nothing"
    logits.sum()
    assert logits.is_computed and fxopt.report(model).logits_computed == 1


def test_logits_of_a_call_without_labels_give_every_gradient():
    model = fxopt.optimize(tiny_llama(), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    batch = tiny_batch()
    labels = batch["labels"][:, 1:].reshape(-1)
    for each in (model, plain):
        logits = each(**without_labels(batch), use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].float().reshape(labels.numel(), -1), labels).backward()
    assert fxopt.report(model).hits["rms_norm"] == 5 and not fxopt.report(model).uncovered
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_of_loss_and_logits_together_are_those_of_the_original():
    """Distillation beside the model's own loss."""
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    for each in (model, plain):
        outputs = each(**tiny_batch(), use_cache=False)
        (outputs.loss + outputs.logits.div_(2.0).log_softmax(-1).square().mean()).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


def test_hooks_on_logits_see_their_gradient_and_what_they_cannot_see_is_an_error():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    seen = []
    for each in (model, plain):
        logits = each(**without_labels(tiny_batch()), use_cache=False).logits
        logits.register_hook(lambda gradient: seen.append(gradient.clone()))
        logits.retain_grad()
        logits.log_softmax(-1).square().mean().backward()
        seen.append(logits.grad)
    torch.testing.assert_close(seen[:2], seen[2:])
    with pytest.raises(RuntimeError, match="without labels"):
        model(**tiny_batch()).logits.retain_grad()


@dataclass
class OwnOutput:
    loss: torch.Tensor
    logits: torch.Tensor


class OwnModel(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding, self.norm, self.head = nn.Embedding(50, 16), nn.RMSNorm(16), nn.Linear(16, 50)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.norm(self.embedding(input_ids)))
        loss = nn.functional.cross_entropy(logits.view(-1, 50), labels.view(-1))
        return self.kind(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "kind",
    [
        OwnOutput,
        dataclass(frozen=True)(type("Frozen", (), {"__annotations__": {"loss": object, "logits": object}})),
        SimpleNamespace,
        dict,
        namedtuple("Pair", ["loss", "logits"]),
        lambda loss, logits: (logits, loss),
    ],
    ids=["dataclass", "frozen dataclass", "namespace", "dict", "namedtuple", "tuple"],
)
def test_outputs_of_every_kind_hold_tensors(kind):
    tokens = torch.randint(0, 50, (2, 8))
    model = fxopt.optimize(OwnModel(kind), "fp32")
    outputs, expected = (each(tokens, labels=tokens) for each in (model, OwnModel(kind)))
    assert type(outputs) is type(expected)

    def parts(value):
        if isinstance(value, dict):
            return value["loss"], value["logits"]
        return (value.loss, value.logits) if hasattr(value, "loss") else value[::-1]

    for value, reference in zip(parts(outputs), parts(expected), strict=True):
        assert isinstance(value, torch.Tensor)
        torch.testing.assert_close(
            value.argmax(-1) if value.ndim else value, reference.argmax(-1) if value.ndim else reference
        )
    assert fxopt.report(model).fallbacks == {}
    if kind is not SimpleNamespace:  # which breaks Dynamo's graph
        assert fxopt.report(model).hits["linear_cross_entropy"] == 1


def test_an_evaluation_that_wants_the_loss_alone_never_pays_for_logits():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "int8").eval()
    with torch.no_grad():
        outputs = model(**tiny_batch())
        assert not walk(outputs)[0].is_computed
        assert outputs.logits.argmax(-1).shape == (3, 17)


def test_logits_after_the_parameters_changed_are_an_error():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    outputs = model(**tiny_batch())
    outputs.loss.backward()
    fxopt.optimizer(model, lr=1e-3).step()
    with pytest.raises(RuntimeError, match=r"before `optimizer.step\(\)`"):
        outputs.logits.argmax(-1)


@pytest.mark.parametrize("policy", ["bf16", "int8"])
def test_logits_after_a_write_that_no_version_shows_are_an_error(policy):
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), policy)
    outputs = model(**tiny_batch())
    outputs.loss.backward()
    weight = model.lm_head.weight.data
    (weight.int_data if policy == "int8" else weight).data.add_(1)
    with pytest.raises(RuntimeError, match=r"before `optimizer.step\(\)`"):
        outputs.logits.argmax(-1)


def test_logits_of_a_weight_that_was_freed_are_an_error():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    outputs = model(**tiny_batch())
    model.lm_head.weight.untyped_storage().resize_(0)  # as FSDP2 does when it shards a weight again
    with pytest.raises(RuntimeError, match="reshard_after_forward=False"):
        outputs.logits.argmax(-1)


def test_reading_logits_is_counted():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    outputs = model(**tiny_batch())
    assert fxopt.report(model).logits_computed == 0
    outputs.logits.sum(), outputs.logits.max()
    assert fxopt.report(model).logits_computed == 1


def test_second_derivatives_of_logits_are_an_error():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    logits = model(**without_labels(tiny_batch())).logits
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(logits.square().sum(), list(model.parameters()), create_graph=True)


def test_an_output_can_be_pickled():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16").eval()
    with torch.no_grad():
        outputs = model(**tiny_batch())
    copied = pickle.loads(pickle.dumps(outputs))
    assert torch.equal(copied.logits, outputs.logits)


def test_logits_of_a_model_made_under_inference_mode():
    with torch.inference_mode():
        model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32").eval()
        plain = fxopt.restore(copy.deepcopy(model))
        outputs, expected = model(**tiny_batch()), plain(**tiny_batch())
        torch.testing.assert_close(outputs.logits, expected.logits)
    assert not fxopt.report(model).fallbacks
