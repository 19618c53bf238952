"""Log-probabilities of an optimized call are those of its logits, which are not computed."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxopt
from benchmarks.tiny_causal_lms import batch_for, tiny_causal_lm
from fxopt.deferred_tensor import DeferredTensor
from fxopt.float64 import float64_copy, float64_throughout
from fxopt.rewrite.accuracy import FEW, SLACK
from tests.tiny_models import tiny_batch, tiny_llama
from tests.training import gradients


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def preference_loss(results):
    """Something that needs all results: each gets a gradient that differs from row to row."""
    log_prob, entropy, logsumexp, _ = results
    weights = torch.linspace(-1.0, 1.0, log_prob.numel(), device=log_prob.device).view(log_prob.shape)
    loss = (
        -nn.functional.logsigmoid((log_prob * weights.to(log_prob)).sum(-1)).mean() + 1e-3 * logsumexp.square().mean()
    )
    return loss if entropy is None else loss - 0.1 * (entropy * weights.to(entropy)).mean()


def plainly(model, batch, labels, temperature, entropy):
    logits = model(**batch, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    counts = labels[:, 1:] != -100
    log_probs = logits.log_softmax(-1)
    log_prob = log_probs.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1) * counts
    found = -(log_probs.exp() * log_probs).sum(-1) * counts if entropy else None
    return log_prob, found, logits.logsumexp(-1) * counts, (logits.argmax(-1) == labels[:, 1:]) & counts


@pytest.mark.parametrize(
    ("kind", "policy", "temperature", "entropy"),
    [
        ("llama", "fp32", 1.0, True),
        ("llama", "bf16", 0.7, True),
        ("llama", "bf16", 1.0, False),
        ("llama", "int8", 1.0, True),
        ("gemma2", "fp32", 1.3, True),  # soft-capped
        ("cohere", "bf16", 1.0, True),  # scaled
        ("granite", "fp32", 1.0, True),  # divided
        ("phi", "bf16", 1.0, True),  # with a bias
    ],
)
def test_results_and_gradients_are_those_of_the_logits(kind, policy, temperature, entropy):
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1) if kind == "llama" else tiny_causal_lm(kind), policy)
    plain = fxopt.restore(copy.deepcopy(model))
    exact = fxopt.restore(float64_copy(model if policy != "int8" else dequantized(model)))
    batch = tiny_batch() if kind == "llama" else batch_for(model)
    labels, batch = batch["labels"], without_labels(batch)

    outputs = model(**batch)
    found = fxopt.token_log_probs(outputs, labels, temperature=temperature, entropy=entropy)
    expected = plainly(plain, batch, labels, temperature, entropy)
    with float64_throughout():
        truth = plainly(exact, batch, labels, temperature, entropy)
        preference_loss(truth).backward()
    preference_loss(found).backward()
    preference_loss(expected).backward()
    assert not outputs.logits.is_computed and fxopt.report(model).logits_computed == 0
    assert not fxopt.report(model).fallbacks and fxopt.report(model).optimized[""] == 1

    for name, mine, theirs, true in zip(found._fields, found, expected, truth, strict=True):
        if theirs is None:
            assert mine is None
        elif theirs.dtype == torch.bool:
            assert (mine == theirs).float().mean() > 0.95, name
        else:
            assert_as_accurate(name, mine, theirs, true, model)
    of_plain, of_exact = gradients(plain), gradients(exact)
    for name, gradient in gradients(model).items():
        assert_as_accurate(name, gradient, of_plain[name], of_exact[name], model)
    assert gradients(model).keys() == of_plain.keys()


def dequantized(model):
    """A plain copy of an int8 model, with the same values."""
    copied = fxopt.annotate(fxopt.restore(copy.deepcopy(model)), "fp32")
    return copied


def assert_as_accurate(name, mine, theirs, true, model):
    """The accuracy rule, on the average of a value's numbers; of few it is a matter of luck."""
    size = true.norm()
    error, eager = ((value.double() - true).norm() / size for value in (mine, theirs))
    slack = SLACK if mine.numel() >= FEW else 2.0
    assert error <= slack * eager + torch.finfo(model.dtype).eps / 2, (name, float(error), float(eager))


def test_of_an_output_that_was_cast_moved_or_read():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    labels = tiny_batch()["labels"]
    batch = without_labels(tiny_batch())
    expected = fxopt.token_log_probs(model(**batch), labels, entropy=True)
    cast, read = model(**batch), model(**batch)
    cast.logits = cast.logits.double()
    read.logits.argmax(-1)
    for outputs in (cast, read, {"logits": model(**batch).logits}, model(**batch).logits, model(**batch).logits[:]):
        for mine, theirs in zip(fxopt.token_log_probs(outputs, labels, entropy=True), expected, strict=True):
            torch.testing.assert_close(mine.to(theirs.dtype), theirs)
    assert not cast.logits.is_computed
    doubled = model(**batch)
    doubled.logits.mul_(2.0)  # is read then, and used as it is
    twice = fxopt.token_log_probs(doubled, labels)
    torch.testing.assert_close(twice.log_prob, fxopt.token_log_probs(model(**batch), labels, temperature=0.5).log_prob)


