"""Rules about the factor on q·k. A factor is never wrong by itself: many families fold 1/√d into something else.

So each rule needs two things: a factor that a known mistake makes, and scores that show the harm. What healthy
scores look like was measured: layers of trained models (BERT, Llama, ALBERT and encoder-decoder families, with
head sizes of 32 and 64) have a median standard deviation of 0.8 to 3.3.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from attncli.records import Call, Finding, Layer
from attncli.rules.measured import Measured, by_layer, measured_calls, number, one_over_root
from attncli.rules.rule import Observed, Rule

Mistake = Literal["unscaled", "by model width", "twice"]


class Harmed(NamedTuple):
    """The calls of one layer whose scores are harmed by `mistake`."""

    mistake: Mistake
    calls: tuple[Measured, ...]


def wrongly_scaled(observed: Observed) -> dict[str, Harmed]:
    """The layers whose factor is a mistake, by their id: rules about what follows from it pass these over.

    The harm is judged on all heads of all calls with the same mistake together: a single layer may be sharp, or
    even, in any healthy model.
    """
    layers = {layer.id: layer for layer in observed.layers}
    suspects: dict[Mistake, list[Measured]] = defaultdict(list)
    for seen in measured_calls(observed):
        mistake = _mistake(seen.call)
        if mistake == "unscaled" and _are_cosines(seen):
            continue
        if mistake is not None and not _by_design(seen.call, layers.get(seen.call.layer)):
            suspects[mistake].append(seen)
    harmed: dict[str, Harmed] = {}
    for mistake, calls in suspects.items():
        if _too_large(calls) if mistake == "unscaled" else _too_small(calls):
            for layer, found in by_layer(calls).items():
                harmed[layer] = Harmed(mistake, tuple(found))
    return harmed


def _mistake(call: Call) -> Mistake | None:
    """The mistake that would make this factor; None for the right one and for any that no mistake makes."""
    if call.scale is None or call.head_dim is None or call.head_dim < 2 or call.softmax_axis != "keys":
        return None
    if call.normaliser not in ("softmax", "softmax by hand", "softmax plus one") or call.soft_cap is not None:
        return None
    expected, factor = 1 / math.sqrt(call.head_dim), abs(call.scale)
    if math.isclose(factor, expected, rel_tol=_SAME):
        return None
    if _places(call) >= 2 or math.isclose(factor, expected**2, rel_tol=_SAME):
        return "twice"
    if call.heads > 1 and math.isclose(factor, expected / math.sqrt(call.heads), rel_tol=_SAME):
        return "by model width"
    return "unscaled" if factor >= 1 - _SAME else None


def _are_cosines(seen: Measured) -> bool:
    """Whether q and k have unit length, so that a factor beyond 1 is a temperature and no missing 1/√d."""
    dots = seen.values("dot_absmax").values()
    return bool(dots) and max(dots) <= _COSINE


def _places(call: Call) -> int:
    """In how many places 1/√d is applied by itself."""
    expected = 1 / math.sqrt(call.head_dim) if call.head_dim else 0.0
    # A scale on q and on k is one on each side of the product; d^(-1/4) on both is no 1/√d.
    return sum(math.isclose(abs(factor), expected, rel_tol=_SAME) for factor in call.factors.values())


def _by_design(call: Call, layer: Layer | None) -> bool:
    """Whether the config asks for this factor, or norms of q and k set the size of the scores instead."""
    if layer is None:
        return False
    asked = layer.scale is not None and call.scale is not None and layer.evidence.get("scale") == "config"
    if asked and math.isclose(abs(call.scale or 0.0), abs(layer.scale or 0.0), rel_tol=_SAME):
        return True
    return bool(layer.facts.get("q_norm") or layer.facts.get("cosine"))


def _too_large(calls: Sequence[Measured]) -> bool:
    """Whether the scores spread as q·k of unit q and k does without a factor, and rows are sharp for it."""
    spread, evenness = _median(calls, "score_std"), _median(calls, "entropy_ratio")
    head_dim = statistics.median(seen.call.head_dim or 0 for seen in calls)
    if spread is None or evenness is None:
        return False
    return spread >= max(_SPREAD, math.sqrt(head_dim) / 2) and evenness <= _SHARP


def _too_small(calls: Sequence[Measured]) -> bool:
    """Whether heads are near even although their q·k, times 1/√d, would tell keys apart."""
    evenness = _median(calls, "entropy_ratio")
    if evenness is None or evenness <= _EVEN:
        return False
    healed = [
        spread / abs(seen.call.scale * math.sqrt(seen.call.head_dim))
        for seen in calls
        if seen.call.scale and seen.call.head_dim
        for spread in seen.values("score_std").values()
    ]
    # 1/√d in two places of one dataflow is no family's design, whatever the weights are.
    certain = all(_places(seen.call) >= 2 for seen in calls)
    return certain or (bool(healed) and statistics.median(healed) >= _TELLING)


def _median(calls: Sequence[Measured], metric: str) -> float | None:
    found = [value for seen in calls for value in seen.values(metric).values()]
    return statistics.median(found) if found else None


# --- findings -----------------------------------------------------------------------------------------


def _unscaled(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, calls in _with(observed, "unscaled"):
        call = calls[0].call
        spread, evenness, largest = _harm(calls)
        what = (
            "q·k is not scaled"
            if math.isclose(abs(call.scale or 0.0), 1.0, rel_tol=_SAME)
            else f"q·k is multiplied by {number(call.scale or 0.0)}"
        )
        yield rule.finding(
            f"{layer}: {what}: the factor is {number(call.scale or 0.0)}, expected 1/√{call.head_dim}; scores "
            f"have a standard deviation of {number(spread)} and reach {number(largest)}, the entropy is "
            f"{number(evenness)} of its maximum.",
            layer=layer,
            severity="error" if largest > _DIVERGING else None,
            evidence=_evidence(call, spread, evenness) | {"score_max": largest},
        )


def _by_width(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, calls in _with(observed, "by model width"):
        call = calls[0].call
        spread, evenness, _ = _harm(calls)
        yield rule.finding(
            f"{layer}: q·k is scaled by 1/√{call.heads * (call.head_dim or 0)}, the width of all {call.heads} heads, "
            f"instead of 1/√{call.head_dim}; scores have a standard deviation of {number(spread)}, the entropy is "
            f"{number(evenness)} of its maximum.",
            layer=layer,
            evidence=_evidence(call, spread, evenness),
        )


def _twice(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, calls in _with(observed, "twice"):
        call = calls[0].call
        spread, evenness, _ = _harm(calls)
        expected = 1 / math.sqrt(call.head_dim or 1)
        names = [
            _PLACES.get(place, place)
            for place, factor in call.factors.items()
            if math.isclose(abs(factor), expected, rel_tol=_SAME)
        ]
        places = f" (on {' and '.join(names)})" if len(names) > 1 else ""
        yield rule.finding(
            f"{layer}: q·k is scaled twice{places}: the factor is {one_over_root(call.scale or 0.0)}, expected "
            f"1/√{call.head_dim}; scores have a standard deviation of {number(spread)}, the entropy is "
            f"{number(evenness)} of its maximum.",
            layer=layer,
            evidence=_evidence(call, spread, evenness) | {"factors": dict(call.factors)},
        )


def _with(observed: Observed, mistake: Mistake) -> Iterator[tuple[str, tuple[Measured, ...]]]:
    for layer, harmed in wrongly_scaled(observed).items():
        if harmed.mistake == mistake:
            yield layer, harmed.calls


def _harm(calls: Sequence[Measured]) -> tuple[float, float, float]:
    """Standard deviation, share of the largest entropy (medians over heads), and the largest score."""
    spread, evenness = _median(calls, "score_std"), _median(calls, "entropy_ratio")
    largest = max((value for seen in calls for value in seen.values("score_max").values()), default=math.nan)
    return spread or 0.0, evenness or 0.0, largest


def _evidence(call: Call, spread: float, evenness: float) -> dict[str, object]:
    expected = 1 / math.sqrt(call.head_dim) if call.head_dim else None
    return {
        "scale": call.scale,
        "scale_expected": expected,
        "score_std": spread,
        "entropy_ratio": evenness,
    }


# --- tables -------------------------------------------------------------------------------------------

# How closely a factor must be the one that a mistake makes.
_SAME = 0.01
# Heuristic: above the 3.3 that was the largest median of any healthy layer measured.
_SPREAD = 4.0
# Derived: of normal scores with standard deviation 4, H ≤ ln n − 8, which is less than half of ln n up to a million.
_SHARP = 0.5
# Heuristic: healthy trained models have a median of 0.3 to 0.9; scores of standard deviation ½ leave 0.96 of ln 32.
_EVEN = 0.9
# The largest cosine, with the rounding of bfloat16.
_COSINE = 1.02
# nn.Linear's own initialisation on normalised input gives q·k/√d a standard deviation of 1/3.
_TELLING = 0.25
# Loss deteriorates beyond it (Wortsman et al. 2023).
_DIVERGING = 1e3
_PLACES = {"query": "q", "key": "k", "scores": "the scores", "kernel": "the scores, by the kernel"}

SCALE_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT410",
        name="unscaled-scores",
        severity="warning",
        what="Scores are not multiplied by 1/√d, and show it.",
        why="The standard deviation of q·k grows with √d: the softmax saturates, and its gradient vanishes.",
        formula="factor on q·k; median over heads of the standard deviation of the scores and of H/ln n",
        threshold="factor ≥ 1, standard deviation ≥ max(4, √d/2) and H/ln n ≤ 0.5 in the median of all such layers; an "
        "error where a score is beyond 1000; not where the config asks for the factor, or q and k are normalised",
        source="Vaswani et al. 2017, arXiv 1706.03762 §3.2.1; for unit q and k the deviation is √d",
        provenance="heuristic",
        example="A factor of 1.0 with 64 numbers a head: q @ k.transpose(-2, -1).",
        remedy="Multiply the scores by head_dim ** -0.5, best on q before the product.",
        check=_unscaled,
    ),
    Rule(
        code="ATT411",
        name="scaled-by-model-width",
        severity="warning",
        what="Scores are divided by the root of the model's width instead of the head size: heads are near even.",
        why="The scores are √heads times too small: heads can hardly tell keys apart.",
        formula="factor ÷ 1/√(heads · d)",
        threshold="1 ± 0.01, median H/ln n > 0.9, and with 1/√d the standard deviation would be ≥ 0.25",
        source="Vaswani et al. 2017, arXiv 1706.03762 §3.2.1",
        provenance="heuristic",
        example="With 8 heads, scores / math.sqrt(hidden_size): the factor is 0.044 instead of 0.125.",
        remedy="Divide by the root of the size of one head: (hidden_size // num_heads) ** 0.5.",
        check=_by_width,
    ),
    Rule(
        code="ATT412",
        name="scaled-twice",
        severity="warning",
        what="1/√d is applied twice, for instance on q and on the scores, and heads are near even for it.",
        why="The scores are √d times too small: heads can hardly tell keys apart.",
        formula="factor ÷ 1/d, or 1/√d found in two places",
        threshold="1 ± 0.01 and median H/ln n > 0.9; where only one place is seen, also a standard deviation "
        "≥ 0.25 with 1/√d",
        source="Vaswani et al. 2017, arXiv 1706.03762 §3.2.1",
        provenance="heuristic",
        example="A q that is multiplied by scale and given to scaled_dot_product_attention, which scales by itself.",
        remedy="Scale once: leave q as it is, or pass scale=1.0 to scaled_dot_product_attention.",
        check=_twice,
    ),
)
