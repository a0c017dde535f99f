"""`attncli entropy MODEL`."""

from __future__ import annotations

from attncli.cli.flattened import flattened
from attncli.cli.model_options import ModelArgument, Running, run_and_report
from attncli.cli.output import Reporting


@flattened
def entropy(model: ModelArgument, running: Running, reporting: Reporting) -> None:
    """Show how concentrated each attention head is, from one forward pass of the model.

    The entropy of every head in nats and as a share of the largest possible, the heads that lie on one
    key, on the diagonal or on everything alike, and what is wrong with how the attention is computed. The
    model runs as it is, on its own kernels. Without --text or --input the batch is random.
    """
    run_and_report("entropy", model, running, reporting)
