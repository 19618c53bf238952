"""The proof of a rewrite: what stands in the graph and what shall replace it, run on the same small inputs.

Two things are shown, each for every result and for the gradient of every input that needs one:

1. *They are the same function.* In float64, with every floating dtype in both graphs widened to float64, they
   agree to a few roundings of float64. A wrong epsilon, scale, sign, shift or a dropped term does not pass.
2. *The replacement is at least as accurate.* In the graph's own dtypes its error against that float64 result is at
   most 1.1 times the original's, plus one rounding of the result's dtype: for the largest error and for the mean.

Inputs are random at several magnitudes, among them zeros. Errors are draws: where the replacement's are larger in
the first, several more decide, by the largest error of all and by the mean over all. Sizes that are dynamic in the
graph are small here, and large static sizes (a vocabulary) are cut in both graphs alike, so that a proof takes
milliseconds and no memory. Equal pairs of subgraphs are proven once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxopt.rewrite.graph import requires_grad, value_of
from fxopt.rewrite.match import call_with
from fxopt.rewrite.replace import Rewrite

FLOAT64_TOLERANCE = 1e-11  # relative to the largest element; thousands of float64 roundings, no formula's error
SLACK = 1.1  # how much larger than the original's error the replacement's may be
FEW = 100  # the error of fewer numbers, as the largest of many in float32, is a draw; it may be twice the original's
MAGNITUDES = (1.0, 1e-2, 30.0, 1e4, 0.0)
TINY = 1e-30  # where everything is smaller than this, errors are not relative any more
SMALL_SIZES = (3, 5, 7, 11, 13)  # for dynamic sizes: distinct, so that a mixed-up axis shows
ONLY_SIZE = (15,)  # for one dynamic size alone, as in a batch of one row: errors of three numbers would be luck
UNKNOWN_SIZE = 17  # for a size that depends on data, and so was not known when the graph was captured
MOST_ELEMENTS = 200_000  # of one input; beyond it, static sizes are cut
SEED = 20_261_124
MOST_DRAWS = 5  # if the errors are larger in the first: all of them, so that no lucky one ends it


@dataclass(frozen=True)
class Proof:
    """The outcome of a proof: the reason why it fails, or '', and the largest errors on inputs of ordinary size.

    Errors are against float64, relative to the largest element of the value that has them.
    """

    reason: str
    original_error: float
    replacement_error: float
    num_inputs: int

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
    """Real tensors and gradients, whatever mode the compiler is in and whatever hooks the caller has set."""
    no_hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)
    with unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad(), no_hooks:
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
            return _prove_at(rewrite, _Sizes(rewrite, small, cut))
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return _failed(f"could not be run on sample inputs: {failures[-1]}")


class _Sizes:
    """Small sizes for the dynamic and the very large sizes of a rewrite's inputs, the same in both graphs."""

    def __init__(self, rewrite: Rewrite, small: bool, cut: bool):
        hints = {
            symbol: int(_hints(size.node.shape_env).get(symbol, UNKNOWN_SIZE))
            for node in rewrite.inputs.values()
            for size in [*getattr(value_of(node), "shape", ()), value_of(node)]
            if isinstance(size, torch.SymInt)
            for symbol in size.node.expr.free_symbols
        }
        self.static: dict[int, int] = {}
        self.symbols = hints
        if small:
            # Symbols that were captured with one value may have to be equal, as the lengths of inputs and labels are.
            ordered = sorted(set(hints.values()))
            small_sizes = SMALL_SIZES if len(ordered) > 1 else ONLY_SIZE
            self.symbols = {s: small_sizes[ordered.index(hint) % len(small_sizes)] for s, hint in hints.items()}
        while cut and (largest := self._size_to_cut(rewrite)):
            self.static[largest] = 32 + largest % 31

    def _size_to_cut(self, rewrite: Rewrite) -> int | None:
        for node in rewrite.inputs.values():
            shape = getattr(value_of(node), "shape", ())
            if math.prod(self.of(size) for size in shape) > MOST_ELEMENTS:
                candidates = [int(size) for size in shape if not isinstance(size, torch.SymInt)]
                left = [size for size in candidates if size not in self.static and size > 64]
                return max(left, default=None)
        return None

    def of(self, size: Any) -> int:
        if isinstance(size, torch.SymInt):
            expression: sympy.Expr = size.node.expr
            return int(expression.subs({symbol: self.static.get(n, n) for symbol, n in self.symbols.items()}))
        return self.static.get(int(size), int(size))

    def literal(self, value: Any) -> Any:
        return self.static.get(value, value) if type(value) is int else value


