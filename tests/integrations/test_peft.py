"""PEFT on a base that fxopt has prepared, in bfloat16 and int8, against the same adapters on a plain base."""

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Embedding, Linear
from torch import Tensor, nn
from torchao.prototype.quantized_training import int8_weight_only_quantized_training
from torchao.quantization import quantize_
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt import Policy, Selector
from fxopt.float64 import float64_backward, float64_throughout
from fxopt.integrations.peft import Int8Layer, adapter_config, save_adapter
from fxopt.precision.adapters import prepare_dora, warn_about_torchao_layers
from fxopt.precision.annotate import annotate
from fxopt.precision.int8_weight import dequantized
from fxopt.precision.parameter_storage import is_int8

BF16 = torch.bfloat16
ONE_ROUNDING = torch.finfo(BF16).eps / 2
ATTENTION = ["q_proj", "v_proj"]
ALL = [*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETUPS: dict[str, tuple[dict[str, Any], bool]] = {  # options of LoraConfig, whether embeddings are tied
    "linear": ({"target_modules": ALL, "use_rslora": True}, False),
    "head": ({"target_modules": [*ATTENTION, "lm_head"]}, False),
    "head, tied": ({"target_modules": [*ATTENTION, "lm_head"]}, True),
    "embedding": ({"target_modules": [*ATTENTION, "embed_tokens"]}, False),
    "DoRA": ({"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True}, False),
    "saved head": ({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, False),
    "saved embedding, tied": ({"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}, True),
    "saved both, tied": ({"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "tokens": ({"target_modules": ATTENTION, "trainable_token_indices": [3, 5, 9]}, False),
    "tokens, tied": ({"target_modules": ATTENTION, "trainable_token_indices": [3, 5, 9]}, True),
    "PiSSA": ({"target_modules": ATTENTION, "init_lora_weights": "pissa"}, False),
    "OLoRA": ({"target_modules": ATTENTION, "init_lora_weights": "olora"}, False),
}
BATCHES = [torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")


def base(tied: bool = False) -> LlamaForCausalLM:
    """Weights that bfloat16 can hold; norms that are not all ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() == 2 else parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(BF16))
    return model.train()


def plain_base(tied: bool, like: nn.Module) -> LlamaForCausalLM:
    """The base in bfloat16, without fxopt, with the values that the int8 weights of `like` show."""
    model = base(tied)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.to(BF16).model.rotary_emb.inv_freq = frequencies  # as from_pretrained(dtype=...) leaves them
    with torch.no_grad():
        for parameter, right in zip(model.parameters(), like.parameters(), strict=True):
            parameter.copy_(values(right, BF16))
    return model


def values(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantized(parameter, dtype) if is_int8(parameter) else parameter.detach().to(dtype)


def lora(**options: Any) -> LoraConfig:
    return adapter_config(LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))


def with_adapters(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(model, lora(**options))  # type: ignore[arg-type]


def adapted(policy: str, setup: str, *, optimize: bool = False) -> tuple[PeftModel, PeftModel]:
    """Adapters, some steps from where they start, on an annotated or optimized base and on a plain one."""
    options, tied = SETUPS[setup]
    prepared = fxopt.optimize(base(tied), policy) if optimize else annotate(base(tied), policy)
    plain = plain_base(tied, prepared)
    ours, theirs = with_adapters(prepared, **options), with_adapters(plain, **options)
    generator = torch.Generator().manual_seed(7)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and a.requires_grad == b.requires_grad
        with torch.no_grad():
            if not is_int8(a):
                assert torch.equal(a.float(), b.float()) or (policy == "int8" and "init_lora_weights" in options)
                a.add_(0.02 * torch.randn(a.shape, generator=generator) * a.requires_grad)
                b.copy_(a)
            else:  # PiSSA writes to the base, before it is frozen: within a step of what the exact values give
                assert ((values(a, torch.float32) - b).abs() <= 2 * a.scale.float()[:, None]).all()
                b.copy_(values(a, BF16))
    return ours.train(), theirs.train()


def outcome(model: nn.Module, tokens: Tensor, *, wide: bool = False) -> dict[str, Tensor]:
    """The loss and every gradient, by name."""
    model.zero_grad()
    if wide:
        with float64_throughout():
            loss = model(input_ids=tokens, labels=tokens).loss
            float64_backward(loss)
    else:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    training = model.training
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens).logits
    model.train(training)
    return found


def truth_of(theirs: PeftModel, ours: PeftModel) -> PeftModel:
    """The plain model in float64, with exactly the values that `ours` holds."""
    truth: PeftModel = copy.deepcopy(theirs).double()
    for parameter, right in zip(truth.parameters(), ours.parameters(), strict=True):
        parameter.data.copy_(values(right, torch.float64))
    return truth


def assert_trains_as_plain(ours: PeftModel, theirs: PeftModel, batches: list[Tensor] = BATCHES) -> None:
    """Loss and gradients by the accuracy rule, all together and each by itself, where luck counts for more.

    Nor may they be too large or too small on average, which 1 % would be.
    """
    exact_ours, exact_theirs = truth_of(theirs, ours), truth_of(theirs, theirs)
    runs = [
        (outcome(ours, t), outcome(theirs, t), outcome(exact_ours, t, wide=True), outcome(exact_theirs, t, wide=True))
        for t in batches
    ]
    assert list(runs[0][0]) == list(runs[0][1])
    squares, parts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name in runs[0][0]:
        found, plain, truth, plain_truth = (torch.stack([run[i][name] for run in runs]).double() for i in range(4))
        pairs, size = ((found, truth), (plain, plain_truth)), truth.norm()
        errors = torch.stack([(x - y).norm() / size for x, y in pairs])
        assert errors[0] <= 1.5 * errors[1] + ONE_ROUNDING, f"{name}: {errors[0]:.2e}, plain {errors[1]:.2e}"
        squares += errors**2 / len(runs[0][0])
        parts += torch.stack([(x - y).mul(y).sum() / size**2 for x, y in pairs]) / len(runs[0][0])
    error, plain_error = squares.sqrt()
    assert error <= 1.1 * plain_error + ONE_ROUNDING / 2, f"{error:.2e}, plain {plain_error:.2e}"
    assert parts[0].abs() <= 1.1 * parts[1].abs() + ONE_ROUNDING, f"larger by {parts[0]:.2e}, plain {parts[1]:.2e}"


def assert_same_logits(ours: nn.Module, theirs: nn.Module, truth: nn.Module) -> None:
    right = logits(truth, BATCHES[0])
    error, plain_error = ((logits(m, BATCHES[0]) - right).norm() / right.norm() for m in (ours, theirs))
    assert error <= 1.1 * plain_error + ONE_ROUNDING, f"logits: {error:.2e}, plain {plain_error:.2e}"


@pytest.mark.parametrize(
    ("policy", "setup"),
    [
        *((policy, setup) for policy in ("bf16", "int8") for setup in SETUPS),
        *(("bf16-islands", setup) for setup in ("linear", "DoRA", "saved both, tied")),
    ],
)
def test_adapters_train_as_on_a_plain_base(policy: str, setup: str) -> None:
    ours, theirs = adapted(policy, setup)
    assert_trains_as_plain(ours, theirs, BATCHES[:2])
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    truth = truth_of(theirs, ours)
    with ours.disable_adapter(), theirs.disable_adapter(), truth.disable_adapter():
        assert_same_logits(ours, theirs, truth)


@pytest.mark.parametrize("setup", ["linear", "head, tied", "embedding", "DoRA", "tokens, tied", "saved both, tied"])
@pytest.mark.parametrize("policy", ["bf16", "int8"])
@pytest.mark.parametrize("safe", [False, True])
def test_adapters_are_merged_to_the_nearest_that_the_base_can_hold(policy: str, setup: str, safe: bool) -> None:
    ours, theirs = adapted(policy, setup)
    truth = truth_of(theirs, ours)
    before = {name: values(p, torch.float32).clone() for name, p in ours.named_parameters()}
    tables = {name: p for name, p in ours.named_parameters() if is_int8(p)}
    for model in (ours, theirs, truth):
        model.merge_adapter(safe_merge=safe)
    for (name, merged), right, plain in zip(
        ours.named_parameters(), truth.parameters(), theirs.parameters(), strict=True
    ):
        if is_int8(merged):
            assert tables[name] is merged
            # PEFT rounds to bfloat16: what it adds to a table, puts there or adds safely, and DoRA's factors.
            error = (values(merged, torch.float64) - right).abs() / merged.scale.double()[:, None]
            rounded = 0.05 if not safe and setup in ("linear", "head, tied", "saved both, tied") else 0.9
            assert error.max() < 0.5 + rounded, name
        else:
            assert torch.equal(merged.float(), plain.float()), name
    for model in (ours, theirs):
        model.unmerge_adapter()
    for name, parameter in ours.named_parameters():
        step = parameter.scale.float()[:, None] if is_int8(parameter) else 2**-7 * before[name].abs().max()
        assert ((values(parameter, torch.float32) - before[name]).abs() <= 2.6 * step).all(), name


@pytest.mark.parametrize("setup", ["linear", "saved both, tied", "embedding"])
def test_a_merged_int8_model_is_int8_and_trains(setup: str) -> None:
    ours, _ = adapted("int8", setup)
    adapted_logits = logits(ours, BATCHES[0])
    merged: Any = ours.merge_and_unload()
    error = (logits(merged, BATCHES[0]) - adapted_logits).norm() / adapted_logits.norm()
    assert error < 0.03
    assert all(is_int8(p) for n, p in merged.named_parameters() if "_proj" in n)
    merged.requires_grad_(True)
    fxopt.annotate(merged)
    optimizer = fxopt.optimizer(merged, lr=2e-3)
    losses = []
    for _ in range(4):
        losses.append(outcome(merged, BATCHES[0])["loss"].item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("policy", ["bf16", "int8"])
def test_adapters_are_saved_and_loaded_bit_by_bit(policy: str, setup: str, tmp_path: Path) -> None:
    options, tied = SETUPS[setup]
    ours, _ = adapted(policy, setup)
    save_adapter(ours, tmp_path)
    if "init_lora_weights" in options and policy == "int8":
        return  # PiSSA and OLoRA change the base, in int8 by chance
    config = adapter_config(LoraConfig.from_pretrained(tmp_path, inference_mode=False))
    loaded = PeftModel.from_pretrained(annotate(base(tied), policy), tmp_path, is_trainable=True, config=config)
    for (name, a), b in zip(ours.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(values(a, torch.float32), values(b[1], torch.float32)), name
    assert torch.equal(logits(loaded, BATCHES[0]), logits(ours, BATCHES[0]))


def test_only_what_is_saved_is_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = adapted("int8", "saved head")
    given: dict[str, Any] = {}
    save = PeftModel.save_pretrained

    def note(*args: Any, **options: Any) -> None:
        given.update(options)
        save(*args, **options)

    monkeypatch.setattr(PeftModel, "save_pretrained", note)
    save_adapter(ours, tmp_path)
    plain = [name for name, p in ours.named_parameters() if is_int8(p) and not is_int8(given["state_dict"][name])]
    assert plain == ["base_model.model.lm_head.modules_to_save.default.weight"]


def test_only_int8_layers_are_chosen_for_and_nothing_of_it_is_saved(tmp_path: Path) -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(16, 16), nn.Embedding(8, 16), Conv1D(16, 16), Other(16, 16))
    annotate(model[:3], "int8")
    config = adapter_config(LoraConfig(target_modules=["0", "1", "2", "3"], r=2, init_lora_weights=False))
    assert [isinstance(layer, Int8Layer) for layer in model] == [True, True, True, False]
    adapted_model = get_peft_model(model, config)
    assert [type(layer) for layer in adapted_model.get_base_model()] == [Linear, Embedding, Linear, Linear]
    assert [is_int8(layer.weight) for layer in adapted_model.get_base_model()] == [True, True, True, False]
    assert adapted_model.get_base_model()[2].fan_in_fan_out
    ids = torch.arange(8)
    for forward in (lambda m: m[0](m[1](ids)), lambda m: m[2](m[1](ids)), lambda m: m[3](m[1](ids).float())):
        forward(adapted_model.get_base_model()).sum().backward()
    config.save_pretrained(str(tmp_path))
    assert "custom" not in (tmp_path / "adapter_config.json").read_text()
    assert LoraConfig.from_pretrained(str(tmp_path)).r == 2
    assert isinstance(model[0], Linear) and copy.deepcopy(config)._custom_modules == config._custom_modules
    pickle.loads(pickle.dumps(config))


def test_pefts_layers_for_torchaos_weights_are_told_of_once() -> None:
    model = annotate(base(), "int8")
    with pytest.warns(UserWarning, match="merge"):  # PEFT's own, of each layer
        model = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"4 adapters .*get_peft_model\(model, fxopt.integrations.peft.adapter_config"):
        annotate(model, "int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warn_about_torchao_layers(model)
        warn_about_torchao_layers(with_adapters(annotate(base(), "int8"), **SETUPS["linear"][0]))
    quantize_(plain := nn.Sequential(nn.Linear(16, 16)), int8_weight_only_quantized_training())
    with pytest.warns(UserWarning, match="merge"):
        plain = get_peft_model(plain, LoraConfig(r=4, target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warn_about_torchao_layers(plain)  # the user's own


@pytest.mark.parametrize("setup", ["linear", "DoRA", "saved both, tied"])
def test_a_second_adapter_on_an_int8_base(setup: str) -> None:
    ours, theirs = adapted("int8", setup)
    for model in (ours, theirs):
        torch.manual_seed(11)
        model.add_adapter("two", lora(**SETUPS[setup][0], init_lora_weights=False))
    for name in ("two", "default"):
        for model in (ours, theirs):
            model.set_adapter(name)
        assert_trains_as_plain(ours, theirs, BATCHES[:2])


def test_steps_follow_plain_ones_and_leave_the_int8_base_alone() -> None:
    ours, theirs = adapted("int8", "saved head")
    frozen = {name: p for name, p in ours.named_parameters() if not p.requires_grad}
    before = {name: values(p, torch.float32).clone() for name, p in frozen.items()}
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizers = fxopt.optimizer(ours, lr=2e-3, weight_decay=0.0), torch.optim.AdamW(trained, 2e-3, weight_decay=0.0)
    history = []
    for _ in range(3):
        losses = [outcome(model, BATCHES[0])["loss"].item() for model in (ours, theirs)]
        assert abs(losses[0] - losses[1]) < 0.003 * losses[1]
        history.append(losses[0])
        for optimizer in optimizers:
            optimizer.step()
    assert history[0] - 0.2 > history[-1]
    assert all(torch.equal(values(p, torch.float32), before[name]) for name, p in frozen.items())


def test_an_adapted_int8_model_keeps_no_widened_weight_for_the_backward() -> None:
    ours, _ = adapted("int8", "linear")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(input_ids=BATCHES[0], labels=BATCHES[0])
    shapes = {tuple(p.shape) for p in ours.parameters() if is_int8(p)}
    assert {tuple(t.shape) for t in kept if is_int8(t)} <= shapes
    assert not [t for t in kept if type(t) is Tensor and tuple(t.shape) in shapes - {(64, 64)}]


# Optimized -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "setup"), [("bf16", "DoRA"), ("int8", "linear"), ("int8", "tokens, tied")])
def test_optimizing_before_the_adapters(policy: str, setup: str) -> None:
    ours, theirs = adapted(policy, setup, optimize=True)
    assert_trains_as_plain(ours, theirs)
    found = fxopt.report(ours)
    assert not found.fallbacks and len(found.graphs) == 1
    fused = {"rms_norm": 5, "add_rms_norm": 4, "rope": 4, "swiglu": 2, "linear_cross_entropy": int(setup != "DoRA")}
    assert {op: found.hits.get(op, 0) for op in fused} == fused
    if setup == "DoRA":  # on the head: its logits are a sum
        assert any(miss.rule == "FuseLinearCrossEntropy" and miss.reason for miss in found.near_misses)


@pytest.mark.parametrize("policy", ["bf16", "int8"])
def test_what_shows_dora_to_dynamo_copies_pickles_and_is_left_out_of_checkpoints(policy: str) -> None:
    ours, theirs = adapted(policy, "DoRA")
    names, before = list(ours.state_dict()), logits(ours, BATCHES[0])
    prepare_dora(ours)
    prepare_dora(ours)
    assert list(ours.state_dict()) == names
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for model in (ours, copy.deepcopy(ours), torch.load(file, weights_only=False)):
        base = model.get_base_model().lm_head.base_layer
        assert base.dequantize() is base.weight and base.W_q.device == base.weight.device
        assert torch.equal(logits(model, BATCHES[0]), before)
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    merged_logits = logits(merged, BATCHES[0])
    assert (merged_logits - before).norm() < 0.03 * before.norm()
    again = with_adapters(merged, **SETUPS["DoRA"][0])
    assert (logits(again, BATCHES[0]) - merged_logits).norm() < 0.01 * merged_logits.norm()  # new ones add nothing
    again.add_adapter("two", lora(**SETUPS["DoRA"][0]))
    assert_trains_as_plain(ours, theirs, BATCHES[:2])


def test_optimizing_after_the_adapters_with_a_frozen_base_in_int8() -> None:
    policy = Policy.named("bf16").with_selectors(Selector(name="*.base_layer.weight", storage=torch.int8))
    ours, theirs = (with_adapters(plain_base(False, base()), **SETUPS["linear"][0]) for _ in range(2))
    fxopt.optimize(ours, policy)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.data = b.data.to(BF16)
            b.copy_(values(a, BF16))
            if a.requires_grad:
                a.add_(0.01)
                b.copy_(a)
    names = {name for name, p in ours.named_parameters() if is_int8(p)}
    assert names == {name for name, p in ours.named_parameters() if "base_layer" in name}
    assert_trains_as_plain(ours, theirs, BATCHES[:3])
    assert not fxopt.report(ours).fallbacks


def test_a_policy_that_leaves_most_of_a_model_wide_says_so() -> None:
    model = with_adapters(base().to(BF16), **SETUPS["linear"][0])
    with pytest.warns(UserWarning, match=r"16 frozen parameters.* stay in bfloat16\. .*before the adapters are added"):
        annotate(model, "int8")
