"""The scale and the colours of numbers, and a picture of them as an image for readers without scripts."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from attncli.render.calls import Value


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
        b"\0" + bytes(_place(value, scale) for value in row) + bytes([_NO_CELL] * (columns - len(row)))
        for row in rows
    )
    header = struct.pack(">IIBBBBB", columns, len(rows), 8, 3, 0, 0, 0)
    body = ((b"IHDR", header), (b"PLTE", _palette()), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in body
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _place(value: Value, scale: Scale) -> int:
    """The place of a number's colour in the palette."""
    if not isinstance(value, (int, float)):
        return _NOT_MEASURED
    return _NAN if math.isnan(value) else round(scale.fraction(value) * _BRIGHTEST)


@cache
def _palette() -> bytes:
    ramp = b"".join(_colour(place / _BRIGHTEST) for place in range(_BRIGHTEST + 1))
    return ramp + b"".join(map(_channels, ("#ffffff", "#9e9e9e", "#c8102e")))


def _colour(fraction: float) -> bytes:
    """The colour between two stops of viridis."""
    place = fraction * (len(VIRIDIS) - 1)
    below = min(int(place), len(VIRIDIS) - 2)
    pairs = zip(_channels(VIRIDIS[below]), _channels(VIRIDIS[below + 1]), strict=True)
    return bytes(round(first + (second - first) * (place - below)) for first, second in pairs)


def _channels(stop: str) -> bytes:
    return bytes.fromhex(stop.removeprefix("#"))


# --- tables -------------------------------------------------------------------------------------------

# Viridis (matplotlib, CC0) in tenths: perceptually uniform, and the colour-blind see its order as well.
VIRIDIS = (
    "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c",
    "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725",
)  # fmt: skip
_BRIGHTEST, _NO_CELL, _NOT_MEASURED, _NAN = 252, 253, 254, 255  # places in the palette, in its order
_SPAN = 100.0
