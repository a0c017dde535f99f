"""Scores as the user thinks of them: which axes are batch, heads, queries and keys.

Heads may be folded into the batch, grouped over shared keys, or laid beside the queries; the meaning of each
axis was followed from the projections (`axes`). Where it was lost, the order that everyone uses decides.

Shapes: B batch, H query heads, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from attncli.trace.axes import Atom, Axes, axes
from attncli.trace.tape import Node

Role = Literal["batch", "head", "query"]
Roles = list[list[tuple[int, Role]]]


class Layout(NamedTuple):
    """How the axes of the scores are read: sizes, and the view that sets batch, heads and queries apart.

    `places`: (size, step) of each factor of batch, heads and queries, in this order, where a step counts elements
    of the product's output; empty where that is not known. `sharing`: how many heads lie on the queries' side of the
    product, and so ask the same keys.
    """

    view: Callable[[Tensor], Tensor]
    batch: int
    heads: int
    queries: int
    keys: int
    keys_from: str
    channels: bool
    places: tuple[tuple[int, int], ...] = ()
    keys_are_features: bool = False
    sharing: int = 1


def layout_of(
    given: Node, axis: int, known: dict[int, Axes], likely_heads: int, over_features: bool
) -> Layout:
    """Reads the axes of the scores that enter a normaliser over `axis`.

    `known`: the axes of the score product, by its serial. `likely_heads`: features of the projection over the
    head size. `over_features`: whether q·k sums over features, as it does unless the keys are channels.
    """
    found = list(axes(given, known))
    rank = len(found)
    keys_axis = found.pop(axis % rank)
    shape = list(given.shape)
    keys = shape.pop(axis % rank)
    marks = [atom.origin for atom in keys_axis if atom.origin]
    keys_from = marks[0] if marks and len(set(marks)) == 1 else "columns"
    features = bool(keys_axis) and all(atom.kind == "feature" for atom in keys_axis)
    channels = not over_features and features
    read = roles(found, shape, keys_from, likely_heads, channels)
    sharing = 1 if features else _sharing(found, read, "columns" if keys_from == "rows" else "rows")
    places = _places(found, read)
    return Layout(viewer(read), *sizes(read), keys, keys_from, channels, places, features, sharing)


def roles(
    found: Sequence[tuple[Atom, ...]],
    shape: Sequence[int],
    keys_from: str,
    likely_heads: int,
    channels: bool = False,
) -> Roles:
    """For each leading axis of the scores, its factors and what each stands for."""
    atoms = [atom for axis in found for atom in axis]
    rows = "columns" if keys_from == "rows" else "rows"
    known = not any(atom.kind == "unknown" for atom in atoms)
    has_heads = any(atom.kind == "feature" for atom in atoms)
    if not known or (not has_heads and len(shape) >= 3):
        return _conventional(shape, likely_heads)
    # Queries lie on the product's rows. If those are features or nothing, the inner positions are queries.
    on_rows = any(atom.origin == rows and atom.kind == "position" for atom in atoms)
    positions = [atom for atom in atoms if atom.kind == "position"]
    out: list[list[tuple[int, Role]]] = []
    for axis in found:
        factors: list[tuple[int, Role]] = []
        for atom in axis:
            role: Role
            if channels and atom.kind == "feature":
                role = "query" if atom.origin == rows else "head"
            elif channels:
                role = "batch"
            elif atom.kind == "feature":
                role = "head"
            elif len(positions) == 1 and atom.origin == "batch":
                role = "batch"  # one query for each: a decoder's step
            elif on_rows:
                role = "query" if atom.origin == rows else "batch"
            else:
                role = "batch" if positions and atom is positions[0] and len(positions) > 1 else "query"
            factors.append((atom.size, role))
        out.append(factors)
    return out


def _places(found: Sequence[tuple[Atom, ...]], read: Roles) -> tuple[tuple[int, int], ...]:
    placed: dict[Role, list[tuple[int, int]]] = {"batch": [], "head": [], "query": []}
    for axis, factors in zip(found, read, strict=True):
        names = [name for _, name in factors] if len(factors) == len(axis) else [factors[0][1]] * len(axis)
        if len(factors) > 1 and len(factors) != len(axis):
            return ()
        for atom, name in zip(axis, names, strict=True):
            if not atom.step:
                return ()
            placed[name].append((atom.size, atom.step))
    return tuple(place for name in placed.values() for place in name)


def _sharing(found: Sequence[tuple[Atom, ...]], read: Roles, side: str) -> int:
    """The heads that lie on one side of the product: one factor of an axis each, or the axis as a whole."""
    heads = 1
    for axis, factors in zip(found, read, strict=True):
        if len(factors) == len(axis):
            sides = [{atom.origin} for atom in axis]
        else:
            sides = [{atom.origin for atom in axis}] * len(factors)
        for (size, role), origins in zip(factors, sides, strict=True):
            heads *= size if role == "head" and origins == {side} else 1
    return heads


def _conventional(shape: Sequence[int], likely_heads: int) -> Roles:
    """(B, H, T), (B, T) or (T,), the order everyone uses; further axes in front are batch."""
    rank = len(shape)
    names: list[Role] = ["batch"] * rank
    if rank:
        names[-1] = "query"
    if rank == 3:
        # (B, T, H) where that is plain: the second axis is as long as there are heads, the first is not.
        swapped = shape[-1] == likely_heads != shape[-2] and likely_heads > 1
        names = ["batch", "query", "head"] if swapped else ["batch", "head", "query"]
    elif rank == 4:
        names = ["batch", "head", "head", "query"]
    elif rank > 4:
        names[-2] = "head"
    return [[(size, role)] for size, role in zip(shape, names, strict=True)]


def sizes(read: Roles) -> tuple[int, int, int]:
    found = {"batch": 1, "head": 1, "query": 1}
    for axis in read:
        for size, role in axis:
            found[role] *= size
    return found["batch"], found["head"], found["query"]


def viewer(read: Roles) -> Callable[[Tensor], Tensor]:
    """Scores (…, S) → (B, H, T, S), and rows (…,) given with a last axis of 1 likewise."""
    flat = [factor for axis in read for factor in axis]
    order = [i for wanted in ("batch", "head", "query") for i, (_, role) in enumerate(flat) if role == wanted]
    factors = [size for size, _ in flat]
    batch, heads, queries = sizes(read)

    def view(tensor: Tensor) -> Tensor:
        last = tensor.shape[-1]
        split = tensor.reshape(*factors, last)
        return split.permute(*order, len(flat)).reshape(batch, heads, queries, last)

    return view
