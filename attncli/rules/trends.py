"""The trend of a number over the steps of a training run: robust against single odd batches, and cheap."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[int, float]


class Trend(NamedTuple):
    """A rise that goes on. `slope`: per step, the least of those of the window and of its recent parts.

    `level`: the trend's value at the last step; `steady`: whether no part is slower than the one before it; `span`: the
    steps from the first point to the last.
    """

    slope: float
    level: float
    steady: bool
    span: int

    def steps_to(self, value: float) -> float:
        """Steps from the last point until the trend reaches `value`, if it goes on as it does."""
        return (value - self.level) / self.slope


def rise(points: Sequence[Point], least: float, keeps: float = 0.5) -> Trend | None:
    """The rise of `points` (steps ascending, values finite); None where there is none that goes on.

    It goes on where the whole window, its recent half and its last quarter (four points at least, or all but one of
    the half) rise: three of four pairs of points lie in order, the whole rises by `least` and by three times its noise,
    and the last quarter rises at `keeps` of the rate of the recent half or more. What grows and levels off fails the
    last one.
    Cost: at most 1 500 pairs of points. Source: Theil 1950, Sen 1968 (slope), Kendall 1938 (pairs in order).
    """
    if len(points) < FEWEST:
        return None
    half = points[-max(_LEAST_RECENT, (len(points) + 1) // 2) :]
    thinned = _thinned(points)
    whole, recent = _slope(thinned), _slope(_thinned(half))
    if whole is None or recent is None:
        return None
    latest = _slope(points[-max(min(_LEAST_RECENT, len(half) - 1), len(points) // 4) :])
    if latest is None or latest < keeps * recent:
        return None
    span, last = points[-1][0] - points[0][0], points[-1][0]
    offsets = [value - whole * (step - last) for step, value in thinned]
    noise = 1.4826 * statistics.median(abs(one - statistics.median(offsets)) for one in offsets)
    if whole * span < max(least, _BEYOND_NOISE * noise):
        return None
    level = statistics.median(value - recent * (step - last) for step, value in half)
    steady = latest >= _STEADY * recent and recent >= _STEADY * whole
    return Trend(min(whole, recent, latest), level, steady, span)


class Slowing(NamedTuple):
    """A rise that has lost speed. `slope`: per step, at the last one; `decay`: slopes go with e^(−decay·step)."""

    slope: float
    decay: float

    def steps_to(self, ahead: float) -> float:
        """Steps until `ahead` more is reached, slowing down as it does; infinite where it levels off before."""
        if self.decay * ahead >= self.slope:
            return math.inf
        return -math.log1p(-self.decay * ahead / self.slope) / self.decay


def slowing(points: Sequence[Point], least: float = 0.8) -> Slowing | None:
    """How a rise slows down from its steepest third to its last; None where that has `least` of its slope or more.

    Cost: at most 1 500 pairs of points, for 64 of them.
    """
    size = max(_LEAST_THIRD, len(points) // 3)
    last = points[-size:]
    before = [points[at : at + size] for at in range(0, len(points) - size, max(1, size // 2))]
    steepest = max(before, key=lambda third: _slope(third) or 0.0)
    slope, most = _slope(last), _slope(steepest) or 0.0
    if slope is None:
        return Slowing(0.0, 0.0)
    if slope >= least * most:
        return None
    decay = math.log(most / slope) / (_middle(last) - _middle(steepest))
    return Slowing(slope * math.exp(-decay * (last[-1][0] - _middle(last))), decay)


def falls_off(values: Sequence[float]) -> bool:
    """Whether the last third of `values` lies below the first by more than chance: two standard errors of medians."""
    third = len(values) // 3
    if third < 2:
        return False
    first, last = values[:third], values[-third:]
    steps = [abs(after - before) for before, after in itertools.pairwise(values)]
    # Of independent errors, neighbours differ by σ·√2 and in the median by 0.954 σ.
    error = statistics.median(steps) / 0.954 * 1.2533 * math.sqrt(2 / third)
    return statistics.median(first) - statistics.median(last) > 2 * error


# --- building blocks ----------------------------------------------------------------------------------


def _slope(points: Sequence[Point]) -> float | None:
    """The median slope of all pairs; None where it is not above 0, or too few pairs are in order."""
    slopes = [
        (value - before) / (step - earlier)
        for at, (step, value) in enumerate(points)
        for earlier, before in points[:at]
        if step > earlier
    ]
    if not slopes or sum(slope > 0 for slope in slopes) < _IN_ORDER * len(slopes):
        return None
    return statistics.median(slopes)


def _middle(points: Sequence[Point]) -> float:
    return (points[0][0] + points[-1][0]) / 2


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    if len(points) <= _ENOUGH:
        return points
    last = len(points) - 1
    return [points[round(at * last / (_ENOUGH - 1))] for at in range(_ENOUGH)]


# --- settings -----------------------------------------------------------------------------------------

FEWEST = 6
_LEAST_RECENT = 4
_LEAST_THIRD = 3
_ENOUGH = 32
_IN_ORDER = 0.75
_BEYOND_NOISE = 3.0
_STEADY = 0.95
