"""Attention maps in blocks: a line for each query, a cell for each key, and the key that gets the most by name.

A cell means the same probability in every map, so that heads can be compared: the steps are fixed, not stretched to
the largest. Where a terminal is too narrow neighbouring keys are added up, and what a cell holds is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.text import Text

from attncli.records import AttentionMap
from attncli.render.calls import Row, full_label, titled
from attncli.render.heads import colours, nats, share
from attncli.render.words import clean


def map_parts(maps: Sequence[AttentionMap], rows: Sequence[Row], console: Console) -> list[RenderableType]:
    """Every map under a title of its own, with one legend above."""
    if not maps:
        return []
    shown = {row.call.index: row for row in rows}
    several = {one.call for one in maps if one.batch}
    parts: list[RenderableType] = [_legend(console)]
    for one in maps:
        row = shown.get(one.call)
        title = f"{full_label([row], rows) if row is not None else clean(one.layer)} head {one.head}"
        picture = _Picture(one, console.width)
        facts = [f"row {one.batch}"] if one.call in several else []
        facts += [*_measured(row, one.head), f"{one.queries} queries × {one.keys} keys", *picture.facts()]
        parts.append(Group(*titled(title, facts, console.width), *picture.lines(console), Text()))
    return parts


# --- one map ------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """What one line shows: blocks of queries from `start` on. `probs` None: no key is allowed."""

    start: int
    label: str
    probs: tuple[float, ...] | None


class _Picture:
    """A map at a width: labels, cells, and the strongest key of each line."""

    def __init__(self, given: AttentionMap, width: int) -> None:
        self.given = given
        self.rows = _joined_rows(given)
        self.number = len(str(given.query_starts[-1] if given.query_starts else 0))
        most = max((cell_len(line.label) for line in self.rows), default=0)
        self.label = min(most, max(4, min(_LONGEST_LABEL, width // 5)))
        self.start = self.number + (1 + self.label if self.label else 0) + 1
        self.keys = [clean(token) for token in given.key_tokens]
        longest = max(map(cell_len, self.keys), default=0)
        self.name = min(longest, max(4, min(_LONGEST_LABEL, width // 5)))
        places = max((len(self._place(at)) for at in range(len(given.key_starts))), default=0)
        # "→ 12 [SEP] 0.43"
        room = max(
            1, width - self.start - len(f" → {' ' * places} 0.43 ") - (self.name + 1 if self.keys else 0)
        )
        columns = max(1, len(given.key_starts))
        self.wide = 2 if 2 * columns <= room else 1
        self.merged = math.ceil(columns / (room // self.wide))

    def facts(self) -> list[str]:
        """What a line and a cell hold, where that is more than one query and one key."""
        down = _step([line.start for line in self.rows], self.given.queries)
        across = _step(list(self.given.key_starts[:: self.merged]), self.given.keys)
        facts = [f"a line is the mean of {down} queries"] if down > 1 else []
        return [*facts, f"a cell the sum of {across} keys"] if across > 1 else facts

    def lines(self, console: Console) -> list[Text]:
        painted, marks = _is_painted(console), _marks(console)
        found = [self._ruler()]
        for line in self.rows:
            start = f"{line.start:>{self.number}} "
            if self.label:
                start += f"{_cut(line.label, self.label)} "
            text = Text(start, no_wrap=True, overflow="ignore")
            if line.probs is None:
                text.append("no key allowed", "yellow")
                found.append(text)
                continue
            for at in range(0, len(line.probs), self.merged):
                _append_cell(text, math.fsum(line.probs[at : at + self.merged]), self.wide, painted, marks)
            text.append(f" {self._strongest(line.probs)}", "dim")
            found.append(text)
        return found

    def _ruler(self) -> Text:
        """The place of the key above its cell, wherever there is room for it."""
        text = " " * self.start
        for column, start in enumerate(self.given.key_starts[:: self.merged]):
            at = self.start + column * self.wide
            if at >= len(text) and (at == self.start or at > len(text)):
                text = f"{text:<{at}}{start}"
        return Text(text, style="dim", no_wrap=True, overflow="ignore")

    def _strongest(self, probs: Sequence[float]) -> str:
        if any(math.isnan(value) for value in probs):
            return "→ nan"
        at = max(range(len(probs)), key=lambda key: probs[key])
        name = f" {_cut(self.keys[at], self.name).rstrip()}" if self.keys else ""
        return f"→ {self._place(at)}{name} {share(probs[at])}"

    def _place(self, at: int) -> str:
        """ "12", or "8–15" for a block of keys."""
        starts = self.given.key_starts
        if not 0 <= at < len(starts):
            return ""
        last = (starts[at + 1] if at + 1 < len(starts) else self.given.keys) - 1
        return str(starts[at]) if last == starts[at] else f"{starts[at]}–{last}"


def _joined_rows(given: AttentionMap) -> list[_Line]:
    """The map's rows; neighbours as their mean where they are blocks already and more than `_MOST_LINES`."""
    starts = given.query_starts
    labels = [clean(token) for token in given.query_tokens] or [""] * len(starts)
    together = 1
    if len(starts) > _MOST_LINES and (not given.query_tokens or _step(starts, given.queries) > 1):
        together = math.ceil(len(starts) / _MOST_LINES)
    ends = (*starts[1:], given.queries)
    lines = []
    for at in range(0, len(starts), together):
        some = [
            (row, end - start)
            for row, start, end in zip(
                given.probs[at : at + together],
                starts[at : at + together],
                ends[at : at + together],
                strict=True,
            )
            if row is not None
        ]
        counted = sum(size for _, size in some)
        probs = (
            tuple(
                math.fsum(row[key] * size for row, size in some) / counted for key in range(len(some[0][0]))
            )
            if len(some) > 1
            else (some[0][0] if some else None)
        )
        lines.append(_Line(starts[at], " ".join(filter(None, labels[at : at + together])), probs))
    return lines


