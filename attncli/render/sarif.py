"""SARIF 2.1.0 as GitHub's code scanning reads it: one result for each finding, each with a place and an identity.

Source: the OASIS standard, and GitHub's "SARIF support for code scanning" for what it requires and its limits.
GitHub shows what is suppressed here as well: an alert is dismissed there, not by a file.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from attncli.records import SEVERITIES, Finding, Report, Severity, strict_json
from attncli.render.markdown import escaped
from attncli.render.observed import notes, subject, verdict
from attncli.render.places import Place, places
from attncli.render.words import clean


class RuleText(Protocol):
    """What a rule says of itself; a rule of the catalogue is one."""

    @property
    def code(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def severity(self) -> Severity: ...
    @property
    def what(self) -> str: ...
    @property
    def why(self) -> str: ...
    @property
    def formula(self) -> str: ...
    @property
    def threshold(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def provenance(self) -> Literal["published", "derived", "heuristic"]: ...
    @property
    def example(self) -> str: ...
    @property
    def remedy(self) -> str: ...


def text(
    report: Report, rules: Sequence[RuleText] = (), fail_on: Severity | Literal["never"] = "error"
) -> str:
    """One run as strict JSON. `rules`: the catalogue; a rule that is not in it is told from its finding.

    `fail_on`: which the exit code goes by. At most 25,000 results and 10 MB compressed, the gravest: GitHub
    refuses the whole file otherwise, and a notification says how many were left out.
    """
    told = _descriptors([*report.findings, *report.known], rules)
    results = _results(report, {rule["id"]: at for at, rule in enumerate(told)})
    kept = results[:_MOST]
    while True:
        log = _log(report, told, kept, len(results) - len(kept), fail_on)
        said = json.dumps(log, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if not kept or len(said) <= _BYTES // 4 or len(zlib.compress(said.encode("utf-8"))) <= _BYTES:
            return said
        kept = kept[: len(kept) // 2]


# --- the log ------------------------------------------------------------------------------------------


def _log(
    report: Report,
    rules: list[Any],
    results: list[Any],
    left_out: int,
    fail_on: Severity | Literal["never"],
) -> dict[str, Any]:
    driver = {
        "name": "attncli",
        "version": report.version,
        **({"semanticVersion": report.version} if _SEMANTIC.fullmatch(report.version) else {}),
        "rules": rules,
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(report, left_out, fail_on)],
        "originalUriBaseIds": {_ROOT: {"description": {"text": "The folder in which attncli ran."}}},
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    log: dict[str, Any] = strict_json({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]})
    return log


def _invocation(report: Report, left_out: int, fail_on: Severity | Literal["never"]) -> dict[str, Any]:
    """What ran, and as notifications what a person has to know of it besides the results."""
    told = [("note", note) for note in notes(report)]
    if left_out:
        told.insert(0, ("warning", f"{left_out} more results are left out, the mildest."))
    if not report.looked:
        told.insert(0, ("error", f"{subject(report)}: {verdict(report)}"))
    return {
        "executionSuccessful": report.looked,
        "exitCode": report.exit_code(fail_on),
        "exitCodeDescription": f"with --fail-on {fail_on}",
        "toolExecutionNotifications": [
            {"level": level, "message": {"text": _literal(said)}} for level, said in told if said
        ],
        "properties": {"command": clean(report.command), "verdict": report.verdict},
    }


# --- results ------------------------------------------------------------------------------------------


def _results(report: Report, rules: Mapping[str, int]) -> list[dict[str, Any]]:
    """The gravest first, known ones after all others. `rules`: the index of each code."""
    place = places(report)
    paths = {layer.id: layer.path for layer in report.layers}
    ordinals = _ordinals([*report.known, *report.findings])
    made: list[tuple[int, dict[str, Any]]] = []
    for at, finding in enumerate([*report.known, *report.findings]):
        path = paths.get(finding.layer or "") or finding.layer or ""
        result = _result(finding, rules[clean(finding.code)], _location(place(finding), path), ordinals[at])
        if at < len(report.known):
            result["suppressions"] = [{"kind": "external", "justification": "It is in the baseline."}]
        made.append((-1 if at < len(report.known) else SEVERITIES.index(finding.severity), result))
    return [result for _, result in sorted(made, key=lambda pair: -pair[0])]


def _result(finding: Finding, rule: int, location: dict[str, Any], ordinal: int) -> dict[str, Any]:
    said = " ".join(filter(None, (clean(finding.message), clean(finding.advice))))
    head = {} if finding.head is None else {"head": finding.head}
    return {
        "ruleId": clean(finding.code),
        "ruleIndex": rule,
        "level": finding.severity,
        "message": {"text": _literal(said or finding.name)},
        "locations": [location],
        "partialFingerprints": _fingerprints(finding, ordinal),
        "properties": {**head, "evidence": finding.evidence},
    }


def _location(place: Place, path: str) -> dict[str, Any]:
    physical = {
        "artifactLocation": {"uri": place.uri, "uriBaseId": _ROOT},
        "region": {"startLine": place.line or 1},
    }
    if not path:
        return {"physicalLocation": physical}
    name = clean(path)
    logical = {"name": name.rpartition(".")[2] or name, "fullyQualifiedName": name, "kind": "module"}
    return {"physicalLocation": physical, "logicalLocations": [logical]}


def _fingerprints(finding: Finding, ordinal: int) -> dict[str, str]:
    """GitHub tells alerts of one rule and file apart by `primaryLocationLineHash` alone, in the form "16 hex:count".

    Its own uploader would fill in the hash of a source line, the same for all layers of a checkpoint; it leaves
    one that is there.
    """
    count = "" if ordinal == 1 else f":{ordinal}"
    return {
        "attncli/v1": f"{finding.fingerprint}{count}",
        "primaryLocationLineHash": f"{finding.fingerprint[:16]}:{ordinal}",
    }


def _ordinals(findings: Sequence[Finding]) -> list[int]:
    """For each of the findings which one of its fingerprint it is, from 1: by head and message, not by order."""
    alike: dict[str, list[int]] = defaultdict(list)
    for at, finding in enumerate(findings):
        alike[finding.fingerprint].append(at)
    ordinals = [0] * len(findings)
    for positions in alike.values():
        ordered = sorted(positions, key=lambda at: (findings[at].head or 0, findings[at].message))
        for ordinal, at in enumerate(ordered, 1):
            ordinals[at] = ordinal
    return ordinals


# --- rules --------------------------------------------------------------------------------------------


def _descriptors(findings: Iterable[Finding], rules: Sequence[RuleText]) -> list[dict[str, Any]]:
    """The catalogue as a whole, so that it is the same in every file, and what is not in it; by code."""
    told = {rule.code: _of_rule(rule) for rule in rules}
    for finding in findings:
        code = clean(finding.code)
        if code not in told:
            told[code] = _of_finding(finding)
    return [told[code] for code in sorted(told)]


def _of_rule(rule: RuleText) -> dict[str, Any]:
    parts = [(title, getattr(rule, name)) for title, name in _PARTS if getattr(rule, name)]
    plain = "\n".join(f"{title}: {said}" if title else said for title, said in parts)
    marked = "\n\n".join(f"**{title}:** {escaped(said)}" if title else escaped(said) for title, said in parts)
    return {
        **_descriptor(rule.code, rule.name, rule.severity, (rule.what, f"{rule.what} {rule.why}")),
        "help": {"text": _literal(plain), "markdown": marked},
        "properties": {
            "tags": ["attention", rule.provenance],
            "precision": _PRECISION[rule.provenance],
            "problem.severity": _PROBLEM[rule.severity],
        },
    }


def _of_finding(finding: Finding) -> dict[str, Any]:
    name = clean(finding.name).replace("-", " ") or clean(finding.code)
    advice = clean(finding.advice) or name
    return {
        **_descriptor(finding.code, finding.name, finding.severity, (f"{name}.", f"{name}. {advice}")),
        "help": {"text": _literal(advice), "markdown": escaped(advice)},
        "properties": {"tags": ["attention"], "problem.severity": _PROBLEM[finding.severity]},
    }


def _descriptor(code: str, name: str, severity: Severity, descriptions: tuple[str, str]) -> dict[str, Any]:
    short, full = (_literal(clean(said))[:_DESCRIPTION] for said in descriptions)
    return {
        "id": clean(code),
        "name": clean(name)[:_NAME],
        "shortDescription": {"text": short},
        "fullDescription": {"text": full},
        "defaultConfiguration": {"level": severity},
    }


def _literal(said: str) -> str:
    """Text in which nothing is a link or a placeholder of SARIF's."""
    return _PLACEHOLDER.sub(r"{{\1}}", said.replace("](", "\\]("))


# --- tables -------------------------------------------------------------------------------------------

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_ROOT = "%SRCROOT%"
_MOST = 25_000
_BYTES = 10_000_000
# GitHub's limits, in characters.
_NAME = 255
_DESCRIPTION = 1024
_PLACEHOLDER = re.compile(r"\{(\d+)\}")
_SEMANTIC = re.compile(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")
# How often a finding is right: where its threshold comes from.
_PRECISION = {"derived": "very-high", "published": "high", "heuristic": "medium"}
_PROBLEM = {"error": "error", "warning": "warning", "note": "recommendation"}
_PARTS = (
    ("", "what"),
    ("Why it is bad", "why"),
    ("Formula", "formula"),
    ("Threshold", "threshold"),
    ("Source", "source"),
    ("Example", "example"),
    ("What helps", "remedy"),
)
