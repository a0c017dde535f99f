"""The options of every command that runs a model: which model, on what, with which batch."""

from __future__ import annotations

import enum
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from attncli.cli.output import Reporting, outlet
from attncli.cli.progress import progress_bar


class Dtype(str, enum.Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


class Autocast(str, enum.Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a GGUF file, a TorchScript or torch.export program, or your code: "
        "pkg.module:build, path/to/file.py:build.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Running:
    """Which layers of which model run on which batch. A field is an option; its name is the setting's."""

    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            "-l",
            metavar="LAYER",
            help="Only these layers, with every metric of every head: a path, a glob, or a layer's number. "
            "Repeatable.",
        ),
    ] = None
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="Run on this text, through the model's tokenizer. Repeatable.",
            rich_help_panel=_BATCH,
        ),
    ] = None
    input: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="Run on these inputs: a .pt, .safetensors, .npz or .json file, or file.py:batch.",
            rich_help_panel=_BATCH,
        ),
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len",
            min=1,
            metavar="N",
            help="Length of the synthetic batch, in tokens (default 128, or what the model asks for).",
            rich_help_panel=_BATCH,
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            metavar="N",
            help="Rows of the synthetic batch (default 2).",
            rich_help_panel=_BATCH,
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            help="Seed of the synthetic batch (default 0).",
            show_default=False,
            rich_help_panel=_BATCH,
        ),
    ] = 0
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="CHECKPOINT",
            help="Load this checkpoint into the model that your code builds.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict",
            help="Whether missing and unexpected keys of --weights are an error.",
            rich_help_panel=_MODEL,
        ),
    ] = True
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run the Python code that lies in the model folder.",
            rich_help_panel=_MODEL,
        ),
    ] = False
    train_mode: Annotated[
        bool,
        typer.Option("--train-mode", help="Run in training mode, with dropout.", rich_help_panel=_MODEL),
    ] = False
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto (default: a GPU where there is one), cpu, cuda, cuda:N or mps.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Convert the model: float16, bfloat16, float32 or float64.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    autocast: Annotated[
        Autocast | None,
        typer.Option(
            "--autocast",
            metavar="DTYPE",
            help="Run under autocast: float16 or bfloat16.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map",
            metavar="MAP",
            help="Spread a large model over devices and disk: auto.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    offload_folder: Annotated[
        Path | None,
        typer.Option(
            "--offload-folder",
            metavar="FOLDER",
            help="Where --device-map puts what fits no memory.",
            rich_help_panel=_MODEL,
        ),
    ] = None


def run_and_report(command: str, model: str, running: Running, reporting: Reporting, **own: Any) -> None:
    """Runs the model, writes the report and leaves with its exit code.

    `own`: settings of this command alone, by their names in the API. What the user's own code prints goes to
    stderr: stdout carries the report alone.
    """
    from attncli import api

    ends = outlet(reporting, files_read(model, running))
    with progress_bar(reporting.quiet) as progress, redirect_stdout(sys.stderr):
        settings = {**_settings(running), **own}
        if command == "nan-check":
            settings.pop("layers")
            report = api.nan_check_model(model, **settings, progress=progress)
        elif command == "check":
            report = api.check_model(model, **settings, progress=progress)
        else:
            report = api.measure_model(command, model, **settings, progress=progress)
    raise typer.Exit(ends.finish(report, unfolded=bool(running.layer)))


def files_read(model: str, running: Running) -> list[Path]:
    """What the report must not overwrite: the model, its weights and its inputs."""
    named = [model, running.input or "", str(running.weights or "")]
    return [Path(part) for name in named for part in (name, name.rpartition(":")[0]) if part]


def _settings(running: Running) -> dict[str, Any]:
    """The options in the words of the API."""
    return {
        "text": tuple(running.text or ()),
        "input": running.input,
        "seq_len": running.seq_len,
        "batch_size": running.batch_size,
        "seed": running.seed,
        "device": running.device,
        "dtype": running.dtype and running.dtype.value,
        "autocast": running.autocast and running.autocast.value,
        "layers": tuple(running.layer or ()),
        "train_mode": running.train_mode,
        "weights": running.weights and str(running.weights),
        "strict": running.strict,
        "trust_remote_code": running.trust_remote_code,
        "device_map": running.device_map,
        "offload_folder": running.offload_folder and str(running.offload_folder),
    }


# --- panels of the help -------------------------------------------------------------------------------

_MODEL, _BATCH = "Model", "Batch"
