"""Tables of the page as plain strings: layers, tensors, calls, overflow, weights, changes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import Change, Layer, Measurement, Report
from attncli.render import calls
from attncli.render.calls import Row, Value, call_rows, full_label
from attncli.render.folds import folds, relative
from attncli.render.overflow import bits, scale_words
from attncli.render.words import number, percent


class Cell(NamedTuple):
    """`tone`: "" or "bad" or "warn", which the words say as well."""

    text: str
    tone: str = ""


class Table(NamedTuple):
    """`numeric`: columns whose numbers stand to the right. The first column names the row."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell | str]],
    *,
    note: str = "",
    words: Sequence[str] = (),
) -> Table:
    """A table whose columns hold numbers, but for the first and those named in `words`."""
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    numeric = frozenset(at for at, name in enumerate(columns) if at and name not in words)
    return Table(title, note, tuple(columns), cells, numeric)


def value_cell(value: Value) -> Cell:
    """A number; NaN and Inf stand out."""
    broken = isinstance(value, float) and not math.isfinite(value)
    return Cell(plain(value), "bad" if broken else "")


def plain(value: Any) -> str:
    """Anything that evidence may hold, on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "—"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "−Inf"
    return number(value)


# --- what the layers are ------------------------------------------------------------------------------


def layer_tables(report: Report) -> list[Table]:
    """What each layer is, one row a layer; and the tensors that make them, layers that are alike folded."""
    if not report.layers:
        return []
    rows: list[list[Cell | str]] = [
        [
            layer.path or layer.id,
            layer.kind or "no softmax",
            layer.layout,
            *(_fact(layer, value) for value in (layer.heads, layer.kv_heads, layer.head_dim)),
            _scale(layer),
            _known_from(layer),
            "; ".join(f"{name.replace('_', ' ')}: {plain(value)}" for name, value in layer.facts.items()),
        ]
        for layer in report.layers
    ]
    columns: tuple[str, ...] = (
        "layer",
        "kind",
        "layout",
        "heads",
        "KV heads",
        "head size",
        "scale",
        "known from",
        "details",
    )
    made = [table("Attention layers", columns, rows, words=("kind", "layout", "known from", "details"))]
    tensors: list[list[Cell | str]] = [
        [
            fold.label if at == 0 else "",
            tensor.role,
            relative(tensor, fold.first),
            "×".join(map(str, tensor.shape)) or "scalar",
            tensor.dtype,
        ]
        for fold in folds(report.layers)
        for at, tensor in enumerate(fold.first.tensors)
    ]
    if tensors:
        columns = ("layers", "role", "tensor", "shape", "dtype")
        note = "Layers that are alike stand in one row, with their numbers in braces."
        made.append(table("Tensors of the layers", columns, tensors, note=note, words=columns))
    return made


def _known_from(layer: Layer) -> str:
    """ "config: heads, scale; shape: head dim"."""
    facts: dict[str, list[str]] = defaultdict(list)
    for name, source in layer.evidence.items():
        facts[source].append(name.replace("_", " "))
    return "; ".join(f"{source}: {', '.join(names)}" for source, names in facts.items())


def _fact(layer: Layer, value: int | None) -> Cell:
    if layer.kind is None:
        return Cell("—")
    return Cell("unknown", "warn") if value is None else Cell(str(value))


def _scale(layer: Layer) -> Cell:
    if layer.kind is None:
        return Cell("—")
    if layer.scale is None:
        return Cell("learned") if layer.facts.get("cosine") else Cell("unknown", "warn")
    if layer.head_dim and math.isclose(layer.scale, layer.head_dim**-0.5, rel_tol=1e-6):
        return Cell(f"1/√{layer.head_dim}")
    return Cell(number(layer.scale))


# --- what ran -----------------------------------------------------------------------------------------


def overflow_table(report: Report) -> Table | None:
    """Per call the head of the largest |q·k|, what it is multiplied by, and the bits left in each dtype."""
    rows = call_rows(report)
    if not any(row.numbers("dot_absmax") for row in rows):
        return None
    cells: list[list[Cell | str]] = []
    for row in rows:
        dot, head = largest(row, "dot_absmax")
        score, score_head = largest(row, "score_max")
        worst = row.heads.get(-1 if head is None else head, {})
        expected = row.whole.get("scale_expected")
        cells.append(
            [
                full_label([row], rows),
                Cell("not observed", "warn") if dot is None else value_cell(dot),
                "—" if head is None else str(head),
                value_cell(score),
                "—" if score_head is None else str(score_head),
                scale_words(row.call).removeprefix("scale "),
                f"1/√{row.call.head_dim}" if row.call.head_dim else number(expected),
                *(_bits(worst.get(f"headroom_bits_{dtype}")) for dtype in _DTYPES),
            ]
        )
    columns = (
        "layer", "|q·k|", "head", "largest score", "head of it", "scale applied", "scale expected",
        *(f"bits {dtype}" for dtype in _DTYPES),
    )  # fmt: skip
    note = (
        "The head with the largest |q·k| of each call. Bits of headroom: log2(largest number of the dtype / |q·k|); "
        "below 0 the product overflows there."
    )
    return table("Scores and overflow", columns, cells, note=note, words=("scale applied", "scale expected"))


def call_table(report: Report) -> Table | None:
    """What each attention call was, and whether it was explained."""
    rows = call_rows(report)
    if not rows:
        return None
    cells: list[list[Cell | str]] = [
        [
            full_label([row], rows),
            row.call.kind or "unknown",
            f"{row.call.batch} × {calls.heads(row.call)}",
            calls.size(row.call),
            "—" if row.call.head_dim is None else str(row.call.head_dim),
            calls.mask(row.call),
            "; ".join([calls.kernel(row.call), *calls.design(row.call)]),
            row.call.dtype,
            _stored(row),
            _explained(row),
            row.call.source or "—",
        ]
        for row in rows
    ]
    columns = (
        "layer", "kind", "batch × heads", "queries × keys", "head size", "mask", "kernel", "dtype",
        "q·k stored", "recomputed", "source line",
    )  # fmt: skip
    words = ("kind", "mask", "kernel", "dtype", "q·k stored", "recomputed", "source line")
    return table("Attention calls", columns, cells, words=words)


def largest(row: Row, metric: str) -> tuple[float | None, int | None]:
    """The largest number of all heads and its head; NaN is larger than any, since nothing may hide it."""
    numbers = row.numbers(metric)
    if not numbers:
        return None, None
    head = max(numbers, key=lambda at: (math.isnan(numbers[at]), numbers[at]))
    return numbers[head], head


def _stored(row: Row) -> str:
    return "never" if row.call.stored == "nothing" else f"{row.call.stored} in {row.call.scores_dtype}"


def _explained(row: Row) -> Cell:
    if row.call.explained:
        difference = row.call.difference
        return Cell("yes" if difference is None else f"yes, difference {difference:.0e}")
    return Cell(f"not observed: {row.call.reason or 'its output could not be recomputed'}", "warn")


def _bits(value: Value) -> Cell:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        overflowed = isinstance(value, (int, float)) and not value > 0
        return Cell(plain(value), "bad" if overflowed else "")
    shown = bits(value).plain
    return Cell(f"{shown} overflows", "bad") if value < 0 else Cell(shown, "warn" if value < 1 else "")


# --- weights ------------------------------------------------------------------------------------------


def weight_tables(measurements: Sequence[Measurement]) -> list[Table]:
    """What q·k can become by the weights alone, and the values of the tensors; only what was measured."""
    return [made for made in (_bounds(measurements), _values(measurements)) if made is not None]


def _bounds(measurements: Sequence[Measurement]) -> Table | None:
    by_layer: dict[str, dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    for row in measurements:
        if row.call is None and row.metric.startswith(("score_", "overflow_")):
            by_layer[row.layer][row.metric].append(row)
    cells: list[list[Cell | str]] = []
    for layer, metrics in by_layer.items():
        bounds = [row for row in metrics["score_bound"] if isinstance(row.value, (int, float))]
        if not bounds:
            continue
        typical = {row.head: row.value for row in metrics["score_typical"]}
        worst = max(bounds, key=lambda row: (_or_zero(row.value), _or_zero(typical.get(row.head))))
        bound = _or_zero(worst.value)
        cells.append(
            [
                layer,
                str(worst.head),
                number(bound) if math.isfinite(bound) else "no bound",
                number(typical.get(worst.head)),
                *(_safety(metrics, dtype) for dtype in _DTYPES),
            ]
        )
    if not cells:
        return None
    columns = ("layer", "head", "largest |q·k|", "typical (RMS)", *_DTYPES)
    title = "What q·k can become before scaling, from the weights alone"
    return table(title, columns, cells, note="The worst head of each layer.", words=_DTYPES)


def _safety(metrics: Mapping[str, Sequence[Measurement]], dtype: str) -> Cell:
    rows = metrics.get(f"overflow_{dtype}")
    verdict = str(rows[0].value) if rows else "unknown"
    return Cell(verdict, "" if verdict == "proven safe" else "warn")


def _or_zero(value: Value) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _values(measurements: Sequence[Measurement]) -> Table | None:
    tensors: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in measurements:
        if row.metric in ("nan_count", "inf_count", "absmax", "rms", "zero_fraction"):
            tensors[row.layer][row.metric] = row.value
    if not tensors:
        return None
    broken = [name for name, of in tensors.items() if of.get("nan_count") or of.get("inf_count")]
    ranked = sorted(tensors, key=lambda name: (name not in broken, -_or_zero(tensors[name].get("absmax"))))
    cells: list[list[Cell | str]] = [
        [
            name,
            *(Cell(number(of.get(key)), "bad" if of.get(key) else "") for key in ("nan_count", "inf_count")),
            value_cell(of.get("absmax")),
            value_cell(of.get("rms")),
            percent(of.get("zero_fraction")),
        ]
        for name in ranked[:MOST_ROWS]
        for of in (tensors[name],)
    ]
    counts = [
        sum(int(_or_zero(of.get(key))) for of in tensors.values()) for key in ("nan_count", "inf_count")
    ]
    note = f"{counts[0]} NaN and {counts[1]} Inf in {len(tensors)} tensors; those with any first, then the largest."
    note += _left_out(len(ranked))
    return table(
        "Values of the weights", ("tensor", "NaN", "Inf", "largest |w|", "RMS", "zeros"), cells, note=note
    )


# --- changes ------------------------------------------------------------------------------------------


def change_tables(changes: Sequence[Change]) -> list[Table]:
    """What differs, a table per kind; of numbers the largest changes first."""
    made = []
    for kind, title in _CHANGES.items():
        rows = [change for change in changes if change.kind == kind]
        if not rows:
            continue
        if kind == "metric":
            rows.sort(key=_relative, reverse=True)
        columns = _CHANGE_COLUMNS[kind]
        cells = [[_change(change)[name] for name in columns] for change in rows[:MOST_ROWS]]
        note = f"{len(rows)} in all.{_left_out(len(rows))}"
        words = ("what",) if kind == "metric" else ("what", "before", "after")
        made.append(table(title, columns, cells, note=note, words=words))
    return made


def _change(change: Change) -> dict[str, str]:
    """Every column that a table of changes may have."""
    return {
        "layer": "—" if change.layer is None else change.layer,
        "head": "" if change.head is None else str(change.head),
        "what": change.what,
        "before": plain(change.before),
        "after": plain(change.after),
        "change": _difference(change.before, change.after),
    }


def _difference(before: Any, after: Any) -> str:
    if not all(isinstance(value, (int, float)) for value in (before, after)):
        return "—"
    difference = after - before
    return f"+{number(difference)}" if difference > 0 else number(difference)


def _relative(change: Change) -> float:
    """How large a change is against the larger of its numbers; one to or from no number is the largest."""
    before, after = change.before, change.after
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (before, after)):
        return math.inf
    most = max(abs(before), abs(after))
    return abs(after - before) / most if most else 0.0


def _left_out(total: int) -> str:
    if total <= MOST_ROWS:
        return ""
    return f" The first {MOST_ROWS} are shown; --format json has all."


# --- tables -------------------------------------------------------------------------------------------

MOST_ROWS = 2000
_DTYPES = ("float16", "bfloat16", "float32")
_CHANGES = {
    "source": "Changed in the files as a whole",
    "added": "Added layers",
    "removed": "Removed layers",
    "structure": "Changed structure",
    "finding": "New and gone findings",
    "metric": "Changed numbers",
}
_CHANGE_COLUMNS = {
    "source": ("what", "before", "after"),
    "added": ("layer", "after"),
    "removed": ("layer", "before"),
    "structure": ("layer", "what", "before", "after"),
    "finding": ("layer", "what", "before", "after"),
    "metric": ("layer", "head", "what", "before", "after", "change"),
}
