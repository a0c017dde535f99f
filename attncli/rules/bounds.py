"""Rules about what q·k can become: bounds from the weights against the largest number of each dtype."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from attncli.records import Finding, Layer, Measurement
from attncli.rules.rule import Observed, Rule


def overflow_measurements(measurements: Sequence[Measurement]) -> tuple[Measurement, ...]:
    """Per layer and dtype "proven safe" or "not excluded": whether any head's q·k can pass its maximum."""
    rows = []
    for layer, bound in _largest(measurements, "score_bound").items():
        for dtype, maximum in DTYPE_MAX.items():
            verdict = "proven safe" if bound * ROUNDING < maximum else "not excluded"
            rows.append(Measurement(f"overflow_{dtype}", layer, verdict))
    return tuple(rows)


def _bound_beyond_dtype(rule: Rule, observed: Observed) -> Iterator[Finding]:
    stored = {layer.id: _dtype(layer) for layer in observed.layers}
    typical = _largest(observed.measurements, "score_typical")
    for layer, bound in _largest(observed.measurements, "score_bound").items():
        dtype = stored.get(layer)
        maximum = DTYPE_MAX.get(dtype or "")
        usual = typical.get(layer)
        exceeded = [name for name, largest in DTYPE_MAX.items() if usual is not None and usual > largest]
        if exceeded:
            over = dtype if dtype in exceeded else exceeded[0]
            yield rule.finding(
                f"{layer}: q·k is {usual:.3g} for typical inputs, beyond {DTYPE_MAX[over]:.5g}, "
                f"the largest {over}.",
                layer=layer,
                severity="warning" if over == dtype else "note",
                evidence={"score_typical": usual, "dtype": over, "maximum": DTYPE_MAX[over]},
            )
        elif maximum is not None and bound >= maximum and math.isfinite(bound):
            typically = "" if usual is None else f"; typically it is {usual:.3g}"
            yield rule.finding(
                f"{layer}: q·k may reach {bound:.3g} for the worst input, beyond {maximum:.5g}, "
                f"the largest {dtype}{typically}.",
                layer=layer,
                severity="note",
                evidence={"score_bound": bound, "score_typical": usual, "dtype": dtype, "maximum": maximum},
            )


def _largest(measurements: Sequence[Measurement], metric: str) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for row in measurements:
        if row.metric == metric and isinstance(row.value, (int, float)):
            values[row.layer].append(float(row.value))
    # NaN is larger than all: it must never hide in a maximum that then proves something safe.
    return {
        layer: max(found, key=lambda value: (math.isnan(value), value)) for layer, found in values.items()
    }


def _dtype(layer: Layer) -> str | None:
    return next((t.dtype for t in layer.tensors if t.role in ("q", "qkv", "q_b", "qk", "kv")), None)


# --- tables -------------------------------------------------------------------------------------------

# A run rounds the input, q and k, each by at most 2^-8 of itself in bfloat16, before it multiplies them.
ROUNDING = 1.02
# The largest finite number of each dtype in which scores are commonly held.
DTYPE_MAX = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}

BOUND_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT301",
        name="score-bound-beyond-dtype",
        severity="note",
        what="The bound of q·k passes the largest number of the dtype that the weights are stored in.",
        why="A score of Inf makes its whole softmax row NaN.",
        formula="|q·k| ≤ ‖W_q diag(g)‖₂ ‖W_k diag(g)‖₂ D (+ biases); typical: √tr(G_q G_k)",
        threshold="bound ≥ the dtype's maximum: a note, since no input need reach it; typical value beyond "
        "it: a warning, for another dtype a note",
        source="Cauchy–Schwarz; IEEE 754 (float16 ends at 65 504)",
        provenance="derived",
        example="A float16 layer whose bound is 2.1e5.",
        remedy="Measure the scores of real inputs; scale q before the product, or use a fused kernel, which "
        "accumulates in float32.",
        check=_bound_beyond_dtype,
    ),
)
