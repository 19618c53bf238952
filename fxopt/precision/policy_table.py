"""Policies to look at: as a table, and side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.precision.policy import PRECISION_FIELDS, Policy, dtype_name


@dataclass(frozen=True)
class Change:
    """One difference: the default or a selector (`where`), its `field` (None: all of it), and both values as text."""

    where: str
    field: str | None
    old: str | None
    new: str | None


@dataclass(frozen=True)
class PolicyDiff:
    """What `Policy.diff` found."""

    old: str
    new: str
    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        lines = [
            f"  {change.where}{f' {change.field}' if change.field else ''}: {change.old or '–'} → {change.new or '–'}"
            for change in self.changes
        ]
        return "\n".join([f"policy {self.old} → {self.new}", *(lines or ["  no difference"])])


def table(policy: Policy) -> str:
    """One line for the default and for each selector, one column for each field."""
    rows = [["", *PRECISION_FIELDS]]
    rows += [[where, *(row.get(field, "") for field in PRECISION_FIELDS)] for where, row in _rows(policy).items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"policy {policy.name}", *(f"  {line}" for line in lines)])


def difference(policy: Policy, other: Policy) -> PolicyDiff:
    """What changes from `policy` to `other`."""
    mine, theirs = _rows(policy), _rows(other)
    changes = []
    for where in dict.fromkeys([*mine, *theirs]):
        old, new = mine.get(where), theirs.get(where)
        if old is None or new is None:
            changes.append(Change(where, None, _overrides_text(old), _overrides_text(new)))
            continue
        for field in dict.fromkeys([*old, *new]):
            if old.get(field) != new.get(field):
                changes.append(Change(where, field, old.get(field), new.get(field)))
    common = [[where for where in rows if where in mine and where in theirs] for rows in (mine, theirs)]
    if common[0] != common[1]:
        changes.append(Change("order of selectors", None, "; ".join(common[0]), "; ".join(common[1])))
    return PolicyDiff(policy.name, other.name, tuple(changes))


def _rows(policy: Policy) -> dict[str, dict[str, str]]:
    """The default and each selector, as text by field. A place that is selected again gets a number."""
    rows = {"default": {field: _text(getattr(policy.default, field)) for field in PRECISION_FIELDS}}
    for selector in policy.selectors:
        again = sum(where.partition(" #")[0] == selector.where for where in rows)
        where = selector.where if not again else f"{selector.where} #{again + 1}"
        rows[where] = {field: _text(value) for field, value in selector.overrides.items()}
    return rows


def _overrides_text(row: dict[str, str] | None) -> str | None:
    return None if row is None else ", ".join(f"{field}={value}" for field, value in row.items())


def _text(value: object) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)
