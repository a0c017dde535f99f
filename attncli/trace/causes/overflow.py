"""Finite numbers whose result the dtype cannot hold."""

from __future__ import annotations

import math

from attncli.trace.causes.case import Case, Evidence, first_name, scaling_words, short
from attncli.trace.facts import LARGEST, exceeds


def overflow_scores(case: Case) -> Evidence | None:
    found = overflow_product(case)
    if found is None or case.scores is None or case.backward:
        return None
    scores, exact = case.scores, found["exact"]
    scaled = (math.inf if exact is None else exact) * scores.expected
    return {
        **found,
        "reaches": found["reaches"] if exact is None else f"= {_whole(exact)}",
        "scale": scores.scale,
        "scale_expected": scores.expected,
        "scale_after": scores.after,
        "fits_scaled": not exceeds(scaled, case.dtype),
        "scaling": scaling_words(scores, case.dtype, scaled),
    }


def overflow_product(case: Case) -> Evidence | None:
    """`exact`: None where float64 does not hold it either, or nobody has computed it."""
    facts = case.facts
    if not case.origin.op.product:
        return None
    factors = _factors(case)
    total = facts["exact"] + facts.get("added", 0.0) if "exact" in facts else None
    if total is not None and math.isfinite(total):
        if not exceeds(total * (1 + 1e-3), case.dtype):
            total = facts["partial"]
        if not exceeds(total * (1 + 1e-3), case.dtype):
            return None
    elif factors is None or log_size(case) < math.log(LARGEST.get(case.dtype, math.inf)):
        return None
    exact = total if total is not None and math.isfinite(total) else None
    limit = LARGEST.get(case.dtype, math.inf)
    reaches = f"reaches {_whole(exact)}" if exact is not None else ""
    if exact is None and factors is not None:
        terms = f"adds up {_contracted(case)} products of" if (_contracted(case) or 1) > 1 else "multiplies"
        reaches = f"{terms} numbers of up to {short(factors[0])} and {short(factors[1])}"
    return {
        "exact": exact,
        "reaches": reaches,
        "limit": limit,
        "ends": _whole(limit),
        "dtype": case.dtype,
        "contracted": _contracted(case),
        "overflowed": facts["count"],
        "of": facts["of"],
        "headroom_bits": math.log2(limit / abs(exact)) if exact else None,
        "tensor": first_name(case),
        "of_what": f"{case.name} with {first_name(case)}" if first_name(case) else case.name,
    }


def overflow_exp(case: Case) -> Evidence | None:
    values = case.values
    if case.name not in GROWTH or not values or not math.isfinite(values[0]):
        return None
    limit = (math.log(LARGEST.get(case.dtype, math.inf)) + _HALVED.get(case.name, 0.0)) / GROWTH[case.name]
    found: Evidence = {
        "op": case.name,
        "value": values[0],
        "limit": limit,
        "dtype": case.dtype,
        "scaling": "",
    }
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
    powered = power_of(case)
    if powered is None or powered[0] == 0 or "nan" in case.origin.kinds:
        return None
    value, power = powered
    return {"value": value, "power": power, "limit": LARGEST.get(case.dtype), "dtype": case.dtype}


def power_of(case: Case) -> tuple[float, float] | None:
    """Base and exponent of a power at the element, where both are numbers."""
    if case.name not in ("pow", "square") or not case.values:
        return None
    scalars = case.facts.get("scalars", ())
    base, power = case.values[0], 2.0
    if scalars and has_number_as_base(case):
        base, power = scalars[0], case.values[0]
    elif scalars:
        power = scalars[0]
    elif len(case.values) > 1:
        power = case.values[1]
    return (base, power) if math.isfinite(base) and math.isfinite(power) else None


def has_number_as_base(case: Case) -> bool:
    """Whether this is a power such as 2 ** x."""
    arguments = case.origin.node.args
    return case.name == "pow" and bool(arguments) and isinstance(arguments[0], (int, float))


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
    if case.name == "reciprocal":
        numbers = [1.0, *numbers]
    elif case.origin.op.kind != "factor":
        return None
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return None
    divides = case.name in ("div", "true_divide", "divide", "reciprocal")
    if divides and numbers[1] == 0:
        return None
    result = numbers[0] / numbers[1] if divides else numbers[0] * numbers[1]
    return {
        "values": numbers,
        "result": result,
        "sign": "/" if divides else "·",
        "equals": f" = {short(result)}" if math.isfinite(result) else "",
        "limit": LARGEST.get(case.dtype),
        "dtype": case.dtype,
    }


