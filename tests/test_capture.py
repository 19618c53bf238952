"""Calls of an optimized model train as the original's do, in whatever way they are captured."""

import copy
import functools
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from torchao.prototype.quantized_training import int8_weight_only_quantized_training
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaModel

import fxopt
from benchmarks.tiny_causal_lms import batch_for, tiny_causal_lm
from fxopt.capture import OptimizedForward
from fxopt.training_call import HookedModules
from tests.tiny_models import LLAMA_HITS, LLAMA_HITS_IN_BF16, SIZES, tiny_batch, tiny_llama, tiny_model
from tests.training import assert_trains_alike, gradients


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_trains_alike_on_several_families(kind, policy):
    model = fxopt.optimize(tiny_model(kind), policy)
    assert_trains_alike(model, tiny_batch())
    assert fxopt.report(model).hits.items() >= {k: v for k, v in LLAMA_HITS.items() if "attention" not in k}.items()
    assert not fxopt.report(model).refused and not fxopt.report(model).fallbacks


@pytest.mark.parametrize(
    ("options", "batch", "call"),
    [
        ({"tie_word_embeddings": True}, {}, {}),
        ({}, {"padding": 4}, {}),
        ({}, {"num_rows": 1}, {}),
        ({}, {"length": 33}, {"num_items_in_batch": 17}),
        ({}, {}, {"num_items_in_batch": torch.tensor(29)}),
        ({"attention_bias": True, "mlp_bias": True}, {}, {}),
        ({"vocab_size": 64}, {"vocabulary": 64}, {}),
        ({"hidden_size": 36, "head_dim": 10, "intermediate_size": 35}, {}, {}),
    ],
    ids=["tied", "padded", "one row", "items", "items tensor", "biases", "V = D", "odd sizes"],
)
def test_trains_alike_in_awkward_cases(options, batch, call):
    model = fxopt.optimize(tiny_llama(**options), "bf16")
    assert_trains_alike(model, tiny_batch(**batch), **call)
    assert fxopt.report(model).hits["linear_cross_entropy"] == 1
    assert not fxopt.report(model).fallbacks


@pytest.mark.parametrize("frozen", ["lm_head", "model", "model.embed_tokens", "model.layers.0"])
def test_frozen_parts_get_no_gradient_and_the_others_the_right_one(frozen):
    model = tiny_llama(num_hidden_layers=1)
    model.get_submodule(frozen).requires_grad_(False)
    assert_trains_alike(fxopt.optimize(model, "bf16"), tiny_batch())
    assert not fxopt.report(model).refused
    assert all(parameter.grad is None for parameter in model.get_submodule(frozen).parameters())


def test_all_labels_masked_is_nan_as_before():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    batch = tiny_batch()
    batch["labels"].fill_(-100)
    assert_trains_alike(model, batch)


@pytest.mark.parametrize(
    ("policy", "use_reentrant"), [("bf16", False), ("bf16", True), ("mixed", False), ("bf16-islands", False)]
)
def test_gradient_checkpointing(policy, use_reentrant):
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fxopt.optimize(model, policy)
    assert_trains_alike(model, tiny_batch())
    hits = fxopt.report(model).hits
    assert not fxopt.report(model).graph_breaks
    assert {op: hits[op] for op in ("rms_norm", "swiglu", "rope", "causal_attention")} == {
        op: LLAMA_HITS[op] for op in ("rms_norm", "swiglu", "rope", "causal_attention")
    }


def test_gradients_accumulate():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    batch = tiny_batch(num_rows=4)
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    num_items = (batch["labels"] != -100).sum()
    model(**batch, num_items_in_batch=num_items).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    for half in halves:
        model(**half, num_items_in_batch=num_items).loss.backward()
    for name, gradient in gradients(model).items():
        error = (gradient - whole[name]).float().norm() / whole[name].float().norm()
        assert error < 0.01, (name, error)


def test_variable_lengths_take_one_graph():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    for length in (17, 23, 64, 31):
        model(**tiny_batch(length=length)).loss.backward()
    assert len(fxopt.report(model).graphs) == 1
    model(**tiny_batch(padding=3)).loss.backward()
    assert len(fxopt.report(model).graphs) == 2


