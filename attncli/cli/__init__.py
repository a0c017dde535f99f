"""The command line: parse, call the API, render, exit. One file per command; no logic of its own."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from attncli import __version__
from attncli.cli.help import Command, Group
from attncli.cli.inspect import inspect
from attncli.cli.settings import project_defaults
from attncli.errors import AttncliError

app = typer.Typer(
    name="attncli",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run() -> int:
    """Runs `attncli` on sys.argv and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # A terminal that cannot show "√" shows "?" instead of a traceback.
            reconfigure(errors="replace")
    try:
        app(standalone_mode=True)
    except SystemExit as leaving:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            return _broken_pipe()
        code = leaving.code
        return code if isinstance(code, int) else (0 if code is None else 2)
    except BrokenPipeError:
        return _broken_pipe()
    except AttncliError as error:
        from attncli.cli.output import show_error

        show_error(error)
        return 2
    return 0


def _broken_pipe() -> int:
    """The reader went away: no message, and nothing for the interpreter to flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attncli {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """The linter and debugger for attention.

    Exit codes: 0 looked and found nothing at or above --fail-on; 1 found something; 2 wrong usage or
    unreadable input; 3 no attention layer could be observed.
    """
    context.default_map = project_defaults()


# --- commands -----------------------------------------------------------------------------------------

app.command("inspect", cls=Command)(inspect)
