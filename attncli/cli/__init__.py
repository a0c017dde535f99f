"""The command line: parse, call the API, render, exit. One file per command; no logic of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from attncli import __version__
from attncli.cli.check import check
from attncli.cli.diff import diff
from attncli.cli.entropy import entropy
from attncli.cli.explain import explain
from attncli.cli.help import Command, Group
from attncli.cli.inspect import inspect
from attncli.cli.nan_check import nan_check
from attncli.cli.output import show_error
from attncli.cli.overflow import overflow
from attncli.cli.rules import rules
from attncli.cli.script import USUAL_ERRORS
from attncli.cli.script_options import ScriptCommand
from attncli.cli.settings import Option, project_defaults
from attncli.cli.writing import silence_stdout
from attncli.errors import AttncliError, UsageError

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
    _steady_streams()
    try:
        with _interruptible():
            code = app(prog_name="attncli", standalone_mode=False)
        if not sys.stdout.closed:  # a script may have closed it
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # Help for a reader that went away; click and rich leave in their own way. A report keeps its code.
        silence_stdout()
        return 0
    except typer.Abort:
        return 130
    except _ClickError as error:
        return _wrong_usage(error)
    except AttncliError as error:
        show_error(error)
        return 2
    return code if isinstance(code, int) else 0


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is Ctrl-C whatever becomes of it on the way: an import of torch or numpy turns it into other errors."""
    if (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    pressed = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if pressed.is_set():
            raise typer.Abort from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _steady_streams() -> None:
    """Streams that the caller closed (`>&-`) lead nowhere; a terminal that cannot show "√" shows "?"."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the end
            setattr(sys, name, nowhere)
        elif hasattr(stream, "reconfigure"):
            USUAL_ERRORS.setdefault(name, stream.errors)
            stream.reconfigure(errors="replace")


def _wrong_usage(error: Any) -> int:
    """A mistake that click found in the command line, in the three parts of every other error."""
    context = getattr(error, "ctx", None)
    known = [one.name for one in app.registered_commands]
    inner = [f"attncli {word}" for word in sys.argv[1:2] if word in known]
    command = context.command_path if context is not None else "".join(inner) or "attncli"
    problem = error.format_message().strip()
    if problem:  # without one, the help was shown instead
        sentence = problem[0].lower() + problem[1:] + ("" if problem.endswith((".", "?")) else ".")
        remedy = f"{command} --help lists the options."
        mistaken = next((word for word in sys.argv[1:2] if Path(word).exists()), None)
        if command == "attncli" and mistaken is not None:
            remedy = f"attncli inspect {mistaken}"
        show_error(UsageError(command, sentence, remedy))
    return 2


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
    unreadable input; 3 no attention could be observed, or not all of it.
    """
    context.default_map = _defaults(context.command)


def settings_of(command: str, start: Path) -> dict[str, Any]:
    """What `[tool.attncli]` of the pyproject.toml nearest to `start` says for a command, by its parameters' names."""
    settings: dict[str, Any] = _defaults(typer.main.get_command(app), start).get(command, {})
    return settings


def _defaults(group: Any, start: Path | None = None) -> dict[str, Any]:
    options = {name: _options(command) for name, command in getattr(group, "commands", {}).items()}
    # Settings are for reports: an explanation must not overwrite the file that a report is to go to.
    return project_defaults({name: known for name, known in options.items() if "fail-on" in known}, start)


def _options(command: Any) -> dict[str, Option]:
    """The options of a command by their long names: --no-confirm is the setting confirm = false."""
    return {
        name[2:]: Option(parameter.name, bool(parameter.multiple))
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--")
    }


# typer names no public base class of its usage errors, and from 0.26 on they are not click's.
_ClickError: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]


# --- commands -----------------------------------------------------------------------------------------

app.command("inspect", cls=Command)(inspect)
app.command("entropy", cls=Command)(entropy)
app.command("overflow", cls=Command)(overflow)
app.command("nan-check", cls=ScriptCommand)(nan_check)
app.command("check", cls=Command)(check)
app.command("diff", cls=Command)(diff)
app.command("rules", cls=Command)(rules)
app.command("explain", cls=Command)(explain)
