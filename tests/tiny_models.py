"""Tiny models of the real transformers classes, and batches for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# What the rules find in a `tiny_llama` called with `tiny_batch()`; on a CPU, in two bytes, the embedding as well.
LLAMA_HITS = {
    "rms_norm": 5,
    "add_rms_norm": 4,
    "swiglu": 2,
    "rope": 4,
    "linear_cross_entropy": 1,
    "causal_attention": 2,
    "grouped_query_attention": 2,
}
LLAMA_HITS_IN_BF16 = {**LLAMA_HITS, "embedding": 1}


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    """A Llama of two layers, the same weights every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options)).train()


def tiny_model(kind: str) -> PreTrainedModel:
    """A Llama-like model of another family: "mistral", "qwen2" or "llama"."""
    configs: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(configs[kind](**SIZES), dtype=torch.float32)
    return model.train()


def tiny_batch(num_rows: int = 3, length: int = 17, padding: int = 0, vocabulary: int = 307) -> dict[str, Tensor]:
    """Random tokens; the first five of each row have no label, the last `padding` of the first row are padding."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, vocabulary, (num_rows, length), generator=generator)
    labels, attention_mask = input_ids.clone(), torch.ones_like(input_ids)
    labels[:, :5] = -100
    if padding:
        labels[0, -padding:] = -100
        attention_mask[0, -padding:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
