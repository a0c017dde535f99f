"""Rules about training runs: what a step that went wrong says itself, and how the optimiser was set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from attncli.records import Fault, Finding, Moved, Step
from attncli.rules.early import EARLY_RULES, early_warnings
from attncli.rules.measured import many, number
from attncli.rules.rule import Observed, Rule

__all__ = ["TRAINING_RULES", "early_warnings"]


# --- the loss scale -----------------------------------------------------------------------------------


def _scale_collapses(rule: Rule, observed: Observed) -> Iterator[Finding]:
    training = observed.training
    if training is None:
        return
    fault = training.fault if training.fault and training.fault.seen == "loss scale" else None
    skipped = _skipped_at_the_end(training.steps)
    scales = [step for step in training.steps if step.loss_scale is not None]
    last = scales[-1].loss_scale if scales else None
    below = last is not None and last < _FLOOR and any(_scale(step) > last for step in scales)
    if fault is None and not below and len(skipped) < _SKIPPED:
        return
    at = skipped[-1].number if skipped else fault.step if fault else scales[-1].number
    parts = []
    if len(skipped) > 1:
        parts.append(f"the last {len(skipped)} steps were all skipped")
    first = next((_scale(step) for step in skipped if step.loss_scale is not None), None)
    if last is not None:
        before = first if first is not None and first > last else max(map(_scale, scales))
        parts.append(f"the loss scale fell from {number(before)} to {number(last)}" if before > last else
                     f"the loss scale is {number(last)}")  # fmt: skip
    yield rule.finding(
        f"Step {at}: {', and '.join(parts) or 'the loss scale collapsed'}: "
        "the gradients are not finite at any scale.",
        evidence={
            "step": at,
            "skipped": len(skipped),
            "loss_scale": last,
            "source": fault.source if fault else None,
        },
    )


def _skipped_at_the_end(steps: Sequence[Step]) -> list[Step]:
    """The unbroken run of skipped steps that the history ends with."""
    run: list[Step] = []
    for step in reversed(steps):
        if not step.skipped:
            break
        run.append(step)
    return run[::-1]


def _scale(step: Step) -> float:
    return -math.inf if step.loss_scale is None else step.loss_scale


# --- updates ------------------------------------------------------------------------------------------


def _explodes(rule: Rule, observed: Observed) -> Iterator[Finding]:
    training = observed.training
    if training is None:
        return
    blamed = any(origin.phase == "optimizer" for origin in observed.origins)
    fault = training.fault
    moved = [
        (one, growth)
        for one in training.moved
        if (growth := _growth(one)) >= _EXPLODED
        # The origin says it already, of the update that the fault comes from.
        and not (blamed and fault is not None and one.step >= fault.step - 1)
    ]
    if not moved:
        return
    first = min(one.step for one, _ in moved)
    together = [(one, growth) for one, growth in moved if one.step == first]
    one, growth = max(together, key=lambda pair: pair[1])
    grave = fault is not None and fault.step >= first and growth >= _GRAVE
    more = f", and {many(len(together) - 1, 'other parameter')} with it" if len(together) > 1 else ""
    facts = [f"learning rate {number(one.learning_rate)}" if one.learning_rate is not None else "",
             f"largest gradient {number(one.gradient_absmax)}" if one.gradient_absmax is not None else ""]  # fmt: skip
    known = ", ".join(filter(None, facts))
    times = f"{number(growth)}-fold" if math.isfinite(growth) else "beyond all numbers"
    yield rule.finding(
        f"{one.parameter}: step {one.step} moved it from {number(one.before)} to {number(one.after)} at most, "
        f"{times}{f' ({known})' if known else ''}{more}.",
        severity="error" if grave else None,
        evidence={
            "tensor": one.parameter,
            "step": one.step,
            "before": one.before,
            "after": one.after,
            "growth": growth,
            "learning_rate": one.learning_rate,
            "gradient_absmax": one.gradient_absmax,
            "steps": sorted({other.step for other, _ in moved})[:_NAMED],
        },
    )


def _growth(moved: Moved) -> float:
    """How many times larger, where what is below a hundredth counts as a hundredth; infinite for NaN and Inf."""
    if not math.isfinite(moved.before):
        return 0.0  # it was broken before
    return abs(moved.after) / max(abs(moved.before), _SMALL) if math.isfinite(moved.after) else math.inf


# --- epsilon ------------------------------------------------------------------------------------------


def _epsilon_is_zero(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for optimizer in observed.training.optimizers if observed.training else ():
        eps, smallest = optimizer.settings.get("eps"), _SMALLEST.get(optimizer.dtype)
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or smallest is None:
            continue
        # Fused kernels compute in float32 and round the parameter alone.
        if optimizer.settings.get("fused") or not 0 < eps <= smallest / 2:
            continue
        yield rule.finding(
            f"{optimizer.name}: eps is {eps:.3g}, which is 0 in {optimizer.dtype}, the dtype of its parameters: a "
            "gradient of 0 gives 0/0.",
            evidence={
                "eps": eps,
                "dtype": optimizer.dtype,
                "smallest": smallest,
                "optimizer": optimizer.name,
            },
        )


# --- what is left -------------------------------------------------------------------------------------


def _not_explained(rule: Rule, observed: Observed) -> Iterator[Finding]:
    fault = observed.training.fault if observed.training else None
    if fault is None or observed.origins or fault.seen == "loss scale":
        return
    again = {
        True: "the step was repeated and showed it again, but no operator that made it was found",
        False: "the step was repeated and showed nothing",
        None: "the step was not repeated",
    }[fault.reproduced]
    why = f" ({fault.why.strip().rstrip('.')})" if fault.why.strip() else ""
    yield rule.finding(
        f"Step {fault.step}: {symptom(fault)}; {again}{why}.",
        advice=_advice(fault),
        evidence={
            "step": fault.step,
            "seen": fault.seen,
            "value": fault.value,
            "tensors": list(fault.tensors[:_NAMED]),
            "reproduced": fault.reproduced,
            "source": fault.source,
            "rank": fault.rank,
        },
    )


def _advice(fault: Fault) -> str | None:
    if fault.seen == "parameter" or _was_written_late(fault):
        return _OF_UPDATES
    return _BY_HAND if fault.reproduced is None else None


def _was_written_late(fault: Fault) -> bool:
    """Whether gradients were good when they were last looked at, before the update."""
    return fault.seen == "gradient" and fault.withheld is False and fault.reproduced is None


def symptom(fault: Fault) -> str:
    """ "the loss was NaN", "12 gradients were NaN, first blk.3.wq.weight"."""
    value = {"nan": "NaN", "+inf": "+Inf", "-inf": "−Inf"}.get(fault.value, fault.value or "not finite")
    if fault.seen == "loss" or not fault.tensors:
        return f"the {fault.seen} was {value}"
    if len(fault.tensors) == 1:
        return f"the {fault.seen} {'of ' if fault.seen == 'gradient' else ''}{fault.tensors[0]} was {value}"
    return f"{len(fault.tensors)} {fault.seen}s were {value}, first {fault.tensors[0]}"


# --- tables -------------------------------------------------------------------------------------------

_OF_UPDATES = (
    "Look at what writes to gradients between backward() and step(), and at the settings of the optimiser: a learning "
    "rate, eps or beta that is no number, or too small for the dtype."
)
_BY_HAND = (
    "Repeat the step by hand: attncli.nan_check(model, step), where step(model) computes the loss of the batch that is "
    "named here with the weights from before it."
)
# Where Megatron-LM (--min-loss-scale) and DeepSpeed (min_loss_scale) stop by default.
_FLOOR = 1.0
# torch begins at 2**16, and scales of 2**26 were seen to settle after 14 skipped steps.
_SKIPPED = 32
_EXPLODED = 100.0
_GRAVE = 1000.0
_SMALL = 0.01
# The least numbers above 0, subnormal ones; what is at most half of one rounds to 0.
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}
_NAMED = 16

TRAINING_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT711",
        name="loss-scale-collapses",
        severity="error",
        what="The loss scale falls and falls, because the gradients are not finite at any scale.",
        why="A few skipped steps set the scale; where every step is skipped nothing is learned any more, and whatever "
        "makes the gradients infinite does so without scaling as well.",
        formula="the loss scale of each step; steps skipped in a row up to the last",
        threshold="a scale that fell below 1, or 32 or more skipped steps without recovery",
        source="1: the floor at which Megatron-LM (--min-loss-scale) and DeepSpeed (min_loss_scale) stop; 10 halvings "
        "take GradScaler's 65 536 to 64: attncli",
        provenance="heuristic",
        example="From step 412 on every step is skipped, and the scale falls from 65 536 to 0.5.",
        remedy="Look for the operator that makes Inf or NaN in the forward or backward pass: it is one that no loss "
        "scale helps, an overflow in float16, a division by zero or a bad batch.",
        check=_scale_collapses,
    ),
    Rule(
        code="ATT714",
        name="update-explodes",
        severity="warning",
        what="One optimiser step made a parameter a hundred times larger or more.",
        why="Such a step destroys what was learned, and what overflows afterwards is only its echo.",
        formula="max|parameter after| / max(max|parameter before|, 0.01)",
        threshold="≥ 100; an error where ≥ 1 000 and a fault follows. Below 0.01 nothing explodes: what starts at zero "
        "takes its size in its first steps",
        source="attncli",
        provenance="heuristic",
        example="Step 37 moves blk.wi.weight from 0.11 to 3.2e6.",
        remedy="Lower the learning rate, warm it up, or clip gradients before the step.",
        check=_explodes,
    ),
    Rule(
        code="ATT715",
        name="epsilon-is-zero",
        severity="warning",
        what="The eps of an adaptive optimiser is too small for the dtype of its parameters, and rounds to 0.",
        why="A parameter whose gradients were all 0, such as the embedding of an unseen token, is updated by 0/0: NaN.",
        formula="eps ≤ half of the smallest number of the dtype above 0",
        threshold="≤ 2^-25 in float16; never for fused kernels, which compute in float32",
        source="IEEE 754-2019 §4.3 (round half to even)",
        provenance="derived",
        example="Adam with eps 1e-8 on float16 parameters.",
        remedy="Keep the parameters in float32 under autocast, or set eps to 1e-4 for float16.",
        check=_epsilon_is_zero,
    ),
    Rule(
        code="ATT716",
        name="step-not-explained",
        severity="error",
        what="A training step went wrong, and repeating it did not show where the value was born.",
        why="The fault is real even where its origin is not known.",
        formula="a loss, gradient or parameter that is not finite, and no origin",
        threshold="any",
        source="attncli",
        provenance="derived",
        example="The loss of step 412 is NaN, and the step repeated gives a finite one.",
        remedy="Make the run repeatable (seeds, deterministic algorithms, no state outside the model), or repeat its "
        "capsule on the machine and device where it happened.",
        check=_not_explained,
    ),
    *EARLY_RULES,
)
