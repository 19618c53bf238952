"""ReLU² of the real transformers modules: rewritten, as accurate, declined with a reason."""

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from tests.passes.rewriting import DTYPES, assert_proven, assert_rewritten, leaf, near_misses


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_squared_of_transformers(dtype):
    torch.manual_seed(0)
    x = leaf(3, 7, 33, dtype=dtype)
    assert_rewritten("relu_squared", lambda x: ACT2FN["relu2"](x), x)
    assert_proven("relu_squared", lambda x: ACT2FN["relu2"](x), x)


@pytest.mark.parametrize("spelling", [lambda r: r**2, lambda r: r.pow(2), lambda r: r * r, torch.square])
def test_relu_squared_in_every_spelling(spelling):
    torch.manual_seed(0)
    assert_rewritten("relu_squared", lambda x: spelling(F.relu(x)), leaf(3, 7, 33, dtype=torch.bfloat16))


def test_relu_squared_declines_where_the_relu_is_also_used():
    def squared_and_counted(x):
        r = F.relu(x)
        return r.square(), (r > 0).sum()

    (miss,) = near_misses(squared_and_counted, leaf(3, 7, 32, dtype=torch.bfloat16))
    assert "inside the pattern, is also used by" in miss.reason


def test_relu_squared_declines_integers():
    (miss,) = near_misses(lambda x: F.relu(x).square(), torch.arange(-3, 4))
    assert "torch.int64, not floating point" in miss.reason
