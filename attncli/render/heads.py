"""The layers × heads picture: one cell per head, its entropy as the number, its share of ln n as the colour.

Numbers are whole at any width: heads that do not fit go on in a further band below. Colours only repeat what
the numbers say, and only where the terminal has enough of them to keep the numbers readable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.text import Text

from attncli.records import Call
from attncli.render import calls
from attncli.render.calls import Block, Row, Value


def picture(rows: Sequence[Row], console: Console) -> list[RenderableType]:
    """The picture of every block, with one legend above."""
    painted = console.color_system in ("truecolor", "256") and not console.no_color
    parts: list[RenderableType] = [_legend(painted)]
    for block in calls.blocks(rows, console.width):
        lines = [*calls.headline(block, _facts, console.width), *_bands(block, console.width, painted)]
        parts.append(Group(*lines, Text()))
    return parts


def nats(value: Value) -> str:
    """Two decimals; "0" only for zero (a rounding error below it counts as zero), "—" where undefined."""
    if not isinstance(value, (int, float)):
        return "—"
    if not math.isfinite(value):
        return str(value)
    if -0.005 < value <= 0:
        return "0"
    return "<.01" if 0 < value < 0.005 else f"{value:.2f}"


def share(value: Value) -> str:
    """A share from 0 to 1 with two decimals that reads 0 or 1 only where it is."""
    if isinstance(value, (int, float)) and 0.995 < value < 1:
        return ">.99"
    return "1" if value == 1 else nats(value)


def colours(fraction: float) -> Style:
    """The cell of a head with that share of ln n: dark is concentrated, bright is even, the number readable."""
    step = min(max(int(fraction * len(_STEPS)), 0), len(_STEPS) - 1)
    background, foreground = _STEPS[step]
    return Style(color=Color.from_ansi(foreground), bgcolor=Color.from_ansi(background))


# --- lines --------------------------------------------------------------------------------------------


def _legend(painted: bool) -> Group:
    title = Text("Entropy in nats, mean over queries: a row per layer, a column per head", style="bold")
    if not painted:
        note = "H/ln n: the share of what n keys allow, mean over queries and heads"
        return Group(title, Text(note, style="dim"))
    note = "Colour: H/ln n, the share of what n keys allow; as a number, its mean over heads"
    scale = Text("on one key ")
    for step in range(len(_STEPS)):
        scale.append(f" {_MARKS.get(step, ' ')} ", colours(step / len(_STEPS)))
    scale.append(" on all alike")
    return Group(title, Text(note, style="dim"), scale)


def _bands(block: Block, width: int, painted: bool) -> list[Text]:
    """As many heads beside each other as `width` holds, the rest in bands below."""
    cells = [{head: nats(values.get("entropy")) for head, values in row.heads.items()} for row in block.rows]
    heads = sorted({head for row in cells for head in row})
    if not heads:
        return [Text("  no numbers", style="yellow")]
    cell = 1 + max(len(word) for row in cells for word in (*row.values(), str(heads[-1])))
    label = max(len(name) for name in (*block.labels, block.noun))
    means = [share(_mean(row)) for row in block.rows]
    mean = max(len(_MEAN), *map(len, means))
    first = label + 2 + mean + 1 if label + 2 + mean + 1 + cell < width else 0
    lines: list[Text] = []
    for band in _chunks(heads, max(1, (width - max(first, label + 2) - 1) // cell)):
        if lines:
            lines.append(Text())
        with_mean = bool(first) and not lines
        heading = _start(block.noun, label, block.noun) + (f"{_MEAN:>{mean}} " if with_mean else "")
        heading += "".join(f"{head:>{cell}}" for head in band)
        lines.append(Text(heading, style="dim", no_wrap=True, overflow="ignore"))
        for row, texts, name, of_all in zip(block.rows, cells, block.labels, means, strict=True):
            start = _start(name, label, block.noun) + (f"{of_all:>{mean}} " if with_mean else "")
            line = Text(start, no_wrap=True, overflow="ignore")
            _append_cells(line, row.heads, texts, band, cell, painted)
            lines.append(line)
    return lines


def _start(name: str, label: int, noun: str) -> str:
    """A row's label and the gap after it: numbers to the right, paths to the left, nothing where none is."""
    if not label:
        return ""
    return f"{name:>{label}}  " if noun else f"{name:<{label}}  "


def _append_cells(
    line: Text,
    numbers: Mapping[int, Mapping[str, Value]],
    texts: Mapping[int, str],
    band: Sequence[int],
    cell: int,
    painted: bool,
) -> None:
    style: Style | str = ""
    for head in band:
        text = texts.get(head, "")
        ratio = numbers.get(head, {}).get("entropy_ratio")
        if text == "nan":
            style = "bold red"
        elif painted and isinstance(ratio, (int, float)) and math.isfinite(ratio):
            style = colours(float(ratio))
        else:
            style = ""
        line.append(f"{text:>{cell}}", style)
    if isinstance(style, Style):
        line.append(" ", style)


def _chunks(heads: Sequence[int], most: int) -> list[Sequence[int]]:
    """Bands of about the same number of heads, of a multiple of four or two where that needs no further band."""
    even = math.ceil(len(heads) / math.ceil(len(heads) / most))
    several = next(up for step in (4, 2, 1) if (up := even + -even % step) <= most or step == 1)
    return [heads[at : at + several] for at in range(0, len(heads), several)]


def _mean(row: Row) -> float | None:
    ratios = row.numbers("entropy_ratio").values()
    return math.fsum(ratios) / len(ratios) if ratios else None


def _facts(call: Call) -> list[str]:
    return [
        calls.kind(call),
        calls.mask(call),
        calls.size(call),
        calls.heads(call),
        calls.kernel(call),
        *calls.design(call),
    ]


# --- tables -------------------------------------------------------------------------------------------

_MEAN = "H/ln n"
# Background and foreground of each eighth of ln n, as numbers of the 256-colour palette, so that every terminal
# shows the same: the way of viridis (matplotlib, CC0) from purple to yellow, lightness L* 21, 28, 38, 51, 64, 77,
# 84, 97, which the colour-blind see as well. Black (16) or white (231) on it has a contrast of 4.8 to 1 or more.
_STEPS = ((53, 231), (55, 231), (24, 231), (30, 16), (36, 16), (77, 16), (185, 16), (227, 16))
_MARKS = {0: "0", 4: "½", 7: "1"}
