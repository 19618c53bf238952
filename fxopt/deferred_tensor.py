"""A tensor whose values are computed when somebody reads one.

It is a `torch.Tensor` with a shape, a dtype, a device and a place in the autograd graph, but without memory. Whoever
walks, flattens, detaches, moves or casts it gets another like it: `DistributedDataParallel`, FSDP2, accelerate and the
Trainer do all of that to a model's outputs. The first operation that needs a value computes it.

Autograd does not know the difference: operations are recorded with this tensor as their input, hooks on it run, and its
gradient goes to the node that made it. Only below autograd, in `__torch_dispatch__`, the values take its place.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Compute = Callable[[], Tensor]

_aten = torch.ops.aten
# What gives another name to the same values, and what gives the same values in other memory or in another dtype.
_ALIASES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
_COPIES = {_aten.clone.default, _aten._to_copy.default}


class _Values:
    """The values of one tensor, or of several that share memory: computed once, by the first who asks."""

    def __init__(self, compute: Compute, original: _Values | None = None):
        self._compute: Compute | None = compute
        self._original = original  # what these are a copy of
        self._copies: list[weakref.ref[_Values]] = []
        self._tensor: Tensor | None = None
        if original is not None:
            original._copies.append(weakref.ref(self))

    @property
    def is_computed(self) -> bool:
        return self._tensor is not None

    def tensor(self) -> Tensor:
        if self._original is not None:
            self._original.tensor()  # makes its copies
            self._original = None
        if self._tensor is None:
            assert self._compute is not None
            self._tensor, self._compute = self._compute(), None
            # Copies are of these values, and not of what somebody writes over them later.
            for copy_of_these in [reference() for reference in self._copies]:
                if copy_of_these is not None:
                    copy_of_these.tensor()
            self._copies.clear()
        return self._tensor


class DeferredTensor(Tensor):
    """A tensor (...) of `compute()`'s values, which returns a plain tensor of this shape, dtype and device.

    `source` is what the values come from, for who can do without them; a copy in another dtype keeps it.
    """

    _deferred: _Values
    source: Any

    @staticmethod
    def __new__(
        cls, compute: Compute | _Values, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: Any
    ) -> DeferredTensor:
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        made: DeferredTensor = Tensor._make_wrapper_subclass(cls, tuple(shape), **options)
        made._deferred = compute if isinstance(compute, _Values) else _Values(compute)
        made.source = source
        return made

    # Below autograd everything is known: operations need not be seen above it as well.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, DeferredTensor):
            if func in _ALIASES or (func is _aten.view.default and tuple(args[1]) == tuple(first.shape)):
                return first._like(first._deferred, first.dtype, first.device)
            if func in _COPIES and not first._deferred.is_computed:
                return first._copy(func, args[1:], kwargs)
        plain: dict[int, Any] = {}  # what stood for a deferred tensor, to give that back where it was written to

        def unwrap(value: Any) -> Any:
            if not isinstance(value, DeferredTensor):
                return value
            tensor = value.plain_values()
            plain[id(tensor)] = value
            return tensor

        results = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if not func._schema.is_mutable:
            return results
        return tree_map(lambda result: plain.get(id(result), result), results)

    def plain_values(self) -> Tensor:
        """The values, as a plain tensor without a gradient: that of this tensor is autograd's."""
        return self._deferred.tensor()

    @property
    def is_computed(self) -> bool:
        """Whether somebody has read a value."""
        return self._deferred.is_computed

    def _like(self, values: _Values, dtype: torch.dtype, device: torch.device) -> DeferredTensor:
        return DeferredTensor(values, self.shape, dtype, device, self.source)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> DeferredTensor:
        values = self._deferred
        dtype, device = kwargs.get("dtype") or self.dtype, kwargs.get("device") or self.device
        # Without gradient: what is recorded is the copy of the deferred tensor, above.
        copied = _Values(lambda: func(values.tensor(), *args, **kwargs), original=values)
        return self._like(copied, dtype, torch.device(device))

    # What does not come through the dispatcher ------------------------------------------------------------------------

    def _plain(self) -> Tensor:
        values = self.plain_values().detach()
        return values.requires_grad_() if self.requires_grad else values

    def retain_grad(self) -> None:
        """Raises RuntimeError for logits beside a loss: what is retained would lack that loss's part."""
        if getattr(self.source, "is_beside_loss", False):
            raise RuntimeError(
                "the loss of this call is computed without its logits, and no gradient passes through them: call the "
                "model without labels and compute the loss of `outputs.logits`, or use fxopt.restore(model)"
            )
        super().retain_grad()

    def numpy(self, *, force: bool = False) -> Any:
        return self._plain().numpy(force=force)

    def tolist(self) -> Any:
        return self._plain().tolist()

    def data_ptr(self) -> int:
        return self._plain().data_ptr()

    def untyped_storage(self) -> Any:
        return self._plain().untyped_storage()

    def __dlpack__(self, **options: Any) -> Any:
        return self._plain().__dlpack__(**options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not self.is_leaf:
            # torch's own words for any tensor that is a result; it would look at the memory first.
            raise RuntimeError(
                "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the "
                "moment.  If you were attempting to deepcopy a module, this may be because of a torch.nn.utils."
                "weight_norm usage, see https://github.com/pytorch/pytorch/pull/103001"
            )
        return copy.deepcopy(self._plain(), memo)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self._plain())
