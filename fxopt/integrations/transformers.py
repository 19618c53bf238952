"""transformers' Trainer: what precision costs, in its log."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fxopt.precision.monitor import Monitor, monitor


class MonitorCallback(TrainerCallback):
    """Watches the Trainer's optimizer with `fxopt.monitor`, and adds its summary to each line of the log.

    The numbers appear in `state.log_history` and in what is printed. The integrations of `report_to` run before the
    user's callbacks, and do not get them.

    samples: as in `fxopt.monitor`. save: a JSON file, written at the end of training.
    `monitor` is the Monitor, once training has begun.
    """

    def __init__(self, samples: int = 256, save: str | Path | None = None) -> None:
        self.monitor: Monitor | None = None
        self._samples, self._save = samples, save

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to watch. Under `bf16=True`, float32 weights are cast to bfloat16."""
        compute = torch.bfloat16 if args.bf16 else None
        self.monitor = monitor(kwargs["optimizer"], kwargs.get("model"), samples=self._samples, compute=compute)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the summary to the line, and to its entry in `log_history`."""
        if self.monitor is None or "loss" not in (kwargs.get("logs") or {}):
            return
        summary = self.monitor.summary()
        kwargs["logs"].update(summary)
        state.log_history[-1].update(summary)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops watching, and saves what was asked for."""
        if self.monitor is not None:
            self.monitor.close()
            if self._save is not None:
                self.monitor.save(self._save)
