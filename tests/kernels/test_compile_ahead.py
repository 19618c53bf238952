"""Each Triton kernel builds for real targets, on a machine that has none of them, and keeps its values in registers."""

import os

import pytest

from benchmarks.kernels import KERNELS, TARGETS, compile_ahead, resources
from fxopt.kernels.backend import TRITON_DEVICES

pytestmark = [
    pytest.mark.skipif(not TRITON_DEVICES, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_builds(name: str, dtype: str, target: str) -> None:
    binary = compile_ahead(name, dtype, target)
    assert binary.asm["hsaco" if target.startswith("hip") else "cubin"]


@pytest.mark.parametrize("name", KERNELS)
def test_spills_nothing(name: str) -> None:
    registers, spilled_bytes, _ = resources(name, "cuda:90")
    assert 0 < registers <= 128
    assert spilled_bytes == 0
