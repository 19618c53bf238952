"""A loop of one's own for preferences (DPO), with log-probabilities that are computed without any logits.

`fxopt.token_log_probs` takes the output of a call without labels. Source of the loss: Rafailov et al., "Direct
Preference Optimization", arXiv:2305.18290.
"""

import copy

import torch
from tiny import tiny_llama, token_rows
from torch.nn.functional import logsigmoid

import fxopt

model = fxopt.optimize(tiny_llama(), "bf16")
reference = copy.deepcopy(model).eval().requires_grad_(False)
optimizer = fxopt.optimizer(model, lr=1e-3)

rows = [row["input_ids"] for row in token_rows(16)]
chosen, rejected = torch.stack(rows[:8]), torch.stack(rows[8:])
tokens = torch.cat([chosen, rejected])
labels = tokens.clone()
labels[:, :6] = -100  # the prompt


def log_probs(of: torch.nn.Module) -> torch.Tensor:
    """Of each answer: (16,), its tokens' log-probabilities added up."""
    return fxopt.token_log_probs(of(input_ids=tokens), labels).log_prob.sum(-1)


with torch.no_grad():
    before = log_probs(reference)
for step in range(8):
    better, worse = (log_probs(model) - before).chunk(2)
    loss = -logsigmoid(0.1 * (better - worse)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}, margin {(better - worse).mean().item():.2f}")
print(fxopt.report(model))
