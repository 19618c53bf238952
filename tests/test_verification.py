"""What `fxopt.verify` makes of errors, where they are known."""

import torch

from fxopt.verification import _comparisons

ROUNDING = torch.finfo(torch.bfloat16).eps / 2


def holds(numbers: int, original: float, optimized: float, num_labels: int = 1000) -> bool:
    """Whether errors of this share of a gradient of `numbers` ones pass."""
    sums = {"weight": torch.tensor([original**2 * numbers, optimized**2 * numbers, float(numbers)])}
    (comparison,) = _comparisons(sums, {"weight": numbers}, num_labels, ROUNDING)
    return comparison.holds


def test_a_tenth_more_and_one_rounding_is_allowed():
    assert holds(1000, 0.1, 0.1 * 1.1 + 0.9 * ROUNDING)
    assert not holds(1000, 0.1, 0.1 * 1.1 + 1.1 * ROUNDING)


def test_a_planted_error_of_one_percent_fails():
    assert not holds(1000, ROUNDING / 2, 0.01)


def test_few_numbers_few_labels_and_what_is_rounding_alone_may_double():
    assert holds(50, 0.1, 0.19) and not holds(50, 0.1, 0.21)
    assert holds(1000, 0.1, 0.19, num_labels=2) and not holds(1000, 0.1, 0.21, num_labels=2)
    assert holds(1000, 160.0, 180.0) and not holds(1000, 160.0, 330.0)
