"""`fxopt diff`: what differs between two inspections, and when it fails."""

from dataclasses import replace

import pytest
from rich.console import Console
from transformers import LlamaConfig

import fxopt
from fxopt.inspection.compare import Comparison, Condition
from fxopt.inspection.diff import COSTS, GraphDiff
from fxopt.passes.pipelines import EXACT
from tests.tiny_models import SIZES

pytestmark = pytest.mark.xdist_group("inspection")


@pytest.fixture(scope="module")
def without_rope() -> GraphDiff:
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 4})
    return fxopt.inspect(config, batch_size=2, sequence_length=33, pipeline=EXACT.without("fuse_rope"), prove=False)


def test_equal_inspections_do_not_differ(diff):
    comparison = Comparison(diff, diff)
    assert not comparison.lost() and not comparison.gained()


def test_a_rule_that_is_missing_is_seen(diff, without_rope):
    comparison = Comparison(diff, without_rope)
    assert {text.split()[0] for text in comparison.lost()} == {"rope"}
    assert sum(comparison.lost().values()) == 8
    assert {"neg", "cat"} <= {text.split()[0] for text in comparison.gained()}
    console = Console(width=140)
    with console.capture() as capture:
        console.print(comparison)
    assert "rope" in capture.get() and "−100 %" in capture.get()


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("fusions < 61", True), ("fusions<=2", False), ("fusions > 5 %", False), ("fusions < -5%", True),
        ("rope == 0", True), ("rope != 0", False), ("peak_bytes > 20 GB", False), ("saved_bytes > 1 kB", True),
        ("launches > 5 %", True), ("refused > 0", False), ("saved_bytes>1KiB", True), ("peak_bytes > 1e9", False),
        ("rope > 1e-3", False), ("rope < 1e+1", True),
    ],
)  # fmt: skip
def test_conditions(diff, without_rope, text, holds):
    assert Condition.parse(text).holds(diff.metrics, without_rope.metrics) is holds


def test_what_was_not_there_before_is_more_by_any_share():
    assert Condition.parse("graph_breaks > 1000 %").holds({"graph_breaks": 0.0}, {"graph_breaks": 1.0})
    assert not Condition.parse("graph_breaks > 0 %").holds({"graph_breaks": 0.0}, {"graph_breaks": 0.0})


@pytest.mark.parametrize(
    "text", ["fusions", "fusions < ", "fusions ~ 3", "fusions < 3 apples", "< 3", "fusions < 1.2.3", "launches > 5 k%"]
)
def test_what_is_no_condition(text):
    with pytest.raises(ValueError, match="is no condition"):
        Condition.parse(text)


def test_a_condition_on_nothing_known(diff):
    with pytest.raises(ValueError, match=r"no 'fusion' to compare; there are: .*fusions"):
        Condition.parse("fusion < 3").holds(diff.metrics, diff.metrics)


def test_an_unmeasured_number_is_no_zero(diff):
    unmeasured = replace(
        diff,
        graphs=tuple(
            replace(graph, stages=tuple(replace(stage, cost=None, peak_bytes=None) for stage in graph.stages))
            for graph in diff.graphs
        ),
    )
    assert diff.metrics.keys() - unmeasured.metrics.keys() == set(COSTS)
    with pytest.raises(ValueError, match="peak_bytes"):
        Condition.parse("peak_bytes > 1 GB").holds(unmeasured.metrics, unmeasured.metrics)
    for text, side, sides in (
        ("peak_bytes > 1 GB", "B", (diff, unmeasured)),
        ("launches > 5 %", "A", (unmeasured, diff)),
    ):
        with pytest.raises(ValueError, match=f"was not measured in {side}"):
            Condition.parse(text).holds(*(one.metrics for one in sides))
    assert not Condition.parse("peak_bytes > 1 GB").holds(unmeasured.metrics, diff.metrics)
    console = Console(width=140)
    with console.capture() as capture:
        console.print(Comparison(diff, unmeasured))
    assert "not measured" in capture.get() and "−100 %" not in capture.get()


def test_each_of_several_graphs_is_measured_by_itself(diff):
    """Their largest peak is not that of a call that runs them all: a graph break does not lower it."""
    broken = replace(diff, graphs=2 * diff.graphs)
    assert diff.metrics.keys() - broken.metrics.keys() == {"peak_bytes"}
    assert broken.metrics["saved_bytes"] == 2 * diff.metrics["saved_bytes"]
    with pytest.raises(ValueError, match="peak_bytes was not measured in B"):
        Condition.parse("peak_bytes > 1 GB").holds(diff.metrics, broken.metrics)


def test_what_is_not_printed_is_counted(diff, without_rope, monkeypatch):
    monkeypatch.setattr("fxopt.inspection.compare.MOST_KINDS", 1)
    comparison, console = Comparison(diff, without_rope), Console(width=200)
    with console.capture() as capture:
        console.print(comparison)
    assert f"and {len(comparison.lost()) - 1} more kinds" in capture.get()


def test_a_terminal_obeys_nothing_that_a_file_holds(diff):
    renamed = replace(diff, model="Llama\x1b[31m\x9b2J\rX")
    for shown in (Comparison(renamed, diff), renamed):
        console = Console(width=200, force_terminal=True, color_system=None)
        with console.capture() as capture:
            console.print(shown)
        assert "Llama�[31m�2JX" in capture.get() and not {"\x1b", "\x9b", "\r"} & set(capture.get())
