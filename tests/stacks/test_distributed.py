"""Calls under DDP and FSDP2 on two gloo processes: gradients of one process, fusions kept, no logits for nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stacks.runs import ATTENTION, BACKBONE_HITS

ROOT = Path(__file__).resolve().parents[2]
WRAPPERS = ["ddp", "ddp, unused parameters searched", "ddp, static graph", "fsdp2", "fsdp2 by layer"]

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.xdist_group("two ranks"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ranks") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(ROOT / "tests/stacks/on_two_ranks.py"), str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    read: dict[str, Any] = json.loads(path.read_text())
    return read


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("loss", ["labels", "logits", "log-probabilities"])
def test_gradients_and_fusions_are_those_of_one_process(found, wrapper, loss):
    trial = found[f"{wrapper}: {loss}"]
    assert trial["worst"] < 1e-3, trial
    assert trial["optimized"] == 2 and not trial["fallbacks"], trial
    expected = {op: n for op, n in BACKBONE_HITS.items() if op not in ATTENTION}
    if wrapper == "fsdp2 by layer":  # its hooks break the graph between layers
        expected["add_rms_norm"] = 2
    assert {op: trial["hits"].get(op, 0) for op in expected} == expected, trial
    assert trial["hits"].get("linear_cross_entropy", 0) == int(loss == "labels"), trial
    assert (trial["logits"] > 0) == (loss == "logits"), trial


def test_one_rank_alone_reads_logits_or_gets_an_error(found):
    read = found["one rank reads"]
    assert read["ddp"] == "(4, 17)"
    for wrapper in ("fsdp2", "fsdp2 by layer"):
        assert read[wrapper] == "(4, 17)" or "reshard_after_forward" in read[wrapper], read
