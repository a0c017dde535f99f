"""Where the operands of a call come from: inputs and earlier calls, projections, a line of the user's code."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from attncli.trace.said import said
from attncli.trace.tape import Node, Tape


def kind_of(tape: Tape, query: Node, key: Node) -> Literal["self", "cross"] | None:
    """Self-attention where queries and keys are made of the same tensor, or could be.

    In the deeper layers of a decoder the queries come from all that the keys come from, and from the decoder's
    own input besides. So sources alone do not tell: where the two never meet on their way back to their stream,
    an input that only one of them knows makes it cross-attention.
    """
    if not query.sources or not key.sources:
        return "cross" if query.sources != key.sources else None
    shared = query.sources & key.sources
    if shared not in (query.sources, key.sources):
        return "cross"
    alone = tape.names_of((query.sources | key.sources) & ~shared)
    if any(name.startswith("input ") for name in alone) and not _stream(query) & _stream(key):
        return "cross"
    return "self"


def _stream(node: Node) -> set[int]:
    """The tensors that a projection was made of, back to where its residual stream was last added to."""
    found: set[int] = set()
    for _ in range(_FAR):
        found.add(node.serial)
        made = [ref.node for ref in node.operands if not ref.node.constant]
        if not made:
            break
        if len(made) > 1 and node.op.kind in ("product", "fused", "sum") and _both_streams(made):
            found.update(other.serial for other in made)
            break
        node = made[0]
    return found


def _both_streams(made: list[Node]) -> bool:
    """A sum or product of two that each depend on the input; rotary halves of one tensor are one stream."""
    first, second = (_before_rotation(node) for node in made[:2])
    return first is not second


def _before_rotation(node: Node) -> Node:
    """The node behind factors, views, halves and joins."""
    for _ in range(_NEAR):
        if node.op.kind not in (
            "factor",
            "join",
            "slice",
            "negative",
            "reshape",
            "permute",
            "same",
            "expand",
        ):
            return node
        made = [ref.node for ref in node.operands if not ref.node.constant]
        if not made:
            return node
        node = made[0]
    return node


def sources_of(tape: Tape, query: Node, key: Node, value: Node) -> dict[str, tuple[str, ...]]:
    named = {"query": query, "key": key, "value": value}
    return {f"{name}_sources": tape.names_of(node.sources) for name, node in named.items()}


def parameters_of(query: Node, key: Node, value: Node) -> dict[str, str]:
    found = {role: _projection(node) for role, node in (("q", query), ("k", key), ("v", value))}
    return {role: name for role, name in found.items() if name is not None}


def projected_features(node: Node) -> int | None:
    """How many features the projection of this value has."""
    for _ in range(_FAR):
        if node.op.kind == "product":
            return node.shape[-1]
        made = [ref for ref in node.operands if not ref.node.constant]
        if not made:
            return None
        node = made[0].node
    return None


def _projection(node: Node) -> str | None:
    """The name of the weight that projected this value."""
    for _ in range(_FAR):
        if node.op.kind in ("product", "convolution", "lookup"):
            # The weight stands last, behind a bias that some products add.
            found = (_parameter(ref.node) for ref in reversed(node.operands))
            return next((name for name in found if name is not None), None)
        made = [ref for ref in node.operands if not ref.node.constant]
        if not made:
            return None
        node = made[0].node
    return None


def _parameter(node: Node) -> str | None:
    for _ in range(_NEAR):
        if node.parameter is not None:
            return node.parameter
        if not node.constant or not node.operands:
            return None
        node = node.operands[0].node
    return None


def kv_heads_of(key: Node, heads: int, given: int | None = None) -> int:
    """Heads that keys really have: those before they were repeated for their group of queries."""
    node = key
    for _ in range(_NEAR * 2):
        if node.op.kind in ("product", "convolution", "leaf") or not node.operands:
            break
        # A cache begins as an empty tensor, to which the first keys are joined.
        inner = next((ref for ref in node.operands if math.prod(ref.shape)), node.operands[0])
        if node.op.kind == "expand" and node.shape != inner.shape:
            grown = [
                new // old
                for new, old in zip(node.shape[-len(inner.shape) :], inner.shape, strict=False)
                if old == 1 and new > 1
            ]
            for group in grown:
                if len(node.shape) >= 4 and heads % group == 0 and (given or heads) == heads:
                    return heads // group
        if node.op.kind == "repeat":
            ratios = [new // old for new, old in zip(node.shape, inner.shape, strict=False) if new != old]
            if len(ratios) == 1 and ratios[0] and heads % ratios[0] == 0 and (given or heads) == heads:
                return heads // ratios[0]
        node = inner.node
    return given or heads


class Place(NamedTuple):
    """A line of the user's code; spelled with its file from the working directory on down."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{_shown(self.file)}:{self.line}"


def user_place() -> Place | None:
    """The innermost line of code that is neither torch's nor ours.

    Code of ours that repeats what a line of the user's did before says which: in a local variable `said_place`.
    """
    now = said()
    if now is not None:
        return Place(*now.place) if now.place is not None else None
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("attncli.") and (own := frame.f_locals.get("said_place")) is not None:
            return Place(*own)
        if name.partition(".")[0] not in ("torch", "attncli"):
            file = frame.f_code.co_filename
            # The code of an exported program is generated: its lines are nobody's.
            return None if file.startswith("<eval_with_key>") else Place(file, frame.f_lineno)
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def user_line() -> str | None:
    place = user_place()
    return str(place) if place is not None else None


def _shown(file: str) -> str:
    """A file below the working directory relative to it, any other as it is."""
    try:
        here = Path.cwd()
    except OSError:  # the directory is gone
        return file
    path = Path(file)
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


# --- tables -------------------------------------------------------------------------------------------

_NEAR = 16
_FAR = 64
