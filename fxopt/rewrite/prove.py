"""The proof of a rewrite: what stands in the graph and what shall replace it, run on the same small inputs.

Three things are shown, each for every result and for the gradient of every input that needs one:

1. *They are the same function.* In float64, with every floating dtype in both graphs widened to float64, they
   agree to a few roundings of float64. A wrong epsilon, scale, sign, shift or a dropped term does not pass.
2. *The replacement is at least as accurate.* In the graph's own dtypes its error against that float64 result is at
   most 1.1 times the original's, plus one rounding of the result's dtype: for the largest error and for the mean.
3. *They are finite alike.* With NaN, an infinity or a huge number in an input, with all labels ignored or a mask with
   gaps, the same elements are NaN or infinite: nothing is hidden that the original shows, nor the other way round.

`sample.py` draws the inputs. Errors are draws, too: where the replacement's are larger in the first, several more
decide, by the largest error of all and by the mean over all. Equal pairs of subgraphs are proven once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxopt.error_lines import in_a_line
from fxopt.rewrite.accuracy import TINY, ErrorsOf, Seen, Tensors, difference, draws, largest, note_errors, objection
from fxopt.rewrite.graph import requires_grad, value_of
from fxopt.rewrite.replace import Rewrite
from fxopt.rewrite.sample import MAGNITUDES, Sampler, Sizes

FLOAT64_TOLERANCE = 1e-11  # relative to the largest element; thousands of float64 roundings, no formula's error
SEED = 20_261_124


@dataclass(frozen=True)
class Proof:
    """The outcome of a proof: the reason why it fails, or '', and the largest errors on inputs of ordinary size.

    Errors are against float64, relative to the largest element of the value that has them. `gain` is the value that
    became more accurate by the largest factor, if by a half at least, with the root mean square of its error before and
    after, relative to its own.
    """

    reason: str
    original_error: float
    replacement_error: float
    num_inputs: int
    gain: tuple[str, float, float] | None = None

    @property
    def holds(self) -> bool:
        return not self.reason


@dataclass
class Prover:
    """Proves rewrites, each distinct one once."""

    known: dict[str, Proof] = field(default_factory=dict)

    def prove(self, rewrite: Rewrite) -> Proof:
        key = _key(rewrite)
        if key not in self.known:
            with _isolated(), rewrite.match.rule.proof_context():
                self.known[key] = _prove(rewrite)
        return self.known[key]


@contextmanager
def _isolated() -> Iterator[None]:
    """Real tensors and gradients, whatever mode the compiler is in and whatever hooks the caller has set.

    Samples hold NaN, which `detect_anomaly` would take for a fault.
    """
    no_hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)
    no_anomalies = torch.autograd.set_detect_anomaly(False)
    with unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad(), no_hooks, no_anomalies:
        yield


def _key(rewrite: Rewrite) -> str:
    inputs = [_described(name, node) for name, node in rewrite.inputs.items()]
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return f"{_text(rewrite.original)}\n{_text(rewrite.replacement)}\n{inputs}\n{autocast}"


def _described(name: str, node: fx.Node) -> str:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return f"{name}: {type(value)}"
    return f"{name}: {value.dtype} {[str(size) for size in value.shape]} {value.device} {value.requires_grad}"


def _text(graph: fx.Graph) -> str:
    """A graph with its nodes numbered, so that equal graphs have equal texts."""
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    return "\n".join(
        f"{number[node]} = {node.op} {node.target} {fx.map_arg((node.args, node.kwargs), number.__getitem__)}"
        for node in graph.nodes
    )


def _prove(rewrite: Rewrite) -> Proof:
    failures: list[str] = []
    # With the captured sizes where the small ones do not fit each other: after a graph break some are static.
    for small, cut in ((True, True), (True, False), (False, True)):
        try:
            return _prove_at(rewrite, Sizes(rewrite, small, cut))
        except Exception as error:
            failures.append(in_a_line(error))
    return _failed(f"could not be run on sample inputs: {failures[-1]}")


class _BothSides:
    """The original and the replacement as functions, each in float64 and in its own dtypes."""

    def __init__(self, rewrite: Rewrite, sizes: Sizes):
        self.rewrite = rewrite
        graphs = rewrite.original, rewrite.replacement
        self.wide = [_runner(graph, sizes, _widened) for graph in graphs]
        self.own = [_runner(graph, sizes) for graph in graphs]

    def evaluate(self, inputs: dict[str, Any], seed: int) -> Seen:
        doubles = {name: _widened(value) for name, value in inputs.items()}
        truth, same = (_evaluate(run, doubles, self.rewrite, seed) for run in self.wide)
        original, replacement = (_evaluate(run, inputs, self.rewrite, seed) for run in self.own)
        return Seen(truth, same, original, replacement)

    def gradients(self, inputs: dict[str, Any]) -> Tensors:
        """Of all the original's inputs in float64, also of those that need none in the graph."""
        doubles = {name: _widened(value) for name, value in inputs.items()}
        return _evaluate(self.wide[0], doubles, self.rewrite, seed=SEED + 1, of_all=True)


