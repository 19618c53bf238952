"""Bytes held, measured on the tensors themselves."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from fxopt.precision.annotate import annotate
from fxopt.precision.footprint import footprint
from fxopt.precision.optimizer import optimizer as make_optimizer


@pytest.mark.parametrize(("policy", "expected"), [("bf16", (2, 2, 4)), ("fp32", (4, 4, 8)), ("mixed", (4, 4, 8))])
def test_weights_gradients_states(policy: str, expected: tuple[int, ...], llama: LlamaForCausalLM) -> None:
    """torch's AdamW keeps its states in the parameter's dtype."""
    annotate(llama, policy)
    optimizer = torch.optim.AdamW(llama.parameters())
    tokens = torch.ones(1, 3, dtype=torch.int64)
    llama(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    held = footprint(llama, optimizer)
    n = sum(parameter.numel() for parameter in llama.parameters())
    steps = 4 * len(list(llama.parameters()))
    assert held.num_parameters == n
    assert (held.weights, held.gradients, held.optimizer - steps) == tuple(n * each for each in expected)
    assert f"{held.bytes_per_parameter:.2f} B/parameter" in str(held)


@pytest.mark.parametrize(
    ("policy", "release_gradients", "expected"),
    [
        ("mixed", False, 16), ("bf16", False, 12), ("bf16", True, 10), ("bf16-islands", True, 10),
        ("bf16-8bit", False, 6.04), ("bf16-8bit", True, 4.04), ("int8", True, 3.05),
    ],
)  # fmt: skip
def test_bytes_per_parameter_in_training(policy: str, release_gradients: bool, expected: float) -> None:
    """Weights, gradients and states together, of the real tensors after real steps."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, vocab_size=2048, num_attention_heads=4
    )
    model = annotate(LlamaForCausalLM(config), policy)
    optimizer = make_optimizer(model, lr=1e-3, release_gradients=release_gradients)
    tokens = torch.arange(64)[None]
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    held = footprint(model, optimizer)
    assert held.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert held.bytes_per_parameter == pytest.approx(expected, rel=0.01), held
    assert bool(held.gradients) is not release_gradients


def test_int8_counts_data_and_scales_and_shared_memory_once(llama: LlamaForCausalLM) -> None:
    annotate(llama, "int8")
    rows = sum(p.shape[0] for p in llama.parameters() if p.dim() == 2)
    matrices = sum(p.numel() for p in llama.parameters() if p.dim() == 2)
    norms = sum(p.numel() for p in llama.parameters() if p.dim() == 1)
    assert footprint(llama).weights == matrices + 2 * rows + 4 * norms
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data
    assert footprint(model).weights == 64


def test_llama_1b_without_its_weights() -> None:
    """The article's figures: 2.47 GB against 4.94 GB."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=128256, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    weights = {}
    for policy in ("bf16", "mixed", "bf16-islands", "int8"):
        with FakeTensorMode():
            weights[policy] = footprint(annotate(LlamaForCausalLM(config), policy)).weights
    assert weights["bf16"] == 2_471_628_800 and weights["mixed"] == 4_943_257_600
    assert weights["bf16-islands"] < 1.0001 * weights["bf16"]
    assert weights["int8"] < 1.002 * weights["bf16"] / 2
