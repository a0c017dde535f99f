"""The attention of sampled training steps, head by head, and how it went from sample to sample."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attncli.records import Sample


class Samples:
    """The last samples of every head and metric."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, int, int, str], deque[Sample]] = {}
        self._fresh: list[Sample] = []

    @contextmanager
    def taken(self, module: Any, step: int) -> Iterator[None]:
        """The attention of the call of `module` that is made inside is measured."""
        from attncli.trace import listening, surroundings, told
        from attncli.training.models import inside

        with listening(inside(module)) as heard:
            yield
        if heard.tape.failure is not None:
            raise heard.tape.failure
        found = told(heard.listener, heard.tape.operators, heard.notes, surroundings(module, ()), None)
        for sample in _samples(found, step):
            key = (sample.layer, sample.call, sample.head, sample.metric)
            self._series.setdefault(key, deque(maxlen=_KEPT)).append(sample)
            self._fresh.append(sample)

    def fresh(self) -> list[Sample]:
        """Those that were taken since this was asked last."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def all(self) -> tuple[Sample, ...]:
        """In the order of their steps."""
        return tuple(sorted((one for row in self._series.values() for one in row), key=lambda one: one.step))


def _samples(found: Any, step: int) -> Iterator[Sample]:
    calls = {call.index: call for call in found.calls}
    headroom = {
        (row.call, row.head): row.value
        for row in found.measurements
        if row.call in calls and row.metric == f"headroom_bits_{calls[row.call].scores_dtype}"
    }
    for row in found.measurements:
        if row.metric in _SAMPLED and row.head is not None and isinstance(row.value, (int, float)):
            call = calls[row.call]
            stored = call.scores_dtype if call.stored != "nothing" else None
            yield Sample(step, call.module, call.index, row.head, row.metric, float(row.value), stored)
            bits = headroom.get((row.call, row.head))
            if row.metric == "dot_absmax" and stored is not None and isinstance(bits, (int, float)):
                bits = _stored_bits(float(bits), call)
                yield Sample(step, call.module, call.index, row.head, "headroom_bits", bits, stored)


def _stored_bits(bits: float, call: Any) -> float:
    """Bits of headroom of what is written to memory: q·k itself, or with the factors that stand before the product."""
    if call.stored != "scaled":
        return bits
    factor = math.prod(value for place, value in call.factors.items() if place in ("query", "key"))
    return bits - math.log2(abs(factor)) if factor else bits


# --- settings -----------------------------------------------------------------------------------------

_SAMPLED = ("entropy", "entropy_ratio", "entropy_rest", "score_max", "dot_absmax")
# Samples of one head and metric.
_KEPT = 64
