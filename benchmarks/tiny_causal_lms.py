"""A tiny model of every type in transformers' causal-LM registry, built from nothing but its configuration class.

A configuration says which of its numbers are widths, which count layers and which count heads by how it names them;
`SIZES` has the names that occur. What a type needs beyond that is in `EXCEPTIONS`, with the reason.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 320
WIDTH = 64
HEADS = 4
MAX_LAYERS = 8

# The first pattern that a field's name matches gives its value, if that is smaller.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size_per_layer_input|(.*_)?vocab_size(_base)?", VOCABULARY),
    (
        r"(mm_|out_|output_|decoder_|attention_|projector_|backbone_)?hidden_size(_global)?|d_model|n_embd|dim|emb(ed)?_dim",
        WIDTH,
    ),
    (r"(input_|output_)?embedding_(size|dim)|word_embed_proj_dim|hidden_dim|lru_width|ple_embed_dim", WIDTH),
    (r"hidden_size_per_layer_input|router_hidden_size", 16),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|d_ff|n_inner|d_inner|.*ffn_hidden_size|feed_forward_size|mlp_dim", 96),
    (r"(index_|linear_|swa_)?(num_attention_heads|n_heads?|num_heads|attention_heads|head_num)", HEADS),
    (r"(encoder|decoder|num_encoder|num_decoder)_attention_heads|linear_num_value_heads", HEADS),
    (r"(swa_)?num_key_value_heads|n_kv_heads|num_kv_heads|linear_num_key_heads|num_query_groups", HEADS // 2),
    (r"(swa_|index_|global_|linear_|linear_key_|linear_value_|attention_)?head_(dim|size)", WIDTH // HEADS),
    (r"kv_channels|d_kv|d_head|qk_(nope|rope)_head_dim|v_head_dim|rotary_dim", WIDTH // HEADS),
    (r"qk_head_dim", WIDTH // HEADS * 2),
    (r"num_(routed_|local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"n_group|num_expert_group", 2),
    (r".*lora_rank|hc_lowrank|laurel_rank|adapter_rank|d_rel", 8),
    (r"mamba_num_heads|mamba_n_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim|(ssm_)?state_size|mamba_d_state|.*dt_rank|time_step_rank", 16),
    (r"chunk_size|mamba_chunk_size|attention_chunk_size", 16),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_(source|target)_positions)", 128),
    (r"(sliding_window|window_size|attention_window_size|sliding_window_size|local_attention)", 8),
    (r".*drop.*|.*jitter.*", 0.0),
)
# Each token takes all experts. A choice between nearly equal ones is a matter of rounding, and with another expert
# everything behind it is another number: no error could be measured.
CHOSEN_EXPERTS = re.compile(r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|topk_group")
LAYERS = re.compile(r"num_(hidden_)?(layers|blocks)|n_layers?|(num_)?(encoder|decoder)_layers|num_layers_per_stack")

_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 4}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "output_gate_type": "sigmoid",
}
# What a type needs beside its sizes: mostly fields whose defaults do not make a model.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 4},
    "dots1": _ROUTED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "hunyuan_v1_moe": {"num_experts": 4},
    "longcat_flash": {"moe_topk": 8},
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 128},
    "phimoe": {"num_experts_per_tok": 2},  # its router knows no other number
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "xmod": {"default_language": "en_XX"},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "reformer": {"axial_pos_embds": False},
    "zamba": {
        "num_hidden_layers": 8,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},  # it allows no other number
}


def tiny_causal_lm(model_type: str) -> PreTrainedModel:
    """The registry's model for `model_type`, with few and small layers: float32, training, the same every time."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    if model_type.startswith("musicgen"):
        config = config.decoder  # the registry's class for these is the decoder alone
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        model: PreTrainedModel = model_class(config)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.train()


def tiny_config(model_type: str) -> PretrainedConfig:
    """A configuration of `model_type` with all its kinds of layers, as few and as small as can be."""
    config_class = CONFIG_MAPPING[model_type]
    exceptions = EXCEPTIONS.get(model_type, {})
    default = config_class()
    for num_layers in range(2, MAX_LAYERS + 1):
        config = config_class(**_merged(_shrunk(default, num_layers), exceptions))
        if _layer_kinds(config) >= _layer_kinds(default):
            break
    return config


def _shrunk(config: PretrainedConfig, num_layers: int) -> dict[str, Any]:
    """The fields of `config` that must change, those of the configurations inside it included."""
    changed: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            changed[name] = {"model_type": value.model_type, **_shrunk(value, num_layers)}
        elif name == "is_decoder":
            changed[name] = True
        elif name == "head_dim" and value is None:
            changed[name] = WIDTH // HEADS
        elif CHOSEN_EXPERTS.fullmatch(name) and value is not None:
            changed[name] = min(2, getattr(config, "n_group", None) or 1) if name == "topk_group" else 4
        elif isinstance(value, int | float) and not isinstance(value, bool):
            small = _small(name, value, num_layers)
            if small != value:
                changed[name] = type(value)(small)
    heads = vars(config).get("num_attention_heads")
    if heads is not None and heads == vars(config).get("num_key_value_heads"):
        changed["num_key_value_heads"] = HEADS
    return changed


def _small(name: str, value: float, num_layers: int) -> float:
    if LAYERS.fullmatch(name):
        return num_layers
    if name.endswith(("token_id", "token_index")):
        return min(value, VOCABULARY - 1)
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    return min(size, value) if value > 0 else value


def _merged(fields: dict[str, Any], exceptions: dict[str, Any]) -> dict[str, Any]:
    nested = {
        name: _merged(fields[name], value)
        for name, value in exceptions.items()
        if isinstance(value, dict) and isinstance(fields.get(name), dict)
    }
    return {**fields, **exceptions, **nested}


def _layer_kinds(config: PretrainedConfig) -> set[Any]:
    text = config.get_text_config(decoder=True)
    kinds = set()
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        kinds |= {(name, kind) for kind in getattr(text, name, None) or ()}
    return kinds


def batch_for(
    model: PreTrainedModel, num_rows: int = 2, length: int = 17, seed: int = 1, padding: int = 0
) -> dict[str, Tensor]:
    """Random tokens; the first four of each row have no label, and the last `padding` of the first are padding."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    input_ids = torch.randint(5, vocabulary - 20, (num_rows, length), generator=generator)
    labels = input_ids.clone()
    labels[:, :4] = -100
    attention_mask = torch.ones_like(input_ids)
    if padding:
        labels[0, -padding:], attention_mask[0, -padding:] = -100, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
