#!/usr/bin/env bash
# PyTorch 2.13.0, two processes (gloo): `.item()`, `float()` and `bool()` of a DTensor give what this rank holds of
# it, also where that is its share of a sum that is still to be made. No error, no warning, another number on each
# rank. In 2.14.1 `any()` alone is mended.
#
# A tensor 1, 2, 3, 4, 5, NaN lies in two halves on two ranks. Expected of `(t == t).sum().item()` 5 on both ranks, of
# `t.isnan().any().item()` True on both, which is what full_tensor() gives first; a DTensor stands for the whole
# tensor in all other operations. Seen: 3 and 2, False and True. `max()` and `mean()` of the numbers likewise.
# The documentation of DTensor does not speak of item(); upstream it has been reported, and was once called intended.
# FSDP2 and tensor parallel gradients are DTensors: `if grad.isnan().any():` takes one branch on one rank and another
# on the next, and logged norms and losses are shares. `.full_tensor().item()` is right.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def on_a_rank(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, float("nan")])
    tensor = distribute_tensor(whole, mesh, [Shard(0)])
    numbers = distribute_tensor(whole.nan_to_num(6.0), mesh, [Shard(0)])
    results = {
        "count": (tensor == tensor).sum(),
        "any NaN": tensor.isnan().any(),
        "sum": numbers.sum(),
        "max": numbers.max(),
        "mean": numbers.mean(),
    }
    seen = {what: result.item() for what, result in results.items()}
    full = {what: result.full_tensor().item() for what, result in results.items()}
    lines = [None, None]
    torch.distributed.all_gather_object(lines, f"rank {rank}: item() gives {seen}, full_tensor() gives {full}")
    if rank == 0:
        print(*lines, sep="\n", flush=True)
    assert full == {"count": 5, "any NaN": True, "sum": 21.0, "max": 6.0, "mean": 3.5}
    first = {"count": 3, "any NaN": False, "sum": 6.0, "max": 3.0, "mean": 2.0}
    second = {"count": 2, "any NaN": True, "sum": 15.0, "max": 6.0, "mean": 5.0}
    assert seen == (first, second)[rank], "not as it was seen"
    assert bool(results["any NaN"]) == seen["any NaN"] and float(results["sum"]) == seen["sum"]
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    print(torch.__version__, flush=True)
    torch.multiprocessing.spawn(on_a_rank, (sys.argv[1],), nprocs=2)
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" "$folder/show.py" "$folder/meeting-point" 2> "$folder/errors.txt" || {
  cat "$folder/errors.txt" >&2
  exit 1
}
