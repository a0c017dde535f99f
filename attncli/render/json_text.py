"""The report as strict JSON."""

from __future__ import annotations

from attncli.records import Report


def text(report: Report) -> str:
    return report.to_json() + "\n"
