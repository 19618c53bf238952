"""How errors are told in a line."""

import pytest
import torch

from fxopt.error_lines import in_a_line


def test_an_error_is_told_without_what_a_terminal_would_obey():
    assert in_a_line(ValueError("\x1b[31mred\x1b[0m\x07 text\nmore")) == "ValueError: red text"
    assert in_a_line(ValueError()) == "ValueError: no message"


def test_what_a_line_announces_is_told_too_and_no_address():
    error = RuntimeError("backend='<function call at 0x7f43046ce980>' raised:\nValueError: why\nmore")
    assert in_a_line(error) == "RuntimeError: backend='<function call>' raised: ValueError: why"
    error.inner_exception = KeyError("mood")
    assert in_a_line(error) == "KeyError: 'mood'"


def test_the_error_of_an_operation_is_told_with_the_user_s_line():
    @torch.compile(backend="eager")
    def add(x, y):
        return x + y

    with pytest.raises(RuntimeError) as caught:
        add(torch.ones(41), torch.ones(42))
    told = in_a_line(caught.value)
    assert told.startswith("RuntimeError: ") and "42" in told and "(test_error_lines.py:" in told


def test_the_line_below_us_is_told_where_it_is_asked_for(monkeypatch):
    import fxopt.error_lines

    def asks_for_a_value():
        raise ValueError("no value")

    def calls():
        asks_for_a_value()

    monkeypatch.setattr(fxopt.error_lines, "_OWN", __file__)  # as if this file were fxopt's
    with pytest.raises(ValueError) as caught:
        calls()
    assert in_a_line(caught.value, with_place=True) == "ValueError: no value"  # no other code was called
    monkeypatch.setattr(fxopt.error_lines, "_OWN", "/somewhere/else")
    assert in_a_line(caught.value, with_place=True) == "ValueError: no value"  # nor by us
