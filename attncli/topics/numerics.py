"""How attention fails in floating point, and how it can be computed without holding its scores."""

from __future__ import annotations

import math
import random

from attncli.records.pages import Block, Column, Formula, Prose, Row, Table
from attncli.topics.arithmetic import (
    Matrix,
    divided,
    dot,
    entropy_nats,
    largest,
    normal,
    product,
    softmax,
    spacing,
    spectral_norm,
)
from attncli.topics.topic import Topic

_DTYPES = ("float16", "bfloat16", "float32")

# --- overflow -----------------------------------------------------------------------------------------


def overflow() -> tuple[Block, ...]:
    dtypes: tuple[Row, ...] = tuple(
        (dtype, largest(dtype), *(spacing(at, dtype) for at in (1.0, 128.0, 1024.0))) for dtype in _DTYPES
    )
    headroom: tuple[Row, ...] = tuple(
        (size, *(headroom_bits(size, dtype) for dtype in _DTYPES))
        for size in (100.0, 8_000.0, 65_504.0, 70_000.0, 1e6)
    )
    end = largest("float16")
    return (
        Prose(
            "(q @ k) * scale stores q·k before it is scaled, √d times larger than the score. In float16 "
            f"that ends at {end:g}, which q = k with d = 128 reach where their RMS is √({end:g}/128) = "
            f"{math.sqrt(end / 128):.1f}. What overflows is inf, a row with inf is NaN, and a softmax in "
            "float32 comes too late."
        ),
        Formula(("headroom = log2(max of dtype / |q·k|)",)),
        Table(
            (
                Column("dtype"),
                Column("largest", ".5g"),
                Column("step at 1", ".2g"),
                Column("at 128", ".2g"),
                Column("at 1024", ".2g"),
            ),
            dtypes,
            "Largest number, and the distance to the next one at 1, 128 and 1024.",
        ),
        Table(
            (
                Column("|q·k|", ",.0f"),
                *(Column(dtype, "+.1f") for dtype in _DTYPES),
            ),
            headroom,
            "Bits of headroom: each is a factor of 2; below 0 it overflows.",
        ),
        Prose(
            "bfloat16 has the range of float32 and 8 bits of precision: scores beyond 128 are 1 apart, and "
            "half a step changes a probability by e^0.5. What helps: scale q before the product; a fused "
            "kernel, which keeps q·k in float32; QK-norm. Masked pairs overflow too, so attncli takes "
            "|q·k| over all pairs."
        ),
    )


def headroom_bits(product_size: float, dtype: str) -> float:
    return math.log2(largest(dtype) / product_size)


# --- NaN ----------------------------------------------------------------------------------------------

_TOKENS = 4


def nan() -> tuple[Block, ...]:
    inf = math.inf
    births = (
        ("inf − inf", inf - inf),
        ("0 · inf", 0.0 * inf),
        ("inf / inf", divided(inf, inf)),
        ("0 / 0", divided(0.0, 0.0)),
        ("softmax(−inf, −inf)", softmax([-inf, -inf])[0]),
        ("e^x / Σ e^x, all −inf", divided(math.exp(-inf), 2 * math.exp(-inf))),
    )
    spread: tuple[Row, ...] = tuple(
        (f"{side} of token 1", *(bad_rows(side, causal=causal) for causal in (False, True)))
        for side in ("q", "k", "v")
    )
    return (
        Prose(
            "NaN is born where an operation has no result, and from then on every operation with it is "
            "NaN. 1/0 is inf, no NaN: that comes later, from inf − inf or inf/inf. −inf in a mask is "
            "intended, as long as its row keeps one key."
        ),
        Table((Column("operation"), Column("result")), births, "Where NaN comes from, computed here."),
        Prose(
            "One NaN in q spoils its own row; one in k spoils a column of the scores, and so every row "
            "that sees it, for a softmax divides by the sum. One in v spoils every row, also those that "
            "give it weight 0: 0·NaN is NaN. So padding must hold finite values even where the mask hides "
            "it."
        ),
        Table(
            (Column("NaN in"), Column("no mask"), Column("causal")),
            spread,
            f"Output rows that are NaN, of {_TOKENS} tokens, numbered from 0; hidden scores filled with "
            "−inf.",
        ),
        Prose(
            "attncli nan-check watches every operator, walks back from what is NaN in the output, the loss "
            "or the gradients to where it was born, and repeats the step with that one thing changed: the "
            "symptom is gone, or the cause is not proved. What was cleaned away again is not blamed."
        ),
    )


