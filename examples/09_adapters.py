"""PEFT: LoRA on a base in 8 bits, trained, and merged into it again.

`adapter_config` lets PEFT's ordinary layers serve int8 weights; without it PEFT takes its layers for torchao's weights,
which train but cannot merge. On a bf16 base it is not needed.
"""

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, token_rows

import fxopt
from fxopt.integrations.peft import adapter_config

base = fxopt.optimize(tiny_llama(), "int8")  # one byte for each parameter of a matrix
lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "down_proj"])
model = get_peft_model(base, adapter_config(lora))
optimizer = fxopt.optimizer(model, lr=1e-2)

rows = token_rows(16)
batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
for step in range(8):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
print(fxopt.report(model))

merged = model.merge_and_unload()
with torch.no_grad():
    print(f"merged: loss {merged(**batch).loss.item():.3f}")
