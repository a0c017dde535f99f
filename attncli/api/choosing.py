"""Which findings are reported: --select and --ignore, and the baseline of those that are known."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attncli.api.report import Report, with_findings
from attncli.errors import UsageError
from attncli.records import Finding, strict_json
from attncli.rules import RULES


class Choice(NamedTuple):
    """`known`: the fingerprints of the baseline's findings, with their messages; None without a baseline."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    known: dict[str, str] | None


def choice(select: Sequence[str] | None, ignore: Sequence[str] | None, baseline: Path | None) -> Choice:
    """What --select, --ignore and --baseline say. Errors: `UsageError`, before anything slow is begun."""
    known = _known_findings(baseline) if baseline is not None else None
    return Choice(_codes(select, "--select"), _codes(ignore, "--ignore"), known)


def chosen(report: Report, choice: Choice) -> Report:
    """The report with the findings that were asked for, those of the baseline apart."""
    kept = [
        finding
        for finding in report.findings
        if (not choice.wanted or _in(finding.code, finding.name, choice.wanted))
        and not _in(finding.code, finding.name, choice.unwanted)
    ]
    known = choice.known or {}
    new = [finding for finding in kept if finding.fingerprint not in known]
    old = [*report.known, *(finding for finding in kept if finding.fingerprint in known)]
    notes = []
    if choice.known is not None:
        gone = len(known.keys() - {finding.fingerprint for finding in kept})
        if gone:
            notes.append(
                f"{gone} finding{'s' if gone != 1 else ''} of the baseline {'were' if gone != 1 else 'was'} not "
                "found again: --write-baseline leaves them out"
            )
    return with_findings(report, new, known=old, notes=notes)


def baseline_text(report: Report) -> str:
    """A baseline of all findings of the report, new and known, in an order that no run changes."""
    rows = {
        finding.fingerprint: {
            "fingerprint": finding.fingerprint,
            "code": finding.code,
            "name": finding.name,
            "layer": finding.layer,
            "message": finding.message,
        }
        for finding in (*report.findings, *report.known)
    }
    ordered = sorted(rows.values(), key=lambda row: (row["code"], row["layer"] or "", row["fingerprint"]))
    whole = strict_json({"schema": BASELINE, "findings": ordered})
    return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# --- codes --------------------------------------------------------------------------------------------


def _codes(given: Sequence[str] | None, option: str) -> tuple[str, ...]:
    codes = tuple(code.strip() for entry in given or () for code in entry.split(",") if code.strip())
    for code in codes:
        if not any(_in(rule.code, rule.name, [code]) for rule in RULES):
            near = difflib.get_close_matches(code, [rule.name for rule in RULES], n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            listed = ", ".join(rule.code for rule in RULES)
            raise UsageError(option, f"no rule is named {code!r}.", f"{meant}Rules: {listed}.")
    return codes


def _in(code: str, name: str, wanted: Sequence[str]) -> bool:
    return any(code.startswith(w.upper()) or name == w.lower() for w in wanted)


# --- baseline -----------------------------------------------------------------------------------------


def _known_findings(path: Path) -> dict[str, str]:
    """Of a baseline, or of any JSON report."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [*report["findings"], *report.get("known", ())]
        return {_fingerprint(row): str(row["message"]) for row in rows}
    except OSError as error:
        raise UsageError(
            str(path),
            f"the baseline cannot be read ({error.strerror}).",
            "Write one with --write-baseline FILE.",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            str(path),
            "this is no baseline and no JSON report of attncli.",
            "Write one with --write-baseline FILE.",
        ) from error


def _fingerprint(row: dict[str, Any]) -> str:
    """As it stands there; computed for reports of versions that did not write it."""
    given = row.get("fingerprint")
    if given is not None:
        return str(given)
    layer = row["layer"]
    if not (layer is None or isinstance(layer, str)):
        raise TypeError("a layer is named by its path")
    evidence = dict(row.get("evidence") or {})
    return Finding(
        str(row["code"]), "", "note", str(row["message"]), "", layer, evidence=evidence
    ).fingerprint


BASELINE = "attncli-baseline/1"
