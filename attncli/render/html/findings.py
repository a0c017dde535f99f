"""Findings for the page: the gravest first, those that differ only in numbers as one with all its places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import SEVERITIES, Finding
from attncli.render.html.tables import plain


class Place(NamedTuple):
    layer: str
    head: str
    message: str
    evidence: str


class Group(NamedTuple):
    """Findings of one rule with one message but for its numbers. `evidence`: of the first one."""

    severity: str
    code: str
    name: str
    message: str
    advice: str
    evidence: tuple[tuple[str, str], ...]
    places: tuple[Place, ...]


def groups(findings: Sequence[Finding]) -> list[Group]:
    """`findings` in groups, the gravest first, otherwise in their order."""
    alike: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (
            finding.severity,
            finding.code,
            _without_digits(finding.message),
            _without_digits(finding.advice),
        )
        alike.setdefault(key, []).append(finding)
    ordered = sorted(alike.values(), key=lambda some: -SEVERITIES.index(some[0].severity))
    return [_group(some) for some in ordered]


def tally(findings: Sequence[Finding]) -> str:
    """ "2 errors, 1 note"; "" without any."""
    counts = {name: sum(found.severity == name for found in findings) for name in reversed(SEVERITIES)}
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count)


def heads_of(finding: Finding) -> tuple[int, ...]:
    """The heads that a finding is about; () where it is about the whole layer."""
    listed = finding.evidence.get("heads")
    heads = [head for head in listed if isinstance(head, int)] if isinstance(listed, (list, tuple)) else []
    return tuple(sorted({*heads, *([] if finding.head is None else [finding.head])}))


def facts(evidence: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Evidence as names and words."""
    return tuple((str(name).replace("_", " "), plain(value)) for name, value in evidence.items())


def _group(some: Sequence[Finding]) -> Group:
    first = some[0]
    places = tuple(
        Place(
            finding.layer or "",
            "" if finding.head is None else str(finding.head),
            finding.message,
            "; ".join(f"{name}: {value}" for name, value in facts(finding.evidence)),
        )
        for finding in some
    )
    return Group(
        first.severity, first.code, first.name, first.message, first.advice, facts(first.evidence), places
    )


def _without_digits(message: str) -> str:
    return "".join(letter for letter in message if not letter.isdigit())