def _hints(shape_env: Any) -> dict[sympy.Symbol, Any]:
    """The sizes that a graph was captured with; the attribute was renamed in torch 2.12."""
    hints: dict[sympy.Symbol, Any] = getattr(shape_env, "backed_var_to_val", None) or shape_env.var_to_val
    return hints


_Tensors = dict[str, Any]  # tensors by name: results, gradients, inputs afterwards


@dataclass
class _Errors:
    """The errors of one value in one norm, relative to its size: the original's and the replacement's."""

    name: str
    epsilon: float  # of the value's dtype
    slack: float
    extra: float  # what one more rounding may add, in epsilons
    pooled: bool  # over draws: the mean, not the largest
    draws: list[tuple[float, float]] = field(default_factory=list)

    @property
    def original(self) -> float:
        return self._over_draws([original for original, _ in self.draws])

    @property
    def replacement(self) -> float:
        return self._over_draws([replacement for _, replacement in self.draws])

    def _over_draws(self, errors: list[float]) -> float:
        return math.hypot(*errors) / math.sqrt(len(errors)) if self.pooled else max(errors)

    @property
    def objection(self) -> str:
        if self.replacement <= self.slack * self.original + self.extra * self.epsilon:
            return ""
        return f"less accurate: the error of {self.name} is {self.replacement:.1e}, was {self.original:.1e}"


_ErrorsOf = dict[tuple[str, str, float], _Errors]  # by value, norm and magnitude


def _prove_at(rewrite: Rewrite, sizes: _Sizes) -> Proof:
    run = _runner(rewrite.original, sizes), _runner(rewrite.replacement, sizes)
    wide = _runner(rewrite.original, sizes, _widened), _runner(rewrite.replacement, sizes, _widened)
    errors: _ErrorsOf = {}
    for draw in range(MOST_DRAWS):
        if draw == 1 and not any(kept.objection for kept in errors.values()):
            break
        for magnitude in MAGNITUDES:
            inputs = _sample(rewrite, sizes, magnitude, seed=SEED + 2 * draw)
            doubles = {name: _widened(value) for name, value in inputs.items()}
            was, is_now = (_evaluate(side, inputs, rewrite, seed=SEED + 2 * draw + 1) for side in run)
            truth, same = (_evaluate(side, doubles, rewrite, seed=SEED + 2 * draw + 1) for side in wide)
            if reason := _why_another(truth, same, was, is_now):
                return _failed(reason)
            _note_errors(errors, truth, was, is_now, magnitude)
    reason = next((kept.objection for kept in errors.values() if kept.objection), "")
    shown = [kept for (_, norm, magnitude), kept in errors.items() if norm == "largest" and magnitude in (0.0, 1.0)]
    return Proof(
        reason=reason,
        original_error=max((kept.original for kept in shown), default=0.0),
        replacement_error=max((kept.replacement for kept in shown), default=0.0),
        num_inputs=(draw + 1) * len(MAGNITUDES),
    )


def _why_another(truth: _Tensors, same: _Tensors, original: _Tensors, replacement: _Tensors) -> str:
    """Why the two are not one function, or ''. `truth` and `same` are the original's and the replacement's float64."""
    for name, expected in truth.items():
        difference = _largest(_difference(same[name], expected))
        if not difference <= FLOAT64_TOLERANCE * max(_largest(expected), TINY):
            return f"another function: {name} differs by {difference:.1e} in float64"
        was, is_now = original[name], replacement[name]
        if was.dtype != is_now.dtype or was.shape != is_now.shape:
            return f"{name} is {is_now.dtype} {tuple(is_now.shape)}, was {was.dtype} {tuple(was.shape)}"
    return ""


