"""What a user is told while he waits: a line when something long starts, and how long it took when it is done."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

logger = logging.getLogger("fxopt")


@contextlib.contextmanager
def announced(what: str | None) -> Iterator[None]:
    """Says on standard error that `what` is being done and how long it took; in a distributed run the first rank does.

    Where the level of the logger "fxopt" was set, the lines are its INFO messages:
    `logging.getLogger("fxopt").setLevel("WARNING")` keeps them away. None: nothing to say.
    """
    if what is None:
        yield
        return
    _say(f"fxopt: {what} …")
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        _say(f"fxopt: … given up after {time.perf_counter() - start:.1f} s")
        raise
    _say(f"fxopt: … done in {time.perf_counter() - start:.1f} s")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if logger.level != logging.NOTSET:
        logger.info(line)
    elif sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)
