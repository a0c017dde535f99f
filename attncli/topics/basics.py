"""How attention computes: tokens, queries and keys, scores, their scale, the softmax."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from attncli.records.pages import Block, Column, Formula, Prose, Row, Table
from attncli.topics.arithmetic import (
    Matrix,
    deviation,
    divided,
    dot,
    entropy_nats,
    largest,
    normal,
    product,
    rounded,
    softmax,
)
from attncli.topics.topic import Topic

# --- self-attention -----------------------------------------------------------------------------------


def self_attention() -> tuple[Block, ...]:
    tokens = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    probs = [softmax([dot(query, key) / math.sqrt(2) for key in tokens]) for query in tokens]
    outputs = product(probs, tokens)
    rows: tuple[Row, ...] = tuple((f"token {i}", *probs[i], *outputs[i]) for i in range(len(tokens)))
    return (
        Prose(
            "Each token of a sequence asks all tokens and takes the mean of what they hold, weighted by "
            "how well they answer. With a row of X per token, T tokens and heads of size d:"
        ),
        Formula(
            (
                "Q = X·W_qᵀ, K = X·W_kᵀ, V = X·W_vᵀ",
                "S = Q·Kᵀ / √d        scores, T×T",
                "P = softmax(S)       by rows, sum 1",
                "O = P·V              T×d",
            )
        ),
        Prose(
            "Every output is a convex combination of the values: it never leaves the region that they "
            "span. The tokens are a set: without positions or a mask, reordering them reorders the outputs "
            "and changes nothing else. Time and scores grow with T²."
        ),
        Table(
            (
                Column("query"),
                *(Column(f"p{j}", ".3f") for j in range(3)),
                Column("o0", ".3f"),
                Column("o1", ".3f"),
            ),
            rows,
            "Three tokens (1,0), (0,1), (1,1), and W_q = W_k = W_v the identity: probabilities, outputs.",
        ),
    )


# --- queries, keys, values ----------------------------------------------------------------------------


def query_key_value() -> tuple[Block, ...]:
    values, asked = (1.0, 2.0, 3.0, 4.0), 2
    rows = []
    for gap in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0):
        probs = softmax([gap if j == asked else 0.0 for j in range(len(values))])
        rows.append((gap, probs[asked], dot(probs, values)))
    return (
        Prose(
            "Attention is a dictionary that is read softly. The query q says what is looked for, the key k "
            "under what a token can be found, the value v what it hands over. All three are projections of "
            "a token's hidden state:"
        ),
        Formula(
            (
                "q_i = W_q·x_i    k_j = W_k·x_j",
                "v_j = W_v·x_j    o_i = Σ_j p_ij·v_j",
                "p_ij = e^(s_ij) / Σ_m e^(s_im)",
            )
        ),
        Prose(
            "q and k meet only in their product, so they share the head size d; v may have another. A·W_q "
            "and A⁻ᵀ·W_k, for any invertible A, give the same scores: only W_qᵀ·W_k means something. How "
            "exactly a key is hit depends on the gap between its score and the others."
        ),
        Table(
            (Column("gap", "g"), Column("p of the key", ".4f"), Column("value read", ".4f")),
            tuple(rows),
            "Four keys with the values 1, 2, 3, 4; the score of the third is the gap above the rest.",
        ),
    )


# --- scores -------------------------------------------------------------------------------------------


def scores() -> tuple[Block, ...]:
    rows = []
    for gap in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 100.0):
        best, second = softmax([gap, 0.0])
        rows.append((gap, math.exp(gap), best, best * second))
    return (
        Prose(
            "The score s_ij is how well key j fits query i; softmax turns a row of scores into "
            "probabilities. Only differences inside a row count: a gap of Δ is a ratio of e^Δ between two "
            "probabilities."
        ),
        Formula(
            (
                "s_ij = scale · q_i·k_j + bias + mask",
                "p_ij / p_im = e^(s_ij − s_im)",
                "∂p_j/∂s_j = p_j·(1 − p_j)",
            )
        ),
        Prose(
            "Scores of healthy heads are some units to some tens wide. Far beyond that a row is one-hot "
            "and its gradient is gone: QK-Clip cuts at 100, loss deteriorates beyond 1 000, and runs "
            "beyond 10 000 diverged. attncli reports score_max and score_min (after scale and mask), "
            "score_std, and dot_absmax, the largest |q·k| before scale and mask, which is where float16 "
            "overflows."
        ),
        Table(
            (
                Column("gap Δ", "g"),
                Column("ratio e^Δ", ".3g"),
                Column("best p", ".4g"),
                Column("gradient", ".2g"),
            ),
            tuple(rows),
            "Two keys: what the gap makes of them.",
        ),
    )


# --- scaling ------------------------------------------------------------------------------------------

_HEAD_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_QUERIES, _KEYS = 24, 64


def scaling() -> tuple[Block, ...]:
    rows = []
    for d, dots in _growing_products():
        raw = [score for row in dots for score in row]
        scaled = [[score / math.sqrt(d) for score in row] for row in dots]
        rows.append(
            (
                d,
                deviation(raw),
                math.sqrt(d),
                deviation(raw) / math.sqrt(d),
                _evenness(dots),
                _evenness(scaled),
            )
        )
    return (
        Prose(
            "If the numbers in q and k are independent with mean 0 and variance 1, q·k is a sum of d "
            "products of variance 1: its standard deviation is √d. Unscaled, larger heads get larger "
            "scores, the softmax saturates before training begins, and its gradient p·(1 − p) vanishes. "
            "Dividing by √d takes d out:"
        ),
        Formula(("σ(q·k) = √d      σ(q·k / √d) = 1",)),
        Table(
            (
                Column("d"),
                Column("σ(q·k)", ".2f"),
                Column("√d", ".2f"),
                Column("σ/√d", ".2f"),
                Column("H raw", ".2f"),
                Column("H/√d", ".2f"),
            ),
            tuple(rows),
            f"{_QUERIES} queries and {_KEYS} keys of normal numbers. H: mean entropy of the softmax, as a "
            f"share of ln {_KEYS}, of q·k as it is and of q·k/√d.",
        ),
        Prose(
            "1/√d is a convention, no law: T5 and GPT-Neo use 1 and fold the scale into their "
            "initialisation, Gemma and µP models take it from the config. So attncli judges the scores, "
            "never the factor alone. Common mistakes: no scale, the root of the model's width, the scale "
            "on q and again in the kernel."
        ),
    )


def _growing_products() -> list[tuple[int, Matrix]]:
    """(d, q·k of the first d numbers of each query and key): the same draws for all sizes, each product once."""
    generator = random.Random(2017)
    queries, keys = normal(generator, _QUERIES, 1024), normal(generator, _KEYS, 1024)
    sums, done, out = [[0.0] * _KEYS for _ in range(_QUERIES)], 0, []
    for d in _HEAD_SIZES:
        parts = [[dot(query[done:d], key[done:d]) for key in keys] for query in queries]
        sums = [
            [a + b for a, b in zip(row, part, strict=True)] for row, part in zip(sums, parts, strict=True)
        ]
        done = d
        out.append((d, sums))
    return out


def _evenness(rows: Matrix) -> float:
    """Mean H/ln n of the rows' softmax."""
    return sum(entropy_nats(softmax(row)) for row in rows) / len(rows) / math.log(len(rows[0]))


