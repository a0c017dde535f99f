"""The layers × heads picture: its metrics, its numbers for the script, and the same without a script."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import Call, Finding, Layer, Report
from attncli.render import calls
from attncli.render.calls import Block, Row, Value, call_rows
from attncli.render.html.colours import Scale, image, scale_of
from attncli.render.html.findings import heads_of
from attncli.render.html.tables import Cell, Table, table, value_cell
from attncli.render.words import clean, number


class Metric(NamedTuple):
    """One number of a head. `low`, `high`: ends of the scale where they do not follow from the numbers.

    `dark`, `bright`: what those ends mean. `overflows`: below 0 is beyond the dtype.
    """

    key: str
    name: str
    unit: str
    low: float | None
    high: float | None
    dark: str
    bright: str
    overflows: bool = False


class Static(NamedTuple):
    """One metric of one block as an image, with its scale in words."""

    title: str
    source: str
    width: int
    height: int
    low: str
    high: str


class Picture(NamedTuple):
    """`data`: what the script draws. `titles`, `notes`: of each block. `images`, `numbers`: without a script."""

    data: Mapping[str, Any]
    blocks: tuple[tuple[str, str], ...]
    metrics: tuple[Metric, ...]
    images: tuple[Static, ...]
    numbers: tuple[Table, ...]


def picture(report: Report) -> Picture | None:
    """The picture of all blocks of layers; None where no head has a number."""
    rows = [*call_rows(report), *_weight_rows(report)]
    metrics = [metric for metric in METRICS if any(row.numbers(metric.key) for row in rows)]
    blocks = [block for block in calls.blocks(rows, _WIDTH) if any(row.heads for row in block.rows)]
    if not metrics or not blocks:
        return None
    scales = {metric.key: _scale(metric, rows) for metric in metrics}
    marks = _marks(report.findings)
    titles = [_titled(block) for block in blocks]
    return Picture(
        {
            "metrics": [_metric_data(metric, scales[metric.key]) for metric in metrics],
            "blocks": [
                _block_data(block, title, metrics, marks)
                for block, (title, _) in zip(blocks, titles, strict=True)
            ],
        },
        tuple(titles),
        tuple(metrics),
        tuple(
            _static(block, title, metric, scales[metric.key])
            for metric in metrics
            for block, (title, _) in zip(blocks, titles, strict=True)
        ),
        tuple(
            made
            for block, (title, _) in zip(blocks, titles, strict=True)
            for made in _numbers(block, title, metrics)
        ),
    )


def compact(value: Value) -> Value:
    """A number with the digits that the page shows; not finite ones as words; None for what is no number."""
    if not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return int(value)
    return float(f"{value:.{6 if abs(value) >= 1e4 else 4}g}")


# --- rows ---------------------------------------------------------------------------------------------


def _weight_rows(report: Report) -> list[Row]:
    """A row for each layer whose heads have numbers from the weights; its call is only a place for them."""
    heads: dict[str, dict[int, dict[str, Value]]] = defaultdict(lambda: defaultdict(dict))
    for item in report.measurements:
        if item.call is None and item.head is not None:
            heads[item.layer][item.head][item.metric] = item.value
    layers = {layer.id: layer for layer in report.layers}
    return [
        Row(_unrun(layers[name], _UNRUN + at), layers[name], {head: of[head] for head in sorted(of)}, {})
        for at, (name, of) in enumerate(heads.items())
        if name in layers
    ]


def _unrun(layer: Layer, index: int) -> Call:
    heads = layer.heads or 0
    return Call(
        index, layer.id, layer.path, "", layer.kind, "softmax", 0, heads, layer.kv_heads or heads, 0, 0,
        layer.head_dim, "", "", "nothing", layer.scale,
    )  # fmt: skip


def _titled(block: Block) -> tuple[str, str]:
    """The title of a block, and what is true of all of its rows."""
    said = [_facts(row.call) for row in block.rows]
    shared = [fact for fact in said[0] if all(fact in other for other in said)]
    kinds = list(dict.fromkeys(row.call.kind for row in block.rows))
    title = clean(block.title) or (" and ".join(f"{kind}-attention" for kind in kinds if kind) or "attention")
    return title, " · ".join(shared)


def _facts(call: Call) -> list[str]:
    if call.index >= _UNRUN:
        return [calls.kind(call), calls.heads(call), "from the weights alone"]
    words = [calls.kind(call), calls.mask(call), calls.size(call), calls.heads(call), calls.kernel(call)]
    return [clean(word) for word in (*words, *calls.design(call)) if word]


# --- numbers for the script ---------------------------------------------------------------------------


def _scale(metric: Metric, rows: Sequence[Row]) -> Scale:
    values = [value for row in rows for value in row.numbers(metric.key).values()]
    if metric.key == "entropy":
        # The most that any call allows, so that the colour compares calls of one run.
        return scale_of(values, 0.0, max((math.log(max(row.call.keys, 2)) for row in rows), default=1.0))
    return scale_of(values, metric.low, metric.high)


def _metric_data(metric: Metric, scale: Scale) -> dict[str, Any]:
    return {
        **metric._asdict(),
        "low": compact(scale.low),
        "high": compact(scale.high),
        "log": scale.log,
    }


def _block_data(
    block: Block, title: str, metrics: Sequence[Metric], marks: Mapping[str, Sequence[Finding]]
) -> dict[str, Any]:
    rows = []
    for row, label in zip(block.rows, block.labels, strict=True):
        found = marks.get(row.call.layer, ())
        cells: dict[int, list[str]] = defaultdict(list)
        whole: list[str] = []
        for finding in found:
            words = clean(f"{finding.severity} {finding.code} {finding.name}")
            heads = heads_of(finding)
            for head in heads:
                cells[head] += [words] if words not in cells[head] else []
            whole += [words] if not heads and words not in whole else []
        listed = _heads(row)
        rows.append(
            {
                "label": label,
                "name": f"{block.noun} {label}" if block.noun and label else label,
                "path": calls.path(row),
                "facts": " · ".join(_facts(row.call)),
                "heads": listed,
                "whole": whole,
                "cells": cells,
                "values": {
                    metric.key: [compact(row.heads.get(head, {}).get(metric.key)) for head in listed]
                    for metric in metrics
                },
            }
        )
    return {"title": title, "noun": block.noun, "heads": _most_heads(block), "rows": rows}


def _heads(row: Row) -> list[int]:
    """The heads of a row, those that were not measured as well."""
    return sorted({*row.heads, *range(min(row.call.heads, _MOST_HEADS))})


def _most_heads(block: Block) -> int:
    return 1 + max((head for row in block.rows for head in _heads(row)), default=0)


def _marks(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    by_layer: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.layer is not None:
            by_layer[finding.layer].append(finding)
    return by_layer


# --- the same without a script ------------------------------------------------------------------------


def _static(block: Block, title: str, metric: Metric, scale: Scale) -> Static:
    heads = _most_heads(block)
    rows = [[row.heads.get(head, {}).get(metric.key) for head in _heads(row)] for row in block.rows]
    size = max(4, min(16, 640 // heads))
    unit = f" {metric.unit}" if metric.unit else ""
    return Static(
        f"{metric.name}, {title}",
        image(rows, scale),
        size * heads,
        size * len(rows),
        f"{number(scale.low)}{unit}",
        f"{number(scale.high)}{unit}",
    )


def _numbers(block: Block, title: str, metrics: Sequence[Metric]) -> list[Table]:
    """Every number where they are few; otherwise the least, mean and most of each row."""
    heads = sorted({head for row in block.rows for head in row.heads})
    first = block.noun or "layer"
    labels = [label or calls.path(row) for row, label in zip(block.rows, block.labels, strict=True)]
    if len(heads) * len(block.rows) * len(metrics) <= _ALL_NUMBERS:
        bands = [heads[at : at + _BAND] for at in range(0, len(heads), _BAND)]
        return [
            table(
                f"{metric.name}{f' ({metric.unit})' if metric.unit else ''}, {title}",
                (first, *map(str, band)),
                [
                    [label, *(value_cell(row.heads.get(head, {}).get(metric.key)) for head in band)]
                    for row, label in zip(block.rows, labels, strict=True)
                ],
                note=f"A column per head, {band[0]} to {band[-1]} of {len(heads)}.",
            )
            for metric in metrics
            for band in bands
        ]
    note = "Of all heads of a row: the least, the mean and the largest number. --format json has all numbers."
    return [
        table(
            title,
            (first, *(metric.name for metric in some)),
            [
                [label, *(_range(row, metric) for metric in some)]
                for row, label in zip(block.rows, labels, strict=True)
            ],
            note=note,
        )
        for some in (metrics[at : at + _BAND // 2] for at in range(0, len(metrics), _BAND // 2))
    ]


def _range(row: Row, metric: Metric) -> Cell:
    numbers = list(row.numbers(metric.key).values())
    known = [value for value in numbers if not math.isnan(value)]
    broken = len(numbers) - len(known)
    words = f"{broken} NaN" if broken else ""
    if known:
        mean = math.fsum(known) / len(known) if all(map(math.isfinite, known)) else math.nan
        middle = "" if math.isnan(mean) else f" · {number(mean)}"
        words = f"{number(min(known))}{middle} · {number(max(known))}{f', {words}' if words else ''}"
    return Cell(words or "—", "bad" if broken else "")


# --- tables -------------------------------------------------------------------------------------------

_WIDTH = 120  # of the paths that may share a block, in characters
_UNRUN = 10**9  # no run has as many calls
_ALL_NUMBERS = 4000
_BAND = 12  # heads beside each other in a table, as paper holds them
_MOST_HEADS = 4096  # more than any model has: a broken config shall not fill the page
_HEADROOM = ("near overflow", "far from overflow", True)
METRICS: tuple[Metric, ...] = (
    Metric("entropy_ratio", "H/ln n", "", 0.0, 1.0, "on one key", "on all alike"),
    Metric("entropy", "entropy", "nats", 0.0, None, "on one key", "on all alike"),
    Metric("entropy_rest", "entropy besides the sink", "nats", 0.0, None, "on one key", "on many"),
    Metric("score_max", "largest score", "", None, None, "smallest", "largest"),
    Metric("dot_absmax", "largest |q·k|", "", None, None, "smallest", "largest"),
    Metric("headroom_bits_float16", "headroom in float16", "bits", 0.0, 16.0, *_HEADROOM),
    Metric("headroom_bits_bfloat16", "headroom in bfloat16", "bits", 0.0, 128.0, *_HEADROOM),
    Metric("headroom_bits_float32", "headroom in float32", "bits", 0.0, 128.0, *_HEADROOM),
    Metric("sink_mass", "sink mass", "", 0.0, 1.0, "none on one key", "all on one key"),
    Metric("reach", "mean reach", "tokens", 0.0, None, "near", "far"),
    Metric("score_std", "spread of the scores", "", None, None, "smallest", "largest"),
    Metric("score_bound", "bound of |q·k| by the weights", "", None, None, "smallest", "largest"),
    Metric("score_typical", "typical |q·k| by the weights", "", None, None, "smallest", "largest"),
)
