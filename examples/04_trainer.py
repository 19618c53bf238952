"""transformers' Trainer: `fxopt.integrations.transformers.Trainer` is it, with the optimizer that the policy asks for.

TRL's trainers take the same mixin: see 05_trl.py. Leave `bf16=` and `fp16=` off: the policy has chosen the precision.
"""

from tiny import tiny_llama, token_rows
from transformers import TrainingArguments

import fxopt
from fxopt.integrations.transformers import Trainer

model = fxopt.optimize(tiny_llama(), "bf16")
arguments = TrainingArguments(
    "runs/trainer",
    max_steps=8,
    learning_rate=1e-2,
    gradient_accumulation_steps=2,  # summed as exactly as one large batch
    eval_strategy="steps",
    eval_steps=4,  # evaluation wants the loss alone, and pays for no logits
    logging_steps=4,
    save_strategy="no",
    report_to=[],
)
Trainer(model, arguments, train_dataset=token_rows(), eval_dataset=token_rows(8)).train()
print(fxopt.report(model))
