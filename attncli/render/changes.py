"""What changed between two reports: the sources, layers, facts, the head of each layer that changed most, findings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from attncli.records import Change, Report, structure
from attncli.render.changed_numbers import in_words, number_parts
from attncli.render.findings import finding_parts, tally
from attncli.render.fitting import packed, table_or_lines
from attncli.render.folds import ranges
from attncli.render.words import clean, count, number


def change_parts(report: Report, unfolded: bool, console: Console) -> list[RenderableType]:
    """The whole report of a comparison; `unfolded`: every head and tensor instead of those that changed most."""
    return [
        _heading(report, console),
        *_layers(report.changes),
        *_facts(report.changes, console),
        *number_parts(report, unfolded, console),
        *_old_findings(report),
        *(
            [Group(*(Text(f"note: {clean(note)}", style="dim") for note in report.notes))]
            if report.notes
            else []
        ),
        *finding_parts(replace(report, known=())),
        _verdict(report),
    ]


# --- the two sources ----------------------------------------------------------------------------------


def _heading(report: Report, console: Console) -> RenderableType:
    before = report.source.get("compared_with")
    lines = [
        _source("A", before if isinstance(before, Mapping) else {}, console),
        _source("B", report.source, console),
    ]
    facts = [
        f"{change.what}: {_amount(change.before)} → {_amount(change.after)}"
        for change in report.changes
        if change.kind == "source"
    ]
    if not any(change.kind == "source" and change.what == "structure" for change in report.changes):
        layers = sum(layer.kind is not None for layer in report.layers)
        facts.insert(0, f"the same structure {structure(report.layers)}" if layers else "no attention layer")
    return Group(*lines, *(Text(line) for line in packed(list(map(clean, facts)), console.width)))


def _source(letter: str, source: Mapping[str, object], console: Console) -> RenderableType:
    parameters = source.get("parameters")
    facts = [
        *([f"of {source.get('path')}"] if "report" in source else []),
        str(source.get("format", "")),
        f"{count(parameters)} parameters" if isinstance(parameters, int) else "",
    ]
    words = clean(" · ".join(fact for fact in facts if fact))
    path = clean(source.get("report", source.get("path", "")))
    line = Text.assemble((f"{letter}  ", "dim"), (path, "bold"), f"  {words}")
    if len(line) <= console.width:
        return line
    first = Text.assemble((f"{letter}  ", "dim"), (path, "bold"), overflow="fold")
    return Group(first, Padding(Text(words, overflow="fold"), (0, 0, 0, 3), expand=False))


def _amount(value: object) -> str:
    return count(value) if isinstance(value, int) else str(value)


# --- layers and facts ---------------------------------------------------------------------------------


def _layers(changes: Sequence[Change]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for kind, sign, style in (("removed", "−", "red"), ("added", "+", "green")):
        alike: dict[str, list[str]] = defaultdict(list)
        for change in changes:
            if change.kind == kind:
                alike[_sketch(change.before or change.after)].append(change.layer or "")
        for words, paths in alike.items():
            for label in labels(paths):
                line = Text.assemble((f"{sign} {kind} ", style), (clean(label), "bold"), overflow="fold")
                lines.append(Group(line, Padding(Text(words), (0, 0, 0, 4), expand=False)))
    return [Text("Layers", style="bold"), *lines, Text()] if lines else []


def _sketch(layer: object) -> str:
    if not isinstance(layer, Mapping):
        return ""
    heads, kv_heads, size = (layer.get(name) for name in ("heads", "kv_heads", "head_dim"))
    facts = [
        layer.get("kind") or "",
        layer.get("layout") or "",
        "" if heads is None else f"{heads} heads",
        "" if kv_heads in (None, heads) else f"{kv_heads} KV heads",
        "" if size is None else f"head size {size}",
    ]
    return clean(" · ".join(str(fact) for fact in facts if fact))


def _facts(changes: Sequence[Change], console: Console) -> list[RenderableType]:
    """Facts of layers and calls, and what was measured in words: layers with the same change as one row."""
    alike: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for change in changes:
        if change.kind == "structure" or (change.kind == "metric" and in_words(change)):
            key = (change.what.replace("_", " "), _fact(change.before), _fact(change.after))
            alike[key].append(change.layer or "")
    rows = [
        [Text(clean(label)), *(Text(clean(word)) for word in words)]
        for words, paths in _with_roles_joined(alike)
        for label in labels(paths)
    ]
    if not rows:
        return []
    columns = ("layers", "fact", "before", "after")
    return [Text("Facts of layers", style="bold"), table_or_lines(columns, rows, console, left=columns)]


def _with_roles_joined(
    alike: Mapping[tuple[str, str, str], Sequence[str]],
) -> Iterator[tuple[tuple[str, str, str], Sequence[str]]]:
    """ "q shape" and "k shape" that changed alike in the same layers are "q, k shape"."""
    joined: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (what, before, after), paths in alike.items():
        role, _, kind = what.rpartition(" ")
        one_of_many = kind in ("shape", "dtype")
        joined[(kind if one_of_many else what, before, after, tuple(paths))].append(
            role if one_of_many else ""
        )
    for (what, before, after, places), roles in joined.items():
        label = f"{', '.join(roles)} {what}" if roles[0] else what
        yield (label, before, after), places


def _fact(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "×".join(map(str, value)) or "scalar"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "—"}[value]
    return number(value) if isinstance(value, float) else str(value)


def labels(paths: Iterable[str]) -> list[str]:
    """Paths that differ in one number only, as one: ["h.0.attn", "h.1.attn"] → ["h.{0–1}.attn"]."""
    alike: dict[tuple[str, ...], list[tuple[int, ...]]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        parts = _NUMBER.split(path)
        # "007" and "7" are two names.
        fixed = all(part == str(int(part)) for part in parts[1::2])
        alike[tuple(parts[::2]) if fixed else (path,)].append(tuple(map(int, parts[1::2])) if fixed else ())
    found = []
    for words, numbers in alike.items():
        varying = [at for at in range(len(words) - 1) if len({row[at] for row in numbers}) > 1]
        last = varying[-1] if varying else -1
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row in numbers:
            groups[row[:last] + row[last + 1 :] if varying else row].append(row[last] if varying else -1)
        for rest, folded in groups.items():
            shown = [str(one) for one in rest]
            if varying:
                several = f"{{{ranges(folded)}}}" if len(folded) > 1 else str(folded[0])
                shown.insert(last, several)
            found.append("".join(a + b for a, b in zip(words, [*shown, ""], strict=True)))
    return found


# --- findings and verdict -----------------------------------------------------------------------------


def _old_findings(report: Report) -> list[RenderableType]:
    """Findings that are gone, and those that are not new, in a line each."""
    gone = [(change.what, str(change.before)) for change in report.changes if _is_gone(change)]
    known = [(f"{finding.code} {finding.name}", finding.message) for finding in report.known]
    parts: list[RenderableType] = []
    for title, found in (("Gone", gone), ("Not new", known)):
        alike: dict[tuple[str, str], list[str]] = defaultdict(list)
        for rule, message in found:
            alike[(rule, re.sub(r"\d", "", message))].append(message)
        lines = [
            Text.assemble(
                (f"{clean(rule)}  ", "bold"),
                clean(messages[0]),
                f" (and {len(messages) - 1} more like it)" if len(messages) > 1 else "",
            )
            for (rule, _), messages in alike.items()
        ]
        if lines:
            parts += [
                Text(f"{title}:", style="dim"),
                *(Padding(line, (0, 0, 0, 2), expand=False) for line in lines),
            ]
    return parts


def _is_gone(change: Change) -> bool:
    return change.kind == "finding" and change.after is None


def _verdict(report: Report) -> Text:
    if report.findings:
        gravest = report.findings[0].severity
        style = {"error": "bold red", "warning": "bold yellow", "note": "bold"}[gravest]
        start = "Different" if gravest == "note" else "B is worse"
        return Text(f"{start}: {tally(replace(report, known=()))}.", style=style)
    if not report.looked:
        return Text("Not observed: there is no attention layer in B.", style="bold yellow")
    if not report.changes:
        known = len(report.known)
        both = f"; {known} finding{'s' if known != 1 else ''} in both" if known else ""
        # Headers alone say nothing of the weights.
        where = (
            ""
            if report.source.get("compared_numbers")
            else " in what the headers say (--values compares the weights)"
        )
        return Text(f"No difference{where}{both}.", style="bold green")
    return Text(f"Different, and nothing in B is worse: {_counted(report.changes)}.", style="bold green")


def _counted(changes: Sequence[Change]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for change in changes:
        counts["gone" if _is_gone(change) else change.kind] += 1
    return ", ".join(
        f"{counts[kind]} {one if counts[kind] == 1 else more}"
        for kind, (one, more) in _KINDS.items()
        if counts[kind]
    )


# --- tables -------------------------------------------------------------------------------------------

_KINDS = {
    "removed": ("layer removed", "layers removed"),
    "added": ("layer added", "layers added"),
    "source": ("fact of the source", "facts of the source"),
    "structure": ("fact of a layer", "facts of layers"),
    "metric": ("number", "numbers"),
    "gone": ("finding gone", "findings gone"),
}
_NUMBER = re.compile(r"(?<![^._])([0-9]{1,9})(?![^._])")
