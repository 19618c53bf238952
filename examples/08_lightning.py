"""Lightning: the model inside a LightningModule, and the optimizer that its policy asks for.

Leave `precision` at "32-true": the policy has chosen the precision.
"""

from typing import Any

import lightning
import torch
from tiny import tiny_llama, token_rows

import fxopt


class Module(lightning.LightningModule):
    """Trains `model` on its own loss."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return fxopt.optimizer(self.model, lr=1e-2)


module = Module(fxopt.optimize(tiny_llama(), "bf16"))
loader = torch.utils.data.DataLoader(token_rows(64), batch_size=4)
trainer = lightning.Trainer(max_epochs=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
trainer.fit(module, loader)
print(fxopt.report(module))
