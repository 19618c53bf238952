"""How results print: a rich table as text, and a bar for long work."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