def _note_errors(
    errors: _ErrorsOf, truth: _Tensors, original: _Tensors, replacement: _Tensors, magnitude: float
) -> None:
    """Keep each kind of error of this draw."""
    for name, expected in truth.items():
        was, is_now = original[name], replacement[name]
        if not was.is_floating_point():
            continue
        few = was.numel() < FEW  # their error is a draw: take the largest of several
        alike = magnitude == 0.0  # zeros in, numbers that are all the same out: one draw, however many they are
        for norm, measure in NORMS.items():
            is_wide = was.element_size() >= 4
            slack = 2.0 if few or (is_wide and (alike or norm == "largest")) else SLACK
            kept = errors.setdefault(
                (name, norm, 0.0 if few else magnitude),
                _Errors(
                    name, torch.finfo(was.dtype).eps, slack, 1.0 if few else ONE_ROUNDING[norm],
                    pooled=norm == "mean" and not few,
                ),
            )  # fmt: skip
            size = max(measure(expected), TINY)
            kept.draws.append(
                (measure(_difference(was, expected)) / size, measure(_difference(is_now, expected)) / size)
            )


def _failed(reason: str) -> Proof:
    return Proof(reason, math.nan, math.nan, 0)


def _sample(rewrite: Rewrite, sizes: _Sizes, magnitude: float, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    literals = {name: sizes.literal(value) for name, value in rewrite.match.bindings.items()}
    special = call_with(rewrite.match.rule.examples, {**literals, **_values(rewrite)})
    sample: dict[str, Any] = {}
    for name, node in rewrite.inputs.items():
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            sample[name] = sizes.of(value) if isinstance(value, torch.SymInt | int) else value
            continue
        shape = tuple(sizes.of(size) for size in value.shape)
        if name in special:
            tensor = special[name](shape, value.dtype, generator)
        elif value.dtype.is_floating_point:
            tensor = (torch.randn(shape, generator=generator) * magnitude).to(value.dtype)
        elif value.dtype.is_complex:
            parts = torch.randn(*shape, 2, generator=generator, dtype=value.dtype.to_real())
            tensor = torch.view_as_complex(parts * magnitude)
        else:
            tensor = torch.randint(0, 2, shape, generator=generator).to(value.dtype)
            if value.dtype == torch.bool and tensor.ndim > 1:
                tensor[..., 0, :] = False  # a row that is masked as a whole
        sample[name] = tensor.to(value.device)
    return sample


def _values(rewrite: Rewrite) -> dict[str, Any]:
    return {name: value_of(node) for name, node in rewrite.inputs.items()}


def _evaluate(run: Callable[..., tuple[Any, ...]], inputs: dict[str, Any], rewrite: Rewrite, seed: int) -> _Tensors:
    """Every result and every gradient, by name. With the same `seed`, the cotangents are the same on each side."""
    leaves: dict[str, Any] = {}
    names: dict[fx.Node, str] = {}  # where two names are bound to one node, the first
    for name, value in inputs.items():
        node = rewrite.inputs[name]
        if names.setdefault(node, name) != name:
            continue
        if isinstance(value, torch.Tensor):
            value = value.detach().clone().requires_grad_(requires_grad(node))
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


def _runner(graph: fx.Graph, sizes: _Sizes, change: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
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


def _largest(value: torch.Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _root_mean_square(value: torch.Tensor) -> float:
    return float(value.double().square().mean().sqrt()) if value.numel() else 0.0


def _difference(value: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """value - truth in float64; infinite where one is NaN or infinite and the other is not the same."""
    value, truth = value.double(), truth.double()
    same = (value == truth) | (value.isnan() & truth.isnan())
    return torch.where(same, 0.0, (value - truth).abs()).nan_to_num(nan=math.inf)


NORMS: dict[str, Callable[[torch.Tensor], float]] = {"largest": _largest, "mean": _root_mean_square}
# What one more rounding may add, in units of the dtype's epsilon: to one element, and on the average of many. Half an
# epsilon there too, since numbers that are all the same are all rounded alike, such as those of an even softmax.
ONE_ROUNDING = {"largest": 1.0, "mean": 0.5}
