"""How results print: a rich table as text, and a bar for long work."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment


def as_text(what: RenderableType, width: int = 140, *, crop: bool = True) -> str:
    """What rich prints of `what`, without colours and without white space at its end."""
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(what, crop=crop)
    return capture.get().rstrip()


@dataclass(frozen=True)
class WithoutControls:
    """What rich prints of `what`, whose names may hold control characters: a terminal would obey them."""

    what: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.what, options):
            yield segment if segment.control else Segment(_CONTROL.sub("�", segment.text), segment.style)


_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def in_a_line(error: BaseException, with_place: bool = False) -> str:
    """An error in one line: its type and what it says first; of a compiler's error, what it wraps, and the user's line.

    with_place: tell the line of any other too, where code that fxopt called was then: not PyTorch's, nor its own.
    """
    error = getattr(error, "inner_exception", None) or error
    text = _ADDRESS.sub("", _COLOUR.sub("", str(error)))
    _, _, users = text.partition("from user code:")
    places = _FRAME.findall(users) or (_places_below_us(error) if with_place else [])
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
    ours = next((index for index, (path, _) in enumerate(frames) if path.startswith(_OWN)), len(frames))
    return [place for place in frames[ours:] if not place[0].startswith(("<", _OWN)) and _TORCH not in place[0]]


_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_FRAME = re.compile(r'File "(.*)", line (\d+)')
_WRAPPED = re.compile(r"got (\w+)\((['\"])(.*?)\2\)+$", re.M)  # as Dynamo tells the error of an operation
_OWN = str(Path(__file__).parent) + os.sep
_TORCH = f"{os.sep}torch{os.sep}"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows (what, done, total) in a bar on standard error, on a terminal only."""
    # Names are text, whatever they look like.
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("")

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield show
