"""Pages of `attncli explain` and `attncli rules` as text, on a terminal, as Markdown and as JSON."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attncli.records import strict_json
from attncli.records.pages import Block, Column, Facts, Formula, Page, Prose, Table
from attncli.render.words import clean, count, number, size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text


def text(page: Page, *, width: int | None = None) -> str:
    """The page without colour, at `width` columns: what COLUMNS says, otherwise 80. No line is longer."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=width or _columns(),
        height=25,  # otherwise rich asks the surroundings for both
        color_system=None,
        force_terminal=False,
        legacy_windows=False,
    )
    draw(page, console)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def draw(page: Page, console: Console) -> None:
    """Draws the page on `console`, prose at no more than a comfortable width."""
    from rich.text import Text

    heading = Text(clean(page.title), style="bold")
    if page.mark:
        heading.append(f"  {page.mark}", style=_MARKS[page.mark])
    prose_width = min(console.width, _COMFORTABLE)
    console.print(heading, highlight=False, width=prose_width)
    for block in page.blocks:
        console.print()
        for part in _drawn(block, console, prose_width):
            console.print(part, highlight=False, width=None if isinstance(block, Table) else prose_width)


def markdown(page: Page) -> str:
    """The page for a pull request, a wiki or a chat: GitHub's Markdown."""
    mark = f" ({page.mark})" if page.mark else ""
    parts = [f"# {_escaped(page.title)}{mark}"]
    for block in page.blocks:
        if isinstance(block, Prose):
            parts.append(_escaped(block.text))
        elif isinstance(block, Formula):
            parts.append("\n".join(["```text", *block.lines, "```"]))
        elif isinstance(block, Facts):
            parts.append(
                "\n".join(f"- **{_escaped(label)}**: {_escaped(words)}" for label, words in block.rows)
            )
        else:
            parts += [_escaped(block.caption)] if block.caption else []
            parts.append(_pipes(block))
    return "\n\n".join(parts) + "\n"


def json_text(page: Page) -> str:
    """What the page says for a program. Strict JSON: non-finite numbers are "nan", "inf" and "-inf"."""
    return json.dumps(strict_json(page.values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def cell(value: str | int | float, column: Column) -> str:
    """One cell as a person reads it: digits grouped by spaces."""
    if isinstance(value, str):
        return value
    if column.shown == "bytes":
        return size(int(value))
    if column.shown == "count":
        return count(int(value))
    return format(value, column.shown).replace(",", " ") if column.shown else number(value)


# --- on a console -------------------------------------------------------------------------------------


def _drawn(block: Block, console: Console, width: int) -> list[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    if isinstance(block, Prose):
        return [Text(clean(block.text))]
    if isinstance(block, Formula):
        return [Padding(Text("\n".join(map(clean, block.lines)), style="cyan"), (0, 0, 0, 2))]
    if isinstance(block, Facts):
        return _facts(block, width)
    caption = [Text(clean(block.caption), style="dim")] if block.caption else []
    return [*caption, _table(block, console)]


def _facts(block: Facts, width: int) -> list[RenderableType]:
    """Labels in a column of their own; where there is no room for one, each above its text."""
    from rich.padding import Padding
    from rich.table import Table as Grid
    from rich.text import Text

    if width < _NARROW:
        lines: list[RenderableType] = []
        for label, words in block.rows:
            lines += [Text(clean(label), style="bold"), Padding(Text(clean(words)), (0, 0, 0, 2))]
        return lines
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, words in block.rows:
        grid.add_row(Text(clean(label), style="bold"), Text(clean(words)))
    return [grid]


def _table(block: Table, console: Console) -> RenderableType:
    """A table whose last column may wrap if it is words; where that leaves too little room, lines instead."""
    from rich.table import Table as Grid
    from rich.text import Text

    from attncli.render.fitting import table_or_lines

    rows = [
        [Text(clean(cell(value, column))) for value, column in zip(row, block.columns, strict=True)]
        for row in block.rows
    ]
    names = [column.name for column in block.columns]
    worded = [_is_words(block, at) for at in range(len(names))]
    widths = [
        max(Text(name).cell_len, *(row[at].cell_len for row in rows), 0) for at, name in enumerate(names)
    ]
    room = console.width - sum(widths[:-1]) - _GUTTER * (len(names) - 1)
    if room < min(widths[-1], _WORDS if worded[-1] else widths[-1]):
        if worded[-1] and all(worded):
            return _stacked(rows)
        return table_or_lines(
            names, rows, console, left=[name for name, words in zip(names, worded, strict=True) if words]
        )
    grid = Grid(box=None, pad_edge=False, padding=(0, _GUTTER, 0, 0), header_style="bold")
    for name, words, width in zip(names, worded, [*widths[:-1], min(widths[-1], room)], strict=True):
        grid.add_column(name, justify="left" if words else "right", width=width, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _stacked(rows: Sequence[Sequence[Text]]) -> RenderableType:
    """Names on a line, what is said of them indented below it."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines: list[RenderableType] = []
    for *names, words in rows:
        lines += [Text("  ").join(names), Padding(words, (0, 0, 0, 2))]
    return Group(*lines)


def _is_words(block: Table, at: int) -> bool:
    return any(isinstance(row[at], str) for row in block.rows)


def _columns() -> int:
    given = os.environ.get("COLUMNS", "")
    return max(20, int(given)) if given.isdecimal() and int(given) else 80


# --- Markdown -----------------------------------------------------------------------------------------


def _pipes(block: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rules = ["---" if _is_words(block, at) else "---:" for at in range(len(block.columns))]
    rows = [
        line([_escaped(cell(value, column)) for value, column in zip(row, block.columns, strict=True)])
        for row in block.rows
    ]
    return "\n".join([line([_escaped(column.name) for column in block.columns]), line(rules), *rows])


def _escaped(words: str) -> str:
    """What GitHub would read as markup, shown as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$&@])", r"\\\1", clean(words))


# No line of words is broken at it.
UNBOUNDED = 100_000

_MARKS = {"": "", "note": "cyan", "warning": "yellow", "error": "bold red"}
# Longer lines are hard to read; tables may be wider.
_COMFORTABLE = 100
_NARROW = 60
_GUTTER = 2
# A column of words narrower than this is a tower of letters.
_WORDS = 28
