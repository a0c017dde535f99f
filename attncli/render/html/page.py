"""The whole page as a view: what was looked at, the verdict, and every part that the report has something for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from attncli.records import Report
from attncli.render.collapsed import tally
from attncli.render.html import maps, origins, picture, tables, training
from attncli.render.html.findings import Group, groups
from attncli.render.html.tables import Table
from attncli.render.words import clean, count, size


class Verdict(NamedTuple):
    """`state`: "clean", "note", "warning", "error" or "unobserved", which has an icon, a colour and words."""

    state: str
    icon: str
    headline: str
    sentence: str


class Page(NamedTuple):
    """Everything that the template writes. Parts that are empty are left out of the page."""

    title: str
    command: str
    version: str
    facts: tuple[tuple[str, str], ...]
    warning: str
    verdict: Verdict
    unobserved: tuple[str, ...]
    findings: tuple[Group, ...]
    known: tuple[Group, ...]
    known_words: str
    filtered: bool
    training: training.Trained | None
    origins: tuple[origins.Card, ...]
    changes: tuple[Table, ...]
    picture: picture.Picture | None
    maps: tuple[maps.Drawn, ...]
    scores: Table | None
    layers: tuple[Table, ...]
    calls: Table | None
    weights: tuple[Table, ...]
    notes: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    glossary: tuple[tuple[str, str], ...]
    sections: tuple[tuple[str, str], ...]


def page(report: Report) -> Page:
    """The view of `report`. Strings are plain text, made harmless and escaped where they are written."""
    found, drawing = groups(report.findings, report.layers), picture.picture(report)
    run = report.run or {}
    parts: dict[str, Any] = {
        "findings": tuple(found),
        "training": training.trained(report),
        "origins": tuple(origins.card(origin) for origin in report.origins),
        "changes": tuple(tables.change_tables(report.changes)),
        "picture": drawing,
        "maps": tuple(maps.drawn(one) for one in report.maps),
        "scores": tables.overflow_table(report),
        "layers": tuple(tables.layer_tables(report)),
        "calls": tables.call_table(report),
        "weights": tuple(tables.weight_tables(report.measurements)),
    }
    notes = dict.fromkeys([*report.notes, *map(str, run.get("notes") or ())])
    return Page(
        title=clean(report.source.get("path") or "attention report"),
        command=report.command,
        version=report.version,
        facts=_heading(report),
        warning=_SYNTHETIC if run.get("batch") == "synthetic" else "",
        verdict=_verdict(report),
        unobserved=_unobserved(report),
        known=tuple(groups(report.known, report.layers)),
        known_words=tally(report.known),
        filtered=len(found) > _FILTERED,
        notes=tuple(notes),
        environment=_environment(report),
        glossary=_GLOSSARY,
        sections=tuple(
            (name, title) for name, title in _SECTIONS.items() if parts[name] or name == "findings"
        ),
        **parts,
    )


# --- what was looked at -------------------------------------------------------------------------------


def _heading(report: Report) -> tuple[tuple[str, str], ...]:
    source, run = report.source, report.run or {}
    files, parameters, stored = source.get("files"), source.get("parameters"), source.get("bytes")
    kinds = [str(source.get(key) or "") for key in ("kind", "format")]
    other = source.get("compared_with")
    known = {
        "compared with": other.get("path") if isinstance(other, Mapping) else other,
        "format": ", ".join(dict.fromkeys(kind for kind in kinds if kind)),
        "files": str(files) if files else "",
        "size": size(int(stored)) if stored else "",
        "parameters": count(int(parameters)) if parameters else "",
        "device": report.environment.get("device") if report.run is not None else "",
        "dtype": report.environment.get("dtype"),
        "batch": run.get("batch"),
        "inputs": ", ".join(f"{name} {_shape(of)}" for name, of in (run.get("inputs") or {}).items()),
    }
    return tuple((name, str(value)) for name, value in known.items() if value)


def _shape(facts: Any) -> str:
    if not isinstance(facts, Mapping):
        return tables.plain(facts)
    shape = "×".join(map(str, facts.get("shape") or ())) or "scalar"
    return f"{shape} {facts.get('dtype') or ''}".strip()


def _environment(report: Report) -> tuple[tuple[str, str], ...]:
    run = {key: value for key, value in (report.run or {}).items() if key not in _TOLD}
    known = {
        "command": f"attncli {report.command}",
        "attncli": report.version,
        **report.environment,
        **{
            f"run: {key.replace('_', ' ')}": value
            for key, value in run.items()
            if value not in (None, "", {}, [])
        },
    }
    return tuple((name, tables.plain(value)) for name, value in known.items() if value is not None)


# --- verdict ------------------------------------------------------------------------------------------


def _verdict(report: Report) -> Verdict:
    if report.findings:
        state = groups(report.findings, report.layers)[0].severity
        headline = tally(report.findings)
    elif report.command == "diff" and report.looked:
        state, headline = "clean", "Nothing is worse" if report.changes else "No difference"
    else:
        state, headline = ("clean", "No findings") if report.looked else ("unobserved", "Not observed")
    if report.findings and not report.looked:
        headline += "; not observed as a whole"
    sentence = _sentence(report)
    if report.known:
        sentence += f" Known from the baseline: {tally(report.known)}."
    return Verdict(state, _ICONS[state], headline, sentence)


def _sentence(report: Report) -> str:
    if report.command == "diff":
        changes = len(report.changes)
        return f"{changes or 'No'} change{'' if changes == 1 else 's'}."
    if report.run is None:
        attention = sum(layer.kind is not None for layer in report.layers)
        others = len(report.layers) - attention
        beside = f", {others} other sequence layer{'' if others == 1 else 's'}" if others else ""
        if not attention:
            return f"No attention layer was found{beside}: nothing here says that the model is sound."
        return f"{attention} attention layer{'' if attention == 1 else 's'}{beside}, read from the files; nothing ran."
    sentences = []
    counted = tally(report.findings) or "no findings"
    if "calls_seen" in report.run or report.calls:
        from attncli.render.run import run_verdict

        sentences.append(_unbroken(run_verdict(report, counted).plain))
    if report.command == "check" and report.run.get("operators_by_phase"):
        from attncli.render.checked import nan_sentence

        sentences.append(_unbroken(nan_sentence(report)))
    elif "operators_by_phase" in report.run or "training" in report.run:
        from attncli.render.origins import nan_verdict

        sentences.append(_unbroken(nan_verdict(report, counted).plain))
    if not report.looked:
        sentences.append("What was not observed may be faulty.")
    return " ".join(sentences)


def _unobserved(report: Report) -> tuple[str, ...]:
    if not any(not call.explained for call in report.calls):
        return ()
    from attncli.render.run import unobserved

    return tuple(str(line) for line in unobserved(report))


# --- words --------------------------------------------------------------------------------------------

_FILTERED = 20  # groups of findings from which on a filter helps
_SYNTHETIC = "Random inputs: the numbers of real ones differ. Give --text or --input."
_ICONS = {"clean": "✓", "note": "i", "warning": "!", "error": "✕", "unobserved": "?"}
_TOLD = frozenset({"batch", "inputs", "notes", "training"})
_SECTIONS = {
    "findings": "Findings",
    "training": "Training",
    "origins": "Origins of NaN and Inf",
    "changes": "Changes",
    "picture": "Layers × heads",
    "maps": "Attention maps",
    "scores": "Scores and overflow",
    "weights": "Weights",
    "layers": "Layers",
    "calls": "Calls",
}
_GLOSSARY = (
    ("score", "q·k of one query and one key, after the scale and the mask: what the softmax takes."),
    ("entropy", "H = −Σ p ln p of a softmax row, in nats, as a mean over the queries; 0 is all on one key."),
    ("H/ln n", "Entropy as a share of what n allowed keys permit: 0 is one key, 1 is all keys alike."),
    ("headroom", "log2(largest number of a dtype / largest |q·k|), in bits; below 0 the product overflows."),
    (
        "sink",
        "A key that takes attention from most queries, often the first token; healthy in language models.",
    ),
    ("sink mass", "The mean probability that falls on the key that takes the most."),
    ("scale", "The factor on q·k before the softmax, usually 1/√(head size)."),
    ("reach", "The mean distance between a query and the keys it attends to, in tokens."),
    ("KV heads", "Heads of keys and values; fewer than query heads where several share one (GQA, MQA)."),
    ("not observed", "Not seen or not recomputed in this run: neither good nor bad is known of it."),
    ("recomputed", "Rows of the call were computed anew from what was captured and gave what the model got."),
)


def _unbroken(sentence: str) -> str:
    """Without a place to break a number at: "4 200", "2e-05"."""
    grouped = re.sub(r"(?<=\d) (?=\d{3}\b)", "\N{NARROW NO-BREAK SPACE}", sentence)
    return re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", grouped)
