"""What `fxopt.inspect` finds: the same as a real run, for a configuration, a model and an optimized model."""

import copy
import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

import fxopt
from benchmarks.tiny_causal_lms import batch_for, tiny_causal_lm, tiny_config
from fxopt.inspection.diff import GraphDiff
from fxopt.inspection.meter import Cost
from fxopt.inspection.record import _portable
from tests.tiny_models import LLAMA_HITS, LLAMA_HITS_IN_BF16, SIZES, tiny_batch, tiny_llama

KINDS = ("llama", "gemma2", "qwen3_moe", "gpt2", "phi3")


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_gives_the_rewrites_of_a_real_run(kind):
    found = fxopt.inspect(tiny_config(kind), "bf16", batch_size=2, sequence_length=17)
    model = fxopt.optimize(tiny_causal_lm(kind), "bf16")
    batch = batch_for(model)
    del batch["attention_mask"]
    model(**batch)
    assert found.hits == fxopt.report(model).hits
    assert all(graph.not_measured == "" for graph in found.graphs)
    assert_every_rewrite_leads_to_a_line_of_source(found)
    for graph in found.graphs:  # every rewrite is in the list of what changed, and there once
        assert sorted(number for hunk in graph.hunks for number in hunk.rewrites) == list(range(len(graph.rewrites)))
        assert sum(stage.num_rewrites for stage in graph.stages) == len(graph.rewrites)


def assert_every_rewrite_leads_to_a_line_of_source(found):
    rewrites = [(graph, rewrite) for graph in found.graphs for rewrite in graph.rewrites]
    assert rewrites
    for graph, rewrite in rewrites:
        assert rewrite.removed, rewrite
        nodes = [graph.nodes[number] for number in (*rewrite.removed, *rewrite.added)]
        assert all(node.source is not None for node in nodes), rewrite
        for source in {node.source for node in nodes}:
            assert _line(source.file, source.line).strip() == source.code
        assert rewrite.source.split(": ")[0] in {node.source.place for node in nodes}


def _line(file: str, line: int) -> str:
    package, _, rest = file.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / rest).read_text().splitlines()[line - 1]