# --- cells --------------------------------------------------------------------------------------------


def _append_cell(line: Text, value: float, width: int, painted: bool, marks: Sequence[str]) -> None:
    if math.isnan(value):
        line.append("?" * width, "bold red")
    elif painted:
        line.append(" " * width, "" if value == 0 else _colour(value))
    else:
        level = sum(value >= cut for cut in _SHADES)
        line.append((" " if value == 0 else marks[level]) * width)


def _colour(value: float) -> Style:
    level = sum(value >= cut for cut in _CUTS)
    return colours((level + 0.5) / (len(_CUTS) + 1))


def _legend(console: Console) -> Group:
    title = Text("Attention maps: a line per query, a cell per key", style="bold")
    scale = [Text("Probability, the same in every map:"), Text("blank 0")]
    if _is_painted(console):
        cuts = (_CUTS[0] / 2, *_CUTS)
        words = (f"<{_decimals(_CUTS[0])}", *map(_decimals, _CUTS))
        scale += [Text(f" {word} ", _colour(cut)) for cut, word in zip(cuts, words, strict=True)]
    else:
        words = (f"below {_decimals(_SHADES[0])}", *(f"from {_decimals(cut)}" for cut in _SHADES))
        scale += [Text(f"{mark} {word}") for mark, word in zip(_marks(console), words, strict=True)]
    scale.append(Text("→ the key that gets most"))
    return Group(title, *_wrapped(scale, console.width), Text())


def _wrapped(words: Sequence[Text], width: int) -> list[Text]:
    """As many on each line as it holds, two columns apart; none is broken."""
    lines = [words[0].copy()]
    for word in words[1:]:
        if lines[-1].cell_len + 2 + word.cell_len <= width:
            lines[-1].append("  ").append_text(word)
        else:
            lines.append(word.copy())
    return lines


def _decimals(value: float) -> str:
    return f"{value:g}".removeprefix("0")


def _is_painted(console: Console) -> bool:
    return console.color_system in ("truecolor", "256") and not console.no_color


def _marks(console: Console) -> Sequence[str]:
    return _ASCII if console.options.ascii_only else _BLOCKS


# --- building blocks ----------------------------------------------------------------------------------


def _measured(row: Row | None, head: int) -> list[str]:
    value = row.heads.get(head, {}).get("entropy") if row is not None else None
    if not isinstance(value, (int, float)):
        return []
    return [
        f"entropy {nats(value)} nats{' over the batch' if row is not None and row.call.batch > 1 else ''}"
    ]


def _step(starts: Sequence[int], length: int) -> int:
    """Places in a block: all but the last have as many."""
    return starts[1] - starts[0] if len(starts) > 1 else max(1, length)


def _cut(label: str, width: int) -> str:
    """`label` in exactly `width` columns, with "…" where something is cut off."""
    return set_cell_size(label, width) if cell_len(label) <= width else set_cell_size(label, width - 1) + "…"


# --- tables -------------------------------------------------------------------------------------------

# Where each colour begins, and where each shade does. Even attention over the 64 cells of a map lies at .016.
_CUTS = (0.01, 0.03, 0.06, 0.12, 0.25, 0.5, 0.75)
_SHADES = (0.01, 0.1, 0.2, 0.5)
_BLOCKS = ("·", "░", "▒", "▓", "█")
_ASCII = (".", ":", "+", "#", "@")
_LONGEST_LABEL = 16
# Lines of a map whose queries are blocks anyway; where each is a token of a text it has a line of its own.
_MOST_LINES = 32