def test_calls_that_are_not_covered_are_the_originals():
    model = fxopt.optimize(tiny_llama(), "bf16").eval()
    plain = fxopt.restore(copy.deepcopy(model))
    batch = tiny_batch()
    ids = batch["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model(ids).past_key_values is not None, "who evaluates without no_grad may go on with the cache"
    assert torch.equal(model.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4))
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    assert model(**batch, use_cache=True).past_key_values is not None
    report = fxopt.report(model)
    assert not report.graphs and not report.optimized
    assert report.uncovered["the call has no labels, and nothing is differentiated"] == 5
    assert report.uncovered["the call has no labels, and may be asked for its cache in evaluation"] == 1
    frozen = model.requires_grad_(False).train()
    frozen(ids)
    assert report.uncovered["the call has no labels, and nothing requires a gradient"] == 1


@pytest.mark.parametrize("entry", ["", "model"])
def test_a_call_without_labels_is_optimized_wherever_it_is_entered(entry):
    model = fxopt.optimize(tiny_llama(), "bf16")
    plain = fxopt.restore(copy.deepcopy(model))
    batch = {name: value for name, value in tiny_batch(padding=3).items() if name != "labels"}
    for each in (model, plain):
        result = each.get_submodule(entry)(**batch, use_cache=False)[0].float()
        (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    report = fxopt.report(model)
    assert report.optimized == {entry: 1} and not report.fallbacks and not report.uncovered
    assert all(report.hits[op] == LLAMA_HITS[op] for op in ("rms_norm", "rope", "add_rms_norm", "swiglu"))
    for name, gradient in gradients(plain).items():
        error = (gradients(model)[name] - gradient).float().norm() / gradient.float().norm()
        assert error < 0.02, (name, error)


def test_a_call_that_asks_for_a_tuple_gets_one():
    model = fxopt.optimize(tiny_llama(), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    assert len(model(**tiny_batch(), return_dict=False)) == 3  # the last is a cache
    assert list(fxopt.report(model).uncovered) == ["the call asks for a tuple, with a cache in it"]
    outputs, expected = (each(**tiny_batch(), return_dict=False, use_cache=False) for each in (model, plain))
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs, expected)
    assert fxopt.report(model).hits["swiglu"] == 2 and fxopt.report(model).hits["linear_cross_entropy"] == 1


def test_evaluation_is_fused_too_and_needs_no_gradient():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16").eval()
    plain = fxopt.restore(copy.deepcopy(model))
    with torch.no_grad():
        outputs, expected = model(**tiny_batch()), plain(**tiny_batch())
    assert (outputs.loss - expected.loss).abs() < 1e-3 * expected.loss
    assert not outputs.logits.requires_grad
    assert fxopt.report(model).hits["linear_cross_entropy"] == 1


def test_the_models_own_errors_come_through():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    batch = tiny_batch()
    batch["labels"][0, 9] = 307
    with pytest.raises(IndexError, match="307"):
        model(**batch)
    with pytest.raises(Exception) as optimized:
        model(input_ids=tiny_batch()["input_ids"], labels=tiny_batch(num_rows=2)["labels"])
    with pytest.raises(type(optimized.value)):
        fxopt.restore(model)(input_ids=tiny_batch()["input_ids"], labels=tiny_batch(num_rows=2)["labels"])
    fxopt.optimize(model, "bf16")
    assert model(**tiny_batch()).loss.isfinite()
    assert not fxopt.report(model).fallbacks


def test_a_call_that_raises_is_not_counted_as_optimized():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    with pytest.raises(ValueError):
        model(input_ids=tiny_batch()["input_ids"], labels=tiny_batch(num_rows=2)["labels"])
    assert not fxopt.report(model).optimized
    model(**tiny_batch())
    assert fxopt.report(model).optimized == {"": 1}


@pytest.mark.parametrize("warm", [False, True])
def test_a_checkpoint_around_a_whole_call(warm):
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    batch = tiny_batch()
    if warm:
        model(**batch)
    for each in (model, plain):
        loss = checkpoint(
            lambda ids, each=each: each(ids, labels=batch["labels"]).loss, batch["input_ids"], use_reentrant=False
        )
        loss.backward()
    assert any("inside a checkpoint" in reason for reason in fxopt.report(model).uncovered)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-3, atol=1e-6)


def test_an_empty_batch_does_what_the_original_does():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    empty = {name: value[:0] for name, value in tiny_batch().items()}
    with pytest.raises(Exception) as optimized:
        model(**empty)
    with pytest.raises(type(optimized.value), match="0 elements"):
        fxopt.restore(model)(**empty)


