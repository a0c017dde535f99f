"""`attncli overflow MODEL`."""

from __future__ import annotations

from attncli.cli.flattened import flattened
from attncli.cli.model_options import ModelArgument, Running, run_and_report
from attncli.cli.output import Reporting


@flattened
def overflow(model: ModelArgument, running: Running, reporting: Reporting) -> None:
    """Show how near the attention scores come to overflow, from one forward pass of the model.

    The largest |q·k| of every layer before scaling, the scale that is really applied and where, the
    largest score, and the bits that are left in float16, bfloat16 and float32. The model runs as it is,
    on its own kernels. Without --text or --input the batch is random.
    """
    run_and_report("overflow", model, running, reporting)
