"""Rules about what a mask hides: the diagonal, the future, whole rows, or the wrong keys altogether."""

from __future__ import annotations

import math
from collections.abc import Iterator

from attncli.records import Call, Finding
from attncli.rules.measured import SOFTMAX, Measured, is_cross, layers_where, many, mask_kinds, number, worst
from attncli.rules.rule import Observed, Rule


def _diagonal_hidden(rule: Rule, observed: Observed) -> Iterator[Finding]:
    with_diagonal = {call.layer for call in observed.calls if call.causal_offset == 0 and call.queries > 1}

    def hidden(seen: Measured) -> bool:
        call = seen.call
        # With fewer queries than keys the rest of a preallocated cache is hidden. A layer that shows the diagonal
        # in another call has two streams, of which one predicts a token without seeing it (XLNet).
        shared = _shares_projection(call) or call.layer in with_diagonal
        whole = call.queries == call.keys and call.keys > 1 and not is_cross(call)
        return call.causal_offset is not None and call.causal_offset < 0 and whole and not shared

    for layer, seen, count in layers_where(observed, hidden):
        offset = seen.call.causal_offset or 0
        last = "" if offset == -1 else f" nor the {many(-offset - 1, 'token')} before it"
        yield rule.finding(
            f"{layer}: no token sees itself{last}: the causal mask hides the diagonal, so the first "
            f"{'row has' if offset == -1 else f'{-offset} rows have'} no key{count}.",
            layer=layer,
            evidence={"causal_offset": offset},
        )


def _future_shown(rule: Rule, observed: Observed) -> Iterator[Finding]:
    def shown(seen: Measured) -> bool:
        call = seen.call
        return call.causal_offset is not None and call.causal_offset > 0 and call.queries <= call.keys

    for layer, seen, count in layers_where(observed, shown):
        offset = seen.call.causal_offset or 0
        yield rule.finding(
            f"{layer}: each token sees {many(offset, 'token')} of its future: the causal mask ends "
            f"{many(offset, 'key')} too late{count}.",
            layer=layer,
            severity=None if offset == 1 else "warning",
            advice=None
            if offset == 1
            else "If this look-ahead is meant, ignore this rule; otherwise hide every key "
            "j > i: torch.triu(ones, diagonal=1).",
            evidence={"causal_offset": offset},
        )


def _rows_without_keys(rule: Rule, observed: Observed) -> Iterator[Finding]:
    def empty(seen: Measured) -> bool:
        call = seen.call
        explained = _is_future_only(call) or (call.causal_offset is not None and call.causal_offset < 0)
        # These normalisers give such a row zeros, as does a mask on the weights, which is wrong by itself if it
        # does more; and where each token is hidden from itself, one without a past sees itself all the same.
        harmless = call.sinks or call.normaliser not in SOFTMAX or call.softmax_axis != "keys"
        harmless = harmless or call.masked_after_softmax or _shares_projection(call)
        return not harmless and not explained and any(seen.values("rows_masked").values())

    for layer, seen, count in layers_where(observed, empty):
        found = worst([seen], lambda one: one.values("rows_masked"), 0)
        if found is None:
            continue
        rows, total = int(found.value), seen.call.batch * seen.call.queries
        yield rule.finding(
            f"{layer}: {rows} of {many(total, 'row')} may attend to no key{found.others}{count}.",
            layer=layer,
            head=found.head if len(found.beyond) == 1 else None,
            evidence={"rows_masked": rows, "rows": total, "heads": list(found.beyond)},
        )


