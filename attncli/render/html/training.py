"""The steps of a training run for the page: what went wrong, lines over the steps, and their numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import Report
from attncli.render.html.colours import scale_of
from attncli.render.html.tables import Table, table
from attncli.render.training import counted, curve, fault_facts, headline, history, training_of
from attncli.render.words import number


class Line(NamedTuple):
    """One number over the steps, in a box of 600 × 100. `parts`: points of unbroken lines; `dots`: of single points.

    `marks`: x of the steps at which it was NaN or Inf. `said`: what the picture shows, in words.
    """

    name: str
    parts: tuple[str, ...]
    dots: tuple[tuple[float, float], ...]
    marks: tuple[float, ...]
    low: str
    high: str
    first: str
    last: str
    said: str


class Trained(NamedTuple):
    title: str
    facts: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    steps: Table | None


def trained(report: Report) -> Trained | None:
    """The view of a training run; None for any other run."""
    training = training_of(report)
    if not training:
        return None
    columns, rows = history(training, _MOST)
    words = tuple(name for name in columns if name in ("", "its name"))
    steps = table(counted(len(rows), "step"), columns, rows, words=words) if len(columns) > 1 else None
    lines = tuple(line for key, name in _DRAWN if (line := _line(training, key, name)) is not None)
    title = headline(training) or f"{counted(int(training.get('seen') or 0), 'step')} watched"
    return Trained(title, tuple(fault_facts(training)), lines, steps)


def _line(training: Mapping[str, Any], key: str, name: str) -> Line | None:
    points = curve(training, key)[-_MOST:]
    finite = [value for _, value in points if math.isfinite(value)]
    if len(points) < 2 or not finite:
        return None
    (first, _), (last, _) = points[0], points[-1]
    scale = scale_of(finite, None, None)
    across = _WIDTH / max(last - first, 1)
    placed = [
        (round((step - first) * across, 1), round(_HEIGHT * (1 - scale.fraction(value)), 1))
        if math.isfinite(value)
        else (round((step - first) * across, 1), None)
        for step, value in points
    ]
    parts = _unbroken(placed)
    marks = tuple(x for x, y in placed if y is None)
    broken = f"; not finite in {counted(len(marks), 'step')}" if marks else ""
    logarithmic = ", on a logarithmic scale" if scale.log else ""
    return Line(
        f"{name}{logarithmic}",
        tuple(" ".join(f"{x},{y}" for x, y in part) for part in parts if len(part) > 1),
        tuple(part[0] for part in parts if len(part) == 1),
        marks,
        number(min(finite)),
        number(max(finite)),
        f"step {first}",
        f"step {last}",
        f"{name} from step {first} to step {last}: between {number(min(finite))} and {number(max(finite))}{broken}",
    )


def _unbroken(placed: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Runs of points between those that are not finite."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in placed:
        if y is not None:
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


# --- tables -------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 600.0, 100.0
_MOST = 500
_DRAWN = (
    ("loss", "loss"),
    ("gradient_norm", "gradient norm"),
    ("loss_scale", "loss scale"),
    ("parameter_absmax", "largest parameter"),
)
