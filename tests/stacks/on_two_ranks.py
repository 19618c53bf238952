"""Run by torchrun on two processes: calls under DDP and FSDP2, their gradients against those of one plain model."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxopt
from tests.stacks.runs import BACKBONE_HITS
from tests.stacks.test_loops import of_log_probs, of_logits, with_labels
from tests.tiny_models import tiny_batch, tiny_llama

LOSSES = {"labels": with_labels, "logits": of_logits, "log-probabilities": of_log_probs}


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    batch = tiny_batch(num_rows=4)
    return {**batch, "input_ids": batch["input_ids"].roll(rank, 1), "labels": batch["labels"].roll(rank, 1)}


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp2(model: Any, layers: bool) -> nn.Module:
    for layer in model.model.layers if layers else ():
        fully_shard(layer)
    fully_shard(model)
    return model  # type: ignore[no-any-return]


WRAPPERS = {
    "ddp": lambda model: ddp(model),
    "ddp, unused parameters searched": lambda model: ddp(model, find_unused_parameters=True),
    "ddp, static graph": lambda model: ddp(model, static_graph=True),
    "fsdp2": lambda model: fsdp2(model, layers=False),
    "fsdp2 by layer": lambda model: fsdp2(model, layers=True),
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def trial(wrapper: str, loss: str) -> dict[str, Any]:
    plain = tiny_llama()
    for rank in range(2):
        (LOSSES[loss](plain, batch_of(rank)) / 2).backward()
    truth = {name: parameter.grad for name, parameter in plain.named_parameters()}
    model = fxopt.optimize(tiny_llama(), "fp32")
    wrapped = WRAPPERS[wrapper](model)
    for _ in range(2):  # the second call is one that has been captured
        wrapped.zero_grad()
        LOSSES[loss](wrapped, batch_of(dist.get_rank())).backward()
    errors = {}
    for name, parameter in wrapped.named_parameters():
        expected = truth[name.removeprefix("module.")]
        assert expected is not None
        found = whole(parameter.grad) if parameter.grad is not None else torch.zeros_like(expected)
        errors[name] = float((found - expected).norm() / expected.norm())
    report = fxopt.report(wrapped)
    return {
        "worst": max(errors.values()),
        "hits": report.hits,
        "logits": report.logits_computed,
        "fallbacks": dict(report.fallbacks),
        "optimized": report.optimized.total(),
    }


def one_rank_reads() -> dict[str, Any]:
    """A value of deferred logits, read on one rank alone: it is there, or an error; it waits for nobody."""
    outcome = {}
    for wrapper in ("ddp", "fsdp2", "fsdp2 by layer"):
        model = WRAPPERS[wrapper](fxopt.optimize(tiny_llama(), "fp32"))
        outputs = model(**batch_of(dist.get_rank()))
        said = ""
        if dist.get_rank() == 0:
            try:
                said = str(tuple(outputs.logits.argmax(-1).shape))
            except RuntimeError as error:
                said = f"{type(error).__name__}: {error}"
        outputs.loss.backward()
        outcome[wrapper] = said
    return outcome


def main(path: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found: dict[str, Any] = {f"{wrapper}: {loss}": trial(wrapper, loss) for wrapper in WRAPPERS for loss in LOSSES}
    found["one rank reads"] = one_rank_reads()
    found["expected"] = BACKBONE_HITS
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
