"""Hand-made calls with their numbers, and what a case of a rule about them is. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import Call, Finding, Layer, Measurement
from attncli.rules import Observed, judge

PATH = "decoder.layers.7.self_attn"
HEALTHY_NUMBERS: Mapping[str, Any] = {
    "entropy": 1.8,
    "entropy_min": 0.4,
    "entropy_ratio": 0.6,
    "entropy_rest": 1.5,
    "sink_mass": 0.45,
    "sink_key": 0,
    "score_max": 6.0,
    "score_min": -7.0,
    "score_std": 1.5,
    "dot_absmax": 60.0,
    "reach": 9.0,
    "peaky_rows": 0.05,
    "rows": 64,
    "rows_masked": 0,
    "rows_padded": 0,
}
HEALTHY_FACTS: Mapping[str, Any] = {"row_sum_min": 1.0, "row_sum_max": 1.0}


class Ran(NamedTuple):
    """A call with what was measured on it: a number for all its heads, or a list of one for each."""

    call: Call
    numbers: Mapping[str, Any]


class Case(NamedTuple):
    """`broken` gives exactly the findings (code, severity, message); `healthy` gives none."""

    what: str
    broken: Observed
    expected: Sequence[tuple[str, str, str]]
    healthy: Observed


def ran(index: int = 0, *, numbers: Mapping[str, Any] | None = None, **changes: Any) -> Ran:
    """A healthy call of four heads of 64 over 32 tokens twice, causal, but for `changes` and `numbers`."""
    call = Call(
        index=index,
        layer=PATH,
        module=PATH,
        kernel="softmax",
        kind="self",
        normaliser="softmax",
        batch=2,
        heads=4,
        kv_heads=4,
        queries=32,
        keys=32,
        head_dim=64,
        dtype="float32",
        scores_dtype="float32",
        stored="raw",
        scale=0.125,
        factors={"scores": 0.125},
        mask_kind="causal",
        causal_offset=0,
        explained=True,
    )
    return Ran(dataclasses.replace(call, **changes), {**HEALTHY_NUMBERS, **HEALTHY_FACTS, **(numbers or {})})


def seen(*runs: Ran, layers: Sequence[Layer] = ()) -> Observed:
    rows: list[Measurement] = []
    for call, numbers in runs:
        for metric, value in numbers.items():
            if metric in HEALTHY_NUMBERS:
                values = value if isinstance(value, (list, tuple)) else [value] * call.heads
                rows += [
                    Measurement(metric, call.layer, one, head=head, call=call.index)
                    for head, one in enumerate(values)
                ]
            else:
                rows.append(Measurement(metric, call.layer, value, call=call.index))
    return Observed(tuple(layers), tuple(rows), (), tuple(call for call, _ in runs))


def one(index: int = 0, *, numbers: Mapping[str, Any] | None = None, **changes: Any) -> Observed:
    return seen(ran(index, numbers=numbers, **changes))


def layer(path: str = PATH, **changes: Any) -> Layer:
    found = Layer(
        id=path,
        path=path,
        kind="self",
        layout="separate",
        heads=4,
        kv_heads=4,
        head_dim=64,
        scale=None,
        evidence={},
        tensors=(),
    )
    return dataclasses.replace(found, **changes)


def check(case: Case) -> tuple[Finding, ...]:
    """The findings of the broken records, after both sides were looked at."""
    found = judge(case.broken)
    assert [(f.code, f.severity, f.message) for f in found] == list(case.expected)
    assert judge(case.healthy) == ()
    for finding in found:
        assert finding.evidence
        assert finding.advice.endswith(".")
    return found


def above(value: float) -> float:
    return math.nextafter(value, math.inf)


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)