def test_a_model_without_a_head_trains():
    torch.manual_seed(0)
    model = LlamaModel(tiny_llama().config)
    ids = tiny_batch()["input_ids"]
    expected = copy.deepcopy(model).to(torch.bfloat16)(ids).last_hidden_state
    found = fxopt.optimize(model, "bf16")(ids).last_hidden_state
    assert ((found - expected).float().norm() / expected.float().norm()) < 0.01
    assert fxopt.report(model).hits["rms_norm"] == 5


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
@pytest.mark.parametrize("labelled", [True, False])
def test_classification_heads_train(kind, labelled):
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels, config.pad_token_id, config.classifier_dropout = 3, 0, 0.0
    model = fxopt.optimize(getattr(transformers, kind)(config).train(), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    batch = tiny_batch()
    shape = (3, 17) if "Token" in kind else (3,)
    labels = torch.arange(51).view(3, 17)[: shape[0], : shape[-1] if len(shape) > 1 else 1].squeeze(-1) % 3
    batch["labels"] = labels.expand(shape)
    if not labelled:
        del batch["labels"]
    for each in (model, plain):
        outputs = each(**batch, use_cache=False)
        (outputs.loss if labelled else outputs.logits.square().mean()).backward()
    assert fxopt.report(model).optimized == {"": 1} and not fxopt.report(model).fallbacks
    assert fxopt.report(model).hits["rms_norm"] == 5
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_compiler_failure_falls_back_and_says_why(caplog, monkeypatch):
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")

    def broken(*_):
        raise torch._dynamo.exc.InternalTorchDynamoError("no luck")

    monkeypatch.setattr(OptimizedForward, "_graphs_for", lambda self, kind: broken)
    expected = fxopt.restore(copy.deepcopy(model))(**tiny_batch()).loss
    assert torch.equal(model(**tiny_batch()).loss, expected)
    assert any("no luck" in reason for reason in fxopt.report(model).fallbacks)
    assert "no luck" in caplog.text
    assert torch.equal(model(**tiny_batch()).loss, expected)


def test_inductor_computes_the_same():
    pytest.importorskip("torch._inductor.compile_fx")
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        pytest.skip("no C++ compiler")
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16", backend="inductor")
    assert_trains_alike(model, tiny_batch())
    outputs = model(**tiny_batch())
    assert outputs.logits.shape == (3, 17, 307)
    assert not fxopt.report(model).fallbacks


@torch._dynamo.config.patch(recompile_limit=2)
def test_kinds_of_calls_do_not_use_up_the_compilers_cache():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16", prove=False)
    for training in (True, False):
        model.train(training)
        for num_rows in (3, 1):
            for options in ({}, {"num_items_in_batch": 17}) if training else ({},):
                with torch.set_grad_enabled(training):
                    model(**tiny_batch(num_rows=num_rows), **options)
    model(**tiny_batch(padding=4))
    report = fxopt.report(model)
    assert len(report.graphs) == 7 and not report.fallbacks and not report.recompiles
    assert report.hits["rms_norm"] == 3


def test_packed_rows_are_what_they_were():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    batch = {name: value for name, value in tiny_batch(length=16).items() if name != "attention_mask"}
    batch["position_ids"] = torch.arange(8).repeat(3, 2)
    for options in ({}, {"use_cache": False}):
        difference = model(**batch, **options).loss - plain(**batch, **options).loss
        assert difference.abs() < 1e-5, options


def test_a_write_to_what_backward_needs_is_an_error_as_ever():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    loss = model(**tiny_batch()).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_that_change_places_are_told_apart():
    """As many as before, of the model, in it, and of all modules: only some are in what was captured."""
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32", prove=False)
    plain = fxopt.restore(copy.deepcopy(model))
    places = {
        "model": lambda of: of.register_forward_hook(lambda module, args, output: None),
        "mlp": lambda of: of.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0),
        "head": lambda of: of.lm_head.register_forward_hook(lambda module, args, output: output * 0.5),
        "all": lambda of: register_module_forward_hook(
            lambda module, args, output: output * 0.5 if isinstance(module, nn.Embedding) else None
        ),
    }
    for name, register in places.items():
        losses = []
        for each in (model, plain):
            handle = register(each)
            losses.append(each(**tiny_batch()).loss)
            handle.remove()
        torch.testing.assert_close(*losses, msg=lambda text, name=name: f"{name}: {text}")


