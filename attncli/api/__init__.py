"""The pipelines: which reading feeds which measurement, and which measurement feeds which judgement.

Rooms below do not know each other; this room joins them. torch is imported only where values are read. A pipeline is
loaded when it is first used: `inspect` of a header takes no longer for what the others need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Choice",
    "Progress",
    "Report",
    "TrainingFault",
    "Watch",
    "baseline_text",
    "check",
    "check_model",
    "choice",
    "chosen",
    "diff",
    "inspect",
    "measure",
    "measure_model",
    "nan_check",
    "nan_check_model",
    "read_report",
    "replay_capsule",
    "watch",
    "with_findings",
]

if TYPE_CHECKING:
    from attncli.api.capsules import replay_capsule
    from attncli.api.checking import check, check_model
    from attncli.api.choosing import Choice, baseline_text, choice, chosen
    from attncli.api.differences import diff, read_report
    from attncli.api.forward import measure, measure_model
    from attncli.api.nan import nan_check, nan_check_model
    from attncli.api.report import Progress, Report, with_findings
    from attncli.api.watching import TrainingFault, Watch, watch
    from attncli.api.weights import inspect

_HOMES = {
    "capsules": ("replay_capsule",),
    "checking": ("check", "check_model"),
    "choosing": ("Choice", "baseline_text", "choice", "chosen"),
    "differences": ("diff", "read_report"),
    "forward": ("measure", "measure_model"),
    "nan": ("nan_check", "nan_check_model"),
    "report": ("Progress", "Report", "with_findings"),
    "watching": ("TrainingFault", "Watch", "watch"),
    "weights": ("inspect",),
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'attncli.api' has no attribute {name!r}")
    return getattr(import_module(f"attncli.api.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
