"""Rules about how attention is computed: axes, sums, dropout, and which side is which. Facts of calls decide."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from attncli.records import Call, Finding
from attncli.rules.measured import SOFTMAX, Measured, is_cross, layers_where, mask_kinds, number
from attncli.rules.rule import Observed, Rule


def _wrong_axis(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, seen, count in layers_where(
        observed, lambda seen: seen.call.softmax_axis in ("heads", "batch")
    ):
        axis = seen.call.softmax_axis
        yield rule.finding(
            f"{layer}: the softmax runs over the {axis} instead of the keys: tokens do not see each other"
            f"{count}.",
            layer=layer,
            advice="Bring q, k and v into (batch, heads, tokens, head size), e.g. "
            "q.view(B, T, H, D).transpose(1, 2), and take the softmax over the last axis of q @ k.mT.",
            evidence={"softmax_axis": axis},
        )
    for layer, seen, count in layers_where(observed, _sums_over_queries):
        call = seen.call
        yield rule.finding(
            f"{layer}: the softmax runs over the queries instead of the keys{_rows(seen)}{count}.",
            layer=layer,
            evidence={"softmax_axis": call.softmax_axis, **_sums(seen)},
        )


def _sums_over_queries(seen: Measured) -> bool:
    """Whether what the softmax over queries gave went to the values as it was.

    Then each column sums to 1, so the mean of the rows is one length over the other; where they are divided by
    their own sum afterwards (slot attention), or by more (grouping), it is not.
    """
    call = seen.call
    if call.softmax_axis != "queries" or not call.queries or not call.keys:
        return False
    low, high = seen.whole.get("row_sum_min"), seen.whole.get("row_sum_max")
    if low is None or high is None:
        return True
    slack = _slack(call)
    if abs(low - 1) <= slack and abs(high - 1) <= slack:
        return False
    # Which of the two the call names queries depends on how the scores lay.
    means = (call.keys / call.queries, call.queries / call.keys)
    return any(low - slack <= mean <= high + slack for mean in means)


def _rows_off_one(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, seen, count in layers_where(observed, _do_not_sum_to_one):
        call = seen.call
        low, high = seen.whole["row_sum_min"], seen.whole["row_sum_max"]
        same = math.isclose(low, high, rel_tol=_slack(call))
        sums = f"the weights of {'every row' if same else 'a row'} sum to {low:.4g}"
        sums += "" if same else f" … {high:.4g}"
        evidence: dict[str, object] = {**_sums(seen), "masked_after_softmax": call.masked_after_softmax}
        expected = 1 / math.sqrt(call.head_dim) if call.head_dim else None
        if call.masked_after_softmax:
            yield rule.finding(
                f"{layer}: a mask is applied after the softmax: {sums}{count}.",
                layer=layer,
                severity="error",
                advice="Set masked scores to -inf before the softmax: scores.masked_fill(mask, -inf).softmax(-1).",
                evidence=evidence,
            )
        elif same and expected is not None and math.isclose(low, expected, rel_tol=0.01) and expected < 1:
            yield rule.finding(
                f"{layer}: the weights are multiplied by 1/√{call.head_dim} after the softmax: {sums}{count}.",
                layer=layer,
                severity="error",
                advice="Divide the scores by sqrt(head_dim) before the softmax, not the weights after it.",
                evidence=evidence,
            )
        else:
            yield rule.finding(f"{layer}: {sums}{count}.", layer=layer, evidence=evidence)


def _do_not_sum_to_one(seen: Measured) -> bool:
    call = seen.call
    low, high = seen.whole.get("row_sum_min"), seen.whole.get("row_sum_max")
    if call.normaliser not in SOFTMAX or call.sinks or call.softmax_axis != "keys" or call.dropout:
        return False
    return low is not None and high is not None and (1 - low > _slack(call) or high - 1 > _slack(call))


def _dropout_first(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, seen, count in layers_where(observed, lambda seen: seen.call.dropout_before_softmax):
        yield rule.finding(
            f"{layer}: dropout stands before the softmax, on the scores{count}.",
            layer=layer,
            evidence={"dropout_before_softmax": seen.call.dropout_before_softmax},
        )


def _sides_swapped(rule: Rule, observed: Observed) -> Iterator[Finding]:
    calls = {call.index: call for call in observed.calls}

    def swapped(seen: Measured) -> bool:
        # A softmax over the queries leaves open which side asks.
        if seen.call.softmax_axis != "keys":
            return False
        query, key = _sides(seen.call.query_sources, calls), _sides(seen.call.key_sources, calls)
        return query == {"encoder"} and "decoder" in key

    def foreign_values(seen: Measured) -> bool:
        query, key, value = (
            set(names) for names in (seen.call.query_sources, seen.call.key_sources, seen.call.value_sources)
        )
        known = seen.call.softmax_axis == "keys" and bool(key and value)
        return known and value == query and not value & key

    for layer, seen, count in layers_where(observed, swapped):
        call = seen.call
        yield rule.finding(
            f"{layer}: the queries come from the encoder ({_named(call.query_sources)}) and the keys from the "
            f"decoder ({_named(call.key_sources)}){count}.",
            layer=layer,
            evidence={"query_sources": list(call.query_sources), "key_sources": list(call.key_sources)},
        )
    for layer, seen, count in layers_where(observed, foreign_values):
        call = seen.call
        yield rule.finding(
            f"{layer}: the values come from where the queries do ({_named(call.value_sources)}), the keys from "
            f"elsewhere ({_named(call.key_sources)}){count}.",
            layer=layer,
            advice="Make k and v of the same stream: the encoder's outputs.",
            evidence={"value_sources": list(call.value_sources), "key_sources": list(call.key_sources)},
        )


def _sides(sources: Iterable[str], calls: dict[int, Call]) -> set[str]:
    """Which of "encoder" and "decoder" the sources are: by the input's name, or by the earlier call's mask."""
    found = set()
    for source in sources:
        what, _, name = source.partition(" ")
        call = calls.get(int(name)) if what == "call" and name.isdigit() else None
        if call is not None and not is_cross(call) and call.mask_kind is not None:
            found.add("decoder" if "causal" in mask_kinds(call) else "encoder")
        elif what == "input":
            found |= {side for side, pattern in _SIDES.items() if pattern.search(name)}
    return found


def _tokens_mixed(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, seen, count in layers_where(observed, lambda seen: "tokens_per_head" in seen.whole):
        call, tokens = seen.call, seen.whole["tokens_per_head"]
        yield rule.finding(
            f"{layer}: q and k are cut into {call.heads} heads along the tokens: each head holds {tokens:.4g} of "
            f"{call.queries} tokens instead of a part of every token{count}.",
            layer=layer,
            evidence={"tokens_per_head": tokens, "heads": call.heads, "queries": call.queries},
        )


def _maximum_not_subtracted(rule: Rule, observed: Observed) -> Iterator[Finding]:
    def bare(seen: Measured) -> bool:
        call = seen.call
        # A cap below it proves that exp cannot overflow.
        capped = call.soft_cap is not None and call.soft_cap < _largest_exponent(call)
        return call.normaliser in ("softmax by hand", "softmax plus one") and not (
            call.subtracts_maximum or capped
        )

    for layer, seen, count in layers_where(observed, bare):
        limit = _largest_exponent(seen.call)
        largest = max(seen.values("score_max").values(), default=-math.inf)
        reached = f"; here the largest score is {number(largest)}" if largest > -math.inf else ""
        yield rule.finding(
            f"{layer}: exp is taken of the scores as they are, and overflows {seen.call.scores_dtype} from "
            f"{number(limit)} on{reached}{count}.",
            layer=layer,
            severity="error" if largest > limit else None,
            evidence={"score_max": largest, "limit": limit, "dtype": seen.call.scores_dtype},
        )


# --- helpers ------------------------------------------------------------------------------------------


def _rows(seen: Measured) -> str:
    low, high = seen.whole.get("row_sum_min"), seen.whole.get("row_sum_max")
    return "" if low is None or high is None else f": the weights of a row sum to {low:.4g} … {high:.4g}"


def _sums(seen: Measured) -> dict[str, float]:
    return {metric: seen.whole[metric] for metric in ("row_sum_min", "row_sum_max") if metric in seen.whole}


def _slack(call: Call) -> float:
    """How far from 1 the sum of a row may lie by rounding alone."""
    return _ROUNDING.get(call.dtype, _ROUNDING["bfloat16"])


def _largest_exponent(call: Call) -> float:
    """ln of the dtype's largest number."""
    return 11.09 if call.scores_dtype == "float16" else 709.78 if call.scores_dtype == "float64" else 88.72


