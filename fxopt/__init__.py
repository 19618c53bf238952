"""fxopt prepares a Hugging Face causal LM for training: precision, graph rewrites, and a report of both.

Importing this package is light: a public name is loaded from its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxopt.api import inspect, optimize, optimizer, report, restore, verify
    from fxopt.diagnosis.doctor import doctor
    from fxopt.log_probs import token_log_probs
    from fxopt.planning.plan import plan
    from fxopt.precision.annotate import annotate
    from fxopt.precision.footprint import footprint
    from fxopt.precision.monitor import monitor
    from fxopt.precision.optimizer import Optimizer
    from fxopt.precision.policy import Policy, PolicyError, Precision, Selector
    from fxopt.precision.presets import policies

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "inspect": "fxopt.api",
    "optimize": "fxopt.api",
    "optimizer": "fxopt.api",
    "report": "fxopt.api",
    "restore": "fxopt.api",
    "verify": "fxopt.api",
    "doctor": "fxopt.diagnosis.doctor",
    "annotate": "fxopt.precision.annotate",
    "monitor": "fxopt.precision.monitor",
    "Optimizer": "fxopt.precision.optimizer",
    "Policy": "fxopt.precision.policy",
    "PolicyError": "fxopt.precision.policy",
    "Precision": "fxopt.precision.policy",
    "Selector": "fxopt.precision.policy",
    "footprint": "fxopt.precision.footprint",
    "token_log_probs": "fxopt.log_probs",
    "plan": "fxopt.planning.plan",
    "policies": "fxopt.precision.presets",
}

__all__ = [
    "Optimizer",
    "Policy",
    "PolicyError",
    "Precision",
    "Selector",
    "annotate",
    "doctor",
    "footprint",
    "inspect",
    "monitor",
    "optimize",
    "optimizer",
    "plan",
    "policies",
    "report",
    "restore",
    "token_log_probs",
    "verify",
]


def __getattr__(name: str) -> object:
    module = _MODULE_OF_NAME.get(name)
    if module is None:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
