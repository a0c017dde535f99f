"""Findings of two reports: which are new, which recur, which are gone, and of which the other could not tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from attncli.api.pairing import Pairs
from attncli.records import SEVERITIES, Change, Finding, Report


class Recurring(NamedTuple):
    """`new`: only in the second report, or graver there. `known`: of the second report, in both. `untold`: (rules of
    the first, of the second) that never ran in the other, so that nothing follows from their findings."""

    new: tuple[Finding, ...]
    known: tuple[Finding, ...]
    changes: tuple[Change, ...]
    untold: tuple[tuple[str, ...], tuple[str, ...]]


def recurring(pairs: Pairs, first: Report, second: Report) -> Recurring:
    """By `Finding.fingerprint`; a layer that goes by another name in the second report is the same place."""
    earlier = [_renamed(finding, pairs) for finding in (*first.findings, *first.known)]
    before: dict[str, Finding] = {}
    for finding in earlier:
        other = before.get(finding.fingerprint)
        if other is None or _grade(finding) > _grade(other):
            before[finding.fingerprint] = finding
    later = {finding.fingerprint for finding in (*second.findings, *second.known)}
    names = {after.id: before.id for before, after in pairs.both}
    new, known, changes = [], [*second.known], []
    untold: tuple[list[str], list[str]] = ([], [])
    for finding in second.findings:
        old = before.get(finding.fingerprint)
        if old is not None and _grade(old) >= _grade(finding):
            known.append(finding)
        elif old is None and not _could_tell(first, finding, names.get(finding.layer or ""), second):
            untold[1].append(finding.code)
        else:
            new.append(finding)
            changes.append(_change(finding, old.message if old else None, finding.message))
    back = {before.id: after.id for before, after in pairs.both}
    for finding in (*first.findings, *first.known):
        moved = _renamed(finding, pairs)
        if moved.fingerprint in later:
            continue
        if _could_tell(second, finding, back.get(finding.layer or ""), first):
            changes.append(_change(moved, moved.message, None))
        else:
            untold[0].append(finding.code)
    return Recurring(
        tuple(new),
        tuple(known),
        tuple(changes),
        (tuple(sorted(set(untold[0]))), tuple(sorted(set(untold[1])))),
    )


def _change(finding: Finding, before: str | None, after: str | None) -> Change:
    return Change("finding", finding.layer, finding.head, finding.code, before, after)


def _grade(finding: Finding) -> int:
    return SEVERITIES.index(finding.severity)


def _renamed(finding: Finding, pairs: Pairs) -> Finding:
    """A finding of the first report as the second would name its place."""
    for before, after in pairs.both:
        if finding.layer == before.id and before.id != after.id:
            message = finding.message.replace(before.path, after.path)
            return replace(finding, layer=after.id, message=message)
    return finding


# --- what a report could have told --------------------------------------------------------------------


def _could_tell(report: Report, finding: Finding, layer: str | None, teller: Report) -> bool:
    """Whether the rule of `finding` ran for `report`. `layer`: what the finding's layer is called there."""
    judged = _RULES.get(finding.code[:4])
    if judged is None:
        return report.command == teller.command
    return judged(report, finding, layer, teller)


def _files(report: Report, finding: Finding, layer: str | None, teller: Report) -> bool:
    """A check of a model reads the files that it was loaded from, where there are any."""
    kind = report.source.get("kind")
    if (report.command, kind) == (teller.command, teller.source.get("kind")):
        return True
    return kind in ("file", "folder") and report.command in _READS_FILES


def _layers(report: Report, finding: Finding, layer: str | None, teller: Report) -> bool:
    return report.command in _READS_FILES or any(known.tensors for known in report.layers)


def _values(report: Report, finding: Finding, layer: str | None, teller: Report) -> bool:
    counted = "nan_count" in finding.evidence or "inf_count" in finding.evidence
    scores_tell = finding.code == "ATT201" and not counted
    return _has(report, "nan_count") or (scores_tell and _has(report, "score_typical"))


def _bounds(report: Report, finding: Finding, layer: str | None, teller: Report) -> bool:
    return _has(report, "score_bound")


def _calls(report: Report, finding: Finding, layer: str | None, teller: Report) -> bool:
    """Where a call was not explained, no rule looked at it."""
    ran = [call for call in report.calls if layer is None or call.layer == layer]
    if layer is not None and not ran:
        return False
    return bool(report.calls) and all(call.explained for call in ran)


def _origins(report: Report, finding: Finding, layer: str | None, teller: Report) -> bool:
    """A run without a backward pass says nothing of gradients."""
    phases = {
        origin.phase for origin in teller.origins if finding.message.endswith(f": {origin.message}.")
    } or {"forward"}
    ran = set((report.run or {}).get("operators_by_phase") or ())
    return {phase if phase in ("backward", "optimizer") else "forward" for phase in phases} <= ran


def _has(report: Report, metric: str) -> bool:
    return any(row.metric == metric for row in report.measurements)


def unheard(codes: Sequence[str], which: str, other: str) -> tuple[str, ...]:
    """The note about findings that the other report could not have told; () where there are none."""
    if not codes:
        return ()
    return (f"rules that ran for the {which} alone say nothing about the {other}: {', '.join(codes)}",)


# --- tables -------------------------------------------------------------------------------------------

_READS_FILES = ("inspect", "check")
# By the hundred of its code, what must have been looked at for a rule to speak.
_RULES: Mapping[str, Callable[[Report, Finding, str | None, Report], bool]] = {
    "ATT0": _files,
    "ATT1": _layers,
    "ATT2": _values,
    "ATT3": _bounds,
    "ATT4": _calls,
    "ATT5": _calls,
    "ATT6": _calls,
    "ATT7": _origins,
}
