"""Rules about NaN and Inf whose origin was found: one finding per origin, by where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from attncli.records import Finding, Origin
from attncli.rules.rule import Observed, Rule


def _found(belongs: Callable[[Origin], bool], rule: Rule, observed: Observed) -> Iterator[Finding]:
    for origin in observed.origins:
        if belongs(origin):
            yield rule.finding(
                f"{_place(origin)}: {origin.message}.",
                layer=origin.layer,
                advice=origin.advice,
                evidence={
                    "cause": origin.cause,
                    "confirmed": origin.confirmed,
                    "value": origin.value,
                    "op": origin.op,
                    "module": origin.module,
                    "source": origin.source,
                    "tensor": origin.tensor,
                },
            )


def _place(origin: Origin) -> str:
    """Who made it: "decoder.layers.0.self_attn (bmm, model.py:41)"."""
    if origin.op == "leaf":
        return origin.tensor or "a tensor"
    line = origin.source.replace("\\", "/").rpartition("/")[2] if origin.source else None
    details = ", ".join(filter(None, (origin.op, line)))
    backward = "the backward of " if origin.phase == "backward" else ""
    return f"{backward}{origin.module} ({details})" if origin.module else f"{backward}{details}"


def _is_leaf(origin: Origin) -> bool:
    return origin.phase in ("parameter", "buffer", "input")


def _is_silent(origin: Origin) -> bool:
    return not origin.evidence.get("seen")


# --- tables -------------------------------------------------------------------------------------------

_FORMULA = "finite(operands) and not finite(result), for every operator of forward, backward and optimiser"
_SOURCE = "IEEE 754-2019, sections 6 and 7; torch.autograd reports the same places only in the backward pass"

ORIGIN_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT701",
        name="nan-born",
        severity="error",
        what="An operator of the step made NaN or Inf of finite numbers, and it reaches what can be seen.",
        why="Everything that is computed from it is lost; a training run does not recover from a NaN parameter.",
        formula=_FORMULA,
        threshold="any element that reaches an output, the loss, a gradient or a parameter",
        source=_SOURCE,
        provenance="derived",
        example="A softmax over a row whose keys are all hidden.",
        remedy="The cause says what helps.",
        check=partial(_found, lambda one: one.phase in ("forward", "backward") and not _is_silent(one)),
    ),
    Rule(
        code="ATT702",
        name="bad-before-the-run",
        severity="error",
        what="A parameter, buffer or input held NaN or Inf before anything ran, and it reaches what can be seen.",
        why="No change of the model's code helps: the fault lies in the file, the initialisation or the data.",
        formula="not finite(leaf)",
        threshold="any element that reaches an output, the loss, a gradient or a parameter",
        source=_SOURCE,
        provenance="derived",
        example="A row of an embedding that was never trained.",
        remedy="Repair the tensor at its source.",
        check=partial(_found, _is_leaf),
    ),
    Rule(
        code="ATT703",
        name="optimizer-exploded",
        severity="error",
        what="An optimiser step moved a parameter so far that a later operator overflows, or made it NaN itself.",
        why="The operator that overflows first is only the echo; the cause lies a step earlier.",
        formula="max|parameter after| / max|parameter before|",
        threshold="a thousandfold growth in one step that a later overflow depends on",
        source="the step is undone and repeated: the overflow is gone",
        provenance="heuristic",
        example="SGD with a learning rate of 1e30.",
        remedy="Lower the learning rate, warm it up, or clip gradients before the step.",
        check=partial(_found, lambda one: one.phase == "optimizer"),
    ),
    Rule(
        code="ATT704",
        name="overflow-swallowed",
        severity="error",
        what="A number overflowed and was then turned into zeros or ones, so that nothing looks wrong.",
        why="The result is finite and wrong: an RMSNorm whose x² overflows returns zeros.",
        formula="the step in float64 from that operator on, against the step as it is",
        threshold="a result that differs by more than 2 % of its largest magnitude",
        source="the step is repeated, upcast, and gives something else",
        provenance="heuristic",
        example="The mean of x² in float16 with |x| > 256.",
        remedy="Upcast that operator.",
        check=partial(_found, lambda one: one.phase in ("forward", "backward") and _is_silent(one)),
    ),
)
