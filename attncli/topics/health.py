"""How attention spreads, and how it degenerates: entropy, sinks, growing scores."""

from __future__ import annotations

import math
import random

from attncli.records.pages import Block, Column, Formula, Prose, Table
from attncli.topics.arithmetic import entropy_nats, softmax
from attncli.topics.topic import Topic

# --- entropy ------------------------------------------------------------------------------------------

_KEYS = 64


def entropy() -> tuple[Block, ...]:
    generator = random.Random(1948)
    row = [generator.gauss(0.0, 1.0) for _ in range(_KEYS)]
    rows = []
    for sharpness in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 64.0):
        probs = softmax([sharpness * score for score in row])
        nats = entropy_nats(probs)
        rows.append((sharpness, nats, nats / math.log(_KEYS), math.exp(nats), max(probs)))
    return (
        Prose(
            "The entropy of a row of probabilities says over how many keys the attention is spread. It is "
            "ln n nats where all n allowed keys weigh alike, 0 where one key takes all. e^H is the number "
            "of keys that would give the same entropy if they weighed alike; H/ln n compares rows of "
            "different length, as causal rows are."
        ),
        Formula(
            (
                "H = −Σ_j p_j · ln p_j   nats",
                "0 ≤ H ≤ ln n   n allowed keys",
                "H = lse − Σ_j p_j · s_j",
            )
        ),
        Table(
            (
                Column("β", "g"),
                Column("H", ".3f"),
                Column("H/ln n", ".3f"),
                Column("e^H", ".2f"),
                Column("max p", ".3f"),
            ),
            tuple(rows),
            f"softmax(β·s) of {_KEYS} normal scores: ln {_KEYS} = {math.log(_KEYS):.3f}. Temperature is 1/β.",
        ),
        Prose(
            "For normal scores of standard deviation σ, H ≈ ln n − σ²/2 while σ is small. Neither end is a "
            "fault by itself: heads that copy one token are sharp, heads that count are even. Low entropy "
            "together with large scores, or in nearly all heads, precedes divergence. attncli reports "
            "entropy (mean over queries), entropy_ratio (H/ln n), entropy_min and entropy_rest, that of a "
            "row without its sink."
        ),
    )


# --- sinks --------------------------------------------------------------------------------------------


def sinks() -> tuple[Block, ...]:
    generator = random.Random(2023)
    rest = [generator.gauss(0.0, 1.0) for _ in range(_KEYS - 1)]
    rows = []
    for above in (0.0, 2.0, 4.0, 6.0, 8.0, 10.0):
        probs = softmax([above, *rest])
        sink, whole = probs[0], entropy_nats(probs)
        rows.append((above, sink, whole, whole / math.log(_KEYS), _entropy_rest(sink, whole)))
    return (
        Prose(
            "A softmax row must sum to 1, also where a head has nothing to say. Trained models then park "
            "the attention on a key whose value does little: the first token, a separator, a full stop. "
            "That key is a sink. Most heads of healthy language models have one, so a sink is no fault; "
            "dropping the first tokens from the KV cache is, since it takes the parking place away."
        ),
        Formula(
            (
                "sink k: mean_i p_ik > 0.3",
                "H = h(p_k) + (1 − p_k)·H_rest",
                "h(p) = −p·ln p − (1 − p)·ln(1 − p)",
            )
        ),
        Prose(
            "With much on the sink, H is small whatever the head does with the rest. So attncli judges "
            "collapse by entropy_rest, the entropy of the row without its sink key, renormalised:"
        ),
        Table(
            (
                Column("sink score", "g"),
                Column("mass", ".3f"),
                Column("H", ".3f"),
                Column("H/ln n", ".3f"),
                Column("H_rest", ".3f"),
            ),
            tuple(rows),
            f"One sink among {_KEYS} keys, the others normal: H falls, H_rest stays "
            f"(ln {_KEYS - 1} = {math.log(_KEYS - 1):.3f} at most).",
        ),
        Prose(
            "Some models give the softmax a sink of its own, a learned number in its denominator or exp(0) "
            "(softmax plus one); attncli names them and leaves their row sums alone. In cross-attention a "
            "key that takes all in every head is a finding: the layer does not read its source."
        ),
    )


def _entropy_rest(sink: float, whole: float) -> float:
    """Entropy of a row without a key of probability `sink`, by the chain rule, as it is done for fused kernels."""
    binary = -sink * math.log(sink) - (1 - sink) * math.log(1 - sink)
    return (whole - binary) / (1 - sink)


