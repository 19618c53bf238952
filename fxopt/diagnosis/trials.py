"""What `fxopt doctor` tries, in a process of its own: imports, devices, a training step with each preset and backend.

`python -m fxopt.diagnosis.trials REQUEST` writes a line of JSON for whatever happens: `plan` (area and name of each
trial to come), `start` (the one that is next), `checks` (what it found), at last `end`; `refused`, if the device that
REQUEST names cannot be. REQUEST is JSON too: `device`, `packages` (name → import name), `done` (trials to skip).
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fxopt.diagnosis.check import DEFAULT_PRESET, Check, State, failed
from fxopt.diagnosis.devices import cpu, gpus
from fxopt.error_lines import in_a_line
from fxopt.inspection.numbers import in_count

if TYPE_CHECKING:
    import torch

    from fxopt.capture import Backend
    from fxopt.precision.policy import Policy

# One layer. 8-bit states begin at 4096 numbers, float8 products want multiples of 16.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROWS, LENGTH, LEARNING_RATE = 2, 32, 1e-2


class NotOptimizedError(RuntimeError):
    """The model trains, and not as fxopt would have it."""


class Trial(NamedTuple):
    area: str
    name: str
    attempt: Callable[[], Sequence[Check]]


def main(request: str) -> None:
    """Carry out the request. Returns early, for another process to go on, where a failure has broken the device."""
    # Libraries print: what they write to standard output goes to standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def say(**message: Any) -> None:
            print(json.dumps(message), file=out, flush=True)

        run(say=say, **json.loads(request))


def run(
    device: str | None, packages: Mapping[str, str], done: Collection[Sequence[str]], say: Callable[..., None]
) -> None:
    """Try everything that is not in `done`, and say what was found."""
    finished = {tuple(trial) for trial in done}
    imports = [Trial("imports", name, functools.partial(_import, name, module)) for name, module in packages.items()]
    say(plan=[(trial.area, trial.name) for trial in imports])
    for trial in imports:
        if (trial.area, trial.name) not in finished:
            attempt(trial, say)

    import torch

    from fxopt.precision.presets import policies

    try:
        where = torch.device(device) if device is not None else default_device()
    except RuntimeError as error:
        say(refused=f"no device {device!r}: {error}")
        return
    trials = list(_trials(where))
    nearest = {name: _nearest(policy, policies()) for name, policy in policies().items()}
    say(plan=[(trial.area, trial.name) for trial in trials], device=str(where), nearest=nearest)
    for trial in trials:
        if (trial.area, trial.name) not in finished and not attempt(trial, say) and not _is_healthy(where):
            return
    say(end=True)


def attempt(trial: Trial, say: Callable[..., None]) -> bool:
    """Carry out one trial and say what it found. An error is a finding. Returns whether there was none."""
    say(start=(trial.area, trial.name))
    try:
        checks = trial.attempt()
    except Exception as error:
        checks = [failed(trial.area, trial.name, in_a_line(error))]
    say(checks=[asdict(check) for check in checks])
    return all(check.state == "ok" for check in checks)


def default_device() -> torch.device:
    """The accelerator that torch names, else the CPU."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def _trials(device: torch.device) -> Iterator[Trial]:
    from typing import get_args

    from fxopt.capture import Backend
    from fxopt.precision.presets import policies

    yield Trial("device", "CPU", cpu)
    yield Trial("device", "GPU", gpus)
    for name in policies():
        yield Trial("presets", name, functools.partial(preset, name, device))
    yield Trial("presets", "auto", functools.partial(auto, device))
    for name in get_args(Backend):
        if name != "auto":
            yield Trial("backends", name, functools.partial(backend, name, device))
    yield Trial("kernels", "Triton", functools.partial(triton_kernels, device))


def _import(name: str, module: str) -> list[Check]:
    importlib.import_module(module)
    return [Check("versions", name, "ok")]


