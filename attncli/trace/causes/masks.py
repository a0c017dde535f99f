"""Masks: rows without keys, wrong signs, arithmetic with infinities."""

from __future__ import annotations

import math

from attncli.trace.causes.case import Case, Evidence, mask_words, masks, row_words
from attncli.trace.facts import LARGEST


def masked_row(case: Case) -> Evidence | None:
    facts = case.facts
    if case.origin.op.kind not in ("softmax", "log softmax") or "minus_inf" not in facts:
        return None
    if facts["minus_inf"] != facts["keys"] or not facts["keys"]:
        return None
    return {
        "keys": facts["keys"],
        "rows": facts["rows"],
        "of_rows": facts["of_rows"],
        "row": row_words(case),
        "masks": masks(case),
        "made_by": mask_words(case),
    }


def masked_row_by_hand(case: Case) -> Evidence | None:
    """exp(s − max) of a row of −Inf: −Inf − −Inf."""
    if (
        case.origin.op.kind != "sum"
        or case.name not in ("sub", "rsub")
        or case.facts.get("result") == case.facts.get("result")
    ):
        return None
    values = case.values
    if len(values) != 2 or any(value != -math.inf for value in values):
        return None
    keys = case.origin.node.shape[-1]
    return {
        "row": row_words(case),
        "keys": keys,
        "rows": case.facts["count"] // keys,
        "of_rows": case.facts["of"] // keys,
        "masks": masks(case),
        "made_by": mask_words(case),
    }


def mask_sign(case: Case) -> Evidence | None:
    facts = case.facts
    if facts.get("plus_inf", 0) and case.origin.op.kind in ("softmax", "log softmax"):
        return {
            "plus_inf": facts["plus_inf"],
            "keys": facts["keys"],
            "masks": masks(case),
            "made_by": mask_words(case),
        }
    return None


def zero_times_infinity(case: Case) -> Evidence | None:
    if case.origin.op.kind != "factor" or "nan" not in case.origin.kinds:
        return None
    numbers = [*case.values, *case.facts.get("scalars", ())]
    if 0.0 in numbers and any(math.isinf(number) for number in numbers):
        return {
            "values": numbers,
            "masks": masks(case),
            "infinity": next(n for n in numbers if math.isinf(n)),
        }
    return None


def infinity_minus_infinity(case: Case) -> Evidence | None:
    if case.origin.op.kind != "sum" or "nan" not in case.origin.kinds:
        return None
    numbers = [*case.values, *case.facts.get("scalars", ())]
    if sum(map(math.isinf, numbers)) >= 2:
        return {"values": numbers, "masks": masks(case)}
    return None


def mask_twice(case: Case) -> Evidence | None:
    if case.origin.op.kind != "sum" or "-inf" not in case.origin.kinds:
        return None
    limit = LARGEST.get(case.dtype, math.inf)
    values = case.values
    if len(values) == 2 and all(-limit <= value <= -limit / 2 for value in values):
        return {"values": values, "limit": limit, "dtype": case.dtype}
    return None


def mask_cast(case: Case) -> Evidence | None:
    source = case.facts.get("from_dtype")
    values = case.values
    if case.origin.op.kind != "same" or source == case.dtype or not values:
        return None
    if values[0] < -LARGEST.get(case.dtype, math.inf) and values[0] <= -0.5 * LARGEST.get(
        str(source), math.inf
    ):
        return {"value": values[0], "from_dtype": source, "dtype": case.dtype}
    return None


def escaped_fill(case: Case) -> Evidence | None:
    """An intended −Inf got into an operator that adds up."""
    if (
        not case.origin.masks
        or case.origin.role != "birth"
        or case.origin.op.kind in ("softmax", "log softmax", "factor", "sum")
    ):
        return None
    return {"masks": masks(case), "made_by": mask_words(case), "op": case.name}
