"""What fits on a console, and the form that does: a table, or lines in which no number is wrapped or cut."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


def fits(table: Table, console: Console) -> bool:
    """Whether `table` needs no wrapping on `console`."""
    if console.width >= 100_000:
        return True  # measuring is a third of the time of a table with a thousand rows
    return console.measure(table, options=console.options.update(width=100_000)).maximum <= console.width


def table_or_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    console: Console,
    *,
    left: Collection[str] = (),
) -> RenderableType:
    """A name and its numbers a row; where that does not fit, lines. `left`: columns that hold words."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(columns):
        table.add_column(name, justify="left" if at == 0 or name in left else "right")
    for row in rows:
        table.add_row(*row)
    if fits(table, console):
        return table
    lines: list[RenderableType] = []
    for row in rows:
        facts = [f"{column} {value}" for column, value in zip(columns[1:], row[1:], strict=True)]
        title = Text(f"{columns[0]} {row[0]}") if row[0].plain.isdecimal() else row[0]
        lines += [
            *([title] if title else []),
            *(Text(f"  {line}") for line in packed(facts, console.width - 2)),
        ]
    return Group(*lines)


def packed(facts: Sequence[str], width: int) -> list[str]:
    """As many facts on each line as it holds; none is broken."""
    lines = list(facts[:1])
    for fact in facts[1:]:
        joined = f"{lines[-1]} · {fact}"
        if len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(fact)
    return lines


def broken(facts: Sequence[str], width: int) -> list[str]:
    """The same, but a fact that fits no line goes on in the next, between words where it can."""
    lines: list[str] = []
    for line in packed(facts, width):
        if len(line) <= width:
            lines.append(line)
        else:
            lines += textwrap.wrap(line, max(width, 8), subsequent_indent="  ", break_on_hyphens=False)
    return lines
