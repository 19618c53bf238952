"""The optimized forward of a model: captured by Dynamo, rewritten by passes, falling back to the original.

An optimized model differs from the original in one instance attribute, `forward`, an `OptimizedForward`. Its class,
its parameters and its state-dict keys are untouched, and nothing outside the model is patched.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch._guards import CompileContext
from torch._inductor.exc import InductorError

from fxopt.deferred_logits import defer_marked_outputs, reveal_on_touch
from fxopt.passes.pipelines import EXACT
from fxopt.passes.separate_logits import deferred
from fxopt.rematerialize import rematerializing
from fxopt.rewrite.pipeline import PassRecord, Pipeline
from fxopt.rewrite.prove import Prover
from fxopt.rewrite.report import GraphRecord, Report
from fxopt.rewrite.snapshot import snapshot

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


class OptimizedForward:
    """Runs the calls that train a model through rewritten graphs, and every other call as before."""

    def __init__(self, model: nn.Module, settings: Settings, replaced: Any = None):
        # While a model is unpickled this runs before the model has any attribute.
        self.model = model
        self.settings = settings
        self.replaced = replaced  # an instance attribute `forward` that was there before, if any
        self.report = Report(type(model).__name__, settings.policy)
        self._disabled = ""
        functools.update_wrapper(self, type(model).forward)
        self.__wrapped__ = type(model).forward.__get__(model) if replaced is None else replaced
        self._signature = inspect.signature(self.__wrapped__)
        self._prover = Prover() if settings.prove else None
        self._compiled: Callable[..., Any] | None = None

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that this one stands for."""
        return self.__wrapped__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)  # somebody compiles around us: let them see the model
        call = self._named(args, kwargs)
        reason = self._disabled or self._not_covered(call)
        if reason:
            self.report.uncovered[reason] += 1
            return self.original(*args, **kwargs)
        try:
            return reveal_on_touch(self._run(call))
        except _COMPILER_ERRORS as error:
            # Whatever the reason, the original must run now; if the call itself is at fault, it says so better.
            outputs = self.original(*args, **kwargs)
            self._disabled = _explained(error)
            self.report.fallbacks[self._disabled] += 1
            logger.warning("%s is not optimized: %s", self.report.model, self._disabled)
            return outputs

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        call = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                call.update(call.pop(name, {}))
        return call

    def _not_covered(self, call: dict[str, Any]) -> str:
        """Why a call is not one that trains the model on its loss, or ''."""
        labels = call.get("labels")
        if not isinstance(labels, torch.Tensor):
            return "the call has no labels"
        if labels.numel() == 0:
            return "the batch is empty"
        for name in ("use_cache", "output_hidden_states", "output_attentions"):
            if call.get(name):
                return f"the call asks for {name}"
        if call.get("past_key_values") is not None:
            return "the call continues a cache"
        config = getattr(self.model, "config", None)
        if call.get("return_dict", getattr(config, "return_dict", True)) is False:
            return "the call asks for a tuple"
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(config, name, False):
                return f"the model's config asks for {name}"
        return ""

    def _run(self, call: dict[str, Any]) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(_own_code(_captured_call), backend=self._backend)
        return self._compiled(self.original, _as_captured(call))

    def _backend(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """What Dynamo calls for each graph."""
        start = time.perf_counter()
        before = snapshot(module)
        passes = (self.settings.pipeline or EXACT).run(module, self._prover)
        wrap = defer_marked_outputs(module)
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        self.report.graphs.append(GraphRecord(_frame(), _tidied(passes), before, snapshot(module), elapsed_ms))
        if self.settings.backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            compiled: Any = compile_fx(module, example_inputs)
            return wrap(compiled)
        # "auto" runs the rewritten graph as it is: the fxopt ops carry what there is to gain, it needs no C++
        # compiler, and the first step comes after seconds instead of minutes.
        return wrap(_without_cheap_results(module.forward))

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedForward:
        model = copy.deepcopy(self.model, memo)
        return OptimizedForward(model, self.settings, copy.deepcopy(self.replaced, memo))

    def __reduce__(self) -> Any:
        return OptimizedForward, (self.model, self.settings, self.replaced)


def _captured_call(forward: Callable[..., Any], call: dict[str, Any]) -> Any:
    """What Dynamo traces: the model's forward, with the logits that it returns marked."""
    outputs = forward(**call)
    logits = getattr(outputs, "logits", None)
    if logits is not None and getattr(outputs, "loss", None) is not None:
        outputs.logits = deferred(logits)
    return outputs


def _without_cheap_results(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, saving less for the backward pass."""

    def run(*args: Any) -> Any:
        with rematerializing():
            return forward(*args)

    return run


def _own_code(function: Callable[..., Any]) -> FunctionType:
    """`function` with a code object of its own: Dynamo's cache and its limit belong to the code object."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def _as_captured(call: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments in the form that needs the fewest graphs and builds no needless mask."""
    call = {name: value for name, value in call.items() if value is not None}
    mask = call.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and "position_ids" not in call and bool(mask.all()):
        del call["attention_mask"]  # as eager transformers does with a mask that masks nothing
    if isinstance(call.get("num_items_in_batch"), int):
        call["num_items_in_batch"] = torch.tensor(call["num_items_in_batch"])  # a number would be a new graph each
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            call[name] = value = value.contiguous()  # strides that vary would be a new graph each
            for axis in range(min(value.ndim, 2)):  # batch and sequence
                if value.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(value, axis)
    # Training has no use for a key-value cache, and building one breaks the graph.
    return {**call, "use_cache": False}


_COMPILER_ERRORS = (TorchDynamoException, InductorError)


def _explained(error: BaseException) -> str:
    """The compiler's error in one line: the error below its wrapper, if it has one, and its first line."""
    error = getattr(error, "inner_exception", error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"


def _frame() -> int:
    """Which piece of code Dynamo is compiling: the same for all recompilations of it."""
    compile_id = CompileContext.current_compile_id()
    return -1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id


def _tidied(passes: list[PassRecord]) -> list[PassRecord]:
    """Without the near misses whose place another rule took."""
    for record in passes:
        outcome = record.outcome
        outcome.near_misses = [miss for miss in outcome.near_misses if not miss.anchor._erased]
    return passes
