"""`attncli explain CODE|NAME|TOPIC`, and how a page is written."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attncli.cli.output import check_target
from attncli.cli.writing import reader, write, write_stdout

if TYPE_CHECKING:
    from attncli.records.pages import Page


class How(str, enum.Enum):
    table = "table"
    json = "json"
    markdown = "markdown"


HowOption = Annotated[
    How | None,
    typer.Option(
        "--format",
        "-f",
        metavar="FORMAT",
        help="table, json or markdown. Default: table; for a file, what its name ends in.",
        rich_help_panel="Output",
    ),
]
IntoOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the page to this file instead of stdout.",
        rich_help_panel="Output",
    ),
]


def explain(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CODE|NAME|TOPIC]",
            help="A rule by code, prefix or name, or a topic. Without it, all there are.",
            show_default=False,
        ),
    ] = None,
    how: HowOption = None,
    into: IntoOption = None,
) -> None:
    """Explain a rule, or a topic of attention with numbers computed on the spot.

    A rule: what it finds, why that is bad, formula, threshold, source and provenance, example, remedy, and
    the commands that report it. A topic: a screenful on scaling, softmax, sinks, overflow, NaN and others.
    """
    from attncli.api.explained import explained

    show(explained(words or ()), how, into)


def show(page: Page, how: How | None, into: Path | None, *, unbounded: bool = False) -> None:
    """Writes the page. `unbounded`: no line of it is broken where it goes to no terminal."""
    from attncli.render import format_of, pages

    if into is not None:
        check_target(into, ())
        named = format_of(into.suffix) or "table"
        how = how or (How(named) if named in How.__members__ else How.table)
    elif how in (None, How.table) and sys.stdout.isatty():
        from rich.console import Console

        with reader():
            pages.draw(page, Console())
            sys.stdout.flush()
        return
    if how is How.json:
        text = pages.json_text(page)
    elif how is How.markdown:
        text = pages.markdown(page)
    else:
        text = pages.text(page, width=pages.UNBOUNDED if unbounded else None)
    if into is not None:
        write(text, into)
    else:
        write_stdout(text, as_json=how is How.json)
