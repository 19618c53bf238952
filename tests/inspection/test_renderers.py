"""A graph diff as JSON, text, GraphML, Model Explorer's JSON and structured trace."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest

from fxopt.inspection.diff import GraphDiff
from fxopt.inspection.numbers import change, in_bytes, in_flops
from fxopt.inspection.render_html import inert
from fxopt.inspection.render_json import load
from fxopt.inspection.render_text import WIDTH

pytestmark = pytest.mark.xdist_group("inspection")


def test_json_and_back(diff: GraphDiff, tmp_path):
    path = diff.save(tmp_path / "diff.json")
    assert load(path) == diff
    data = json.loads(path.read_text())
    assert (data["schema"], data["version"]) == ("fxopt.graph_diff", 1)
    assert data["metrics"] == diff.metrics


def test_json_of_a_later_fxopt(diff: GraphDiff, tmp_path):
    path = tmp_path / "diff.json"
    data = diff.to_dict()
    (graph,) = data["graphs"]
    costed = next(node for node in graph["nodes"] if node["before"])
    proven = next(rewrite for rewrite in graph["rewrites"] if rewrite["proof"])
    parts = (graph["nodes"][0], graph["sources"][0], data["conditions"], costed["before"], proven["proof"], graph, data)
    for part in parts:
        part["mood"] = "a field that version 1 got later"
    path.write_text(json.dumps(data))
    assert load(path) == diff
    for name in ("call", "runs"):  # which version 1 has not had from the start
        graph.pop(name)
    for node in graph["nodes"]:
        node.pop("results")
    path.write_text(json.dumps(data))
    (earlier,) = load(path).graphs
    assert (earlier.call, earlier.runs, {node.results for node in earlier.nodes}) == ("", 1, {()})
    path.write_text(json.dumps({**data, "version": 2}))
    with pytest.raises(ValueError, match="update fxopt"):
        load(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("{}", "holds no graph diff")])
def test_a_file_that_is_no_diff(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("version"),
        lambda data: data.update(version="2"),
        lambda data: data.update(graphs=7),
        lambda data: data.pop("conditions"),
        lambda data: data["graphs"][0].update(stages=[]),
        lambda data: data["graphs"][0]["nodes"][3].update(source=10_000),
        lambda data: data["graphs"][0]["nodes"].pop(),
        lambda data: data["graphs"][0]["after"].append(-1),
        lambda data: data["graphs"][0]["stages"][-1]["cost"].update(launches="many"),
        lambda data: data["graphs"][0].pop("hunks"),
    ],
)
def test_a_damaged_file(diff: GraphDiff, tmp_path, damage):
    path = tmp_path / "diff.json"
    data = json.loads(json.dumps(diff.to_dict()))
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"diff\.json is damaged.*fxopt inspect MODEL --json"):
        load(path)


def test_text_reads_like_a_diff_of_the_model_s_source(diff: GraphDiff):
    text = str(diff)
    assert "@@ transformers/models/llama/modeling_llama.py" in text and "× 4" in text
    lines = text.splitlines()
    assert any(
        line.startswith("- ") and "variance = hidden_states.pow(2).mean(-1, keepdim=True)" in line for line in lines
    )
    assert any(line.startswith("+ ") and "swiglu(" in line for line in lines)
    (graph,) = diff.graphs
    assert any("captured" in line and str(graph.stages[0].num_nodes) in line.split() for line in lines)
    assert in_bytes(graph.stages[-1].peak_bytes) in text


def test_the_places_in_the_text_have_as_many_rewrites_as_its_total(diff: GraphDiff):
    text = str(diff)
    (graph,) = diff.graphs
    listed = 0
    for place in re.findall(r"^@@ .*\n.*$", text, re.MULTILINE):
        times = re.search(r"@@ .* @@ .*? × (\d+)$", place, re.MULTILINE)
        several = re.search(r"; (\d+) rewrites;", place)
        listed += int(several[1]) if several else int(times[1]) if times else 1
    assert listed == len(graph.rewrites) > sum(bool(hunk.rewrites) for hunk in graph.hunks)
    assert re.search(rf"^in all +{listed} ", text, re.MULTILINE)


def test_each_result_of_an_operation_is_told(diff: GraphDiff, tmp_path):
    (graph,) = diff.graphs
    number, node = next((n.id, n) for n in graph.nodes if n.operation == "add_rms_norm")
    assert node.values == ("bfloat16[2, 33, 64]",) * 2 and node.size_bytes == 2 * 2 * 33 * 64 * 2
    lines = str(diff).splitlines()
    (place, *_) = (place for place, line in enumerate(lines) if "add_rms_norm(" in line)
    assert lines[place].index(node.values[0]) == lines[place + 1].index(node.values[1])
    collection = json.loads(diff.save(tmp_path / "a.model-explorer.json").read_text())
    outputs = next(n for n in collection[0]["graphs"][1]["nodes"] if n["id"] == str(number))["outputsMetadata"]
    assert [(output["id"], output["attrs"][0]["value"]) for output in outputs] == list(
        zip("01", node.values, strict=True)
    )


def test_dozens_of_results_are_told_by_the_first(diff: GraphDiff):
    (graph,) = diff.graphs
    nodes = tuple(replace(n, results=(("int8", (7,)),) * 30) if len(n.results) == 2 else n for n in graph.nodes)
    text = str(replace(diff, graphs=(replace(graph, nodes=nodes),)))
    assert "and 27 more results" in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_graphml(diff: GraphDiff, tmp_path):
    graph = nx.read_graphml(diff.save(tmp_path / "diff.graphml"))
    (original,) = diff.graphs
    assert len(graph) == len(original.nodes)
    assert {data.get("made_by") for _, data in graph.nodes(data=True)} >= {"fuse_rope FuseRoPE"}


def test_model_explorer(diff: GraphDiff, tmp_path):
    (collection,) = json.loads(diff.save(tmp_path / "a.model-explorer.json").read_text())
    (graph,) = diff.graphs
    for drawn, ids in zip(collection["graphs"], (graph.before, graph.after), strict=True):
        known = {node["id"] for node in drawn["nodes"]}
        assert known == {str(number) for number in ids}
        assert {edge["sourceNodeId"] for node in drawn["nodes"] for edge in node["incomingEdges"]} <= known
    assert "model/layers/0/mlp" in {node["namespace"] for node in collection["graphs"][1]["nodes"]}


def test_an_unknown_ending(diff: GraphDiff, tmp_path):
    with pytest.raises(ValueError, match=r"\.html"):
        diff.save(tmp_path / "diff.pdf")


def test_control_characters_are_not_xml(diff: GraphDiff, tmp_path):
    path = replace(diff, model="a\x00b\ud800").save(tmp_path / "diff.graphml")
    assert len(nx.read_graphml(io.BytesIO(path.read_bytes()))) == len(diff.graphs[0].nodes)


def test_embedded_json_cannot_end_its_block():
    text = json.dumps({"a": "</script><script>alert(1)</script><!-- & \u2028"}, ensure_ascii=False)
    assert not set("<>&\u2028") & set(inert(text))
    assert json.loads(inert(text)) == json.loads(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (33_554_432, "33.6 MB"),
        (999_960, "1.00 MB"),
        (2.4716e9, "2.47 GB"),
    ],
)
def test_bytes(number, text):
    assert in_bytes(number) == text


def test_numbers():
    assert in_flops(17.1e12) == "17.1 TFLOP"
    assert [change(*pair) for pair in ((2, 1), (1, 2), (3, 3), (0, 1), (649, 3))] == [
        "−50 %",
        "+100 %",
        "=",
        "new",
        "−99.5 %",
    ]


TRAINING = """
import torch, fxopt
from tests.tiny_models import tiny_llama, tiny_batch
model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "bf16")
model(**tiny_batch()).loss.backward()
"""


def test_structured_trace(tmp_path):
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", TRAINING], env=environment, check=True, capture_output=True, timeout=200)
    (log,) = tmp_path.glob("*.log")
    lines = log.read_text().splitlines()
    artifacts = [json.loads(line[line.index("{") :]) for line in lines if '"name": "fxopt_' in line and "{" in line]
    assert [item["artifact"]["name"] for item in artifacts] == ["fxopt_before", "fxopt_after", "fxopt_passes"]
    assert all(item["frame_id"] == 0 for item in artifacts)  # filed with Dynamo's own graph
    assert "rms_norm(" in log.read_text()


def test_halves_go_up_as_in_the_page():
    assert (in_bytes(678_500), in_bytes(677_500), change(200, 201), change(200, 199)) == (
        "679 kB", "678 kB", "+1 %", "−1 %",
    )  # fmt: skip
