"""Findings for the page: the gravest first, those that differ only in numbers as one with all its places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import Finding, Layer
from attncli.render.collapsed import Collapsed, collapsed
from attncli.render.html.tables import plain


class Place(NamedTuple):
    layer: str
    head: str
    message: str
    evidence: str


class Group(NamedTuple):
    """Findings of one rule with one message but for its numbers. `where`: their layers, folded.

    `evidence`: of the first one.
    """

    severity: str
    code: str
    name: str
    where: str
    message: str
    advice: str
    evidence: tuple[tuple[str, str], ...]
    places: tuple[Place, ...]


def groups(findings: Sequence[Finding], layers: Sequence[Layer]) -> list[Group]:
    """`findings` in groups, the gravest first, otherwise in their order."""
    return [_group(one) for one in collapsed(findings, layers)]


def heads_of(finding: Finding) -> tuple[int, ...]:
    """The heads that a finding is about; () where it is about the whole layer."""
    listed = finding.evidence.get("heads")
    heads = [head for head in listed if isinstance(head, int)] if isinstance(listed, (list, tuple)) else []
    return tuple(sorted({*heads, *([] if finding.head is None else [finding.head])}))


def facts(evidence: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Evidence as names and words."""
    return tuple((str(name).replace("_", " "), plain(value)) for name, value in evidence.items())


def _group(one: Collapsed) -> Group:
    places = tuple(
        Place(
            finding.layer or "",
            "" if finding.head is None else str(finding.head),
            finding.message,
            "; ".join(f"{name}: {value}" for name, value in facts(finding.evidence)),
        )
        for finding in one.findings
    )
    first = one.first
    told = facts(first.evidence)
    return Group(first.severity, first.code, first.name, one.where, one.sentence, first.advice, told, places)