def bad_rows(side: str, *, causal: bool) -> int:
    """How many output rows are NaN when one number of token 1 is, in "q", "k" or "v"."""
    generator = random.Random(754)
    q, k, v = (normal(generator, _TOKENS, 2) for _ in range(3))
    {"q": q, "k": k, "v": v}[side][1][0] = math.nan
    probs = [
        softmax([-math.inf if causal and j > i else dot(q[i], k[j]) for j in range(_TOKENS)])
        for i in range(_TOKENS)
    ]
    return sum(math.isnan(math.fsum(row)) for row in product(probs, v))


# --- bounds -------------------------------------------------------------------------------------------

_WIDTH, _SIZE, _DRAWS = 32, 8, 300


def bounds() -> tuple[Block, ...]:
    bound, typical, seen = bounded_scores()
    # All three grow with both projections, so with the square.
    rows = tuple(
        (
            growth,
            *(size * growth**2 for size in (bound, typical, seen)),
            "proven safe" if bound * growth**2 <= largest("float16") else "not excluded",
        )
        for growth in (1.0, 4.0, 16.0, 64.0)
    )
    return (
        Prose(
            "The weights alone bound q·k, whatever the input: a norm in front fixes the length of x, and a "
            "matrix stretches no vector by more than its spectral norm, the largest singular value."
        ),
        Formula(
            (
                "|q·k| ≤ ‖W_q‖₂ · ‖W_k‖₂ · ‖x_i‖·‖x_j‖",
                "RMSNorm, gain g: ‖x‖ ≤ √D · max|g|",
                "QK-norm: |q·k| ≤ d · max|g_q|·max|g_k|",
            )
        ),
        Prose(
            "A bound below the dtype's largest number is a proof that scores cannot overflow. A bound "
            "above it proves nothing: the input that reaches it may not occur. So the typical size stands "
            "beside it, the root mean square of q·k over independent inputs. The norms of the factors "
            "survive RoPE, which turns q and k and keeps lengths."
        ),
        Table(
            (
                Column("weights ×", "g"),
                Column("bound", ".4g"),
                Column("RMS", ".4g"),
                Column("largest", ".4g"),
                Column("float16"),
            ),
            rows,
            f"Random W_q, W_k ({_SIZE}×{_WIDTH}) and {_DRAWS} pairs of inputs of RMS 1: bound, RMS and "
            "largest |q·k|.",
        ),
        Prose(
            "attncli inspect --bounds prints score_bound and score_typical of each head, with biases, "
            "gains, shared keys and quantised weights taken in."
        ),
    )


def bounded_scores() -> tuple[float, float, float]:
    """(bound, root mean square, largest) of |q·k| for random projections and inputs of RMS 1."""
    generator = random.Random(299)
    w_q, w_k = (normal(generator, _SIZE, _WIDTH, 1 / math.sqrt(_WIDTH)) for _ in range(2))
    products = []
    for _ in range(_DRAWS):
        left, right = (_of_rms_one(row) for row in normal(generator, 2, _WIDTH))
        products.append(dot([dot(row, left) for row in w_q], [dot(row, right) for row in w_k]))
    bound = spectral_norm(w_q) * spectral_norm(w_k) * _WIDTH
    return bound, math.sqrt(dot(products, products) / _DRAWS), max(map(abs, products))


def _of_rms_one(vector: list[float]) -> list[float]:
    rms = math.sqrt(dot(vector, vector) / len(vector))
    return [number / rms for number in vector]


# --- fused kernels ------------------------------------------------------------------------------------

_TILE = 16