# --- softmax ------------------------------------------------------------------------------------------


def softmax_topic() -> tuple[Block, ...]:
    rows = tuple(
        (score, *(rounded(math.exp(score), dtype) for dtype in ("float16", "bfloat16", "float32")))
        for score in (5.0, 11.0, 12.0, 88.0, 90.0)
    )
    row = [90.0, 89.0, 88.0]
    probs, shifted = softmax(row), softmax([score + 1000 for score in row])
    away = max(abs(p - q) for p, q in zip(probs, shifted, strict=True))
    powers = [rounded(math.exp(score), "float32") for score in row]
    written = [divided(power, sum(powers)) for power in powers]
    ends = ", ".join(f"{math.log(largest(dtype)):.2f} in {dtype}" for dtype in ("float16", "float32"))
    return (
        Prose(
            "Softmax makes probabilities of scores: positive, sum 1, order kept. Adding c to a whole row "
            "changes nothing:"
        ),
        Formula(
            ("p_j = e^(s_j) / Σ_m e^(s_m)", "softmax(s + c) = softmax(s)", "lse = max s + ln Σ e^(s − max s)")
        ),
        Prose(
            "So every implementation subtracts the row's maximum first: the largest term is e^0 = 1, and "
            f"nothing can overflow. Without it e^s overflows beyond {ends}, and inf/inf is NaN."
        ),
        Table(
            (Column("s", "g"), Column("float16", ".4g"), Column("bfloat16", ".4g"), Column("float32", ".4g")),
            rows,
            "e^s as each dtype stores it.",
        ),
        Prose(
            f"softmax(90, 89, 88) in float32: {_listed(written)} as written, {_listed(probs)} with the "
            f"maximum subtracted; 1000 added to each score changes it by {away:.1g}. The sum runs over the "
            "keys, the last axis of the scores. A mask belongs before the softmax, dropout after it. "
            "One-hot rows pass no gradient: ∂p_i/∂s_j = p_i·(δ_ij − p_j)."
        ),
    )


