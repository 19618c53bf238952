#!/usr/bin/env bash
# PyTorch 2.13.0 and 2.14.1, two processes (gloo): the mean losses mse_loss, smooth_l1_loss, huber_loss and
# binary_cross_entropy_with_logits of a DTensor whose rows do not divide evenly are the mean of the ranks' means; loss
# and gradients are wrong. `mean()` itself and l1_loss are right.
#
# Rows 1, 1, 4 and a target of zeros, two rows on one rank and one on the other. Expected: mse 6 and gradients 2/3,
# 2/3, 8/3, as without DTensor and as ((x - t) ** 2).mean() gives. Seen: 8.5 and 1, 1, 8. No error; cross_entropy
# refuses such shards with one. The documentation says nothing of it. Value heads, distillation on hidden states and
# reward models use these losses, and a last batch or a number of experts that does not divide by the ranks is all it
# takes: a row of a small share counts for more.
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
from torch.nn import functional

LOSSES = {
    "mse_loss": functional.mse_loss,
    "smooth_l1_loss": functional.smooth_l1_loss,
    "huber_loss": functional.huber_loss,
    "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
    "l1_loss": functional.l1_loss,
    "mse written out": lambda given, target: ((given - target) ** 2).mean(),
}


def on_a_rank(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    rows, target = torch.tensor([1.0, 1.0, 4.0]), torch.zeros(3)
    wrong = []
    for name, loss in LOSSES.items():
        plain = rows.clone().requires_grad_()
        shards = distribute_tensor(rows, mesh, [Shard(0)]).requires_grad_()
        of_plain = loss(plain, target)
        of_plain.backward()
        of_shards = loss(shards, distribute_tensor(target, mesh, [Shard(0)]))
        of_shards.backward()
        value, gradient = of_shards.full_tensor().detach(), shards.grad.full_tensor()
        if not (torch.allclose(value, of_plain) and torch.allclose(gradient, plain.grad)):
            wrong.append(name)
        if rank == 0:
            print(f"{name}: {value:.4f} for {of_plain:.4f}, gradients {gradient} for {plain.grad}", flush=True)
        if name == "mse_loss":
            assert value.item() == 8.5 and gradient.tolist() == [1.0, 1.0, 8.0], "not as it was seen"
    assert wrong == list(LOSSES)[:4], f"not as it was seen: {wrong}"
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
