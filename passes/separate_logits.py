"""The logits that a call returns, computed apart from the logits that its loss reads.

The captured call marks the logits that it returns with `deferred`. Where the loss reads the same node, the marked
chain is copied, from the output head on: then the loss is the only reader of its logits and can be fused, and the
copy can wait until somebody touches it. If the loss is not fused, the clean-up merges the copies again.
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt.rewrite.graph import shape_of
from fxopt.rewrite.match import target_name
from fxopt.rewrite.pipeline import simple_pass

PRODUCTS = ("linear", "matmul")  # what an output head is by


@torch.compiler.allow_in_graph
def deferred(logits: torch.Tensor, has_loss: bool = True) -> torch.Tensor:
    """Marks returned logits that may be computed later than the call. `has_loss`: the call returns a loss, too."""
    return logits


def separate_logits(graph: fx.Graph) -> None:
    """Give each `deferred` its own copy of the nodes from the output head to the logits."""
    for marker in graph.find_nodes(op="call_function", target=deferred):
        logits = marker.args[0]
        if not isinstance(logits, fx.Node) or set(logits.users) == {marker}:
            continue
        chain = _vocabulary_wide(logits)
        if not any(target_name(node) in PRODUCTS for node in chain):
            continue  # no output head's: an activation that is returned
        copies: dict[fx.Node, fx.Node] = {source: source for node in chain for source in node.all_input_nodes}
        with graph.inserting_before(marker):
            for node in chain:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        if chain:
            marker.args = (copies[logits], *marker.args[1:])


def _vocabulary_wide(logits: fx.Node) -> list[fx.Node]:
    """The nodes that lead to `logits` and are as wide, in graph order: the head, scales, soft caps, casts."""
    width = shape_of(logits)[-1:]
    found: set[fx.Node] = set()
    pending = [logits]
    while pending:
        node = pending.pop()
        if node not in found and node.op.startswith("call") and shape_of(node)[-1:] == width:
            found.add(node)
            if target_name(node) not in PRODUCTS:  # the head itself: what it reads is not logits
                pending += node.all_input_nodes
    return sorted(found)


SEPARATE_LOGITS = simple_pass("separate_logits", separate_logits)
