"""What every command shares at its end: choose findings, write the report, show errors, progress, exit code."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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


def finish(
    report: Report,
    *,
    output_format: Format,
    output: Path | None,
    fail_on: FailOn,
    select: Sequence[str] | None,
    ignore: Sequence[str] | None,
    baseline: Path | None,
    quiet: bool,
    unfolded: bool,
) -> int:
    """Writes the report and returns the exit code."""
    report = _chosen(report, select, ignore, baseline)
    if output is not None:
        _write(report, output_format, output)
    elif not quiet:
        _print(report, output_format, unfolded)
    return report.exit_code(fail_on.value)


def show_error(error: AttncliError) -> None:
    """The three parts of an error, on stderr."""
    from attncli.render.words import clean

    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
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

    def tick(what: str, done: int, total: int) -> None:
        nonlocal bar
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


def _chosen(
    report: Report, select: Sequence[str] | None, ignore: Sequence[str] | None, baseline: Path | None
) -> Report:
    from attncli.api import with_findings

    wanted, unwanted = _codes(select), _codes(ignore)
    known = _known_findings(baseline) if baseline is not None else frozenset()
    kept = [
        finding
        for finding in report.findings
        if (not wanted or _in(finding.code, finding.name, wanted))
        and not _in(finding.code, finding.name, unwanted)
        and (finding.code, finding.layer, finding.head, finding.message) not in known
    ]
    return with_findings(report, kept) if len(kept) != len(report.findings) else report


def _codes(given: Sequence[str] | None) -> list[str]:
    from attncli.rules import RULES

    codes = [code.strip() for entry in given or () for code in entry.split(",") if code.strip()]
    for code in codes:
        if not any(_in(rule.code, rule.name, [code]) for rule in RULES):
            listed = ", ".join(rule.code for rule in RULES)
            raise UsageError("--select/--ignore", f"no rule is named {code!r}.", f"Rules: {listed}.")
    return codes


def _in(code: str, name: str, wanted: Sequence[str]) -> bool:
    return any(code.startswith(w.upper()) or name == w.lower() for w in wanted)


def _known_findings(path: Path) -> frozenset[tuple[Any, ...]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["findings"]
        return frozenset((row["code"], row["layer"], row["head"], row["message"]) for row in rows)
    except OSError as error:
        raise UsageError(
            str(path),
            f"the baseline cannot be read ({error.strerror}).",
            "Write one with --format json -o FILE.",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            str(path), "the baseline is no JSON report of attncli.", "Write one with --format json -o FILE."
        ) from error


# --- writing ------------------------------------------------------------------------------------------


def _write(report: Report, output_format: Format, output: Path) -> None:
    from attncli.render import TEXT_FORMATS

    text = TEXT_FORMATS[output_format.value](report)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            str(output),
            f"the report cannot be written there ({error.strerror}).",
            "Give a file in an existing folder.",
        ) from error


def _print(report: Report, output_format: Format, unfolded: bool) -> None:
    from attncli.render import TEXT_FORMATS, table

    if output_format is not Format.table:
        sys.stdout.write(TEXT_FORMATS[output_format.value](report))
        return
    from rich.console import Console

    if sys.stdout.isatty():
        table.draw(report, Console(), unfolded=unfolded)
    else:
        sys.stdout.write(table.text(report, unfolded=unfolded))
