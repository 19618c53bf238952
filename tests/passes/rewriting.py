"""What the tests of all rules need: a function rewritten by the pipeline, and judged."""

import torch
from torch import fx

from fxopt.passes.pipelines import EXACT
from fxopt.rewrite.match import NearMiss
from fxopt.rewrite.prove import Prover
from tests.accuracy import assert_op_as_accurate
from tests.captured_graphs import captured, run_optimized, targets

DTYPES = [torch.float32, torch.bfloat16]


def near_misses(function, *inputs) -> list[NearMiss]:
    module = captured(function, *inputs)
    return [miss for record in EXACT.run(module, None) for miss in record.outcome.near_misses]


def optimized_targets(function, *inputs) -> list[str]:
    return targets(run_optimized(EXACT, function, *inputs)[0])


def assert_rewritten(op: str, function, *inputs: torch.Tensor) -> None:
    """`function` becomes `op` alone, is as accurate as before, and a second run of the passes changes nothing."""
    graph, _ = run_optimized(EXACT, function, *inputs)
    assert op in targets(graph), targets(graph)
    again = [record for record in EXACT.run(graph, None) if record.outcome.changes]
    assert not again

    def rewritten(*arguments):
        return run_optimized(EXACT, function, *arguments)[1]

    assert_op_as_accurate(rewritten, function, *inputs)


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def proven(function, *inputs: torch.Tensor) -> tuple[fx.GraphModule, list[str]]:
    """The rewritten graph, and the ops that it got, of which the proof refused none."""
    graph = captured(function, *inputs)
    records = EXACT.run(graph, Prover())
    refused = [refused for record in records for refused in record.outcome.refused]
    assert not refused, [each.proof.reason for each in refused]
    return graph, [change.op for record in records for change in record.outcome.changes]


def assert_proven(op: str, function, *inputs: torch.Tensor) -> None:
    assert proven(function, *inputs)[1] == [op]