def overflow_reduction(case: Case) -> Evidence | None:
    facts = case.facts
    if not facts.get("reduced") or "squares" not in facts or not math.isfinite(facts.get("absmax") or 0.0):
        return None
    limit = math.log(LARGEST.get(case.dtype, math.inf))
    found: Evidence = {
        "exact": None,
        "reduced": facts["reduced"],
        "absmax": facts["absmax"],
        "limit": LARGEST.get(case.dtype),
        "dtype": case.dtype,
    }
    if case.name == "prod":
        return {**found, "come_to": "multiply"} if log_size(case) > limit else None
    rooted = case.name in ("linalg_vector_norm", "norm", "_foreach_norm", "std")
    exact = facts["squares"] ** 0.5 if rooted else facts["squares"] if case.name == "var" else facts["sum"]
    if math.isfinite(exact):
        beyond = exceeds(exact * (1 + 1e-3), case.dtype) or exceeds(
            facts["absmax"] * facts["reduced"], case.dtype
        )
        return {**found, "exact": exact, "come_to": f"add up to {short(exact)},"} if beyond else None
    squared = "have squares that " if rooted or case.name == "var" else ""
    return {**found, "come_to": f"{squared}add up"} if log_size(case) > limit else None


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
            known = exact is not None and math.isfinite(exact)
            return {
                **found,
                "exact": exact,
                "size": f" {short(exact)}" if known else "",
                "op": case.name,
                "forward_op": case.origin.forward.op if case.origin.forward else "an accumulated gradient",
            }
    return None


def log_size(case: Case) -> float:
    """Natural logarithm of the magnitude the result would have, or of a bound above it; −inf where none is known."""
    facts, name = case.facts, case.name
    largest = max((operand["absmax"] for operand in facts.get("operands", ())), default=0.0)
    numbers = [*case.values, *facts.get("scalars", ())]
    if name in GROWTH:
        return GROWTH[name] * max([largest, *map(abs, case.values[:1])])
    powered = power_of(case)
    if powered is not None:
        base, power = powered
        if has_number_as_base(case):
            return _log(base) * math.copysign(largest, power)
        return max(power * _log(base), power * _log(largest) if power > 0 else -math.inf)
    if case.origin.op.product:
        factors = _factors(case)
        return sum(map(_log, (*factors, _contracted(case) or 1))) if factors else -math.inf
    if facts.get("reduced"):
        count = facts["reduced"]
        if name == "prod":
            return float(count * _log(largest))
        squared = name in ("linalg_vector_norm", "norm", "_foreach_norm", "std", "var")
        return _log(largest) * (2 if squared else 1) + _log(count)
    if name == "reciprocal" and numbers:
        return -_log(numbers[0])
    if case.origin.op.kind == "factor" and len(numbers) > 1:
        return _log(numbers[0]) + _log(numbers[1]) * (1 if name in ("mul", "multiply") else -1)
    if case.origin.op.kind == "sum" and numbers:
        return max(map(_log, numbers)) + math.log(len(numbers))
    return -math.inf


# --- helpers ------------------------------------------------------------------------------------------


def _factors(case: Case) -> tuple[float, float] | None:
    """The largest magnitudes on either side of a product; of a dot product those of its own row and column."""
    facts = case.facts
    if "row_absmax" in facts:
        found = facts["row_absmax"], facts["column_absmax"]
    else:
        operands = facts.get("operands", ())
        pair = operands[:2] if case.origin.op.kind == "convolution" else operands[-2:]
        if len(pair) < 2 or ("nan" in case.origin.kinds and "exact" not in facts):
            return None
        found = pair[0]["absmax"], pair[1]["absmax"]
    return found if all(map(math.isfinite, found)) else None


def _contracted(case: Case) -> int | None:
    """How many products one element adds up."""
    operands = case.facts.get("operands", ())
    if case.origin.op.kind == "convolution" and len(operands) > 1:
        return int(math.prod(operands[1]["shape"][1:]))
    contracted: int | None = case.facts.get("contracted")
    return contracted


def _log(number: float) -> float:
    return math.log(abs(number)) if number and math.isfinite(number) else -math.inf


def _whole(number: float) -> str:
    return f"{number:,.0f}" if abs(number) < 1e15 else f"{number:.5g}"


# --- tables -------------------------------------------------------------------------------------------

# Functions that grow as e to the power of this many times their input; of some, half of that.
GROWTH = {"exp": 1.0, "exp2": math.log(2), "expm1": 1.0, "sinh": 1.0, "cosh": 1.0}
_HALVED = {"sinh": math.log(2), "cosh": math.log(2)}