def _listed(probs: Sequence[float]) -> str:
    return ", ".join(f"{p:.3f}" if 0 < p < 1 else f"{p:g}".replace("nan", "NaN") for p in probs)


# --- the topics ---------------------------------------------------------------------------------------

_VASWANI = "Vaswani et al. 2017, arXiv 1706.03762"

BASIC_TOPICS: tuple[Topic, ...] = (
    Topic(
        name="self-attention",
        aliases=("attention", "scaled-dot-product-attention", "sdpa"),
        title="every token reads every token",
        blocks=self_attention,
        sources=(f"{_VASWANI} §3.2", "Cheng et al. 2016, arXiv 1601.06733 (intra-attention)"),
        rules=("ATT401", "ATT402", "ATT414"),
        commands=("inspect CHECKPOINT", "entropy MODEL"),
        see=("query-key-value", "scores", "softmax", "positions"),
    ),
    Topic(
        name="query-key-value",
        aliases=("qkv", "query", "key", "value", "projections"),
        title="what is asked, where it is found, what is handed over",
        blocks=query_key_value,
        sources=(f"{_VASWANI} §3.2",),
        rules=("ATT103", "ATT106", "ATT202", "ATT404"),
        commands=("inspect CHECKPOINT", "inspect CHECKPOINT --values", "entropy MODEL"),
        see=("self-attention", "multi-head", "layouts"),
    ),
    Topic(
        name="scores",
        aliases=("score", "logits", "score-max", "score-min", "score-std", "dot-product"),
        title="how well a key fits a query",
        blocks=scores,
        sources=(
            "Kimi K2, arXiv 2507.20534 (100)",
            "Wortsman et al. 2023, arXiv 2309.14322 §3.3 (1 000, 10 000)",
        ),
        rules=("ATT501", "ATT502", "ATT505", "ATT506"),
        commands=("overflow MODEL",),
        see=("scaling", "score-growth", "overflow"),
    ),
    Topic(
        name="scaling",
        aliases=("scale", "sqrt-d", "temperature", "scale-expected"),
        title="why scores are divided by √d",
        blocks=scaling,
        sources=(f"{_VASWANI} §3.2.1 (footnote 4)",),
        rules=("ATT410", "ATT411", "ATT412"),
        commands=("overflow MODEL", "entropy MODEL"),
        see=("scores", "softmax", "entropy"),
    ),
    Topic(
        name="softmax",
        aliases=("lse", "logsumexp", "log-sum-exp", "exp"),
        title="scores → probabilities",
        blocks=softmax_topic,
        sources=(
            "Bridle 1990, NeurIPS 2: Training Stochastic Model Recognition Algorithms as Networks",
            "IEEE 754-2019",
        ),
        rules=("ATT401", "ATT402", "ATT403", "ATT405"),
        commands=("entropy MODEL",),
        see=("scores", "masks", "nan", "fused-kernels"),
    ),
)