def _prove_at(rewrite: Rewrite, sizes: Sizes) -> Proof:
    sampler, both = Sampler(rewrite, sizes), _BothSides(rewrite, sizes)
    errors: ErrorsOf = {}
    at_zero = rewrite.match.rule.has_gradient_at_zero
    magnitudes = [magnitude for magnitude in MAGNITUDES if magnitude or at_zero]
    for draw in draws(errors):
        for magnitude in magnitudes:
            seen = both.evaluate(sampler.ordinary(magnitude, SEED + 2 * draw), seed=SEED + 2 * draw + 1)
            if reason := _why_another(seen):
                return _failed(reason)
            note_errors(errors, seen, magnitude)
            if magnitude == 1.0 and draw == 0:
                ordinary = seen
    reason = objection(errors)
    num_inputs = (draw + 1) * len(magnitudes)
    for what, inputs in sampler.special(SEED, both.gradients(sampler.ordinary(1.0, SEED))) if not reason else ():
        num_inputs += 1
        if not_alike := _why_not_finite_alike(both.evaluate(inputs, seed=SEED + 1), ordinary):
            reason = f"with {what}, {not_alike}"
            break
    return _proof_of(errors, reason, num_inputs)


def compare(
    original: Callable[..., torch.Tensor],
    replacement: Callable[..., torch.Tensor],
    draw_inputs: Callable[[int, bool], tuple[torch.Tensor, ...]],
) -> Proof:
    """The proof for two functions of tensors, where there are no graphs: the first two of the three things.

    `draw_inputs(seed, wide)` gives what both are called with, in float64 if `wide`; gradients are those of all.
    """

    def evaluate(run: Callable[..., torch.Tensor], seed: int, wide: bool) -> Tensors:
        leaves = draw_inputs(seed, wide)
        result = run(*leaves)
        cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)).to(result)
        gradients = torch.autograd.grad(result, leaves, cotangent)
        return {"result": result.detach()} | {f"gradient {index}": value for index, value in enumerate(gradients)}

    errors: ErrorsOf = {}
    with _isolated():
        for draw in draws(errors):
            sides = [evaluate(run, SEED + draw, wide) for wide in (True, False) for run in (original, replacement)]
            seen = Seen(*sides)
            if reason := _why_another(seen):
                return _failed(reason)
            note_errors(errors, seen, 1.0)
    return _proof_of(errors, objection(errors), draw + 1)


def _proof_of(errors: ErrorsOf, reason: str, num_inputs: int) -> Proof:
    ordinary = [(norm, kept) for (_, norm, magnitude), kept in errors.items() if magnitude in (0.0, 1.0)]
    shown = [kept for norm, kept in ordinary if norm == "largest"]
    means = [(kept.name, kept.original, kept.replacement) for norm, kept in ordinary if norm == "mean"]
    gains = [(name, was, now) for name, was, now in means if was >= 1.5 * now > 0.0]
    return Proof(
        reason=reason,
        original_error=max((kept.original for kept in shown), default=0.0),
        replacement_error=max((kept.replacement for kept in shown), default=0.0),
        num_inputs=num_inputs,
        gain=max(gains, key=lambda gain: gain[1] / gain[2], default=None),
    )


def _why_another(seen: Seen) -> str:
    """Why the two are not one function, or ''."""
    for name, expected in seen.truth.items():
        apart = largest(difference(seen.same[name], expected))
        size = largest(torch.where(expected.isfinite(), expected, 0.0))
        if not apart <= FLOAT64_TOLERANCE * max(size, TINY):
            return f"another function: {name} differs by {apart:.1e} in float64"
        was, is_now = seen.original[name], seen.replacement[name]
        if was.dtype != is_now.dtype or was.shape != is_now.shape:
            return f"{name} is {is_now.dtype} {tuple(is_now.shape)}, was {was.dtype} {tuple(was.shape)}"
    return ""


