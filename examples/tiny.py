"""A tiny Llama with random weights, a tokenizer of numbered words, and sentences: so that examples take seconds.

In your own script, put `AutoModelForCausalLM.from_pretrained(...)`, `AutoTokenizer.from_pretrained(...)` and your data
in their place.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def tiny_llama() -> LlamaForCausalLM:
    """Two layers of width 64 over 256 tokens, ready to be trained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).train()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The words w4 to w255, and four special tokens."""
    words = [*SPECIAL.values(), *(f"w{number}" for number in range(4, 256))]
    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **SPECIAL)


def sentence(start: int, length: int = 20) -> str:
    """Words at equal distances: something that can be learned."""
    return " ".join(f"w{4 + (7 * start + 13 * place) % 250}" for place in range(length))


def token_rows(num_rows: int = 32, length: int = 20) -> list[dict[str, torch.Tensor]]:
    """Sentences as a Trainer takes them: `input_ids` and `labels`, each (length,) int64."""
    encoded = tiny_tokenizer()([sentence(row, length) for row in range(num_rows)], return_tensors="pt").input_ids
    return [{"input_ids": row, "labels": row} for row in encoded]
