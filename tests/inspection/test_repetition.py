"""A graph of many layers costs what it costs layer by layer, although only four of them are run."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaConfig

import fxopt
from fxopt.inspection import measure as measuring
from fxopt.inspection import repetition
from fxopt.inspection.measure import measure
from fxopt.inspection.meter import Cost
from fxopt.inspection.repetition import shorten
from tests.captured_graphs import captured
from tests.tiny_models import SIZES

NUM_LAYERS, WIDTH = 14, 8


def inputs(num_layers=NUM_LAYERS, trained=True, widths=None):
    widths = widths or [WIDTH] * num_layers
    weights = [torch.randn(WIDTH, width).requires_grad_(trained) for width in widths]
    return torch.randn(4, WIDTH), weights


def layer(x, weight):
    return x + torch.tanh(x @ weight) @ weight.T


def chain(x, weights):
    for weight in weights:
        x = layer(x, weight)
    return x.sum()


def alternating(x, weights):
    other = x.exp()
    for number, weight in enumerate(weights):
        x = layer(x, weight) * (other if number % 2 else x)
    return x.sum()


def checkpointed(x, weights):
    for weight in weights:
        x = checkpoint(layer, x, weight, use_reentrant=False)
    return x.sum()


def shared(x, weights):
    for weight in weights:
        x = layer(x, weights[0]) + weight.sum()
    return x.sum()


def through_a_buffer(x, weights):
    total = torch.zeros_like(x)
    for weight in weights:
        x = layer(x, weight)
        total.add_(x.detach())
    return x.sum() + total.sum()


def all_read_at_the_end(x, weights):
    states = [x]
    for weight in weights:
        states.append(layer(states[-1], weight))
    return torch.stack(states).sum()


def each_reads_two_before(x, weights):
    before = x
    for weight in weights:
        before, x = x, layer(x, weight) + before
    return x.sum()


def memories_first(x, weights):
    """What each layer reads was computed for all before, in as many calls: left unread, it would cost nothing."""
    memories = [torch.tanh(x @ weight) for weight in weights]
    for memory in memories:
        x = torch.sin(x * memory)
    return x.sum()


def unbound(x, weights):
    for weight in torch.stack(weights).unbind():
        x = torch.matmul(x, weight)
    return x.sum()


def contexts():
    """Products are kept, the rest is computed again."""

    def keep(context, op, *args, **kwargs):
        is_product = op == torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(keep)


def every_other_selectively(x, weights):
    for number, weight in enumerate(weights):
        options = {"context_fn": contexts} if number % 2 else {}
        x = checkpoint(layer, x, weight, use_reentrant=False, **options)
    return x.sum()


def of_two_lengths(x, weights):
    for number, weight in enumerate(weights):
        x = layer(x, weight)
        if number % 2:
            x = x.sin().cos().exp()
    return x.sum()


@torch.compiler.nested_compile_region
def region(x, weight):
    return torch.tanh(x @ weight)


def one_region(x, weights):
    """One inner graph, called again and again: what it costs is the sum."""
    for weight in weights:
        x = region(x, weight)
    return x.sum()


def two_take_turns(x, weights):
    """Each weight is used in every other layer: their gradients are added up."""
    for number in range(len(weights)):
        x = layer(x, weights[number % 2])
    return x.sum()


class Keeps(torch.autograd.Function):
    """Lets go of what it holds only when all is over."""

    held: ClassVar[list[torch.Tensor]] = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Keeps.held.append(grad.repeat(50, 1))
        return grad


def each_its_own(x, weights):
    for number, weight in enumerate(weights):
        x = layer(x, weight) * number
    return x.sum()


def measured_in_full(module, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "shorten", lambda _: None)
        return measure(module)


def assert_equal(found, expected):
    counted = [{key: cost for key, cost in m.costs.items() if cost != Cost()} for m in (found, expected)]
    assert counted[0] == counted[1]
    assert (found.peak_bytes, found.peak_at) == (expected.peak_bytes, expected.peak_at)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "model",
    [chain, alternating, checkpointed, shared, through_a_buffer, every_other_selectively, of_two_lengths],
)
def test_layers_that_are_left_out_are_counted(model, trained, monkeypatch):
    module = captured(model, *inputs(trained=trained))
    short = shorten(module)
    assert short is not None and len(short.graph.nodes) < 0.75 * len(module.graph.nodes)
    assert_equal(measure(module), measured_in_full(module, monkeypatch))


@pytest.mark.parametrize("num_layers", [NUM_LAYERS, NUM_LAYERS + 1])
@pytest.mark.parametrize(
    "model", [every_other_selectively, memories_first, unbound, one_region, two_take_turns, each_reads_two_before]
)
def test_layers_that_are_tied_to_others_are_counted_as_they_are(model, num_layers, monkeypatch):
    module = captured(model, *inputs(num_layers))
    assert_equal(measure(module), measured_in_full(module, monkeypatch))


@pytest.mark.parametrize("model", [all_read_at_the_end, each_its_own, memories_first, unbound, one_region])
def test_layers_that_are_not_alike_are_all_run(model, monkeypatch):
    module = captured(model, *inputs())
    assert shorten(module) is None
    assert_equal(measure(module), measured_in_full(module, monkeypatch))


def test_layers_that_take_turns_with_a_weight_are_left_out_by_turns():
    assert shorten(captured(two_take_turns, *inputs())).num_left_out <= 3


def test_a_wider_layer_in_the_middle_is_run(monkeypatch):
    module = captured(chain, *inputs(widths=[WIDTH] * 8 + [4 * WIDTH] + [WIDTH] * 3))
    short = shorten(module)
    assert short is not None and short.num_left_out == 3
    assert_equal(measure(module), measured_in_full(module, monkeypatch))


def test_of_few_layers_all_are_run():
    assert shorten(captured(chain, *inputs(4))) is None
    assert shorten(captured(chain, *inputs(6))).num_left_out > 0


@pytest.mark.parametrize("trained", [True, False])
def test_where_layers_turn_out_to_cost_other_things_all_are_run(trained, monkeypatch):
    """Were the structure to say too much: here the layer after those left out does more than the one before them."""
    module = captured(chain, *inputs(trained=trained, widths=[WIDTH] * 8 + [4 * WIDTH, WIDTH]))
    monkeypatch.setattr(repetition, "_sizes", lambda value: None)
    assert shorten(module).num_left_out > 0
    graphs, run = [], measuring._run
    monkeypatch.setattr(measuring, "_run", lambda *arguments: (graphs.append(arguments[2:]), run(*arguments)))
    assert_equal(measure(module), measured_in_full(module, monkeypatch))
    assert len(graphs[0]) == 1 and graphs[1:] == [(), ()]  # shortened, then in full; and in full


def test_layers_whose_backward_leaves_something_alive_are_all_run(monkeypatch):
    """Then the most is alive in the first layer, not in the last."""
    module = captured(chain, *inputs())
    for node in list(module.graph.nodes):
        if node.name.startswith("tanh"):
            with module.graph.inserting_after(node):
                kept = module.graph.call_function(Keeps.apply, (node,))
            node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
            kept.meta.update(node.meta)
    assert shorten(module) is not None
    full = measured_in_full(module, monkeypatch)
    Keeps.held.clear()
    assert_equal(measure(module), full)
    Keeps.held.clear()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_inspection_is_the_same(checkpointing, monkeypatch):
    def inspected():
        config = LlamaConfig(**SIZES | {"num_hidden_layers": 7})
        (graph,) = fxopt.inspect(
            config, "bf16-islands", batch_size=2, sequence_length=16, checkpointing=checkpointing, prove=False
        ).graphs
        assert not graph.not_measured
        return replace(graph, stages=tuple(replace(stage, elapsed_ms=0.0) for stage in graph.stages))

    runs = []
    monkeypatch.setattr(measuring, "shorten", lambda module: runs.append(shorten(module)) or runs[-1])
    quick = inspected()
    assert runs and all(runs)
    monkeypatch.setattr(measuring, "shorten", lambda _: None)
    assert inspected() == quick


def test_a_layer_is_found_in_a_module_that_names_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for number in range(8):
                setattr(self, f"part_{chr(97 + number)}", nn.Linear(WIDTH, WIDTH))

        def forward(self, x):
            for part in self.children():
                x = part(x).relu()
            return x.sum()

    assert shorten(captured(Model(), torch.randn(2, WIDTH))).num_left_out >= 3
