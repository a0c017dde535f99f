"""Finite numbers whose result the dtype cannot hold."""

from __future__ import annotations

import math

from attncli.trace.causes.case import Case, Evidence, first_name, scaling_words, short
from attncli.trace.facts import LARGEST, exceeds


def overflow_scores(case: Case) -> Evidence | None:
    found = overflow_product(case)
    if found is None or case.scores is None or case.backward:
        return None
    scores = case.scores
    scaled = found["exact"] * scores.expected
    return {
        **found,
        "scale": scores.scale,
        "scale_expected": scores.expected,
        "fits_scaled": not exceeds(scaled, case.dtype),
        "scaling": scaling_words(scores, case.dtype, scaled),
    }


def overflow_product(case: Case) -> Evidence | None:
    exact = case.facts.get("exact")
    if exact is None or not case.origin.op.product:
        return None
    total = exact + case.facts.get("added", 0.0)
    if not math.isfinite(total):
        return None
    limit = LARGEST.get(case.dtype, math.inf)
    if not exceeds(total * (1 + 1e-3), case.dtype):
        total = case.facts["partial"]
    if not exceeds(total * (1 + 1e-3), case.dtype):
        return None
    return {
        "exact": total,
        "limit": limit,
        "dtype": case.dtype,
        "contracted": case.facts["contracted"],
        "overflowed": case.facts["count"],
        "of": case.facts["of"],
        "headroom_bits": math.log2(limit / abs(total)) if total else None,
        "tensor": first_name(case),
        "of_what": f"{case.name} with {first_name(case)}" if first_name(case) else case.name,
    }


def overflow_exp(case: Case) -> Evidence | None:
    if case.origin.op.kind != "exponential" and case.name not in ("expm1", "cosh", "sinh"):
        return None
    values = case.values
    if not values or not math.isfinite(values[0]):
        return None
    limit = math.log(LARGEST.get(case.dtype, math.inf)) if case.dtype in LARGEST else math.inf
    found: Evidence = {"value": values[0], "limit": limit, "dtype": case.dtype, "scaling": ""}
    if case.scores is not None:
        scores = case.scores
        found |= {"scale": scores.scale, "scale_expected": scores.expected}
        if scores.unscaled:
            found["scaling"] = (
                f"; these are attention scores with factor {short(scores.scale)}, expected "
                f"{short(scores.expected)}, and the row's maximum is not subtracted"
            )
        else:
            found["scaling"] = "; these are attention scores, and the row's maximum is not subtracted"
    return found


def overflow_cast(case: Case) -> Evidence | None:
    source, values = case.facts.get("from_dtype"), case.values
    if case.origin.op.kind == "same" and values and source != case.dtype and exceeds(values[0], case.dtype):
        return {
            "value": values[0],
            "from_dtype": source,
            "dtype": case.dtype,
            "limit": LARGEST.get(case.dtype),
        }
    return None


def overflow_square(case: Case) -> Evidence | None:
    if (
        case.name not in ("pow", "square")
        or not case.values
        or not math.isfinite(case.values[0])
        or case.values[0] == 0
        or "nan" in case.origin.kinds
    ):
        return None
    power = case.facts["scalars"][0] if case.facts.get("scalars") else 2.0
    if power <= 0:
        return None
    return {"value": case.values[0], "power": power, "limit": LARGEST.get(case.dtype), "dtype": case.dtype}


def overflow_add(case: Case) -> Evidence | None:
    values = case.values
    if case.origin.op.kind != "sum" or len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return {
        "values": values,
        "total": sum(values) if case.name == "add" else values[0] - values[1],
        "limit": LARGEST.get(case.dtype),
        "dtype": case.dtype,
    }


def overflow_factor(case: Case) -> Evidence | None:
    numbers = [*case.values, *case.facts.get("scalars", ())]
    if case.origin.op.kind != "factor" or len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return None
    if case.name in ("div", "true_divide", "divide"):
        if numbers[1] == 0:
            return None
        return {
            "values": numbers,
            "result": numbers[0] / numbers[1],
            "sign": "/",
            "limit": LARGEST.get(case.dtype),
            "dtype": case.dtype,
        }
    return {
        "values": numbers,
        "result": numbers[0] * numbers[1],
        "sign": "·",
        "limit": LARGEST.get(case.dtype),
        "dtype": case.dtype,
    }


def overflow_reduction(case: Case) -> Evidence | None:
    facts = case.facts
    if not facts.get("reduced") or "squares" not in facts or facts.get("absmax") is None:
        return None
    rooted = case.name in ("linalg_vector_norm", "norm", "_foreach_norm", "std")
    exact = facts["squares"] ** 0.5 if rooted else facts["squares"] if case.name == "var" else facts["sum"]
    if not math.isfinite(exact):
        return None
    if exceeds(exact * (1 + 1e-3), case.dtype) or (
        facts["absmax"] and exceeds(facts["absmax"] * facts["reduced"], case.dtype)
    ):
        return {
            "exact": exact,
            "reduced": facts["reduced"],
            "absmax": facts["absmax"],
            "limit": LARGEST.get(case.dtype),
            "dtype": case.dtype,
        }
    return None


def overflow_gradient(case: Case) -> Evidence | None:
    if not case.backward:
        return None
    for reads in (
        overflow_product,
        overflow_cast,
        overflow_factor,
        overflow_add,
        overflow_reduction,
        overflow_square,
    ):
        found = reads(case)
        if found is not None:
            exact = next((found[k] for k in ("exact", "value", "result", "total") if k in found), None)
            return {
                **found,
                "exact": exact,
                "op": case.name,
                "forward_op": case.origin.forward.op if case.origin.forward else "an accumulated gradient",
            }
    return None
