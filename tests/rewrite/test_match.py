import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxopt.passes.pipelines import EXACT
from fxopt.rewrite.match import Rule, find_matches, require
from fxopt.rewrite.prove import Prover
from fxopt.rewrite.spelling import spell_out
from tests.captured_graphs import captured

X, Y = torch.randn(3, 8), torch.randn(3, 8)


def fused(x, y, scale):
    return torch.tanh(x * scale + y)


class FuseTanh(Rule):
    @staticmethod
    def pattern(x, y, scale):
        return torch.tanh(x * scale + y)

    @staticmethod
    def check(scale):
        require(not isinstance(scale, fx.Node), "the scale is not a number")
        require(scale != 4.0, "four is not a scale")

    @staticmethod
    def rewrite(x, y, scale):
        return fused(x, y, scale)


class FuseSoftmaxParts(Rule):
    """Two results: the exponentials may be used elsewhere."""

    @staticmethod
    def pattern(x):
        exponentials = torch.exp(x)
        return exponentials, torch.log(exponentials.sum(-1))

    @staticmethod
    def rewrite(x):
        return fused(x, x, 1.0)


def found(rule, function, *inputs):
    graph = captured(function, *inputs).graph
    spell_out(graph)
    return find_matches(graph, rule)


def test_binds_by_name_whatever_the_order_of_operands():
    for function in (
        lambda x, y: torch.tanh(x * 3.0 + y),
        lambda x, y: torch.tanh(y + 3.0 * x),
        lambda x, y: (y.add(x.mul(3.0))).tanh(),
    ):
        (match,), _ = found(FuseTanh, function, X, Y)
        assert match.bindings["scale"] == 3.0
        assert (match.bindings["x"].target, match.bindings["y"].target) == ("L_x_", "L_y_")
        assert len(match.nodes) == 3


def test_an_inner_node_with_other_users_is_not_matched():
    def function(x, y):
        inner = x * 3.0 + y
        return torch.tanh(inner), inner

    matches, (near_miss,) = found(FuseTanh, function, X, Y)
    assert not matches
    assert "inside the pattern, is also used by" in near_miss.reason


def test_an_inner_result_may_have_other_users():
    def function(x):
        exponentials = torch.exp(x)
        return exponentials * 2, torch.log(exponentials.sum(-1))

    (match,), _ = found(FuseSoftmaxParts, function, X)
    assert [node.target for node in match.results] == [torch.exp, torch.log]


def test_check_declines_with_its_reason():
    matches, (near_miss,) = found(FuseTanh, lambda x, y: torch.tanh(x * 4.0 + y), X, Y)
    assert not matches
    assert near_miss.reason == "four is not a scale"
    assert "test_match.py" in near_miss.source


def test_the_deepest_mismatch_is_reported():
    _, (near_miss,) = found(FuseTanh, lambda x, y: torch.tanh((x - 3.0) + y), X, Y)
    assert "`sub`" in near_miss.reason and "`mul`" in near_miss.reason


def test_a_write_between_the_nodes_declines():
    def function(x, y):
        inner = x * 3.0 + y
        y.add_(1)
        return torch.tanh(inner)

    matches, (near_miss,) = found(FuseTanh, function, X, Y.clone())
    assert not matches
    assert "written to in place after" in near_miss.reason


def test_a_write_before_everything_that_reads_does_not():
    def function(x, y):
        inner = x * 3.0
        y.add_(1)
        return torch.tanh(inner + y)

    (match,), near_misses = found(FuseTanh, function, X, Y.clone())
    assert match.anchor.target is torch.tanh and not near_misses


@pytest.mark.parametrize("keeps_no_result", [True, False])
def test_a_result_that_is_written_to_afterwards(keeps_no_result):
    class Fuse(FuseTanh):
        pass

    Fuse.keeps_no_result = keeps_no_result

    def function(x, y):
        result = torch.tanh(x * 3.0 + y)
        result += 1
        return result

    matches, near_misses = found(Fuse, function, X, Y)
    assert len(matches) == keeps_no_result and len(near_misses) == 1 - keeps_no_result


def test_matches_do_not_overlap():
    matches, _ = found(FuseTanh, lambda x, y: torch.tanh(torch.tanh(x * 3.0 + y) * 2.0 + y), X, Y)
    nodes = [node for match in matches for node in match.nodes]
    assert len(matches) == 2 and len(nodes) == len(set(nodes))


def test_slices_are_compared_inside():
    class FuseHalves(Rule):
        @staticmethod
        def pattern(x, half):
            return torch.cat((x[..., half:], x[..., :half]), dim=-1)

        @staticmethod
        def rewrite(x, half):
            return fused(x, x, half)

    (match,), _ = found(FuseHalves, lambda x: torch.cat([x[..., 4:], x[..., :4]], -1), X)
    assert match.bindings["half"] == 4
    matches, _ = found(FuseHalves, lambda x: torch.cat([x[..., 4:], x[..., :3]], -1), X)
    assert not matches


def test_a_rule_without_a_pattern_says_so():
    with pytest.raises(TypeError, match="has no `pattern`"):

        class Incomplete(Rule):
            @staticmethod
            def rewrite(x):
                return F.relu(x)


def test_a_name_is_not_bound_to_what_the_match_replaces():
    """Else the proof would give it values of its own: `relu(x) * relu(x)` is no ReGLU."""
    module = captured(lambda x: torch.relu(x) * torch.relu(x), X)
    records = EXACT.run(module, Prover())
    assert not [item for record in records for item in record.outcome.refused]
