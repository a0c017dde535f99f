"""The report for a person: tables by rich, on a terminal at its width, elsewhere with no name cut short."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from attncli.records import Measurement, Report
from attncli.render.findings import finding_parts, tally
from attncli.render.fitting import table_or_lines
from attncli.render.folds import Fold, folds
from attncli.render.layers import layer_parts
from attncli.render.words import clean, count, number, percent, size

# Wide enough that no row of any checkpoint wraps where the output is not a terminal.
UNBOUNDED = 100_000


def text(report: Report, *, unfolded: bool = False) -> str:
    """The table as plain text without colour and without wrapping: for files, pipes and `print`."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=UNBOUNDED, color_system=None, force_terminal=False, legacy_windows=False
    )
    draw(report, console, unfolded=unfolded)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def draw(report: Report, console: Console, *, unfolded: bool = False) -> None:
    """Draws the whole report on `console`. `unfolded`: one row per layer."""
    for part in _parts(report, unfolded, console):
        console.print(part, highlight=False)


def _parts(report: Report, unfolded: bool, console: Console) -> list[RenderableType]:
    if report.command == "diff":
        from attncli.render import changes

        return changes.change_parts(report, unfolded, console)
    if report.command == "check":
        return _check_parts(report, unfolded, console)
    if report.run is not None:
        return _run_parts(report, unfolded, console)
    parts = _checkpoint_parts(report, unfolded, console)
    return [*parts, *_notes(report.notes), *finding_parts(report), _verdict(report)]


def _run_parts(report: Report, unfolded: bool, console: Console) -> list[RenderableType]:
    from attncli.render import run  # only a forward pass needs its pictures

    if "training" in (report.run or {}):
        return _training_parts(report, console)
    if "operators_by_phase" in (report.run or {}):
        from attncli.render import origins

        return [
            run.run_heading(report, console.width),
            *origins.origin_parts(report),
            *_notes(run.run_notes(report)),
            *finding_parts(report),
            origins.nan_verdict(report, tally(report)),
        ]

    return [
        run.run_heading(report, console.width),
        *run.run_parts(report, console, unfolded=unfolded),
        *_notes(run.run_notes(report)),
        *finding_parts(report),
        *run.unobserved(report),
        run.run_verdict(report, tally(report)),
    ]


def _training_parts(report: Report, console: Console) -> list[RenderableType]:
    from attncli.render import origins, run, steps

    return [
        steps.training_heading(report, console.width),
        *steps.training_parts(report, console),
        *origins.origin_parts(report),
        *_notes(run.run_notes(report)),
        *finding_parts(report),
        steps.training_verdict(report, tally(report)),
    ]


def _check_parts(report: Report, unfolded: bool, console: Console) -> list[RenderableType]:
    from attncli.render import checked, origins, run

    ran = report.run is not None
    return [
        run.run_heading(report, console.width) if ran else Group(_heading(report), Text()),
        checked.summary(report, console),
        *(run.run_parts(report, console, unfolded=True) if unfolded and ran else ()),
        *origins.origin_parts(report),
        *_notes(run.run_notes(report)),
        *finding_parts(report),
        *run.unobserved(report),
        checked.check_verdict(report, tally(report)),
    ]


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    return [Group(*(Text(f"note: {clean(note)}", style="dim") for note in notes))] if notes else []


def _checkpoint_parts(report: Report, unfolded: bool, console: Console) -> list[RenderableType]:
    rows = [Fold((layer,)) for layer in report.layers] if unfolded else folds(report.layers)
    parts: list[RenderableType] = [_heading(report)]
    if rows:
        parts.extend(layer_parts(rows, console))
    bounds = _bound_part(report, unfolded, console)
    if bounds is not None:
        parts.append(bounds)
    values = _value_part(report, unfolded, console)
    if values is not None:
        parts.append(values)
    return parts


# --- heading and verdict ------------------------------------------------------------------------------


def _heading(report: Report) -> Text:
    source = report.source
    files = source.get("files", 1)
    line = Text()
    line.append(clean(source.get("path", "")), style="bold")
    facts = [
        clean(source.get("format", "")),
        f"{files} file{'s' if files != 1 else ''}",
        size(int(source.get("bytes", 0))),
        f"{count(int(source.get('parameters', 0)))} parameters",
    ]
    line.append("  " + " · ".join(facts))
    return line


