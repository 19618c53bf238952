"""Attention with an explicit causal mask  →  attention with `is_causal=True`.

Under Dynamo, transformers builds the mask as a tensor where eager code passes `is_causal=True`. That loses flash
attention on a GPU, and time and memory on a CPU. The mask is proven causal by computing it: the nodes that it is
made of are run for several sizes and compared with the lower triangle.

The proof covers every size that the graph is used for. A mask that depends on a tensor (padding, packed
sequences) is not proven. One that depends on sizes alone is made of comparisons between positions and literals, so
it can change its form only at a literal (a sliding window); the sizes tried go past the largest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxopt.rewrite.graph import dtype_of, module_path, outermost, shape_of, source_line, tensor_of, value_of
from fxopt.rewrite.match import NearMiss
from fxopt.rewrite.pipeline import Change, Outcome, Pass
from fxopt.rewrite.prove import Prover
from fxopt.rewrite.spelling import arguments_of

LARGEST_LITERAL = 128  # sizes past it are tried, and a mask for 130 sequences of 131 tokens is 2 MB


@dataclass(frozen=True)
class _Mask:
    """What a mask is made of: its nodes, and the dynamic sizes they read."""

    nodes: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]
    objection: str  # why it cannot be computed at compile time, or ''


def restore_causal_attention(graph: fx.Graph, prover: Prover | None) -> Outcome:
    """Replace each causal `attn_mask` by `is_causal=True`."""
    outcome = Outcome()
    reasons: dict[fx.Node, str] = {}
    for node in graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        arguments = arguments_of(node)
        mask = outermost(arguments["attn_mask"])
        if not isinstance(mask, fx.Node) or arguments["is_causal"]:
            continue
        query, key = shape_of(arguments["query"]), shape_of(arguments["key"])
        if mask not in reasons:
            same_length = query[-2] == key[-2]
            reasons[mask] = _not_causal(mask) if same_length else "queries and keys differ in number"
        if reasons[mask]:
            name = "restore_causal_attention"
            outcome.near_misses.append(NearMiss(name, node.name, source_line(node), reasons[mask], (node,)))
            continue
        node.args, node.kwargs = (), {**arguments, "attn_mask": None, "is_causal": True}
        name, here = "restore_causal_attention", (node.name,)
        outcome.changes.append(
            Change(name, "causal_attention", 1, source_line(node), module_path(node), None, removed=here, added=here)
        )
    return outcome


def _not_causal(node: fx.Node) -> str:
    """Why `node` is not, or not provably, the causal mask; '' if it is."""
    if dtype_of(node) is not torch.bool:
        return f"the mask is {dtype_of(node)}: added to the scores, not chosen by"
    mask = _made_of(node)
    if mask.objection:
        return mask.objection
    largest = max((abs(number) for item in mask.nodes for number in _literals((item.args, item.kwargs))), default=0)
    if mask.sizes and largest > LARGEST_LITERAL:
        return f"the mask depends on the number {largest}: a sliding window or a chunk"
    for offset in (1, 3) if mask.sizes else (0,):
        # Distinct sizes, so that no size is taken for another.
        sizes = {size: largest + offset + 1 + index for index, size in enumerate(mask.sizes)}
        with unset_fake_temporarily():
            computed = _compute(node, mask, sizes)
            lower = torch.ones(computed.shape[-2:], dtype=torch.bool, device=computed.device).tril()
            if not torch.equal(computed, lower.expand_as(computed)):
                return "the mask is not the lower triangle"
    return ""


def _made_of(node: fx.Node) -> _Mask:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        item = pending.pop()
        if item in found:
            continue
        found.add(item)
        if item.op in ("placeholder", "get_attr"):
            if tensor_of(item) is not None:
                return _Mask((), (), "the mask depends on a tensor: padding or packed sequences")
            if not isinstance(value_of(item), torch.SymInt):
                return _Mask((), (), f"the mask depends on `{item.name}`, which is not a size")
        pending += item.all_input_nodes
    sizes = tuple(sorted(item for item in found if item.op == "placeholder"))
    return _Mask(tuple(sorted(found - set(sizes))), sizes, "")


def _compute(node: fx.Node, mask: _Mask, sizes: dict[fx.Node, int]) -> torch.Tensor:
    graph = fx.Graph()
    mapped: dict[fx.Node, Any] = {size: graph.placeholder(size.name) for size in mask.sizes}
    for item in mask.nodes:
        mapped[item] = graph.node_copy(item, mapped.__getitem__)
    graph.output(mapped[node])
    result: torch.Tensor = fx.GraphModule(torch.nn.Module(), graph)(*sizes.values())
    return result


def _literals(value: Any) -> list[int]:
    if isinstance(value, tuple | list):
        return [number for item in value for number in _literals(item)]
    if isinstance(value, dict):
        return _literals(list(value.values()))
    if isinstance(value, slice):
        return _literals([value.start, value.stop, value.step])
    return [value] if type(value) is int else []


RESTORE_CAUSAL_ATTENTION = Pass("restore_causal_attention", restore_causal_attention)
