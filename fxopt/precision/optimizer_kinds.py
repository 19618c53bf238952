"""The update rules: AdamW in fxopt's kernel; SGD, Adafactor and Muon in torch's own classes. All in float32.

Each rule takes the parameters of one group, reads them as float32, updates, and rounds once at the store.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fxopt.kernels import adamw_8bit
from fxopt.kernels.adamw import QUANTIZED_CHUNK_NUMEL, Hyper, foreach_adamw_
from fxopt.kernels.moment_codes import Scratch
from fxopt.kernels.rounding import Rounding
from fxopt.precision import moment_ranges, optimizer_states
from fxopt.precision.parameter_storage import is_int8, local, storage_of

Kind = Literal["adamw", "sgd", "adafactor", "muon"]
Group = dict[str, Any]
State = dict[str, Any]

# Elements that pass through float32 scratch at a time on a GPU, where states are quantized or weights are int8.
GPU_CHUNK_NUMEL = 1 << 22  # launches cost more than what a few of its elements take


@dataclass(slots=True)
class Item:
    """One parameter with a gradient. `index` tells the noise of one parameter from another's."""

    parameter: Tensor
    state: State
    index: int

    @property
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return local(self.parameter.grad)

    def storage(self, group: Group) -> Any:
        """The parameter's values; the state already counts this step."""
        compensation = self.state.get("compensation")
        return storage_of(
            self.parameter,
            group["rounding"],
            seed=group["seed"],
            step=int(self.state["step"]),
            index=self.index,
            compensation=local(compensation) if compensation is not None else None,
        )


class UpdateRule(Protocol):
    """One kind of optimizer. `signed` names the states that may be quantized, and whether they have a sign."""

    signed: dict[str, bool]

    def check(self, parameter: Tensor, name: str) -> None:
        """Raises ValueError or TypeError for a parameter that this rule cannot update."""

    def update(self, items: Sequence[Item], group: Group) -> None:
        """One update of each parameter and its state, in place. `state["step"]` already counts it."""


