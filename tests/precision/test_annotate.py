"""The policy on the eager model equals from_pretrained in the same dtype, in place."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.tiny_causal_lms import tiny_config
from fxopt.precision.annotate import annotate, parameter_precisions, policy_of
from fxopt.precision.policy import Policy, PolicyError, Selector


def float_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def assert_as_loaded(model: PreTrainedModel, folder: Path) -> None:
    """`model`, annotated, has the dtypes and values that it has when it is loaded in bfloat16."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    annotate(model, "bf16")
    expected, found = float_tensors(loaded), float_tensors(model)
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert model.dtype == model.config.dtype == loaded.config.dtype == torch.bfloat16


def test_llama_as_loaded(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    assert_as_loaded(llama, tmp_path)
    assert llama.model.rotary_emb.inv_freq.dtype == torch.float32


def test_gemma3_as_loaded(tmp_path: Path) -> None:
    """Two rotary tables stay float32, the embedding's scale does not."""
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=96, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert_as_loaded(model, tmp_path)
    assert model.model.embed_tokens.embed_scale.dtype == torch.bfloat16


def test_what_the_author_keeps_in_float32_stays(tmp_path: Path) -> None:
    """ernie4_5_moe keeps its routers, which the policy then sees as islands."""
    classes = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    if "ernie4_5_moe" not in classes:
        pytest.skip("this transformers has no ernie4_5_moe")
    config = classes["ernie4_5_moe"](
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=96, num_attention_heads=4,
        num_key_value_heads=2, moe_intermediate_size=16, moe_num_experts=4, moe_k=2, moe_layer_start_index=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert_as_loaded(model, tmp_path)
    kept = {name for name, precision in parameter_precisions(model).items() if precision.storage == torch.float32}
    assert kept and all("gate.weight" in name or "moe_statics" in name for name in kept)
    assert all(parameter_precisions(model)[name].rounding == "nearest" for name in kept)


def test_position_tables_stay(tmp_path: Path) -> None:
    """GPT-J's table of sines is no `inv_freq`, and stays float32 all the same."""
    config = GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, vocab_size=96, n_positions=32)
    model = GPTJForCausalLM(config)
    assert_as_loaded(model, tmp_path)
    tables = [buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    assert tables and all(table.dtype == torch.float32 for table in tables)


class Keeping(LlamaForCausalLM):
    _keep_in_fp32_modules_strict = ("input_layer*norm", "q_proj")


def test_patterns_of_what_stays_are_followed(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = Keeping(llama.config)
    assert_as_loaded(model, tmp_path)
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == torch.float32
    assert model.model.layers[1].input_layernorm.weight.dtype == torch.float32


def test_in_place(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    parameters = list(llama.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    llama(input_ids=tokens, labels=tokens).loss.backward()
    keys, generator = list(llama.state_dict()), torch.get_rng_state()
    assert annotate(llama, "bf16") is llama
    assert torch.equal(generator, torch.get_rng_state())
    assert all(new is old for new, old in zip(llama.parameters(), parameters, strict=True))
    assert list(llama.state_dict()) == keys
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert {p.grad.dtype for p in parameters if p.grad is not None} == {torch.bfloat16}
    before = parameters[0].clone()
    optimizer.zero_grad()
    llama(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not torch.equal(parameters[0], before)


def test_memory_shared_without_a_shared_parameter_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data
    annotate(model, "bf16")
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert model[0].weight is not model[1].weight


def test_there_and_back(llama: LlamaForCausalLM) -> None:
    annotate(llama, "bf16")
    values = [parameter.float() for parameter in llama.parameters()]
    annotate(llama, "fp32")
    assert llama.dtype == llama.config.dtype == torch.float32
    assert all(torch.equal(new, old) for new, old in zip(llama.parameters(), values, strict=True))
    assert policy_of(llama) == Policy.named("fp32")
    assert {precision.rounding for precision in parameter_precisions(llama).values()} == {"nearest"}


def test_precisions_of_a_policy_with_selectors_travel_too(llama: LlamaForCausalLM) -> None:
    annotate(llama, "bf16-8bit")
    noted = parameter_precisions(llama)
    assert (
        noted["model.norm.weight"].storage == torch.float32
        and noted["model.embed_tokens.weight"].optimizer_state == "8bit"
    )
    assert (
        parameter_precisions(copy.deepcopy(llama)) == parameter_precisions(pickle.loads(pickle.dumps(llama))) == noted
    )


def test_a_selector_that_matches_nothing_is_refused_before_any_change(llama: LlamaForCausalLM) -> None:
    policy = Policy.named("bf16").with_selectors(Selector(name="model.layers.*.nrom", storage=torch.float32))
    with pytest.raises(PolicyError, match=r"'model\.layers\.\*\.nrom' matches no parameter; nearest: 'model\.layers"):
        annotate(llama, policy)
    assert llama.dtype == torch.float32 and policy_of(llama) is None


def test_every_name_of_a_tied_weight_selects_it(llama: LlamaForCausalLM) -> None:
    annotate(llama, Policy.named("bf16").with_selectors(Selector(name="lm_head.weight", storage=torch.float32)))
    assert llama.model.embed_tokens.weight.dtype == torch.float32


def test_a_gradient_of_its_own_dtype(llama: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    policy = Policy.named("bf16").with_selectors(Selector(role="linear", gradient=torch.float32))
    annotate(llama, policy)(input_ids=tokens, labels=tokens).loss.backward()
    linear = llama.model.layers[0].mlp.up_proj.weight
    assert linear.dtype == torch.bfloat16 and linear.grad.dtype == torch.float32
    assert llama.model.norm.weight.grad.dtype == torch.bfloat16
    annotate(llama, "bf16")
    assert linear.grad.dtype == linear.grad_dtype == torch.bfloat16


def test_the_policy_travels_with_the_model(llama: LlamaForCausalLM) -> None:
    assert policy_of(llama) is None
    annotate(llama, "bf16")
    precision = Policy.named("bf16").default
    assert llama.lm_head.weight.fxopt_precision == precision
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert policy_of(twin) == Policy.named("bf16")
        assert set(parameter_precisions(twin).values()) == {precision}
        assert list(parameter_precisions(twin)) == [name for name, _ in twin.named_parameters()]


def test_a_dtype_changed_afterwards_counts_as_what_it_is(llama: LlamaForCausalLM) -> None:
    annotate(llama, "bf16").float()
    assert {p.storage for p in parameter_precisions(llama).values()} == {torch.float32}


class Mixed(nn.Module):
    """What is not to be touched beside what is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.count = nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
        self.fp8 = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("steps", torch.ones(3, dtype=torch.int64))
        self.register_buffer("inv_freq", torch.ones(3), persistent=False)


def test_any_module() -> None:
    model = annotate(Mixed(), "bf16")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "weight": torch.bfloat16,
        "count": torch.int32,
        "fp8": torch.float8_e4m3fn,
        "mean": torch.bfloat16,
        "steps": torch.int64,
        "inv_freq": torch.float32,
    }
    assert list(parameter_precisions(model)) == ["weight"]


def test_quantized_parameters_are_left_alone() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    kind = type(model[0].weight)
    annotate(model, "bf16")
    assert type(model[0].weight) is kind and model[0].weight.dtype == torch.float32
    assert model[1].weight.dtype == torch.bfloat16


def test_rounded_frequencies_are_pointed_out(llama: LlamaForCausalLM) -> None:
    llama.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"rounded to 16 bits before .*: model\.rotary_emb\.inv_freq"):
        annotate(llama, "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        annotate(llama, "bf16")


def test_a_wrapped_model(llama: LlamaForCausalLM) -> None:
    annotate(nn.Sequential(llama), "bf16")
    assert llama.model.rotary_emb.inv_freq.dtype == torch.float32
    assert llama.config.dtype == llama.dtype == torch.bfloat16


def test_a_model_that_cannot_be_built_again_is_pointed_out(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("needs a file")

    monkeypatch.setattr(type(llama), "_from_config", fail)
    with pytest.warns(UserWarning, match="cannot be built on the meta device"):
        annotate(llama, "bf16")
    assert llama.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2, device="meta"), "parameter 'weight' is on the meta device"),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), "parameter '1.weight' is lazy"),
    ],
)
def test_a_parameter_without_data_is_refused_before_any_change(model: nn.Module, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        annotate(model, "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert policy_of(model) is None


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_parameters_that_are_float32_by_accident_are_stored_as_the_policy_says(held):
    """XLNet's come from `torch.FloatTensor`, and its code fails where they stay float32 beside bfloat16."""
    config = XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=48, vocab_size=99, dropout=0.0)
    model = XLNetLMHeadModel(config).to(held)
    annotate(model, "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tokens = torch.randint(3, 99, (2, 7))
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_parameters_that_are_float32_on_purpose_stay_so():
    """Without a word in the class: the model's code casts for them."""
    config = tiny_config("hunyuan_v1_moe")
    model = annotate(AutoModelForCausalLM.from_config(config), "bf16")
    wide = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
    assert wide and all(name.endswith("mlp.gate.wg.weight") for name in wide)
