"""`attncli inspect CHECKPOINT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncli.cli.flattened import flattened
from attncli.cli.output import Reporting, outlet
from attncli.cli.progress import progress_bar
from attncli.cli.reading_options import Reading


@flattened
def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint file, or a model folder.", show_default=False
        ),
    ],
    reading: Reading,
    reporting: Reporting,
) -> None:
    """Show the attention layout of every layer of a checkpoint, from its headers.

    Names, shapes, dtypes, heads, KV heads, head size, the order inside fused tensors, the scale, and what
    is wrong with them. Headers are read in milliseconds: no torch, no pickle executed. --values and
    --bounds read the weights as well.
    """
    from attncli import api

    ends = outlet(reporting, [Path(checkpoint)])
    with progress_bar(reporting.quiet) as progress:
        report = api.inspect(checkpoint, **reading.settings(), progress=progress)
    raise typer.Exit(ends.finish(report, unfolded=bool(reading.layer)))
