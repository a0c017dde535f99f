"""The options of every command that reads checkpoints: how much of them, and what neither config nor shapes tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Reading:
    """A field is an option; its name is the setting's."""

    values: Annotated[
        bool,
        typer.Option(
            "--values", help="Read all weights: NaN, Inf, zeros, largest magnitude and RMS per tensor."
        ),
    ] = False
    bounds: Annotated[
        bool, typer.Option("--bounds", help="Bound |q·k| per head from the weights: can scores overflow?")
    ] = False
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads", min=1, metavar="N", help="Query heads, where neither config nor shapes tell."
        ),
    ] = None
    kv_heads: Annotated[
        int | None,
        typer.Option(
            "--kv-heads", min=1, metavar="N", help="KV heads, where neither config nor shapes tell."
        ),
    ] = None
    head_dim: Annotated[
        int | None,
        typer.Option(
            "--head-dim", min=1, metavar="N", help="Head size, where neither config nor shapes tell."
        ),
    ] = None
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            "-l",
            metavar="LAYER",
            help="Only these layers, shown one by one: a path, a glob, or a layer's number. Repeatable.",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """The options in the words of the API."""
        return {
            "values": self.values,
            "bounds": self.bounds,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "layers": self.layer or (),
        }
