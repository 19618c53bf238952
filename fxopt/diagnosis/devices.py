"""The CPU and each accelerator: what they are, and whether they compute."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.diagnosis.check import Check, failed
from fxopt.diagnosis.versions import install
from fxopt.error_lines import in_a_line
from fxopt.inspection.numbers import in_bytes

if TYPE_CHECKING:
    import torch


def cpu() -> list[Check]:
    """Model, cores, memory, and the instructions for bfloat16."""
    import torch

    described = _described_cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [
        described.get("model name") or platform.processor() or platform.machine(),
        f"{cores} cores, {torch.get_num_threads()} threads",
        _memory(),
        torch.backends.cpu.get_cpu_capability(),
    ]
    flags = set(described.get("flags", described.get("Features", "")).split())
    if flags:
        bfloat16 = sorted(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"})
        parts.append(f"bfloat16 instructions: {', '.join(bfloat16) or 'none'}")
    return [Check("device", "CPU", "ok", ", ".join(parts))]


def _described_cpu() -> dict[str, str]:
    """The fields of the first processor, on Linux."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace").partition("\n\n")[0] if path.exists() else ""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _memory() -> str:
    import torch

    from fxopt.precision.presets import device_memory

    total = device_memory(torch.device("cpu"))
    text = f"{in_bytes(total)} memory"
    path = Path("/proc/meminfo")
    if path.exists():
        found = next((line for line in path.read_text().splitlines() if line.startswith("MemAvailable:")), None)
        text += f" ({in_bytes(1024 * int(found.split()[1]))} free)" if found else ""
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's, which `auto` does not see
    if limit.exists() and (most := limit.read_text().strip()).isdigit() and int(most) < total:
        text += f", of which this container may take {in_bytes(int(most))}"
    return text


def gpus() -> list[Check]:
    """Each accelerator: name, memory, compute capability, formats; or why torch sees none."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [_no_gpu()]
    return [_gpu(torch.device(accelerator.type, index)) for index in range(torch.accelerator.device_count())]


def _gpu(device: torch.device) -> Check:
    import torch

    try:
        parts = list(_described_gpu(device))
        product = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
        if float((product @ product).sum()) != 16**3:
            raise ArithmeticError("a product of bfloat16 matrices of ones is wrong")
    except Exception as error:
        return failed("device", str(device), in_a_line(error))
    return Check("device", str(device), "ok", ", ".join(parts))


def _described_gpu(device: torch.device) -> Iterator[str]:
    import torch

    from fxopt.precision.policy import PolicyError
    from fxopt.precision.presets import computes_bfloat16
    from fxopt.precision.quantized import require_float8

    if device.type != "cuda":
        yield f"{device.type} device"
        return
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    yield properties.name
    yield f"{in_bytes(total)} memory ({in_bytes(free)} free)"
    yield f"compute capability {properties.major}.{properties.minor}"
    yield "bf16" if computes_bfloat16(device) else "no bf16"
    try:
        require_float8([device])
        yield "float8"
    except PolicyError:
        yield "no float8"


def _no_gpu() -> Check:
    """Why torch sees no GPU, as far as there are signs of one."""
    import torch

    signs = [path for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg") if Path(path).exists()]
    if not signs and not shutil.which("nvidia-smi"):
        return Check("device", "GPU", "missing", "none found", "training runs on the CPU")
    if not (torch.version.cuda or torch.version.hip or getattr(torch.version, "xpu", None)):
        why = f"this machine has a GPU's driver, and torch {torch.__version__} is built for CPUs only"
        return Check("device", "GPU", "unsupported", "", why, install("--force-reinstall torch==" + _public(torch)))
    hidden = next((name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ), None)
    try:
        torch.zeros(1, device="cuda")
        reason = "torch names no accelerator"
    except Exception as error:
        reason = in_a_line(error)
    if hidden:
        reason = f"{hidden} is {os.environ[hidden]!r}; {reason}"
    return Check("device", "GPU", "unsupported", "", reason, f"unset {hidden}" if hidden else "")


def _public(module: Any) -> str:
    """A version without the build: `2.13.0` of `2.13.0+cpu`."""
    return str(module.__version__).partition("+")[0]