class AdamWRule:
    """fxopt's kernel. State: `exp_avg`, `exp_avg_sq` (...), zeros at the first step."""

    signed = {"exp_avg": True, "exp_avg_sq": False}  # noqa: RUF012

    def check(self, parameter: Tensor, name: str) -> None:
        """AdamW updates every parameter."""

    def update(self, items: Sequence[Item], group: Group) -> None:
        plain: list[Item] = []
        in_8_bits: list[Item] = []
        in_chunks: list[Item] = []
        for item in items:
            moment = local(item.state["exp_avg"])
            if _has_8bit_kernel(item, moment, group["rounding"]):
                in_8_bits.append(item)
            elif is_int8(item.parameter) or moment_ranges.is_quantized(moment):
                in_chunks.append(item)
            else:
                plain.append(item)
        self._update_in_chunks(in_chunks, group)
        compensations = [item.state.get("compensation") for item in plain]
        foreach_adamw_(
            **_arguments(plain),
            exp_avgs=[local(item.state["exp_avg"]) for item in plain],
            exp_avg_sqs=[local(item.state["exp_avg_sq"]) for item in plain],
            **_adamw_options(group),
            rounding=group["rounding"],
            seed=group["seed"],
            compensations=[local(cut_off) if cut_off is not None else None for cut_off in compensations],
        )
        adamw_8bit.foreach_adamw_8bit_(
            **_arguments(in_8_bits),
            exp_avgs=[moment_ranges.for_kernel(local(item.state["exp_avg"])) for item in in_8_bits],
            exp_avg_sqs=[moment_ranges.for_kernel(local(item.state["exp_avg_sq"])) for item in in_8_bits],
            hyper=Hyper(**_adamw_options(group)),
            rounding=group["rounding"],
            seed=group["seed"],
        )

    def _update_in_chunks(self, items: Sequence[Item], group: Group) -> None:
        scratch = {device: _Scratch(device) for device in {item.gradient.device for item in items}}
        beta2 = float(group["betas"][1])
        for item in sorted(items, key=lambda item: int(item.state["step"])):  # whose noise is kept for one step
            storage, moments = item.storage(group), [local(item.state[name]) for name in self.signed]
            noise = moment_ranges.Noise(group["seed"], int(item.state["step"]), item.index)
            gradient = item.gradient.reshape(-1)
            numel, device = gradient.numel(), gradient.device
            aligned = math.lcm(storage.alignment, *(getattr(moment, "block_size", 1) for moment in moments))
            most = QUANTIZED_CHUNK_NUMEL if device.type == "cpu" else GPU_CHUNK_NUMEL
            chunk = max(aligned, most // aligned * aligned)
            for start in range(0, numel, chunk):
                stop = min(start + chunk, numel)
                p32, g32, m32, v32, passing = scratch[device].take(stop - start)
                values = storage.read(start, stop, p32)
                m, v = (
                    moment_ranges.read(moment, start, stop, out, passing)
                    for moment, out in zip(moments, (m32, v32), strict=True)
                )
                foreach_adamw_(
                    [values],
                    [g32.copy_(gradient[start:stop])],
                    [m],
                    [v],
                    [item.state["step"]],
                    **_adamw_options(group),
                    rounding="nearest",
                    seed=0,
                    indices=[0],
                )
                moment_ranges.write(moments[0], start, m, passing, noise=noise)
                moment_ranges.write(moments[1], start, v, passing, noise=noise, decay=beta2)
                storage.write(start, values, scratch=g32)
            storage.finish()


class _Scratch:
    """Memory for the float32 values of a chunk, for chunk after chunk; as much as the largest needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._provide(0)

    def _provide(self, numel: int) -> None:
        self._values = torch.empty(4, numel, dtype=torch.float32, device=self._device)
        self._states = Scratch(numel, self._device)

    def take(self, numel: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Scratch]:
        """For `numel` elements: parameter, gradient and two moments (numel,), and what the states pass through."""
        if numel > self._values.shape[1]:
            self._provide(numel)
        p, g, m, v = self._values[:, :numel]
        return p, g, m, v, self._states


class TorchRule:
    """A class of torch.optim, applied to a float32 copy of one parameter at a time: its formula, our rounding.

    State: that of the class, in float32 or quantized, and `step`.
    """

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer], options: Sequence[str], **fixed: Any) -> None:
        self._optimizer, self._options, self._fixed = optimizer, options, fixed
        self.signed = {"momentum_buffer": True}

    def check(self, parameter: Tensor, name: str) -> None:
        if hasattr(parameter, "to_local"):
            raise TypeError(f"{name} is sharded, and {self._optimizer.__name__} needs it whole: use kind='adamw'")
        if self._optimizer is torch.optim.Muon and parameter.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, and Muon updates matrices: use kind='adamw'")

    def update(self, items: Sequence[Item], group: Group) -> None:
        for item in items:
            self._update(item, group)

    def _update(self, item: Item, group: Group) -> None:
        storage, step, numel = item.storage(group), item.state["step"], item.gradient.numel()
        values = storage.read(0, numel)
        value = nn.Parameter(values.view(item.gradient.shape))
        value.grad = item.gradient.float().contiguous()  # as the values are: the order of sums depends on it
        own: dict[str, Any] = {name: group[name] for name in self._options if group[name] is not None}
        library = self._optimizer([value], lr=float(group["lr"]), **own, **self._fixed)
        if int(step) > 1:  # torch's class makes its state at the first step
            library.state[value] = {"step": step - 1} | {
                name: moment_ranges.read(local(state), 0, state.numel()).view(state.shape)
                if torch.is_tensor(state) and moment_ranges.is_quantized(local(state))
                else state
                for name, state in item.state.items()
                if name not in ("step", "compensation")
            }
        library.step()
        for name, state in library.state[value].items():
            if name == "step" or not torch.is_tensor(state):
                continue
            if name in self.signed:
                kept = item.state.get(name)
                if kept is not None and moment_ranges.is_quantized(kept):
                    noise = moment_ranges.Noise(group["seed"], int(step), item.index)
                    moment_ranges.write(kept, 0, state.reshape(-1), noise=noise)
                    continue
                state = optimizer_states.convert(state, group["optimizer_state"], signed=self.signed[name])
            item.state[name] = state
        storage.write(0, values)
        storage.finish()


def _has_8bit_kernel(item: Item, moment: Tensor, rounding: Rounding) -> bool:
    if is_int8(item.parameter) or moment_ranges.form_of(moment) != "8bit":
        return False
    return adamw_8bit.has_kernel(local(item.parameter), item.gradient, rounding)


def _arguments(items: Sequence[Item]) -> dict[str, Any]:
    return {
        "params": [local(item.parameter) for item in items],
        "grads": [item.gradient for item in items],
        "steps": [item.state["step"] for item in items],
        "indices": [item.index for item in items],
    }


def _adamw_options(group: Group) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {
        "lr": float(group["lr"]),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


# With Moonshot's scale ("Muon is Scalable for LLM Training", arXiv:2502.16982) a matrix moves as far as under AdamW, so
# that one learning rate serves the matrices and what Muon leaves to AdamW.
RULES: dict[Kind, UpdateRule] = {
    "adamw": AdamWRule(),
    "sgd": TorchRule(torch.optim.SGD, ("momentum", "nesterov", "weight_decay"), foreach=False),
    "adafactor": TorchRule(torch.optim.Adafactor, ("weight_decay",), foreach=False),
    "muon": TorchRule(torch.optim.Muon, ("momentum", "nesterov", "weight_decay"), adjust_lr_fn="match_rms_adamw"),
}
