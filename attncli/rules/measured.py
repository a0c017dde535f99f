"""The numbers of a forward pass, call by call, as rules ask for them; and how a message says numbers and heads."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from attncli.records import Call
from attncli.rules.rule import Observed


class Measured(NamedTuple):
    """One attention call and its numbers. `heads`: metric → head → value; `whole`: those of no single head.

    What is None or NaN was not measured and stands nowhere here; infinities do.
    """

    call: Call
    heads: Mapping[str, Mapping[int, float]]
    whole: Mapping[str, float]

    def values(self, metric: str) -> Mapping[int, float]:
        return self.heads.get(metric, {})

    def median(self, metric: str) -> float | None:
        found = self.values(metric)
        return statistics.median(found.values()) if found else None


class Worst(NamedTuple):
    """The head with the largest value among the calls of one layer, and which heads are beyond a threshold."""

    measured: Measured
    head: int
    value: float
    beyond: tuple[int, ...]

    @property
    def others(self) -> str:
        """ " (5 of 12 heads)" where the worst head is not the only one."""
        return f" ({len(self.beyond)} of {self.measured.call.heads} heads)" if len(self.beyond) > 1 else ""


def measured_calls(observed: Observed, *, explained: bool = True) -> tuple[Measured, ...]:
    """The calls of a run with their numbers, in the order in which they ran.

    `explained`: only those whose rows came out as the model had them; of others nothing is certain.
    """
    nothing: tuple[Mapping[str, Mapping[int, float]], Mapping[str, float]] = ({}, {})
    return tuple(
        Measured(call, *observed.numbers.get(call.index, nothing))
        for call in observed.calls
        if call.explained or not explained
    )


def by_layer(found: Iterable[Measured]) -> dict[str, list[Measured]]:
    """The calls of each layer: several where it ran more than once."""
    layers: dict[str, list[Measured]] = defaultdict(list)
    for measured in found:
        layers[measured.call.layer].append(measured)
    return dict(layers)


def worst(
    calls: Sequence[Measured], values: Callable[[Measured], Mapping[int, float]], beyond: float
) -> Worst | None:
    """The head with the largest of `values` among the calls; None where none is beyond the threshold."""
    most: tuple[float, int, Measured] | None = None
    heads: set[int] = set()
    for measured in calls:
        for head, value in values(measured).items():
            if value > beyond:
                heads.add(head)
                if most is None or value > most[0]:
                    most = value, head, measured
    return None if most is None else Worst(most[2], most[1], most[0], tuple(sorted(heads)))


def layers_where(
    observed: Observed, wrong: Callable[[Measured], bool]
) -> Iterator[tuple[str, Measured, str]]:
    """Each layer with a call that is wrong: the first such call, and " in 2 of 3 calls" where others are right."""
    for layer, calls in by_layer(measured_calls(observed)).items():
        found = [seen for seen in calls if wrong(seen)]
        if found:
            count = f", in {len(found)} of {len(calls)} calls" if len(found) < len(calls) else ""
            yield layer, found[0], count


def is_cross(call: Call) -> bool:
    """Whether queries and keys come from two streams that share nothing, or the call is said to be so."""
    apart = bool(call.query_sources and call.key_sources) and not set(call.query_sources) & set(
        call.key_sources
    )
    return apart or call.kind == "cross"


def mask_kinds(call: Call) -> list[str]:
    return (call.mask_kind or "").split(" + ")


def number(value: float) -> str:
    """Three digits; above a thousand the whole number with its thousands apart: "71 200"."""
    if not math.isfinite(value):
        return "Inf" if value > 0 else "−Inf"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def one_over_root(value: float) -> str:
    """A scale with what it is: "0.125 = 1/√64"."""
    under = value**-2 if value > 0 else 0.0
    whole = round(under)
    if whole > 1 and math.isclose(under, whole, rel_tol=1e-3):
        return f"{number(value)} = 1/√{whole}"
    return number(value)


def many(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


# --- tables -----------------------------------------------------------------------------------------

# Normalisers whose rows must sum to 1.
SOFTMAX = ("softmax", "softmax by hand")
