"""One way into a model: captured by Dynamo, rewritten by passes, falling back to the original.

A model may be entered in several places, by its own forward or by that of a backbone inside it. Each has an
`OptimizedForward`, which `fxopt/entries.py` puts into the module's way; those of one model share an `Optimization`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import fx, nn
from torch.utils.checkpoint import _StopRecomputationError

from fxopt.call_warnings import look_at_call
from fxopt.deferred_logits import defer_marked_outputs
from fxopt.dynamo import (
    ISOLATED,
    TOO_MANY,
    checkpoint_eagerly,
    configured,
    frame_number,
    own_code,
    quiet,
    where_and_why,
)
from fxopt.error_lines import in_a_line
from fxopt.model_state import ModelState
from fxopt.passes.pipelines import EXACT
from fxopt.passes.separate_logits import deferred
from fxopt.precision.accumulation import UnsteppedGradients
from fxopt.precision.adapters import prepare_dora, warn_about_torchao_layers
from fxopt.precision.boundaries import has_boundaries
from fxopt.progress import announced
from fxopt.rematerialize import rematerialize
from fxopt.rewrite.pipeline import Observer, PassRecord, Pipeline
from fxopt.rewrite.prove import Prover
from fxopt.rewrite.report import GraphRecord, Report
from fxopt.rewrite.snapshot import snapshot
from fxopt.rewrite.structured_trace import trace_graph
from fxopt.training_call import (
    EXPECTED,
    LABELS,
    NOT_DIFFERENTIATED,
    HookedModules,
    as_captured,
    kind_of,
    mark_dynamic,
    named_arguments,
    why_not_covered,
)

logger = logging.getLogger("fxopt")

Backend = Literal["auto", "eager", "inductor"]


@dataclass(frozen=True)
class Settings:
    """How a model is optimized; what a copy or an unpickled model is optimized with again."""

    policy: str
    backend: Backend = "auto"
    pipeline: Pipeline | None = None
    prove: bool = True

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ValueError(f"unknown backend {self.backend!r}; known: {', '.join(get_args(Backend))}")
        if self.pipeline is not None and not isinstance(self.pipeline, Pipeline):
            raise TypeError(
                f"pipeline is a fxopt.rewrite.pipeline.Pipeline or None, got {type(self.pipeline).__name__}: for more "
                "rules or fewer passes take fxopt.passes.pipelines.EXACT.with_rules(…) or EXACT.without(…)"
            )


@dataclass(frozen=True)
class CapturedCall:
    """A call that graphs were captured for: its arguments, tensors without their values, and the modes it ran in.

    `entry` is the module that was called, by its name in the model.
    """

    arguments: dict[str, Any]
    training: bool
    grad_enabled: bool
    entry: str = ""


class Optimization:
    """What the ways into one optimized model share: how it is optimized, and what that did so far.

    A copy, or what is unpickled, has the settings and a report of its own.
    """

    def __init__(self, model: str, settings: Settings):
        self.settings = settings
        self.report = Report(model, settings.policy)
        self.prover = Prover() if settings.prove else None
        self.gradients = UnsteppedGradients()  # until an optimizer of fxopt's takes that over
        self.kinds: dict[Hashable, int] = {}  # the number of each kind of call, in the report
        self.calls: list[CapturedCall] = []  # one of each kind

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimization:
        return Optimization(self.report.model, self.settings)

    def __reduce__(self) -> Any:
        return Optimization, (self.report.model, self.settings)


class _Running(threading.local):
    """What this thread is in the middle of. Another may compile, or run another model, at the same time."""

    captured = False  # a call that is captured, or runs through its graphs: who is called inside is part of it
    originals = 0  # calls that run the original forward: who is called inside is not counted apart


_running = _Running()


def is_inside_captured_call() -> bool:
    return _running.captured


@contextlib.contextmanager
def original_throughout() -> Iterator[None]:
    """In this context models run their original code as a whole, the modules inside them included."""
    before, _running.captured = _running.captured, True
    try:
        yield
    finally:
        _running.captured = before


class OptimizedForward:
    """Runs the calls that train a module through rewritten graphs, and every other call as before.

    `replaced` is the attribute `forward` that the module's instance had before, if any; `name` is the module's in the
    model whose `optimization` this is part of.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        replaced: Any = None,
        optimization: Optimization | None = None,
        name: str = "",
    ):
        # While a model is unpickled this runs before the model has any attribute.
        self.model = model
        self.settings = settings
        self.replaced = replaced
        self.optimization = optimization or Optimization(type(model).__name__, settings)
        self.name = name
        self.original: Callable[..., Any] = type(model).forward.__get__(model) if replaced is None else replaced
        self.signature = inspect.signature(self.original)
        self._compiled: dict[Hashable, Callable[..., Any]] = {}  # by kind of call
        self._in_pieces: set[Hashable] = set()  # kinds of call whose graphs break where sizes depend on data
        self._disabled: dict[Hashable, str] = {}  # kind of call → why it fell back
        self._graphs_run: list[GraphRecord] = []  # by the call that runs now
        # The model's before the call that runs now, if that call captures.
        self._state: ModelState | None = None
        self._has_boundaries = False
        self._hooks: HookedModules | None = None
        self.observe: Observer | None = None  # sees each graph before the passes, after each, and as it runs
        self.runner: Callable[[fx.GraphModule], Callable[..., Any]] = lambda module: module.forward

    @property
    def report(self) -> Report:
        return self.optimization.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _running.captured:
            return self.original(*args, **kwargs)
        if not (args or torch.is_grad_enabled() or any(kwargs.get(name) is not None for name in LABELS)):
            with original_throughout():
                return self._run_original(args, kwargs, NOT_DIFFERENTIATED)
        call = named_arguments(self.signature, args, kwargs)
        reason = why_not_covered(self.model, call)
        if call is None:  # by a wrapper, perhaps: what it calls is looked at by itself
            if reason not in self.report.uncovered and torch.is_grad_enabled():
                logger.warning(
                    "fxopt: %s is not optimized: its forward takes *args, and %s. Give them names in its signature, or "
                    "optimize the model that it calls",
                    type(self.model).__name__,
                    reason,
                )
            return self._run_original(args, kwargs, reason)
        if reason:
            if reason not in EXPECTED and reason not in self.report.uncovered and self._is_trained():
                logger.warning(
                    "fxopt: this call of %s is not optimized, and runs its original forward: %s",
                    type(self.model).__name__,
                    reason,
                )
            with original_throughout():  # what the caller wants of the model, the modules inside it must give
                return self._run_original(args, kwargs, reason)
        captured = as_captured(self.model, self.signature, call)
        kind = kind_of(self.model, captured, self._hooks_now())
        look_at_call(self.report, self.model, call, is_first=kind not in self._compiled)
        if kind in self._disabled:
            return self._fall_back(args, kwargs, self._disabled[kind])
        return self._run_or_fall_back(kind, captured, args, kwargs)

    def _run_or_fall_back(
        self,
        kind: Hashable,
        captured: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        again: bool = False,
    ) -> Any:
        """The call through its graphs, or through the original forward where that fails.

        `again`: the original forward has just installed hooks, and the model is what it was before that call otherwise.
        """
        known_breaks = len(torch._dynamo.utils.graph_break_reasons)
        is_first, known_graphs = kind not in self._compiled, len(self.report.graphs)
        self._graphs_run.clear()
        # A first call may fail after some of its graphs have run: then the next attempt starts where this one did.
        state = ModelState(self.model) if is_first else None
        if is_first and not again:
            self.optimization.calls.append(_without_values(captured, self.model.training, self.name))
            prepare_dora(self.model)
            warn_about_torchao_layers(self.model)
        try:
            with announced(self._announcement(again) if is_first else None), quiet(is_first):
                outputs = self._run_captured(kind, captured, state)
        except _StopRecomputationError:
            raise  # a checkpoint around this call has computed again all that it needs
        except Exception as error:
            # Whatever the reason, the original must run now; if the call itself is at fault, it says so better.
            hooks = self._hooks_now()
            with original_throughout():
                outputs = self._run_original(args, kwargs, "")
            if state is not None and not again and self._hooks_now() != hooks:
                # Transformers installs the hooks that capture outputs in the first forward that is to give some.
                state.give_back()
                kind = kind_of(self.model, captured, self._hooks_now())
                return self._run_or_fall_back(kind, captured, args, kwargs, again=True)
            if is_first:  # graphs that will not run
                number = self.optimization.kinds.get((self.name, kind))
                self.report.graphs[:] = [graph for graph in self.report.graphs if graph.kind != number]
            self._disabled[kind] = in_a_line(error) + self._backward_hooks()
            self._count_fallback(self._disabled[kind])
            return outputs
        number = self.optimization.kinds[self.name, kind]
        if is_first and not any(graph.kind == number for graph in self.report.graphs):
            self._disabled[kind] = "Dynamo captured no graph"
            self._count_fallback("Dynamo captured no graph")
        elif not self._graphs_run:
            self._count_fallback(TOO_MANY)
        else:
            self.report.note_call(self.name, number, self._graphs_run)
        if len(self.report.graphs) > known_graphs:  # other parameters may be trained, or in bfloat16, than before
            self.optimization.gradients.attach_to(self.model)
        self._note_graph_breaks(known_breaks)
        return outputs

    def _run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        """The original forward, for a `reason` that is counted unless it runs inside another's."""
        if reason and not _running.originals:
            self.report.uncovered[reason] += 1
        _running.originals += 1
        try:
            return self.original(*args, **kwargs)
        finally:
            _running.originals -= 1

    def _fall_back(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        if not _running.originals:
            self.report.fallbacks[reason] += 1
        return self._run_original(args, kwargs, "")

    def _count_fallback(self, reason: str) -> None:
        if _running.originals:
            return  # whoever called has said so
        if reason not in self.report.fallbacks:
            logger.warning(
                "fxopt: this kind of call of %s is not optimized, and runs its original forward: %s\n"
                "  It trains as before. fxopt.report(model) counts such calls; if the model's code is yours, what the "
                "reason names is what to change.",
                type(self.model).__name__,
                reason,
            )
        self.report.fallbacks[reason] += 1

    def _backward_hooks(self) -> str:
        """Which modules have some, for who looks for the reason why Dynamo failed."""
        names = [
            name for name, module in self.model.named_modules() if module._backward_hooks or module._backward_pre_hooks
        ]
        return f" (there are backward hooks, which Dynamo may not capture, on {', '.join(names[:3])})" if names else ""

    def _is_trained(self) -> bool:
        """Whether this call is differentiated, and by itself: not inside another that has said so."""
        is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters())
        return is_trained and not _running.originals

    def _hooks_now(self) -> Hashable:
        if self._hooks is None:  # not while a model is unpickled
            self._hooks = HookedModules(self.model)
        return self._hooks()

    def _give_state_back(self) -> None:
        if self._state is not None:
            self._state.give_back()

    def _announcement(self, again: bool) -> str:
        first = not self.optimization.calls[1:]
        name = f"{self.report.model}{f'.{self.name}' if self.name else ''}"
        doing = "capturing and checking"
        if again:
            return f"{doing} {name} once more: its forward has installed hooks"
        return f"{doing} {name} for its first call{'' if first else ' of another kind'}"

    def capture(self, call: dict[str, Any]) -> Any:
        """Capture the graphs of `call`, in the form that `calls` has them, and run them, for who only looks at them.

        Neither falls back nor gives the model its state back. Raises what the capture raises.
        """
        known_breaks = len(torch._dynamo.utils.graph_break_reasons)
        mark_dynamic(call)
        self._graphs_run.clear()
        kind = kind_of(self.model, call, self._hooks_now())
        try:
            outputs = self._run_captured(kind, call, None)
        finally:
            self._note_graph_breaks(known_breaks)
        self.report.note_call(self.name, self.optimization.kinds[self.name, kind], self._graphs_run)
        return outputs

    def _note_graph_breaks(self, known: int) -> None:
        for graph_break in torch._dynamo.utils.graph_break_reasons[known:]:
            self.report.graph_breaks[where_and_why(graph_break)] += 1

    def why_not_covered(self, batch: Mapping[str, Any]) -> str:
        """Why calls with `batch` run the original forward, or ''."""
        return why_not_covered(self.model, named_arguments(self.signature, (), dict(batch)))

    def _run_captured(self, kind: Hashable, call: dict[str, Any], state: ModelState | None) -> Any:
        """The call through its graphs. If that fails, the model is left as it was, in `state` or before its graphs."""
        self._state = state
        try:
            with original_throughout():
                return self._through_graphs(kind, call)
        except _StopRecomputationError:
            raise
        except Exception:
            self._give_state_back()
            raise
        finally:
            self._state = None

    def _through_graphs(self, kind: Hashable, call: dict[str, Any]) -> Any:
        """The call through its graphs: with sizes that depend on data inside them, or where that fails without."""
        if kind not in self._compiled:
            self._has_boundaries = has_boundaries(self.model)
        configuration = functools.partial(configured, self._has_boundaries)
        if kind in self._in_pieces:
            with configuration():
                return self._graphs_for(kind)(self.original, call)
        num_graphs = len(self.report.graphs)
        try:
            with configuration(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
                return self._graphs_for(kind)(self.original, call)
        except Exception as error:
            whole, graphs = self._compiled.pop(kind, None), self.report.graphs[num_graphs:]
            del self.report.graphs[num_graphs:]
            self._graphs_run.clear()
            self._give_state_back()
            try:
                with configuration():
                    outputs = self._graphs_for(kind)(self.original, call)
            except Exception:
                if whole is not None:  # not the graphs' fault, it seems
                    self._compiled[kind] = whole
                    self.report.graphs[num_graphs:] = graphs
                raise
            logger.info("a call of %s is captured in pieces: %s", self.report.model, in_a_line(error))
            self._in_pieces.add(kind)
            return outputs

    def _graphs_for(self, kind: Hashable) -> Callable[..., Any]:
        """What runs calls of one kind. Each kind has a part of Dynamo's cache for itself, since that is small."""
        if kind not in self._compiled:
            kinds = self.optimization.kinds
            number = kinds.setdefault((self.name, kind), len(kinds))
            backend = functools.partial(_weakly(self._backend), number)
            self._compiled[kind] = torch.compile(own_code(_captured_call), backend=backend, **ISOLATED)
        return self._compiled[kind]

    def _backend(self, kind: int, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """What Dynamo calls for each graph of the `kind`-th kind of call."""
        if self.observe is not None:
            self.observe("captured", module)
        elif self._state is None and not self._graphs_run:  # of a kind that was captured before, and has changed since
            self._state = ModelState(self.model)
        start = time.perf_counter()
        before = snapshot(module)
        passes = (self.settings.pipeline or EXACT).run(module, self.optimization.prover, self.observe)
        wrap = defer_marked_outputs(module, on_read=_weakly(self._count_logits))
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        if self.observe is not None:
            self.observe("defer_logits", module)
        record = GraphRecord(kind, frame_number(), _tidied(passes), before, snapshot(module), elapsed_ms)
        self.report.graphs.append(record)
        trace_graph(record)
        if self.settings.backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            compiled: Any = compile_fx(module, example_inputs)
            return wrap(self._counted(compiled, record))
        # "auto" runs the rewritten graph as it is: the fxopt ops carry what there is to gain, it needs no C++
        # compiler, and the first step comes after seconds instead of minutes.
        checkpoint_eagerly(module)
        rematerialize(module)
        return wrap(self._counted(self.runner(module), record))

    def _counted(self, graph: Callable[..., Any], record: GraphRecord) -> Callable[..., Any]:
        count = _weakly(self._count_run)

        def run(*args: Any) -> Any:
            count(record)
            return graph(*args)

        return run

    def _count_run(self, record: GraphRecord) -> None:
        self._graphs_run.append(record)

    def _count_logits(self) -> None:
        self.report.logits_computed += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedForward:
        model, replaced, optimization = copy.deepcopy((self.model, self.replaced, self.optimization), memo)
        return OptimizedForward(model, self.settings, replaced, optimization, self.name)

    def __reduce__(self) -> Any:
        from fxopt.entries import enter

        return enter, (self.model, self.settings, self.replaced, self.optimization, self.name)


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object, and with it a model: what Dynamo is given it keeps for ever."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return call


def _captured_call(forward: Callable[..., Any], call: dict[str, Any]) -> Any:
    """What Dynamo traces: the model's forward, with the logits that it returns marked, in every kind of output."""
    outputs = forward(**call)
    if isinstance(outputs, dict):
        if isinstance(outputs.get("logits"), torch.Tensor):
            outputs["logits"] = deferred(outputs["logits"], outputs.get("loss") is not None)
    elif isinstance(outputs, tuple):
        has_loss = any(isinstance(value, torch.Tensor) and value.ndim == 0 for value in outputs)
        values = [
            deferred(value, has_loss) if isinstance(value, torch.Tensor) and value.ndim > 1 else value
            for value in outputs
        ]
        outputs = type(outputs)(*values) if hasattr(outputs, "_fields") else tuple(values)
    elif isinstance(getattr(outputs, "logits", None), torch.Tensor):
        marked = deferred(outputs.logits, getattr(outputs, "loss", None) is not None)
        object.__setattr__(outputs, "logits", marked)  # of a frozen dataclass, too
    return outputs


def _without_values(call: dict[str, Any], training: bool, entry: str) -> CapturedCall:
    arguments = {
        name: torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }
    return CapturedCall(arguments, training, torch.is_grad_enabled(), entry)


def _tidied(passes: list[PassRecord]) -> list[PassRecord]:
    """Without the near misses whose place another rule took."""
    for record in passes:
        outcome = record.outcome
        outcome.near_misses = [
            miss
            for miss in outcome.near_misses
            if not any(node._erased and "fxopt_rule" in node.meta for node in miss.nodes)
        ]
    return passes
