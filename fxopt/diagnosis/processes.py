"""The trials in processes of their own: started, listened to, and started again where one has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from rich.console import Console

from fxopt.diagnosis.check import DEFAULT_PRESET, Area, Check, failed

# Safe: the folder that a user happens to be in shadows nothing.
COMMAND = (sys.executable, "-P", "-m", "fxopt.diagnosis.trials")
SILENCE_S = 300.0  # after which a trial is taken to hang; Inductor's first compilation takes a minute where it is slow
MOST_PROCESSES = 5
NOT_TRIED = "not tried: trials before it have ended their process too often"


class Tried:
    """The trials as they report: what was planned, what was found, and which presets are most like each."""

    def __init__(self) -> None:
        self.device = ""
        self.planned: dict[tuple[str, str], None] = {}
        self.found: dict[tuple[str, str], list[Check]] = {}
        self.running: tuple[str, str] | None = None
        self.nearest: dict[str, list[str]] = {}
        self.finished = False
        self.refused = ""

    def hear(self, message: dict[str, Any]) -> None:
        """Take in one line of `fxopt.diagnosis.trials`."""
        if "plan" in message:
            self.planned.update(dict.fromkeys((area, name) for area, name in message["plan"]))
            self.nearest.update(message.get("nearest", {}))
            self.device = message.get("device", self.device)
        elif "start" in message:
            self.running = (message["start"][0], message["start"][1])
        elif "checks" in message and self.running is not None:
            self.found[self.running], self.running = [Check(**check) for check in message["checks"]], None
        self.refused = message.get("refused", self.refused)
        self.finished = self.finished or "end" in message

    def fail(self, why: str) -> None:
        """What was running has ended its process. Where that came before training was planned, it never will be."""
        if self.running is not None:
            self.found[self.running] = [failed(*self.running, why)]
        elif not any(area == "presets" for area, _ in self.planned):
            self.found["presets", DEFAULT_PRESET] = [failed("presets", DEFAULT_PRESET, why)]
            self.finished = True
        self.running = None

    def give_up(self) -> None:
        for area, name in self.planned:
            self.found.setdefault((area, name), [failed(area, name, NOT_TRIED)])

    def checks_of(self, area: str) -> list[Check]:
        return [check for (where, _), checks in self.found.items() if where == area for check in checks]

    def checks(self) -> list[Check]:
        """All but the imports, with the nearest preset that works beside each that does not."""
        checks = [check for area in get_args(Area) for check in self.checks_of(area)]
        works = {check.name for check in checks if check.area == "presets" and check.state == "ok"}
        return [
            replace(check, mend=f'fxopt.optimize(model, "{nearest}")')
            if check.area == "presets"
            and check.state != "ok"
            and (nearest := next((name for name in self.nearest.get(check.name, ()) if name in works), None))
            else check
            for check in checks
        ]


def try_all(device: str | None, packages: Mapping[str, str], progress: bool = False) -> Tried:
    """What the trials report, in as many processes as it takes. Raises ValueError for an unknown device."""
    tried = Tried()
    with tempfile.TemporaryDirectory(prefix="fxopt-doctor-") as caches, _bar(progress) as show:
        for _ in range(MOST_PROCESSES):
            request = {"device": device, "packages": dict(packages), "done": [*tried.found]}
            _listen([*COMMAND, json.dumps(request)], caches, tried, show)
            if tried.refused:
                raise ValueError(tried.refused)
            if tried.finished:
                break
        else:
            tried.give_up()
    return tried


def _listen(command: Sequence[str], caches: str, tried: Tried, show: Callable[[Tried], None]) -> None:
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(caches),
        ) as process,
    ):
        hangs = threading.Event()

        def end() -> None:
            hangs.set()
            process.kill()

        def next_line() -> str:
            timer = threading.Timer(SILENCE_S, end)
            timer.start()
            try:
                return process.stdout.readline() if process.stdout is not None else ""
            finally:
                timer.cancel()

        try:
            while line := next_line():
                tried.hear(json.loads(line))
                show(tried)
            code = process.wait()
        finally:
            process.kill()  # an interrupted doctor leaves nothing running
        if not tried.finished and not tried.refused and (code != 0 or tried.running is not None):
            errors.seek(0)
            tried.fail(f"no answer in {SILENCE_S:.0f} s" if hangs.is_set() else _death(code, errors.read()))


def _death(code: int, errors: str) -> str:
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}{': ' * bool(last)}{last}"
    return last or f"the process ended with exit code {code}"


def _environment(caches: str) -> dict[str, str]:
    """Of the process that tries. Its caches are new: what was compiled before a compiler went would seem to work."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # the same packages as here
        "PYTHONWARNINGS": "ignore",
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TRITON_CACHE_DIR": os.path.join(caches, "triton"),
        "CUDA_LAUNCH_BLOCKING": "1",  # a kernel's error comes in the trial that launched it
        "HF_HUB_OFFLINE": "1",
    }


class _bar:
    """Shows on standard error how many of the trials are done, and which is running."""

    def __init__(self, visible: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not visible)
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Callable[[Tried], None]:
        self._progress.start()
        return self._show

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _show(self, tried: Tried) -> None:
        running = " ".join(tried.running or ())
        self._progress.update(
            self._task, description=running, completed=len(tried.found), total=len(tried.planned) or None
        )
