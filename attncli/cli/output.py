"""What every command shares at its end: the output options, choosing findings, writing the report, the exit code."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from attncli.cli.settings import Configured
from attncli.cli.writing import reader, write, write_stdout
from attncli.errors import AttncliError, UsageError
from attncli.render import FORMATS, format_of

if TYPE_CHECKING:
    from attncli.api import Choice, Report


class FailOn(str, enum.Enum):
    note = "note"
    warning = "warning"
    error = "error"
    never = "never"


def _format(name: str) -> str:
    if name not in FORMATS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, FORMATS))}.")
    return name


@dataclass(frozen=True)
class Reporting:
    """What becomes of the report: the output options of every command."""

    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            parser=_format,
            metavar="FORMAT",
            help=f"{', '.join(FORMATS)}. Default: table; for a file, what its name ends in.",
            rich_help_panel="Output",
        ),
    ] = None
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the report to this file instead of stdout. Repeatable: one run, several files. With - among "
            "them it goes to stdout as well, and --format is the format of that.",
            rich_help_panel="Output",
        ),
    ] = None
    fail_on: Annotated[
        FailOn,
        typer.Option(
            "--fail-on",
            metavar="SEVERITY",
            help="Exit with 1 from this severity on: note, warning, error (default) or never.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = FailOn.error
    select: Annotated[
        list[str] | None,
        typer.Option(
            "--select",
            metavar="CODES",
            help="Report only these rules: codes, names or prefixes, comma-separated.",
            rich_help_panel="Output",
        ),
    ] = None
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="CODES",
            help="Leave these rules out: codes, names or prefixes, comma-separated.",
            rich_help_panel="Output",
        ),
    ] = None
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="FILE",
            help="Findings in this baseline or JSON report are known: listed, and no reason to fail.",
            rich_help_panel="Output",
        ),
    ] = None
    write_baseline: Annotated[
        Path | None,
        typer.Option(
            "--write-baseline",
            metavar="FILE",
            help="Write all findings to this baseline; from then on they are known.",
            rich_help_panel="Output",
        ),
    ] = None
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Print no report and no progress; only the exit code speaks.",
            rich_help_panel="Output",
        ),
    ] = False


class Outlet(NamedTuple):
    """Where the report goes, checked before anything slow is begun. `files`: each with its format."""

    choice: Choice
    files: tuple[tuple[Path, str], ...]
    stdout: str | None
    baseline: Path | None
    fail_on: FailOn

    def finish(self, report: Report, *, unfolded: bool = False) -> int:
        """Writes the report and returns the exit code, which stays the same where nobody reads the report."""
        from attncli.api import baseline_text, chosen, with_findings

        report = chosen(report, self.choice)
        if self.baseline is not None:
            write(baseline_text(report), self.baseline)
            report = with_findings(report, (), known=(*report.known, *report.findings))
        for file, output_format in self.files:
            write(_text(report, output_format, unfolded, self.fail_on), file)
        if self.stdout is not None:
            _print(report, self.stdout, unfolded, self.fail_on)
        return report.exit_code(self.fail_on.value)


def outlet(reporting: Reporting, read: Iterable[Path]) -> Outlet:
    """What the output options say. `read`: files that must not be overwritten. Errors: `UsageError`."""
    from attncli.api import choice

    baseline, new = reporting.baseline, reporting.write_baseline
    if baseline is not None and new is not None and not baseline.exists() and _same(new, [baseline]):
        baseline = None  # the first one is about to be written
    made = choice(reporting.select, reporting.ignore, baseline)
    given = reporting.output or ()
    files = [file for file in given if file != _STDOUT]
    printed = _STDOUT in given or not (files or reporting.quiet)
    wanted = None if printed else reporting.output_format
    targets = [*files, *([reporting.write_baseline] if reporting.write_baseline is not None else [])]
    sources = list(read)
    for target in targets:
        check_target(target, sources)
    twice = next((file for at, file in enumerate(targets) if _same(file, targets[:at])), None)
    if twice is not None:
        raise UsageError(str(twice), "two outputs would go to this file.", "Give each its own file.")
    return Outlet(
        made,
        tuple((file, _format_of(file, wanted)) for file in files),
        (reporting.output_format or "table") if printed else None,
        reporting.write_baseline,
        reporting.fail_on,
    )


def check_target(output: Path, read: Iterable[Path], option: str = "-o", what: str = "the report") -> None:
    """Refuses a file that could not be written, or that would destroy what is read. Errors: `UsageError`."""
    if output.is_dir() or not output.parent.is_dir():
        problem = "this is a folder." if output.is_dir() else f"there is no folder {output.parent}."
        raise UsageError(str(output), problem, "Give a file in an existing folder.")
    if _same(output, [file for file in read if file.exists()]) and output.exists():
        problem = (
            f"{what} would overwrite {'the checkpoint itself' if what == 'the report' else 'what is read'}."
        )
        raise UsageError(str(output), problem, f"Give another file to {option}.")


def show_error(error: AttncliError) -> None:
    """The three parts of an error, on stderr."""
    from attncli.render.words import clean

    red = None if os.environ.get("NO_COLOR") else "red"
    typer.secho("error: ", fg=red, bold=True, nl=False, err=True)
    typer.echo(f"{clean(error.subject)}: {clean(error.problem)}", err=True)
    typer.echo(f"  try: {clean(error.remedy)}", err=True)


# --- building blocks ----------------------------------------------------------------------------------


def _format_of(file: Path, wanted: str | None) -> str:
    """What was asked for on the command line, what the file's name says, or what the settings say."""
    if wanted is None or isinstance(wanted, Configured):
        return format_of(file.suffix) or wanted or "table"
    return wanted


def _same(file: Path, others: Sequence[Path]) -> bool:
    resolved = file.resolve()
    return any(
        other.resolve() == resolved or (file.exists() and other.exists() and file.samefile(other))
        for other in others
    )


def _text(report: Report, output_format: str, unfolded: bool, fail_on: FailOn) -> str:
    if output_format == "table":
        from attncli.render import table

        return table.text(report, unfolded=unfolded)
    from attncli.rules import RULES

    return FORMATS[output_format].text(report, rules=RULES, fail_on=fail_on.value)


def _print(report: Report, output_format: str, unfolded: bool, fail_on: FailOn) -> None:
    if output_format == "table" and sys.stdout.isatty():
        from rich.console import Console

        from attncli.render import table

        with reader():
            table.draw(report, Console(), unfolded=unfolded)
            sys.stdout.flush()
    else:
        write_stdout(
            _text(report, output_format, unfolded, fail_on), as_json=output_format in ("json", "sarif")
        )


_STDOUT = Path("-")
