"""Attention with an explicit causal mask  →  attention with `is_causal=True`.

Under Dynamo, transformers builds the mask as a tensor where eager code passes `is_causal=True`. That loses flash
attention on a GPU, and time and memory on a CPU. The mask is proven causal by computing it: the nodes that it is
made of are run for several sizes and compared with the lower triangle.

The proof covers every size that the graph is used for. A mask that depends on a tensor (padding, packed
sequences) is not proven. One that depends on sizes alone is proven if it is made of sums and comparisons of positions
and whole numbers: then it can change its form only where a position is one of these numbers or their sum (a sliding
window), and the sizes tried go past that. Products, quotients and functions could change it anywhere: it stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxopt.rewrite.graph import dtype_of, module_path, outermost, shape_of, source_line, tensor_of, value_of
from fxopt.rewrite.match import NearMiss, target_name
from fxopt.rewrite.pipeline import Change, Outcome, Pass
from fxopt.rewrite.prove import Prover
from fxopt.rewrite.spelling import arguments_of

LARGEST_LITERAL = 128  # sizes past it are tried, and a mask for 130 sequences of 131 tokens is 2 MB
# What keeps a mask linear in positions. One `cumsum` numbers packed sequences; two would be a square.
_LINEAR = {
    "add", "and_", "arange", "cumsum", "diff", "eq", "expand", "full", "ge", "getitem", "gt", "invert", "le",
    "logical_and", "logical_not", "logical_or", "lt", "ne", "new_full", "new_ones", "new_zeros", "ones", "or_",
    "reshape", "size", "squeeze", "sub", "to", "tril", "triu", "unsqueeze", "view", "zeros",
}  # fmt: skip


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
    if mask.sizes and (objection := _not_linear(mask)):
        return objection
    largest = sum(abs(number) for item in mask.nodes for number in _literals((item.args, item.kwargs)))
    if mask.sizes and largest > LARGEST_LITERAL:
        return f"the mask depends on numbers up to {largest:.0f}: a sliding window or a chunk"
    # Each size is once the largest and once the smallest, by more than any sum of the numbers.
    rising = [largest + 2 + index * (largest + 2) for index in range(len(mask.sizes))]
    for lengths in (rising, [length + 1 for length in reversed(rising)]) if mask.sizes else ([],):
        sizes = dict(zip(mask.sizes, map(int, lengths), strict=True))
        with unset_fake_temporarily():
            computed = _compute(node, mask, sizes)
            lower = torch.ones(computed.shape[-2:], dtype=torch.bool, device=computed.device).tril()
            if not torch.equal(computed, lower.expand_as(computed)):
                return "the mask is not the lower triangle"
    return ""


def _not_linear(mask: _Mask) -> str:
    """Why sizes that were not tried might give a mask of another form, or ''."""
    for item in mask.nodes:
        name, value = target_name(item), tensor_of(item)
        if name not in _LINEAR or "alpha" in item.kwargs:
            return f"the mask is calculated with `{name}`, so it may be causal for some sizes alone"
        numbers = _literals((item.args, item.kwargs))
        if any(isinstance(number, float) for number in numbers) or (value is not None and value.is_floating_point()):
            return f"the mask is calculated in fractions (`{item.name}`), so it may be causal for some sizes alone"
    if sum(target_name(item) == "cumsum" for item in mask.nodes) > 1:
        return "the mask is calculated with several `cumsum`, so it may be causal for some sizes alone"
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
            if not isinstance(value := value_of(item), torch.SymInt) or not value.node.expr.is_Symbol:
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


def _literals(value: Any) -> list[float]:
    if isinstance(value, tuple | list):
        return [number for item in value for number in _literals(item)]
    if isinstance(value, dict):
        return _literals(list(value.values()))
    if isinstance(value, slice):
        return _literals([value.start, value.stop, value.step])
    return [value] if type(value) in (int, float) else []


RESTORE_CAUSAL_ATTENTION = Pass("restore_causal_attention", restore_causal_attention)
