"""Rules about what changed between two checkpoints or two runs. They see changes, and nothing in a single report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attncli.records import SEVERITIES, Change, Finding, Severity
from attncli.rules.measured import many, number
from attncli.rules.rule import Observed, Rule


@dataclass(frozen=True)
class Compared(Observed):
    """What is observed of the second report, and what changed since the first.

    `fair`: whether the numbers of both runs were taken on inputs alike, or no run is compared. `told`: layers of
    which new findings of other rules say already that they are not finite.
    """

    changes: tuple[Change, ...] = ()
    fair: bool = True
    told: frozenset[str] = frozenset()


def judge_changes(compared: Compared) -> tuple[Finding, ...]:
    """Every finding about the changes, the gravest first; inside one severity in the order of the rules."""
    found = [finding for rule in DIFFERENCE_RULES for finding in rule.check(rule, compared)]
    return tuple(sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity)))


class Growth(NamedTuple):
    """`floor`: what the number must reach in the second report; `run`: whether it depends on the inputs."""

    metric: str
    noun: str
    floor: float
    run: bool
    severity: Severity


def _changes(observed: Observed) -> tuple[Change, ...]:
    return observed.changes if isinstance(observed, Compared) else ()


# --- structure ----------------------------------------------------------------------------------------


def _structure(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for kind, verb in (("removed", "are gone"), ("added", "are new")):
        layers = [str(change.layer) for change in _changes(observed) if change.kind == kind]
        if layers:
            yield rule.finding(
                f"{many(len(layers), 'attention layer')} {verb if len(layers) > 1 else verb.replace('are', 'is')}: "
                f"{_listed(layers)}.",
                layer=layers[0] if len(layers) == 1 else None,
                evidence={"layers": layers[:_EVIDENCE], "count": len(layers)},
            )
    yield from _per_fact(rule, observed, lambda what: what in _SHAPE or what.endswith(_OF_A_TENSOR))


def _function(rule: Rule, observed: Observed) -> Iterator[Finding]:
    yield from _per_fact(rule, observed, lambda what: what.partition(", call ")[0] in _MEANING)


def _per_fact(rule: Rule, observed: Observed, judged: Callable[[str], bool]) -> Iterator[Finding]:
    """One finding for each fact that differs, however many layers it differs in."""
    facts: dict[str, list[Change]] = defaultdict(list)
    for change in _changes(observed):
        if change.kind == "structure" and judged(change.what):
            fact = change.what.partition(", call ")[0]
            facts["tensor shapes" if fact.endswith(_OF_A_TENSOR) else fact].append(change)
    for what, changes in facts.items():
        layers = list(dict.fromkeys(str(change.layer) for change in changes))
        first = changes[0]
        role = first.what.removesuffix(_OF_A_TENSOR) + " " if first.what.endswith(_OF_A_TENSOR) else ""
        yield rule.finding(
            f"{what} changed in {many(len(layers), 'layer')}: {role}{_value(first.before)} → {_value(first.after)} in "
            f"{_listed(layers)}.",
            layer=layers[0] if len(layers) == 1 else None,
            evidence={
                "what": first.what,
                "before": first.before,
                "after": first.after,
                "layers": layers[:_EVIDENCE],
                "count": len(layers),
            },
        )


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _value(value: object) -> str:
    if isinstance(value, list):
        return "×".join(map(str, value)) or "scalar"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return number(value) if isinstance(value, float) else str(value)


# --- numbers ------------------------------------------------------------------------------------------


def _entropy_fell(rule: Rule, observed: Observed) -> Iterator[Finding]:
    if not isinstance(observed, Compared) or not observed.fair:
        return
    for layer, changes in _per_layer(observed, "entropy").items():
        fallen = {
            change: (before, after)
            for change, before, after in changes
            if after <= before / 2 and before - after >= _NATS
        }
        if not fallen:
            continue
        worst = max(fallen, key=lambda change: fallen[change][0] - fallen[change][1])
        before, after = fallen[worst]
        yield rule.finding(
            f"{layer}: head {worst.head}: the mean entropy fell from {number(before)} to {number(after)} nats"
            f"{_others(fallen, observed, layer)}.",
            layer=layer,
            head=worst.head,
            evidence={"before": before, "after": after, "heads": _heads(fallen)},
        )


def _scores_grew(rule: Rule, observed: Observed) -> Iterator[Finding]:
    if not isinstance(observed, Compared):
        return
    told: set[str] = set()
    for metric, noun, floor, run, severity in _GROWTHS:
        if run and not observed.fair:
            continue
        for layer, changes in _per_layer(observed, metric).items():
            grown = {
                change: (before, after)
                for change, before, after in changes
                if before > 0 and after >= _FOURFOLD * before and floor < after < math.inf
            }
            if not grown or layer in told:
                continue
            told.add(layer)
            worst = max(grown, key=lambda change: grown[change][1] / grown[change][0])
            before, after = grown[worst]
            factor = after / before
            yield rule.finding(
                f"{layer}: head {worst.head}: {noun} grew from {number(before)} to {number(after)}, "
                f"{number(math.log2(factor))} bits of headroom less{_others(grown, observed, layer)}.",
                layer=layer,
                head=worst.head,
                severity=severity,
                evidence={
                    "metric": metric,
                    "before": before,
                    "after": after,
                    "factor": factor,
                    "heads": _heads(grown),
                },
            )


def _weights_grew(rule: Rule, observed: Observed) -> Iterator[Finding]:
    weights = {
        tensor.name: layer.id
        for layer in observed.layers
        for tensor in layer.tensors
        if len(tensor.shape) > 1
    }
    for change in _changes(observed):
        if change.kind != "metric" or change.what != "rms" or change.layer not in weights:
            continue
        before, after = _numbers(change) or (0.0, 0.0)
        if before > 0 and after >= _FOURFOLD * before:
            yield rule.finding(
                f"{change.layer}: the root mean square of its weights grew from {number(before)} to {number(after)}.",
                layer=weights[change.layer],
                evidence={"before": before, "after": after, "factor": after / before},
            )


def _no_longer_finite(rule: Rule, observed: Observed) -> Iterator[Finding]:
    if not isinstance(observed, Compared):
        return
    lost: dict[str, list[Change]] = defaultdict(list)
    for change in observed.changes:
        metric = change.what.partition(", call ")[0]
        if change.kind != "metric" or change.layer is None or metric not in _FINITE:
            continue
        finite = isinstance(change.before, (int, float)) and math.isfinite(change.before)
        if finite and isinstance(change.after, float) and not math.isfinite(change.after):
            lost[change.layer].append(change)
    for change in observed.changes:
        known = isinstance(change.before, (int, float)) and change.before > 0
        if change.what in _COUNTS and known and (change.after or 0) > (change.before or 0):
            yield rule.finding(
                f"{change.layer}: {change.after} {_COUNTS[change.what]} instead of {change.before}.",
                layer=change.layer,
                evidence={"metric": change.what, "before": change.before, "after": change.after},
            )
    for layer, changes in lost.items():
        if layer not in observed.told:
            first = changes[0]
            metric = first.what.partition(", call ")[0]
            where = "" if first.head is None else f"head {first.head}: "
            yield rule.finding(
                f"{layer}: {where}{_FINITE[metric]} was {number(float(first.before))} and is "
                f"{'NaN' if math.isnan(first.after) else number(first.after)} now.",
                layer=layer,
                head=first.head,
                evidence={"metric": metric, "before": first.before, "after": first.after},
            )


def _per_layer(compared: Compared, metric: str) -> dict[str, list[tuple[Change, float, float]]]:
    """The changes of one metric of heads, with their numbers, by layer."""
    found: dict[str, list[tuple[Change, float, float]]] = defaultdict(list)
    for change in compared.changes:
        if change.kind == "metric" and change.what.partition(", call ")[0] == metric and change.layer:
            numbers = _numbers(change)
            if numbers is not None:
                found[change.layer].append((change, *numbers))
    return found


def _numbers(change: Change) -> tuple[float, float] | None:
    """Before and after where both are numbers; NaN is none."""
    sides = [
        float(side)
        for side in (change.before, change.after)
        if isinstance(side, (int, float)) and side == side
    ]
    return (sides[0], sides[1]) if len(sides) == 2 else None


def _heads(changes: dict[Change, tuple[float, float]]) -> list[int]:
    return sorted({change.head for change in changes if change.head is not None})


def _others(changes: dict[Change, tuple[float, float]], compared: Compared, layer: str) -> str:
    """ " (5 of 12 heads)" where the worst head is not the only one."""
    heads = len(_heads(changes))
    total = next((known.heads for known in compared.layers if known.id == layer), None)
    if heads < 2:
        return ""
    return f" ({heads} of {total} heads)" if total else f" ({heads} heads)"


# --- tables -------------------------------------------------------------------------------------------

_EVIDENCE = 50
_NATS = 0.5
_FOURFOLD = 4.0
# Six bits below the largest float16, 65 504.
_NEAR = 65504.0 / 64
_GROWTHS = (
    Growth("score_max", "the largest score", 20.0, run=True, severity="warning"),
    Growth("dot_absmax", "the largest |q·k|", _NEAR, run=True, severity="warning"),
    Growth("score_bound", "the bound of |q·k|", _NEAR, run=False, severity="note"),
)
_OF_A_TENSOR = " shape"
_SHAPE = frozenset({"kind", "layout", "heads", "KV heads", "head size", "v head dim", "stacked layers"})
# What the same tensors can be used for in two ways. The order of rows is not: it goes with the file format.
_MEANING = frozenset(
    {
        "scale",
        "scale of the run",
        "mask",
        "causal offset",
        "window",
        "window of the run",
        "soft cap",
        "soft cap of the run",
        "sinks of the run",
        "normaliser",
        "softmax axis",
        "layer type",
        "kv head of query head",
        "cosine",
    }
)
_COUNTS = {"nan_count": "NaN", "inf_count": "Inf"}
_FINITE = {
    "entropy": "the mean entropy",
    "score_max": "the largest score",
    "score_min": "the smallest score",
    "dot_absmax": "the largest |q·k|",
    "score_typical": "the typical |q·k|",
}

DIFFERENCE_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT901",
        name="changed-structure",
        severity="warning",
        what="Layers, heads or shapes of attention are not those of the first checkpoint.",
        why="Checkpoints of one run have one structure: another one was loaded, or layers were lost on saving.",
        formula="layers by path; kind, layout, heads, KV heads, head size and the shape of each tensor",
        threshold="any difference; one finding a fact, however many layers; dtypes and names are none",
        source="attncli",
        provenance="derived",
        example="KV heads changed in 12 layers: 12 → 4.",
        remedy="If the two are meant to differ, ignore this rule; otherwise look at how the second was saved or "
        "converted.",
        check=_structure,
    ),
    Rule(
        code="ATT902",
        name="changed-attention-function",
        severity="warning",
        what="The same weights are used otherwise: another scale, mask, window, soft cap or normaliser.",
        why="The shapes still fit, so nothing fails; the model computes something that it was not trained for.",
        formula="scale, mask, window, soft cap, sinks, normaliser and its axis, of each layer and call",
        threshold="any difference of what both know; an assumed scale is not known",
        source="attncli",
        provenance="derived",
        example="The mask changed in 24 layers: causal → none.",
        remedy="Compare the two configs and the code that ran; if the change is meant, ignore this rule.",
        check=_function,
    ),
    Rule(
        code="ATT903",
        name="fallen-entropy",
        severity="warning",
        what="The entropy of a head is half of what it was, or less.",
        why="Entropy that falls fast between checkpoints of one run precedes collapse and divergence.",
        formula="mean entropy of the head in both runs, in nats",
        threshold="after ≤ before / 2 and before − after ≥ 0.5 nats; never where the two batches differ",
        source="Zhai et al. 2023, arXiv 2303.06296 (falling entropy precedes divergence); the half: attncli",
        provenance="heuristic",
        example="Head 3 of layer 7 fell from 2.1 to 0.4 nats.",
        remedy="Look at the learning rate and at the scores of this head; QK-norm, σReparam or QK-Clip hold them.",
        check=_entropy_fell,
    ),
    Rule(
        code="ATT904",
        name="grown-scores",
        severity="warning",
        what="The largest score or |q·k| of a head, or the bound of it, is four times what it was.",
        why="Two bits of headroom are gone; at that pace a few more such steps saturate the softmax or overflow.",
        formula="after / before of score_max, dot_absmax and score_bound of each head",
        threshold="≥ 4, with a score > 20 or |q·k| > 1 023.5 = 65 504 / 2⁶; a bound: a note; runs never where the two "
        "batches differ",
        source="attncli; that growing scores precede divergence: Wortsman et al. 2023, arXiv 2309.14322 §3.3",
        provenance="heuristic",
        example="Head 1 of layer 3 grew from 9 to 41.",
        remedy="Normalise q and k (QK-norm) or clip them (QK-Clip); a smaller learning rate or weight decay slows it.",
        check=_scores_grew,
    ),
    Rule(
        code="ATT905",
        name="grown-weights",
        severity="note",
        what="The weights of a projection of attention are four times as large as they were.",
        why="Trained weights change slowly: a jump means an exploded step, a lost scale or another initialisation.",
        formula="after / before of the root mean square of each matrix",
        threshold="≥ 4; vectors such as biases and gains are left out, since they start at or near 0",
        source="attncli",
        provenance="heuristic",
        example="The q projection of layer 3 grew from 0.02 to 0.11.",
        remedy="Look at the gradient norm between the two checkpoints; of a converted file, at the scales of its "
        "quantisation.",
        check=_weights_grew,
    ),
    Rule(
        code="ATT906",
        name="no-longer-finite",
        severity="error",
        what="A number of a head that was finite is NaN or Inf, or a tensor holds more of them.",
        why="Something that fed this head broke between the two: all that is computed from it is NaN as well.",
        formula="entropy, largest and smallest score, |q·k| of each head; NaN and Inf of each tensor; before and after",
        threshold="finite before, NaN or ±Inf after, not where another new finding says it of the layer; any more "
        "than the tensor held before",
        source="IEEE 754",
        provenance="derived",
        example="Head 2 of layer 0 had 1.9 nats and has NaN now.",
        remedy="Go back to the first checkpoint; look for the origin with attncli nan-check, for NaN in the weights "
        "with attncli inspect --values.",
        check=_no_longer_finite,
    ),
)