def _why_not_finite_alike(seen: Seen, ordinary: Seen) -> str:
    """Why NaN and infinity are not where they were, or finite numbers not what they were; or ''.

    A gradient that is zero for `ordinary` inputs, as of rows without a label, may be zero where it was 0 * NaN; and
    what the gradient of a NaN is, does not matter. What overflows in a narrow dtype may overflow no longer.
    """
    for name, expected in seen.truth.items():
        of = name.removeprefix("gradient of ")
        same, was, is_now = seen.same[name], seen.original[name], seen.replacement[name]
        judged = torch.ones_like(expected, dtype=torch.bool)
        if of != name:
            nowhere = (ordinary.truth[name] == 0.0) & (same == 0.0) & (is_now == 0.0)
            judged = ~(nowhere | seen.truth[f"{of} afterwards"].isnan())
        size = max(largest(torch.where(expected.isfinite(), expected, 0.0)), TINY)
        if of != name:  # NaN and infinity are one: formulas for a slope differ in what they make of infinity
            expected, same = (torch.where(value.isfinite(), value, math.nan) for value in (expected, same))
        differs = judged & (difference(same, expected) > FLOAT64_TOLERANCE * size)
        lost = judged & was.isfinite() & ~is_now.isfinite()
        for where, shown, value in ((differs, expected, same), (lost, was, is_now)):
            if where.any():
                return f"{name} is {float(value[where][0]):.3g}, was {float(shown[where][0]):.3g}"
    return ""


def _failed(reason: str) -> Proof:
    return Proof(reason, math.nan, math.nan, 0)


def _evaluate(
    run: Callable[..., tuple[Any, ...]], inputs: dict[str, Any], rewrite: Rewrite, seed: int, of_all: bool = False
) -> Tensors:
    """Every result and every gradient, by name. With the same `seed`, the cotangents are the same on each side."""
    leaves: dict[str, Any] = {}
    names: dict[fx.Node, str] = {}  # where two names are bound to one node, the first
    for name, value in inputs.items():
        node = rewrite.inputs[name]
        if names.setdefault(node, name) != name:
            continue
        if isinstance(value, torch.Tensor):
            value = value.detach().clone()
            value.requires_grad_(requires_grad(node) or (of_all and value.is_floating_point()))
        leaves[name] = value
    results = run({name: leaves[names[node]] for name, node in rewrite.inputs.items()})
    named = {f"result {index}": result for index, result in enumerate(results)}
    # A copy, to be compared too: a replacement may not write into its inputs.
    for name, value in leaves.items():
        if isinstance(value, torch.Tensor):
            dtype = value.dtype if value.is_floating_point() or value.is_complex() else torch.float64
            named[f"{name} afterwards"] = value.detach().to(dtype, copy=True)
    generator = torch.Generator().manual_seed(seed)
    # Drawn for every result, so that both sides get the same ones even if they differ in which need a gradient.
    cotangents = [(result, torch.randn(result.shape, generator=generator).to(result)) for result in results]
    differentiable = [(result, cotangent) for result, cotangent in cotangents if result.requires_grad]
    sources = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor) and leaf.requires_grad}
    if differentiable and sources:
        outputs, grad_outputs = zip(*differentiable, strict=True)
        gradients = torch.autograd.grad(outputs, list(sources.values()), grad_outputs, allow_unused=True)
        for (name, leaf), gradient in zip(sources.items(), gradients, strict=True):
            named[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    # Complex numbers as pairs of real ones.
    return {n: torch.view_as_real(v.detach()) if v.is_complex() else v.detach() for n, v in named.items()}


def _runner(graph: fx.Graph, sizes: Sizes, change: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
    """`graph` as a function of its inputs by name; its literals are brought to the sample's sizes, and changed."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        for literal in (sizes.literal, change):
            if literal is not None:
                node.args = _map_literals(node.args, literal)
                node.kwargs = _map_literals(node.kwargs, literal)
    run = fx.GraphModule(torch.nn.Module(), copied).forward  # calling the module would print what it raises
    names = [str(placeholder.target) for placeholder in copied.find_nodes(op="placeholder")]
    return lambda inputs: run(*(inputs[name] for name in names))


def _map_literals(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return type(value)(_map_literals(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_literals(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_map_literals(item, change) for item in (value.start, value.stop, value.step)))
    return change(value)


def _widened(value: Any) -> Any:
    """Floating tensors and floating dtypes in float64, complex ones in complex128; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(_widened(value.dtype))
    if isinstance(value, torch.dtype):
        return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value
    return value
