"""Every kernel test runs twice: on the path that this machine's device takes, and, in a process of its own, on the
Triton kernels in Triton's interpreter (`test_interpreter.py`; by hand: `TRITON_INTERPRET=1 pytest tests/kernels`).

A process of its own, because the interpreter must be chosen before Triton is first imported.
"""

import importlib
import os
import pkgutil
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fxopt.kernels
from fxopt.kernels import linear_head
from fxopt.kernels.op import OPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert_float = interpreter._convert_float

    def convert_float_as_devices_do(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """float32 to bfloat16 rounds to nearest even on every device; the interpreter cuts the bits off."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_float(data, source, target, rounding)
        bits = np.asarray(data, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

    interpreter._convert_float = convert_float_as_devices_do

    call = interpreter.InterpretedFunction.__call__

    def call_without_patching_again(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function within a kernel patches Triton's language anew in each call, a quarter of the time: its launch has
        done so."""
        if self.fn.__globals__.get("tl") is not tl:
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_without_patching_again
    # Rows of zeros are programs, too.
    linear_head.ROW_MULTIPLE = 8
    # Nor do devices look for integers that overflow.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    # Launch the Triton kernels for CPU tensors.
    for module in pkgutil.iter_modules(fxopt.kernels.__path__):
        importlib.import_module(f"fxopt.kernels.{module.name}")
    for op in OPS.values():
        if "cuda" in op.kernels:
            op.register_kernel("cpu")(op.kernels["cuda"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the interpreter, which is slow: a kernel treats both two-byte dtypes alike, and bfloat16 stands for them."""
    if INTERPRETED:
        dtypes = {item: getattr(item, "callspec", None) and item.callspec.params.get("dtype") for item in items}
        left_out = [item for item in items if dtypes[item] == torch.float16 or item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """NaN in the memory that `torch.empty` hands out, so that an element no kernel writes shows.

    Each test has random numbers of its own, the same in each run.
    """
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
