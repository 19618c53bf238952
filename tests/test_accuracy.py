"""The accuracy rule itself: passes what is as good as eager code, fails what is 1 % off."""

import pytest
import torch

from tests.accuracy import assert_as_accurate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_planted_error_of_one_percent_fails(dtype: torch.dtype) -> None:
    truth = torch.randn(50, 70, dtype=torch.float64)
    eager = truth.to(dtype) * 3 / 3  # three roundings, worse than any rewrite's
    assert_as_accurate(truth.to(dtype), eager, truth)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate((truth * 1.01).to(dtype), eager, truth)


def test_an_element_that_was_not_written_fails() -> None:
    truth = torch.randn(50, dtype=torch.float64)
    actual = truth.float()
    actual[7] = float("nan")
    with pytest.raises(AssertionError, match="1 of 50 elements are NaN"):
        assert_as_accurate(actual, truth.float(), truth)


def test_another_dtype_or_shape_fails() -> None:
    truth = torch.randn(50, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"torch\.float32, must be torch\.bfloat16"):
        assert_as_accurate(truth.float(), truth.bfloat16(), truth)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(truth.float()[:1], truth.float(), truth)
