"""A comment for a pull request in GitHub's Markdown, always shorter than GitHub accepts.

Whatever stands in a file is text here: no name opens a cell, a tag, a link, a mention or a reference. Rows are
left out whole, the mildest first, and a line says how many.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from attncli.records import Change, Finding, Origin, Report
from attncli.render.collapsed import Collapsed, collapsed, tally
from attncli.render.folds import Fold, folds
from attncli.render.observed import notes, subject, unobserved, verdict
from attncli.render.places import Place, places
from attncli.render.training import fault_facts, headline, history
from attncli.render.words import clean, number


def text(report: Report) -> str:
    """The comment: below 65,536 characters, and bytes, whatever the report."""
    out = _head(report)
    sections = list(_sections(report))
    room = _LIMIT - _size(out)
    for at, section in enumerate(sections):
        part = _fitted(section, room - sum(_claim(later) for later in sections[at + 1 :]))
        out += part
        room -= _size(part)
    return out


def escaped(words: object) -> str:
    """`words` as Markdown that shows them as they are, on one line, inside a cell of a table or outside."""
    said = _STEERING.sub(lambda match: f"&#{ord(match[0])};", clean(words).strip())
    said = _BEGINNING.sub(lambda match: f"{_NOTHING}{match[0]}", said)
    return _LINKING.sub(lambda match: f"{match[0]}{_NOTHING}", said)


def code(name: object, longest: int = 200) -> str:
    """A name in the type of code; its middle is left out beyond `longest` characters. "" for an empty one."""
    shown = _without_middle(clean(_without_middle(str(name), longest)), longest)
    return f"<code>{escaped(shown)}</code>" if shown else ""


# --- sections -----------------------------------------------------------------------------------------


class _Section(NamedTuple):
    """Rows between an opening and a closing; without rows it is left out.

    `share`: of the whole comment, kept free for it as far as it is needed; what is left goes to the first section.
    """

    opening: str
    rows: Sequence[str]
    closing: str
    noun: str
    share: float


def _claim(section: _Section) -> int:
    """The bytes that are kept free for a section."""
    if not section.rows:
        return 0
    whole = _size(section.opening) + sum(map(_size, section.rows)) + _size(section.closing)
    return min(whole + _size(_left_out(section, 0)), int(_LIMIT * section.share))


def _fitted(section: _Section, room: int) -> str:
    """The section with as many of its first rows as `room` bytes hold, and how many are left out."""
    if not section.rows:
        return ""
    room -= _size(section.opening) + _size(section.closing) + _size(_left_out(section, 0))
    kept = 0
    for row in section.rows:
        room -= _size(row)
        if room < 0:
            break
        kept += 1
    more = _left_out(section, kept) if kept < len(section.rows) else ""
    return f"{section.opening}{''.join(section.rows[:kept])}{more}{section.closing}" if kept else more


def _left_out(section: _Section, kept: int) -> str:
    return f"\n{len(section.rows) - kept} more left out here ({section.noun}).\n"


def _size(said: str) -> int:
    return len(said.encode("utf-8"))


def _head(report: Report) -> str:
    where = code(subject(report))
    return f"### attncli {escaped(report.command)}: {_clipped(verdict(report))}\n\n{where}\n"


def _sections(report: Report) -> Iterable[_Section]:
    place = places(report)
    groups = collapsed(report.findings, report.layers)
    known = collapsed(report.known, report.layers)
    changes = [_change(change) for change in report.changes]
    whole = "the training run" if "training" in (report.run or {}) else "the whole model"
    rows = [_row(group, place(group.first), whole) for group in groups]
    yield _Section(_table(_FINDINGS), rows, "", "kinds of findings, the mildest", 0.2)
    training = (report.run or {}).get("training") or {}
    facts = [f"- {escaped(name)}: {_clipped(words)}\n" for name, words in fault_facts(training)]
    yield _Section(f"\n**{_clipped(headline(training))}**\n\n", facts, "", "facts of the step", 0.1)
    born = [_origin(origin) for origin in report.origins]
    yield _Section("\n**Origins of NaN and Inf**\n\n", born, "", "origins", 0.15)
    yield _Section(
        "\n**Not observed**\n\n", _not_observed(report), "", "reasons why nothing was observed", 0.1
    )
    yield _Section("\n**What helps**\n\n", _advice(groups), "", "pieces of advice", 0.1)
    yield _folded(_counted(len(report.changes), "change"), _CHANGES, changes, "changes", 0.15)
    known_rows = [_row(group, place(group.first), whole) for group in known]
    history_columns, steps = history(training, _STEPS)
    step_rows = [_cells(map(_clipped, step)) for step in steps]
    yield _folded(f"The last {_counted(len(steps), 'step')}", history_columns, step_rows, "steps", 0.1)
    title = f"{len(report.known)} known: {tally(report.known)}, no failure"
    yield _folded(title, _FINDINGS, known_rows, "kinds of known findings", 0.1)
    columns, numbers = _numbers(report)
    yield _folded("Numbers of each layer", columns, numbers, "layers", 0.1)
    layers = [_layer(fold) for fold in folds(report.layers)]
    yield _folded(_counted(len(report.layers), "layer"), _LAYERS, layers, "kinds of layers", 0.1)
    said = [f"- {_clipped(note)}\n" for note in notes(report)]
    yield _Section("\n**Notes**\n\n", said, "", "notes", 0.1)


def _folded(title: str, columns: Sequence[str], rows: Sequence[str], noun: str, share: float) -> _Section:
    opening = f"\n<details><summary>{escaped(title)}</summary>\n{_table(columns)}"
    return _Section(opening, rows, "\n</details>\n", noun, share)


def _table(columns: Sequence[str]) -> str:
    """The first two lines; a colon at the end of a name puts its column to the right."""
    names = " | ".join(name.rstrip(":") for name in columns)
    lines = " | ".join("---:" if name.endswith(":") else "---" for name in columns)
    return f"\n| {names} |\n| {lines} |\n"


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def _clipped(said: object, longest: int = 400) -> str:
    whole = str(said)
    shown = clean(whole[: longest + 1])
    return escaped(shown if len(shown) <= longest else f"{shown[: longest - 1]}…")


def _without_middle(name: str, longest: int) -> str:
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


# --- rows ---------------------------------------------------------------------------------------------


def _row(group: Collapsed, place: Place, whole: str) -> str:
    first = group.first
    modules = dict.fromkeys(str(one.evidence.get("module") or "") for one in group.findings)
    where = code(group.where) or code(", ".join(filter(None, modules))) or whole
    file = code(place.file if place.line is None else f"{place.file}:{place.line}")
    severity = f"**{first.severity}**" if first.severity == "error" else first.severity
    rule = f"{escaped(first.code)} {escaped(first.name)}"
    return _cells([severity, rule, where, _clipped(group.sentence), file])


def _origin(origin: Origin) -> str:
    from attncli.render.origins import origin_facts, origin_title  # brings rich, for the terminal

    title, details = origin_title(origin)
    facts = [f"  - {name}: {_clipped(words)}\n" for name, words in origin_facts(origin)]
    return f"- **{_clipped(title)}** · {_clipped(details)}\n{''.join(facts)}"


def _advice(groups: Sequence[Collapsed]) -> list[str]:
    """One piece of advice for each rule, in the order of the findings; another one where a case is special."""
    said: dict[tuple[str, str], Finding] = {}
    for group in groups:
        if group.first.advice:
            said.setdefault((group.first.code, group.first.advice), group.first)
    return [f"- {escaped(one.code)} {escaped(one.name)}: {_clipped(one.advice)}\n" for one in said.values()]


def _not_observed(report: Report) -> list[str]:
    """The reasons, each with the layers it is true of."""
    if report.run is None:
        return []
    reasons: dict[str, list[str]] = {}
    for layer, reason in unobserved(report).items():
        reasons.setdefault(reason, []).append(layer)
    paths = {layer.id: layer.path or layer.id for layer in report.layers}
    rows = []
    for reason, ids in reasons.items():
        named = ", ".join(code(paths.get(one, one)) for one in ids[:_NAMED])
        more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        rows.append(f"- {named}{more}: {_clipped(reason)}\n")
    return rows


def _change(change: Change) -> str:
    head = "" if change.head is None else str(change.head)
    before, after = (_value(value) for value in (change.before, change.after))
    return _cells([change.kind, code(change.layer or ""), head, _clipped(change.what), before, after])


def _value(value: object) -> str:
    return _clipped(number(value), 120)


def _layer(fold: Fold) -> str:
    layer = fold.first
    shown = (layer.heads, layer.kv_heads, layer.head_dim, layer.scale)
    return _cells([code(fold.label), layer.kind or "", _clipped(layer.layout, 80), *map(_value, shown)])


def _numbers(report: Report) -> tuple[list[str], list[str]]:
    """The columns with any number, and a row for each layer that has one: its extremes over heads and calls."""
    extremes: dict[str, dict[str, list[float]]] = {}
    wanted = {metric for metric, _, _ in _EXTREMES}
    for one in report.measurements:
        if one.metric in wanted and isinstance(one.value, (int, float)):
            extremes.setdefault(one.layer, {}).setdefault(one.metric, []).append(float(one.value))
    shown = [row for row in _EXTREMES if any(row[0] in numbers for numbers in extremes.values())]
    paths = {layer.id: layer.path for layer in report.layers}
    rows = []
    for layer, numbers in extremes.items():
        cells = [_extreme(numbers.get(metric, ()), which) for metric, _, which in shown]
        rows.append(_cells([code(paths.get(layer) or layer), *cells]))
    return ["layer", *(f"{title}:" for _, title, _ in shown)], rows


def _extreme(values: Sequence[float], which: str) -> str:
    if not values:
        return ""
    if any(value != value for value in values):
        return "nan"
    low, high = number(min(values)), number(max(values))
    if which == "range":
        return low if low == high else f"{low} … {high}"
    return low if which == "least" else high


# --- tables -------------------------------------------------------------------------------------------

# GitHub refuses comments of 65,536 characters; bytes are the stricter count.
_LIMIT = 65_000
_NAMED = 3
_STEPS = 64
_FINDINGS = ("severity", "rule", "where", "finding", "file")
_CHANGES = ("change", "layer", "head:", "what", "before", "after")
_LAYERS = ("layer", "kind", "layout", "heads:", "KV heads:", "head size:", "scale:")
# Metric, its column, and what is told of its values.
_EXTREMES = (
    ("entropy", "entropy (nats)", "range"),
    ("score_max", "largest score", "most"),
    ("headroom_bits_float16", "bits left in float16", "least"),
    ("headroom_bits_bfloat16", "bits left in bfloat16", "least"),
    ("headroom_bits_float32", "bits left in float32", "least"),
    ("score_bound", "bound of q·k", "most"),
)
# What GitHub's Markdown gives a meaning inside a line: as character references it has none.
_STEERING = re.compile(r"[\\`*\[\]<>|~!$&]|(?<![^\W_])_|_(?![^\W_])")
# What it gives one at the beginning of a line: headings, lists.
_BEGINNING = re.compile(r"^(?:[#=:]|[-+](?!\d)|\d+[.)](?=\s|$))")
# What GitHub makes links and pictures of after Markdown: mentions, references, addresses, emoji, commits.
_LINKING = re.compile(
    r"@(?=[^\W_])|(?<!&)#(?=[^\W_])|\bGH-(?=\d)|:(?=//)|\bwww(?=\.)|:(?=[\w+-]+:)|\b(?=\d*[a-f])[0-9a-f]{6}(?=[0-9a-f]{1,34}\b)",
    re.IGNORECASE,
)
_NOTHING = "&#8203;"  # a space of no width
