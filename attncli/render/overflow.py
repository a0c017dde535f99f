"""How near the scores of each layer come to overflow: its worst head, the scale, the headroom in bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from attncli.records import Call, Finding
from attncli.render import calls
from attncli.render.calls import Block, Row, Value, full_label
from attncli.render.fitting import table_or_lines
from attncli.render.words import number


def headroom_part(rows: Sequence[Row], findings: Sequence[Finding], console: Console) -> list[RenderableType]:
    """A table per block: one row per call, with the head of the largest |q·k| and that of the largest score."""
    title = "Largest |q·k|, largest score, and the bits of headroom in each dtype"
    note = "bits: log2(largest number of the dtype / |q·k|); q·k overflows where they are below 0"
    parts = [Group(Text(title, style="bold"), Text(note, style="dim"))]
    tables = [
        Group(*calls.headline(block, _facts, console.width), _table(block, console))
        for block in calls.blocks(rows, console.width)
    ]
    return [*parts, *tables, *_sentences(rows, findings)]


def scale_words(call: Call) -> str:
    """ "scale 1/√64", "scale 0.5 = 4 × 1/√64", or that it was not recovered."""
    if call.scale is None:
        return "scale not recovered"
    if not call.head_dim:
        return f"scale {number(call.scale)}"
    usual = f"1/√{call.head_dim}"
    ratio = call.scale * math.sqrt(call.head_dim)
    if math.isclose(ratio, 1, rel_tol=1e-3):
        return f"scale {usual}"
    return f"scale {number(call.scale)} = {number(ratio)} × {usual}"


def bits(value: Value) -> Text:
    """Headroom with its sign; red where it overflows, yellow below one bit."""
    if not isinstance(value, (int, float)):
        return Text("—", style="dim")
    if not math.isfinite(value):
        return Text(str(value), style="" if value > 0 else "bold red")
    if value < 0:
        return Text(f"{min(value, -0.1):.1f}", style="bold red")  # never "-0.0"
    return Text(f"{value:+.1f}", style="yellow" if value < 1 else "")


# --- tables -------------------------------------------------------------------------------------------


def _facts(call: Call) -> list[str]:
    return [
        calls.kind(call),
        f"{scale_words(call)} {_where(call)}".strip(),
        _stored(call),
        *calls.design(call),
    ]


def _where(call: Call) -> str:
    """Where a factor other than 1 was applied: "on q before the product"."""
    places = [_PLACES.get(place, place) for place, factor in call.factors.items() if factor != 1]
    return " and ".join(places)


def _stored(call: Call) -> str:
    if call.stored == "nothing":
        return f"q·k never stored ({calls.kernel(call)})"
    return f"q·k stored {'unscaled' if call.stored == 'raw' else 'scaled'} in {call.scores_dtype}"


def _table(block: Block, console: Console) -> RenderableType:
    rows = []
    for row, label in zip(block.rows, block.labels, strict=True):
        dot, dot_head = _largest(row, "dot_absmax")
        score, score_head = _largest(row, "score_max")
        values = row.heads.get(dot_head, {}) if dot_head is not None else {}
        rows.append(
            [
                Text(label),
                Text(number(dot), style="bold red" if dot is not None and not math.isfinite(dot) else ""),
                Text("" if dot_head is None else str(dot_head)),
                Text(number(score)),
                Text("" if score_head is None else str(score_head)),
                *(bits(values.get(f"headroom_bits_{dtype}")) for dtype in _DTYPES),
            ]
        )
    columns = (block.noun, "|q·k|", "head", "score", "head", *_DTYPES)
    return table_or_lines(columns, rows, console)


def _largest(row: Row, metric: str) -> tuple[float | None, int | None]:
    """The largest number of all heads, and the head; NaN is larger than any, since nothing else may hide it."""
    numbers = row.numbers(metric)
    if not numbers:
        return None, None
    head = max(numbers, key=lambda h: math.inf if math.isnan(numbers[h]) else numbers[h])
    head = next((h for h, value in numbers.items() if math.isnan(value)), head)
    return numbers[head], head


# --- sentences ----------------------------------------------------------------------------------------


def _sentences(rows: Sequence[Row], findings: Sequence[Finding]) -> list[RenderableType]:
    """One for each call with less than a bit left, unless a finding says it; alike ones once."""
    told = {finding.layer for finding in findings if "q·k" in finding.message}
    counted: dict[str, list[str]] = {}
    for row in rows:
        sentence = "" if row.call.layer in told else _sentence(row, rows)
        if sentence:
            shape = "".join(c for c in sentence if not c.isdigit())
            counted.setdefault(shape, []).append(sentence)
    lines: list[RenderableType] = []
    for alike in counted.values():
        line = Text(alike[0])
        if len(alike) > 1:
            line.append(f" (and {len(alike) - 1} more like it)", style="dim")
        lines.append(line)
    return [*lines, Text()] if lines else []


def _sentence(row: Row, rows: Sequence[Row]) -> str:
    dot, head = _largest(row, "dot_absmax")
    if dot is None or head is None or math.isnan(dot):
        return ""
    left = {dtype: row.heads[head].get(f"headroom_bits_{dtype}") for dtype in _DTYPES}
    short = [d for d, bits_left in left.items() if isinstance(bits_left, (int, float)) and bits_left < 1]
    if not short:
        return ""
    over = [dtype for dtype in short if float(left[dtype] or 0) < 0]
    words = [f"{full_label([row], rows)} head {head}: q·k reaches {number(dot)}"]
    words += [_overflow(row.call, dtype, dot) for dtype in over]
    words += [f"within one bit of the largest {dtype}" for dtype in short if dtype not in over]
    safe = [dtype for dtype in _DTYPES if dtype not in short and left[dtype] is not None]
    words += [f"safe in {safe[0]}"] if safe and over else []
    return "; ".join(words) + "."


def _overflow(call: Call, dtype: str, dot: float) -> str:
    """What becomes of a product beyond the dtype in this call: it depends on what the product writes."""
    if call.stored == "nothing":
        return f"would overflow {dtype} if it were stored, which this kernel never does"
    verb = "overflows" if call.scores_dtype == dtype else "would overflow"
    if call.stored == "raw":
        return f"{verb} {dtype} before scaling"
    before = math.prod(call.factors.get(place, 1.0) for place in ("query", "key"))
    if dot * abs(before) < _MAXIMA[dtype]:
        return f"would overflow {dtype} without the scale that comes before the product"
    return f"{verb} {dtype} although it is scaled first"


# --- tables -------------------------------------------------------------------------------------------

_DTYPES = ("float16", "bfloat16", "float32")
_PLACES = {
    "query": "on q before the product",
    "key": "on k before the product",
    "scores": "after the product",
    "kernel": "in the kernel",
}
# Largest finite numbers. Source: IEEE 754; bfloat16 has the exponent of float32 and 8 bits of significand.
_MAXIMA = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
