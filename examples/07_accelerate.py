"""Accelerate: prepared as ever, with gradients accumulated over four batches.

Leave `mixed_precision` at "no": the policy has chosen the precision.
"""

import torch
from accelerate import Accelerator
from tiny import tiny_llama, token_rows

import fxopt

accelerator = Accelerator(gradient_accumulation_steps=4)
model = fxopt.optimize(tiny_llama(), "bf16")
optimizer = fxopt.optimizer(model, lr=1e-2)
loader = torch.utils.data.DataLoader(token_rows(64), batch_size=4)

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
accelerator.print(f"loss {loss.item():.3f}")
accelerator.print(fxopt.report(model))
