"""The last pass of every pipeline: equal nodes once more, and nothing that nobody uses."""

from __future__ import annotations

from torch import fx

from fxopt.passes.canonicalize import merge_equal_nodes
from fxopt.rewrite.graph import remove_dead_code
from fxopt.rewrite.pipeline import simple_pass


def cleanup(graph: fx.Graph) -> None:
    """Compute equal things once, and drop what nobody uses."""
    merge_equal_nodes(graph)
    remove_dead_code(graph)


CLEANUP = simple_pass("cleanup", cleanup)
