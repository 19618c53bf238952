"""The coverage run on a few types that are unlike each other; `make coverage` runs it on all."""

import json
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import coverage
from benchmarks.census import count_ops, count_sites
from benchmarks.tiny_causal_lms import tiny_config
from fxopt.kernels.add_rms_norm import add_rms_norm

TYPES = {
    "bart": "fp32", "deepseek_v3": "fp32", "gemma2": "bf16", "gpt_oss": "fp32", "gptj": "fp32", "jetmoe": "bf16",
    "phi3": "bf16",
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "policy"), TYPES.items())
def test_everything_is_rewritten_and_trains_alike(model_type, policy, monkeypatch):
    monkeypatch.setattr(coverage, "POLICIES", (policy,))
    row = coverage.cover(model_type)
    assert row["status"] == "trained", row
    found = row[policy]
    assert not found["violations"] and not found["refused"] and not found["fallbacks"], found
    missed = {kind: row["sites"].get(kind, 0) - found["hits"][kind] for kind in coverage.OPS_OF}
    assert not any(count > 0 for count in missed.values()), (missed, found["near_misses"])


def test_a_type_that_cannot_be_built_costs_its_row_only(monkeypatch):
    monkeypatch.setattr(coverage, "POLICIES", ("bf16",))
    row = coverage.cover("git")  # a vision model, without pictures
    assert row["status"] == "outside" and row["reason"]
    rows = [row, coverage.cover("gptj")]
    assert "1 of 2 types trained" in coverage.summary(rows)
    assert any(line.startswith("git: outside") for line in coverage.reasons(rows))
    assert coverage.table(rows).row_count == 2


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    versions = {name: version(name) for name in ("torch", "transformers")}
    rows = [{"type": "git", "status": "outside", "seconds": 1.0}, {"type": "gpt2", "status": "crashed", "seconds": 1.0}]
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"versions": versions, "device": "cpu", "rows": rows}))
    afresh = []
    monkeypatch.setattr(
        coverage,
        "cover_afresh",
        lambda name, *_: afresh.append(name) or {"type": name, "status": "outside", "seconds": 0},
    )
    assert coverage.main(["git", "gpt2", "gptj", "--save", str(file), "--resume", "--jobs", "1"]) == 0
    assert afresh == ["gpt2", "gptj"]
    assert [row["type"] for row in json.loads(file.read_text())["rows"]] == ["git", "gpt2", "gptj"]
    file.write_text(json.dumps({"versions": {"torch": "1.0"}, "rows": []}))
    with pytest.raises(SystemExit, match="give another file"):
        coverage.main(["git", "--save", str(file), "--resume"])
    with pytest.raises(SystemExit):
        coverage.main(["git", "--resume"])
    assert "name the file" in capsys.readouterr().err


def test_configurations_are_small():
    for model_type in TYPES:
        text = tiny_config(model_type).get_text_config(decoder=True)
        assert text.vocab_size <= 400, model_type


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = F.silu(self.first(self.norm(x))) * self.second(x)
        return F.cross_entropy(F.rms_norm(x, (8,)), torch.zeros(3, dtype=torch.int64)) + F.silu(x).sum()


def test_the_census_counts_what_runs():
    block = Block()
    found = count_sites(block, lambda: block(torch.randn(3, 8)))
    assert found == {"norm": 2, "gated activation": 1, "loss": 1}


def test_an_op_inside_an_op_does_not_count():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    assert count_ops(lambda: add_rms_norm(x, x, weight, 1e-5)) == {"add_rms_norm": 1}
    with torch.no_grad():  # as within a model's own autograd function
        assert count_ops(lambda: add_rms_norm(x, x, weight, 1e-5)) == {"add_rms_norm": 1}
