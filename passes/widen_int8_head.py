"""The output head's int8 weight  →  a plain tensor of its values, where the loss can then be fused.

The fused loss reads plain matrices. What it saves, a dozen bytes for each token and class, is more than the two bytes
for each of the head's parameters that its values take. A head whose loss is not fused after all keeps its weight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.precision.parameter_storage import is_int8
from fxopt.rewrite.graph import fill_in_values, module_path, source_line, tensor_of, value_of
from fxopt.rewrite.pipeline import Change, Outcome, Pass, Refused
from fxopt.rewrite.prove import Proof, Prover, compare
from fxopt.rewrite.spelling import arguments_of

NAME = "WidenInt8Head"


def with_int8_heads(fuse: Pass) -> Pass:
    """`fuse`, the pass that fuses the loss, also for heads with int8 weights."""
    return Pass(fuse.name, functools.partial(_fuse, fuse), fuse.exact)


def _fuse(fuse: Pass, graph: fx.Graph, prover: Prover | None) -> Outcome:
    outcome, changes = Outcome(), dict[fx.Node, Change]()
    for head in dict.fromkeys(_int8_heads(graph)):
        source, module = source_line(head), module_path(head)
        kind: Any = type(tensor_of(arguments_of(head)["weight"]))
        proof = _proof(value_of(head).dtype, value_of(head).device, kind) if prover else None
        if proof is not None and not proof.holds:
            outcome.refused.append(Refused(NAME, source, module, proof))
            continue
        values = _widen(head)
        here = head.name, values.name  # the head is changed in place
        changes[values] = Change(NAME, "int8_values", 1, source, module, proof, removed=here[:1], added=here)
    fused = fuse.run(graph, prover)
    for values, change in changes.items():
        (weight,) = values.all_input_nodes
        for user in [user for user in values.users if user.target is F.linear]:
            user.replace_input_with(values, weight)
        if values.users:
            outcome.changes.append(change)
        else:
            graph.erase_node(values)
    outcome.extend(fused)
    return outcome


def _int8_heads(graph: fx.Graph) -> Iterator[fx.Node]:
    """The products with an int8 weight that a loss is computed from, by whatever is done to each logit on the way."""
    for loss in graph.find_nodes(op="call_function", target=F.cross_entropy):
        node = arguments_of(loss)["input"]
        while node.op.startswith("call") and node.target is not F.linear and node.all_input_nodes:
            node = node.all_input_nodes[0]
        if node.target is F.linear and is_int8(tensor_of(arguments_of(node)["weight"])):
            yield node


def _widen(head: fx.Node) -> fx.Node:
    from fxopt.precision.int8_operations import widened  # torchao, which takes a while to import

    weight = arguments_of(head)["weight"]
    with head.graph.inserting_before(head):
        values = head.graph.call_function(widened, (weight,))
    fill_in_values([values], like=head)
    head.replace_input_with(weight, values)
    return values


@functools.cache
def _proof(dtype: torch.dtype, device: torch.device, kind: Any) -> Proof:
    """The product with an int8 weight and with its values, and their gradients, on a sample.

    kind: the weight's class, fxopt's or torchao's, which multiply by themselves.
    """
    from fxopt.precision.int8_operations import widened

    def draw_inputs(seed: int, wide: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        hidden, scale = (torch.randn(size, generator=generator).to(dtype) for size in ((48, 96), (64,)))
        codes = torch.randint(-127, 128, (64, 96), generator=generator, dtype=torch.int8)
        if wide:
            hidden, scale = hidden.double(), scale.double()
        weight = kind(codes.to(device), scale.abs().to(device))
        return hidden.to(device).requires_grad_(), torch.nn.Parameter(weight)

    return compare(F.linear, lambda hidden, weight: F.linear(hidden, widened(weight)), draw_inputs)
