"""The findings of a report for a terminal: the new ones with their advice, the known ones in a line each."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attncli.records import Report
from attncli.render.collapsed import Collapsed, collapsed
from attncli.render.collapsed import tally as tally_of
from attncli.render.words import clean

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def finding_parts(report: Report) -> list[RenderableType]:
    """A part per finding, those that say the same of several layers as one."""
    parts: list[RenderableType] = []
    for one in collapsed(report.findings, report.layers):
        advice = Padding(Text(f"→ {clean(one.first.advice)}", style="dim"), (0, 0, 0, 2))
        parts.append(Group(_line(one, STYLES[one.first.severity]), advice))
    if report.known:
        parts.append(Text("Known findings, of the baseline:", style="dim"))
        known = collapsed(report.known, report.layers)
        parts += [Padding(Text.assemble(_line(one, "dim"), style="dim"), (0, 0, 0, 2)) for one in known]
    return parts


def tally(report: Report) -> str:
    """ "1 error, 2 warnings", "no findings", "no new findings, 3 known"."""
    found = tally_of(report.findings)
    if report.known:
        return f"{found or 'no new findings'}, {len(report.known)} known"
    return found or "no findings"


def _line(one: Collapsed, style: str) -> Text:
    first = one.first
    line = Text.assemble((f"{first.severity} ", style), (f"{first.code} {first.name}", "bold"), "  ")
    # A message that does not begin with its layer names its place itself.
    where = f"{one.where}: " if one.where and one.at else ""
    line.append(clean(f"{where}{one.message}"))
    if one.more:
        several = f"{one.at}, and {one.more} more like it" if one.at else f"and {one.more} more like it"
        line.append(f" ({clean(several)})", style="dim")
    return line
