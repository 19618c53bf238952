"""Versions against the ranges that fxopt's own metadata declares, and the commands that install what is missing."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fxopt.diagnosis.check import Check

# What fxopt does not need and people who train often do.
OPTIONAL = {"accelerate": "the Trainer of transformers needs it", "peft": "LoRA and other adapters need it"}


def version_checks(declared: Sequence[str] | None = None) -> tuple[Check, ...]:
    """Python, fxopt, and each package against the range that fxopt's metadata declares (or `declared` does)."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        why = "without it no version can be compared with its range"
        return (Check("versions", "packaging", "missing", "", why, install("packaging"), needed=True),)
    python = sys.version.split()[0]
    try:
        about = metadata.metadata("fxopt")
        declared = list(metadata.requires("fxopt") or ()) if declared is None else declared
    except metadata.PackageNotFoundError:
        why = "runs from a folder and is not installed: nothing declares the versions that it works with"
        return (
            Check("versions", "python", "ok", python),
            Check("versions", "fxopt", "missing", own_version(), why, install("--editable .")),
        )
    range_ = SpecifierSet(about["Requires-Python"] or "")
    fits = range_.contains(python, prereleases=True)
    why = "" if fits else f"fxopt needs Python {range_}: make a virtual environment with one"
    checks = [
        Check("versions", "python", "ok" if fits else "unsupported", python, why, needed=True),
        _own_check(about["Version"]),
    ]
    requirements = [Requirement(text) for text in declared]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            checks.append(_version_check(requirement.name, requirement.specifier, required=True))
    for name in OPTIONAL:
        range_ = next((item.specifier for item in requirements if item.name == name), SpecifierSet())
        checks.append(_version_check(name, range_, required=False))
    return tuple(checks)


def own_version() -> str:
    """The version of the code that runs."""
    return str(import_module("fxopt").__version__)


def _own_check(installed: str) -> Check:
    running = own_version()
    if installed == running:
        return Check("versions", "fxopt", "ok", running)
    why = f"the ranges are those of fxopt {installed}, which is what is installed"
    return Check("versions", "fxopt", "unsupported", running, why)


def _version_check(name: str, range_: Any, *, required: bool) -> Check:
    wanted = f"{name}{range_}"
    needs = "fxopt needs it" if required else OPTIONAL[name]
    try:
        # A broken installation can have metadata without a version.
        found: str | None = metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError):
        found = None
    if not found:
        return Check("versions", name, "missing", "", needs, install(wanted), needed=required)
    try:
        fits = range_.contains(found, prereleases=True)
    except ValueError:  # no version by the rules
        fits = not str(range_)
    # An optional package that is there must fit too: its range is declared, and it will be used.
    if fits:
        return Check("versions", name, "ok", f"{found} ({range_})" if str(range_) else found, needed=required)
    return Check("versions", name, "unsupported", found, f"fxopt needs {range_}", install(wanted), needed=True)


def with_imports(versions: Iterable[Check], imports: Iterable[Check]) -> tuple[Check, ...]:
    """The versions; those that cannot be imported say so. Installing the first that fails may mend the others."""
    reasons = {check.name: check.why for check in imports if check.state != "ok"}
    known: dict[str, str] = {}  # error → the package that failed with it first
    checks = []
    for check in versions:
        if check.state == "ok" and (reason := reasons.get(check.name)) is not None:
            why, mend = f"cannot be imported: {reason}", ""
            if known.setdefault(reason, check.name) == check.name:
                # Without the build's name (+cpu), which the package index does not know.
                mend = install(f"--force-reinstall {check.name}=={metadata.version(check.name).partition('+')[0]}")
            else:
                why = f"cannot be imported, like {known[reason]}: {reason}"
            check = replace(check, state="unsupported", why=why, mend=mend)
        checks.append(check)
    return tuple(checks)


def import_name(package: str) -> str:
    """What a package is imported as."""
    return {"pyyaml": "yaml"}.get(package.lower(), package.replace("-", "_"))


def install(what: str) -> str:
    """The command that installs `what` for the interpreter that runs this."""
    arguments = " ".join(shlex.quote(word) for word in what.split())
    if find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install --python {interpreter()} {arguments}"
    return f"{interpreter()} -m pip install {arguments}"


def interpreter() -> str:
    """The running interpreter as it is called: `python` where that is this one, else its path."""
    called = shutil.which("python")
    same = called is not None and Path(called).parent == Path(sys.executable).parent
    return "python" if same else shlex.quote(sys.executable)
