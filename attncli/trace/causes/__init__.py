"""One origin → its cause: what it is called, the numbers that show it, and what helps.

A row of `CAUSES` per cause, the most telling first. A row looks at the facts that were taken where the value was
born, at what made the operands, and at the way from there to what is seen; it answers with its evidence, or not at
all. `change` names what is altered when the step is repeated for proof.
"""

from __future__ import annotations

from attncli.trace.causes.advice import (
    against_exponential,
    against_growing_states,
    against_logarithm_of_zero,
    against_lost_eps,
    against_nothing_left,
    against_power,
    against_range,
    against_scores,
    against_singular_gradient,
    against_steep_gradient,
)
from attncli.trace.causes.case import Case, Cause, Evidence, common, place_of
from attncli.trace.causes.leaves import (
    leaf,
    leaf_in_training,
    optimizer,
    optimizer_divides,
    optimizer_moved,
    table_row,
    unwritten,
    written_nan,
    written_outside,
)
from attncli.trace.causes.masks import (
    escaped_fill,
    infinity_minus_infinity,
    mask_cast,
    mask_sign,
    mask_twice,
    masked_row,
    masked_row_by_hand,
    zero_times_infinity,
)
from attncli.trace.causes.overflow import (
    has_number_as_base,
    log_size,
    overflow_add,
    overflow_cast,
    overflow_exp,
    overflow_factor,
    overflow_gradient,
    overflow_product,
    overflow_reduction,
    overflow_scores,
    overflow_square,
)
from attncli.trace.causes.singular import (
    DOMAINS,
    SECOND_OPERAND,
    SINGULAR_GRADIENTS,
    anything,
    box,
    divided_by_zero,
    empty,
    eps_underflow,
    label_masked,
    labels,
    logarithm,
    negative_variance,
    outside_domain,
    singular_gradient,
    where_trap,
    zero_row,
    zero_variance,
)

__all__ = [
    "CAUSES",
    "DOMAINS",
    "SECOND_OPERAND",
    "SINGULAR_GRADIENTS",
    "Case",
    "Cause",
    "cause_of",
    "has_number_as_base",
    "log_size",
    "place_of",
]


def cause_of(case: Case) -> tuple[Cause, Evidence]:
    """The first row that recognises the origin; the last row recognises everything."""
    for cause in CAUSES:
        evidence = cause.reads(case)
        if evidence is not None:
            return cause, {**common(case), **evidence}
    raise LookupError("the last cause fits everything")


# --- tables -------------------------------------------------------------------------------------------

