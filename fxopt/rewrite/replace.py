"""A match as two small graphs, what stands there and what shall stand there, and putting the second in place."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from fxopt.rewrite.graph import fill_in_values, keep_layout, nodes_to_move_up, value_of
from fxopt.rewrite.match import Match
from fxopt.rewrite.trace import as_tuple, ops_called_by, trace


@dataclass(frozen=True)
class Rewrite:
    """A match with its two sides as graphs over the same inputs, in the same order of results.

    Both graphs have one placeholder per name that is bound to a node; literals stand in them as literals.
    """

    match: Match
    inputs: dict[str, fx.Node]
    original: fx.Graph
    replacement: fx.Graph


def rewrite_of(match: Match) -> Rewrite:
    inputs = {name: value for name, value in match.bindings.items() if isinstance(value, fx.Node)}
    return Rewrite(match, inputs, _original(match, inputs), _replacement(match, inputs))


def put_in_place(rewrite: Rewrite) -> dict[fx.Node, fx.Node]:
    """Replace the match in its graph; which node now stands for each of the match's results.

    New nodes get fake values and the source of the old ones.
    """
    results, graph = rewrite.match.results, rewrite.match.anchor.graph
    first = min(results)  # fx orders nodes by their place in the graph
    for value in rewrite.inputs.values():
        for node in nodes_to_move_up(value, first) or ():
            first.prepend(node)
    with graph.inserting_before(first):
        mapped = {
            placeholder: rewrite.inputs[str(placeholder.target)]
            for placeholder in rewrite.replacement.find_nodes(op="placeholder")
        }
        new_results = graph.graph_copy(rewrite.replacement, mapped)
    new = [mapped[node] for node in rewrite.replacement.nodes if node.op not in ("placeholder", "output")]
    fill_in_values(new, like=rewrite.match.anchor)
    for node in new:
        node.meta["fxopt_rule"] = rewrite.match.rule.__name__
    replaced = dict(zip(results, as_tuple(new_results), strict=True))
    for old, successor in replaced.items():
        old.replace_all_uses_with(successor)
        replaced[old] = keep_layout(successor, before=value_of(old))
    for node in reversed(rewrite.match.nodes):
        node.meta["fxopt_rule"] = rewrite.match.rule.__name__  # what took its place, for who remembers the node
        graph.erase_node(node)
    return replaced


def _original(match: Match, inputs: dict[str, fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    mapped = {node: graph.placeholder(name) for name, node in inputs.items()}
    for node in match.nodes:
        mapped[node] = graph.node_copy(node, mapped.__getitem__)
    graph.output(tuple(mapped[result] for result in match.results))
    return graph


def _replacement(match: Match, inputs: dict[str, fx.Node]) -> fx.Graph:
    literals = {name: value for name, value in match.bindings.items() if name not in inputs}
    graph, results = trace(match.rule.rewrite, ops_called_by(match.rule.rewrite), literals)
    if isinstance(results, fx.Proxy) and len(match.results) > 1:
        results = tuple(operator.getitem(results, index) for index in range(len(match.results)))
    graph.output(tuple(result.node for result in as_tuple(results)))
    return graph
