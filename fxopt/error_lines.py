"""Errors and stack traces by the line: what a compiler's error wraps, and which line of whose code it came from."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

FRAME = re.compile(r'File "(.*)", line (\d+), in (.*)')
_OWN = str(Path(__file__).parent) + os.sep


def is_ours(path: str) -> bool:
    """Whether a file is one of fxopt's."""
    return path.startswith(_OWN)


def in_a_line(error: BaseException, with_place: bool = False) -> str:
    """An error in one line: its type and what it says first; of a compiler's error, what it wraps, and the user's line.

    with_place: tell the line of any other too, where code that fxopt called was then: not PyTorch's, nor its own.
    """
    error = getattr(error, "inner_exception", None) or error
    text = _ADDRESS.sub("", _COLOUR.sub("", str(error)))
    _, _, users = text.partition("from user code:")
    places = FRAME.findall(users) or (_places_below_us(error) if with_place else [])
    where = f" ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""
    if found := _WRAPPED.search(text):
        return f"{found[1]}: {found[3]}{where}"
    lines = [line for line in (_CONTROL.sub("", line).strip() for line in text.splitlines()) if line]
    first = next((line for line in lines if "error: " in line), lines[0] if lines else "no message")
    if first.endswith(":") and lines.index(first) + 1 < len(lines):
        first = f"{first} {lines[lines.index(first) + 1]}"
    return f"{type(error).__name__}: {first}{where}"


def _places_below_us(error: BaseException) -> list[tuple[str, int]]:
    """Where code that fxopt called was when it raised `error`, the innermost last."""
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    ours = next((index for index, (path, _) in enumerate(frames) if is_ours(path)), len(frames))
    return [
        place for place in frames[ours:] if not (place[0].startswith("<") or is_ours(place[0]) or _TORCH in place[0])
    ]


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_WRAPPED = re.compile(r"got (\w+)\((['\"])(.*?)\2\)+$", re.M)  # as Dynamo tells the error of an operation
_TORCH = f"{os.sep}torch{os.sep}"
