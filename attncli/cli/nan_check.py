"""`attncli nan-check MODEL`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from attncli.cli.flattened import flattened
from attncli.cli.model_options import Dtype, ModelArgument, Running, files_read, run_and_report
from attncli.cli.output import Reporting, check_target
from attncli.errors import UsageError


class Optimizer(str, enum.Enum):
    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"
    rmsprop = "rmsprop"
    adagrad = "adagrad"


@flattened
def nan_check(
    model: ModelArgument,
    running: Running,
    reporting: Reporting,
    *,
    backward: Annotated[
        bool,
        typer.Option(
            "--backward", help="Also the gradients: of the model's loss, or of the sum of its outputs."
        ),
    ] = False,
    steps: Annotated[
        int,
        typer.Option(
            "--steps",
            min=0,
            metavar="N",
            help="Take this many real training steps (default 0).",
            show_default=False,
        ),
    ] = 0,
    optimizer: Annotated[
        Optimizer | None,
        typer.Option(
            "--optimizer", metavar="NAME", help="For --steps: adamw (default), adam, sgd, rmsprop or adagrad."
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", min=0.0, metavar="RATE", help="For --steps: the learning rate (default 0.001)."),
    ] = None,
    confirm: Annotated[
        bool,
        typer.Option("--confirm/--no-confirm", help="Whether each cause is proved by repeating the step."),
    ] = True,
    what_if: Annotated[
        Dtype | None,
        typer.Option("--what-if", metavar="DTYPE", help="Predict what overflows in float16, then run it."),
    ] = None,
    save_repro: Annotated[
        Path | None,
        typer.Option(
            "--save-repro", metavar="FILE.py", help="Write a script that repeats the operator alone."
        ),
    ] = None,
) -> None:
    """Find where a NaN or Inf was born, and prove the cause.

    Every operator of the forward pass, the backward pass and the optimiser is looked at; what is bad in the
    outputs, the loss, the gradients or the parameters is traced back to the operator, parameter, input or
    update it came from. The step is then repeated with that one thing changed. A healthy model gives exit
    code 0 and the room that is left.
    """
    if not steps and (optimizer is not None or lr is not None):
        option = "--optimizer" if optimizer is not None else "--lr"
        raise UsageError(option, "no training step is taken.", "Add --steps N.")
    if running.layer:
        problem = "a search for NaN looks at every operator, wherever it ran."
        raise UsageError("--layer", problem, "Leave it out.")
    if save_repro is not None:
        if save_repro.suffix != ".py":
            raise UsageError(
                "--save-repro", f"{save_repro} is no Python file.", "Give a name that ends in .py."
            )
        for written in (save_repro, save_repro.with_suffix(".pt")):
            check_target(written, files_read(model, running), "--save-repro", "the script or its tensors")
    run_and_report(
        "nan-check",
        model,
        running,
        reporting,
        backward=backward,
        steps=steps,
        optimizer=(optimizer or Optimizer.adamw).value,
        learning_rate=1e-3 if lr is None else lr,
        confirm=confirm,
        what_if=what_if and what_if.value,
        save_repro=save_repro and str(save_repro),
    )
