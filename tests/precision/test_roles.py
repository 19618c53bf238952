"""Roles come from the modules that hold a parameter."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig

from fxopt.precision.roles import Role, parameter_roles

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "num_attention_heads": 4}


def roles_by_leaf(model: nn.Module) -> dict[str, Role]:
    """'q_proj.weight' → role: names without the layer."""
    return {".".join(name.split(".")[-2:]): role for name, role in parameter_roles(model).items()}


def test_llama(llama: LlamaForCausalLM) -> None:
    roles = parameter_roles(llama)
    assert list(roles) == [name for name, _ in llama.named_parameters()]
    assert roles["model.embed_tokens.weight"] is Role.EMBEDDING  # tied: the head has no parameter of its own
    assert roles["model.norm.weight"] is roles["model.layers.1.input_layernorm.weight"] is Role.NORM
    assert roles["model.layers.0.self_attn.q_proj.weight"] is Role.LINEAR
    assert Role.OTHER not in roles.values()


def test_untied_head_and_biases() -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True)
    roles = roles_by_leaf(LlamaForCausalLM(config))
    assert roles["lm_head.weight"] is Role.OUTPUT_HEAD
    assert roles["embed_tokens.weight"] is Role.EMBEDDING
    assert roles["q_proj.bias"] is Role.BIAS


def test_mixture_of_experts() -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    roles = parameter_roles(AutoModelForCausalLM.from_config(config))
    routers = [name for name, role in roles.items() if role is Role.ROUTER]
    experts = [name for name in roles if "experts" in name]
    assert routers and all("gate" in name for name in routers)
    assert experts and all(roles[name] is Role.LINEAR for name in experts)


def test_gpt2() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32))
    roles = parameter_roles(model)
    assert roles["transformer.wte.weight"] is roles["transformer.wpe.weight"] is Role.EMBEDDING
    assert roles["transformer.h.0.attn.c_attn.weight"] is Role.LINEAR
    assert roles["transformer.h.0.attn.c_attn.bias"] is Role.BIAS
    assert roles["transformer.h.0.ln_1.bias"] is Role.NORM


class Scaled(nn.Module):
    """A module of no known kind around known ones, its head tied to its embedding without any getter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embedding = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=True)
        self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_any_module() -> None:
    assert parameter_roles(Scaled()) == {
        "scale": Role.OTHER,
        "embedding.weight": Role.EMBEDDING,
        "norm.weight": Role.NORM,
        "norm.bias": Role.NORM,
        "head.bias": Role.BIAS,
    }
    assert parameter_roles(nn.Linear(2, 2)) == {"weight": Role.LINEAR, "bias": Role.BIAS}
