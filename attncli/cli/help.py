"""`--help`, drawn with two rich tables. Typer's own drawing imports a Markdown parser: twice the start-up time."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command whose help is usage, description, and one table of options per panel."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _draw(self, ctx, ())


class Group(TyperGroup):
    """The command group: the same, with a table of commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(100)) for name, command in commands if command is not None]
        _draw(self, ctx, tuple(rows))


def _draw(command: Any, ctx: Any, commands: tuple[tuple[str, str], ...]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    # Newer versions of typer put what is required in braces.
    pieces = (piece.strip("{}") for piece in command.collect_usage_pieces(ctx))
    usage = " ".join((ctx.command_path, *pieces))
    console.print(Text.assemble(("Usage: ", "bold"), usage))
    for paragraph in (command.help or "").split("\n\n"):
        console.print(Padding(Text(" ".join(paragraph.split())), (1, 2, 0, 2)))
    if commands:
        _section(console, "Commands", commands)
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = _record(parameter, ctx)
        if record is not None:
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or _panel(parameter), []).append(
                record
            )
    for title in sorted(panels, key=lambda panel: panel != "Arguments"):
        _section(console, title, tuple(panels[title]))


def _panel(parameter: Any) -> str:
    return "Arguments" if parameter.param_type_name == "argument" else "Options"


def _record(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """(how it is written, what it does)."""
    if parameter.param_type_name == "argument":
        return parameter.make_metavar(ctx), parameter.help or ""
    record: tuple[str, str] | None = parameter.get_help_record(ctx)
    return record


def _section(console: Any, title: str, rows: tuple[tuple[str, str], ...]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold", max_width=max(24, console.width * 2 // 5))
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name, style="cyan"), Text(text))
    console.print(Padding(Text(title, style="bold"), (1, 0, 0, 0)))
    console.print(Padding(table, (0, 0, 0, 2)))
