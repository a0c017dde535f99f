"""A training run for a terminal: the step that went wrong with its facts, and the last steps as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attncli.records import Report
from attncli.render.calls import titled
from attncli.render.fitting import table_or_lines
from attncli.render.training import counted, curve, fault_facts, headline, history, seen_words, training_of
from attncli.render.words import clean, count, number


def training_heading(report: Report, width: int) -> RenderableType:
    """The script, where it ran, and how many steps were watched."""
    source, training = report.source, training_of(report)
    facts = [clean(source.get("kind") or "")]
    if source.get("parameters"):
        facts.append(f"{count(int(source['parameters']))} parameters")
    facts += [clean(value) for value in map(report.environment.get, ("device", "dtype")) if value]
    world = training.get("world")
    watched = [counted(int(training.get("seen") or 0), "step") + " watched"]
    watched += [f"{world} processes"] if isinstance(world, int) and world > 1 else []
    watched += [clean(one.get("name")) for one in training.get("optimizers") or ()]
    return Group(
        *titled(clean(source.get("path") or ""), [fact for fact in facts if fact], width),
        *titled(watched[0], watched[1:], width),
        Text(),
    )


def training_parts(report: Report, console: Console) -> list[RenderableType]:
    """The fault with its facts, and the last steps."""
    training = training_of(report)
    parts: list[RenderableType] = []
    title = headline(training)
    if title:
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.add_column(style="dim", no_wrap=True, min_width=7)
        lines.add_column(overflow="fold")
        for name, words in fault_facts(training):
            lines.add_row(name, Text(words))
        parts.append(Group(Text(title, style="bold red"), Padding(lines, (0, 0, 1, 2))))
    all_columns, all_rows = history(training, _LAST)
    columns, rows = _fitting(all_columns, all_rows, console.width)
    left_out = [name for name in all_columns if name not in columns]
    if len(columns) > 1 and (title or report.findings):
        cells = [[Text(cell) for cell in row] for row in rows]
        told = f"The last {len(rows)} steps" if len(rows) > 1 else "The last step"
        table = table_or_lines(columns, cells, console, left=("", "its name"))
        drawn = _sparkline(training, console.width)
        below = [Text(f"too narrow for: {', '.join(left_out)}", style="dim")] if left_out else []
        below += [drawn] if drawn is not None else []
        # A table ends with an empty line of its own.
        end = [] if isinstance(table, Table) and not below else [Text()]
        parts.append(Group(Text(told, style="bold"), table, *below, *end))
    return parts


def training_verdict(report: Report, tally: str) -> Text:
    """ "Step 412 of 412: 1 origin of NaN, proved; 1 error." or "200 steps watched, nothing non-finite; …"."""
    if not report.looked:
        return Text("Not observed: no training step ran.", style="bold yellow")
    said = seen_words(report)
    severity = report.findings[0].severity if report.findings else ""
    style = {"error": "bold red", "warning": "bold yellow", "note": "bold"}.get(severity, "bold green")
    return Text(f"{said[0].upper()}{said[1:]}; {tally}.", style=style)


# --- building blocks ----------------------------------------------------------------------------------


def _fitting(columns: list[str], rows: list[list[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """The table without the columns that matter least, as many as `width` has no room for."""
    kept = list(range(len(columns)))
    for name in _LEAST_FIRST:
        widths = [max(cell_len(cell) for cell in (columns[at], *(row[at] for row in rows))) for at in kept]
        if sum(widths) + 3 * len(kept) <= width:
            break
        kept = [at for at in kept if columns[at] != name]
    return [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]


def _sparkline(training: Mapping[str, Any], width: int) -> Text | None:
    """ "loss ▂▂▃▅█×  2.1 to 83": at most 60 steps; None where there are too few."""
    values = [value for _, value in curve(training, "loss")][-max(8, min(_WIDEST, width - 24)) :]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if len(values) < _DRAWN or low == high:
        return None
    span = high - low
    marks = "".join(
        _BARS[min(int((value - low) / span * len(_BARS)), len(_BARS) - 1)] if math.isfinite(value) else "×"
        for value in values
    )
    return Text(f"loss {marks}  {number(low)} to {number(high)}")


# --- settings -----------------------------------------------------------------------------------------

_LAST = 8
_LEAST_FIRST = ("its name", "learning rate", "largest parameter", "loss scale", "gradient norm")
_WIDEST = 60
_DRAWN = 12
_BARS = "▁▂▃▄▅▆▇█"
