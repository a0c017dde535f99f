"""`attncli entropy MODEL`."""

from __future__ import annotations

from typing import Annotated

import typer

from attncli.cli.flattened import flattened
from attncli.cli.model_options import ModelArgument, Running, run_and_report
from attncli.cli.output import Reporting


@flattened
def entropy(
    model: ModelArgument,
    running: Running,
    reporting: Reporting,
    *,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--maps",
            metavar="LAYER[:HEAD]",
            help="Draw the attention probabilities of these heads: a layer as in --layer, then heads, such as "
            "3:0,5-7; without heads the first 16. Repeatable.",
        ),
    ] = None,
) -> None:
    """Show how concentrated each attention head is, from one forward pass of the model.

    The entropy of every head in nats and as a share of the largest possible, the heads that lie on one
    key, on the diagonal or on everything alike, and what is wrong with how the attention is computed. The
    model runs as it is, on its own kernels. Without --text or --input the batch is random.
    """
    own = {"maps": tuple(maps)} if maps else {}
    run_and_report("entropy", model, running, reporting, **own)
