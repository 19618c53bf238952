"""transformers' Trainer: the policy's optimizer from its arguments, and what precision costs, in its log."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fxopt.precision.annotate import parameter_precisions
from fxopt.precision.monitor import Monitor, monitor
from fxopt.precision.optimizer import Optimizer
from fxopt.precision.param_group import rounding_and_state

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer

    class Trainer(_Trainer):
        """transformers' Trainer with the policy's optimizer; built when it is first asked for."""


# What `TrainingArguments.optim` names, as options of `fxopt.optimizer`.
_OPTIONS_OF_OPTIM: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "adamw_torch_xla": {},
    "adamw_torch_npu_fused": {},
    "adamw_torch_8bit": {"optimizer_state": "8bit"},
    "adamw_torch_4bit": {"optimizer_state": "4bit"},
    "sgd": {"kind": "sgd"},
    "adafactor": {"kind": "adafactor"},
}


def optimizer_cls_and_kwargs(model: nn.Module, args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
    """`fxopt.Optimizer`, and its options as `args` says: for the Trainer's argument of the same name.

    That is for where the Trainer refuses `optimizers=`, as under FSDP; the parameters, and which of them decay, are the
    Trainer's to choose. `max_grad_norm` stays with the Trainer.

    Raises ValueError for an `args.optim` that `fxopt.optimizer` does not know.
    """
    options = _options_of(args)
    # What FSDP makes of a parameter has forgotten its precision: what all of them share is said here.
    chosen = [rounding_and_state(precision) for precision in parameter_precisions(model).values()]
    shared = chosen[0] if chosen and all(each == chosen[0] for each in chosen) else {}
    betas = args.adam_beta1, args.adam_beta2
    return Optimizer, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, **shared, **options}


def _options_of(args: TrainingArguments) -> dict[str, Any]:
    name = str(getattr(args.optim, "value", args.optim))
    if name not in _OPTIONS_OF_OPTIM:
        raise ValueError(
            f"optim={name!r} is none that fxopt.optimizer knows ({', '.join(_OPTIONS_OF_OPTIM)}): choose one of these "
            "in TrainingArguments, or pass the optimizer of your choice as `optimizers=` and store the model in fp32"
        )
    options = dict(_OPTIONS_OF_OPTIM[name])
    if name == "sgd":
        given = dict(pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair)
        if float(given.pop("dampening", 0)):
            raise ValueError("optim_args: fxopt's SGD has no dampening; leave it out, or set it to 0")
        options["momentum"] = float(given.get("momentum", 0))
        options["nesterov"] = given.get("nesterov", "").lower() in ("true", "1", "yes")
    if name == "adafactor":
        warnings.warn(
            "optim='adafactor' takes torch's formula, in which each update is scaled by the root mean square of its "
            "parameter, and not transformers', in which it is not: it needs a larger learning rate",
            stacklevel=4,
        )
    return options


class PolicyOptimizerMixin:
    """Gives a Trainer the optimizer that the model's policy asks for, built from its TrainingArguments.

    `class MyTrainer(PolicyOptimizerMixin, SFTTrainer)` does it for TRL's; for transformers' own it is done: `Trainer`
    in this module. learning_rate, adam_beta1, adam_beta2, adam_epsilon and weight_decay (with the Trainer's choice of
    what does not decay) have their meaning; so has `optim`, as far as `fxopt.optimizer` knows it: AdamW, SGD and
    Adafactor. An optimizer that is passed as `optimizers=` or `optimizer_cls_and_kwargs=` wins.

    Raises ValueError, when the optimizer is made, for an `optim` that `fxopt.optimizer` does not know.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, over `self.model` or the model that is passed."""
        trainer: Any = self
        parent: Any = super()
        if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
            return parent.create_optimizer(*args, **kwargs)
        model = next((given for given in (*args, kwargs.get("model")) if given is not None), trainer.model)
        trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs(model, trainer.args)
        try:
            return parent.create_optimizer(*args, **kwargs)
        finally:
            trainer.optimizer_cls_and_kwargs = None  # the arguments may be others the next time


def __getattr__(name: str) -> Any:
    if name != "Trainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import Trainer as plain  # which loads accelerate and more

    members = {"__module__": __name__, "__doc__": "transformers' Trainer with the policy's optimizer."}
    globals()["Trainer"] = type("Trainer", (PolicyOptimizerMixin, plain), members)
    return globals()["Trainer"]


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
