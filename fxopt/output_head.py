"""The output head at the end of a graph: the matrix product that makes logits, and what is done to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxopt.passes.separate_logits import PRODUCTS
from fxopt.rewrite.graph import cast, shape_of, tensor_of
from fxopt.rewrite.match import target_name
from fxopt.rewrite.spelling import arguments_of


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap * tanh(logit_scale * (hidden @ weightᵀ + bias) / softcap), or without the cap.

    `hidden`, `weight` and `bias` are places among what the logits are computed from; None: no bias.
    """

    hidden: int
    weight: int
    bias: int | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def nodes_of_head(value: fx.Node) -> list[fx.Node]:
    """The nodes from the last matrix product to `value`, if each of them reads one activation; else none."""
    found: list[fx.Node] = []
    node = value
    while node.op.startswith("call"):
        found.append(node)
        if target_name(node) in PRODUCTS:
            return found
        activations = [source for source in node.all_input_nodes if source.op != "placeholder"]
        if len(activations) != 1 or tensor_of(node) is None or shape_of(node)[-1:] != shape_of(activations[0])[-1:]:
            return []
        (node,) = activations
    return []


def head_in(value: fx.Node, inputs: Sequence[fx.Node]) -> OutputHead | None:
    """What the nodes from `inputs` to `value` are as an `OutputHead`, or None where they are something else."""
    nodes = nodes_of_head(value)
    if not nodes or target_name(nodes[-1]) != "linear":
        return None
    product = arguments_of(nodes[-1])
    places = [inputs.index(n) if n in inputs else None for n in (product["input"], product["weight"])]
    bias = product.get("bias")
    if None in places or (bias is not None and bias not in inputs):
        return None
    # From the product on: a factor, then perhaps a cap, which is a division, a tanh and a product by the same number.
    before, after, capped = 1.0, 1.0, False
    for node in nodes[-2::-1]:
        name = target_name(node)
        if node.target is cast:
            continue
        if name == "tanh" and not capped:
            capped = True
            continue
        factor = _factor(node, name)
        if factor is None:
            return None
        before, after = (before, after * factor) if capped else (before * factor, after)
    hidden, weight = places
    assert hidden is not None and weight is not None
    place_of_bias = None if bias is None else inputs.index(bias)
    if not capped:
        return OutputHead(hidden, weight, place_of_bias, before) if before > 0 else None
    return OutputHead(hidden, weight, place_of_bias, before * after, after) if before > 0 and after > 0 else None


def _factor(node: fx.Node, name: str) -> float | None:
    """What number a node multiplies its one activation by."""
    if len(node.args) != 2:
        return None
    first, second = node.args
    number = second if isinstance(first, fx.Node) else first
    if not isinstance(number, int | float):
        return None
    if name == "mul":
        return float(number)
    return 1.0 / float(number) if name == "truediv" and number is second and number else None
