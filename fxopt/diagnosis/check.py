"""A diagnosis as data: what was looked at, what was found, what mends it. Prints, and is written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.atomic_file import write_text
from fxopt.printing import as_text

Area = Literal["versions", "device", "presets", "backends", "kernels", "hub"]
State = Literal["ok", "missing", "unsupported"]

SCHEMA, VERSION = "fxopt.diagnosis", 1
DEFAULT_PRESET = "bf16"

_TITLES: dict[Area, str] = {
    "versions": "versions",
    "device": "device",
    "presets": "presets, one training step of a tiny Llama each",
    "backends": "backends",
    "kernels": "kernels",
    "hub": "the Hub",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    area, name: what it is, such as "versions", "torch".
    state: "ok"; "missing", where installing, connecting or setting something up gives it; "unsupported", where it is
        there and does not work.
    found: the version, the device, what the training step did.
    why: what is wrong and what it is needed for, in the error's own words where there was one; '' where all is well.
    mend: the command, or the line of Python, that mends it; '' where there is none.
    needed: whether fxopt does not work here without it.
    """

    area: Area
    name: str
    state: State
    found: str = ""
    why: str = ""
    mend: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What was found: by this version of fxopt, training on `device`. Prints as a table; `works` is the exit code."""

    version: str
    device: str
    checks: tuple[Check, ...]

    @property
    def works(self) -> bool:
        """Whether training works with the default preset, and every package is in its declared range."""
        return not self.failures and any(check.needed for check in self.area("presets"))

    @property
    def failures(self) -> tuple[Check, ...]:
        """What is needed and not ok."""
        return tuple(check for check in self.checks if check.needed and check.state != "ok")

    def area(self, area: Area) -> tuple[Check, ...]:
        """The checks of one area, in the order in which they were made."""
        return tuple(check for check in self.checks if check.area == area)

    def check(self, area: Area, name: str) -> Check:
        """The check called `name`. Raises KeyError where there is none."""
        found = next((check for check in self.area(area) if check.name == name), None)
        if found is None:
            raise KeyError(f"no check {name!r} in {area!r}; there are: {', '.join(c.name for c in self.area(area))}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data: schema, version, fxopt, works, device, and the fields of each `Check`."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "fxopt": self.version,
            "works": self.works,
            "device": self.device,
            "checks": [asdict(check) for check in self.checks],
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON to `path`, and return the path. Raises ValueError for another ending than .json."""
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"cannot save a diagnosis as {path.name!r}; use a name that ends in .json")
        return write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def __rich__(self) -> RenderableType:
        return Group(*_parts(self))

    def __str__(self) -> str:
        return as_text(self, crop=False)


def failed(area: str, name: str, why: str) -> Check:
    """A trial that did not work."""
    needed = (area, name) == ("presets", DEFAULT_PRESET)
    return Check(area, name, "unsupported", "", why, needed=needed)  # type: ignore[arg-type]


def _parts(diagnosis: Diagnosis) -> Iterator[RenderableType]:
    yield Text(_headline(diagnosis), style="bold" if diagnosis.works else "bold red")
    for area, title in _TITLES.items():
        checks = diagnosis.area(area)
        if checks:
            yield Text(f"\n{title}", style="dim")
            yield _table(checks)
    mends = [check for check in diagnosis.checks if check.mend]
    if mends:
        yield Text("\nwhat mends it, or takes its place:")
    for check in mends:
        # As one line, so that it can be copied from a narrow terminal too.
        yield Text(f"{check.name}: {check.mend}", no_wrap=True, overflow="ignore")


def _table(checks: Sequence[Check]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=len("unsupported"))
    table.add_column(no_wrap=True, min_width=len("mixed-stochastic"))
    table.add_column(overflow="fold")
    for check in checks:
        style = "green" if check.state == "ok" else "red" if check.needed else "yellow"
        text = Text("; ".join(part for part in (check.found, check.why) if part))
        table.add_row(Text(check.state, style=style), check.name, text)
    return table


def _headline(diagnosis: Diagnosis) -> str:
    about = f"fxopt {diagnosis.version}"
    if diagnosis.works:
        return f"{about} works here: training on {diagnosis.device}"
    failures = ", ".join(check.name for check in diagnosis.failures) or f"{DEFAULT_PRESET} was not tried"
    return f"{about} does not work here: {failures}"