def test_detect_anomaly_refuses_no_rule():
    """The proof's samples hold NaN."""
    model = fxopt.optimize(tiny_llama(), "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Anomaly Detection")
        with torch.autograd.detect_anomaly():
            model(**tiny_batch()).loss.backward()
            assert torch.is_anomaly_enabled()
    assert fxopt.report(model).hits == LLAMA_HITS_IN_BF16 and not fxopt.report(model).refused
    assert "more accurate than the original code" in str(fxopt.report(model))
    assert "embedding, gradient of weight" in str(fxopt.report(model))


def test_a_call_that_trains_and_is_not_covered_is_told(caplog):
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    for _ in range(2):
        model(**tiny_batch(), output_hidden_states=True).loss.backward()
    with torch.no_grad():
        model(**tiny_batch(), use_cache=True)
    assert [record.message for record in caplog.records if record.name == "fxopt"] == [
        "fxopt: this call of LlamaForCausalLM is not optimized, and runs its original forward: the call asks for "
        "output_hidden_states"
    ]
    assert "no call was optimized so far" in str(fxopt.report(model))


def test_a_backward_hook_that_dynamo_does_not_capture_is_named():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    model.model.layers[0].mlp.register_full_backward_hook(lambda module, inputs, outputs: None)
    model(**tiny_batch()).loss.backward()
    report = fxopt.report(model)
    if report.fallbacks:
        assert "backward hooks, which Dynamo may not capture, on model.layers.0.mlp" in str(report)
        assert not report.hits and not report.graphs


def test_a_partial_around_the_forward_is_named_and_leads_to_it():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32", prove=False)
    model.forward = functools.partial(model.forward, use_cache=False)
    model(**tiny_batch()).loss.backward()
    report = fxopt.report(model)
    assert report.forward_replaced == "wrapped by a functools.partial" and report.optimized.total() == 1


def test_hooks_registered_later_run():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    before = model(**tiny_batch()).loss
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0)
    plain = fxopt.restore(copy.deepcopy(model))
    after = model(**tiny_batch()).loss
    assert (after - plain(**tiny_batch()).loss).abs() < (after - before).abs() / 10


class OwnModule(nn.Module):
    """A model from outside transformers, whose forward knows no `use_cache`."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, tokens, labels=None):
        logits = self.head(self.embedding(tokens))
        loss = nn.functional.cross_entropy(logits.view(-1, 50), labels.view(-1))
        return {"loss": loss, "logits": logits}


def test_a_model_from_outside_transformers_trains():
    torch.manual_seed(0)
    model = OwnModule()
    tokens = torch.randint(0, 50, (3, 7))
    expected = copy.deepcopy(model).to(torch.bfloat16)(tokens, tokens)["loss"]
    loss = fxopt.optimize(model, "bf16")(tokens, labels=tokens)["loss"]
    loss.backward()
    assert (loss - expected).abs() < 0.02 and model.head.weight.grad is not None
    assert not fxopt.report(model).fallbacks


def test_a_wrapper_without_argument_names_runs_as_before():
    model = tiny_llama(num_hidden_layers=1)

    def wrapper(*args, **kwargs):
        return type(model).forward(model, *args, **kwargs)

    model.forward = wrapper
    fxopt.optimize(model, "bf16")
    assert model(tiny_batch()["input_ids"], labels=tiny_batch()["labels"]).loss.isfinite()
    assert "the call's arguments have no names" in fxopt.report(model).uncovered


@pytest.mark.parametrize("name", ["OPTConfig", "MambaConfig"])
def test_models_that_once_broke_train_alike(name):
    config = getattr(transformers, name)(
        vocab_size=307, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config.dropout = 0.0
    for layer in getattr(model.base_model, "decoder", model.base_model).layers:
        layer.dropout = 0.0
    assert_trains_alike(fxopt.optimize(model, "fp32"), tiny_batch())
    assert not fxopt.report(model).fallbacks


def test_hooks_are_counted_in_modules_of_every_kind():
    """Of a module that `torch.jit.trace` made there is no `__dict__` to look them up in."""
    linear = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(linear, torch.jit.trace(torch.nn.Linear(4, 4), torch.zeros(1, 4)), linear)
    hooked = HookedModules(model)
    assert hooked() == ()
    linear.register_forward_hook(lambda *_: None)
    linear.register_forward_pre_hook(lambda *_: None)
    assert [count for _, count in hooked()] == [1, 1]
    model[0] = torch.nn.Linear(4, 4)
    model[0].register_forward_hook(lambda *_: None)
    assert [count for _, count in hooked()] == [1, 1, 1]
    model.append(torch.nn.Linear(4, 4))
    model[-1].register_full_backward_hook(lambda *_: None)
    assert sum(count for _, count in hooked()) == 4
    model.register_forward_hook(lambda *_: None)  # runs outside of what is captured
    assert len(hooked()) == 4


def test_a_first_forward_that_installs_hooks_is_captured_with_them():
    """Transformers installs those that collect router logits in the first forward that is to return them."""
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    config = transformers.MixtralConfig(**SIZES | options | {"num_hidden_layers": 1})
    torch.manual_seed(0)
    plain = transformers.MixtralForCausalLM(config)
    model = fxopt.optimize(copy.deepcopy(plain), "fp32")
    batch = tiny_batch()
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    report = fxopt.report(model)
    assert report.optimized.total() == 1 and not report.fallbacks and not report.uncovered
    assert report.hits["rms_norm"] == 3


def test_a_model_that_installs_hooks_in_each_forward_falls_back_once():
    class Hooked(OwnModule):
        def forward(self, tokens, labels=None):
            self.head.register_forward_hook(lambda module, args, output: print(end="") or output)
            return super().forward(tokens, labels)

    model = fxopt.optimize(Hooked(), "fp32")
    tokens = torch.randint(0, 50, (3, 7))
    model(tokens, labels=tokens)["loss"].backward()
    assert fxopt.report(model).optimized.total() + fxopt.report(model).fallbacks.total() == 1


def test_process_wide_hooks_registered_later_run():
    model = fxopt.optimize(tiny_llama(), "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    batch = tiny_batch()
    model(**batch)
    calls = []
    handle = register_module_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    try:
        torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    finally:
        handle.remove()
    assert calls.count("LlamaMLP") == 4


def test_inside_a_functional_transform_the_original_runs():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32")
    batch = tiny_batch()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (), batch).loss)(parameters)
    assert fxopt.report(model).uncovered["the call is inside a torch.func transform"] == 1
    model(**batch)
    assert fxopt.report(model).hits["linear_cross_entropy"] == 1


def test_a_model_with_a_custom_gradient_trains_alike():
    """Its router's gradient is defined by a `torch.autograd.Function`, whose backward writes in place."""
    model = fxopt.optimize(tiny_causal_lm("phimoe"), "fp32")
    assert_trains_alike(model, batch_for(model), use_cache=False)
    assert fxopt.report(model).hits["linear_cross_entropy"] == 1 and not fxopt.report(model).fallbacks


