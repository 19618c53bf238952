"""fxopt in a plain PyTorch loop: optimize the model, take the optimizer that its policy asks for, train as always.

A tiny Llama with random weights keeps this to seconds; put ``AutoModelForCausalLM.from_pretrained(...)`` in its place.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = fxopt.optimize(LlamaForCausalLM(config), "bf16")  # the same object, now at 2 bytes per parameter
optimizer = fxopt.optimizer(model, lr=1e-2)

tokens = torch.randint(0, config.vocab_size, (4, 32))
for step in range(10):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

print(fxopt.report(model))
