"""The report of a check: one row per subject with what was seen of it and whether it is sound; then the details."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.text import Text

from attncli.records import Report
from attncli.render import calls
from attncli.render.calls import Row, call_rows, full_label
from attncli.render.findings import STYLES
from attncli.render.fitting import broken
from attncli.render.folds import folds
from attncli.render.heads import nats, share
from attncli.render.origins import headroom_words
from attncli.render.overflow import scale_words
from attncli.render.words import clean, number


class Subject(NamedTuple):
    """A row. `codes`: the beginnings of the codes of its rules. `seen`: facts, or None where nothing was observed."""

    title: str
    codes: tuple[str, ...]
    seen: Callable[[Report, Sequence[Row]], list[str] | None]


def summary(report: Report, console: Console) -> RenderableType:
    """A row per subject: its name, "ok" or what was found, and the facts."""
    rows = call_rows(report)
    told = [
        (subject.title, *_state(report, subject, facts), facts)
        for subject in SUBJECTS
        for facts in [subject.seen(report, rows)]
    ]
    narrow = console.width < _NARROW
    titles = max(len(title) for title, *_ in told)
    states = max(len(state) for _, state, *_ in told)
    indent = 2 if narrow else titles + states + 4
    lines: list[Text] = []
    for title, state, style, facts in told:
        head = Text.assemble((title.ljust(0 if narrow else titles), "bold"), "  ", (state, style))
        found = broken(facts or [], console.width - indent)
        if found and not narrow:
            head.append(" " * (indent - head.cell_len) + found.pop(0))
        lines += [head, *(Text(" " * indent + line) for line in found)]
    return Group(*lines, Text())


def check_verdict(report: Report, tally: str) -> Text:
    """ "6 of 6 calls explained; no findings." or, of weights alone, that nothing ran."""
    attention = sum(layer.kind is not None for layer in report.layers)
    layers = f"{attention} attention layer{'s' if attention != 1 else ''}"
    if report.run is None:
        seen = f"{layers}; {tally}" if attention else f"No attention layer was found; {tally}"
        unseen = "; nothing ran, so entropy, scores and NaN were not observed."
        return Text(f"{seen}{unseen}", style=_style(report, "bold yellow"))
    explained = sum(call.explained for call in report.calls)
    if not report.calls:
        seen = "Not observed: no attention ran"
    elif explained < len(report.calls):
        seen = f"Not observed: {len(report.calls) - explained} of {len(report.calls)} calls"
    else:
        seen = f"{layers}, {explained} call{'s' if explained != 1 else ''}, all explained"
    return Text(f"{seen}; {tally}.", style=_style(report, "bold green" if report.looked else "bold yellow"))


def nan_sentence(report: Report) -> str:
    """ "No NaN or Inf in 412 operators; smallest headroom …." or "2 origins of NaN or Inf in 412 operators."."""
    run = report.run or {}
    count, many = len(report.origins), int(run.get("operators") or 0)
    operators = f"{many:,}".replace(",", " ") + f" operator{'s' if many != 1 else ''}"
    if not count:
        return f"No NaN or Inf in {operators}; {headroom_words(run)}."
    return f"{count} origin{'s' if count != 1 else ''} of NaN or Inf in {operators}."


def _style(report: Report, sound: str) -> str:
    if not report.findings:
        return sound
    return {"error": "bold red", "warning": "bold yellow", "note": "bold"}[report.findings[0].severity]


def _state(report: Report, subject: Subject, facts: list[str] | None) -> tuple[str, str]:
    mine = [finding for finding in report.findings if finding.code.startswith(subject.codes)]
    if mine:
        counts = Counter(str(finding.severity) for finding in mine)
        gravest = next(severity for severity in STYLES if counts[severity])  # the gravest stand first
        return f"{counts[gravest]} {gravest}{'s' if counts[gravest] != 1 else ''}", STYLES[gravest]
    if facts is None:
        return "not observed", "yellow"
    if any(finding.code.startswith(subject.codes) for finding in report.known):
        return "known", "dim"
    if facts and facts[-1].startswith(_LOST):
        return "no number", "yellow"
    return "ok", "green"


# --- what was seen ------------------------------------------------------------------------------------


def _layout(report: Report, rows: Sequence[Row]) -> list[str] | None:
    attention = [layer for layer in report.layers if layer.kind is not None]
    if not attention:
        return None
    groups: dict[tuple[object, ...], list[str]] = {}
    for fold in folds(attention):
        first = fold.first
        key = (first.kind, first.layout, first.heads, first.kv_heads, first.head_dim)
        groups.setdefault(key, []).append(clean(fold.label))
    facts = []
    for (kind, layout, heads, kv_heads, head_dim), labels in groups.items():
        grouped = "" if kv_heads in (None, heads) else f" on {kv_heads} KV"
        size = f" of {head_dim}" if head_dim else ""
        counted = f"{heads} head{'s' if heads != 1 else ''}{size}{grouped}" if heads else "heads unknown"
        named = ", ".join(labels[:_NAMED]) + (
            f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
        )
        facts.append(f"{named}: {kind}, {counted}, {layout}")
    return facts


def _weights(report: Report, rows: Sequence[Row]) -> list[str] | None:
    values = {
        metric: {row.layer: row.value for row in report.measurements if row.metric == metric}
        for metric in ("nan_count", "inf_count", "absmax")
    }
    if not values["nan_count"]:
        return None
    broken = [sum(int(v or 0) for v in values[metric].values()) for metric in ("nan_count", "inf_count")]
    sizes = {name: float(v) for name, v in values["absmax"].items() if isinstance(v, (int, float))}
    tensors = len(values["nan_count"])
    facts = [f"{tensors} tensor{'s' if tensors != 1 else ''}", f"{broken[0]} NaN, {broken[1]} Inf"]
    if sizes:
        largest = max(sizes, key=lambda name: sizes[name])
        facts.append(f"largest |w| {number(sizes[largest])} ({clean(largest)})")
    bounds = [
        float(r.value)
        for r in report.measurements
        if r.metric == "score_bound" and isinstance(r.value, (int, float))
    ]
    if bounds:
        worst = max(bounds)
        facts.append(
            f"q·k at most {number(worst)}" if math.isfinite(worst) else "q·k not bounded by the weights"
        )
    return facts


def _attention(report: Report, rows: Sequence[Row]) -> list[str] | None:
    if not rows or not all(row.call.explained for row in rows):
        return None
    facts = [f"{len(rows)} call{'s' if len(rows) != 1 else ''} explained"]
    for words in (calls.mask, scale_words, calls.kernel):
        counts = Counter(words(row.call) for row in rows)
        told = [word if len(counts) == 1 else f"{word} ×{n}" for word, n in counts.most_common(_NAMED)]
        facts.append(", ".join(told) + (" …" if len(counts) > _NAMED else ""))
    return facts


def _scores(report: Report, rows: Sequence[Row]) -> list[str] | None:
    dots = [(value, head, row) for row in rows for head, value in row.numbers("dot_absmax").items()]
    known = [one for one in dots if not math.isnan(one[0])]
    if not dots:
        return None
    if not known:
        return _lost(len(dots))
    worst, head, row = max(known, key=lambda one: one[0])
    facts = [f"largest |q·k| {number(worst)} in {full_label([row], rows)} head {head}"]
    headroom = row.heads[head].get("headroom_bits_float16")
    if isinstance(headroom, (int, float)):
        facts.append(f"{headroom:+.1f} bits of float16 left" if math.isfinite(headroom) else "beyond float16")
    scores = [value for row in rows for value in row.numbers("score_max").values() if not math.isnan(value)]
    if scores:
        facts.append(f"largest score {number(max(scores))}")
    return [*facts, *_lost(len(dots) - len(known))]


def _entropy(report: Report, rows: Sequence[Row]) -> list[str] | None:
    entropies = [value for row in rows for value in row.numbers("entropy").values()]
    ratios = [
        value for row in rows for value in row.numbers("entropy_ratio").values() if not math.isnan(value)
    ]
    known = [value for value in entropies if not math.isnan(value)]
    if not entropies:
        return None
    if not known:
        return _lost(len(entropies))
    facts = [f"{nats(min(known))} to {nats(max(known))} nats over {len(known)} heads"]
    if ratios:
        facts.append(f"H/ln n {share(min(ratios))} to {share(max(ratios))}")
    return [*facts, *_lost(len(entropies) - len(known))]


def _lost(heads: int) -> list[str]:
    return [f"{_LOST} {heads} head{'s' if heads != 1 else ''}"] if heads else []


def _nan(report: Report, rows: Sequence[Row]) -> list[str] | None:
    run = report.run or {}
    if not run.get("operators_by_phase"):
        return None
    operators = f"{int(run.get('operators') or 0):,}".replace(",", " ")
    if report.origins:
        count = len(report.origins)
        return [f"{count} origin{'s' if count != 1 else ''} in {operators} operators"]
    return [f"none in {operators} operators", headroom_words(run)]


# --- tables -------------------------------------------------------------------------------------------

_NARROW = 72
_LOST = "NaN in"
_NAMED = 3
SUBJECTS: tuple[Subject, ...] = (
    Subject("layout", ("ATT0", "ATT1", "ATT8"), _layout),
    Subject("weights", ("ATT2", "ATT3"), _weights),
    Subject("attention", ("ATT4",), _attention),
    Subject("scores", ("ATT5",), _scores),
    Subject("entropy", ("ATT6",), _entropy),
    Subject("NaN", ("ATT7",), _nan),
)
