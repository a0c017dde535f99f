"""JUnit XML: a test case for each layer, so that a CI server shows how many layers were looked at.

A layer has failed where a finding of it makes the command fail (`--fail-on`); lesser findings and known ones stand in
the output of a test that has passed. A layer that was not observed is skipped, with the reason. A report that
observed nothing is an error, as is its exit code. What belongs to no layer is a case of its own.
Source: the schema junit-10.xsd of Jenkins' xUnit plugin, which GitLab and others read as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple
from xml.etree import ElementTree as ET

from attncli.records import SEVERITIES, Finding, Report, Severity
from attncli.render.observed import notes, subject, unobserved, verdict
from attncli.render.places import Place, places
from attncli.render.words import clean


def text(report: Report, fail_on: Severity | Literal["never"] = "error") -> str:
    """One test suite in one document. `fail_on`: the least severity that is a failure."""
    graves = SEVERITIES[SEVERITIES.index(fail_on) :] if fail_on != "never" else ()
    suite = ET.Element("testsuite", name=f"attncli {clean(report.command)} {subject(report)}")
    properties = ET.SubElement(suite, "properties")
    for name, value in (("attncli", report.version), ("verdict", report.verdict)):
        ET.SubElement(properties, "property", name=name, value=clean(value))
    # Servers take dots for packages: "model.safetensors" is no package.
    group = f"attncli.{clean(report.command)}.{subject(report).replace('.', '_')}"
    place = places(report)
    for one in _cases(report):
        _fill(ET.SubElement(suite, "testcase", classname=group, name=clean(one.name)), one, place, graves)
    if not report.looked:
        case = ET.SubElement(suite, "testcase", classname=group, name=_OBSERVED)
        ET.SubElement(case, "error", type="not observed", message=verdict(report))
    said = [verdict(report), *(f"note: {note}" for note in notes(report))]
    ET.SubElement(suite, "system-out").text = "\n".join(said)
    counts = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for name, tag in counts.items():
        suite.set(name, str(sum(1 for _ in suite.iter(tag))))
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return f"{_DECLARATION}{ET.tostring(root, encoding='unicode')}\n"


# --- cases --------------------------------------------------------------------------------------------


class _Case(NamedTuple):
    """A layer with what is said of it. `reason`: why it was not observed; "" where it was."""

    name: str
    findings: Sequence[Finding]
    known: Sequence[Finding]
    reason: str


def _cases(report: Report) -> list[_Case]:
    """One for each layer of the report, then of findings alone, and one for what is of no layer."""
    findings: dict[str | None, list[Finding]] = defaultdict(list)
    known: dict[str | None, list[Finding]] = defaultdict(list)
    for where, some in ((findings, report.findings), (known, report.known)):
        for finding in some:
            where[finding.layer or None].append(finding)
    names = {layer.id: layer.path or layer.id for layer in report.layers}
    names |= {one: one for one in [*findings, *known] if one is not None and one not in names}
    reasons = unobserved(report)
    cases = [_Case(name, findings[one], known[one], reasons.get(one, "")) for one, name in names.items()]
    name = _TRAINING if "training" in (report.run or {}) else _WHOLE
    whole = _Case(name, findings[None], known[None], "")
    return [*cases, whole] if whole.findings or whole.known or (not cases and report.looked) else cases


def _fill(
    case: ET.Element, told: _Case, place: Callable[[Finding], Place], graves: Sequence[Severity]
) -> None:
    failures = [finding for finding in told.findings if finding.severity in graves]
    if failures:
        first = failures[0]
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        failure = ET.SubElement(
            case, "failure", type=clean(f"{first.code} {first.name}"), message=clean(first.message) + more
        )
        failure.text = "\n".join(_lines(failures, place, ""))
    elif told.reason:
        ET.SubElement(case, "skipped", message=f"not observed: {told.reason}")
    rest = [finding for finding in told.findings if finding.severity not in graves]
    said = [*_lines(rest, place, ""), *_lines(told.known, place, "known ")]
    if said:
        ET.SubElement(case, "system-out").text = "\n".join(said)


def _lines(findings: Sequence[Finding], place: Callable[[Finding], Place], prefix: str) -> Iterator[str]:
    """A line for each finding, with its place and its advice below."""
    for finding in findings:
        at = place(finding)
        file = clean(at.file) if at.line is None else f"{clean(at.file)}:{at.line}"
        yield f"{prefix}{finding.severity} {clean(finding.code)} {clean(finding.name)}: {clean(finding.message)}"
        yield f"  {file}"
        if finding.advice:
            yield f"  {clean(finding.advice)}"


# --- words --------------------------------------------------------------------------------------------

_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'
_OBSERVED = "something was observed"
_WHOLE = "the whole model"
_TRAINING = "the training run"