def test_gradients_of_a_loss_beside_add_up():
    """Log-probabilities, and the logits themselves, in one loss; two sets of log-probabilities of one output."""
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    labels, batch = tiny_batch()["labels"], without_labels(tiny_batch())

    def loss(outputs):
        first = fxopt.token_log_probs(outputs, labels).log_prob.mean()
        second = fxopt.token_log_probs(outputs, labels.flip(0), temperature=2.0).log_prob.square().mean()
        return first + second + outputs.logits.square().mean()

    for each in (model, plain):
        loss(each(**batch, use_cache=False)).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


def test_hooks_on_the_logits_run_and_see_a_gradient():
    """FSDP2 gathers weights in such a hook, before the gradient of what the logits are computed from."""
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    outputs = model(**without_labels(tiny_batch()))
    seen = []
    outputs.logits.register_hook(lambda gradient: seen.append((type(gradient), gradient.shape)))
    fxopt.token_log_probs(outputs, tiny_batch()["labels"]).log_prob.sum().backward()
    assert seen == [(DeferredTensor, outputs.logits.shape)]
    assert not outputs.logits.is_computed and model.lm_head.weight.grad is not None


def scaled_by_a_hook(outputs, labels):
    outputs.logits.register_hook(lambda gradient: gradient * 2)
    return fxopt.token_log_probs(outputs, labels, entropy=True).log_prob.sum()


def looked_at_by_a_hook(outputs, labels):
    outputs.logits.register_hook(lambda gradient: gradient.abs().sum().item() and None)
    return fxopt.token_log_probs(outputs, labels).log_prob.sum()


def of_two_temperatures(outputs, labels):
    return sum(fxopt.token_log_probs(outputs, labels, temperature=t).log_prob.sum() for t in (1.0, 0.5))


def in_a_checkpoint(outputs, labels):
    def loss(logits):
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return checkpoint(loss, outputs.logits, use_reentrant=False)


@pytest.mark.parametrize("loss", [scaled_by_a_hook, looked_at_by_a_hook, of_two_temperatures, in_a_checkpoint])
def test_a_gradient_that_somebody_looks_at_is_that_of_the_original(loss):
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    for each in (model, plain):
        loss(each(**without_labels(tiny_batch()), use_cache=False), tiny_batch()["labels"]).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_all_labels_masked_and_one_row(num_rows):
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    batch = tiny_batch(num_rows=num_rows)
    labels = torch.full_like(batch["labels"], -100)
    results = fxopt.token_log_probs(model(**without_labels(batch)), labels, entropy=True)
    assert all(not result.any() for result in results)
    results.log_prob.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_without_a_gradient_and_frozen_parts():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    model.lm_head.requires_grad_(False)
    labels, batch = tiny_batch()["labels"], without_labels(tiny_batch())
    fxopt.token_log_probs(model(**batch), labels).log_prob.sum().backward()
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad is not None
    with torch.no_grad():
        assert fxopt.token_log_probs(model(**batch), labels).log_prob.shape == (3, 16)
    assert fxopt.token_log_probs(model(**batch), labels, shifted=True).log_prob.shape == (3, 17)


def test_what_does_not_fit_says_so():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    labels, batch = tiny_batch()["labels"], without_labels(tiny_batch())
    outputs = model(**batch)
    with pytest.raises(ValueError, match=r"labels \(3, 16\) do not fit"):
        fxopt.token_log_probs(outputs, labels[:, 1:])
    with pytest.raises(ValueError, match="temperature is 0"):
        fxopt.token_log_probs(outputs, labels, temperature=0)
    with pytest.raises(ValueError, match="has no `logits`"):
        fxopt.token_log_probs(transformers.modeling_outputs.BaseModelOutput(), labels)
    with pytest.raises(RuntimeError, match=r"torch\.int64"):
        fxopt.token_log_probs(outputs, labels.int())
    for given in (outputs, outputs.logits[:]):
        with pytest.raises(IndexError, match="out of bounds"):
            fxopt.token_log_probs(given, labels.clamp(min=0) + 400)
    with pytest.raises(ValueError, match="must be a tensor"):
        fxopt.token_log_probs(outputs, None)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(
            fxopt.token_log_probs(outputs, labels).log_prob.sum(), list(model.parameters()), create_graph=True
        )
