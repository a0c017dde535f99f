"""The pipelines: which reading feeds which measurement, and which measurement feeds which judgement.

Rooms below do not know each other; this room joins them. torch is imported only where values are read.
"""

from attncli.api.checking import check, check_model
from attncli.api.choosing import Choice, baseline_text, choice, chosen
from attncli.api.differences import diff, read_report
from attncli.api.forward import measure, measure_model
from attncli.api.nan import nan_check, nan_check_model
from attncli.api.report import Progress, Report, with_findings
from attncli.api.weights import inspect

__all__ = [
    "Choice",
    "Progress",
    "Report",
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
    "with_findings",
]