def _verdict(report: Report) -> Text:
    attention = [layer for layer in report.layers if layer.kind is not None]
    others = len(report.layers) - len(attention)
    listed = f", {others} other sequence layer{'s' if others != 1 else ''}" if others else ""
    seen = f"{len(attention)} attention layer{'s' if len(attention) != 1 else ''}{listed}"
    if not report.looked:
        if report.findings:
            return Text(f"No attention layer was found{listed}; {tally(report)}.", style="bold red")
        return Text(f"Not observed: no attention layer was found{listed}.", style="bold yellow")
    if not report.findings:
        return Text(f"{seen}; {tally(report)}.", style="bold green")
    style = {"error": "bold red", "warning": "bold yellow", "note": "bold"}[report.findings[0].severity]
    return Text(f"{seen}; {tally(report)}.", style=style)


# --- bounds and values --------------------------------------------------------------------------------


def _bound_part(report: Report, unfolded: bool, console: Console) -> RenderableType | None:
    by_layer: dict[str, dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    for row in report.measurements:
        if row.metric.startswith(("score_", "overflow_")):
            by_layer[row.layer][row.metric].append(row)
    if not by_layer:
        return None
    rows = []
    for layer, metrics in by_layer.items():
        bounds = [
            (float(r.value), r.head) for r in metrics["score_bound"] if isinstance(r.value, (int, float))
        ]
        if not bounds:
            continue
        typical = {r.head: r.value for r in metrics["score_typical"]}
        # Where nothing bounds any head, the head that is typically largest speaks for the layer.
        worst = max(bounds, key=lambda pair: (pair[0], _or_zero(typical.get(pair[1]))))
        for bound, head in bounds if unfolded else [worst]:
            rows.append(
                [
                    Text(clean(layer)),
                    Text(str(head)),
                    Text(number(bound) if math.isfinite(bound) else "no bound"),
                    Text(number(typical.get(head))),
                    *(_safety(metrics, dtype) for dtype in _DTYPES),
                ]
            )
    title = "What q·k can become before scaling, from the weights alone"
    title += "" if unfolded else ": the worst head of each layer (--layer shows all)"
    columns = ("layer", "head", "largest |q·k|", "typical (RMS)", *_DTYPES)
    return Group(Text(title, style="bold"), table_or_lines(columns, rows, console, left=_DTYPES))


def _or_zero(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _safety(metrics: dict[str, list[Measurement]], dtype: str) -> Text:
    rows = metrics.get(f"overflow_{dtype}")
    verdict = str(rows[0].value) if rows else "unknown"
    return Text(verdict, style={"proven safe": "green"}.get(verdict, "yellow"))


def _value_part(report: Report, unfolded: bool, console: Console) -> RenderableType | None:
    per_tensor: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in report.measurements:
        if row.metric in ("nan_count", "inf_count", "absmax", "rms", "zero_fraction"):
            per_tensor[row.layer][row.metric] = row.value
    if not per_tensor:
        return None
    nan = sum(int(v.get("nan_count") or 0) for v in per_tensor.values())
    inf = sum(int(v.get("inf_count") or 0) for v in per_tensor.values())
    broken = [n for n, v in per_tensor.items() if v.get("nan_count") or v.get("inf_count")]
    largest = sorted(per_tensor, key=lambda n: -float(per_tensor[n].get("absmax") or 0.0))
    ours = {tensor.name for layer in report.layers for tensor in layer.tensors}
    theirs = [n for n in per_tensor if n in ours or n in broken]
    shown = theirs if unfolded else [*broken[:10], *[n for n in largest if n not in broken][:5]]
    title = f"Values of {len(per_tensor)} tensor{'' if len(per_tensor) == 1 else 's'}: {nan} NaN, {inf} Inf"
    title += " (those of the layers shown)" if unfolded else " (those with NaN or Inf, then the largest)"
    rows = []
    for name in shown:
        v = per_tensor[name]
        counts = [str(v.get("nan_count", "")), str(v.get("inf_count", ""))]
        numbers = [number(v.get("absmax")), number(v.get("rms")), percent(v.get("zero_fraction"))]
        rows.append([Text(clean(name)), *map(Text, counts), *map(Text, numbers)])
    columns = ("tensor", "NaN", "Inf", "largest |w|", "RMS", "zeros")
    return Group(Text(title, style="bold"), table_or_lines(columns, rows, console))


# --- tables -------------------------------------------------------------------------------------------

_DTYPES = ("float16", "bfloat16", "float32")
