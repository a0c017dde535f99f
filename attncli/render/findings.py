"""The findings of a report for a terminal: the new ones with their advice, the known ones in a line each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attncli.records import Finding, Report
from attncli.render.words import clean

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def finding_parts(report: Report) -> list[RenderableType]:
    """A part per finding, those that say the same of several layers as one."""
    parts: list[RenderableType] = []
    for alike in _alike(report.findings):
        line = _line(alike, STYLES[alike[0].severity])
        parts.append(Group(line, Padding(Text(f"→ {clean(alike[0].advice)}", style="dim"), (0, 0, 0, 2))))
    if report.known:
        parts.append(Text("Known findings, of the baseline:", style="dim"))
        parts += [
            Padding(Text.assemble(_line(alike, "dim"), style="dim"), (0, 0, 0, 2))
            for alike in _alike(report.known)
        ]
    return parts


def tally(report: Report) -> str:
    """ "1 error, 2 warnings", "no findings", "no new findings, 3 known"."""
    counts = {s: sum(f.severity == s for f in report.findings) for s in STYLES}
    found = ", ".join(f"{n} {s}{'s' if n != 1 else ''}" for s, n in counts.items() if n)
    if report.known:
        return f"{found or 'no new findings'}, {len(report.known)} known"
    return found or "no findings"


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    grouped: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        grouped.setdefault((finding.severity, finding.code, _shape_of(finding.message)), []).append(finding)
    return list(grouped.values())


def _line(alike: Sequence[Finding], style: str) -> Text:
    first = alike[0]
    line = Text.assemble((f"{first.severity} ", style), (f"{first.code} {first.name}", "bold"), "  ")
    line.append(clean(first.message))
    if len(alike) > 1:
        line.append(f" (and {len(alike) - 1} more like it)", style="dim")
    return line


def _shape_of(message: str) -> str:
    """The message without its numbers: findings that say the same of several layers are shown once."""
    return "".join(c for c in message if not c.isdigit())