def _named(sources: tuple[str, ...]) -> str:
    return ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")


# --- tables -------------------------------------------------------------------------------------------

# A weight is rounded by 2^-9 of itself in bfloat16, by 2^-12 in float16; sums of thousands by some 1e-5 in float32.
_ROUNDING = {"float64": 1e-3, "float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}
# A part of the input's name, at a border of words: "encoder_hidden_states", "src", "tgt_mask", "decoderInputs".
_SIDES = {
    "encoder": re.compile(r"(?:^|_)(?:enc(?:oder)?|src|source|memory|context)(?![a-z])"),
    "decoder": re.compile(r"(?:^|_)(?:dec(?:oder)?|tgt|trg|target)(?![a-z])"),
}

CALL_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT401",
        name="softmax-over-wrong-axis",
        severity="error",
        what="The softmax runs over the queries, the heads or the batch instead of the keys.",
        why="Each key then shares one unit of attention among the queries, and the output of a token is no mean of "
        "values: its size depends on how many other tokens ask.",
        formula="axis that the softmax sums over; the mean sum of a row is then S/T",
        threshold="not the axis that is contracted with the values; where rows are divided by their sum afterwards "
        "(slot attention) nothing is wrong",
        source="Vaswani et al. 2017, arXiv 1706.03762; slot attention: arXiv 2006.15055",
        provenance="derived",
        example="scores.softmax(dim=-2) @ v, or dim=1 where the scores are (batch, queries, keys).",
        remedy="Take the softmax over the keys, the last axis of q @ k.transpose(-2, -1): scores.softmax(dim=-1).",
        check=_wrong_axis,
    ),
    Rule(
        code="ATT402",
        name="rows-do-not-sum-to-one",
        severity="warning",
        what="The weights that multiply the values do not sum to 1 in a row.",
        why="The output shrinks or grows with what was masked; what was masked still took its share of the softmax.",
        formula="Σ_j of the weights of each row, dropout left out",
        threshold="beyond rounding (0.001; 0.005 in float16, 0.02 in bfloat16); an error where a mask or 1/√d after "
        "the softmax is the cause; learned sinks and other normalisers are left out",
        source="attncli",
        provenance="derived",
        example="scores.softmax(-1) * causal_mask: row 0 of 8 sums to 0.1.",
        remedy="Look for what multiplies the weights after the softmax; if it is meant (heads that are mixed, a "
        "difference of two softmaxes), ignore this rule.",
        check=_rows_off_one,
    ),
    Rule(
        code="ATT403",
        name="dropout-before-softmax",
        severity="warning",
        what="Dropout is applied to the scores, before the softmax.",
        why="A dropped score becomes 0, which is an ordinary score and hides nothing; the others grow by "
        "1/(1 − p), so training sees a sharper softmax than evaluation.",
        formula="order of dropout and softmax in the dataflow",
        threshold="any",
        source="Vaswani et al. 2017, arXiv 1706.03762",
        provenance="derived",
        example="A line such as softmax(dropout(q @ k.transpose(-2, -1) * scale), dim=-1).",
        remedy="Drop weights, not scores: dropout(scores.softmax(dim=-1)) @ v.",
        check=_dropout_first,
    ),
    Rule(
        code="ATT404",
        name="queries-and-keys-swapped",
        severity="error",
        what="In cross-attention the queries come from the encoder and the keys from the decoder, or the values from "
        "the side of the queries.",
        why="The decoder must ask and the encoder answer; the other way round the output has the encoder's length "
        "and no token of the decoder reads the source.",
        formula="inputs and earlier calls that q, k and v come from; an input's side is told by its name, a call's by "
        "its mask",
        threshold="q of the encoder alone, and k of the decoder",
        source="Bahdanau et al. 2015, arXiv 1409.0473; Vaswani et al. 2017, arXiv 1706.03762",
        provenance="heuristic",
        example="bmm(encoder_outputs, decoder_hidden.transpose(1, 2)).",
        remedy="Make q of the decoder's hidden states, k and v of the encoder's outputs.",
        check=_sides_swapped,
    ),
    Rule(
        code="ATT405",
        name="softmax-without-maximum-subtracted",
        severity="warning",
        what="A softmax written by hand takes exp of the scores without subtracting their maximum first.",
        why="Beyond 88.7 exp overflows to Inf in float32 and bfloat16, beyond 11.1 in float16; Inf/Inf is NaN.",
        formula="exp(s) / Σ exp(s)",
        threshold="any; an error where a score is beyond ln of the dtype's maximum; a soft cap below it is safe",
        source="IEEE 754",
        provenance="derived",
        example="A line such as scores.exp() / scores.exp().sum(-1, keepdim=True).",
        remedy="Use torch.softmax, or subtract scores.amax(-1, keepdim=True) first.",
        check=_maximum_not_subtracted,
    ),
    Rule(
        code="ATT414",
        name="heads-cut-across-tokens",
        severity="error",
        what="Heads are slices of neighbouring tokens, since q and k were viewed as (B, H, T, D) without a transpose.",
        why="A view keeps the order in memory: a head then holds all features of a few tokens, chopped into rows that "
        "are no tokens, and no token sees one of another slice. It trains, and never well.",
        formula="(B, T, H·D) viewed as (B, H, T, D) with no permutation between, for q and k alike",
        threshold="any; T/H tokens lie in a head; where there are as many tokens as heads, ATT401 tells it",
        source="attncli",
        provenance="derived",
        example="A line such as q = self.q_proj(x).view(B, H, T, D).",
        remedy="Split the features first: q.view(B, T, H, D).transpose(1, 2), and the output back by "
        "out.transpose(1, 2).reshape(B, T, H * D).",
        check=_tokens_mixed,
    ),
)
