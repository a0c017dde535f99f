"""Points where a function, or its derivative, has no finite value; and operators that nobody can look into."""

from __future__ import annotations

import math

from attncli.trace.causes.case import Case, Evidence, added_eps, behind_views, from_where, is_spread
from attncli.trace.facts import TINIEST


def where_trap(case: Case) -> Evidence | None:
    """A branch that was not selected: its forward value harmed nothing, its derivative does."""
    origin = case.origin
    selected = any(node.op.kind == "fill" for node in origin.hidden)
    gradients = case.seen and all(name.startswith("gradient") for name in case.seen)
    if (
        origin.phase == "forward"
        and selected
        and gradients
        and origin.op.kind not in ("softmax", "log softmax")
    ):
        return {
            "op": case.name,
            "values": case.values[:1] or None,
            "value": case.values[0] if case.values else None,
        }
    if case.backward and origin.forward is not None and 0.0 in case.values and from_where(case):
        return {"op": origin.forward.op, "value": None, "values": case.values}
    return None


def eps_underflow(case: Case) -> Evidence | None:
    """A small number was added to keep off zero, and is zero itself in this dtype."""
    singular = case.name in ("rsqrt", "log", "reciprocal", "sqrt", "pow") or case.origin.op.kind == "factor"
    if not singular and not case.backward:
        return None
    for ref in case.origin.node.operands:
        eps = added_eps(ref.node)
        if eps is not None and abs(eps) < TINIEST.get(case.dtype, 0.0):
            return {"eps": eps, "dtype": case.dtype, "smallest": TINIEST.get(case.dtype), "op": case.name}
    return None


def labels(case: Case) -> Evidence | None:
    if case.facts.get("labels") == 0:
        return {"labels": 0, "of_labels": case.facts["of_labels"]}
    return None


def label_masked(case: Case) -> Evidence | None:
    picked = case.facts.get("picked")
    if picked is not None and math.isinf(picked):
        return {"row": case.facts["row"], "label": case.facts["label"]}
    return None


def empty(case: Case) -> Evidence | None:
    facts = case.facts
    if "reduced" not in facts:
        return None
    correction = facts.get("correction") or 0
    if facts["reduced"] - (correction if case.name.startswith(("std", "var")) else 0) <= 0:
        return {"reduced": facts["reduced"], "op": case.name, "correction": correction}
    return None


def zero_variance(case: Case) -> Evidence | None:
    """A normalisation of a constant row, without eps."""
    if case.origin.op.kind == "norm" and 0 in (case.facts.get("variance"), case.facts.get("eps")):
        return {"eps": case.facts.get("eps"), "reduced": case.facts.get("reduced")}
    if case.name not in ("div", "rsqrt", "mul"):
        return None
    bottom = case.made_by(1 if case.name == "div" else 0)
    if bottom is None or (case.values and case.values[-1] != 0):
        return None
    return {"eps": None, "reduced": None} if is_spread(bottom) else None


def divided_by_zero(case: Case) -> Evidence | None:
    values = [*case.values, *case.facts.get("scalars", ())]
    if case.name in ("div", "true_divide", "divide") and len(values) >= 2 and values[1] == 0:
        bottom = case.made_by(1)
        made = bottom.op.name if bottom is not None and bottom.op.name not in ("leaf", "alias") else None
        return {"numerator": values[0], "denominator": 0.0, "made": f", made by {made}" if made else ""}
    if case.name in ("reciprocal", "rsqrt", "pow") and values and values[0] == 0:
        return {"numerator": 1.0, "denominator": 0.0, "made": f" in {case.name}"}
    return None


def logarithm(case: Case) -> Evidence | None:
    if case.name not in ("log", "log2", "log10", "log1p") or not case.values:
        return None
    value = case.values[0] + (1.0 if case.name == "log1p" else 0.0)
    if value > 0:
        return None
    made = case.made_by(0)
    hint = ""
    if made is not None and made.op.kind == "softmax":
        hint = ": the softmax underflowed to 0"
    elif (
        made is not None
        and made.op.kind == "sum"
        and any(behind_views(ref.node).op.kind == "sigmoid" for ref in made.operands)
    ):
        hint = ": the sigmoid before it was rounded to 1"
    return {"value": value, "op": case.name, "hint": hint}


def negative_variance(case: Case) -> Evidence | None:
    smallest = case.facts.get("smallest_variance")
    if smallest is not None and smallest < 0:
        return {"value": smallest, "op": case.name}
    return None


def zero_row(case: Case) -> Evidence | None:
    """A weight norm divides each row by its own norm."""
    if case.name == "_weight_norm_interface" and case.values and case.values[0] == 0:
        return {"denominator": 0.0, "numerator": 0.0}
    return None


def root(case: Case) -> Evidence | None:
    bounded = case.name in ("acos", "asin", "atanh", "acosh")
    if not case.values or not (bounded or case.name in ("sqrt", "rsqrt", "pow", "linalg_vector_norm")):
        return None
    if bounded or case.values[0] < 0:
        return {"value": case.values[0], "op": case.name}
    return None


def singular_gradient(case: Case) -> Evidence | None:
    origin = case.origin
    if not case.backward or origin.forward is None:
        return None
    op = origin.forward.op
    if op not in SINGULAR_GRADIENTS:
        return None
    return {"op": op, "derivative": SINGULAR_GRADIENTS[op], "values": case.values}


def box(case: Case) -> Evidence | None:
    full = case.origin.op.full_name
    custom = bool(full) and not full.startswith(("aten::", "prims::"))
    fused = case.origin.op.kind in ("fused", "opaque") or "attention" in case.name
    if not (custom or fused):
        return None
    return {"op": full or case.name, "operands": case.facts.get("operands", [])}


def anything(case: Case) -> Evidence | None:
    return {"op": case.name, "operands": case.facts.get("operands", [])}


# Forward operators whose derivative is infinite or undefined somewhere that the value itself is not.
SINGULAR_GRADIENTS = {
    "sqrt": "1/(2√x) is infinite at x = 0",
    "rsqrt": "the derivative of 1/√x is infinite at x = 0",
    "linalg_vector_norm": "the gradient of a norm is not defined at 0",
    "norm": "the gradient of a norm is not defined at 0",
    "std": "the gradient of a standard deviation is not defined for equal values",
    "pow": "the derivative of x^p is infinite at x = 0 for p < 1",
    "log": "1/x is infinite at x = 0",
    "div": "1/x² is infinite at x = 0",
    "reciprocal": "1/x² is infinite at x = 0",
    "acos": "the derivative is infinite at ±1",
    "asin": "the derivative is infinite at ±1",
    "atan2": "the derivative is not defined at 0, 0",
    "_linalg_eigh": "the gradient of eigenvectors is not defined for equal eigenvalues",
    "linalg_eig": "the gradient of eigenvectors is not defined for equal eigenvalues",
    "_linalg_svd": "the gradient of singular vectors is not defined for equal singular values",
    "prod": "the derivative is not defined for several zeros",
    "xlogy": "log y is infinite at y = 0",
    "_cdist_forward": "the gradient of a distance is not defined at 0",
}
