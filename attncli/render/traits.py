"""The heads that stand out, in words: on one key, local or diagonal, even, concentrated besides their sink.

What is worth a word is decided here and is no judgement: nine of ten heads of a healthy language model lie on
one key. Findings come from the rules.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attncli.render.calls import Row, full_label
from attncli.render.folds import ranges
from attncli.render.heads import nats, share
from attncli.render.words import clean, number


class Standing(NamedTuple):
    """Heads of one call, or of several calls of a stack, that stand out alike. `values`: one a head and call.

    `words` has "{}" for the range of the values.
    """

    rows: tuple[Row, ...]
    heads: tuple[int, ...]
    words: str
    values: tuple[float, ...]


class Trait(NamedTuple):
    """`meaning` says from where on a head has it. `shown` writes one value."""

    title: str
    meaning: str
    of: Callable[[Row], Iterable[Standing]]
    shown: Callable[[float], str]
    largest_first: bool = False


def heads_that_stand_out(rows: Sequence[Row], console: Console) -> list[RenderableType]:
    """A section per trait that any head has: at most five lines each of self- and of cross-attention."""
    total = sum(len(row.heads) for row in rows)
    parts: list[RenderableType] = []
    for trait in _TRAITS:
        found = _folded([standing for row in rows if _large_enough(row) for standing in trait.of(row)])
        if not found:
            continue
        counted = sum(len(standing.values) for standing in found)
        shown = _first(found, trait)
        title = Text(trait.title, style="bold")
        title.append(f" ({trait.meaning}): {counted} of {total} heads", style="not bold")
        lines = [title, *_lines(shown, trait, rows, console)]
        if len(found) > len(shown):
            lines.append(Text(f"  and {len(found) - len(shown)} more", style="dim"))
        parts.append(Group(*lines))
    return [*parts, Text()] if parts else []


# --- traits -------------------------------------------------------------------------------------------


def _on_one_key(row: Row) -> Iterator[Standing]:
    by_key: dict[object, dict[int, float]] = defaultdict(dict)
    for head, mass in row.numbers("sink_mass").items():
        if mass > _MOST:
            by_key[row.heads[head].get("sink_key")][head] = mass
    for key, masses in by_key.items():
        yield _standing(row, masses, f"{{}} on key {clean(number(key))}")


def _local(row: Row) -> Iterator[Standing]:
    keys = min(row.call.keys, row.call.window or row.call.keys)
    near = {h: reach for h, reach in row.numbers("reach").items() if reach < keys / _NEAR}
    diagonal = {head: reach for head, reach in near.items() if reach < _DIAGONAL}
    beside = {head: reach for head, reach in near.items() if head not in diagonal}
    yield from [_standing(row, diagonal, "diagonal: reach {}")] if diagonal else []
    yield from [_standing(row, beside, "local: reach {}")] if beside else []


def _even(row: Row) -> Iterator[Standing]:
    ratios = {head: ratio for head, ratio in row.numbers("entropy_ratio").items() if ratio > _EVEN}
    yield from [_standing(row, ratios, "{} of ln n")] if ratios else []


def _few(row: Row) -> Iterator[Standing]:
    rests = {head: rest for head, rest in row.numbers("entropy_rest").items() if rest < _FEW}
    yield from [_standing(row, rests, "{} nats besides the sink")] if rests else []


def _standing(row: Row, values: dict[int, float], words: str) -> Standing:
    return Standing((row,), tuple(values), words, tuple(values.values()))


def _fine_share(ratio: float) -> str:
    """Enough digits to tell an almost even head from an even one."""
    return "1" if ratio == 1 else f"{min(ratio, 0.9999):.4f}"


# --- lines --------------------------------------------------------------------------------------------


def _folded(found: Sequence[Standing]) -> list[Standing]:
    """Layers of one stack in which the same heads stand out alike, as one."""
    groups: dict[tuple[object, ...], list[Standing]] = defaultdict(list)
    for standing in found:
        layer = standing.rows[0].layer
        whole = len(standing.heads) == len(standing.rows[0].heads)
        groups[(layer.stack or layer.id, standing.heads, whole, standing.words)].append(standing)
    return [
        Standing(
            tuple(standing.rows[0] for standing in group),
            group[0].heads,
            group[0].words,
            tuple(value for standing in group for value in standing.values),
        )
        for group in groups.values()
    ]


def _large_enough(row: Row) -> bool:
    """Among two or three keys every head is near something."""
    return min(row.call.queries, row.call.keys) >= _LEAST


def _first(found: Sequence[Standing], trait: Trait) -> list[Standing]:
    """The first of self- and of cross-attention apart, so that many decoder layers hide no cross-attention.

    Heads that a whole layer joins come first, then the strongest.
    """

    def order(standing: Standing) -> tuple[bool, float]:
        whole = len(standing.heads) == len(standing.rows[0].heads)
        return not whole, -max(standing.values) if trait.largest_first else min(standing.values)

    shown: list[Standing] = []
    for kind in dict.fromkeys(standing.rows[0].call.kind for standing in found):
        shown += sorted((s for s in found if s.rows[0].call.kind == kind), key=order)[:_SHOWN]
    return shown


def _lines(
    shown: Sequence[Standing], trait: Trait, rows: Sequence[Row], console: Console
) -> list[RenderableType]:
    table = Table.grid(padding=(0, 2))
    cells = [[full_label(s.rows, rows), _heads(s), _words(s, trait)] for s in shown]
    for texts in cells:
        table.add_row(*map(Text, texts))
    padded = Padding(table, (0, 0, 0, 2), expand=False)
    if sum(max(len(text) for text in column) + 2 for column in zip(*cells, strict=True)) <= console.width:
        return [padded]
    lines: list[RenderableType] = []
    for name, which, words in cells:
        lines += [Padding(Text(name), (0, 0, 0, 2)), Padding(Text(f"{which}, {words}"), (0, 0, 0, 4))]
    return lines


def _heads(standing: Standing) -> str:
    heads = standing.heads
    if len(heads) == len(standing.rows[0].heads) and len(heads) > 1:
        return f"all {len(heads)} heads"
    return f"head{'s' if len(heads) > 1 else ''} {ranges(heads)}"


def _words(standing: Standing, trait: Trait) -> str:
    low, high = trait.shown(min(standing.values)), trait.shown(max(standing.values))
    between = "–" if low[0].isdigit() and high[0].isdigit() else " to "
    return standing.words.replace("{}", low if low == high else f"{low}{between}{high}", 1)


# --- tables -------------------------------------------------------------------------------------------

_SHOWN = 5
_LEAST = 4
_MOST = 0.5  # more than half of what a head attends to
_NEAR = 8  # nearer than an eighth of the keys; even attention reaches a third of them
_DIAGONAL = 1.0  # nearer than the neighbour
_EVEN = 0.99
_FEW = math.log(2)  # less than two keys would have if they shared it
_TRAITS = (
    Trait("On one key", "over half of the attention", _on_one_key, share, largest_first=True),
    Trait("Local", "mean reach below an eighth of the keys", _local, nats),
    Trait("Even", "over 99 % of ln n", _even, _fine_share, largest_first=True),
    Trait("On few keys besides the sink", "less entropy than two keys have", _few, nats),
)
