"""The attention calls of a run as rows: which layer each belongs to, its numbers, and what rows have in common.

Rows of one stack stand in one block and are named by their layer's number; a layer that ran more than once
has a row per call. What is true of all rows of a block is said once, what differs is said of the rows it
is true of: numbers are never folded, facts are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from attncli.records import Call, Layer, Report
from attncli.render.fitting import packed
from attncli.render.folds import Fold, ranges
from attncli.render.words import clean, number

Value = float | int | str | None
# What a row has to say of its call, a few words each; "" says nothing.
Facts = Callable[[Call], Sequence[str]]


class Row(NamedTuple):
    """One call with its numbers. `heads`: head → metric → value; `whole`: those that belong to no head."""

    call: Call
    layer: Layer
    heads: Mapping[int, Mapping[str, Value]]
    whole: Mapping[str, Value]

    def numbers(self, metric: str) -> dict[int, float]:
        """The heads that have a number for `metric`, with it; NaN is a number."""
        return {
            head: float(value)
            for head, values in self.heads.items()
            if isinstance(value := values.get(metric), (int, float))
        }


class Block(NamedTuple):
    """Rows that belong together. `labels`: one a row; `keys`: the numbers by which facts name the rows.

    `noun`: what those numbers count, "layer" or "call"; "" where the labels are whole paths.
    """

    title: str
    noun: str
    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    keys: tuple[int, ...]


def call_rows(report: Report) -> list[Row]:
    """One row per call, in the order in which they ran."""
    heads: dict[int | None, dict[int, dict[str, Value]]] = defaultdict(lambda: defaultdict(dict))
    whole: dict[int | None, dict[str, Value]] = defaultdict(dict)
    for item in report.measurements:
        if item.head is None:
            whole[item.call][item.metric] = item.value
        else:
            heads[item.call][item.head][item.metric] = item.value
    layers = {layer.id: layer for layer in report.layers}
    return [
        Row(
            call,
            layers.get(call.layer) or _unlisted(call),
            {head: heads[call.index][head] for head in sorted(heads[call.index])},
            whole[call.index],
        )
        for call in report.calls
    ]


def blocks(rows: Sequence[Row], width: int) -> list[Block]:
    """`rows` by stack. Stacks of a single row share a block where their paths leave half of `width` free."""
    stacks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        stacks[row.layer.stack or row.layer.id].append(row)
    made: list[Block] = []
    for alone, group in groupby(stacks.values(), key=lambda stack: len(stack) == 1):
        stack_rows = list(group)
        singles = [row for stack in stack_rows for row in stack]
        if alone and len(singles) > 1 and all(len(path(row)) <= width // 2 for row in singles):
            made.append(_listed("", singles))
        else:
            made.extend(_block(stack) for stack in stack_rows)
    return made


def path(row: Row) -> str:
    """The layer's path as a person may see it; "(no module)" for attention that is a free function."""
    return clean(row.layer.path or row.layer.id) or _NO_MODULE


def full_label(some: Sequence[Row], rows: Sequence[Row]) -> str:
    """The path of one row, or the paths of several of one stack, folded; with the calls where layers ran twice."""
    layers = tuple({row.layer.id: row.layer for row in some}.values())
    folded = clean(Fold(layers).label) or _NO_MODULE
    if len(layers) > 1 and "{" not in folded:
        folded = ", ".join(path(row) for row in some)
    ids = {layer.id for layer in layers}
    if sum(row.layer.id in ids for row in rows) == len(layers):
        return folded
    return f"{folded} call{'s' if len(some) > 1 else ''} {ranges([row.call.index for row in some])}"


def headline(block: Block, facts: Facts, width: int) -> list[RenderableType]:
    """The block's title with what holds for all of its rows, and a line for each fact that holds for some."""
    said = [tuple(map(clean, filter(None, facts(row.call)))) for row in block.rows]
    shared = [fact for fact in said[0] if all(fact in other for other in said)]
    differing: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for at, words in enumerate(said):
        differing[tuple(word for word in words if word not in shared)].append(at)
    lines: list[RenderableType] = [*titled(block.title, shared, width)]
    if len(differing) > 1:
        for words, places in differing.items():
            line = f"{_named(block, places)}: {' · '.join(words) or 'neither'}"
            lines.append(Padding(Text(line), (0, 0, 0, 2), expand=False))
    return lines


