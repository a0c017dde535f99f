"""Two reports → what changed between them: layers, structure, numbers. Judges nothing.

Rounding is no change: numbers of a run differ by less than 1e-4 of the larger one, or by less than 1e-4, on
another machine or with another kernel; what is read from weights repeats exactly, so 1e-4 of the larger one counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from attncli.api.pairing import Pairs
from attncli.records import Call, Change, Layer, Measurement, Report, structure


class Place(NamedTuple):
    """Where a number stands: `layer` by its name in the second report, `call` counts the calls of that layer."""

    layer: str
    call: int
    metric: str
    head: int | None


class Numbers(NamedTuple):
    """`only`: metrics of the first and of the second report that the other lacks altogether."""

    changes: tuple[Change, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    notes: tuple[str, ...]


def source_changes(first: Report, second: Report) -> tuple[Change, ...]:
    """Format, counts and structure of the two sources; counts only where both were counted alike."""
    counted_alike = _is_file(first) == _is_file(second)
    changes = [
        Change("source", None, None, key, first.source.get(key), second.source.get(key))
        for key in ("format", "parameters", "tensors")
        if counted_alike
        and key in first.source
        and key in second.source
        and first.source[key] != second.source[key]
    ]
    before, after = structure(first.layers), structure(second.layers)
    if before != after:
        changes.append(Change("source", None, None, "structure", before, after))
    return tuple(changes)


def layer_changes(pairs: Pairs, first: Sequence[Call], second: Sequence[Call]) -> tuple[Change, ...]:
    """Layers added and removed, and what differs in those that both have: shapes, facts, how they were called.

    What one of the two does not know is no change.
    """
    calls = _by_layer(first), _by_layer(second)
    changes = [Change("removed", layer.id, None, "layer", _sketch(layer), None) for layer in pairs.removed]
    changes += [Change("added", layer.id, None, "layer", None, _sketch(layer)) for layer in pairs.added]
    for before, after in pairs.both:
        changes += _layer(before, after)
        changes += _calls(after.id, calls[0].get(before.id, []), calls[1].get(after.id, []))
    return tuple(changes)


def number_changes(pairs: Pairs, first: Report, second: Report) -> Numbers:
    """Every number that changed beyond rounding, in the order of the second report."""
    names = _names(pairs, first, second)
    before = _placed(first, names)
    after = _placed(second, {})
    of_pairs = {layer.id for _, layer in pairs.both}
    torn = {
        layer.id
        for other, layer in pairs.both
        if other.heads is not None and layer.heads is not None and other.heads != layer.heads
    }
    several = {place.layer for place in (*before, *after) if place.call}
    changes = []
    for place, row in after.items():
        other = before.get(place)
        if other is None or (place.head is not None and place.layer in torn):
            continue
        if place.metric == "sink_key" and not _has_sink(before, after, place):
            continue
        if _differ(other, row):
            what = f"{place.metric}, call {place.call + 1}" if place.layer in several else place.metric
            changes.append(Change("metric", place.layer, place.head, what, other.value, row.value))
    metrics = {place.metric for place in before}, {place.metric for place in after}
    notes = _tensor_notes(before, after, of_pairs)
    if torn and any(place.layer in torn and place.head is not None for place in (*before, *after)):
        notes.append(
            f"heads of {_many(len(torn), 'layer')} were not compared one by one: there are more or fewer of them"
        )
    return Numbers(
        tuple(changes),
        (tuple(sorted(metrics[0] - metrics[1])), tuple(sorted(metrics[1] - metrics[0]))),
        tuple(notes),
    )


def unknown_in_one(pairs: Pairs) -> tuple[str, ...]:
    """The note about counts that only one of the two knows; () where both know the same."""
    once = sum(
        any((getattr(a, name) is None) != (getattr(b, name) is None) for name in ("heads", "kv_heads"))
        for a, b in pairs.both
    )
    return (f"heads of {_many(once, 'layer')} are known in only one of the two",) if once else ()


# --- layers -------------------------------------------------------------------------------------------


def _sketch(layer: Layer) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("kind", "layout", "heads", "kv_heads", "head_dim")}


def _layer(before: Layer, after: Layer) -> Iterator[Change]:
    def change(what: str, old: Any, new: Any) -> Change:
        return Change("structure", after.id, None, what, old, new)

    if before.kind != after.kind:
        yield change("kind", before.kind, after.kind)
    if before.layout != after.layout and not {before.layout, after.layout} & _UNSETTLED:
        yield change("layout", before.layout, after.layout)
    for name, label in _COUNTS.items():
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and new is not None and old != new:
            yield change(label, old, new)
    guessed = "assumed" in (before.evidence.get("scale"), after.evidence.get("scale"))
    known = before.scale is not None and after.scale is not None and not guessed
    if known and not _close(before.scale, after.scale):
        yield change("scale", before.scale, after.scale)
    if before.tensors and after.tensors:
        yield from _tensors(before, after)
    yield from _facts(before, after)


def _tensors(before: Layer, after: Layer) -> Iterator[Change]:
    stored_alike = _on_disk(before) == _on_disk(after)
    mine, theirs = _by_role(before), _by_role(after)
    for role in (*mine, *(role for role in theirs if role not in mine)):
        for old, new in zip_longest(mine.get(role, []), theirs.get(role, [])):
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (old, new)]
            if shapes[0] != shapes[1]:
                yield Change("structure", after.id, None, f"{role} shape", *shapes)
            # A run may have cast the weights: only what lies in files is compared.
            if stored_alike and old is not None and new is not None and old.dtype != new.dtype:
                yield Change("structure", after.id, None, f"{role} dtype", old.dtype, new.dtype)


def _facts(before: Layer, after: Layer) -> Iterator[Change]:
    informed = [any(source == "config" for source in layer.evidence.values()) for layer in (before, after)]
    for name in (*before.facts, *(name for name in after.facts if name not in before.facts)):
        old, new = before.facts.get(name), after.facts.get(name)
        # Without a config nothing tells of a window: what the other's config says is no change.
        unknown = name in _OF_CONFIGS and informed[0] != informed[1] and None in (old, new)
        if old != new and name not in _NO_STRUCTURE and not unknown:
            yield Change("structure", after.id, None, name.replace("_", " "), old, new)


def _calls(layer: str, before: Sequence[Call], after: Sequence[Call]) -> Iterator[Change]:
    if not before or not after:
        return
    if len(before) != len(after):
        yield Change("structure", layer, None, "calls", len(before), len(after))
    for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
        behind = f", call {number}" if len(before) > 1 or len(after) > 1 else ""
        for name, label in _OF_CALLS.items():
            was, is_now = getattr(old, name), getattr(new, name)
            if was != is_now and not _close(was, is_now):
                yield Change("structure", layer, None, f"{label}{behind}", was, is_now)


def _by_layer(calls: Sequence[Call]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = defaultdict(list)
    for call in sorted(calls, key=lambda call: call.index):
        found[call.layer].append(call)
    return found


def _by_role(layer: Layer) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for tensor in layer.tensors:
        found[tensor.role].append(tensor)
    return found


def _on_disk(layer: Layer) -> bool:
    return any(tensor.file for tensor in layer.tensors)


def _is_file(report: Report) -> bool:
    return report.source.get("kind") in ("file", "folder")


# --- numbers ------------------------------------------------------------------------------------------


def _names(pairs: Pairs, first: Report, second: Report) -> dict[str, str]:
    """Layers and tensors of the first report → what the second calls them, where that is something else."""
    names = {before.id: after.id for before, after in pairs.both}
    taken = {tensor.name for layer in second.layers for tensor in layer.tensors}
    for before, after in pairs.both:
        theirs = _by_role(after)
        for role, tensors in _by_role(before).items():
            for old, new in zip(tensors, theirs.get(role, []), strict=False):
                if old.name not in taken:
                    names[old.name] = new.name
    return _unprefixed(pairs, first, second) | names


def _unprefixed(pairs: Pairs, first: Report, second: Report) -> dict[str, str]:
    """Tensors of no layer, such as embeddings, whose names differ by the same prefix as the layers' paths."""
    paths = [(a.path, b.path) for a, b in pairs.both if a.path != b.path]
    longer = {b.removesuffix(a) for a, b in paths if b.endswith(f".{a}")}
    shorter = {a.removesuffix(b) for a, b in paths if a.endswith(f".{b}")}
    theirs = {row.layer for row in second.measurements if row.call is None}
    names = {}
    for name in dict.fromkeys(row.layer for row in first.measurements if row.call is None):
        others = [prefix + name for prefix in longer]
        others += [name.removeprefix(prefix) for prefix in shorter if name.startswith(prefix)]
        found = [other for other in others if other in theirs]
        if found and name not in theirs:
            names[name] = found[0]
    return names


