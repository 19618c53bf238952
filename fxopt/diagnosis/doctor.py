"""`fxopt.doctor`: what of fxopt works on this machine.

Training is tried in a process of its own (`fxopt.diagnosis.trials`). A driver, a compiler or a broken installation may
end that process; then the trial that was running is what failed, and the next process goes on with the one after it.
The process that asks imports nothing that is examined: a missing torch is a finding and no traceback.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from fxopt.diagnosis.check import Check, Diagnosis, State
from fxopt.diagnosis.processes import try_all
from fxopt.diagnosis.versions import import_name, own_version, version_checks, with_imports
from fxopt.error_lines import in_a_line

HUB_TIMEOUT_S, HUB_MODEL = 3.0, "HuggingFaceTB/SmolLM2-135M"


def doctor(device: str | None = None, *, progress: bool = False) -> Diagnosis:
    """What of fxopt works on this machine, found by trying it: the versions, the device, one training step of a tiny
    model with each preset and backend, the kernels, the connection to the Hub.

    Takes up to a minute, nearly all of it in another process, whose caches are its own. Asks the Hub once, and not at
    all where HF_HUB_OFFLINE is set.

    Args:
        device: what to train on, such as "cpu" or "cuda:1"; None: the accelerator that torch names, else the CPU.
        progress: whether a bar on standard error shows how far it is.

    Returns the `Diagnosis`. What fails is in it. Raises ValueError where torch knows no such device.
    """
    hub = _Hub()  # asks while training is tried
    versions = version_checks()
    packages = [check.name for check in versions if check.found and check.name not in ("python", "fxopt")]
    tried = try_all(device, {name: import_name(name) for name in packages}, progress)
    versions = with_imports(versions, tried.checks_of("imports"))
    return Diagnosis(own_version(), tried.device or device or "", (*versions, *tried.checks(), hub.check()))


class _Hub:
    """One question to the Hub, asked in the background: a name server that does not answer has no timeout."""

    def __init__(self) -> None:
        self._answer: list[Check] = []
        self._thread = threading.Thread(target=lambda: self._answer.append(hub_check()), daemon=True)
        self._thread.start()

    def check(self) -> Check:
        self._thread.join(2 * HUB_TIMEOUT_S)
        return self._answer[0] if self._answer else _no_hub("unsupported", "no answer")


def ask_hub() -> str:
    """Ask for one small, public model, once. Returns the address that answered. Raises what the Hub's client raises."""
    from huggingface_hub import HfApi, constants

    HfApi().model_info(HUB_MODEL, timeout=HUB_TIMEOUT_S, token=False)
    return constants.ENDPOINT


def hub_check(ask: Callable[[], str] = ask_hub) -> Check:
    """Whether the Hub answers `ask`, which returns its address or raises. Asks nothing where that is forbidden."""
    variable = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(name)), None)
    if variable is not None:
        return _no_hub("missing", f"{variable} is set", f"unset {variable}")
    try:
        return Check("hub", "Hub", "ok", f"{ask()} answers")
    except Exception as error:  # the Hub's client raises anything from OSError to its own HTTP errors
        return _no_hub("missing", in_a_line(error))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it


def _no_hub(state: State, reason: str, mend: str = "") -> Check:
    why = f"{reason}; `fxopt inspect org/name` needs it, a well-known model, a folder or a config.json does not"
    return Check("hub", "Hub", state, "", why, mend)
