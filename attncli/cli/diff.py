"""`attncli diff A B`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncli.cli.flattened import flattened
from attncli.cli.output import Reporting, outlet
from attncli.cli.progress import progress_bar
from attncli.cli.reading_options import Reading


@flattened
def diff(
    first: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A checkpoint file, a model folder, or a JSON report.", show_default=False
        ),
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="The same, to be compared with A.", show_default=False)
    ],
    reading: Reading,
    reporting: Reporting,
) -> None:
    """Show what changed between two checkpoints or two JSON reports, and what is worse in the second.

    Layers added, removed and reshaped, and new and gone findings; with --values and --bounds, or between
    reports, also every number that changed by more than 1e-4 of itself.

    A model that must be run is compared by its reports: attncli check MODEL --format json -o a.json, the same for
    the other, then attncli diff a.json b.json.

    Exits with 1 where B has findings at or above --fail-on that A has not, those about the changes included
    (ATT901 to ATT906).
    """
    from attncli import api

    ends = outlet(reporting, [Path(first), Path(second)])
    with progress_bar(reporting.quiet) as progress:
        report = api.diff(first, second, **reading.settings(), progress=progress)
    raise typer.Exit(ends.finish(report, unfolded=bool(reading.layer)))
