"""Layers of one report ↔ layers of another: by path, by paths that a prefix tells apart, then stack by stack."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from attncli.layout.names import layer_index, template
from attncli.records import Layer


class Pairs(NamedTuple):
    """`both`: each layer of the first report with its counterpart. `notes`: which were joined under other names."""

    both: tuple[tuple[Layer, Layer], ...]
    removed: tuple[Layer, ...]
    added: tuple[Layer, ...]
    notes: tuple[str, ...]


def paired(first: Sequence[Layer], second: Sequence[Layer]) -> Pairs:
    """Every layer in one pair at most, in the order of the second report.

    Layers of other names are joined where these differ in a prefix, or where stacks of the same kind and the
    same numbers are left on both sides, as many on one as on the other.
    """
    theirs = {layer.path: layer for layer in second}
    found = {layer.path: theirs[layer.path] for layer in first if layer.path in theirs}
    notes: list[str] = []
    left, right = _unpaired(first, second, found)
    while left and right:
        prefixes = _prefixes(left, right)
        if prefixes is None:
            break
        joined = _behind(prefixes, left, right)
        found.update(joined)
        notes.append(
            f"{_behind_any(prefixes[0])} was compared with {_behind_any(prefixes[1])} ({_many(joined)}): "
            "the same names behind another prefix"
        )
        left, right = _unpaired(first, second, found)
    for before, after in _renamed_stacks(left, right):
        found.update({a.path: b for a, b in zip(before, after, strict=True)})
        notes.append(
            f"{_stack(before[0].path)} was compared with {_stack(after[0].path)} ({_many(before)}): "
            "the same numbers under another name"
        )
    left, right = _unpaired(first, second, found)
    place = {layer.path: at for at, layer in enumerate(second)}
    ours = {layer.path: layer for layer in first}
    both = sorted(
        ((ours[path], layer) for path, layer in found.items()), key=lambda pair: place[pair[1].path]
    )
    return Pairs(tuple(both), tuple(left), tuple(right), tuple(notes))


def _unpaired(
    first: Sequence[Layer], second: Sequence[Layer], found: dict[str, Layer]
) -> tuple[list[Layer], list[Layer]]:
    taken = {layer.path for layer in found.values()}
    return (
        [layer for layer in first if layer.path not in found],
        [layer for layer in second if layer.path not in taken],
    )


# --- another prefix -----------------------------------------------------------------------------------


def _prefixes(left: Sequence[Layer], right: Sequence[Layer]) -> tuple[str, str] | None:
    """The two prefixes, one of which only goes on where the other ends, that join most layers."""
    ends: dict[str, list[str]] = defaultdict(list)
    for layer in right:
        for prefix, rest in _cuts(layer.path):
            ends[rest].append(prefix)
    votes: dict[tuple[str, str], int] = defaultdict(int)
    for layer in left:
        for prefix, rest in _cuts(layer.path):
            if ends.get(rest):
                # The longest common end decides: what stands before it is all that differs.
                for other in ends[rest]:
                    votes[(prefix, other)] += 1
                break
    wrappers = {pair: count for pair, count in votes.items() if _goes_on(*pair) or _goes_on(*pair[::-1])}
    if not wrappers:
        return None
    return max(wrappers, key=lambda pair: (wrappers[pair], pair))


def _goes_on(shorter: str, longer: str) -> bool:
    return not shorter or longer.startswith(f"{shorter}.")


def _cuts(path: str) -> Iterable[tuple[str, str]]:
    """Every way to cut a path in a prefix and a rest with a number in it, the longest rest first."""
    parts = path.split(".")
    for at in range(len(parts)):
        rest = ".".join(parts[at:])
        if not re.search(r"\d", rest):
            return
        yield ".".join(parts[:at]), rest


def _behind(prefixes: tuple[str, str], left: Sequence[Layer], right: Sequence[Layer]) -> dict[str, Layer]:
    theirs = {layer.path: layer for layer in right}
    joined = {}
    for layer in left:
        mine = prefixes[0] and f"{prefixes[0]}."
        if layer.path.startswith(mine):
            rest = layer.path[len(mine) :]
            other = theirs.get(f"{prefixes[1]}.{rest}" if prefixes[1] else rest)
            if other is not None:
                joined[layer.path] = other
    return joined


# --- another name -------------------------------------------------------------------------------------


def _renamed_stacks(
    left: Sequence[Layer], right: Sequence[Layer]
) -> list[tuple[Sequence[Layer], Sequence[Layer]]]:
    """Stacks of the same kind and numbers, in order, where both sides have as many of them."""
    mine, theirs = _stacks(left), _stacks(right)
    joined: list[tuple[Sequence[Layer], Sequence[Layer]]] = []
    for key, stacks in mine.items():
        others = theirs.get(key, [])
        if len(stacks) == len(others):
            joined += zip(stacks, others, strict=True)
    return joined


def _stacks(layers: Sequence[Layer]) -> dict[Hashable, list[list[Layer]]]:
    """(kind, numbers) → the stacks of that kind whose layers have these numbers."""
    by_stack: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        by_stack[_stack(layer.path)].append(layer)
    found: dict[Hashable, list[list[Layer]]] = defaultdict(list)
    for name, stack in by_stack.items():
        ordered = sorted(stack, key=lambda layer: layer_index(layer.path) or 0)
        # Where a function stands in the source is a number too, and no number of a layer.
        numbers = (
            (len(stack), name) if _LINE.search(name) else tuple(layer_index(layer.path) for layer in ordered)
        )
        found[(stack[0].kind, numbers)].append(stack if _LINE.search(name) else ordered)
    return found


def _stack(path: str) -> str:
    """The path without the number of the layer, or of the line that it stands in."""
    lined = re.sub(r"(\.\w+):\d+$", r"\1:#", path)
    return lined if lined != path else template(path)


def _behind_any(prefix: str) -> str:
    return f"{prefix}.*" if prefix else "*"


def _many(layers: Sequence[object] | dict[str, Layer]) -> str:
    return f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"


# --- tables -------------------------------------------------------------------------------------------

_LINE = re.compile(r"\.\w+:#$")
