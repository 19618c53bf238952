"""How many norms, gated activations, rotary embeddings and losses a model's eager forward contains.

Counted while the original code runs, from the names of its modules and functions and from the calls it makes, and so
without any knowledge of fxopt's rules. `count_ops` counts what runs in their place when the model is optimized.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Of a layer or RMS norm; batch and group norms are another thing.
NORM_CLASS = re.compile(r".*(RMS|Layer|L2|T5|Simple|Head|Q|K)_?Norm.*|.*Norm(Gated)?|RMS.*", re.IGNORECASE)
# How many tensors a function rotates; queries and keys usually pass one after the other.
ROTATIONS = {
    re.compile(r"rotate_(half|pairwise|every_two|queries_or_keys).*|_apply_rotary_emb"): 1,
    re.compile(r"apply_rotary_pos_emb_interleave"): 2,
}
ACTIVATIONS = {F.silu, F.gelu, F.relu, torch.relu, torch.nn.functional.mish}
SQUARES = {torch.square, torch.pow, Tensor.square, Tensor.pow, Tensor.__pow__}
MULTIPLICATIONS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__}


def count_sites(model: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """The sites in what `run` calls: "norm", "gated activation", "squared relu", "rotary embedding", "loss" to numbers.

    A module that is called twice is two sites.
    """
    counting = _Counting()
    hooks = [
        hook
        for module in model.modules()
        if NORM_CLASS.fullmatch(type(module).__name__) and not isinstance(module, nn.GroupNorm | nn.BatchNorm1d)
        for hook in (
            module.register_forward_pre_hook(counting.enter, with_kwargs=True),
            module.register_forward_hook(counting.leave, with_kwargs=True),
        )
    ]
    profile = sys.getprofile()
    try:
        with counting:
            sys.setprofile(counting.python_call)
            run()
    finally:
        sys.setprofile(profile)
        for hook in hooks:
            hook.remove()
    return counting.found


def count_ops(run: Callable[[], Any]) -> Counter[str]:
    """How often each of fxopt's ops is called by what `run` calls, by name."""
    # A profiler, since Dynamo leaves its graphs aside while a dispatch mode watches. An op that is not differentiated,
    # as within a model's own autograd function, shows there only if it goes by the dispatcher.
    with patch("fxopt.kernels.op._is_watched", lambda: True), torch.autograd.profiler.profile() as profile:
        run()
    ops = [event for event in profile.function_events if event.name.startswith("fxopt::")]
    return Counter(op.name.removeprefix("fxopt::") for op in ops if not _is_within(op.cpu_parent, ops))


def _is_within(event: Any, ops: list[Any]) -> bool:
    return event is not None and (event in ops or _is_within(event.cpu_parent, ops))


class _Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._norms: list[int] = []  # for each norm that is running, how many had been found before it
        self._rotations: list[FrameType] = []
        # Kept alive, so that no other tensor is taken for one of them.
        self._activated: list[Tensor] = []
        self._rectified: list[Tensor] = []
        self._sigmoids: list[tuple[Tensor, Tensor]] = []  # and what they are of, but for a factor
        self._scaled: dict[int, Tensor] = {}  # the identity of a product with a number → what is multiplied
        self._kept: list[Tensor] = []

    def enter(self, module: nn.Module, arguments: Any, named: Any) -> None:
        self._norms.append(self.found["norm"])

    def leave(self, module: nn.Module, arguments: Any, named: Any, result: Any) -> None:
        before = self._norms.pop()
        rows = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        # What yields something else than its input's rows, a block or a scale for each row, is no norm, whatever its
        # name. A norm that contains a norm, as gated ones do, is one.
        if isinstance(result, Tensor) and result.shape == rows.shape:
            self.found["norm"] = before + 1

    def python_call(self, frame: FrameType, event: str, _: Any) -> None:
        """Sees, as `sys.setprofile` says, every function that is called and returns."""
        rotated = sum(n for pattern, n in ROTATIONS.items() if pattern.fullmatch(frame.f_code.co_name))
        if not rotated:
            return
        if event == "call":
            self.found["rotary embedding"] += 0 if self._rotations else rotated
            self._rotations.append(frame)
        elif event == "return":
            self._rotations.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.cross_entropy:
            self.found["loss"] += 1
        elif function in (F.layer_norm, F.rms_norm):
            self.found["norm"] += 1
        elif function is torch.view_as_complex and not self._rotations:
            self.found["rotary embedding"] += 1
        elif function in (torch.sigmoid, Tensor.sigmoid):
            self._sigmoids.append((result, self._scaled.get(id(args[0]), args[0])))
        elif function in ACTIVATIONS:
            self._activated.append(result)
            self._rectified += [result] * (function in (F.relu, torch.relu))
        elif function in SQUARES:
            self.found["squared relu"] += any(args[0] is rectified for rectified in self._rectified)
        elif function in MULTIPLICATIONS:
            self._multiplied([arg for arg in args if isinstance(arg, Tensor)], result)
        return result

    def _multiplied(self, operands: list[Tensor], result: Tensor) -> None:
        if len(operands) == 1:
            self._scaled[id(result)] = operands[0]
            self._kept.append(result)
        elif operands[0].shape == operands[1].shape:
            if any(s is x and of is y for s, of in self._sigmoids for x, y in (operands, operands[::-1])):
                self._activated.append(result)  # x * sigmoid(alpha * x)
            elif not self._norms:
                self.found["gated activation"] += any(x is a for x in operands for a in self._activated)
