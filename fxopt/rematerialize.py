"""Results that are cheap to compute again are not kept for the backward pass.

A linear layer saves its input. Where that input is a norm or a gated product, which keep their own inputs anyway, the
layer can have it computed again when its backward runs, bit by bit the same. An op offers this by setting
`ctx.recompute`, a function of the autograd node that returns the op's result (see `kernels/rms_norm.py`). Whatever
saves the result, a linear layer or an adapter beside it, then holds the node instead of the tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxopt.rewrite.graph import graph_modules

# What hands on its first argument, in the same order, and saves nothing; and what may do so.
_VIEWS = {"view", "reshape", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze"}
_PERHAPS_THE_SAME = {"to", "type_as", "cast", "dropout", "getitem"}


def rematerialize(module: fx.GraphModule) -> None:
    """Let each call that is given a cheap result run within `rematerializing`; in place.

    Those calls alone: a hook takes Python's time for every tensor that is saved, of which most are none's cheap result.
    """
    for inner in graph_modules(module):
        for user in users_of_cheap_results(inner.graph):
            function = user.target if user.op == "call_function" else getattr(Tensor, str(user.target))
            user.op, user.target = "call_function", _rematerializing(function)
        inner.recompile()


def users_of_cheap_results(graph: fx.Graph) -> frozenset[fx.Node]:
    """The calls of `graph` that are to run within `rematerializing`."""
    return frozenset(user for node in graph.nodes for result in _cheap_results(node) for user in _users(result))


def _cheap_results(node: fx.Node) -> Iterator[fx.Node]:
    if hasattr(node.target, "cheap_result"):
        index = node.target.cheap_result
        parts = (user for user in node.users if user.target is operator.getitem and user.args[1] == index)
        yield from (node,) if index is None else parts


def _users(result: fx.Node) -> Iterator[fx.Node]:
    """The calls that may save `result` or a view of it."""
    for user in list(result.users):
        if user.op not in ("call_method", "call_function") or isinstance(user.target, torch._ops.HigherOrderOperator):
            continue
        name = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
        if name in _VIEWS | _PERHAPS_THE_SAME:
            yield from _users(user)
        if name not in _VIEWS and user.target is not operator.getitem:
            yield user


def _rematerializing(function: Any) -> Callable[..., Any]:
    """`function`, called within `rematerializing`."""
    if hasattr(function, "rematerializes"):
        return cast(Callable[..., Any], function)

    def call(*args: Any, **kwargs: Any) -> Any:
        with rematerializing():
            return function(*args, **kwargs)

    call.__name__ = f"rematerializing_{function.__name__}"
    call.rematerializes = True  # type: ignore[attr-defined]
    if hasattr(function, "cheap_result"):
        call.cheap_result = function.cheap_result  # type: ignore[attr-defined]
    return call


def rematerializing() -> AbstractContextManager[None]:
    """A context in which results of fxopt's ops are not saved for backward, but computed again.

    Does nothing where hooks for saved tensors are in force already, such as those of an outer checkpoint: only the
    innermost are called, and they are the caller's.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


class _Recipe:
    """What stands for a saved result: the autograd node of the op that computed it."""

    def __init__(self, node: Any, shape: torch.Size):
        self.node, self.shape = node, shape
        node.num_saved = getattr(node, "num_saved", 0) + 1

    def result(self) -> Tensor:
        """The result, kept until the last of those who saved it has asked for it."""
        if getattr(self.node, "recomputed", None) is None:
            self.node.recomputed, self.node.num_left = self.node.recompute(self.node), self.node.num_saved
        result: Tensor = self.node.recomputed
        self.node.num_left -= 1
        if self.node.num_left == 0:
            self.node.recomputed = None
        return result.view(self.shape)


class _Kept:
    """A tensor that is saved as ever. With hooks, torch leaves the check for writes to whoever saves."""

    def __init__(self, tensor: Tensor):
        # Detached (torch attaches the graph again): an op that saves its own result would hold itself for ever.
        self.tensor, self.version = tensor.detach(), tensor._version

    def result(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {self.tensor.dtype} tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}; expected version {self.version} instead"
            )
        return self.tensor


def _pack(tensor: Tensor) -> _Kept | _Recipe:
    owner = tensor._base if tensor._base is not None else tensor  # a linear layer saves a flattened view
    node: Any = owner.grad_fn
    recomputable = hasattr(node, "recompute") and owner.output_nr == node.recomputed_output
    if recomputable and tensor.is_contiguous() and tensor.numel() == owner.numel():
        return _Recipe(node, tensor.shape)
    return _Kept(tensor)


def _unpack(saved: _Kept | _Recipe) -> Tensor:
    return saved.result()
