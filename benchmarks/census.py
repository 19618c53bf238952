"""How many norms, gated activations, rotary embeddings and losses a model's eager forward contains.

Counted while the original code runs, from the names of its modules and functions and from the calls it makes, and so
without any knowledge of fxopt's rules: what the rules find is compared with it.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Of a layer or RMS norm; batch and group norms are another thing.
NORM_CLASS = re.compile(r".*(RMS|Layer|L2|T5|Simple|Head|Q|K)_?Norm.*|.*Norm(Gated)?|RMS.*", re.IGNORECASE)
ROTATION = re.compile(r"rotate_(half|every_two|queries_or_keys).*|_?apply_rotary_emb")
ACTIVATIONS = {F.silu, F.gelu, F.relu, torch.relu, torch.nn.functional.mish}
MULTIPLICATIONS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__}


def count_sites(model: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """The sites in what `run` calls: "norm", "gated activation", "rotary embedding" and "loss" to their numbers.

    A module that is called twice is two sites.
    """
    counting = _Counting()
    hooks = [
        hook
        for module in model.modules()
        if NORM_CLASS.fullmatch(type(module).__name__) and not isinstance(module, nn.GroupNorm | nn.BatchNorm1d)
        for hook in (module.register_forward_pre_hook(counting.enter), module.register_forward_hook(counting.leave))
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


class _Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._norms: list[nn.Module] = []  # that are running
        self._rotations: list[FrameType] = []
        self._activated: list[Tensor] = []  # kept alive, so that no other tensor is taken for one of them

    def enter(self, module: nn.Module, arguments: Any) -> None:
        self.found["norm"] += not self._norms  # a gated norm may contain a norm
        self._norms.append(module)

    def leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        self._norms.pop()

    def python_call(self, frame: FrameType, event: str, _: Any) -> None:
        """Sees, as `sys.setprofile` says, every function that is called and returns."""
        if not ROTATION.fullmatch(frame.f_code.co_name):
            return
        if event == "call":
            self.found["rotary embedding"] += not self._rotations
            self._rotations.append(frame)
        elif event == "return":
            self._rotations.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.cross_entropy:
            self.found["loss"] += 1
        elif function in (F.layer_norm, F.rms_norm) and not self._norms:
            self.found["norm"] += 1
        elif function is torch.view_as_complex and not self._rotations:
            self.found["rotary embedding"] += 1
        elif function in ACTIVATIONS:
            self._activated.append(result)
        elif function in MULTIPLICATIONS and not self._norms:
            operands = [arg for arg in args if isinstance(arg, Tensor)]
            if len(operands) == 2 and operands[0].shape == operands[1].shape:
                self.found["gated activation"] += any(x is a for x in operands for a in self._activated)
        return result
