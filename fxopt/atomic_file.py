"""Files that are written whole or not at all: beside their place, and then renamed into it."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` in UTF-8 to `path`, and returns the path. As `write` does."""
    data = text.encode("utf-8")
    return write(path, lambda file: file.write(data))


def write(path: str | Path, fill: Callable[[BinaryIO], object]) -> Path:
    """Lets `fill` write a file that takes the place of `path` when it is complete; returns the path.

    Until then, and for good where the disk is full, `fill` raises, or the process is killed, `path` holds what it held.
    Links are followed, and a file's permissions kept. What is no file (a pipe, a terminal) is written as it is.

    Raises OSError for a place that cannot be written.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        with open(place, "wb") as device:
            fill(device)
        return Path(path)
    if place.exists():
        with open(place, "r+b"):  # a file that may not be written is not replaced either
            mode = place.stat().st_mode & 0o777
    else:
        mode = 0o666  # less what the process's umask takes away
    # The name is short enough wherever the place's own is, and hidden from who lists *.json meanwhile.
    beside = place.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave the new name on an empty file
        if place.exists():
            os.chmod(beside, mode)  # the umask has no say in what a file had
        os.replace(beside, place)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    return Path(path)
