"""The last pass of every pipeline: equal nodes once more, and nothing that nobody uses."""

from __future__ import annotations

from torch import fx

from fxopt.passes.canonicalize import merge_equal_nodes
from fxopt.passes.remove_casts import remove_casts
from fxopt.rewrite.graph import remove_dead_code
from fxopt.rewrite.pipeline import simple_pass


def cleanup(graph: fx.Graph) -> None:
    """Drop casts that rewrites left behind, compute equal things once, and drop what nobody uses."""
    remove_casts(graph)
    merge_equal_nodes(graph)
    remove_dead_code(graph)


CLEANUP = simple_pass("cleanup", cleanup)
