"""What helps, where it hangs on the numbers: in another dtype, or outside attention, a defect is mended otherwise."""

from __future__ import annotations

import math

from attncli.trace.causes.case import Evidence


def against_range(evidence: Evidence) -> str:
    """Of a result that the dtype cannot hold."""
    dtype = evidence["dtype"]
    if dtype == "float16":
        return (
            "Compute this operator in float32, or keep its inputs smaller; bfloat16 has the range of float32."
        )
    wider = "no dtype has a wider range" if dtype == "float64" else "only float64 has a wider range"
    return f"Keep its inputs smaller (normalise or clamp them), or work with their logarithms: {wider}."


def against_scores(evidence: Evidence) -> str:
    half = evidence["dtype"] == "float16"
    if _is_scaled(evidence) and evidence["scale_after"] in (None, 1.0):
        wider = "Compute the scores in float32 or bfloat16, or normalise" if half else "Normalise"
        return f"{wider} q and k (QK-norm): they are scaled by 1/√head_dim already."
    if half:
        return (
            "Scale q by 1/√head_dim before the product, compute the scores in float32, or use a fused kernel."
        )
    return "Scale q by 1/√head_dim before the product, or normalise q and k (QK-norm)."


def against_steep_gradient(evidence: Evidence) -> str:
    if evidence["dtype"] == "float16":
        return "Lower the loss scale (a GradScaler does), clip, or compute this operator in float32."
    return (
        "Clip or normalise what enters the operator: its derivative is too steep for any loss scale to help."
    )


def against_exponential(evidence: Evidence) -> str:
    if "scale" in evidence:
        scaling = "" if _is_scaled(evidence) else "; scale the scores by 1/√head_dim"
        return f"Use torch.softmax or logsumexp, which subtract the maximum{scaling}."
    op = evidence["op"]
    if op not in ("exp", "expm1"):
        return f"Clamp the input before {op}, or stay in logarithms."
    highest = 10 if evidence["dtype"] == "float16" else 20
    return (
        f"Clamp the input before {op} (a log-variance to [-30, {highest}], say), or stay in logarithms: "
        "logsumexp, softplus, log_softmax."
    )


def against_power(evidence: Evidence) -> str:
    if evidence["power"] < 0 and abs(evidence["value"]) < 1:
        return "Keep the base off 0: clamp it, or add an eps."
    if evidence["power"] > _STEEP:
        return "Clamp the base and the exponent, or stay in logarithms."
    if evidence["dtype"] != "float16":
        return "Divide by the largest magnitude before the power is taken, or clamp what enters it."
    if evidence["power"] == 2:
        return "Square in float32, as RMSNorm implementations do."
    return against_range(evidence)


def against_lost_eps(evidence: Evidence) -> str:
    if evidence["dtype"] in ("float32", "float64"):
        return f"Use an eps that the dtype holds: above {evidence['smallest']:.2g}, and 1e-12 for example."
    return "Use an eps that the dtype holds (1e-5 in float16), or normalise in float32."


def against_logarithm_of_zero(evidence: Evidence) -> str:
    if evidence["op"] in ("xlogy", "special_xlog1py"):
        return "Clamp what the logarithm is taken of."
    return "Use log_softmax, logsigmoid or xlogy, or clamp before the logarithm."


def against_singular_gradient(evidence: Evidence) -> str:
    op = evidence["op"]
    if op in ("_linalg_eigh", "linalg_eig", "_linalg_svd"):
        return "Keep the values apart (a small random jitter on the diagonal), or do not differentiate the vectors."
    if op in ("acos", "asin"):
        return "Clamp the input to inside of ±1 (by 1e-6, say), or use atan2."
    if op == "prod":
        return "Mask the zeros before the product, or add logarithms."
    return "Add an eps inside, or mask the input (not the output) where it is singular."


def against_nothing_left(evidence: Evidence) -> str:
    if evidence["reduced"] == 0:
        return "Skip empty groups, or divide the sum by max(1, count)."
    return "Skip groups that are too small, or use correction=0 for a single sample."


def against_growing_states(evidence: Evidence) -> str:
    if evidence["dtype"] in ("float16", "bfloat16"):
        return "Keep optimiser states in float32; lower the learning rate."
    return "Clip gradients before the step; lower the learning rate."


def _is_scaled(evidence: Evidence) -> bool:
    scale, expected = evidence["scale"], evidence["scale_expected"]
    return scale is not None and math.isclose(scale, expected, rel_tol=0.01)


# --- settings -----------------------------------------------------------------------------------------

# A power above this is an exponential in all but name.
_STEEP = 16
