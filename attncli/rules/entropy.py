"""Rules about how concentrated attention is. Low entropy alone is never a fault: healthy heads are sharp.

Nine of ten heads of healthy language models lie on one key (a sink), others on the previous token or on
themselves; so collapse is judged on what is left beside the sink, and only with evidence from the scores or
from nearly all heads of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from attncli.records import Finding
from attncli.rules.measured import Measured, by_layer, is_cross, measured_calls, number, worst
from attncli.rules.rule import Observed, Rule
from attncli.rules.scales import wrongly_scaled


def _collapse(rule: Rule, observed: Observed) -> Iterator[Finding]:
    wrong = wrongly_scaled(observed)
    # Cross-attention that aligns two sequences is sharp when it works.
    judged = [
        seen
        for seen in measured_calls(observed)
        if not is_cross(seen.call) and seen.call.softmax_axis == "keys" and _is_large(seen)
    ]
    heads = [(seen, head) for seen in judged for head in seen.values("entropy_rest")]
    fallen = [(seen, head) for seen, head in heads if head in _collapsed(seen)]
    if len(heads) >= _FEW_HEADS and len(fallen) >= _NEARLY_ALL * len(heads):
        if not all(seen.call.layer in wrong for seen, _ in fallen):
            rest = max(seen.values("entropy_rest")[head] for seen, head in fallen)
            yield rule.finding(
                f"{len(fallen)} of {len(heads)} heads of self-attention are one-hot: without the key they share, "
                f"none has more than {number(rest)} nats left.",
                evidence={"heads": len(heads), "collapsed": len(fallen), "entropy_rest": rest},
            )
        return
    for layer, calls in by_layer(judged).items():
        found = worst(calls, _scores_of_collapsed, _LARGE)
        if found is None or layer in wrong:
            continue
        head, numbers = found.head, found.measured.values
        rest, peaky = numbers("entropy_rest")[head], numbers("peaky_rows")[head]
        yield rule.finding(
            f"{layer}: head {head}: attention has collapsed{found.others}: {number(100 * peaky)} % of its rows lie on "
            f"one key, {number(rest)} nats are left beside the shared one, and scores reach {number(found.value)}.",
            layer=layer,
            head=head,
            evidence={
                "entropy_rest": rest,
                "peaky_rows": peaky,
                "score_max": found.value,
                "heads": list(found.beyond),
            },
        )


def _collapsed(seen: Measured) -> dict[int, float]:
    """The heads that are one-hot even besides their sink, with what is left there in nats."""
    peaky = seen.values("peaky_rows")
    return {
        head: rest
        for head, rest in seen.values("entropy_rest").items()
        if rest < _LEFT and peaky.get(head, 0.0) > _PEAKY
    }


def _scores_of_collapsed(seen: Measured) -> dict[int, float]:
    scores = seen.values("score_max")
    return {head: scores[head] for head in _collapsed(seen) if head in scores}


def _uniform(rule: Rule, observed: Observed) -> Iterator[Finding]:
    wrong = wrongly_scaled(observed)
    judged = [
        seen
        for seen in measured_calls(observed)
        if seen.call.softmax_axis == "keys" and seen.call.layer not in wrong and seen.call.keys >= _FEW_KEYS
    ]
    total = sum(len(_evenness(seen)) for seen in judged)
    even = sum(ratio > _EVEN for seen in judged for ratio in _evenness(seen).values())
    layers = by_layer(judged)
    if len(layers) > 1 and total and even >= _NEARLY_ALL * total:
        subject = f"all {even}" if even == total else f"{even} of {total}"
        yield rule.finding(
            f"{subject} heads of {len(layers)} layers attend to all keys alike, as with random weights.",
            advice="Check that trained weights were loaded; if the model is meant to be untrained, ignore this rule.",
            evidence={"heads": total, "uniform": even, "layers": len(layers)},
        )
        return
    for layer, calls in layers.items():
        found = worst(calls, _evenness, _EVEN)
        if found is None:
            continue
        heads, ratio = len(found.beyond), found.value
        if heads == found.measured.call.heads > 1:
            subject = f"all {heads} heads attend"
        elif heads == 1:
            subject = f"head {found.head} attends"
        else:
            subject = f"{heads} of {found.measured.call.heads} heads attend"
        yield rule.finding(
            f"{layer}: {subject} to all keys alike: the entropy is {min(ratio, 1.0):.4f} of its maximum.",
            layer=layer,
            head=found.head if heads == 1 else None,
            evidence={"entropy_ratio": ratio, "heads": list(found.beyond)},
        )


def _evenness(seen: Measured) -> dict[int, float]:
    """H/ln n of the heads whose rows see enough keys: five keys chosen for each row are nearly even at best."""
    entropies = seen.values("entropy")
    # H and H/ln n give n back, in the geometric mean over rows: under a causal mask of S keys that is S/e.
    enough = math.log(min(_FEW_KEYS, 0.9 * seen.call.keys / math.e))
    return {
        head: ratio
        for head, ratio in seen.values("entropy_ratio").items()
        if head not in entropies or ratio <= 0 or entropies[head] / ratio >= enough
    }


def _one_token(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, calls in by_layer(measured_calls(observed)).items():
        for seen in calls:
            masses, keys = seen.values("sink_mass"), set(seen.values("sink_key").values())
            all_on_one = (
                len(masses) == seen.call.heads > 0 and min(masses.values()) > _IGNORES and len(keys) == 1
            )
            if is_cross(seen.call) and all_on_one and _is_large(seen):
                heads = f"all {seen.call.heads} heads lie" if seen.call.heads > 1 else "the only head lies"
                key, least = int(keys.pop()), min(masses.values())
                yield rule.finding(
                    f"{layer}: {heads} on key {key} of {seen.call.keys}, with at least "
                    f"{math.floor(1000 * least) / 10:.3g} % of the attention: what the others say is not read.",
                    layer=layer,
                    evidence={"sink_key": key, "sink_mass": least, "keys": seen.call.keys},
                )
                break


def _is_large(seen: Measured) -> bool:
    """Among a few keys, or for a few rows, every head is sharp by chance."""
    return seen.call.keys >= _FEW_KEYS and seen.call.batch * seen.call.queries >= _FEW_KEYS


# --- tables -------------------------------------------------------------------------------------------

_FEW_KEYS = 8
_FEW_HEADS = 4
_NEARLY_ALL = 0.9
_PEAKY = 0.3
# A tenth of what a head over eight keys can have; the sharpest head of healthy models has 0.16 of one kind alone.
_LEFT = 0.2
_LARGE = 100.0
_EVEN = 0.99
_IGNORES = 0.9

ENTROPY_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT601",
        name="entropy-collapse",
        severity="warning",
        what="Heads of self-attention are one-hot, also besides their sink, and their scores are large or nearly all "
        "heads of the model are so.",
        why="A one-hot softmax passes no gradient: such heads no longer learn, and training tends to diverge.",
        formula="mean entropy of rows without their sink key, renormalised; share of rows with max p > 0.95",
        threshold="< 0.2 nats and > 0.3 of the rows, with a score > 100, or in 90 % of at least 4 heads; never for "
        "cross-attention or fewer than 8 keys or rows",
        source="Zhai et al. 2023, arXiv 2303.06296 (low entropy precedes divergence); 100: Kimi K2, arXiv 2507.20534",
        provenance="heuristic",
        example="Head 3 of layer 7 lies on one key in every row, and its scores reach 240.",
        remedy="Normalise q and k (QK-norm), bound the spectral norm of W_q and W_k (σReparam), or clip them "
        "(QK-Clip); a smaller learning rate or a longer warm-up prevents it.",
        check=_collapse,
    ),
    Rule(
        code="ATT602",
        name="uniform-head",
        severity="note",
        what="A head attends to all its keys alike.",
        why="Its output is the mean of the values: the head was not trained, is dead, or its scores are far too small.",
        formula="H / ln n, mean over rows",
        threshold="> 0.99 among at least 8 keys; said once where nine of ten heads of the model are so",
        source="attncli",
        provenance="heuristic",
        example="A model with random weights.",
        remedy="Check that this layer's weights were loaded and that its scores are scaled by 1/sqrt(head_dim) once; "
        "heads of a first layer that count tokens are even by training.",
        check=_uniform,
    ),
    Rule(
        code="ATT603",
        name="cross-attention-on-one-token",
        severity="warning",
        what="Every head of a cross-attention lies on one and the same key.",
        why="Whatever the query, the same value comes back: the layer hardly reads its source.",
        formula="mean probability of the sink key",
        threshold="> 0.9 on one key in all heads; never for self-attention, where sinks are healthy",
        source="attncli",
        provenance="heuristic",
        example="All 4 heads of the last decoder layer lie on token 0 of the source.",
        remedy="Compare with the other layers: a layer that has learned not to read may be removed; otherwise look for "
        "a padding mask that hides the source, or an encoder whose outputs are all alike.",
        check=_one_token,
    ),
)
