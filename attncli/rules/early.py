"""Rules that warn of divergence while there is time: scores that grow, entropies that fall.

Cost of `early_warnings`: one pass over the samples, and at most 1 500 pairs of points for each head that is already
near a limit: for 2 000 series of 64 samples 0.2 s, and 1 s where half of them run away at once.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attncli.records import Finding, Step, Training
from attncli.rules.bounds import DTYPE_MAX
from attncli.rules.measured import number
from attncli.rules.rule import Observed, Rule
from attncli.rules.trends import FEWEST, Point, falls_off, rise, slowing


def early_warnings(training: Training) -> tuple[Finding, ...]:
    """The findings that can still be acted on, for use at each sample while the run goes on."""
    observed = Observed(training=training)
    return tuple(found for rule in EARLY_RULES for found in rule.check(rule, observed))


# --- scores -------------------------------------------------------------------------------------------


class _Reach(NamedTuple):
    """What a head will reach, and when. `limit`: the number; `means`: what happens there."""

    head: int
    call: int
    metric: str
    step: int
    value: float
    doubling: float
    limit: float
    at_step: int
    means: str


def _scores_grow(rule: Rule, observed: Observed) -> Iterator[Finding]:
    found: dict[str, list[_Reach]] = defaultdict(list)
    for (layer, call, head, dtype), metrics in observed.series.items():
        if dtype in DTYPE_MAX:
            found[layer] += _reaches_dtype(metrics.get("headroom_bits", ()), call, head, str(dtype))
        found[layer] += _reaches_threshold(metrics.get("score_max", ()), call, head)
    for layer, reached in found.items():
        if not reached:
            continue
        worst = min(reached, key=lambda one: (one.at_step, one.metric, one.head))
        heads = sorted({one.head for one in reached})
        others = f", {len(heads)} heads alike" if len(heads) > 1 else ""
        what = "q·k" if worst.metric == "dot_absmax" else "score"
        yield rule.finding(
            f"{layer or 'attention'}: head {worst.head}: the largest {what} doubles every "
            f"{number(worst.doubling)} steps ({number(worst.value)} at step {worst.step}{others}); {worst.means}.",
            layer=layer or None,
            head=worst.head,
            evidence={
                "head": worst.head,
                "call": worst.call,
                "metric": worst.metric,
                "step": worst.step,
                "value": worst.value,
                "doubling_steps": worst.doubling,
                "reaches": worst.limit,
                "at_step": worst.at_step,
                "heads": heads,
            },
        )


def _reaches_dtype(headroom: Sequence[Point], call: int, head: int, dtype: str) -> Iterator[_Reach]:
    if len(headroom) < FEWEST or not 0 < _latest(headroom) <= _DOUBLINGS:
        return
    bits = [(step, -value) for step, value in headroom]
    trend = rise(bits, _LEAST_DOUBLINGS)
    if trend is None or not 0 <= trend.steps_to(0.0) <= trend.span:
        return
    limit, (step, last) = DTYPE_MAX[dtype], bits[-1]
    at = step + math.ceil(trend.steps_to(0.0))
    means = f"at the present rate {dtype} ends at step {at}"
    yield _Reach(head, call, "dot_absmax", step, limit * 2.0**last, 1 / trend.slope, limit, at, means)


def _reaches_threshold(scores: Sequence[Point], call: int, head: int) -> Iterator[_Reach]:
    if len(scores) < FEWEST or (near := _latest(scores)) < _CLIPPED / 2:
        return
    logs = [(step, math.log2(value)) for step, value in scores if value > 0]
    trend = rise(logs, _LEAST_DOUBLINGS)
    if trend is None:
        return
    step, last = scores[-1]
    passed = [row for row in _THRESHOLDS if row[0] <= near]
    limit, means = _THRESHOLDS[min(len(passed), len(_THRESHOLDS) - 1)]
    ahead = max(trend.steps_to(math.log2(limit)), 0.0)
    if not passed and (len(logs) < _SURE or not trend.steady or ahead > trend.span / 4):
        return  # healthy heads come this far: only growth that does not slow down is worth a word
    if len(passed) == len(_THRESHOLDS) or (ahead > trend.span and len(passed) > 1):
        limit, means = passed[-1]
        at = next(at for at, value in scores if value >= limit)
        said = f"it is beyond {number(limit)} since step {at}, {means}"
    elif ahead <= trend.span and last < limit:
        at = step + math.ceil(ahead)
        said = f"at the present rate it reaches {number(limit)}, {means}, at step {at}"
    else:
        return
    yield _Reach(head, call, "score_max", step, last, 1 / trend.slope, limit, at, said)


# --- entropy ------------------------------------------------------------------------------------------


def _entropy_falls(rule: Rule, observed: Observed) -> Iterator[Finding]:
    training = observed.training
    if training is None:
        return
    heads: dict[tuple[str, int], dict[int, Sequence[Point]]] = defaultdict(dict)
    scores: dict[tuple[str, int, int], float] = {}
    for (layer, call, head, _), metrics in observed.series.items():
        if "entropy_rest" in metrics:
            heads[layer, call][head] = metrics["entropy_rest"]
        if "score_max" in metrics:
            scores[layer, call, head] = metrics["score_max"][-1][1]
    said: set[str] = set()
    for (layer, call), series in heads.items():
        falls = {head: found for head, points in series.items() if (found := _one_key(points))}
        if layer in said or len(falls) < _SHARE * len(series):
            continue
        large = [scores[layer, call, head] for head in falls if (layer, call, head) in scores]
        if not _is_harmful(large, training.steps, next(iter(falls.values())).since):
            continue
        said.add(layer)
        head, first = min(falls.items(), key=lambda item: item[1].at_step)
        step, value = series[head][-1]
        falling = "its only head falls" if len(series) == 1 else f"{len(falls)} of {len(series)} heads fall"
        reach = f", and scores reach {number(max(large))}" if large else ""
        yield rule.finding(
            f"{layer or 'attention'}: {falling} towards one key: beside the shared one, head {head} has "
            f"{number(value)} nats left at step {step}, {first.means}{reach}.",
            layer=layer or None,
            head=head,
            evidence={
                "head": head,
                "call": call,
                "metric": "entropy_rest",
                "step": step,
                "value": value,
                "reaches": _NEAR_ZERO,
                "at_step": first.at_step,
                "heads": sorted(falls),
                "score_max": max(large, default=None),
            },
        )


class _Fall(NamedTuple):
    """`since`: the first step of its recent half. `at_step`: where `_NEAR_ZERO` is reached; `means`: that in words."""

    since: int
    at_step: int
    means: str


def _one_key(points: Sequence[Point]) -> _Fall | None:
    """The fall of a head's entropy towards one key; None where it does not go on."""
    if len(points) < FEWEST:
        return None
    early = statistics.median(value for _, value in points[:3])
    if not _NEAR_ZERO <= _latest(points) <= min(_FALLEN * early, _LOW):
        return None
    falling = [(step, -value) for step, value in points]
    trend = rise(falling, (1 - _FALLEN) * early)
    if trend is None:
        return None
    since, (step, value) = points[len(points) // 2][0], points[-1]
    if value <= _NEAR_ZERO:
        return _Fall(since, step, f"under {_NEAR_ZERO} nats already")
    fades = slowing(falling)
    if fades is None:
        ahead, most, rate = trend.steps_to(-_NEAR_ZERO), float(trend.span), "at the present rate"
    else:
        # What falls towards 0 may lose speed with what is left; towards a floor, earlier.
        towards_zero = value * math.log(value / _NEAR_ZERO) / fades.slope if fades.slope else math.inf
        ahead = max(fades.steps_to(value - _NEAR_ZERO), towards_zero)
        most, rate = trend.span * _SLOWING, "at the present rate, which slows down,"
    if not 0 <= ahead <= most:
        return None
    at = step + math.ceil(ahead)
    return _Fall(since, at, f"and {rate} under {_NEAR_ZERO} nats from step {at} on")


def _is_harmful(scores: Sequence[float], steps: Sequence[Step], since: int) -> bool:
    """Heads that sharpen because they learn have moderate scores, and the loss falls with their entropy."""
    if scores and statistics.median(scores) >= _CLIPPED:
        return True
    watched = [step for step in steps if step.number >= since and step.loss is not None]
    losses = [step.loss for step in watched if step.loss is not None and math.isfinite(step.loss)]
    if not losses:
        return not scores
    # A history that does not reach back to where the fall began cannot tell.
    return steps[0].number <= since and not falls_off(losses)


def _latest(points: Sequence[Point]) -> float:
    return statistics.median(value for _, value in points[-3:])


# --- tables -------------------------------------------------------------------------------------------

_CLIPPED = 100.0
_THRESHOLDS = (
    (_CLIPPED, "where large training runs clip scores"),
    (1e3, "where published runs lost quality"),
    (1e4, "where every published run diverged"),
)
# Doublings that are told ahead of a dtype's end: healthy heads, with scores below 100, are 6 away from it in float16.
_DOUBLINGS = 5.0
_LEAST_DOUBLINGS = 1.0
_SURE = 12
# In nats, as in ATT601: the sharpest head of healthy models has 0.16 of one kind alone.
_NEAR_ZERO = 0.2
_FALLEN = 2 / 3
_LOW = 1.0
# What slows down is told of this part of the watched steps ahead: few samples fit a floor as well as none.
_SLOWING = 0.25
_SHARE = 0.5

EARLY_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT712",
        name="scores-grow",
        severity="warning",
        what="The largest score of a head, or its largest product of q and k, grows towards a known limit.",
        why="Scores that grow without end saturate the softmax, precede divergence, and in float16 overflow: there is "
        "still time to act.",
        formula="Theil–Sen slope of log2 over the steps, the least of the sampled window, its recent half and its last "
        "quarter; the step at which the trend reaches the limit",
        threshold="the dtype's largest number at most 5 doublings away, scores of 1 000 and 10 000, or 100 from 50 on "
        "where 12 samples do not slow down; reached within as many steps as were watched, after a doubling at least "
        "and 3 times the noise; 6 samples at least; never where growth levels off",
        source="100: Kimi K2, arXiv 2507.20534; 1e3 and 1e4: Wortsman et al. 2023, arXiv 2309.14322 §3.3; how far "
        "ahead: attncli",
        provenance="heuristic",
        example="Head 1 of blocks.3.attn doubles its largest q·k every 40 steps; 4 100 at step 600 is, at this rate, "
        "the end of float16 at step 760.",
        remedy="Normalise q and k (QK-norm), clip them (QK-Clip), lower the learning rate or lengthen its warm-up; in "
        "float16 scale q before the product, (q * scale) @ k, or use bfloat16.",
        check=_scores_grow,
    ),
    Rule(
        code="ATT713",
        name="entropy-falls",
        severity="warning",
        what="The attention of a layer falls steadily towards one key, and the model gains nothing by it.",
        why="A one-hot softmax passes no gradient; collapsing entropy precedes divergence.",
        formula="Theil–Sen slope of the entropy without the sink key over the steps, the least of the sampled window, "
        "its recent half and its last quarter; the step at which the trend reaches 0.2 nats, by a rate that decays as "
        "it has since the steepest third where the last has less than 0.8 of it",
        threshold="at least half of the layer's heads have lost a third, have 1 nat left at most and reach 0.2 within "
        "as many steps as were watched, a quarter of them where the fall slows down, while scores are 100 or more or "
        "the loss does not fall; 6 samples at least; never where the fall levels off",
        source="Zhai et al. 2023, arXiv 2303.06296 (low entropy precedes divergence); the numbers: attncli",
        provenance="heuristic",
        example="All 4 heads of a layer have 0.9 nats left at step 120 and, at the present rate, under 0.2 from step "
        "150 on.",
        remedy="Check that scores are scaled by 1/sqrt(head_dim); normalise q and k (QK-norm) or bound their weights "
        "(σReparam); lower the learning rate or lengthen its warm-up.",
        check=_entropy_falls,
    ),
)
