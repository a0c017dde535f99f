"""Leaves and optimiser steps: what was bad before an operator ran, or was made so between two passes."""

from __future__ import annotations

from attncli.trace.causes.case import Case, Evidence, first_name


def unwritten(case: Case) -> Evidence | None:
    if case.origin.role != "unwritten":
        return None
    return {"shape": list(case.origin.node.shape), "made": case.name}


def table_row(case: Case) -> Evidence | None:
    hit = case.facts.get("lookup")
    if case.origin.role != "leaf" or hit is None:
        return None
    at = ", ".join(f"{axis} {number}" for axis, number in zip(("batch", "position"), hit["at"], strict=False))
    return {
        "tensor": case.origin.name,
        "token": hit["token"],
        "where": at or "the only position",
        "rows": hit["rows"],
    }


def leaf_in_training(case: Case) -> Evidence | None:
    """A parameter that is bad where earlier steps of a training went well."""
    found = leaf(case)
    if found is None or case.origin.phase != "parameter" or not case.book.steps_before:
        return None
    return {**found, "steps_before": case.book.steps_before}


def leaf(case: Case) -> Evidence | None:
    if case.origin.role != "leaf":
        return None
    facts = case.facts
    what = " and ".join(
        f"{facts[kind]} {label}" for kind, label in (("nan", "NaN"), ("inf", "Inf")) if facts.get(kind)
    )
    slots = facts.get("slots")
    slices = ""
    if slots and len(slots) < 8:
        numbers = ", ".join(map(str, slots))
        slices = f", all of them at {numbers} of axis {facts['axis']}"
    shape = tuple(case.origin.node.shape)
    named = f"a tensor of shape {shape} that no operator made"
    if case.origin.name:
        # The forward of many modules calls its argument "input".
        kind = "" if case.origin.name == case.origin.phase else f"{case.origin.phase} "
        named = f"the {kind}{case.origin.name}"
    return {
        "tensor": case.origin.name,
        "subject": named,
        "what": what,
        "of": facts["of"],
        "slices": slices,
        "kind_of_leaf": case.origin.phase,
    }


def written_outside(case: Case) -> Evidence | None:
    """Memory that NumPy, or a kernel that does not say what it writes to, has changed."""
    if case.origin.role != "outside":
        return None
    reader = case.origin.reader
    shape = tuple(case.origin.node.shape)
    return {
        "made": case.name,
        "shape": shape,
        "reader": reader.op.name if reader is not None else "an operator",
    }


def written_nan(case: Case) -> Evidence | None:
    return {} if case.origin.role == "fill" else None


def optimizer_moved(case: Case) -> Evidence | None:
    """An overflow behind a step that threw a parameter far out is that step's echo, if it is of its size."""
    origin = case.origin
    if origin.role != "birth" or not origin.step:
        return None
    largest = max((operand["absmax"] for operand in case.facts.get("operands", ())), default=0.0)
    moved = [
        (after / max(before, 1e-3), name)
        for name, (before, after, step) in case.book.moved.items()
        if step <= origin.step and largest >= 1e-3 * after
    ]
    if not moved:
        return None
    _, name = max(moved)
    before, after, step = case.book.moved[name]
    return {"tensor": name, "before": before, "after": after, "step": step, "parameters_moved": len(moved)}


def optimizer_divides(case: Case) -> Evidence | None:
    if case.origin.phase != "optimizer" or case.name not in (
        "addcdiv",
        "div",
        "_foreach_addcdiv",
        "_foreach_div",
        "_fused_adam",
        "_fused_adamw",
    ):
        return None
    values = case.values
    if len(values) >= 2 and values[-1] == 0:
        return {"denominator": 0.0, "tensor": first_name(case), "step": case.origin.step + 1}
    return None


def optimizer(case: Case) -> Evidence | None:
    if case.origin.phase != "optimizer":
        return None
    return {
        "tensor": first_name(case),
        "step": case.origin.step + 1,
        "operands": case.facts.get("operands", []),
        "dtype": case.dtype,
    }
