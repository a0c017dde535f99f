"""Weights meet their values: what the finished call was, from its scores to what was done to them after the softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from torch import Tensor

from attncli.trace import check
from attncli.trace.axes import Atom, Axis
from attncli.trace.factors import linear_factor, origin
from attncli.trace.maps import redrawn
from attncli.trace.origins import kind_of, kv_heads_of, parameters_of, sources_of
from attncli.trace.pending import Pending, Seen, after_softmax, dtype_name, mask_facts, scale_of
from attncli.trace.products import four_axes, products
from attncli.trace.statistics import eager_statistics, row_sums
from attncli.trace.tape import Ref, Tape


def call_of(
    tape: Tape,
    pending: Pending,
    masks: check.Masks,
    weights: Ref,
    values: Ref,
    used: Tensor,
    summed: Axis,
    *,
    alone: bool = True,
) -> Seen | None:
    """The finished call; None where these weights read no values.

    `used`: the weights (…, T, S) as they met their values, `summed`: S. `alone`: no other softmax is part of these
    weights, so that their sums speak of this one.
    """
    if pending.claimed:  # relative values, or one part of the keys after the other
        return None
    pending.claimed = True
    product = pending.product
    for one in products(weights.node):
        one.spent = True
    axis: Literal["keys", "queries", "channels", "heads", "batch"] = "keys"
    origins = {atom.origin for atom in summed if atom.origin}
    if origins and pending.layout.keys_from not in origins and _are_heads(summed):
        # Summed over heads, each weighed by a number of its own: an index of keys, not a reading of values.
        return None
    if pending.layout.keys_from == "batch":
        axis = "heads" if pending.layout.keys_are_features else "batch"
    elif origins and pending.layout.keys_from not in origins:
        axis = "queries"
    elif pending.layout.channels:
        axis = "channels"
    elif pending.layout.keys_are_features:
        axis = "heads"
    after = after_softmax(weights.node, pending)
    sums = None
    # A softmax over queries may be divided by the sum over keys after it (slot attention).
    if axis in ("keys", "queries") and alone and not after.dropout and not after.mixed and not pending.sinks:
        sums = row_sums(four_axes(used))
    # exp(s)·v may be divided by its sum only afterwards: such weights need not sum to 1.
    by_hand = pending.normaliser == "softmax by hand" and not after.divided
    late = sums is not None and by_hand and not (sums[0] > 0.99 and sums[1] < 1.01)
    if late:
        sums = None
    if alone and after.changed and not after.dropout and not after.mixed and axis == "keys":
        _reread(pending, used)
    normaliser = pending.normaliser
    below_one = sums is not None and sums[0] < 0.999 and sums[1] < 1.0005
    if normaliser == "softmax by hand" and below_one and not after.masked:
        normaliser = "softmax plus one"
        pending.drawn = redrawn(pending, used)
    factor_query = linear_factor(product.first.node)
    factor_key = linear_factor(product.second.node)
    keys_second = pending.layout.keys_from == "columns"
    query, key = (product.first, product.second) if keys_second else (product.second, product.first)
    if not keys_second:
        factor_query, factor_key = factor_key, factor_query
    scale, factors = scale_of(pending, factor_query, factor_key)
    before = abs((factor_query or 1.0) * (factor_key or 1.0))
    alpha = product.node.kwargs.get("alpha", 1) if product.node.op.name in WITH_INPUT else 1
    facts = {
        "module": product.node.module,
        "kernel": "softmax",
        "kind": kind_of(tape, query.node, key.node),
        "normaliser": normaliser,
        "batch": pending.layout.batch,
        "heads": pending.layout.heads,
        "kv_heads": kv_heads_of(
            key.node, pending.layout.heads, pending.layout.heads // pending.layout.sharing
        ),
        "queries": pending.layout.queries,
        "keys": pending.layout.keys,
        # Between channels the product sums over tokens: a head is as large as it has channels.
        "head_dim": pending.layout.queries if axis == "channels" else product.first.shape[-1],
        "dtype": dtype_name(query.node.dtype),
        "scores_dtype": dtype_name(pending.scores_dtype),
        "stored": "scaled" if before != 1.0 or alpha != 1 else "raw",
        "scale": scale,
        "factors": factors,
        "soft_cap": pending.path.cap,
        "sinks": pending.sinks,
        "dropout": after.dropout,
        "softmax_axis": axis,
        "subtracts_maximum": pending.subtracts_maximum,
        "masked_after_softmax": after.masked,
        "dropout_before_softmax": product.dropped_out
        or any(step.kind == "dropout" for step in pending.path.steps),
        **sources_of(tape, query.node, key.node, values.node),
        "parameters": parameters_of(query.node, key.node, values.node),
        "source": pending.source,
        "explained": pending.explained.explained,
        "difference": pending.explained.difference,
        "reason": pending.explained.reason,
        **mask_facts(pending, masks, axis),
    }
    dots = pending.dots
    if dots is not None and before != 1.0:
        dots = tuple(value / before for value in dots)
    seen = Seen(facts, pending.numbers, dots, sums, before * abs(float(alpha)), drawn=pending.drawn)
    if pending.softmax_dtype not in (None, pending.scores_dtype):
        seen.softmax_dtype = dtype_name(pending.softmax_dtype)
    if product.mixes_tokens:
        seen.tokens_per_head = pending.layout.queries / max(1, pending.layout.heads)
    seen.divided_later_of = origin(query.node).serial if late else None
    return seen


def _reread(pending: Pending, used: Tensor) -> None:
    """Numbers of the weights as they were used, where they were masked or normalised again after the softmax.

    What is said of scores stays; what is said of probabilities is of those that weighed the values.
    """
    pending.drawn = redrawn(pending, used)
    layout = pending.layout
    if used.numel() != layout.batch * layout.heads * layout.queries * layout.keys:
        return
    if used.shape[-1] != pending.node.shape[-1] or bool((used < 0).any()):
        return
    used = used.reshape(pending.node.shape)  # a product folds leading axes into one
    found = eager_statistics(
        layout.view(used.log()),
        layout.view(used),
        visible_above=-math.inf,
        recompute=False,
        same_tokens=False,
    )
    kept = {name: pending.numbers.per_head[name] for name in _OF_SCORES if name in pending.numbers.per_head}
    if pending.numbers.mask_kind != "none":
        kept |= {name: pending.numbers.per_head[name] for name in _OF_ROWS}
        found = replace(
            found,
            mask_kind=pending.numbers.mask_kind,
            window=pending.numbers.window,
            causal_offset=pending.numbers.causal_offset,
        )
    pending.numbers = replace(found, per_head={**found.per_head, **kept})


def _are_heads(summed: tuple[Atom, ...]) -> bool:
    return all(atom.kind == "feature" for atom in summed)


# --- tables -------------------------------------------------------------------------------------------

# Products whose first argument is added to the result.
WITH_INPUT = frozenset(("addmm", "baddbmm", "addmv", "addbmm"))
_OF_SCORES = ("score_max", "score_min", "score_std", "dot_absmax")
_OF_ROWS = ("rows", "rows_masked", "rows_padded")
