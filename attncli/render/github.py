"""Workflow commands, which GitHub Actions turns into annotations: at most ten, the gravest first.

Of each severity a step shows ten annotations and drops the rest without a word, and fifty a job; ten in all leave
room for the other steps. Known findings are not annotated. The last line is the verdict for the log.
Source: the runner's own parser, `ActionCommand` and `ExecutionContext` of actions/runner.
"""

from __future__ import annotations

from collections.abc import Sequence

from attncli.records import Report
from attncli.render.collapsed import Collapsed, collapsed, tally
from attncli.render.observed import subject, verdict
from attncli.render.places import Place, places
from attncli.render.words import clean


def text(report: Report) -> str:
    """A command per kind of finding, and the verdict as the last line."""
    groups = collapsed(report.findings, report.layers)
    place = places(report)
    shown = groups if len(groups) <= _MOST else groups[: _MOST - 1]
    lines = [_annotation(group, place(group.first)) for group in shown]
    if len(groups) > len(shown):
        lines.append(_rest(groups[len(shown) :]))
    lines.append(_harmless(f"attncli {clean(report.command)} {subject(report)}: {verdict(report)}"))
    return "\n".join(lines) + "\n"


# --- commands -----------------------------------------------------------------------------------------


def _annotation(group: Collapsed, place: Place) -> str:
    first = group.first
    layers = len({finding.layer for finding in group.findings})
    title = f"{first.code} {first.name}" + (f" ({layers} layers)" if layers > 1 else "")
    where = f"{group.where}: " if group.where not in group.message else ""
    properties = {"file": place.file, "line": place.line, "title": title}
    return _command(first.severity, properties, [f"{where}{group.sentence}", first.advice])


def _rest(groups: Sequence[Collapsed]) -> str:
    """One command that stands for all that GitHub would drop."""
    findings = [finding for group in groups for finding in group.findings]
    codes = dict.fromkeys(f"{finding.code} {finding.name}" for finding in findings)
    named = ", ".join(list(codes)[:_NAMED]) + (" …" if len(codes) > _NAMED else "")
    said = f"{tally(findings)} more, not shown here: {named}."
    return _command(groups[0].first.severity, {"title": f"{len(findings)} more findings"}, [said, _ELSEWHERE])


def _command(severity: str, properties: dict[str, str | int | None], lines: Sequence[str]) -> str:
    given = [f"{name}={_property(value)}" for name, value in properties.items() if value is not None]
    said = "\n".join(_clipped(clean(line)) for line in lines if line)
    return _harmless(f"::{_COMMANDS[severity]} {','.join(given)}::{_data(said)}")


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: object) -> str:
    return _data(clean(value)).replace(":", "%3A").replace(",", "%2C")


def _harmless(line: str) -> str:
    """The line without "##[", which begins a command wherever in a line it stands."""
    return line.replace("##[", r"##\x5b")


def _clipped(said: str) -> str:
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST - 1]}…"


# --- tables -------------------------------------------------------------------------------------------

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}
_MOST = 10
_NAMED = 5
# The runner cuts a message at 4,096 characters: a line of message and one of advice.
_LONGEST = 2000
_ELSEWHERE = "All of them are in the table, in --format markdown and in --format sarif."
