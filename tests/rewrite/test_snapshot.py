"""What is kept of a graph: of each operation its result, or each of its results."""

import torch
from torch import fx

from fxopt.rewrite.snapshot import snapshot


def test_each_of_several_results_is_kept():
    graph = fx.Graph()
    x = graph.placeholder("x")
    results = {
        torch.neg: torch.empty(2, 3),
        torch.chunk: (torch.empty(2, 3, dtype=torch.bfloat16), torch.empty(2, 1)),
        torch.split: [torch.empty(4), None],
        torch._assert: None,
    }
    for target, value in results.items():
        graph.call_function(target, (x,)).meta["example_value"] = value
    graph.output(x)
    one, two, of_a_list, none = snapshot(fx.GraphModule(torch.nn.Module(), graph))
    assert (one.dtype, one.shape, one.size_bytes, one.results) == ("float32", (2, 3), 24, ())
    assert (two.dtype, two.shape, two.size_bytes) == ("", (), 12 + 8)
    assert two.results == (("bfloat16", (2, 3)), ("float32", (2, 1)))
    assert two.value == "bfloat16[2, 3], float32[2, 1]"
    assert (of_a_list.results, none.results, none.value) == ((("float32", (4,)),), (), "")
