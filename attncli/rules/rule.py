"""What a rule is: its whole text and its check in one place. Knows records; knows no output and no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from attncli.records import (
    Anomaly,
    Call,
    Expectation,
    Finding,
    Layer,
    Measurement,
    Origin,
    Severity,
    Training,
)


@dataclass(frozen=True)
class Observed:
    """Everything a rule may look at. `anomalies`: what the readers stated about files and weights.

    `calls`: the attention calls of a forward pass; a measurement's `call` is a call's `index`. `origins`:
    of NaN and Inf. `expected`: what the user says that the model is. `training`: what was seen of a training run.
    """

    layers: tuple[Layer, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    anomalies: tuple[Anomaly, ...] = ()
    calls: tuple[Call, ...] = ()
    origins: tuple[Origin, ...] = ()
    expected: tuple[Expectation, ...] = ()
    training: Training | None = None

    @cached_property
    def numbers(self) -> Mapping[int, tuple[Mapping[str, Mapping[int, float]], Mapping[str, float]]]:
        """The numbers of each call: (metric → head → value, metric → value of no head), gathered once.

        What is None or NaN was not measured and is left out.
        """
        heads: dict[int, dict[str, dict[int, float]]] = {}
        whole: dict[int, dict[str, float]] = {}
        for row in self.measurements:
            if row.call is None or not isinstance(row.value, (int, float)) or math.isnan(row.value):
                continue
            if row.head is None:
                whole.setdefault(row.call, {})[row.metric] = float(row.value)
            else:
                heads.setdefault(row.call, {}).setdefault(row.metric, {})[row.head] = float(row.value)
        return {call: (heads.get(call, {}), whole.get(call, {})) for call in {*heads, *whole}}

    @cached_property
    def series(self) -> Mapping[tuple[str, int, int, str | None], Mapping[str, Sequence[tuple[int, float]]]]:
        """The samples of a training run: (layer, call, head, dtype) → metric → (step, value), gathered once.

        What is not finite is past any trend and left out.
        """
        found: dict[tuple[str, int, int, str | None], dict[str, list[tuple[int, float]]]] = {}
        for one in self.training.samples if self.training else ():
            if math.isfinite(one.value):
                metrics = found.setdefault((one.layer, one.call, one.head, one.dtype), {})
                metrics.setdefault(one.metric, []).append((one.step, one.value))
        return found


class Rule(NamedTuple):
    """One defect: `code` is stable, `name` names the defect (not its remedy).

    `formula`: what is computed. `threshold`: where it turns into a finding. `provenance`: whether that
    threshold is published, follows from arithmetic, or is our own judgement.
    """

    code: str
    name: str
    severity: Severity
    what: str
    why: str
    formula: str
    threshold: str
    source: str
    provenance: Literal["published", "derived", "heuristic"]
    example: str
    remedy: str
    check: Callable[[Rule, Observed], Iterable[Finding]]

    def finding(
        self,
        message: str,
        *,
        layer: str | None = None,
        head: int | None = None,
        severity: Severity | None = None,
        advice: str | None = None,
        evidence: dict[str, object] | None = None,
    ) -> Finding:
        """A finding of this rule; severity and advice are the rule's own unless a case is special."""
        return Finding(
            self.code,
            self.name,
            severity or self.severity,
            message,
            advice or self.remedy,
            layer,
            head,
            evidence or {},
        )
