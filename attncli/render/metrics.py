"""Every head of the chosen layers with every metric, for `--layer`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from attncli.records import Call
from attncli.render import calls
from attncli.render.calls import Row, Value, full_label
from attncli.render.fitting import packed
from attncli.render.overflow import bits, scale_words
from attncli.render.words import clean, number

# A heading and a cell per head, each with its style.
Column = Sequence[tuple[str, str]]


def every_head(rows: Sequence[Row], console: Console) -> list[RenderableType]:
    """Per call: what it is in lines, then a row per head; the columns go on in further tables where needed."""
    parts: list[RenderableType] = []
    for row in rows:
        facts = [clean(fact) for fact in (*_call_facts(row.call), *_whole(row))]
        lines = packed(facts, console.width - 2)
        title = Text(full_label([row], rows), style="bold")
        parts.append(Group(title, *(Text(f"  {line}") for line in lines)))
        parts.append(Group(*_tables(row, console.width)))
    return parts


def _call_facts(call: Call) -> list[str]:
    facts = [
        calls.kind(call),
        f"{call.batch} × {calls.heads(call)}" if call.batch != 1 else calls.heads(call),
        f"{call.queries} queries × {call.keys} keys",
        "" if call.head_dim is None else f"head size {call.head_dim}",
        calls.mask(call),
        f"{calls.kernel(call)} in {call.dtype}",
        "" if call.scores_dtype == call.dtype else f"scores in {call.scores_dtype}",
        *calls.design(call),
        scale_words(call),
        *(f"{place} × {number(factor)}" for place, factor in call.factors.items()),
        *(f"{side} from {', '.join(sources)}" for side, sources in _sources(call) if sources),
        "" if call.module in ("", call.layer) else f"module {call.module}",
        call.source or "",
    ]
    return [fact for fact in facts if fact]


def _sources(call: Call) -> Iterable[tuple[str, tuple[str, ...]]]:
    return (("q", call.query_sources), ("k", call.key_sources), ("v", call.value_sources))


def _whole(row: Row) -> list[str]:
    """The numbers that belong to the call, or that all of its heads share."""
    own = {name: value for name, value in row.whole.items() if value is not None and name not in _SAID}
    shared = {name: value for name in _COUNTS if (value := _same(row, name)) is not None}
    return [f"{name} {number(value)}" for name, value in {**own, **shared}.items()]


def _same(row: Row, metric: str) -> Value:
    values = {values.get(metric) for values in row.heads.values()}
    return values.pop() if len(values) == 1 else None


def _tables(row: Row, width: int) -> list[Text]:
    """Lines of right-aligned numbers; columns beyond `width` follow in a further band, with the heads again."""
    names = list(dict.fromkeys(name for values in row.heads.values() for name in values))
    names.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    names = [name for name in names if name not in _COUNTS or _same(row, name) is None]
    if not names:
        return [Text("  no numbers", style="yellow")]
    heads = [("head", ""), *((str(head), "") for head in row.heads)]
    columns = [
        [(_SHORT.get(name, clean(name)), ""), *(_cell(name, of.get(name)) for of in row.heads.values())]
        for name in names
    ]
    lines: list[Text] = []
    for band in _banded(columns, width - _width(heads)):
        shown = [(column, _width(column)) for column in (heads, *band)]
        for at in range(len(heads)):
            parts = [(f"{column[at][0]:>{wide}}", column[at][1]) for column, wide in shown]
            lines.append(Text.assemble(*parts, style="" if at else "dim", no_wrap=True, overflow="ignore"))
        lines.append(Text())
    return lines


def _banded(columns: Sequence[Column], width: int) -> list[list[Column]]:
    bands: list[list[Column]] = []
    left = 0
    for column in columns:
        if not bands or left < _width(column):
            bands.append([])
            left = width
        bands[-1].append(column)
        left -= _width(column)
    return bands


def _width(column: Column) -> int:
    return 2 + max(len(text) for text, _ in column)


def _cell(name: str, value: Value) -> tuple[str, str]:
    """What the cell says, and its style."""
    if name.startswith("headroom_bits_"):
        shown = bits(value)
        return shown.plain, str(shown.style)
    broken = isinstance(value, float) and math.isnan(value)
    return clean(number(value)), "bold red" if broken else ""


# --- tables -------------------------------------------------------------------------------------------

_COUNTS = ("rows", "rows_masked", "rows_padded")
_SAID = frozenset({"scale", "scale_expected", "mask_kind", "window"})  # in words already
_ORDER = (
    "entropy",
    "entropy_min",
    "entropy_ratio",
    "entropy_rest",
    "sink_mass",
    "sink_key",
    "reach",
    "peaky_rows",
    "score_max",
    "score_min",
    "score_std",
    "dot_absmax",
    "headroom_bits_float16",
    "headroom_bits_bfloat16",
    "headroom_bits_float32",
)
_SHORT = {
    "headroom_bits_float16": "bits float16",
    "headroom_bits_bfloat16": "bits bfloat16",
    "headroom_bits_float32": "bits float32",
}
