"""The report that the API hands out, and what all pipelines say of their surroundings."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attncli import records
from attncli.errors import UsageError
from attncli.records import Layer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# Called with (what is being done, done so far, total), as often as the work likes.
Progress = Callable[[str, int, int], None]


class Report(records.Report):
    """A report that prints itself as the table."""

    def __str__(self) -> str:
        from attncli.render import table

        return table.text(self)

    def __repr__(self) -> str:
        return f"<attncli.Report: {self.source.get('path')}, {len(self.layers)} layers, {self.verdict}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from attncli.render import table

        table.draw(self, console)
        return ()


def matching(layers: tuple[Layer, ...], patterns: Sequence[str], subject: str) -> tuple[Layer, ...]:
    if not patterns:
        return layers
    kept = tuple(layer for layer in layers if any(fits(layer, pattern) for pattern in patterns))
    if not kept:
        wanted = ", ".join(patterns)
        example = f"Paths look like {layers[0].path}." if layers else "No attention layer was found at all."
        raise UsageError(subject, f"no layer matches --layer {wanted}.", example)
    return kept


def without_match(what: str, patterns: Sequence[str], matches: Callable[[str], bool]) -> tuple[str, ...]:
    """The note about patterns of --layer that no `what` matches, where others do match; () where all do."""
    idle = [pattern for pattern in dict.fromkeys(patterns) if not matches(pattern)]
    return (f"no {what} matches --layer {', '.join(idle)}",) if idle else ()


def fits(layer: Layer, pattern: str) -> bool:
    """A glob on the path, or a bare number for the layer of that index in any stack."""
    if pattern.isdecimal():
        return layer.index == int(pattern)
    return fnmatch.fnmatchcase(layer.path, pattern) or layer.path == pattern


def environment() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__) if torch is not None else None,
        "device": "cpu" if torch is not None else None,
        "dtype": None,
        "platform": f"{sys.platform}-{os.uname().machine if hasattr(os, 'uname') else 'unknown'}",
    }


def with_findings(
    report: Report,
    findings: Sequence[records.Finding],
    *,
    known: Sequence[records.Finding] = (),
    notes: Sequence[str] = (),
) -> Report:
    """The same report with other findings: what is left after --select, --ignore and --baseline."""
    return replace(report, findings=tuple(findings), known=tuple(known), notes=(*report.notes, *notes))
