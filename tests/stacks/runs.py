"""One short run of a training stack, with and without fxopt: what each step's loss and the first gradients were."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fxopt
from fxopt.rewrite.report import Report
from tests.tiny_models import LLAMA_HITS, tiny_llama

# What the rules find in the backbone: the loss aside, which some stacks compute by themselves.
BACKBONE_HITS = {op: n for op, n in LLAMA_HITS.items() if op != "linear_cross_entropy"}
ATTENTION = {"causal_attention", "grouped_query_attention", "interval_attention"}  # padding decides which


@dataclass
class Run:
    """The loss of each step, the gradients at the first, and, of an optimized model, the report."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    report: Report | None = None


@contextmanager
def first_gradients(model: nn.Module, run: Run) -> Iterator[None]:
    """Within, the first step of any optimizer leaves the gradients of `model` in `run`."""

    def note(*_: Any) -> None:
        if not run.gradients:
            run.gradients = {_plain(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _plain(name: str) -> str:
    for part in ("_orig_mod.", "module."):
        name = name.replace(part, "")
    return name


def both(train: Callable[[nn.Module], list[float]], make: Callable[[], nn.Module] = tiny_llama) -> tuple[Run, Run]:
    """Of a plain model and of the same one optimized, in fp32. `train(model)` returns the losses of its steps."""
    runs = []
    for prepare in (lambda model: model, functools.partial(fxopt.optimize, policy="fp32")):
        torch.manual_seed(0)
        model = prepare(make())
        run = Run()
        with first_gradients(model, run):
            torch.manual_seed(1)
            run.losses = train(model)
        runs.append(run)
    runs[1].report = fxopt.report(model)
    return runs[0], runs[1]


# Of a short run, for the Trainer and for TRL's.
SHORT: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "disable_tqdm": True,
}


def losses_of(trainer: Any) -> list[float]:
    """Trains, and returns the loss of each step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_alike(
    plain: Run, optimized: Run, *, loss_is_fused: bool = False, reads_logits: bool = False, checkpointed: bool = False
) -> None:
    """The same losses and gradients to float32's rounding, all fusions of a direct call, and no logits for nothing."""
    assert len(plain.losses) == len(optimized.losses) > 0
    for mine, theirs in zip(optimized.losses, plain.losses, strict=True):
        assert abs(mine - theirs) <= 1e-3 * max(abs(theirs), 0.01), (optimized.losses, plain.losses)
    assert plain.gradients and optimized.gradients.keys() == plain.gradients.keys()
    size = max(float(g.norm()) for g in plain.gradients.values())
    for name, gradient in plain.gradients.items():
        error = float((optimized.gradients[name] - gradient).norm())
        assert error <= 1e-3 * float(gradient.norm()) + 1e-5 * size, name
    report = optimized.report
    assert report is not None and not report.fallbacks, report
    expected = {op: n for op, n in BACKBONE_HITS.items() if op not in ATTENTION}
    if checkpointed:  # the sum at the end of a layer and the norm at the start of the next are in two bodies
        expected["add_rms_norm"] = 2
    hits = {op: n for op, n in report.hits.items() if op in expected}
    assert hits == expected, report
    assert sum(report.hits.get(op, 0) for op in ("causal_attention", "interval_attention")) >= 2, report
    assert report.hits.get("linear_cross_entropy", 0) == int(loss_is_fused), report
    assert (report.logits_computed > 0) == reads_logits, report
    assert report.optimized.total() >= len(optimized.losses)
