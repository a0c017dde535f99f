"""The linter and debugger for attention: layouts, weights, and what is wrong with them.

`import attncli` is cheap: no torch, nothing but this file until a name is used.

PYTEST_DONT_REWRITE: there are no assertions for pytest to rewrite, and importing this before pytest is no fault.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "AttncliError",
    "Report",
    "TrainingFault",
    "__version__",
    "check",
    "diff",
    "inspect",
    "measure",
    "nan_check",
    "watch",
]

if TYPE_CHECKING:
    from attncli.api import Report, TrainingFault, check, diff, inspect, measure, nan_check, watch
    from attncli.errors import AttncliError

_HOMES = {
    "check": "attncli.api",
    "diff": "attncli.api",
    "inspect": "attncli.api",
    "measure": "attncli.api",
    "nan_check": "attncli.api",
    "Report": "attncli.api",
    "TrainingFault": "attncli.api",
    "watch": "attncli.api",
    "AttncliError": "attncli.errors",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'attncli' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