def fused_kernels() -> tuple[Block, ...]:
    generator = random.Random(2205)
    q, keys, values = normal(generator, 1, 16)[0], normal(generator, 128, 16), normal(generator, 128, 4)
    probs = softmax([dot(q, key) / 4 for key in keys])
    whole = product([probs], values)[0]
    tiled, lse, mean_score = online_attention(q, keys, values)
    away = max(abs(a - b) for a, b in zip(whole, tiled, strict=True))
    sizes = tuple((t, 32 * t * t * 2, 32 * t * 128 * 2) for t in (1024, 4096, 16384, 65536))
    return (
        Prose(
            "Flash attention and its relatives never store the T×T scores: they go over the keys tile by "
            "tile and keep, per query, a running maximum m, the sum l and the weighted values o. When a "
            "tile brings a larger maximum, what was gathered is rescaled. The result is exact, not an "
            "approximation."
        ),
        Formula(
            (
                "m' = max(m, max s)",
                "l' = l·e^(m−m') + Σ e^(s−m')",
                "o' = o·e^(m−m') + Σ e^(s−m')·v",
                "output = o/l     lse = m + ln l",
            )
        ),
        Table(
            (Column("T", ","), Column("scores", "bytes"), Column("q, or output", "bytes")),
            sizes,
            "32 heads of 128 in float16: what an eager layer stores, and what a fused one reads.",
        ),
        Prose(
            f"128 keys in tiles of {_TILE} against all at once, computed here: the outputs differ by "
            f"{away:.1g}. The same pass gives the entropy without probabilities, H = lse − Σ p·s = "
            f"{lse - mean_score:.6f} nats, against −Σ p ln p = {entropy_nats(probs):.6f}."
        ),
        Prose(
            "q·k stays in float32 inside the kernel and cannot overflow float16 there. A model that asks "
            "for the probabilities (output_attentions) falls back to the eager way and is no longer what "
            "runs in production: attncli leaves kernels as they are, and computes q·k of a call again from "
            "its q and k, tile by tile."
        ),
    )


def online_attention(q: list[float], keys: Matrix, values: Matrix) -> tuple[list[float], float, float]:
    """(output, lse, Σ p·s) of one query of size 16, scale 1/4, in tiles of keys (Milakov & Gimelshein 2018)."""
    top, total, weighted, out = -math.inf, 0.0, 0.0, [0.0] * len(values[0])
    for start in range(0, len(keys), _TILE):
        tile = [dot(q, key) / 4 for key in keys[start : start + _TILE]]
        higher = max(top, *tile)
        shrink, powers = math.exp(top - higher), [math.exp(score - higher) for score in tile]
        total = total * shrink + sum(powers)
        weighted = weighted * shrink + dot(powers, tile)
        added = product([powers], values[start : start + _TILE])[0]
        out = [old * shrink + new for old, new in zip(out, added, strict=True)]
        top = higher
    return [number / total for number in out], top + math.log(total), weighted / total


# --- the topics ---------------------------------------------------------------------------------------

NUMERIC_TOPICS: tuple[Topic, ...] = (
    Topic(
        name="overflow",
        aliases=(
            "headroom",
            "dtype",
            "dtypes",
            "precision",
            "float16",
            "fp16",
            "bfloat16",
            "bf16",
            "dot-absmax",
            "headroom-bits-float16",
            "headroom-bits-bfloat16",
            "headroom-bits-float32",
        ),
        title="where q·k leaves its dtype",
        blocks=overflow,
        sources=(
            "IEEE 754-2019",
            "Micikevicius et al. 2018, arXiv 1710.03740",
            "Kalamkar et al. 2019, arXiv 1905.12322",
        ),
        rules=("ATT301", "ATT502", "ATT503", "ATT504", "ATT505"),
        commands=("overflow MODEL", "inspect CHECKPOINT --bounds", "nan-check MODEL --what-if float16"),
        see=("scaling", "bounds", "nan"),
    ),
    Topic(
        name="nan",
        aliases=("inf", "nans", "non-finite", "rows-masked"),
        title="where NaN is born and how it spreads",
        blocks=nan,
        sources=("IEEE 754-2019 §6, §7",),
        rules=("ATT201", "ATT405", "ATT408", "ATT506", "ATT701", "ATT702", "ATT703", "ATT704"),
        commands=("nan-check MODEL --backward", "inspect CHECKPOINT --values"),
        see=("overflow", "masks", "softmax"),
    ),
    Topic(
        name="bounds",
        aliases=("bound", "score-bound", "score-typical", "spectral-norm"),
        title="what the weights alone say of q·k",
        blocks=bounds,
        sources=("Cauchy–Schwarz", "Zhang & Sennrich 2019, arXiv 1910.07467 (RMSNorm)"),
        rules=("ATT301",),
        commands=("inspect CHECKPOINT --bounds",),
        see=("overflow", "score-growth", "positions"),
    ),
    Topic(
        name="fused-kernels",
        aliases=("flash", "flash-attention", "fused-attention", "kernel", "kernels", "online-softmax"),
        title="attention without its score matrix",
        blocks=fused_kernels,
        sources=(
            "Milakov & Gimelshein 2018, arXiv 1805.02867 (online softmax)",
            "Rabe & Staats 2021, arXiv 2112.05682; Dao et al. 2022, arXiv 2205.14135",
        ),
        rules=("ATT502", "ATT504"),
        commands=("entropy MODEL", "overflow MODEL"),
        see=("softmax", "entropy", "local-attention"),
    ),
)
