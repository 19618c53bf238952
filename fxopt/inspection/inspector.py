"""`fxopt.inspect`: what the passes do to a model's graphs, found on fake tensors, without weights or a training run."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from transformers import PretrainedConfig

from fxopt.capture import CapturedCall, Optimization, OptimizedForward, Settings
from fxopt.error_lines import in_a_line
from fxopt.inspection.configurations import check_batch, check_sizes, sequence_for
from fxopt.inspection.diff import Conditions, Graph, GraphDiff, call_in_words
from fxopt.inspection.fake_models import checkpoint_activations, fake_model, labelled_batch, source_of
from fxopt.inspection.record import Recorder
from fxopt.passes.pipelines import EXACT
from fxopt.precision.annotate import policy_of
from fxopt.precision.footprint import footprint
from fxopt.precision.instance_methods import original_forwards
from fxopt.precision.policy import Policy
from fxopt.rewrite.pipeline import Pipeline
from fxopt.rewrite.report import Report

OnProgress = Callable[[str, int, int], None]


def inspect_optimized(
    forward: OptimizedForward, prove: bool = True, on_progress: OnProgress | None = None
) -> GraphDiff:
    """The graphs of an optimized model that has run: its calls are captured once more, on fake tensors.

    Where that cannot be, since the model's code looks at values, the report's graphs are shown, without costs.
    """
    if not forward.report.graphs:
        raise ValueError(
            f"no graph of this {forward.report.model} has been captured yet; call it once with labels: "
            "model(input_ids=…, labels=…)"
        )
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = original_forwards(copy.deepcopy(forward.model))
    settings = Settings(forward.settings.policy, pipeline=forward.settings.pipeline, prove=prove)
    with mode:
        calls = [_with_fake_tensors(call) for call in _calls_within(forward)]
    diff = _inspect(model, settings, calls, mode, on_progress)
    if not _same_rewrites(diff, forward.report):
        reason = "the graphs of the real calls are shown: on fake tensors the capture found others"
        diff = _diff(forward.model, forward.report, Recorder(reason), calls)
    return diff


def inspect_model(
    model: nn.Module | PretrainedConfig | str | Path,
    policy: str | Policy | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
    training: bool = True,
    checkpointing: bool = False,
    pipeline: Pipeline | None = None,
    prove: bool = True,
    on_progress: OnProgress | None = None,
) -> GraphDiff:
    """What `policy` and `pipeline` would do to a model that is not optimized, or to a configuration."""
    check_sizes(batch_size=batch_size)
    source, config = source_of(model)
    sequence_length = sequence_for(config, sequence_length)
    check_batch(batch_size, sequence_length)
    fake, mode = fake_model(source, policy)
    chosen = cast(Policy, policy_of(fake))
    fake.train(training)
    if checkpointing:
        checkpoint_activations(fake)
    with mode:
        arguments = labelled_batch(batch_size, sequence_length)
    call = CapturedCall(arguments, training, grad_enabled=training)
    settings = Settings(chosen.name, pipeline=pipeline, prove=prove)
    return _inspect(fake, settings, [call], mode, on_progress)


def _inspect(
    model: nn.Module,
    settings: Settings,
    calls: list[CapturedCall],
    mode: FakeTensorMode,
    on_progress: OnProgress | None = None,
) -> GraphDiff:
    recorder = Recorder()
    passes = (settings.pipeline or EXACT).passes
    num_steps = len(passes) + 3  # the capture, and the graph before them, after each, and at the end
    if on_progress is not None:
        recorder.on_stage = lambda name, number: on_progress(f"measuring: {name}", number + 1, num_steps)
    optimization = Optimization(type(model).__name__, settings)
    entries: dict[str, OptimizedForward] = {}
    for call in calls:
        model.train(call.training)
        if on_progress is not None:
            on_progress("capturing the graph", 0, num_steps)
        if call.entry not in entries:
            module = model.get_submodule(call.entry)
            replaced = module.__dict__.get("forward")
            forward = OptimizedForward(module, settings, replaced, optimization, call.entry)
            forward.observe, forward.runner = recorder, recorder.runner
            entries[call.entry] = forward
        recorder.call = call_in_words(call.training, _is_checkpointed(model), *_sizes(call))
        try:
            with _without_garbage_collection(), mode, torch.set_grad_enabled(call.grad_enabled):
                entries[call.entry].capture(dict(call.arguments))
        except Exception as error:  # anything that a model's code does with values, which fake tensors have not
            optimization.report.fallbacks[in_a_line(error, with_place=True)] += 1
    return _diff(model, optimization.report, recorder, calls)


def _diff(model: nn.Module, report: Report, recorder: Recorder, calls: list[CapturedCall]) -> GraphDiff:
    return GraphDiff(
        model=report.model,
        policy=report.policy,
        conditions=_conditions(model, calls),
        graphs=tuple(_numbered(recorder.graph_of(record) for record in report.graphs)),
        graph_breaks=dict(report.graph_breaks),
        fallbacks=dict(report.fallbacks),
    )


def _numbered(graphs: Iterable[Graph]) -> Iterator[Graph]:
    """With frames from 0 on: what number Dynamo has come to is this process's."""
    frames: dict[int, int] = {}
    for graph in graphs:
        yield replace(graph, frame=frames.setdefault(graph.frame, len(frames)))


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _sizes(call: CapturedCall) -> tuple[int | None, int | None]:
    """Rows, and tokens in each."""
    ids = next((v for v in call.arguments.values() if isinstance(v, torch.Tensor) and v.ndim > 1), None)
    return (None, None) if ids is None else (int(ids.shape[0]), int(ids.shape[1]))


def _conditions(model: nn.Module, calls: list[CapturedCall]) -> Conditions:
    batch_size, sequence_length = next((sizes for call in calls if None not in (sizes := _sizes(call))), (None, None))
    return Conditions(
        batch_size=batch_size,
        sequence_length=sequence_length,
        training=any(call.training for call in calls),
        checkpointing=_is_checkpointed(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        parameter_bytes=footprint(model).weights,
        versions={name: _version(name) for name in ("fxopt", "torch", "transformers")},
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _same_rewrites(diff: GraphDiff, report: Report) -> bool:
    """Whether each piece of code that really ran was found again, with as many rewrites."""
    latest = {(graph.kind, graph.frame): graph.hits().total() for graph in report.graphs}
    return sum(len(graph.rewrites) for graph in diff.graphs) >= sum(latest.values())


def _calls_within(forward: OptimizedForward) -> Iterator[CapturedCall]:
    """The calls of a module and of those inside it, told by their names in it."""
    for call in forward.optimization.calls:
        if not forward.name or f"{call.entry}.".startswith(f"{forward.name}."):
            yield replace(call, entry=call.entry.removeprefix(forward.name).removeprefix("."))


def _with_fake_tensors(call: CapturedCall) -> CapturedCall:
    arguments = {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    return CapturedCall(arguments, call.training, call.grad_enabled, call.entry)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """The graphs of many layers are many objects, all in use: looking through them takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