def _is_healthy(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access nothing does, in this process."""
    import torch

    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except Exception:
        return device.type == "cpu"


def _nearest(policy: Policy, presets: Mapping[str, Policy]) -> list[str]:
    """The other presets, the one that gives most parameters the same precision first."""
    from fxopt.precision.policy import PRECISION_FIELDS
    from fxopt.precision.roles import Role

    def differences(other: Policy) -> int:
        pairs = [(policy.precision("", role), other.precision("", role)) for role in Role]
        return sum(getattr(one, field) != getattr(two, field) for one, two in pairs for field in PRECISION_FIELDS)

    return sorted((name for name in presets if name != policy.name), key=lambda name: differences(presets[name]))


# Training ------------------------------------------------------------------------------------------------------------


def preset(name: str, device: torch.device) -> list[Check]:
    """One training step with the preset. Raises what it raises, NotOptimizedError if the original forward ran."""
    needed = name == DEFAULT_PRESET
    return [Check("presets", name, "ok", training_step(name, device), needed=needed)]


def auto(device: torch.device) -> list[Check]:
    """What `auto` chooses on this device, and one training step with it."""
    from fxopt.precision.presets import limits

    *most, (largest, _) = limits(device).items()
    sizes = [f"{name} up to {in_count(number)} trainable parameters" for name, number in most]
    chosen = ", ".join([*sizes, f"{largest} beyond" if sizes else largest])
    return [Check("presets", "auto", "ok", f"{chosen}; {training_step('auto', device)}")]


def backend(name: Backend, device: torch.device) -> list[Check]:
    """One training step through the backend, with the default preset, or with fp32 where that is at fault."""
    remark = "; this is what backend='auto' runs" if name == "eager" else ""
    try:
        return [Check("backends", name, "ok", training_step(DEFAULT_PRESET, device, name) + remark)]
    except Exception as first:
        try:
            return [Check("backends", name, "ok", training_step("fp32", device, name) + f", in fp32{remark}")]
        except Exception:
            state, why, mend = _explained(name, device, first)
            return [Check("backends", name, state, "", why, mend)]


def training_step(policy: str, device: torch.device, backend: Backend = "auto") -> str:
    """Optimize a tiny model, train it for one step, and return what happened, in words.

    Raises what goes wrong: ArithmeticError for a loss that is not finite, RuntimeError for parameters that did not
    change, NotOptimizedError if the original forward ran.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fxopt import api

    start = time.perf_counter()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train().to(device)
    api.optimize(model, policy, backend=backend)
    optimizer = api.optimizer(model, lr=LEARNING_RATE)
    before = {name: _values(parameter) for name, parameter in model.named_parameters()}
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH)).to(device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    if not math.isfinite(value := loss.item()):
        raise ArithmeticError(f"the loss is {value}")
    same = [name for name, parameter in model.named_parameters() if torch.equal(before[name], _values(parameter))]
    if same:
        raise RuntimeError(f"{len(same)} of {len(before)} parameters did not change: {', '.join(same)}")
    report = api.report(model)
    if report.fallbacks or report.uncovered or not report.graphs:
        reasons = [*report.fallbacks, *report.uncovered]
        raise NotOptimizedError(f"training runs the original forward: {'; '.join(reasons) or 'no graph was captured'}")
    return (
        f"loss {value:.2f}, {len(before)} of {len(before)} parameters changed, "
        f"{sum(report.hits.values())} rewrites, {time.perf_counter() - start:.1f} s"
    )


def _values(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of what a parameter holds, as plain numbers."""
    import torch

    from fxopt.precision.int8_weight import dequantized

    if hasattr(parameter, "int_data"):
        return dequantized(parameter, torch.float32)
    return parameter.detach().to(torch.float32, copy=True)


def _explained(backend: str, device: torch.device, error: Exception) -> tuple[State, str, str]:
    """State, reason and mend of a backend that failed. The compiler's own words say more than the model's fallback."""
    import torch

    if backend != "inductor":
        return "unsupported", in_a_line(error), ""
    try:
        torch.compile(lambda x: (x + 1).sin().sum(-1), backend="inductor")(torch.ones(4, 64, device=device))
    except Exception as compiling:
        error = getattr(compiling, "inner_exception", compiling)
        if (found := missing_tool()) is not None:
            return "missing", f"{in_a_line(error)}; {found[0]}", found[1]
    return "unsupported", in_a_line(error), ""


def missing_tool() -> tuple[str, str] | None:
    """What compiling needs and this machine lacks, and the command that gives it; None where it lacks nothing."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++", "gcc", "clang", "cl")):
        return "a C++ compiler is missing", system_package("compiler")
    for variable in ("CC", "CXX"):
        if os.environ.get(variable) and not shutil.which(os.environ[variable].split()[0]):
            return f"{variable} names no program", f"unset {variable}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are missing", system_package("headers")
    return None


def system_package(what: str) -> str:
    """The command of the system's package manager for "compiler" (C++) or "headers" (Python's); '' if none is known."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    commands = {
        "apt-get": ("apt-get install g++", f"apt-get install python{version}-dev"),
        "dnf": ("dnf install gcc-c++", f"dnf install python{version}-devel"),
        "zypper": ("zypper install gcc-c++", f"zypper install python{version.replace('.', '')}-devel"),
        "pacman": ("pacman -S gcc", "pacman -S python"),
        "apk": ("apk add g++", "apk add python3-dev"),
        "conda": ("conda install cxx-compiler", "conda install python"),
    }
    found = next((pair for name, pair in commands.items() if shutil.which(name)), None)
    if found is None:
        return ""
    command = found[what == "headers"]
    is_root = command.startswith("conda") or not hasattr(os, "geteuid") or os.geteuid() == 0
    return command if is_root else f"sudo {command}"


def triton_kernels(device: torch.device) -> list[Check]:
    """Whether fxopt's ops are Triton kernels on this device, and compute there what their specification does."""
    import torch

    from fxopt.kernels.backend import TRITON_DEVICES
    from fxopt.kernels.rms_norm import rms_norm, rms_norm_reference

    x = torch.linspace(-2, 2, 3 * 48, device=device).view(3, 48).requires_grad_()
    weight = torch.linspace(1, 2, 48, device=device).requires_grad_()
    results = []
    for norm in (rms_norm, rms_norm_reference):
        try:
            y = norm(x, weight, 1e-6)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
        except Exception as error:  # Triton's launchers are compiled too
            if (found := missing_tool()) is None or device.type not in TRITON_DEVICES:
                raise
            return [Check("kernels", "Triton", "missing", "", f"{in_a_line(error)}; {found[0]}", found[1])]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    if device.type not in TRITON_DEVICES:
        what = "PyTorch operations, which agree with the specification"
        reason = "Triton compiles for GPUs" if TRITON_DEVICES else "Triton cannot be imported"
        return [Check("kernels", "Triton", "unsupported", f"not used on {device.type}: the ops run {what}", reason)]
    return [Check("kernels", "Triton", "ok", f"used on {device.type}: compiled, and agrees with the specification")]


if __name__ == "__main__":
    main(sys.argv[1])
