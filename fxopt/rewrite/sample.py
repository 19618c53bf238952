"""Inputs to prove a rewrite on: small, random, and strange where code tends to go wrong.

* `MAGNITUDES`: normally distributed numbers of several sizes, and zeros.
* NaN among ordinary numbers, in one element of one input after the other; `PLANTED`, infinities and a huge number, in
  one of each.
* What a rule's `examples` give beyond their first: labels that are all ignored, masks with gaps.

Sizes that are dynamic in the graph are small here, and large static sizes (a vocabulary) are cut in both graphs alike,
so that a proof takes milliseconds and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.rewrite.graph import value_of
from fxopt.rewrite.match import call_with
from fxopt.rewrite.replace import Rewrite

MAGNITUDES = (1.0, 1e-2, 30.0, 1e4, 0.0)
PLANTED = (math.inf, -math.inf, 1e30)
SMALL_SIZES = (3, 5, 7, 11, 13)  # for dynamic sizes: distinct, so that a mixed-up axis shows
ONLY_SIZE = (15,)  # for one dynamic size alone, as in a batch of one row: errors of three numbers would be luck
UNKNOWN_SIZE = 17  # for a size that depends on data, and so was not known when the graph was captured
MOST_ELEMENTS = 200_000  # of one input; beyond it, static sizes are cut


class Sizes:
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


Example = Callable[[tuple[int, ...], torch.dtype, torch.Generator], torch.Tensor]


def examples_of_labels(vocabulary: int, ignore_index: int) -> dict[str, list[Example]]:
    """What a rule's `examples` return where it has `labels`: of some rows, then of none."""

    def some_ignored(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        labels = torch.randint(0, vocabulary, shape, generator=generator, dtype=dtype)
        ignored = torch.rand(shape, generator=generator) < 0.3
        ignored.view(-1)[:2] = False  # the mean over no label is NaN, which proves nothing
        labels.view(-1)[:2] = torch.tensor([vocabulary - 1, 0])[: labels.numel()]  # the last and the first are there
        return labels.masked_fill_(ignored, ignore_index)

    def all_ignored(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return torch.full(shape, ignore_index, dtype=dtype)

    return {"labels": [some_ignored, all_ignored]}


@dataclass(frozen=True)
class Sampler:
    """Draws inputs for one rewrite, by name."""

    rewrite: Rewrite
    sizes: Sizes

    def ordinary(self, magnitude: float, seed: int) -> dict[str, Any]:
        """Normally distributed numbers times `magnitude`; what the rule has examples of, as its first."""
        return self._draw(magnitude, seed, {name: examples[0] for name, examples in self._examples().items()})

    def special(self, seed: int, gradients: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Inputs on which the two sides shall be finite alike, each with a word on what is special about it.

        `gradients` are those of `ordinary(1.0, seed)` in the original, by name: `gradient of x`.
        """
        if self.rewrite.match.rule.keeps_nan:
            yield from self._with_planted_numbers(seed, gradients)
        examples = self._examples()
        for name, (_, *others) in examples.items():
            for other in others:
                chosen = {each: given[0] for each, given in examples.items()} | {name: other}
                yield f"{other.__name__} {name}".replace("_", " "), self._draw(1.0, seed, chosen)

    def _with_planted_numbers(self, seed: int, gradients: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        inputs = self.ordinary(1.0, seed)
        dims = {name: v.ndim for name, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        for name in dims:
            yield f"nan in {name}", self._planted(math.nan, seed, {name}, gradients)
        for planted in PLANTED:
            yield f"{planted} in the inputs", self._planted(planted, seed, {n for n in dims if dims[n] != 1}, gradients)

    def _planted(self, number: float, seed: int, names: set[str], gradients: dict[str, Any]) -> dict[str, Any]:
        inputs = self.ordinary(1.0, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.dtype == torch.bool:
                value.fill_(True)  # nothing is hidden: what is, need not be looked at
            elif name in names and value.numel() > 1:
                # Where something depends on it: what is ignored, such as a row without a label, need not be looked at.
                matters = gradients.get(f"gradient of {name}", torch.ones_like(value)) != 0.0
                places = matters.flatten().nonzero() if matters.any() else torch.arange(value.numel())
                place = int(torch.randint(0, len(places), (), generator=generator))
                value.view(-1)[places[place]] = value.new_tensor(number)  # in float16, torch 2.15 refuses 1e30 itself
        return inputs

    def _examples(self) -> dict[str, list[Example]]:
        values = {name: self._blank(value_of(node)) for name, node in self.rewrite.inputs.items()}
        literals = {name: self.sizes.literal(value) for name, value in self.rewrite.match.bindings.items()}
        given = call_with(self.rewrite.match.rule.examples, {**literals, **values})
        return {name: list(each) if isinstance(each, list | tuple) else [each] for name, each in given.items()}

    def _blank(self, value: Any) -> Any:
        """A tensor without memory, in the sizes of the sample; anything else as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty([self.sizes.of(size) for size in value.shape], dtype=value.dtype, device="meta")

    def _draw(self, magnitude: float, seed: int, examples: dict[str, Example]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: self._value(name, node, magnitude, generator, examples) for name, node in self.rewrite.inputs.items()
        }

    def _value(
        self, name: str, node: fx.Node, magnitude: float, generator: torch.Generator, examples: dict[str, Example]
    ) -> Any:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return self.sizes.of(value) if isinstance(value, torch.SymInt | int) else value
        shape = tuple(self.sizes.of(size) for size in value.shape)
        if name in examples:
            tensor = examples[name](shape, value.dtype, generator)
        elif value.dtype.is_floating_point:
            tensor = (torch.randn(shape, generator=generator) * magnitude).to(value.dtype)
        elif value.dtype.is_complex:
            parts = torch.randn(*shape, 2, generator=generator, dtype=value.dtype.to_real())
            tensor = torch.view_as_complex(parts * magnitude)
        else:
            tensor = torch.randint(0, 2, shape, generator=generator).to(value.dtype)
            if value.dtype == torch.bool and tensor.ndim > 1:
                tensor[..., 0, :] = False  # a row that is masked as a whole
        return tensor.to(value.device)
