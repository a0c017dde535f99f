"""`--maps LAYER[:HEAD]`: which heads of a run are drawn, and the tokens that stand beside their maps."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from attncli.api.report import Report, fits
from attncli.errors import UsageError
from attncli.records import AttentionMap, Call, Layer

if TYPE_CHECKING:
    from attncli.trace import Maps

# Tokens by the name of the input that holds them: one row for each text.
Tokens = Mapping[str, Sequence[Sequence[str]]]
MOST_HEADS = 16
"""Heads drawn of a layer of which no head is named."""


class Wanted(NamedTuple):
    """One value of `--maps`. `pattern`: of layers, as in --layer; `heads` None: all up to `MOST_HEADS`."""

    text: str
    pattern: str
    heads: tuple[range, ...] | None

    def heads_of(self, heads: int) -> list[int]:
        """The heads that are wanted of a call with so many."""
        if self.heads is None:
            return list(range(min(heads, MOST_HEADS)))
        return [head for some in self.heads for head in range(some.start, min(some.stop, heads))]


def wanted_maps(texts: Sequence[str]) -> tuple[Wanted, ...]:
    """The values of `--maps`, read. Errors: UsageError for one that is not LAYER[:HEAD]."""
    return tuple(_wanted_map(text) for text in texts)


def maps_to_draw(
    wanted: Sequence[Wanted],
    reaches: Sequence[Callable[[str], bool]],
    layers: Sequence[Layer],
    rows: int,
) -> Maps:
    """What the run is to draw. `reaches`: whether each of `wanted` may mean a module path; `layers`: in memory.

    While the model runs, a call's layer is not known for certain: more may be drawn than is kept.
    """
    from attncli.trace import Maps

    weights = [
        {tensor.name for layer in layers if fits(layer, one.pattern) for tensor in layer.tensors}
        for one in wanted
    ]

    def heads(module: str, parameters: Mapping[str, str], count: int) -> list[int]:
        found: list[int] = []
        for one, reach, names in zip(wanted, reaches, weights, strict=True):
            by_weight = not module and names and parameters
            if names & set(parameters.values()) if by_weight else reach(module):
                found += one.heads_of(count)
        return found

    return Maps(heads, rows)


def with_maps(
    report: Report,
    drawn: Maps,
    found: Mapping[int, Any],
    wanted: Sequence[Wanted],
    tokens: Tokens,
    subject: str,
) -> Report:
    """The report with the maps of the heads that were asked for, and a note for each that could not be drawn.

    `found`: `Trace.maps`. `tokens`: empty where the batch is no text. Errors: UsageError where one of `wanted`
    matches nothing, or names a head that no matching call has.
    """
    layers = {layer.id: layer for layer in report.layers}
    calls = {call.index: call for call in report.calls}
    heads: dict[int, set[int]] = {}
    notes: list[str] = []
    for one in wanted:
        matching = [call for call in report.calls if call_fits(layers[call.layer], call, one.pattern)]
        idle = [layer.id for layer in report.layers if fits(layer, one.pattern)] if not matching else []
        if not matching and not idle:
            raise UsageError(subject, f"no attention call matches --maps {one.text}.", _hint(report))
        notes += [f"no map of {name}: it ran no softmax attention" for name in idle]
        _refuse_heads(one, matching, subject)
        for call in matching:
            heads.setdefault(call.index, set()).update(one.heads_of(call.heads))
            if one.heads is None and call.heads > MOST_HEADS:
                notes.append(
                    f"{call.layer} has {call.heads} heads, of which the first {MOST_HEADS} are drawn: "
                    f"--maps {call.layer}:{MOST_HEADS}-{call.heads - 1} draws the others"
                )
    maps: list[AttentionMap] = []
    for index in sorted(heads):
        call = calls[index]
        reason = _without_map(call)
        if reason:
            notes.append(f"no map of {call.layer}: {reason}")
            continue
        of_call = [one for one in found.get(index, ()) if one.head in heads[index]]
        sides = [_tokens_of(call, side, tokens, calls) for side in ("query", "key")]
        maps += [
            _labelled(call, one, *sides) for one in sorted(of_call, key=lambda one: (one.batch, one.head))
        ]
    if any(calls[one.call].batch > 1 for one in maps) and all(one.batch == 0 for one in maps):
        notes.append("maps show the first row of the batch")
    if drawn.left_out:
        notes.append(f"{drawn.left_out} maps beyond the first {drawn.most} were left out: name fewer heads")
    return replace(report, maps=tuple(maps), notes=(*report.notes, *dict.fromkeys(notes)))


def call_fits(layer: Layer, call: Call, pattern: str) -> bool:
    """Whether a pattern of --layer or --maps means this call: by its layer's path or number, or its module's path."""
    paths = {layer.id, layer.path, call.module}
    return fits(layer, pattern) or pattern in paths or any(fnmatch.fnmatchcase(p, pattern) for p in paths)


# --- LAYER[:HEAD] -------------------------------------------------------------------------------------


def _wanted_map(text: str) -> Wanted:
    whole = text.strip()
    pattern, colon, tail = whole.rpartition(":")
    # Attention outside any module is named by its line, FILE.py:LINE.
    has_heads = bool(colon) and not pattern.endswith(".py") and re.fullmatch(r"[\d,\s-]*", tail) is not None
    pattern = pattern.rstrip() if has_heads else whole
    if not pattern:
        raise UsageError(f"--maps {text}", "it names no layer.", _FORM)
    return Wanted(whole, pattern, _ranges(text, tail) if has_heads else None)


def _ranges(text: str, heads: str) -> tuple[range, ...]:
    """ "0,5-7" → the ranges of 0 and of 5 to 7."""
    found = []
    for part in heads.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII)
        if match is None:
            raise UsageError(f"--maps {text}", f"{part.strip()!r} is no head.", _FORM)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"--maps {text}", f"{part.strip()} runs backwards.", _FORM)
        found.append(range(first, last + 1))
    return tuple(found)


def _refuse_heads(one: Wanted, matching: Sequence[Call], subject: str) -> None:
    most = max((call.heads for call in matching), default=0)
    beyond = [some.stop - 1 for some in one.heads or () if some.stop > most]
    if most and beyond:
        where = matching[0].layer if len(matching) == 1 else one.pattern
        counted = f"{most} head{'' if most == 1 else 's'}"
        problem = f"there is no head {max(beyond)} for --maps {one.text}: {where} has {counted}."
        raise UsageError(subject, problem, f"Heads count from 0 to {most - 1}.")


def _hint(report: Report) -> str:
    if not report.calls:
        return "No attention ran at all."
    return f"Layers go by path, glob or number: --maps {report.calls[0].layer}:0, or --maps '*:0'."


def _without_map(call: Call) -> str:
    if not call.explained:
        return f"it was not observed ({call.reason or 'its output could not be recomputed'})"
    if call.normaliser in _NO_PROBABILITIES:
        return f"its weights are no probabilities ({call.normaliser})"
    return ""


# --- tokens -------------------------------------------------------------------------------------------


def _tokens_of(call: Call, side: str, tokens: Tokens, calls: Mapping[int, Call]) -> Sequence[Sequence[str]]:
    """The tokens at each place of the queries or keys, for every row of the batch; empty where that is not certain."""
    length = call.queries if side == "query" else call.keys
    sources = call.query_sources if side == "query" else call.key_sources
    named = [name for name in tokens if f"input {name}" in sources]
    if len(named) > 1:
        # A decoder's stream holds the encoder's tokens as well, but only as values that it looked up: its places
        # are those of the queries that did.
        looked_up = [
            other
            for other in calls.values()
            if f"call {other.index}" in sources and other.kind == "cross" and other.index < call.index
        ]
        asking = {
            name for other in looked_up for name in tokens if _only_source(other.query_sources, name, tokens)
        }
        named = [name for name in named if name in asking]
    if len(named) != 1 or call.softmax_axis != "keys":
        return ()
    rows = tokens[named[0]]
    return rows if len(rows) == call.batch and all(len(row) == length for row in rows) else ()


def _only_source(sources: Sequence[str], name: str, tokens: Tokens) -> bool:
    return [other for other in tokens if f"input {other}" in sources] == [name]


def _labelled(
    call: Call, one: Any, query_rows: Sequence[Sequence[str]], key_rows: Sequence[Sequence[str]]
) -> AttentionMap:
    """`one`: a `trace.maps.Drawn`."""
    return AttentionMap(
        layer=call.layer,
        call=call.index,
        head=one.head,
        batch=one.batch,
        queries=one.queries,
        keys=one.keys,
        query_starts=one.query_starts,
        key_starts=one.key_starts,
        probs=one.probs,
        query_tokens=_blocks(query_rows, one.batch, one.first_query, one.queries, one.query_starts),
        key_tokens=_blocks(key_rows, one.batch, one.first_key, one.keys, one.key_starts),
    )


def _blocks(
    rows: Sequence[Sequence[str]], row: int, first: int, length: int, starts: Sequence[int]
) -> tuple[str, ...]:
    """The text of each block: its tokens with a space between them, cut to `_LONGEST` characters."""
    if not rows:
        return ()
    tokens = rows[row][first : first + length]
    texts = [" ".join(tokens[a:b]) for a, b in zip(starts, (*starts[1:], length), strict=True)]
    return tuple(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in texts)


# --- tables -------------------------------------------------------------------------------------------

_FORM = "Write LAYER[:HEAD], such as 3, 3:0,5-7 or 'encoder.layers.*.self_attn:0'."
_NO_PROBABILITIES = ("sigmoid", "relu")
_LONGEST = 60
