"""Attention maps for the page: a picture per map, and the strongest key of each query as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import AttentionMap
from attncli.render.html.colours import Scale, image
from attncli.render.html.picture import compact
from attncli.render.html.tables import Table, table
from attncli.render.words import clean, number


class Drawn(NamedTuple):
    """`data`: what the script draws. `source`: the same as an image of `width` × `height`."""

    title: str
    note: str
    high: str
    data: Mapping[str, Any]
    source: str
    width: int
    height: int
    strongest: Table


def drawn(one: AttentionMap) -> Drawn:
    """One map with its labels; colours reach from 0 to its own largest number."""
    queries = _labels(one.query_starts, one.queries, one.query_tokens)
    keys = _labels(one.key_starts, one.keys, one.key_tokens)
    largest = max((value for row in one.probs if row is not None for value in row), default=0.0)
    high = largest if largest > 0 else 1.0
    rows = [[] if row is None else list(row) for row in one.probs]
    blank = [row if row else [None] * len(keys) for row in rows]
    size = max(4, min(16, 640 // max(len(keys), 1)))
    title = f"{clean(one.layer)}, head {one.head}"
    folded = len(queries) < one.queries or len(keys) < one.keys
    note = f"call {one.call}, row {one.batch} of the batch, {one.queries} queries × {one.keys} keys"
    note += ", neighbouring tokens in blocks" if folded else ""
    return Drawn(
        title,
        note,
        number(high),
        {
            "title": title,
            "queries": queries,
            "keys": keys,
            "high": compact(high),
            "values": [[compact(value) for value in row] for row in rows],
        },
        image(blank, Scale(0.0, high)),
        size * len(keys),
        size * len(rows),
        _strongest(one, queries, keys, title),
    )


def _labels(starts: Sequence[int], total: int, tokens: Sequence[str]) -> list[str]:
    """The token of each block with its place, or the places alone: "[CLS] 0", "8–15"."""
    labels = []
    for at, start in enumerate(starts):
        end = starts[at + 1] if at + 1 < len(starts) else total
        place = str(start) if end - start <= 1 else f"{start}–{end - 1}"
        labels.append(f"{clean(tokens[at])} {place}" if at < len(tokens) else place)
    return labels


def _strongest(one: AttentionMap, queries: Sequence[str], keys: Sequence[str], title: str) -> Table:
    cells = []
    for name, row in zip(queries, one.probs, strict=False):
        if row is None or not row:
            cells.append([name, "none allowed", "—"])
        else:
            best = max(range(len(row)), key=row.__getitem__)
            cells.append([name, keys[best] if best < len(keys) else str(best), number(row[best])])
    columns = ("query", "strongest key", "probability")
    return table(f"Strongest key of each query, {title}", columns, cells, words=("strongest key",))
