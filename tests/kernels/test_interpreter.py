"""The tests of this folder once more, on the Triton kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = (
    "elementary",
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "add_layer_norm",
    "glu",
    "clamped_swiglu",
    "relu_squared",
    "rope",
    "linear_cross_entropy",
    "linear_log_prob",
    "adamw_triton",
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
@pytest.mark.parametrize("name", FILES)
def test_triton_kernels_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # What tracers see of an op is the same whatever kernel it has.
    command += ["-k", "not registration and not traced and not compiles"]
    done = subprocess.run(
        [*command, str(HERE / f"test_{name}.py")],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
