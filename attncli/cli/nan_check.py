"""`attncli nan-check MODEL`, `attncli nan-check SCRIPT.py [args…]` and `attncli nan-check --replay DIR`."""

from __future__ import annotations

import enum
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from attncli.cli.flattened import flattened
from attncli.cli.model_options import Dtype, Running, files_read, run_and_report
from attncli.cli.output import Reporting, check_target
from attncli.cli.script import Script
from attncli.cli.script_options import SCRIPT, Watching
from attncli.cli.watching import replay_and_report, watch_and_report
from attncli.errors import UsageError


class Optimizer(str, enum.Enum):
    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"
    rmsprop = "rmsprop"
    adagrad = "adagrad"


@flattened
def nan_check(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL | SCRIPT.py [ARGS]...",
            help="A model folder, a GGUF file, a TorchScript or torch.export program, or your code: "
            "pkg.module:build, path/to/file.py:build. Or a training script, run as python would run it; what stands "
            "behind it is its own.",
            show_default=False,
        ),
    ] = None,
    *,
    running: Running,
    reporting: Reporting,
    watching: Watching,
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

    Of a model: every operator of the forward pass, the backward pass and the optimiser is looked at; what is bad in the
    outputs, the loss, the gradients or the parameters is traced back to the operator, parameter, input or
    update it came from. The step is then repeated with that one thing changed. A healthy model gives exit
    code 0 and the room that is left.

    Of a training script: it runs unchanged and is watched. A step that goes wrong is stopped before its update,
    repeated and reported, with exit code 1; otherwise the exit code is the script's own, or 3 where no training step
    was seen.
    """
    script: Script | None = context.meta.get(SCRIPT)
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    _only_for(script is not None, watching.replay is not None, given, context)
    if script is not None:
        raise typer.Exit(watch_and_report(script, watching, reporting, confirm=confirm))
    if watching.replay is not None:
        raise typer.Exit(replay_and_report(watching, running.device, reporting, confirm=confirm))
    if model is None:
        raise UsageError(
            "nan-check",
            "there is nothing to look at.",
            "Give a model, a training script, -m MODULE or --replay DIR.",
        )
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


def _only_for(is_script: bool, is_capsule: bool, given: set[str], context: typer.Context) -> None:
    """Options that mean nothing for what is looked at are a mistake. Errors: UsageError."""
    kind = "a training script" if is_script else "a capsule" if is_capsule else "a model"
    fits = _OF_SCRIPTS if is_script else _OF_CAPSULES if is_capsule else set(context.params) - _OF_ALL_SCRIPTS
    strange = sorted(given - fits - _OF_REPORTS)
    if strange:
        options = {
            parameter.name: max(parameter.opts, key=len)
            for parameter in context.command.params
            if parameter.param_type_name == "option"
        }
        named = options.get(strange[0], strange[0])
        remedy = "Leave it out." if is_script or is_capsule else "Give a training script, or leave it out."
        raise UsageError(named, f"this option means nothing for {kind}.", remedy)


# --- tables -------------------------------------------------------------------------------------------

_OF_REPORTS = {item.name for item in fields(Reporting)}
_OF_ALL_SCRIPTS = {item.name for item in fields(Watching)}
_OF_SCRIPTS = {"model", "confirm", "log", "every", "tensorboard", "go_on", "capsule", "module"}
_OF_CAPSULES = {"model", "replay", "trust", "device", "confirm"}
