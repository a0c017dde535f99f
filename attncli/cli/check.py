"""`attncli check MODEL`."""

from __future__ import annotations

from typing import Annotated

import typer

from attncli.cli.flattened import flattened
from attncli.cli.model_options import ModelArgument, Running, run_and_report
from attncli.cli.output import Reporting


@flattened
def check(
    model: ModelArgument,
    running: Running,
    reporting: Reporting,
    *,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="KEY=VALUE",
            help="Fail unless the model is this: heads=32,kv_heads=8,head_dim=128,layout=separate; also layers, "
            "kind, scale, dtype, mask, window, structure. 'GLOB:heads=8' means these layers. Repeatable.",
        ),
    ] = None,
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm/--no-confirm", help="Whether the cause of NaN is proved by repeating the run."
        ),
    ] = True,
) -> None:
    """Check everything in one load and one forward pass: the command for CI.

    Layouts, weights, how attention is computed, the size of its scores, its entropy, and NaN and Inf in any
    operator. Of a bare checkpoint: layouts, values and bounds; that nothing ran is said. Exit code 0 where nothing
    at or above --fail-on was found, 1 where something was, 3 where attention could not be observed.
    """
    run_and_report("check", model, running, reporting, expect=tuple(expect or ()), confirm=confirm)
