"""One of two processes that sum gradients under DistributedDataParallel: STORE NUM_PASSES RANK.

Prints lines of three words: whether the sum is the optimizer's (or autograd's, in bfloat16), its error, and that of one
batch of the same rows; without and with buckets as gradients.
"""

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.precision.optimizer import Optimizer


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).square() * x).mean()  # type: ignore[no-any-return]


def summed(layers: nn.Module, x: Tensor, num_passes: int, is_hooked: bool, as_view: bool) -> Tensor:
    """The gradient (n,) that a step finds, in float64."""
    model = copy.deepcopy(layers)
    make: Any = Optimizer if is_hooked else torch.optim.SGD
    opt = make(model.parameters())
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
    for step in range(2):  # the second finds what the first has left behind
        if step:
            opt.zero_grad()
        passes = x.chunk(num_passes)
        with parallel.no_sync():
            for part in passes[:-1]:
                (loss(parallel, part) / num_passes).backward()
        (loss(parallel, passes[-1]) / num_passes).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])  # type: ignore[union-attr]


def errors(rank: int, num_passes: int) -> Iterator[tuple[bool, float, float]]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).bfloat16()
    inputs = torch.randn(2, num_passes * 8, 32).bfloat16()
    exact = copy.deepcopy(layers).double()
    loss(exact, inputs.double().flatten(0, 1)).backward()  # type: ignore[no-untyped-call]
    truth = torch.cat([p.grad.flatten() for p in exact.parameters()])  # type: ignore[union-attr]
    for as_view in (False, True):
        one_batch = summed(layers, inputs[rank], 1, True, as_view)
        for is_hooked in (True, False):
            found = summed(layers, inputs[rank], num_passes, is_hooked, as_view)
            of_sum, of_one_batch = ((each - truth).norm() / truth.norm() for each in (found, one_batch))
            yield is_hooked, float(of_sum), float(of_one_batch)


if __name__ == "__main__":
    store, num_passes, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for line in errors(rank, num_passes):
        print(*line)
    torch.distributed.destroy_process_group()