def test_advice_that_is_given_once_does_not_break_the_graph():
    """GPT-2's `loss_type` is unknown to transformers, which says so between the output head and the loss."""
    model = fxopt.optimize(tiny_causal_lm("gpt2"), "bf16")
    model(**batch_for(model), use_cache=False).loss.backward()
    report = fxopt.report(model)
    assert len(report.graphs) == 1 and report.hits["linear_cross_entropy"] == 1


def test_a_quantized_weight_is_left_to_its_own_operations_but_for_the_loss():
    torch.manual_seed(0)
    model = tiny_llama()
    quantize_(model.lm_head, int8_weight_only_quantized_training())
    model = fxopt.optimize(model, "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    loss, expected = (each(**tiny_batch()).loss for each in (model, plain))
    torch.testing.assert_close(loss, expected)
    for each in (loss, expected):
        each.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad)
    assert fxopt.report(model).hits == {**LLAMA_HITS, "int8_values": 1}


def test_an_int8_head_whose_loss_is_not_fused_keeps_its_weight():
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=1)
    quantize_(model.lm_head, int8_weight_only_quantized_training())
    batch = tiny_batch()

    def probabilities(logits, labels, vocab_size, **unused):
        return torch.nn.functional.cross_entropy(
            logits.view(-1, vocab_size), logits.detach().view(-1, vocab_size).sigmoid()
        )

    model.loss_function = probabilities
    model = fxopt.optimize(model, "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    report = fxopt.report(model)
    assert "int8_values" not in report.hits and "linear_cross_entropy" not in report.hits
    (graph,) = fxopt.inspect(model).graphs
    assert not any("widened" in graph.nodes[number].operation for number in graph.after)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_when_it_computes_again(use_reentrant):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=307, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.2)).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model = fxopt.optimize(model, "fp32")
    plain = fxopt.restore(copy.deepcopy(model))
    for each in (model, plain):
        torch.manual_seed(0)
        each(**tiny_batch()).loss.backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=1e-5)
    assert fxopt.report(model).hits["layer_norm"] == 5
