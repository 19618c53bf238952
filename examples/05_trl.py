"""TRL: SFT with the policy's optimizer. DPO, KTO, GRPO and reward trainers take the mixin in the same way.

From 1.15 on, TRL computes log-probabilities from the backbone's output by itself: fxopt leaves it that, and optimizes
the backbone. TRL turns `bf16` on where nothing is said, which would cast beside the policy.
"""

from datasets import Dataset
from tiny import sentence, tiny_llama, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

import fxopt
from fxopt.integrations.transformers import PolicyOptimizerMixin


class Trainer(PolicyOptimizerMixin, SFTTrainer):
    """SFTTrainer, whose optimizer rounds as the model's policy says."""


model = fxopt.optimize(tiny_llama(), "bf16")
arguments = SFTConfig(
    "runs/trl", max_steps=8, learning_rate=1e-2, bf16=False, logging_steps=4, save_strategy="no", report_to=[]
)
data = Dataset.from_list([{"text": sentence(row)} for row in range(32)])
Trainer(model, arguments, train_dataset=data, processing_class=tiny_tokenizer()).train()
print(fxopt.report(model))
