"""Numbers as people read them."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal


def in_bytes(number: float) -> str:
    """Bytes with three digits: `33.6 MB`; decimal units, as memory is sold."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB", "PB"))


def in_flops(number: float) -> str:
    return _scaled(number, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def in_count(number: float) -> str:
    """A count with three digits: `1.24 G`."""
    return _scaled(number, ("", "k", "M", "G", "T"))


def amount_of(text: str) -> tuple[float, bool] | None:
    """ "24GB" or "80 GiB" in bytes, or a number such as "1e9"; and whether it has a unit. None for anything else."""
    found = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?:([kmgt])(i?)b?|(b))?\s*", text.lower())
    if found is None:
        return None
    number, prefix, binary, unit = found.groups()
    return float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "), bool(prefix or unit)


def bytes_of(text: str) -> int:
    """ "24GB", "80 GiB" or a number of bytes. Raises ValueError for what is no size of a memory."""
    amount, has_unit = amount_of(text) or (0.0, False)
    if amount <= 0 or not (has_unit or amount >= 1e6):
        raise ValueError(f"memory is {text!r}; it takes a size such as 24GB or 80GiB")
    return int(amount)


def _scaled(number: float, units: tuple[str, ...]) -> str:
    size, index = abs(number), 0
    while size >= 999.5 and index < len(units) - 1:
        size, index = size / 1000, index + 1
    digits = 0 if index == 0 or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{'-' * (number < 0)}{_fixed(size, digits)} {units[index]}".rstrip()


def _fixed(number: float, digits: int) -> str:
    """With so many digits after the point; halves go up, as the page's script has them, and not to the even one."""
    return str(Decimal(number).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def change(before: float, after: float) -> str:
    """How `after` compares with `before`: `−42 %`."""
    if before == after:
        return "="
    if before == 0:
        return "new"
    percent = 100 * (after - before) / before
    digits = 1 if 99 <= abs(percent) < 100 else 0  # −99.5 % is not −100 %
    return f"{'−' if percent < 0 else '+'}{_fixed(abs(percent), digits)} %"
