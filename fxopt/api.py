"""The front door: every public function, read in one go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from fxopt.arguments import require_module
from fxopt.capture import Backend, OptimizedForward, Settings
from fxopt.entries import find_entry, optimize_entries, replacement_of
from fxopt.inspection.diff import GraphDiff
from fxopt.inspection.inspector import inspect_model, inspect_optimized
from fxopt.precision.annotate import annotate, policy_of
from fxopt.precision.instance_methods import original_forwards
from fxopt.precision.optimizer import Optimizer
from fxopt.precision.optimizer import optimizer as _optimizer
from fxopt.precision.policy import Policy
from fxopt.precision.stepping import stepped_by
from fxopt.rewrite.pipeline import Pipeline
from fxopt.rewrite.report import Report
from fxopt.verification import Verification
from fxopt.verification import verify as _verify

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PretrainedConfig

ModelT = TypeVar("ModelT", bound=nn.Module)


def optimize(
    model: ModelT,
    policy: str | Policy | None = None,
    *,
    backend: Backend = "auto",
    pipeline: Pipeline | None = None,
    prove: bool = True,
    emulate: bool = False,
) -> ModelT:
    """Prepare `model` for training, in place, and return it.

    Its parameters are stored as `policy` says, and calls that train it run through graphs that `pipeline` has
    rewritten: calls with `labels`, and those that are differentiated, whether the model is called or a Hugging Face
    model inside it, such as its backbone. Everything else, generation, saving, copying, the training loop, stays as it
    was; so does the result of a call, except that it holds no key-value cache and computes its logits when a value of
    them is read. Calling it again, with another policy or other options, starts over from the original forward.

    Args:
        policy: the name of a preset (`fxopt.policies()`, or "auto") or a `Policy`. None: the model's own, from an
            earlier call or from `fxopt_policy.json` in the folder that it was loaded from; "bf16" where it has none.
        backend: what runs the rewritten graph. "eager" runs it node by node; "inductor" compiles it further (slow
            to start, needs a C++ compiler on a CPU); "auto" chooses.
        pipeline: the passes to run; `fxopt.passes.pipelines.EXACT` if None.
        prove: whether each rewrite is checked against the code that it replaces.
        emulate: compute float8 products in wider arithmetic where the hardware has no float8.

    Raises:
        TypeError: `model` is not a module.
        PolicyError: the policy is unknown, or cannot be applied to a parameter of this model.
    """
    require_module("optimize", model)
    settings = Settings("", backend, pipeline, prove)  # wrong options are refused before anything is changed
    annotate(model, policy, emulate=emulate)
    settings = replace(settings, policy=cast(Policy, policy_of(model)).name)
    optimize_entries(model, settings)
    return model


def restore(model: ModelT) -> ModelT:
    """Give `model` its original forward back, in place. Its parameters keep the policy's dtypes."""
    require_module("restore", model)
    original_forwards(model)
    return model


def report(model: nn.Module) -> Report:
    """What optimizing `model` did so far, also if it is wrapped since. Graphs are captured by the first training call.

    Raises ValueError if the model is not optimized, or holds several that are.
    """
    require_module("report", model)
    forward = _optimized_forward(model)
    found = forward.report
    found.forward_replaced = replacement_of(forward)
    if (stepped := stepped_by(forward.model)) is not None:
        found.optimizer, found.optimizer_warning = stepped.optimizer, stepped.warning
    return found


def verify(model: nn.Module, *batches: Mapping[str, Any]) -> Verification:
    """Loss and every gradient of an optimized model on `batches`, against its original forward and against float64.

    The more batches, the less a comparison is a matter of luck. The model's parameters, buffers, gradients and random
    state are as before when this returns. Raises ValueError for a batch that runs the original forward, such as one
    without labels, and where there is no batch.
    """
    require_module("verify", model)
    return _verify(_optimized_forward(model), batches)


def inspect(
    model: nn.Module | PretrainedConfig | str | Path,
    policy: str | Policy | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
    training: bool = True,
    checkpointing: bool = False,
    pipeline: Pipeline | None = None,
    prove: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> GraphDiff:
    """The graphs of a model before the passes, after each and after all, as data that can be printed and saved.

    Found on fake tensors: no weights are read, nothing is trained, and 70 billion parameters take less than a gigabyte.
    An optimized model that has run shows the calls that it ran. It has its own options; others are refused.

    Args:
        model: a model, optimized or not; a configuration; or the name of one: a model on the Hub, a well-known model
            such as "Llama-3.2-1B", a model type, a folder or a JSON file.
        policy: the policy to inspect it under; None as in `optimize`.
        batch_size, sequence_length: of the call, in rows and tokens; 1 and 2048, or the most that the model takes.
        training: whether to inspect the training call with its backward, or the loss of an evaluation.
        checkpointing: whether activations are computed again in the backward.
        pipeline: the passes to run; `fxopt.passes.pipelines.EXACT` if None.
        prove: whether rewrites are proven, each distinct one once, on small real inputs.
        on_progress: called before each step with what it is, its number, and how many there are; anew for each graph.

    Raises:
        ValueError: an optimized model that has not run yet, or options for one; a sequence that is too long; no such
            model (`UnknownModelError`).
        PolicyError: the policy is unknown, or does not fit.
    """
    if isinstance(model, nn.Module) and (forward := find_entry(model)) is not None:
        asked = (policy, batch_size, sequence_length, training, checkpointing, pipeline)
        if asked != (None, 1, None, True, False, None):
            raise ValueError(
                "an optimized model is inspected in the calls that it ran, under its own policy and pipeline: leave "
                "the options out, or inspect the configuration instead, fxopt.inspect(model.config, …)"
            )
        return inspect_optimized(forward, prove, on_progress)
    return inspect_model(
        model,
        policy,
        batch_size=batch_size,
        sequence_length=sequence_length,
        training=training,
        checkpointing=checkpointing,
        pipeline=pipeline,
        prove=prove,
        on_progress=on_progress,
    )


def optimizer(model: nn.Module, lr: float | torch.Tensor = 1e-3, **options: Any) -> Optimizer:
    """The optimizer that the model's policy asks for; see `fxopt.precision.optimizer.optimizer`."""
    return _optimizer(model, lr, **options)


def _optimized_forward(model: nn.Module) -> OptimizedForward:
    """The optimized forward of `model`, or of the one model that it wraps (PEFT, DDP, …)."""
    forward = find_entry(model)
    if forward is None:
        raise ValueError(f"this {type(model).__name__} is not optimized; call fxopt.optimize(model) first")
    return forward
