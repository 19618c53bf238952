"""A few elements of each parameter around its update, and the float32 shadow that says what the update should be."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.precision import moment_ranges
from fxopt.precision.parameter_storage import is_int8, local

# Rules of torch.optim under which an element's update depends on that element alone, so that a sample can be updated
# by itself.
_ELEMENTWISE = "Adadelta Adagrad Adam Adamax AdamW ASGD NAdam RAdam RMSprop Rprop SGD".split()
# Options that choose an implementation, not a result.
_IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")


@dataclass(frozen=True)
class Sample:
    """The sampled elements of one parameter in one step, float32 (n,); `intended` is None where nobody knows it."""

    parameter: Tensor
    before: Tensor
    gradient: Tensor
    after: Tensor
    intended: Tensor | None


class Sampler:
    """Reads at most `count` elements of a tensor, always the same: evenly spaced, and not all of one column."""

    def __init__(self, parameter: Tensor, count: int) -> None:
        part = local(parameter)
        shape, numel = tuple(part.shape), part.numel()
        stride = max(1, numel // count)
        while shape and stride > 1 and math.gcd(stride, shape[-1]) != 1:
            stride -= 1
        self.positions = torch.arange(0, numel, stride, device=part.device)[:count]
        self._shape = shape

    def read(self, tensor: Any) -> Tensor:
        """The elements of `tensor` in float32, whatever they are stored as; `tensor` has the parameter's shape."""
        tensor = local(tensor).detach()
        if is_int8(tensor):
            rows = self.positions // self._shape[1]
            return tensor.int_data.view(-1)[self.positions].float() * tensor.scale[rows].float()
        if moment_ranges.is_quantized(tensor):
            return moment_ranges.pick(tensor, self.positions)
        if tensor.is_contiguous():
            return tensor.view(-1).index_select(0, self.positions).float()
        return tensor[torch.unravel_index(self.positions, self._shape)].float()


class Shadow:
    """The update of one param group's samples in float32: torch's own class, with float32 states of its own.

    `exists` is False where no class of torch.optim is known that computes it element by element.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        self._class = _shadow_class(optimizer, group)
        self._optimizer: torch.optim.Optimizer | None = None
        self._samples: dict[Tensor, nn.Parameter] = {}

    @property
    def exists(self) -> bool:
        return self._class is not None

    def update(
        self, group: dict[str, Any], parameters: Sequence[Tensor], before: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """What float32 arithmetic makes of `before`, with the group's options of the moment."""
        assert self._class is not None
        known = set(self._samples)
        fresh = {
            p: nn.Parameter(values.clone()) for p, values in zip(parameters, before, strict=True) if p not in known
        }
        self._samples |= fresh
        if self._optimizer is None:
            self._optimizer = self._class(list(fresh.values()))
        elif fresh:
            self._optimizer.add_param_group({"params": list(fresh.values())})
        for mine in self._optimizer.param_groups:
            mine.update(
                (name, float(value) if torch.is_tensor(value) else value)
                for name, value in group.items()
                if name in mine and name not in ("params", *_IMPLEMENTATIONS) and value is not None
            )
        samples = [self._samples[parameter] for parameter in parameters]
        with torch.no_grad():
            for sample, value, grad in zip(samples, before, grads, strict=True):
                sample.copy_(value)
                sample.grad = grad
        self._optimizer.step()
        for sample in samples:
            sample.grad = None
        return [sample.detach() for sample in samples]

    def states(self, parameter: Tensor) -> dict[str, Tensor]:
        """The shadow's state of a parameter: the tensors of its samples' shape."""
        if self._optimizer is None or parameter not in self._samples:
            return {}
        sample = self._samples[parameter]
        found = self._optimizer.state[sample]
        return {name: value for name, value in found.items() if torch.is_tensor(value) and value.shape == sample.shape}


def chance_to_stay(before: Tensor, intended: Tensor) -> Tensor:
    """The probability that stochastic rounding of `intended` to bfloat16 gives `before`, a bfloat16 itself."""
    below, above, up = _neighbours(intended)
    return torch.where(below == before, 1 - up, torch.where(above == before, up, 0.0))


def rounding_variance(intended: Tensor) -> Tensor:
    """The mean square of what stochastic rounding to bfloat16 adds to `intended`."""
    below, above, up = _neighbours(intended)
    return ((above - below).square() * up * (1 - up)).nan_to_num(0.0, 0.0, 0.0)


def _neighbours(exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two bfloat16 values around float32 ones, in float32, and the chance that the larger in size is drawn."""
    bits = exact.contiguous().view(torch.int32)
    below = bits & -(1 << 16)  # towards zero
    up = (bits & ((1 << 16) - 1)).float() / (1 << 16)
    return below.view(torch.float32), (below + (1 << 16)).view(torch.float32), up


def _shadow_class(
    optimizer: torch.optim.Optimizer, group: dict[str, Any]
) -> Callable[..., torch.optim.Optimizer] | None:
    own = type(optimizer)
    kind = {"adamw": "AdamW", "sgd": "SGD"}.get(group["kind"]) if "kind" in group else own.__name__
    if kind not in _ELEMENTWISE and not own.__module__.startswith("torch.optim"):
        # Other libraries' AdamW: bitsandbytes' AdamW8bit, torchao's AdamW4bit and, with a flag, _AdamW.
        kind = next((name for name in ("AdamW", "Adam") if name in own.__name__), None)
    return getattr(torch.optim, kind) if kind in _ELEMENTWISE else None
