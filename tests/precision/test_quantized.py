"""torchao's int8 weights, int8 products and float8 products in real models."""

import copy
import io
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fxopt.precision.annotate import annotate, parameter_precisions
from fxopt.precision.int8_weight import Int8Weight, dequantized
from fxopt.precision.parameter_storage import is_int8
from fxopt.precision.policy import FLOAT8, Policy, PolicyError, Selector
from fxopt.precision.quantized import is_swapped, quantize_parameter
from tests.training import assert_same_parameters

BF16, INT8 = torch.bfloat16, torch.int8


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def test_a_tied_table_is_one_int8_tensor(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    parameters = list(llama.parameters())
    annotate(llama, "int8")
    assert all(new is old for new, old in zip(llama.parameters(), parameters, strict=True))
    table = llama.model.embed_tokens.weight
    assert llama.lm_head.weight is table and is_int8(table) and isinstance(table, nn.Parameter)
    precisions = parameter_precisions(llama)
    assert list(precisions) == [name for name, _ in llama.named_parameters()]
    assert {precisions[name].storage for name, p in llama.named_parameters() if p.dim() == 2} == {INT8}
    loss_of(llama, tokens).backward()
    assert type(table.grad) is Tensor and table.grad.dtype == BF16


def test_int8_trains_and_its_state_dict_continues_bit_by_bit(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    annotate(llama, "int8").train()

    def steps(model: nn.Module, count: int) -> list[float]:
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
            losses.append(loss_of(model, tokens).item())
            optimizer.step()
        return losses

    assert steps(llama, 15)[-1] < 3.0
    file = io.BytesIO()
    torch.save(llama.state_dict(), file)
    file.seek(0)
    resumed = annotate(LlamaForCausalLM(llama.config), "int8").train()
    resumed.load_state_dict(torch.load(file))
    assert steps(llama, 3) == steps(resumed, 3)
    for a, b in zip(llama.parameters(), resumed.parameters(), strict=True):
        if isinstance(a, Int8Weight):
            assert torch.equal(a.int_data, b.int_data) and torch.equal(a.scale, b.scale)


def test_an_int8_model_goes_where_it_is(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    """What Dynamo or anyone else refers to weakly cannot be swapped, as torch's `_apply` does to what is quantized."""
    annotate(llama, "int8").gradient_checkpointing_enable()
    refer = [weakref.ref(parameter) for parameter in llama.parameters()]
    table = llama.lm_head.weight
    assert llama.to("cpu").lm_head.weight is table and llama.model.embed_tokens.weight is table
    assert torch.equal(copy.deepcopy(llama).cpu()(tokens).logits, llama(tokens).logits)
    with pytest.warns(UserWarning, match="became other objects"):
        assert llama.to(torch.float32).lm_head.weight.scale.dtype == torch.float32
    assert llama.lm_head.weight is llama.model.embed_tokens.weight and len(refer) == len(list(llama.parameters()))


def test_int8_weights_go_through_distributed_checkpoints(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    annotate(llama, "int8")
    right = copy.deepcopy(llama)
    checkpoint.save(llama.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = annotate(LlamaForCausalLM(llama.config), "int8").state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    llama.load_state_dict(state)
    assert_same_parameters(llama, right)


def test_back_and_forth_keeps_shape_and_notes(llama: LlamaForCausalLM) -> None:
    annotate(llama, "int8")
    table = llama.lm_head.weight
    table.note = "mine"  # type: ignore[attr-defined]
    values = dequantized(table, torch.float32)
    annotate(llama, "fp32")
    assert torch.equal(llama.lm_head.weight, values) and not hasattr(table, "int_data")
    annotate(llama, "int8")
    assert llama.lm_head.weight is table and table.note == "mine"  # type: ignore[attr-defined]
    assert torch.equal(dequantized(table, torch.float32), values)


def test_what_is_no_matrix_stays_and_is_pointed_out() -> None:
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=96, head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with pytest.warns(
        UserWarning, match=r"2 of \d+ parameters stay .*mlp\.experts.*: torchao's int8 weights are whole"
    ):
        annotate(model, "int8")
    assert model.model.layers[0].mlp.experts.down_proj.fxopt_precision.storage == BF16


def test_int8_weights_of_the_users_own_are_left_alone(tokens: Tensor) -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.LayerNorm(32))
    quantize_parameter(model, model[0].weight, BF16)
    held = model[0].weight.int_data
    annotate(model, "fp32")
    assert is_int8(model[0].weight) and model[0].weight.int_data is held
    assert model[0].weight.dtype == BF16 and list(parameter_precisions(model)) == ["1.weight", "1.bias"]


# Frozen and adapted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "frozen", "trained"),
    [("mixed", BF16, torch.float32), ("fp32", BF16, torch.float32), ("bf16", BF16, BF16), ("int8", BF16, BF16)],
)
def test_frozen_weights_are_neither_widened_nor_quantized(
    policy: str, frozen: torch.dtype, trained: torch.dtype, llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(annotate(llama, "bf16"), adapters)  # type: ignore[arg-type]
    base = dict(llama.named_parameters())["model.layers.0.self_attn.q_proj.base_layer.weight"]
    before = base.detach().clone()
    annotate(model, policy)
    assert base.dtype == frozen and not is_int8(base) and torch.equal(base, before)
    loss_of(model, tokens).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    if policy != "int8":  # whose adapters are matrices
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    logits = model.eval()(tokens).logits.float()
    merged = model.merge_and_unload()(tokens).logits.float()
    assert (logits - merged).norm() < 0.03 * logits.norm()


def test_a_selector_that_says_frozen_quantizes_them(llama: LlamaForCausalLM, tokens: Tensor) -> None:
    llama.model.layers[0].mlp.requires_grad_(False)
    annotate(llama, Policy.named("int8").with_selectors(Selector(name="model.layers.0.mlp.*", storage=INT8)))
    assert is_int8(llama.model.layers[0].mlp.up_proj.weight)
    loss_of(llama, tokens).backward()


# Products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [INT8, FLOAT8])
@pytest.mark.parametrize("storage", [BF16, torch.float32])
def test_products_are_quantized_and_undone(
    compute: torch.dtype, storage: torch.dtype, llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    layer = llama.model.layers[0].mlp.up_proj
    exact = llama(tokens).logits
    plain = annotate(llama, "bf16")(tokens).logits
    policy = Policy.named("bf16").with_selectors(Selector(role="linear", compute=compute, storage=storage))
    annotate(llama, policy, emulate=True)
    quantized = llama(tokens).logits
    assert llama.model.layers[0].mlp.up_proj is layer and is_swapped(layer) and isinstance(layer, nn.Linear)
    error, plain_error = ((x - exact).norm() / exact.norm() for x in (quantized, plain))
    assert 1.2 * plain_error < error < 0.1
    loss_of(llama, tokens).backward()
    assert layer.weight.grad.dtype == layer.weight.dtype == storage
    assert torch.equal(annotate(llama, "bf16")(tokens).logits, plain)
    assert not is_swapped(layer) and set(vars(layer)) == set(vars(llama.lm_head))


def test_hardware_without_float8_names_a_preset_that_works(llama: LlamaForCausalLM) -> None:
    with pytest.raises(PolicyError, match=r"cpu has no float8 products .*: use the policy 'bf16-8bit'.* emulate=True"):
        annotate(llama, "fp8")
    assert llama.dtype == torch.float32 and not is_swapped(llama.lm_head)


def test_layers_that_torchao_does_not_know_stay_in_bfloat16() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32))
    with pytest.warns(UserWarning, match=r"4 of \d+ parameters stay .*float8_e4m3fn products are for nn.Linear"):
        annotate(model, "fp8", emulate=True)
    assert FLOAT8 not in {precision.compute for precision in parameter_precisions(model).values()}
