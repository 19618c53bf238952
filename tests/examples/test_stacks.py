"""The examples of training stacks run, as a user runs them, and end with a report of optimized calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["04_trainer", "05_trl", "06_preferences", "07_accelerate", "08_lightning", "09_adapters"]
)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "optimized call" in done.stdout and "rms_norm" in done.stdout
    assert "fell back" not in done.stdout and "logits were read" not in done.stdout
    assert "parameters are stepped by fxopt." in done.stdout
    assert "fxopt: capturing and checking" in done.stderr, "who waits is told why"
    assert "to the nearest" not in done.stderr and "autocast" not in done.stderr, done.stderr[-3000:]
