"""Logits that are computed when somebody touches them.

A fused loss never holds the logits, and most training code never reads them. A captured call therefore returns,
where the logits belong, what is needed to compute them: the hidden states before the output head and the nodes
from there on. The model's output object computes them on first access, gradient included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxopt.passes.separate_logits import deferred
from fxopt.rewrite.graph import remove_dead_code


class DeferredValue:
    """A value of a captured graph that is not computed yet, with the inputs and the modes that it needs."""

    def __init__(self, compute: Callable[..., torch.Tensor], inputs: tuple[Any, ...], on_touch: Callable[[], None]):
        self._compute, self._inputs, self._on_touch = compute, inputs, on_touch
        self._grad_enabled = torch.is_grad_enabled()
        device = next(value for value in inputs if isinstance(value, torch.Tensor)).device.type
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._marks = [_mark(value) for value in self._tensors()]

    def __call__(self) -> torch.Tensor:
        """The value, as it would have been computed in the call.

        Raises RuntimeError if an input has been written to since, as an optimizer does: the value is lost then.
        """
        for value, (version, sample) in zip(self._tensors(), self._marks, strict=True):
            if value._version != version or not torch.equal(_sample(value), sample):
                raise RuntimeError(
                    "the logits of this output were not computed in the forward call, and the parameters have changed "
                    "since; read `outputs.logits` before `optimizer.step()`"
                )
        self._on_touch()
        device, dtype, enabled = self._autocast
        with torch.set_grad_enabled(self._grad_enabled), torch.autocast(device, dtype, enabled):
            return self._compute(*self._inputs)

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (value for value in self._inputs if isinstance(value, torch.Tensor) and not value.is_inference())


NUM_SAMPLES = 4096


def _mark(value: torch.Tensor) -> tuple[int, torch.Tensor]:
    """What tells whether a tensor was written to. Its version does not, where a fused optimizer or `.data` wrote."""
    return value._version, _sample(value).clone()


def _sample(value: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.nn.Parameter):
        return value.detach().new_empty(0)
    flat = value.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // NUM_SAMPLES)]


def defer_marked_outputs(
    module: fx.GraphModule, on_touch: Callable[[], None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Take the nodes that only a `deferred` output needs out of `module`, in place.

    Returns a function that wraps what `module` is compiled to, so that the wrapped callable yields a
    `DeferredValue` in that output's place, which calls `on_touch` when it is computed. Markers of outputs that the
    graph computes anyway are just removed.
    """
    graph = module.graph
    output = next(iter(graph.find_nodes(op="output")))
    results = list(output.args[0])
    markers = list(graph.find_nodes(op="call_function", target=deferred))
    slots = {results.index(marker): marker for marker in markers if marker in results}
    needed_anyway = _ancestors([r for r in results if isinstance(r, fx.Node) and r not in slots.values()])
    late: dict[int, tuple[fx.GraphModule, list[fx.Node]]] = {}
    for slot, marker in slots.items():
        value = marker.args[0]
        assert isinstance(value, fx.Node)
        if value in needed_anyway or value.op == "placeholder":
            results[slot] = value
        else:
            late[slot] = _extract(value, needed_anyway)
            results[slot] = None
    placeholders = list(graph.find_nodes(op="placeholder"))
    extra = list(dict.fromkeys(n for _, needs in late.values() for n in needs if n.op != "placeholder"))
    output.args = ((*results, *extra),)
    for marker in markers:
        marker.replace_all_uses_with(marker.args[0])
        graph.erase_node(marker)
    remove_dead_code(graph)
    module.recompile()

    def wrap(compiled: Callable[..., Any]) -> Callable[..., Any]:
        if not late:
            return compiled

        def call(*arguments: Any) -> list[Any]:
            values = list(compiled(*arguments))
            known = dict(zip(placeholders, arguments, strict=True))
            known |= dict(zip(extra, values[len(results) :], strict=True))
            del values[len(results) :]
            for slot, (compute, needs) in late.items():
                values[slot] = DeferredValue(compute, tuple(known[node] for node in needs), on_touch)
            return values

        return call

    return wrap


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _extract(value: fx.Node, known: set[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The graph from what is known (or an input) to `value`, and the nodes that it starts from."""
    inside = {n for n in _ancestors([value]) if n not in known and n.op != "placeholder"}
    needs = list(dict.fromkeys(n for node in sorted(inside) for n in node.all_input_nodes if n not in inside))
    graph = fx.Graph()
    mapped = {node: graph.placeholder(node.name) for node in needs}
    for node in sorted(inside):
        mapped[node] = graph.node_copy(node, mapped.__getitem__)
    graph.output(mapped[value])
    assert value.graph.owning_module is not None
    return fx.GraphModule(value.graph.owning_module, graph), needs


def reveal_on_touch(outputs: Any) -> Any:
    """Turn a model output that holds a `DeferredValue` into one that computes it on first access, in place."""
    if isinstance(outputs, dict) and any(isinstance(value, DeferredValue) for value in dict.values(outputs)):
        outputs.__class__ = _deferring(type(outputs))
    return outputs


@functools.cache
def _deferring(output_class: type[Any]) -> type[Any]:
    """A subclass of a transformers `ModelOutput`, of the same name, whose deferred entries compute themselves."""

    class Deferring(output_class):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return _reveal(self, name, value) if isinstance(value, DeferredValue) else value

        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, str):
                return _reveal(self, key, dict.__getitem__(self, key))
            # Only what the index selects is touched: `outputs[0]` is the loss and computes no logits.
            names = list(self.keys())[key]
            return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

        def get(self, key: str, default: Any = None) -> Any:
            return self[key] if key in self else default  # noqa: SIM401 — dict.get would return the DeferredValue

        def values(self) -> Any:
            return [self[name] for name in self]

        def items(self) -> Any:
            return [(name, self[name]) for name in self]

        def to_tuple(self) -> tuple[Any, ...]:
            return tuple(self.values())

        def __reduce__(self) -> Any:
            self.values()
            self.__class__ = output_class
            reduce: Any = output_class.__reduce__
            return reduce(self)

    Deferring.__name__, Deferring.__qualname__ = output_class.__name__, output_class.__qualname__
    Deferring.__module__, Deferring.__doc__ = output_class.__module__, output_class.__doc__
    return Deferring


def _reveal(outputs: Any, name: str, value: Any) -> Any:
    if isinstance(value, DeferredValue):
        value = value()
        setattr(outputs, name, value)  # ModelOutput keeps its dict in step
    return value