def _placed(report: Report, names: Mapping[str, str]) -> dict[Place, Measurement]:
    order: dict[int, int] = {}
    for calls in _by_layer(report.calls).values():
        order |= {call.index: number for number, call in enumerate(calls)}
    return {
        Place(
            names.get(row.layer, row.layer),
            0 if row.call is None else order.get(row.call, 0),
            row.metric,
            row.head,
        ): row
        for row in report.measurements
        if row.metric not in _SAID_OF_CALLS
    }


def _differ(before: Measurement, after: Measurement) -> bool:
    old, new = before.value, after.value
    if old == new:
        return False
    if before.metric == "contents" and before.unit != after.unit:
        return False  # the digits of one dtype say nothing of another's
    if not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
        return True
    if math.isnan(old) and math.isnan(new):
        return False
    if before.metric in _EXACT or not (math.isfinite(old) and math.isfinite(new)):
        return True
    if _overlap(before, after):
        return False
    floor = 0.0 if before.metric in _OF_WEIGHTS else _ROUNDING
    return not math.isclose(old, new, rel_tol=_ROUNDING, abs_tol=floor)


def _overlap(before: Measurement, after: Measurement) -> bool:
    """Whether two numbers, of which one is known between limits only, may be the same."""
    (low, high), (other_low, other_high) = _limits(before), _limits(after)
    return low <= other_high and other_low <= high


