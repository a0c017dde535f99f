"""Numbers that changed between two reports: per layer the head that fell and the one that rose most, or all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from attncli.records import Change, Report
from attncli.render.fitting import fits, table_or_lines
from attncli.render.words import clean, number


def number_parts(report: Report, unfolded: bool, console: Console) -> list[RenderableType]:
    """Per layer the head that changed most, both ways, then tensors; `unfolded`: every head and tensor."""
    changes = [
        change
        for change in report.changes
        if change.kind == "metric" and not in_words(change) and change.what != _CONTENTS
    ]
    of_tensors = [change for change in changes if change.what in _OF_TENSORS]
    of_heads = [change for change in changes if change.what not in _OF_TENSORS]
    parts = _every_head(of_heads, console) if unfolded else _sections(report, of_heads, console)
    return [*parts, *_contents(report.changes), *_tensors(of_tensors, unfolded, console)]


def in_words(change: Change) -> bool:
    """Whether what was measured is said in words, as a fact is: "proven safe"."""
    if change.what == _CONTENTS:
        return False
    return isinstance(change.before, str) or isinstance(change.after, str)


def _contents(changes: Sequence[Change]) -> list[RenderableType]:
    """How many tensors hold other elements, and those of them whose statistics are the same."""
    changed = [change.layer or "" for change in changes if change.what == _CONTENTS]
    if not changed:
        return []
    told = {change.layer for change in changes if change.what in _OF_TENSORS}
    silent = [name for name in changed if name not in told]
    line = f"The elements of {len(changed)} tensor{'s' if len(changed) != 1 else ''} differ"
    if silent:
        named = ", ".join(map(clean, silent[:_NAMED])) + (" …" if len(silent) > _NAMED else "")
        line += f", of {len(silent)} with the same statistics: {named}"
    return [Text(f"{line}."), Text()]


# --- heads --------------------------------------------------------------------------------------------


def _sections(report: Report, changes: Sequence[Change], console: Console) -> list[RenderableType]:
    parts: list[RenderableType] = []
    totals = {layer.id: layer.heads for layer in report.layers}
    for shown, heading in _SECTIONS.items():
        layers: dict[str, list[Change]] = defaultdict(list)
        for change in changes:
            metric, _, behind = change.what.partition(", ")
            if metric == shown and change.head is not None:
                layers[f"{change.layer}, {behind}" if behind else change.layer or ""].append(change)
        rows = []
        for label, of_layer in layers.items():
            total = totals.get(of_layer[0].layer or "")
            changed = f"{len(of_layer)} of {total}" if total else str(len(of_layer))
            fell, rose = _extremes(of_layer)
            rows.append([Text(clean(label)), Text(changed), _extreme(fell), _extreme(rose)])
        if rows:
            title = Text(heading, style="bold")
            title.append(": the head of each layer that changed most (--layer shows all)", style="not bold")
            parts.append(Group(title, _extremes_table(rows, console)))
    others: dict[str, int] = defaultdict(int)
    for change in changes:
        metric = change.what.partition(", ")[0]
        if metric not in _SECTIONS:
            others[metric] += 1
    if others:
        listed = ", ".join(f"{clean(metric)} ({times})" for metric, times in others.items())
        parts += [Text(f"Also changed, numbers each: {listed}."), Text()]
    return parts


def _extremes_table(rows: Sequence[Sequence[Text]], console: Console) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, side in (
        ("layer", "left"),
        ("heads changed", "right"),
        ("fell most", "left"),
        ("rose most", "left"),
    ):
        table.add_column(name, justify="right" if side == "right" else "left")
    for row in rows:
        table.add_row(*row)
    if fits(table, console):
        return table
    lines: list[RenderableType] = []
    for label, changed, *extremes in rows:
        lines.append(Text.assemble(label, f": {changed} heads", overflow="fold"))
        for word, extreme in zip(("fell", "rose"), extremes, strict=True):
            if extreme.plain != _NONE:
                lines.append(Text.assemble(f"  {word}  ", extreme))
    return Group(*lines, Text())


def _extremes(changes: Sequence[Change]) -> tuple[Change | None, Change | None]:
    """The change that fell and the one that rose most; what is no number any more fell."""
    steps = {at: _step(change) for at, change in enumerate(changes)}
    low, high = min(steps, key=lambda at: steps[at]), max(steps, key=lambda at: steps[at])
    return (
        changes[low] if steps[low] < 0 else None,
        changes[high] if steps[high] > 0 else None,
    )


def _step(change: Change) -> float:
    before, after = (
        float(side) if isinstance(side, (int, float)) and not math.isnan(side) else None
        for side in (change.before, change.after)
    )
    if before is None or after is None:
        return math.inf if before is None else -math.inf
    if change.what.partition(", ")[0] in _RATIOS and before > 0 and after > 0:
        return math.log(after) - math.log(before)  # of what is told as a factor, the largest factor
    return after - before


def _extreme(change: Change | None) -> Text:
    if change is None:
        return Text(_NONE, style="dim")
    lost = not isinstance(change.after, (int, float)) or not math.isfinite(change.after)
    words = f"head {change.head}: {_shown(change, change.before)} → {_shown(change, change.after)}"
    return Text(f"{words}{_how_much(change)}", style="bold red" if lost else "")


def _shown(change: Change, side: object) -> str:
    return "no bound" if change.what == "score_bound" and side == math.inf else clean(number(side))


def _how_much(change: Change) -> str:
    """ " (−1.4)", or " (×5.8)" where a factor tells more, or nothing where one of the two is no number."""
    before, after, metric = change.before, change.after, change.what.partition(", ")[0]
    numbers = isinstance(before, (int, float)) and isinstance(after, (int, float))
    if not numbers or not math.isfinite(before) or not math.isfinite(after):
        return ""
    if metric not in _RATIOS:
        return f" ({after - before:+.3g})".replace("-", "−")
    if before <= 0 or after <= 0:
        return ""
    bits = f", {math.log2(before / after):+.2g} bits".replace("-", "−") if metric == "dot_absmax" else ""
    return f" (×{after / before:.3g}{bits})"


def _every_head(changes: Sequence[Change], console: Console) -> list[RenderableType]:
    """A table per layer: a row per head and metric."""
    layers: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        layers[change.layer or ""].append(change)
    parts: list[RenderableType] = []
    for layer, of_layer in layers.items():
        metrics = list(dict.fromkeys(change.what for change in of_layer))
        rows = [
            [
                Text(clean(change.what)),
                Text("" if change.head is None else str(change.head)),
                Text(_shown(change, change.before)),
                Text(_shown(change, change.after)),
                Text(_how_much(change).strip(" ()")),
            ]
            for metric in metrics
            for change in of_layer
            if change.what == metric
        ]
        columns = ("number", "head", "before", "after", "change")
        parts.append(Group(Text(clean(layer), style="bold"), table_or_lines(columns, rows, console)))
    return parts


# --- tensors ------------------------------------------------------------------------------------------


def _tensors(changes: Sequence[Change], unfolded: bool, console: Console) -> list[RenderableType]:
    by_name: dict[str, dict[str, Change]] = defaultdict(dict)
    for change in changes:
        by_name[change.layer or ""][change.what] = change
    if not by_name:
        return []
    broken = [name for name, found in by_name.items() if {"nan_count", "inf_count"} & found.keys()]
    rest = [name for name in by_name if name not in broken]
    rest.sort(key=lambda name: -max(map(_size, by_name[name].values())))
    shown = [*by_name] if unfolded else [*broken[:_MOST], *rest[:_FEW]]
    metrics = [metric for metric in _OF_TENSORS if any(metric in by_name[name] for name in shown)]
    rows = []
    for name in shown:
        cells = [by_name[name].get(metric) for metric in metrics]
        words = [
            "same" if cell is None else f"{_shown(cell, cell.before)} → {_shown(cell, cell.after)}"
            for cell in cells
        ]
        rows.append([Text(clean(name)), *map(Text, words)])
    title = Text(f"Values of {len(by_name)} tensor{'s' if len(by_name) != 1 else ''} changed", style="bold")
    if len(shown) < len(by_name):
        title.append(": those with NaN or Inf, then what changed most (--layer shows all)", style="not bold")
    columns = ("tensor", *(_OF_TENSORS[metric] for metric in metrics))
    table = table_or_lines(columns, rows, console)
    return [Group(title, table)]


def _size(change: Change) -> float:
    """How many times as large, up or down; what came from zero or is no number changed most."""
    before, after = change.before, change.after
    if not isinstance(before, (int, float)) or not isinstance(after, (int, float)) or not before or not after:
        return math.inf
    return abs(math.log(abs(after / before))) if math.isfinite(after / before) else math.inf


# --- tables -------------------------------------------------------------------------------------------

_NONE = "—"
_SECTIONS = {
    "entropy": "Entropy in nats",
    "score_max": "Largest score",
    "dot_absmax": "Largest |q·k|, before scaling",
    "score_bound": "Bound of |q·k|, from the weights alone",
}
# Of these a factor tells more than a difference.
_RATIOS = frozenset({"score_max", "dot_absmax", "score_bound", "score_typical", "stored_absmax"})
_CONTENTS = "contents"
_NAMED = 3
_OF_TENSORS = {
    "nan_count": "NaN",
    "inf_count": "Inf",
    "absmax": "largest |w|",
    "rms": "RMS",
    "zero_fraction": "zeros",
}
_MOST = 10
_FEW = 5
