"""A plan as a table in the terminal, as a page with bars, and as JSON. Schema 1:

schema            "fxopt.plan"
version           1; within it fields are added and none is changed or dropped
model, num_parameters, sequence_length, num_devices, num_micro_batches, memory, is_largest, why, notes
                  the fields of `plan.Plan`
rows              the fields of `plan.Row`, and `peak`
recommended       an index into rows, or null
"""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from importlib import resources
from string import Template

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.inspection.numbers import in_bytes, in_count
from fxopt.planning.plan import PARTS, Plan, Row, in_rows
from fxopt.printing import WithoutControls


def headline(plan: Plan) -> str:
    devices = f", sharded over {plan.num_devices} devices" if plan.num_devices > 1 else ""
    times = f", {plan.num_micro_batches} times" if plan.num_micro_batches > 1 else ""
    rows = "the most rows" if plan.is_largest else in_rows(plan.rows[0].batch_size) if plan.rows else "rows"
    return (
        f"{plan.model}, {in_count(plan.num_parameters)} parameters: a training step of {rows} × {plan.sequence_length} "
        f"tokens{times}{devices}, in {in_bytes(plan.memory)}"
    )


def as_table(plan: Plan) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    columns = parts_of(plan)
    for name in ("policy", "checkpointing", "gradients"):
        table.add_column(name)
    for name in ("rows", *columns, "peak"):
        table.add_column(name, justify="right")
    table.add_column("where it is", no_wrap=True, overflow="ellipsis")
    for row in plan.rows:
        chosen = row == plan.recommended
        style = "bold green" if chosen else "dim" if not row.fits(plan.memory) else ""
        cells = (
            ("→ " if chosen else "  ") + row.policy, *handling(row), str(row.batch_size),
            *(in_bytes(getattr(row, part)) for part in columns), in_bytes(row.peak),
            row.place.partition(" (")[0],
        )  # fmt: skip
        table.add_row(*map(Text, cells), style=style)  # names are text, whatever they look like
    parts: list[RenderableType] = [Text(headline(plan), style="bold"), table, Text("\n" + plan.why)]
    parts += [Text(note, style="yellow") for note in plan.notes]
    return WithoutControls(Group(*parts))


def handling(row: Row) -> tuple[str, str]:
    """Whether activations are computed again, and what becomes of gradients, in a word each."""
    return "yes" if row.checkpointing else "no", "released" if row.release_gradients else "kept"


def parts_of(plan: Plan) -> list[str]:
    """The parts of a peak that are shown: nothing is gathered where nothing is sharded."""
    return [part for part in PARTS if part != "gathered" or plan.num_devices > 1]


def as_json(plan: Plan) -> str:
    data = asdict(plan)
    data["rows"] = [{**asdict(row), "peak": row.peak} for row in plan.rows]
    data["recommended"] = plan.rows.index(plan.recommended) if plan.recommended is not None else None
    return json.dumps({"schema": "fxopt.plan", "version": 1, **data}, indent=1)


def as_html(plan: Plan) -> str:
    """A page without scripts: a bar for each row, its parts to scale, and their numbers."""
    columns = parts_of(plan)
    largest = max((row.peak for row in plan.rows), default=1)
    widest = largest if plan.memory > 2 * largest else max(plan.memory, largest)  # a limit far away would hide the bars
    page = resources.files("fxopt.planning").joinpath("plan.html").read_text(encoding="utf-8")
    limit = f'<i class="limit" style="left:{100 * plan.memory / widest:.2f}%"></i>' if plan.memory <= widest else ""
    return Template(page).substitute(
        TITLE=html.escape(headline(plan)),
        WHY=html.escape(plan.why),
        NOTES="".join(f"<p class=note>{html.escape(note)}</p>" for note in plan.notes),
        KEY="".join(f'<span class="key {part}">{part}</span>' for part in columns),
        HEAD="".join(f"<th>{part}" for part in ("rows", *columns, "peak")),
        LIMIT=f" The red line is the memory that there is, {in_bytes(plan.memory)}." if limit else "",
        ROWS="\n".join(_row(plan, row, columns, widest, limit) for row in plan.rows),
    )


def _row(plan: Plan, row: Row, columns: list[str], widest: int, limit: str) -> str:
    bar = "".join(
        f'<b class="{part}" style="width:{100 * getattr(row, part) / widest:.3f}%" '
        f'title="{part} {in_bytes(getattr(row, part))}"></b>'
        for part in columns
    )
    state = "chosen" if row == plan.recommended else "fits" if row.fits(plan.memory) else "too-large"
    checkpointing, gradients = handling(row)
    # The names are shown where the table is too narrow for its head.
    numbers = "".join(f"<td class=part data-name={part}>{in_bytes(getattr(row, part))}" for part in columns)
    return (
        f'<tr class="{state}"><th scope=row>{html.escape(row.policy)}'
        f"<td class=word data-name=checkpointing>{checkpointing}<td class=word data-name=gradients>{gradients}"
        f"<td class=bar><div class=parts>{bar}{limit}</div><div class=place>{html.escape(row.place)}</div>"
        f"<td data-name=rows>{row.batch_size}{numbers}<td class=peak>{in_bytes(row.peak)}"
    )
