"""`attncli rules`."""

from __future__ import annotations

from typing import Annotated

import typer

from attncli.cli.explain import HowOption, IntoOption, show


def rules(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RULE]...", help="Only these: codes, prefixes (ATT4) or names.", show_default=False
        ),
    ] = None,
    how: HowOption = None,
    into: IntoOption = None,
) -> None:
    """List every rule: its code, name, severity, and what it finds.

    JSON holds all of each rule: formula, threshold, source, example, remedy, and the commands that report
    it. attncli explain CODE shows the same of one rule.
    """
    from attncli.api.explained import rule_page

    show(rule_page(words or ()), how, into, unbounded=True)
