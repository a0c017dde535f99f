"""`attncli diff A B`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncli.cli.flattened import flattened
from attncli.cli.output import Reporting, outlet
from attncli.cli.progress import progress_bar


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
    reporting: Reporting,
    *,
    values: Annotated[
        bool,
        typer.Option(
            "--values",
            help="Read all weights of a checkpoint: NaN, Inf, largest magnitude and RMS per tensor.",
        ),
    ] = False,
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Bound |q·k| per head from the weights of a checkpoint.")
    ] = False,
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads", min=1, metavar="N", help="Query heads, where neither config nor shapes tell."
        ),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            "--kv-heads", min=1, metavar="N", help="KV heads, where neither config nor shapes tell."
        ),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            "--head-dim", min=1, metavar="N", help="Head size, where neither config nor shapes tell."
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            "-l",
            metavar="LAYER",
            help="Only these layers, every head of them: a path, a glob, or a layer's number. Repeatable.",
        ),
    ] = None,
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
        report = api.diff(
            first,
            second,
            values=values,
            bounds=bounds,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            layers=layer or (),
            progress=progress,
        )
    raise typer.Exit(ends.finish(report, unfolded=bool(layer)))
