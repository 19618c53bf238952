"""Variants that are compared: named on the command line, each run in a fresh Python process."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path


def names_among(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: names of `known`, separated by commas."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown variant {name!r}: choose among {', '.join(known)}")
        return names

    return parse


def run_afresh(variant: str, script: Path | str, *arguments: str, quiet: bool = False) -> None:
    """Runs a script in a Python process of its own. `quiet` shows what it printed only if it failed.

    Raises SystemExit, naming the variant, if the script fails.
    """
    child = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # data workers fork after tokenizing
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
    )
    if child.returncode:
        where = child.stderr if quiet else "its messages are above"
        raise SystemExit(f"the run {variant!r} failed (exit code {child.returncode}): {where}")
