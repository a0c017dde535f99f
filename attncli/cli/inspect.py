"""`attncli inspect CHECKPOINT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attncli.cli.flattened import flattened
from attncli.cli.output import Reporting, outlet
from attncli.cli.progress import progress_bar


@flattened
def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint file, or a model folder.", show_default=False
        ),
    ],
    reporting: Reporting,
    *,
    values: Annotated[
        bool,
        typer.Option(
            "--values", help="Read all weights: NaN, Inf, zeros, largest magnitude and RMS per tensor."
        ),
    ] = False,
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Bound |q·k| per head from the weights: can scores overflow?")
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
            help="Only these layers, one row each: a path, a glob, or a layer's number. Repeatable.",
        ),
    ] = None,
) -> None:
    """Show the attention layout of every layer of a checkpoint, from its headers.

    Names, shapes, dtypes, heads, KV heads, head size, the order inside fused tensors, the scale, and what
    is wrong with them. Headers are read in milliseconds: no torch, no pickle executed. --values and
    --bounds read the weights as well.
    """
    from attncli import api

    ends = outlet(reporting, [Path(checkpoint)])
    with progress_bar(reporting.quiet) as progress:
        report = api.inspect(
            checkpoint,
            values=values,
            bounds=bounds,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            layers=layer or (),
            progress=progress,
        )
    raise typer.Exit(ends.finish(report, unfolded=bool(layer)))
