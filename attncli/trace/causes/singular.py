"""Points where a function, or its derivative, has no finite value; and operators that nobody can look into."""

from __future__ import annotations

import math
from typing import NamedTuple

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
    if not case.backward and not _is_at_zero(case):
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
    """−∞ of a logarithm; what lies beyond its domain is `outside_domain`."""
    if case.name not in _LOGARITHMS:
        return None
    value = _argument(case)
    if value is None or value != DOMAINS[case.name].low:
        return None
    made = case.made_by(1 if case.name in SECOND_OPERAND else 0)
    hint = ""
    if made is not None and made.op.kind == "softmax":
        hint = ": the softmax underflowed to 0"
    elif (
        made is not None
        and made.op.kind == "sum"
        and any(behind_views(ref.node).op.kind == "sigmoid" for ref in made.operands)
    ):
        hint = ": the sigmoid before it was rounded to 1"
    return {"value": value + 0.0, "op": case.name, "hint": hint}  # -0.0 is shown as 0


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


def outside_domain(case: Case) -> Evidence | None:
    domain, value = DOMAINS.get(case.name), _argument(case)
    if domain is None or value is None or domain.low < value < domain.high:
        return None
    end = next((end for end in (domain.low, domain.high) if value == end), None)
    # A number beside an end is not shown as that end.
    shown = next(
        text for text in (f"{value:.7g}", f"{value:.17g}") if end is not None or not domain.ends(text)
    )
    return {
        "value": value,
        "op": case.name,
        "shown": shown,
        "instead": "not a real number" if end is None else "infinite",
    }


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


def _argument(case: Case) -> float | None:
    """The operand at which a function may be singular."""
    position = 1 if case.name in SECOND_OPERAND else 0
    return case.values[position] if len(case.values) > position else None


def _is_at_zero(case: Case) -> bool:
    """Whether an eps would have kept this operator off 0."""
    numbers = [*case.values, *case.facts.get("scalars", ())]
    if case.name in ("div", "true_divide", "divide"):
        return len(numbers) > 1 and numbers[1] == 0
    if case.name in ("rsqrt", "log", "log2", "log10", "reciprocal", "sqrt", "pow"):
        return bool(case.values) and case.values[0] == 0
    return False


# --- tables -------------------------------------------------------------------------------------------


class Domain(NamedTuple):
    """Between which ends a function is defined, and a number well inside."""

    low: float
    high: float
    inside: float = 0.5

    def ends(self, text: str) -> bool:
        return float(text) in (self.low, self.high)


DOMAINS = {
    **dict.fromkeys("sqrt rsqrt log log2 log10 xlogy pow".split(), Domain(0.0, math.inf)),
    **dict.fromkeys(("log1p", "special_xlog1py"), Domain(-1.0, math.inf)),
    **dict.fromkeys(("acos", "asin", "atanh", "erfinv"), Domain(-1.0, 1.0)),
    **dict.fromkeys(("logit", "special_ndtri"), Domain(0.0, 1.0)),
    "acosh": Domain(1.0, math.inf, 1.5),
}
# Of these the second operand is the one at which they may be singular.
SECOND_OPERAND = frozenset(("div", "true_divide", "xlogy", "special_xlog1py"))
_LOGARITHMS = frozenset(("log", "log2", "log10", "log1p", "xlogy", "special_xlog1py"))

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
