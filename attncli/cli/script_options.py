"""The options of `nan-check` for training scripts, and which words of a command line are the script's own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from attncli.cli.help import Command
from attncli.cli.output import Reporting
from attncli.cli.script import Script

SCRIPT = "attncli.script"  # where the context keeps what was split off


@dataclass(frozen=True)
class Watching:
    """How a training script is watched. A field is an option; its name is the setting's."""

    log: Annotated[
        Path | None,
        typer.Option(
            "--log",
            metavar="FILE.jsonl",
            help="One JSON line per sampled step: loss, gradient norm, and per head entropy, largest score and "
            "headroom.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    every: Annotated[
        int,
        typer.Option(
            "--every",
            min=0,
            metavar="N",
            help="Measure the attention of every Nth step (default 50; 0: never). Early warnings need 6 of them.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = 50
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            "--tensorboard",
            metavar="DIR",
            help="The same for TensorBoard.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    go_on: Annotated[
        bool,
        typer.Option(
            "--continue",
            help="Let the script go on after a fault, as it would without the watch.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    capsule: Annotated[
        Path | None,
        typer.Option(
            "--capsule",
            metavar="DIR",
            help="Write the faulty step to this folder: weights, batch, random state, operators.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="DIR",
            help="Repeat the step of a capsule, here and without the script.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="For --replay: import the libraries that the capsule's own operators come from.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    module: Annotated[
        str | None,
        typer.Option(
            "-m",
            metavar="MODULE",
            help="Run this module as a script, as python -m does; what follows is its own.",
            rich_help_panel=_PANEL,
        ),
    ] = None


class ScriptCommand(Command):
    """A command whose words behind a script belong to the script."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own, script = split(self.params, list(args))
        ctx.meta[SCRIPT] = script
        rest: list[str] = super().parse_args(ctx, own)
        return rest


def split(params: Any, words: list[str]) -> tuple[list[str], Script | None]:
    """The words of the command itself, and the script with its own."""
    takes_value = {
        name: not parameter.is_flag
        for parameter in params
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    of_scripts = {one.name for kind in (Watching, Reporting) for one in fields(kind)}
    ours = {name for parameter in params if parameter.name in of_scripts for name in parameter.opts}

    def strayed(args: list[str]) -> tuple[str, ...]:
        names = (word.partition("=")[0] for word in args)
        return tuple(name for name in names if name.startswith("--") and name in ours)

    at = 0
    while at < len(words):
        word = words[at]
        if word == "-m" and at + 1 < len(words):
            args = words[at + 2 :]
            script = Script(words[at + 1], tuple(args), True, strayed(args))
            return [*words[:at], "-m", words[at + 1]], script
        if word == "--":
            at += 1
            continue
        if word.startswith("-") and len(word) > 1:
            at += 2 if takes_value.get(word, False) else 1
            continue
        if word.endswith(".py"):
            args = words[at + 1 :]
            return [*words[:at], word], Script(word, tuple(args), strayed=strayed(args))
        at += 1
    return words, None


_PANEL = "Training script"