# --- growing scores -----------------------------------------------------------------------------------

_ROWS = 256


def score_growth() -> tuple[Block, ...]:
    rows = tuple(
        (norm, entropy_floor(norm, _ROWS), 50 * math.tanh(norm / 50), min(1.0, 100 / norm))
        for norm in (1.0, 5.0, 10.0, 50.0, 100.0, 400.0)
    )
    return (
        Prose(
            "In training W_q and W_k can grow together: scores get larger, rows one-hot, gradients through "
            "them vanish, and the loss jumps or diverges. No entropy is known below which that happens; "
            "what is proved is how far it may fall. With σ = ‖W_qᵀ·W_k‖₂·‖X·Xᵀ‖₂ and T tokens:"
        ),
        Formula(("β = e^(−σ·√(T/(T−1)))", "H ≥ ln(1 + (T−1)·β)", "    + σ·√(T(T−1))·β / (1 + (T−1)·β)")),
        Prose("Remedies, all in use:"),
        Formula(
            (
                "QK-norm    q̂ = g∘q/rms(q), k̂ alike",
                "soft cap   c·tanh(s/c)",
                "QK-Clip    γ = min(1, τ/max s),",
                "           W_q, W_k of the head × √γ",
                "σReparam   W·γ/‖W‖₂",
            )
        ),
        Table(
            (
                Column("σ or s", "g"),
                Column("H at least", ".3g"),
                Column("capped, c = 50", ".4g"),
                Column("γ, τ = 100", ".3g"),
            ),
            rows,
            f"What σ leaves of ln {_ROWS} = {math.log(_ROWS):.2f} nats, and what cap and clip make of a "
            "score.",
        ),
        Prose(
            "A cap bounds the score, not the product before it, which may still overflow. attncli overflow "
            "prints the largest score of each head; the finding of ATT501 holds the factor √γ as "
            "clip_weights_by."
        ),
    )


def entropy_floor(norm: float, tokens: int) -> float:
    """The smallest mean entropy that a spectral norm σ allows for T tokens, in nats (Zhai et al. 2023, Thm 3.1)."""
    beta = math.exp(-norm * math.sqrt(tokens / (tokens - 1)))
    others = 1 + (tokens - 1) * beta
    return math.log(others) + norm * math.sqrt(tokens * (tokens - 1)) * beta / others


# --- the topics ---------------------------------------------------------------------------------------

HEALTH_TOPICS: tuple[Topic, ...] = (
    Topic(
        name="entropy",
        aliases=("entropy-ratio", "entropy-min", "h/ln-n", "nats", "perplexity", "uniform"),
        title="over how many keys a head spreads",
        blocks=entropy,
        sources=("Shannon 1948", "Zhai et al. 2023, arXiv 2303.06296 (low entropy precedes divergence)"),
        rules=("ATT601", "ATT602", "ATT603"),
        commands=("entropy MODEL", "entropy MODEL --layer N"),
        see=("softmax", "sinks", "score-growth"),
    ),
    Topic(
        name="sinks",
        aliases=(
            "sink",
            "attention-sink",
            "attention-sinks",
            "sink-mass",
            "sink-key",
            "entropy-rest",
            "registers",
        ),
        title="why heads look at the first token",
        blocks=sinks,
        sources=(
            "Xiao et al. 2023, arXiv 2309.17453",
            "Gu et al. 2024, arXiv 2410.10781 (sink_mass > 0.3)",
            "Sun et al. 2024, arXiv 2402.17762 (massive activations)",
        ),
        rules=("ATT601", "ATT603"),
        commands=("entropy MODEL",),
        see=("entropy", "softmax"),
    ),
    Topic(
        name="score-growth",
        aliases=("collapse", "divergence", "qk-norm", "qk-clip", "soft-cap", "logit-growth", "sigma-reparam"),
        title="how training diverges, and what stops it",
        blocks=score_growth,
        sources=(
            "Zhai et al. 2023, arXiv 2303.06296 (Thm 3.1; σReparam)",
            "Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv 2302.05442 (QK-norm)",
            "Gemma 2, arXiv 2408.00118 (soft cap); Kimi K2, arXiv 2507.20534 (QK-Clip)",
        ),
        rules=("ATT501", "ATT601"),
        commands=("overflow MODEL", "entropy MODEL"),
        see=("scores", "entropy", "bounds"),
    ),
)