def _wrong_sign(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer, seen, count in layers_where(observed, lambda seen: _is_future_only(seen.call)):
        yield rule.finding(
            f"{layer}: each token sees its future alone: the causal mask hides what it should show{count}.",
            layer=layer,
            evidence={"mask_kind": seen.call.mask_kind},
        )
    for layer, seen, count in layers_where(observed, lambda seen: mask_adds(seen) is not None):
        added = mask_adds(seen) or math.inf
        yield rule.finding(
            f"{layer}: the mask adds {number(added)} to scores instead of taking it away{count}.",
            layer=layer,
            evidence={"added": added},
        )


def mask_adds(seen: Measured) -> float | None:
    """What an additive mask of the wrong sign adds to the largest score; None where there is none such.

    Without a mask no score is larger than |scale| · max |q·k|. A causal mask that still hides something has
    the right sign: what is added there is a bias, which under ALiBi grows with the position.
    """
    call = seen.call
    scores, dots = seen.values("score_max"), seen.values("dot_absmax")
    if call.scale is None or call.soft_cap or "causal" in mask_kinds(call):
        return None
    # Where the product itself overflowed, nothing need be added to make a score infinite.
    room = seen.values(f"headroom_bits_{call.scores_dtype}")
    excess = [
        scores[head] - abs(call.scale) * dots[head]
        for head in scores
        if head in dots and (scores[head] < math.inf or room.get(head, 0.0) >= 0)
    ]
    largest = max((value for value in excess if not math.isnan(value)), default=0.0)
    return largest if largest >= _MASKS_FROM else None


def _hides_nothing(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for words, what in _IN_VAIN.items():

        def found(seen: Measured, words: str = words) -> bool:
            call = seen.call
            # A mask on the weights afterwards hides what this one did not, and is judged for itself.
            plain = (
                call.normaliser in SOFTMAX and call.softmax_axis == "keys" and not call.masked_after_softmax
            )
            return plain and _meant(call, words) is not None

        for layer, seen, count in layers_where(observed, found):
            meant = _meant(seen.call, words)
            # Padding is one row per sample: a bias of that shape, though none is known, could be meant.
            yield rule.finding(
                f"{layer}: {_SHAPES.get(meant or '', meant)} {what}: nothing is hidden{count}.",
                layer=layer,
                severity="warning" if meant == "padding" and words == "0/1 bias" else None,
                evidence={"mask_kind": seen.call.mask_kind},
            )


def _meant(call: Call, words: str) -> str | None:
    """The shape in brackets behind `words` in the kind of mask."""
    kinds = (kind for kind in mask_kinds(call) if kind.startswith(f"{words} ("))
    return next((kind.removeprefix(f"{words} (").removesuffix(")") for kind in kinds), None)


def _shares_projection(call: Call) -> bool:
    """Whether one weight makes both q and k: each token is its own best match, and hidden from itself on purpose."""
    return call.parameters.get("q") is not None and call.parameters.get("q") == call.parameters.get("k")


def _is_future_only(call: Call) -> bool:
    return "future only" in mask_kinds(call)


# --- tables -----------------------------------------------------------------------------------------

# An additive mask takes at least this much away; a bias never does.
_MASKS_FROM = 9000.0

# How `mask_kind` says that a mask hides nothing, and how a message does.
_IN_VAIN = {
    "0/1 bias": "of zeros and ones is added to the scores",
    "zero fill": "sets hidden scores to 0, which is a score like any other",
}
_SHAPES = {
    "causal": "a causal mask",
    "padding": "a padding mask",
    "sliding window": "a sliding window",
    "future only": "a causal mask (1 where a key is to be hidden)",
}

MASK_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT406",
        name="causal-mask-hides-diagonal",
        severity="error",
        what="The causal mask hides each token from itself.",
        why="The first row then has no key at all: NaN, or the mean of what it must not see.",
        formula="key j is visible to query i where j ≤ i + offset",
        threshold="offset < 0 with as many queries as keys; not where one weight makes both q and k, nor "
        "where another call of the layer shows the diagonal (two streams)",
        source="attncli",
        provenance="derived",
        example="torch.triu(ones, diagonal=0) as the mask of what is hidden.",
        remedy="Hide only what comes later: torch.triu(ones, diagonal=1), or torch.tril(ones) for what is seen.",
        check=_diagonal_hidden,
    ),
    Rule(
        code="ATT407",
        name="causal-mask-shows-future",
        severity="error",
        what="The causal mask lets each token see later ones.",
        why="The next token can be copied: the loss falls to nearly zero in training, and generation fails.",
        formula="key j is visible to query i where j ≤ i + offset + (S − T)",
        threshold="offset 1: an error; more: a warning, since speech models look ahead on purpose",
        source="attncli",
        provenance="derived",
        example="torch.triu(ones, diagonal=2) as the mask of what is hidden.",
        remedy="Hide every later key: torch.triu(ones, diagonal=1), or torch.tril(ones) for what is seen.",
        check=_future_shown,
    ),
    Rule(
        code="ATT408",
        name="fully-masked-rows",
        severity="warning",
        what="A query that is no padding may attend to no key at all.",
        why="Its softmax is 0/0: NaN where the mask is -inf; the mean of all keys, also hidden ones, where it is not.",
        formula="rows whose every key is masked, padding left out",
        threshold="> 0; not where a mask sets the weights of such rows to zero afterwards",
        source="pytorch issue 103749",
        provenance="derived",
        example="A sample of the batch whose keys are all marked as padding.",
        remedy="Leave each query at least one key, or drop such samples; fused kernels return zeros for these rows.",
        check=_rows_without_keys,
    ),
    Rule(
        code="ATT409",
        name="mask-of-the-wrong-sign",
        severity="error",
        what="The mask hides what it should show, or adds where it should take away.",
        why="Tokens attend to the future or to padding alone.",
        formula="key j is visible to query i only where j > i (or j ≥ i); max s − scale · max |q·k|",
        threshold="the future alone is visible; or ≥ 9000 is added and no causal mask hides anything",
        source="memory-compressed-attention issue 2",
        provenance="derived",
        example="A mask that is True where a key is hidden, given to scaled_dot_product_attention, where True means "
        "visible.",
        remedy="Invert the mask: scaled_dot_product_attention takes True for visible keys, nn.MultiheadAttention and "
        "masked_fill for hidden ones; an additive mask is 0 or -inf.",
        check=_wrong_sign,
    ),
    Rule(
        code="ATT413",
        name="mask-hides-nothing",
        severity="error",
        what="A mask of zeros and ones is added to the scores, or hidden scores are set to 0.",
        why="To a softmax 0 is a score like any other: tokens attend to their future and to padding, the loss falls in "
        "training, and generation fails.",
        formula="whether an added tensor holds exactly 0 and 1 in the shape of a mask, or scores of that shape become "
        "0 before the softmax and are not hidden afterwards",
        threshold="a triangle, a band of scores that become 0, or padding at one end; a warning where padding is "
        "added; biases of 0 and 1 of any other shape are left out",
        source="torch docs, scaled_dot_product_attention: a float mask is added",
        provenance="derived",
        example="scaled_dot_product_attention(q, k, v, attn_mask=torch.tril(torch.ones(T, T))), or "
        "scores.masked_fill(hidden, 0).softmax(-1).",
        remedy="Give scaled_dot_product_attention a bool mask (True where a key is visible), or set hidden scores to "
        "-inf: scores.masked_fill(hidden, -torch.inf).",
        check=_hides_nothing,
    ),
)
