"""What every command shares at its end: choose findings, write the report, errors, progress, exit code."""

from __future__ import annotations

import enum
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from attncli.errors import AttncliError, UsageError

if TYPE_CHECKING:
    from attncli.api import Report


class FailOn(str, enum.Enum):
    note = "note"
    warning = "warning"
    error = "error"
    never = "never"


class Format(str, enum.Enum):
    table = "table"
    json = "json"


FormatOption = Annotated[
    Format, typer.Option("--format", "-f", help="How to write the report.", rich_help_panel="Output")
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Write the report to this file instead of stdout.", rich_help_panel="Output"
    ),
]
FailOnOption = Annotated[
    FailOn, typer.Option("--fail-on", help="Exit with 1 from this severity on.", rich_help_panel="Output")
]
SelectOption = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        help="Report only these rules: codes, names or prefixes, comma-separated.",
        rich_help_panel="Output",
    ),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        help="Leave these rules out: codes, names or prefixes, comma-separated.",
        rich_help_panel="Output",
    ),
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        help="A JSON report; its findings are known and not reported again.",
        rich_help_panel="Output",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Write no report and no progress; only the exit code speaks.",
        rich_help_panel="Output",
    ),
]


class Choice(NamedTuple):
    """Which findings are reported. `known`: (code, layer, head, message) of findings of the baseline."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    known: frozenset[tuple[Any, ...]]


def choice(select: Sequence[str] | None, ignore: Sequence[str] | None, baseline: Path | None) -> Choice:
    """What --select, --ignore and --baseline say. Errors: `UsageError`, before anything slow is begun."""
    known = _known_findings(baseline) if baseline is not None else frozenset()
    return Choice(_codes(select, "--select"), _codes(ignore, "--ignore"), known)


def check_target(output: Path | None, checkpoint: Path, option: str = "-o", what: str = "the report") -> None:
    """Refuses a file that could not be written, or that would destroy what is read. Errors: `UsageError`."""
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        problem = "this is a folder." if output.is_dir() else f"there is no folder {output.parent}."
        raise UsageError(str(output), problem, "Give a file in an existing folder.")
    if output.exists() and checkpoint.exists() and output.samefile(checkpoint):
        problem = (
            f"{what} would overwrite {'the checkpoint itself' if what == 'the report' else 'what is read'}."
        )
        raise UsageError(str(output), problem, f"Give another file to {option}.")


def finish(
    report: Report,
    choice: Choice,
    *,
    output_format: Format,
    output: Path | None,
    fail_on: FailOn,
    quiet: bool,
    unfolded: bool,
) -> int:
    """Writes the report and returns the exit code, which stays the same where nobody reads the report."""
    report = _chosen(report, choice)
    if output is not None:
        _write(_text(report, output_format, unfolded), output)
    elif not quiet:
        _print(report, output_format, unfolded)
    return report.exit_code(fail_on.value)


def show_error(error: AttncliError) -> None:
    """The three parts of an error, on stderr."""
    from attncli.render.words import clean

    red = None if os.environ.get("NO_COLOR") else "red"
    typer.secho("error: ", fg=red, bold=True, nl=False, err=True)
    typer.echo(f"{clean(error.subject)}: {clean(error.problem)}", err=True)
    typer.echo(f"  try: {clean(error.remedy)}", err=True)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr, on a terminal only, and only once there is progress to show."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bar: Any = None
    tasks: dict[str, Any] = {}
    one_at_a_time = threading.Lock()  # weights are read by several threads

    def tick(what: str, done: int, total: int) -> None:
        nonlocal bar
        with one_at_a_time:
            if bar is None:
                bar = _started_bar()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

    try:
        yield tick
    finally:
        if bar is not None:
            bar.stop()


def _started_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.start()
    return bar


# --- findings -----------------------------------------------------------------------------------------


def _chosen(report: Report, choice: Choice) -> Report:
    from attncli.api import with_findings

    kept = [
        finding
        for finding in report.findings
        if (not choice.wanted or _in(finding.code, finding.name, choice.wanted))
        and not _in(finding.code, finding.name, choice.unwanted)
        and _identity(finding.code, finding.layer, finding.message) not in choice.known
    ]
    return with_findings(report, kept) if len(kept) != len(report.findings) else report


def _codes(given: Sequence[str] | None, option: str) -> tuple[str, ...]:
    from attncli.rules import RULES

    codes = tuple(code.strip() for entry in given or () for code in entry.split(",") if code.strip())
    for code in codes:
        if not any(_in(rule.code, rule.name, [code]) for rule in RULES):
            listed = ", ".join(rule.code for rule in RULES)
            raise UsageError(option, f"no rule is named {code!r}.", f"Rules: {listed}.")
    return codes


def _identity(code: str, layer: str | None, message: str) -> tuple[Any, ...]:
    """What makes two findings the same one: rule, layer, and what the message is about, whatever it counts."""
    from attncli.records import strict_json

    subject = re.sub(r"(?<![A-Za-z0-9._])\d+", "#", message.partition(": ")[0])
    return (code, strict_json(layer), strict_json(subject))


def _in(code: str, name: str, wanted: Sequence[str]) -> bool:
    return any(code.startswith(w.upper()) or name == w.lower() for w in wanted)


def _known_findings(path: Path) -> frozenset[tuple[Any, ...]]:
    import json

    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["findings"]
        return frozenset(_identity(row["code"], row["layer"], row["message"]) for row in rows)
    except OSError as error:
        raise UsageError(
            str(path),
            f"the baseline cannot be read ({error.strerror}).",
            "Write one with --format json -o FILE.",
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            str(path), "the baseline is no JSON report of attncli.", "Write one with --format json -o FILE."
        ) from error


# --- writing ------------------------------------------------------------------------------------------


def silence_stdout() -> None:
    """Nobody can read on: what is left in the buffer goes nowhere, so that the interpreter ends quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _text(report: Report, output_format: Format, unfolded: bool) -> str:
    from attncli.render import TEXT_FORMATS, table

    if output_format is Format.table:
        return table.text(report, unfolded=unfolded)
    return TEXT_FORMATS[output_format.value](report)


def _write(text: str, output: Path) -> None:
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            str(output),
            f"the report cannot be written there ({error.strerror}).",
            "Give a file in an existing folder.",
        ) from error


def _print(report: Report, output_format: Format, unfolded: bool) -> None:
    try:
        if output_format is Format.table and sys.stdout.isatty():
            from rich.console import Console

            from attncli.render import table

            table.draw(report, Console(), unfolded=unfolded)
        else:
            text = _text(report, output_format, unfolded)
            sys.stdout.write(_escaped(text) if output_format is Format.json else text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    except OSError as error:
        silence_stdout()
        raise UsageError(
            "stdout",
            f"the report cannot be written ({error.strerror}).",
            "Check the disk, or write to a file with -o.",
        ) from error


def _escaped(text: str) -> str:
    """JSON text with `\\u` escapes where stdout could not hold a character, which it would show as "?"."""
    import json

    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
    return text
