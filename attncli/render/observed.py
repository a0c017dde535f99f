"""What a report saw, in a sentence: the verdict, the notes, and what was not observed and why."""

from __future__ import annotations

from collections.abc import Mapping

from attncli.records import Report
from attncli.render.collapsed import tally
from attncli.render.training import seen_words
from attncli.render.words import clean


def verdict(report: Report) -> str:
    """ "12 attention layers; 2 errors, 1 warning; 3 known." on one line, and first of all that nothing was seen."""
    parts = [_seen(report) if report.looked else f"not observed: {_missing(report)}"]
    parts.append(tally(report.findings) or ("no findings" if report.looked else ""))
    if report.known:
        parts.append(f"{len(report.known)} known finding{'s' if len(report.known) != 1 else ''}")
    if report.changes or report.command == "diff":
        parts.append(_counted(len(report.changes), "change"))
    return clean("; ".join(filter(None, parts))) + "."


def subject(report: Report) -> str:
    """What was looked at: the source's path, or its kind."""
    return clean(report.source.get("path") or report.source.get("kind") or "") or "the model"


def notes(report: Report) -> list[str]:
    """The report's notes and those of the run, each once."""
    run = report.run or {}
    return [clean(note) for note in dict.fromkeys([*report.notes, *map(str, run.get("notes") or ())])]


def unobserved(report: Report) -> dict[str, str]:
    """The id of each layer that was not observed, with the reason."""
    found = {layer.id: _no_softmax(layer.layout) for layer in report.layers if layer.kind is None}
    if report.run is None or _every_operator(report.run):
        return found
    ran = {call.layer for call in report.calls}
    found |= {one.id: "it did not run" for one in report.layers if one.kind is not None and one.id not in ran}
    for call in report.calls:
        if not call.explained:
            found[call.layer] = clean(call.reason).rstrip(".") or "its output could not be recomputed"
    return found


# --- building blocks ----------------------------------------------------------------------------------


def _seen(report: Report) -> str:
    if "training" in (report.run or {}):
        return seen_words(report)
    attention = sum(layer.kind is not None for layer in report.layers)
    layers = _counted(attention, "attention layer") if attention else ""
    run = report.run or {}
    calls = f"all {len(report.calls)} calls explained" if len(report.calls) > 1 else "1 call explained"
    operators = f"{_counted(int(run.get('operators') or 0), 'operator')} searched"
    seen = [layers, calls if report.calls else "", operators if "operators_by_phase" in run else ""]
    return ", ".join(filter(None, seen))


def _missing(report: Report) -> str:
    run = report.run
    if run is None:
        return "no attention layer was found"
    if "training" in run:
        return "no training step ran"
    if _every_operator(run):
        return "no operator ran"
    if not report.calls:
        return "no attention ran"
    unexplained = sum(not call.explained for call in report.calls)
    return f"{unexplained} of {_counted(len(report.calls), 'call')}"


def _every_operator(run: Mapping[str, object]) -> bool:
    """Whether the run was a training run or a search for NaN alone, which look at operators and not at layers."""
    return "training" in run or ("operators_by_phase" in run and "calls_seen" not in run)


def _no_softmax(layout: str) -> str:
    return f"it is no softmax attention ({clean(layout)})" if layout else "it is no softmax attention"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"