def titled(title: str, facts: Sequence[str], width: int) -> list[Text]:
    """A bold title and its facts: on one line, or the facts below it, none broken where it fits a line."""
    whole = Text(title, style="bold")
    if title and facts:
        whole.append("  ")
    whole.append(" · ".join(facts), style="not bold")
    if not whole or whole.cell_len <= width:
        return [whole] if whole else []
    lines = [Text(title, style="bold")] if title else []
    return [*lines, *(Text(f"  {line}" if title else line) for line in packed(facts, width - 2))]


# --- facts that pictures and tables share -------------------------------------------------------------


def kind(call: Call) -> str:
    return f"{call.kind}-attention" if call.kind else "self or cross unknown"


def size(call: Call) -> str:
    return f"{call.queries}×{call.keys}"


def heads(call: Call) -> str:
    several = f"{call.heads} head{'' if call.heads == 1 else 's'}"
    return several if call.kv_heads == call.heads else f"{several} on {call.kv_heads} KV"


def mask(call: Call) -> str:
    """ "causal", "sliding window of 4096", "no mask", with what is odd about it."""
    if call.mask_kind is None:
        return "mask not recovered"
    if call.mask_kind == "none":
        return "no mask"
    words = call.mask_kind
    if call.window is not None:
        words = words.replace("sliding window", f"sliding window of {call.window}")
    if words in ("other", "bias"):
        words = {"other": "a mask of another shape", "bias": "additive bias"}[words]
    return words + _offset(call)


def _offset(call: Call) -> str:
    """Where the diagonal of a causal mask is not that of the last keys."""
    offset = call.causal_offset or 0
    if not offset:
        return ""
    if call.queries > 1 and offset == call.queries - call.keys:
        return ", from the first key on"  # right for a cache that was not filled yet, wrong for one that was
    return {-1: ", diagonal hidden", 1: ", one future key visible"}.get(
        offset, f", offset {offset:+d}".replace("-", "−")
    )


def kernel(call: Call) -> str:
    """The fused kernel, or that the model's own code makes the scores."""
    return "eager" if call.kernel == "softmax" else call.kernel


def design(call: Call) -> list[str]:
    """What is special about the normaliser and the scores; [] for a plain softmax over the keys."""
    words = [] if call.normaliser == "softmax" else [call.normaliser]
    words += [] if call.softmax_axis == "keys" else [f"normalised over the {call.softmax_axis}"]
    words += [] if call.soft_cap is None else [f"soft cap {number(call.soft_cap)}"]
    words += ["learned sinks"] if call.sinks else []
    words += [f"dropout {number(call.dropout)}"] if call.dropout else []
    return words


# --- building blocks ----------------------------------------------------------------------------------


def _unlisted(call: Call) -> Layer:
    """A layer for a call whose own is not in the report."""
    return Layer(
        call.layer, call.layer, call.kind, "", call.heads, call.kv_heads, call.head_dim, None, {}, ()
    )


def _block(rows: Sequence[Row]) -> Block:
    layers = tuple({row.layer.id: row.layer for row in rows}.values())
    numbers = [layer.index for layer in layers]
    title = clean(Fold(layers).label) or _NO_MODULE
    if len(layers) == 1:
        calls = tuple(row.call.index for row in rows)
        if len(rows) == 1:
            return Block(title, "", tuple(rows), ("",), calls)
        return Block(title, "call", tuple(rows), tuple(map(str, calls)), calls)
    if None in numbers or len(set(numbers)) < len(numbers):
        return _listed(title, rows)
    ordered = sorted(rows, key=lambda row: (row.layer.index, row.call.index))
    indices = tuple(row.layer.index or 0 for row in ordered)
    if len(layers) == len(rows):
        return Block(title, "layer", tuple(ordered), tuple(map(str, indices)), indices)
    calls = tuple(row.call.index for row in ordered)
    labels = tuple(f"{index} call {call}" for index, call in zip(indices, calls, strict=True))
    return Block(title, "call", tuple(ordered), labels, calls)


def _listed(title: str, rows: Sequence[Row]) -> Block:
    """Rows that only their whole paths tell apart."""
    labels = tuple(full_label([row], rows) for row in rows)
    return Block(title, "", tuple(rows), labels, tuple(row.call.index for row in rows))


def _named(block: Block, places: Sequence[int]) -> str:
    if not block.noun:
        return ", ".join(block.labels[at] for at in places)
    return f"{block.noun}{'s' if len(places) > 1 else ''} {ranges([block.keys[at] for at in places])}"


# --- tables -------------------------------------------------------------------------------------------

_NO_MODULE = "(no module)"
