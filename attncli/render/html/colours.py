"""The scale and the colours of numbers, and a picture of them as an image for readers without scripts."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from attncli.render.calls import Value

Colour = tuple[int, int, int]


class Scale(NamedTuple):
    """Which number is dark (`low`) and which is bright (`high`); `log`: in equal ratios instead of equal steps."""

    low: float
    high: float
    log: bool = False

    def fraction(self, value: float) -> float:
        """Where a number that is not NaN lies, from 0 to 1; beyond the ends it is the end."""
        if value <= self.low:
            return 0.0
        if value >= self.high:
            return 1.0
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def scale_of(values: Iterable[float], low: float | None, high: float | None) -> Scale:
    """The scale that holds all finite `values`; `low`, `high`: ends that do not follow from the numbers.

    Logarithmic where no end is given, all numbers are above 0 and they span more than two orders of magnitude.
    """
    finite = [value for value in values if math.isfinite(value)]
    least, most = min(finite, default=0.0), max(finite, default=1.0)
    log = low is None and high is None and least > 0 and most / least > _SPAN
    start = least if low is None else low
    end = most if high is None else high
    return Scale(start, end if end > start else start + 1.0, log)


def image(rows: Sequence[Sequence[Value]], scale: Scale) -> str:
    """A PNG of one pixel a number, as a data URI: NaN is red, what was not measured grey, no number white."""
    columns = max(map(len, rows), default=0)
    lines = b"".join(
        b"\0" + bytes(channel for at in range(columns) for channel in _pixel(row, at, scale)) for row in rows
    )
    header = struct.pack(">IIBBBBB", columns, len(rows), 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _pixel(row: Sequence[Value], at: int, scale: Scale) -> Colour:
    if at >= len(row):
        return _WHITE
    value = row[at]
    if not isinstance(value, (int, float)):
        return _GREY
    return _RED if math.isnan(value) else _colour(scale.fraction(value))


def _colour(fraction: float) -> Colour:
    """The colour between two stops of viridis."""
    place = fraction * (len(VIRIDIS) - 1)
    below = min(int(place), len(VIRIDIS) - 2)
    mixed = [
        round(first + (second - first) * (place - below))
        for first, second in zip(_channels(VIRIDIS[below]), _channels(VIRIDIS[below + 1]), strict=True)
    ]
    return mixed[0], mixed[1], mixed[2]


def _channels(stop: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(stop.removeprefix("#")))


# --- tables -------------------------------------------------------------------------------------------

# Viridis (matplotlib, CC0) in tenths: perceptually uniform, and the colour-blind see its order as well.
VIRIDIS = (
    "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c",
    "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725",
)  # fmt: skip
_RED = (200, 16, 46)
_GREY = (158, 158, 158)
_WHITE = (255, 255, 255)
_SPAN = 100.0