def test_an_optimized_model_shows_the_calls_that_it_ran():
    model = fxopt.optimize(tiny_llama(), "bf16")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model(**tiny_batch(padding=3))
    model(**tiny_batch())
    diff = fxopt.inspect(model)
    assert len(diff.graphs) == len(fxopt.report(model).graphs) == 2
    assert (diff.conditions.batch_size, diff.conditions.sequence_length) == (3, 17)
    assert [graph.call for graph in diff.graphs] == 2 * ["training, 3 × 17 tokens"]
    assert [(graph.kind, graph.frame, graph.runs) for graph in diff.graphs] == [(0, 0, 1), (1, 1, 1)]
    attention = {"causal_attention", "grouped_query_attention", "interval_attention"}
    assert {name: count for name, count in diff.hits.items() if name not in attention} == {
        name: 2 * count for name, count in LLAMA_HITS_IN_BF16.items() if name not in attention
    }
    assert diff.hits["interval_attention"] == LLAMA_HITS["causal_attention"] == diff.hits["causal_attention"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert fxopt.report(model).hits == {**LLAMA_HITS_IN_BF16, "interval_attention": 2}  # and the model is as it was
    assert len(fxopt.report(model).graphs) == 2


def test_an_optimized_model_that_has_not_run():
    with pytest.raises(ValueError, match="call it once with labels"):
        fxopt.inspect(fxopt.optimize(tiny_llama(), "bf16"))


def test_a_model_that_is_not_optimized():
    model = tiny_llama()
    assert fxopt.inspect(model, "bf16", sequence_length=17).hits == LLAMA_HITS_IN_BF16
    assert model.dtype == torch.float32 and "forward" not in vars(model)


def test_evaluation_saves_nothing():
    (graph,) = fxopt.inspect(LlamaConfig(**SIZES), training=False, sequence_length=17).graphs
    assert graph.stages[0].cost.backward_launches == graph.stages[0].cost.saved_bytes == 0
    assert graph.stages[0].cost.launches > 0


def test_checkpointing_saves_less_and_computes_more():
    plain, checkpointed = (
        fxopt.inspect(LlamaConfig(**SIZES), sequence_length=64, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert checkpointed.conditions.checkpointing and not plain.conditions.checkpointing
    assert plain.hits["rope"] == checkpointed.hits["rope"] == 4
    (graph,) = checkpointed.graphs
    assert {node.graph for node in graph.nodes if node.module.startswith("model.layers.0")} > {""}
    for stage, other in ((0, 0), (-1, -1)):
        assert checkpointed.graphs[0].stages[stage].cost.saved_bytes < plain.graphs[0].stages[other].cost.saved_bytes
        assert (
            checkpointed.graphs[0].stages[stage].cost.backward_flops > plain.graphs[0].stages[other].cost.backward_flops
        )


def test_progress_is_told():
    told = []
    config = LlamaConfig(**SIZES)
    fxopt.inspect(config, sequence_length=8, prove=False, on_progress=lambda *step: told.append(step))
    assert told[0] == ("capturing the graph", 0, len(told)) and told[-1][0] == "measuring: defer_logits"
    assert [(number, total) for _, number, total in told] == [(number, len(told)) for number in range(len(told))]


def test_a_checkpoint_that_ends_in_a_norm_is_measured():
    """A layer after it saves the norm's result as ever: what the norm would compute it from is gone."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    diff = fxopt.inspect(BertConfig(**sizes, is_decoder=True), "bf16", sequence_length=16, checkpointing=True)
    (graph,) = diff.graphs
    assert not graph.not_measured and graph.stages[-1].peak_bytes and diff.hits["add_layer_norm"]


def test_a_graph_break_is_told():
    class Talkative(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def forward(self, input_ids, labels=None):
            torch._dynamo.graph_break()
            return self.inner(input_ids=input_ids, labels=labels, use_cache=False)

    model = fxopt.optimize(Talkative(), "bf16")
    batch = tiny_batch()
    model(input_ids=batch["input_ids"], labels=batch["labels"])
    diff = fxopt.inspect(model)
    assert any("graph_break" in reason or "Graph break" in reason for reason in diff.graph_breaks), diff.graph_breaks
    assert diff.hits == fxopt.report(model).hits


def test_a_graph_that_runs_in_each_layer_costs_as_much_as_they_do():
    """As much as where the layers are one graph: a break makes no step smaller."""

    class Broken(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.register_forward_pre_hook(lambda module, inputs: torch._dynamo.graph_break())

    config = LlamaConfig(**SIZES | {"num_hidden_layers": 3})
    whole, broken = (fxopt.inspect(of(config), "bf16", sequence_length=16) for of in (LlamaForCausalLM, Broken))
    assert len(whole.graphs) == 1 < len(broken.graphs)
    assert max(graph.runs for graph in broken.graphs) > 1 == whole.graphs[0].runs
    assert broken.metrics["flops"] == whole.metrics["flops"]
    assert broken.metrics["saved_bytes"] >= whole.metrics["saved_bytes"] and "peak_bytes" not in broken.metrics
    most = max(graph.runs for graph in broken.graphs)
    assert f": training, 1 × 16 tokens, run {most} times: costs are those of one run" in str(broken)
    modules = {node.module for graph in broken.graphs for node in graph.nodes}
    assert "lm_head" in modules and not any(re.match(r"(self|__\w+)\b", path) for path in modules), modules


def test_code_that_looks_at_values_is_shown_from_the_real_run():
    class Curious(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def forward(self, input_ids, labels=None):
            if bool((input_ids >= 0).all()):
                input_ids = input_ids + 0
            return self.inner(input_ids=input_ids, labels=labels, use_cache=False)

    model = fxopt.optimize(Curious(), "bf16")
    batch = tiny_batch()
    model(input_ids=batch["input_ids"], labels=batch["labels"])
    diff = fxopt.inspect(model)
    assert diff.hits == fxopt.report(model).hits
    assert any(graph.not_measured for graph in diff.graphs)
    assert "costs are not known" in str(diff)
    for graph in diff.graphs:
        assert [stage.name for stage in graph.stages] == ["captured", "optimized"]
        assert graph.stages[-1].num_rewrites == len(graph.rewrites)
        assert {step for hunk in graph.hunks for step in hunk.steps} <= {"optimized"}


def test_a_sequence_that_is_too_long():
    with pytest.raises(ValueError, match="takes 64 at most"):
        fxopt.inspect(LlamaConfig(**SIZES | {"max_position_embeddings": 64}), sequence_length=65)


# The data ------------------------------------------------------------------------------------------------------------


def test_stages_are_the_passes_and_their_nodes_stand_in_them(diff: GraphDiff):
    (graph,) = diff.graphs
    names = [stage.name for stage in graph.stages]
    assert names[0] == "captured" and names[-2:] == ["cleanup", "defer_logits"]
    for index, stage in enumerate(graph.stages):
        standing = [node for node in graph.nodes if node.stands_at(index)]
        assert len(standing) == stage.num_nodes
        for node in standing:
            assert all(graph.nodes[source].stands_at(index) for source in node.reads_at(index)), (node, stage.name)
    assert [node.id for node in graph.nodes] == list(range(len(graph.nodes)))


def test_costs_of_nodes_add_up_to_those_of_their_stage(diff: GraphDiff):
    (graph,) = diff.graphs
    for stage, ids, side in ((graph.stages[0], graph.before, "before"), (graph.stages[-1], graph.after, "after")):
        total = sum((getattr(graph.nodes[number], side) for number in ids), Cost())
        assert total == stage.cost


def test_every_node_that_went_or_came_is_in_one_hunk(diff: GraphDiff):
    (graph,) = diff.graphs
    removed = [number for hunk in graph.hunks for number in hunk.removed]
    added = [number for hunk in graph.hunks for number in hunk.added]
    assert len(removed) == len(set(removed)) and len(added) == len(set(added))
    assert set(removed) >= set(graph.before) - set(graph.after)
    assert set(added) >= set(graph.after) - set(graph.before)
    assert sorted(rewrite for hunk in graph.hunks for rewrite in hunk.rewrites) == [r.id for r in graph.rewrites]


def test_layers_are_folded(diff: GraphDiff):
    (graph,) = diff.graphs
    folded = {blocks[0].path: len(blocks) for blocks in graph.folded_blocks()}
    assert folded["model.layers.0"] == 1 and folded["model.layers.1"] == 3  # the first one's norm follows no sum
    assert sum(len(block.nodes) for block in graph.blocks) == len(graph.nodes)


def test_before_and_after_are_aligned(diff: GraphDiff):
    (graph,) = diff.graphs
    pairs = {old: (new, how) for old, new, how in graph.aligned}
    for number in set(graph.before) & set(graph.after):
        assert pairs[number] == (number, "same")
    for hunk in graph.hunks:
        if hunk.rewrites and hunk.removed and hunk.added and hunk.removed[-1] not in graph.after:
            assert pairs[hunk.removed[-1]] == (hunk.added[-1], "rewritten")


def test_what_is_kept_for_backward_is_what_autograd_keeps():
    """Beside PyTorch's own hooks, in a graph that no pass has changed."""
    from torch.autograd.graph import saved_tensors_hooks

    config = LlamaConfig(**SIZES)
    (graph,) = fxopt.inspect(config, "fp32", batch_size=2, sequence_length=64, prove=False).graphs
    model = tiny_llama()
    parameters = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.int64)
    mask = torch.ones(64, 64, dtype=torch.bool).tril()[None, None].expand(2, 1, 64, 64)  # as Dynamo has it
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, attention_mask=mask.clone(), use_cache=False)
    assert graph.stages[0].cost.saved_bytes == pytest.approx(sum(kept.values()), rel=0.02)


def test_a_diff_can_be_copied_and_compared(diff: GraphDiff):
    assert copy.deepcopy(diff) == diff


def test_weights_are_counted_as_they_are_stored():
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    bf16, int8 = (fxopt.inspect(config, policy, sequence_length=16, prove=False) for policy in ("bf16", "int8"))
    assert int8.conditions.num_parameters == bf16.conditions.num_parameters
    assert int8.conditions.parameter_bytes < 0.6 * bf16.conditions.parameter_bytes


def test_a_cast_of_a_policy_is_traced_to_the_model_s_source():
    diff = fxopt.inspect(LlamaConfig(**SIZES), "bf16-islands", sequence_length=16)
    (graph,) = diff.graphs
    lines = [*(node.source for node in graph.nodes), *(hunk.source for hunk in graph.hunks)]
    assert not any(line.file.startswith("/") or "fxopt" in line.file for line in lines if line is not None)
    assert all(hunk.source is not None for hunk in graph.hunks if hunk.rewrites)
    assert not any("__dict__" in node.arguments for node in graph.nodes)


def test_a_path_is_told_without_the_machine(tmp_path):
    package = tmp_path / "research" / "models"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    assert _portable(str(package / "mine.py"), os.getcwd()) == "research/models/mine.py"
    assert _portable(str(tmp_path / "script.py"), os.getcwd()) == "script.py"
    installed = "/opt/venv/lib/python3.12/site-packages/transformers/a.py"
    assert _portable(installed, os.getcwd()) == "transformers/a.py"
    assert _portable(str(tmp_path / "src" / "a.py"), str(tmp_path)) == "src/a.py"


@pytest.mark.parametrize(("kind", "policy"), [("apertus", "bf16-islands"), ("llama", "int8")])
def test_scalars_and_int8_weights_are_inspected_in_their_own_dtype(kind, policy):
    diff = fxopt.inspect(tiny_config(kind), policy, sequence_length=16)
    (graph,) = diff.graphs
    assert not diff.fallbacks and not graph.not_measured and diff.hits["linear_cross_entropy"] == 1


def test_equal_inspections_are_equal_and_evaluation_is_told():
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    first, second = (fxopt.inspect(config, "bf16", sequence_length=16, training=False) for _ in range(2))
    times = {"elapsed_ms": 0.0}
    graphs = [
        [replace(graph, stages=tuple(replace(stage, **times) for stage in graph.stages)) for graph in diff.graphs]
        for diff in (first, second)
    ]
    assert graphs[0] == graphs[1] and graphs[0][0].call == "evaluation, 1 × 16 tokens"


def test_an_optimized_model_that_was_entered_by_its_backbone():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    model.model(**batch)[0].sum().backward()
    for asked in (model, model.model):
        diff = fxopt.inspect(asked)
        assert len(diff.graphs) == 1 and len(diff.graphs[0].rewrites) >= 7 and not diff.fallbacks