def _limits(row: Measurement) -> tuple[float, float]:
    value = float(row.value) if isinstance(row.value, (int, float)) else math.nan
    if row.precision == "exact":
        return value, value
    return (value if row.low is None else row.low), (value if row.high is None else row.high)


def _has_sink(before: Mapping[Place, Measurement], after: Mapping[Place, Measurement], place: Place) -> bool:
    """Whether the head lies on one key at all; which of many keys is first is rounding."""
    masses = [rows.get(place._replace(metric="sink_mass")) for rows in (before, after)]
    return any(row is not None and isinstance(row.value, float) and row.value > 0.5 for row in masses)


def _tensor_notes(before: Iterable[Place], after: Iterable[Place], layers: set[str]) -> list[str]:
    """Tensors whose values stand in one report only, where both read values at all."""
    names = [
        {place.layer for place in places if place.metric == "nan_count"} - layers
        for places in (before, after)
    ]
    if not all(names):
        return []
    notes = []
    for which, only in (("first", names[0] - names[1]), ("second", names[1] - names[0])):
        if only:
            shown = ", ".join(sorted(only)[:3]) + (" …" if len(only) > 3 else "")
            notes.append(f"{_many(len(only), 'tensor')} only in the {which}: {shown}")
    return notes


def _close(first: object, second: object) -> bool:
    if not isinstance(first, float) or not isinstance(second, float):
        return False
    return math.isclose(first, second, rel_tol=_ROUNDING)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


# --- tables -------------------------------------------------------------------------------------------

_ROUNDING = 1e-4
_EXACT = frozenset({"sink_key", "rows", "rows_masked", "rows_padded", "nan_count", "inf_count"})
_OF_WEIGHTS = frozenset({"absmax", "rms", "zero_fraction", "score_bound", "score_typical"})
# Layouts that say that something is not known.
_UNSETTLED = frozenset({"functional", "fused-unknown"})
_COUNTS = {"heads": "heads", "kv_heads": "KV heads", "head_dim": "head size"}
_OF_CONFIGS = frozenset({"window", "layer_type", "soft_cap", "rope_order", "per_layer_heads"})
# Where a layer lies in memory, and what follows from other facts.
_NO_STRUCTURE = frozenset({"module", "in_features", "queries_per_kv_head"})
_OF_CALLS = {
    "normaliser": "normaliser",
    "softmax_axis": "softmax axis",
    "mask_kind": "mask",
    "causal_offset": "causal offset",
    "window": "window of the run",
    "scale": "scale of the run",
    "soft_cap": "soft cap of the run",
    "sinks": "sinks of the run",
    "kernel": "kernel",
    "dtype": "dtype of the run",
    "scores_dtype": "dtype of the scores",
    "stored": "stored scores",
}
# Metrics that repeat what a call says of itself.
_SAID_OF_CALLS = frozenset({"scale", "scale_expected", "mask_kind", "window"})
