"""Rules about how large scores are: growth that ends training, overflow of the product, precision of bfloat16."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from attncli.records import Call, Finding
from attncli.rules.bounds import DTYPE_MAX
from attncli.rules.measured import Measured, by_layer, measured_calls, number, worst
from attncli.rules.rule import Observed, Rule
from attncli.rules.scales import wrongly_scaled


def _large(rule: Rule, observed: Observed) -> Iterator[Finding]:
    unscaled = wrongly_scaled(observed)
    for layer, calls in by_layer(measured_calls(observed)).items():
        found = worst(calls, _scores_of_dots, _CLIPPED)
        if found is None or layer in unscaled:
            continue
        limit, means = next((limit, means) for limit, means in _GROWTH if found.value > limit)
        yield rule.finding(
            f"{layer}: head {found.head}: the largest score is {number(found.value)}{found.others}: {means}.",
            layer=layer,
            head=found.head,
            severity="warning" if limit == _CLIPPED else "error",
            evidence={
                "score_max": found.value,
                "threshold": limit,
                "heads": list(found.beyond),
                # QK-Clip: both projections of the head times this bring its largest score to 100.
                "clip_weights_by": math.sqrt(_CLIPPED / found.value) if math.isfinite(found.value) else 0.0,
            },
        )


def _not_a_number(rule: Rule, observed: Observed) -> Iterator[Finding]:
    if observed.origins:
        return  # where they come from is known, and says more
    calls = {call.index: call for call in observed.calls if call.batch * call.queries * call.keys}
    heads: dict[int, set[int]] = {}
    for row in observed.measurements:
        broken = isinstance(row.value, float) and math.isnan(row.value)
        if (
            broken
            and row.metric in ("dot_absmax", "score_max")
            and row.call in calls
            and row.head is not None
        ):
            heads.setdefault(row.call, set()).add(row.head)
    # Where the product overflowed, a rule of its own says why scores are NaN.
    overflowed = {
        seen.call.index
        for seen in measured_calls(observed, explained=False)
        if any(share > 1 for share in _share_of_limit(seen).values())
    }
    first: dict[str, int] = {}
    for index in sorted(heads.keys() - overflowed):
        first.setdefault(calls[index].layer, index)
    for layer, index in first.items():
        call, broken_heads = calls[index], sorted(heads[index])
        some = f" in {len(broken_heads)} of {call.heads} heads" if len(broken_heads) < call.heads else ""
        yield rule.finding(
            f"{layer}: q·k is NaN{some}: queries or keys hold NaN or Inf.",
            layer=layer,
            head=broken_heads[0] if len(broken_heads) == 1 else None,
            evidence={"heads": broken_heads},
        )


def _scores_of_dots(seen: Measured) -> Mapping[int, float]:
    """Per head the largest score that q·k itself makes: not what a bias adds, which no softmax minds.

    (ALiBi as BLOOM has it adds up to 0.8 per token to a whole row.)
    """
    scores, dots, scale = seen.values("score_max"), seen.values("dot_absmax"), seen.call.scale
    if "bias" not in (seen.call.mask_kind or ""):
        return scores
    if scale is None:
        return {}
    return {head: min(scores[head], abs(scale) * dots[head]) for head in scores if head in dots}


def _overflows(rule: Rule, observed: Observed) -> Iterator[Finding]:
    # The product is seen as it is, whatever became of it afterwards.
    for layer, calls in by_layer(measured_calls(observed, explained=False)).items():
        found = worst([seen for seen in calls if _limit(seen.call) < math.inf], _share_of_limit, 1.0)
        if found is None:
            continue
        call = found.measured.call
        limit = _limit(call)
        product = "q·k" if call.stored == "raw" else "the scaled q·k"
        stored = found.value * limit
        after = " before it is scaled" if call.stored == "raw" and call.scale not in (None, 1.0) else ""
        yield rule.finding(
            f"{layer}: head {found.head}: {product} reaches {number(stored)}{found.others} and overflows "
            f"{call.scores_dtype}, which ends at {number(limit)}{after}.",
            layer=layer,
            head=found.head,
            evidence={
                "stored_absmax": stored,
                "dtype": call.scores_dtype,
                "maximum": limit,
                "heads": list(found.beyond),
            },
        )


def _nearly_overflows(rule: Rule, observed: Observed) -> Iterator[Finding]:
    normalised = {row.call: row.value for row in observed.measurements if row.metric == "softmax_dtype"}
    for layer, calls in by_layer(measured_calls(observed)).items():
        near = [seen for seen in calls if _limit(seen.call) < math.inf]
        found = worst(near, _share_of_limit, _NEAR)
        if found is None or found.value > 1:
            continue
        call = found.measured.call
        limit = _limit(call)
        stored = found.value * limit
        softmax = normalised.get(call.index)
        late = f"; the cast to {softmax} behind it comes too late" if softmax is not None else ""
        yield rule.finding(
            f"{layer}: head {found.head}: the product of q and k reaches {number(stored)}{found.others}, "
            f"{math.log2(limit / stored):.2f} bits below the largest {call.scores_dtype}{late}.",
            layer=layer,
            head=found.head,
            evidence={
                "stored_absmax": stored,
                "dtype": call.scores_dtype,
                "softmax_dtype": softmax or call.scores_dtype,
                "maximum": limit,
                "heads": list(found.beyond),
            },
        )


def _overflows_in_float16(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, calls in by_layer(measured_calls(observed)).items():
        others = [seen for seen in calls if seen.call.stored != "nothing" and seen.call.dtype != "float16"]
        found = worst(others, _stored, DTYPE_MAX["float16"])
        if found is None:
            continue
        call = found.measured.call
        scaled = call.stored == "scaled"
        where = "; overflows float16" if scaled else "; overflows float16 before scaling"
        safe = "; safe in bfloat16" if found.value < DTYPE_MAX["bfloat16"] else ""
        yield rule.finding(
            f"{layer}: head {found.head}: {'the scaled ' if scaled else ''}q·k reaches {number(found.value)}"
            f"{found.others}{where}{safe}.",
            layer=layer,
            head=found.head,
            advice=_KEEP_BFLOAT16 if scaled else None,
            evidence={
                "stored_absmax": found.value,
                "dtype": call.scores_dtype,
                "heads": list(found.beyond),
            },
        )


def _coarse(rule: Rule, observed: Observed) -> Iterator[Finding]:
    unscaled = wrongly_scaled(observed)

    def sizes(seen: Measured) -> dict[int, float]:
        return {head: abs(value) for head, value in seen.values("score_max").items() if math.isfinite(value)}

    for layer, calls in by_layer(measured_calls(observed)).items():
        stored = [
            seen for seen in calls if seen.call.scores_dtype == "bfloat16" and seen.call.stored != "nothing"
        ]
        found = worst(stored, sizes, math.nextafter(_COARSE, 0.0))
        if found is None or layer in unscaled:
            continue
        spacing = 2.0 ** (math.floor(math.log2(found.value)) - 7)
        yield rule.finding(
            f"{layer}: head {found.head}: scores of {number(found.value)} are stored in bfloat16{found.others}, where "
            f"neighbours are {number(spacing)} apart: probabilities are off by factors up to "
            f"{number(math.exp(min(spacing / 2, 700.0)))}.",
            layer=layer,
            head=found.head,
            evidence={"score_max": found.value, "spacing": spacing, "heads": list(found.beyond)},
        )


# --- helpers ------------------------------------------------------------------------------------------


def _stored(seen: Measured) -> Mapping[int, float]:
    """Per head the largest magnitude that the product writes: of q·k, times the factors that stand before it."""
    if seen.call.stored == "nothing":
        return {}
    dots = seen.values("dot_absmax")
    if seen.call.stored == "raw":
        return dots
    whole, largest = seen.whole.get("stored_absmax"), max(dots.values(), default=0.0)
    if whole is not None and math.isfinite(whole) and 0 < largest < math.inf:
        before = whole / largest
    else:
        before = math.prod(abs(seen.call.factors.get(side, 1.0)) for side in ("query", "key"))
    return {head: value * before for head, value in dots.items()}


def _share_of_limit(seen: Measured) -> Mapping[int, float]:
    """What is stored, as a share of the largest number of the dtype that holds it."""
    limit = _limit(seen.call)
    return {head: value / limit for head, value in _stored(seen).items()}


def _limit(call: Call) -> float:
    return DTYPE_MAX.get(call.scores_dtype, math.inf)


# --- tables -------------------------------------------------------------------------------------------

_CLIPPED = 100.0
# From the gravest to the mildest: the first that a score is beyond.
_GROWTH = (
    (1e4, "every published run that came this far diverged"),
    (1e3, "published runs lost quality from here on"),
    (_CLIPPED, "large training runs clip scores here"),
)
_NEAR = 0.5  # less than one bit
_COARSE = 128.0
_KEEP_BFLOAT16 = (
    "Keep this model in bfloat16 or float32, or use a fused kernel, which accumulates in float32."
)

SCORE_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT501",
        name="large-scores",
        severity="warning",
        what="The largest score of a head, after scaling, is far beyond what softmax can use.",
        why="Growing scores saturate the softmax and precede divergence: attention becomes one-hot and its gradient "
        "vanishes.",
        formula="max s over visible keys, without what a bias adds",
        threshold="> 100: a warning; > 1 000 and > 10 000: errors",
        source="100: Kimi K2, arXiv 2507.20534; 1e3 and 1e4: Wortsman et al. 2023, arXiv 2309.14322 §3.3",
        provenance="published",
        example="Head 3 of layer 7 reaches 134.",
        remedy="Normalise q and k (QK-norm), or clip as QK-Clip does: multiply this head's W_q and W_k by "
        "√(100 / its largest score).",
        check=_large,
    ),
    Rule(
        code="ATT502",
        name="product-overflows",
        severity="error",
        what="The product of q and k is larger than the dtype it is stored in can hold.",
        why="A score of Inf makes its whole softmax row NaN; scaling and casting afterwards cannot undo it.",
        formula="max |q·k| over all pairs, masked ones too, times the factors that stand before the product",
        threshold="> the largest number of the dtype (65 504 in float16)",
        source="IEEE 754; transformers issue 28163",
        provenance="derived",
        example="Layer 3 head 1: q·k reaches 70 120 in float16.",
        remedy="Scale q before the product, (q * scale) @ k, or cast q and k to float32 first, or use "
        "scaled_dot_product_attention, which accumulates in float32.",
        check=_overflows,
    ),
    Rule(
        code="ATT503",
        name="scores-near-overflow",
        severity="note",
        what="The product of q and k comes within one bit of the largest number of its dtype.",
        why="One longer input or one more step of training overflows it; a softmax in float32 does not help, since "
        "the cast comes after the product.",
        formula="log2(largest number / largest stored product)",
        threshold="between 0 and 1 bit",
        source="attncli",
        provenance="heuristic",
        example="Layer 3 head 1: q·k reaches 48 000 in float16, and the softmax is taken in float32.",
        remedy="Cast q and k to float32 before the product, or scale q before it: (q * scale) @ k.",
        check=_nearly_overflows,
    ),
    Rule(
        code="ATT504",
        name="would-overflow-float16",
        severity="note",
        what="The product of q and k would overflow if the model were run in float16.",
        why="(q @ k) * scale stores the raw product, which ends at 65 504 in float16; (q * scale) @ k and fused "
        "kernels do not.",
        formula="max |q·k| over all pairs, times the factors that stand before the product",
        threshold="> 65 504, in a run that is not in float16 and not fused",
        source="IEEE 754, reproduced",
        provenance="derived",
        example="Layer 7 head 3: q·k reaches 71 200.",
        remedy="Before running it in float16, scale q before the product, (q * scale) @ k, or use "
        "scaled_dot_product_attention.",
        check=_overflows_in_float16,
    ),
    Rule(
        code="ATT505",
        name="coarse-bfloat16-scores",
        severity="warning",
        what="Scores are stored in bfloat16 where it cannot tell them apart.",
        why="The dtype has 8 bits of precision: from 128 on neighbours are 1 apart, so rounding alone changes a "
        "probability by a factor of e^0.5.",
        formula="spacing 2^(⌊log2 s⌋ − 7)",
        threshold="largest score ≥ 128, where the product writes bfloat16",
        source="IEEE 754; seen as perplexity 7.997 against 7.138 in transformers issue 33317",
        provenance="derived",
        example="An eager bfloat16 model whose scores reach 140.",
        remedy="Compute q·k and the softmax in float32, or use a fused kernel, which does.",
        check=_coarse,
    ),
    Rule(
        code="ATT506",
        name="scores-not-finite",
        severity="error",
        what="Scores are NaN, because queries or keys hold NaN or Inf.",
        why="The softmax row of such a score is NaN, and with it all that is computed from it; no entropy and no "
        "headroom can be told.",
        formula="max |q·k| and max s of each head",
        threshold="NaN in any head",
        source="IEEE 754",
        provenance="derived",
        example="An input, an embedding or an earlier layer that holds NaN.",
        remedy="Look for the first layer in this list: what feeds it is broken. Check the input, then the weights "
        "with attncli inspect --values.",
        check=_not_a_number,
    ),
)