CAUSES: tuple[Cause, ...] = (
    Cause(
        "unwritten-memory",
        unwritten,
        says="{made} reserved memory of shape {shape} that is read before anything was written to it",
        advice="Start from torch.zeros, or read only what was written.",
        change="replace",
    ),
    Cause(
        "bad-embedding-row",
        table_row,
        says=(
            "{tensor}[{token}] is not finite, and token {token} stands at {where} ({rows} such rows in "
            "the table)"
        ),
        advice="Repair or re-initialise that row; check how the table was resized or trained.",
        change="replace",
    ),
    Cause(
        "bad-leaf",
        leaf_in_training,
        says="{subject} holds {what} among {of} elements when this step first reads it{slices}",
        advice=(
            "The step did not make it. If it was sound when training began, something wrote to it between two updates: "
            "an edit by the training loop, the first half of a SAM step, averaged weights that were copied back."
        ),
        change="replace",
    ),
    Cause(
        "bad-leaf",
        leaf,
        says="{subject} holds {what} among {of} elements when it is first read{slices}",
        advice=(
            "It was bad before anything was computed of it: look in the file, the initialisation, the data, or "
            "for memory that was never written."
        ),
        change="replace",
    ),
    Cause(
        "written-outside",
        written_outside,
        says="a tensor of shape {shape} was finite when {made} made it, and is not when {reader} reads it: something "
        "outside torch wrote to it",
        advice="Look for NumPy arrays and custom kernels that share its memory.",
        change="replace",
    ),
    Cause(
        "written-nan",
        written_nan,
        says="the code itself fills in NaN",
        advice="Fill with a finite value, or with −inf where a softmax follows.",
        change="finite",
    ),
    Cause(
        "optimizer-step",
        optimizer_moved,
        says=(
            "optimiser step {step} moved {tensor} from {before:.3g} to {after:.3g} (largest magnitude); "
            "what overflows later is its echo"
        ),
        advice="Lower the learning rate, warm it up, or clip gradients before the step.",
        change="hold",
    ),
    Cause(
        "optimizer-eps",
        optimizer_divides,
        says="optimiser step {step} divides by 0: the second moment and eps are 0 in this dtype",
        advice="Use an eps that the dtype holds, or keep optimiser states in float32.",
        change="finite",
    ),
    Cause(
        "optimizer-overflow",
        optimizer,
        says="optimiser step {step} overflows on finite gradients",
        advice=against_growing_states,
        change="widen",
    ),
    Cause(
        "masked-row",
        masked_row,
        says=(
            "{row} may attend to 0 of {keys} keys: every score is −inf, and the softmax of nothing is "
            "NaN ({rows} of {of_rows} rows){made_by}"
        ),
        advice=(
            "Let every query see at least one key (itself), fill with a finite minimum, or zero such "
            "rows after the softmax with where."
        ),
        change="unmask",
    ),
    Cause(
        "masked-row",
        masked_row_by_hand,
        says=(
            "{row} may attend to 0 of {keys} keys: −inf minus the row's maximum −inf is NaN ({rows} of "
            "{of_rows} rows){made_by}"
        ),
        advice="Let every query see at least one key, or fill with a finite minimum.",
        change="unmask",
    ),
    Cause(
        "mask-wrong-sign",
        mask_sign,
        says="the scores hold +inf at {plus_inf} of {keys} keys where −inf was meant{made_by}",
        advice="Hidden keys need −inf (or a large negative number), not +inf.",
        change="finite",
    ),
    Cause(
        "where-trap",
        where_trap,
        says="the branch of {op} that was not selected is not finite, and 0 times its derivative is NaN",
        advice="Make the input of the branch harmless as well: where(c, f(where(c, x, 1)), y).",
        change="nudge",
    ),
    Cause(
        "mask-arithmetic",
        zero_times_infinity,
        says="0 · {infinity} is NaN in mask arithmetic",
        advice="Use masked_fill (or where) to hide; of p · log p use torch.xlogy.",
        change="finite",
    ),
    Cause(
        "mask-arithmetic",
        infinity_minus_infinity,
        says="infinities of opposite signs were added: {values}",
        advice="Combine masks as booleans, and fill once.",
        change="finite",
    ),
    Cause(
        "mask-added-twice",
        mask_twice,
        says=(
            "{values[0]:.4g} + {values[1]:.4g} is beyond {dtype} ({limit:.5g}): a mask of finfo.min was "
            "added to another"
        ),
        advice="Combine the masks as booleans, or take their minimum, and add once.",
        change="widen",
    ),
    Cause(
        "mask-cast",
        mask_cast,
        says="a mask value {value:.4g} made for {from_dtype} becomes −inf in {dtype}",
        advice="Make the mask in the dtype of the scores: torch.finfo(scores.dtype).min.",
        change="finite",
    ),
    Cause(
        "overflow-scores",
        overflow_scores,
        says="q·k {reaches} at {at}; {dtype} ends at {ends}{scaling}",
        advice=against_scores,
        change="scale",
    ),
    Cause(
        "overflow-gradient",
        overflow_gradient,
        says="the gradient{size} in the backward of {forward_op} is beyond {dtype}",
        advice=against_steep_gradient,
        change="fit",
    ),
    Cause(
        "overflow-product",
        overflow_product,
        says="{of_what} {reaches}; {dtype} ends at {ends} ({overflowed} of {of} elements)",
        advice=against_range,
        change="fit",
    ),
    Cause(
        "overflow-cast",
        overflow_cast,
        says="{value:.5g} in {from_dtype} is beyond {dtype} ({limit:.5g})",
        advice=against_range,
        change="widen",
    ),
    Cause(
        "overflow-exp",
        overflow_exp,
        says="{op}({value:.4g}) is beyond {dtype}, which holds {op} up to {limit:.4g}{scaling}",
        advice=against_exponential,
        change="scale",
    ),
    Cause(
        "label-ignored",
        labels,
        says="{labels} of {of_labels} labels are valid: the mean of nothing is NaN",
        advice="Skip such batches, or divide the sum by max(1, count).",
        change="finite",
    ),
    Cause(
        "label-masked",
        label_masked,
        says="label {label} of row {row} has log-probability −inf: its logit was masked away",
        advice="Do not mask classes that occur as labels.",
        change="finite",
    ),
    Cause(
        "empty-reduction",
        empty,
        says="{op} of {reduced} element(s) (correction {correction}) is undefined",
        advice=against_nothing_left,
        change="finite",
    ),
    Cause(
        "eps-underflow",
        eps_underflow,
        says="the eps {eps:.3g} is 0 in {dtype}, whose smallest number is {smallest:.3g}",
        advice=against_lost_eps,
        change="widen",
    ),
    Cause(
        "singular-gradient",
        singular_gradient,
        says="the gradient of {op} is not finite here: {derivative}",
        advice=against_singular_gradient,
        change="nudge",
    ),
    Cause(
        "zero-variance",
        zero_variance,
        says="a row of equal values has variance 0, and nothing keeps its division off 0",
        advice="Add an eps before the root.",
        change="nudge",
    ),
    Cause(
        "overflow-square",
        overflow_square,
        says="{value:.5g} to the power {power:g} is beyond {dtype} ({limit:.5g})",
        advice=against_power,
        change="fit",
    ),
    Cause(
        "division-by-zero",
        divided_by_zero,
        says="{numerator:.4g} / 0{made}",
        advice="Keep the divisor off 0: clamp it, or add an eps.",
        change="nudge",
    ),
    Cause(
        "log-of-zero",
        logarithm,
        says="{op} of {value:.4g}{hint}",
        advice=against_logarithm_of_zero,
        change="nudge",
    ),
    Cause(
        "outside-domain",
        negative_variance,
        says="{op} takes the root of a variance of {value:.4g}",
        advice="A running variance is never negative: look at what wrote it, or reset the running statistics.",
        change="finite",
    ),
    Cause(
        "division-by-zero",
        zero_row,
        says="a row of the weight is 0, and its norm is divided by",
        advice="Re-initialise dead rows, or add an eps to the norm.",
        change="finite",
    ),
    Cause(
        "outside-domain",
        outside_domain,
        says="{op} of {shown} is {instead}",
        advice="Clamp the input to where the function is defined and finite, or find what put it outside.",
        change="nudge",
    ),
    Cause(
        "overflow-sum",
        overflow_add,
        says="{values[0]:.5g} and {values[1]:.5g}, each finite, add up beyond {dtype} ({limit:.5g})",
        advice=against_range,
        change="fit",
    ),
    Cause(
        "overflow-factor",
        overflow_factor,
        says="{values[0]:.4g} {sign} {values[1]:.4g}{equals} is beyond {dtype} ({limit:.5g})",
        advice=against_range,
        change="fit",
    ),
    Cause(
        "overflow-reduction",
        overflow_reduction,
        says="{reduced} numbers of up to {absmax:.4g} {come_to} beyond {dtype} ({limit:.5g})",
        advice=against_range,
        change="fit",
    ),
    Cause(
        "kernel",
        box,
        says="the inputs of {op} are finite, its output is not",
        advice="Try another kernel or a newer version; report it with --save-repro.",
        change="kernel",
    ),
    Cause(
        "escaped-fill",
        escaped_fill,
        says="−inf that was filled in to hide something got into {op}{made_by}",
        advice="Remove the filled positions before this operator.",
        change="finite",
    ),
    Cause(
        "unexplained",
        anything,
        says="{op} made it from finite inputs",
        advice="Save it with --save-repro and look at the operands.",
        change="widen",
    ),
)
