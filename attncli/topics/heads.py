"""How attention is cut and laid out: heads, two sequences, windows, positions, the order inside fused tensors."""

from __future__ import annotations

import math
import random

from attncli.records.pages import Block, Column, Formula, Prose, Table
from attncli.topics.arithmetic import dot, normal
from attncli.topics.topic import Topic

# --- heads --------------------------------------------------------------------------------------------

_WIDTH, _HEADS, _SIZE, _LAYERS, _TOKENS = 4096, 32, 128, 32, 8192


def multi_head() -> tuple[Block, ...]:
    rows = []
    for name, kv_heads in (("MHA", _HEADS), ("GQA", 8), ("MQA", 1)):
        parameters = 2 * _WIDTH * _HEADS * _SIZE + 2 * _WIDTH * kv_heads * _SIZE
        rows.append((name, _HEADS, kv_heads, parameters, 2 * kv_heads * _SIZE * 2 * _TOKENS * _LAYERS))
    return (
        Prose(
            "H heads attend side by side, each in a slice of d numbers, and W_o mixes what they found. H "
            "heads of size E/H cost as much as one head of size E. Shapes for B sequences of T tokens:"
        ),
        Formula(
            (
                "x  (B, T, E) → view (B, T, H, d)",
                "q  (B, H, T, d)    W_q  H·d × E",
                "k,v  (B, K, T, d)  W_k  K·d × E",
                "scores  (B, H, T, T)",
                "o  (B, T, H·d)     W_o  E × H·d",
            )
        ),
        Prose(
            "The transpose between view and product matters: a view as (B, H, T, d) cuts heads out of "
            "neighbouring tokens. With K < H (grouped-query attention; K = 1: multi-query) H/K query heads "
            "share each KV head, query head h reads KV head ⌊h·K/H⌋, and the KV cache shrinks by H/K:"
        ),
        Formula(("cache = 2 · K · d · bytes · T · layers",)),
        Table(
            (Column("kind"), Column("H"), Column("K"), Column("weights", ","), Column("KV cache", "bytes")),
            tuple(rows),
            f"E = {_WIDTH}, d = {_SIZE}: weights of one layer, and the cache of {_LAYERS} layers for "
            f"{_TOKENS} tokens in float16.",
        ),
    )


# --- two sequences ------------------------------------------------------------------------------------

# The settings of examples/dates/model.py and the lengths of its batch.
DATES = {"d_model": 64, "num_attention_heads": 4, "source": 33, "target": 10, "batch": 4}


def cross_attention() -> tuple[Block, ...]:
    width, heads = DATES["d_model"], DATES["num_attention_heads"]
    size, b, s, t = width // heads, DATES["batch"], DATES["source"], DATES["target"]
    shapes = (
        ("encoder outputs", (b, s, width)),
        ("decoder hidden", (b, t, width)),
        ("q, of the decoder", (b, heads, t, size)),
        ("k and v, of the encoder", (b, heads, s, size)),
        ("scores", (b, heads, t, s)),
        ("output", (b, t, width)),
    )
    rows = tuple((name, "×".join(map(str, shape)), math.prod(shape)) for name, shape in shapes)
    return (
        Prose(
            "The queries come from one sequence, keys and values from another: a decoder asks, the encoder "
            "answers. The output has the length of the side that asks. The scores are T×S, not square, and "
            "have no causal mask; only the padding of the source is hidden."
        ),
        Formula(
            (
                "Q = D·W_qᵀ    decoder, T×d",
                "K = C·W_kᵀ    encoder, S×d",
                "V = C·W_vᵀ    encoder, S×d",
                "S = Q·Kᵀ/√d   T×S",
                "O = softmax(S)·V   T×d",
            )
        ),
        Table(
            (Column("tensor"), Column("shape"), Column("numbers", ",")),
            rows,
            f"examples/dates/model.py translates {b} dates of up to {s} characters into {t}: E = {width}, "
            f"{heads} heads of {size}.",
        ),
        Prose(
            f"k and v are computed once a source and serve all {t} steps of the decoder. Its weights are "
            f"4·(E² + E) = {4 * (width * width + width)} numbers a layer, as in self-attention. The "
            "classical mistake is to swap the sides, which still runs where E is the same: the output then "
            "has the source's length."
        ),
    )


# --- windows ------------------------------------------------------------------------------------------

_WINDOW, _DILATION = 512, 4


def local_attention() -> tuple[Block, ...]:
    rows = []
    for tokens in (1024, 4096, 16384, 65536, 262144):
        full, window = causal_pairs(tokens), window_pairs(tokens, _WINDOW)
        rows.append((tokens, full, window, full / window, strided_pairs(tokens, math.isqrt(tokens))))
    return (
        Prose(
            "A window lets each token see only the W last ones, itself included. Scores and time then grow "
            "with T instead of T², the KV cache stops at W tokens, and what lies further back arrives "
            "through depth: L layers reach L·(W − 1) tokens."
        ),
        Formula(
            (
                "full     j ≤ i",
                "window   i − W < j ≤ i",
                "dilated  the same, every g-th key",
                "strided  window √T and every √T-th key",
            )
        ),
        Table(
            (
                Column("tokens", ","),
                Column("full", "count"),
                Column("window", "count"),
                Column("saved ×", ".3g"),
                Column("strided", "count"),
            ),
            tuple(rows),
            f"Pairs of query and key of one causal head; W = {_WINDOW}. Each costs 4·d operations (q·k and "
            "p·v).",
        ),
        Prose(
            f"Dilation by {_DILATION} keeps the cost of the window and reaches {_WINDOW * _DILATION} tokens "
            "with gaps. A causal pair costs half of a full one only in kernels that skip masked tiles: a "
            "mask alone saves nothing. attncli shows mask kind and window of each call, recovered from the "
            "mask itself, and reach, the mean distance |i − j| under the probabilities; attncli inspect "
            "shows the window that the config asks for."
        ),
    )


def causal_pairs(tokens: int) -> int:
    """Pairs with j ≤ i."""
    return tokens * (tokens + 1) // 2


def window_pairs(tokens: int, window: int) -> int:
    """Pairs with i − window < j ≤ i."""
    seen = min(tokens, window)
    return causal_pairs(seen) + (tokens - seen) * seen


def strided_pairs(tokens: int, stride: int) -> int:
    """Pairs with i − stride < j ≤ i, or with i − j a multiple of `stride` (Child et al. 2019)."""
    further = sum(i // stride for i in range(tokens))  # i − j = stride, 2·stride, …, all outside the window
    return window_pairs(tokens, stride) + further


# --- positions ----------------------------------------------------------------------------------------


def positions() -> tuple[Block, ...]:
    generator = random.Random(2021)
    q, k = normal(generator, 2, 8)
    shuffled_q, shuffled_k = q[0::2] + q[1::2], k[0::2] + k[1::2]
    rows = tuple(
        (
            f"{i}, {j}",
            dot(rotated(q, i), rotated(k, j)),
            dot(rotated(shuffled_q, i), rotated(shuffled_k, j)),
        )
        for i, j in ((0, 0), (3, 0), (103, 100), (0, 3), (9, 0))
    )
    return (
        Prose(
            "Attention alone does not know the order of its tokens. Either positions are added to the "
            "inputs, or rotary embeddings (RoPE) turn pairs of numbers in q and k by angles that grow with "
            "the position, or a bias on the scores falls with distance (ALiBi, T5)."
        ),
        Formula(
            (
                "RoPE   (x, y) → turned by m·θ_n",
                "       θ_n = 10000^(−2n/d)",
                "       q_i·k_j depends on i − j",
                "ALiBi  s_ij − slope · |i − j|",
            )
        ),
        Table(
            (Column("i, j"), Column("q·k", ".4f"), Column("rows in the other order", ".4f")),
            rows,
            "One q and one k of d = 8, turned to positions i and j. (3, 0) and (103, 100) agree.",
        ),
        Prose(
            "Which numbers make a pair is a convention: neighbours (0, 1), (2, 3) … or halves (n, n + "
            "d/2). Checkpoints of Meta and of Hugging Face differ in it, so a conversion permutes the rows "
            "of W_q and W_k; forgotten, scores are right at distance 0 alone (last column) and no shape "
            "tells. A rotation keeps lengths: it cannot make |q·k| pass ‖q‖·‖k‖. attncli inspect shows the "
            "order where it is known."
        ),
    )


def rotated(vector: list[float], position: int) -> list[float]:
    """RoPE with pairs of neighbours: (x_2n, x_2n+1) turned by position · 10000^(−2n/d)."""
    out = []
    for n in range(0, len(vector), 2):
        angle = position * 10000 ** (-n / len(vector))
        x, y = vector[n], vector[n + 1]
        out += [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)]
    return out


# --- fused tensors ------------------------------------------------------------------------------------


def layouts() -> tuple[Block, ...]:
    heads, kv_heads, size, head = 8, 2, 64, 5
    group = heads // kv_heads
    kv_head = head // group
    in_group = kv_head * (group + 2) * size
    rows = (
        ("fused-block", head * size, (heads + kv_head) * size, (heads + kv_heads + kv_head) * size),
        (
            "fused-group",
            in_group + head % group * size,
            in_group + group * size,
            in_group + (group + 1) * size,
        ),
        ("fused-head, K = H", 3 * head * size, (3 * head + 1) * size, (3 * head + 2) * size),
    )
    return (
        Prose(
            "Many checkpoints store W_q, W_k and W_v in one tensor, and its shape does not say in which "
            "order. Read in the wrong order it loads without an error and computes nonsense."
        ),
        Formula(
            (
                "fused-block  [Q | K | V]",
                "fused-head   [H, 3, d]: q, k, v, q, …",
                "fused-group  [K, r + 2, d], r = H/K",
                "q+kv         W_q apart, [K | V]",
            )
        ),
        Table(
            (Column("layout"), Column("q from"), Column("k from"), Column("v from")),
            rows,
            f"First rows of query head {head} with H = {heads}, K = {kv_heads}, d = {size}.",
        ),
        Prose(
            "GPT-2, Phi-3 and nn.MultiheadAttention have blocks; BLOOM and GPT-NeoX go head by head; "
            "Falcon and InternLM2 group by group. GPT-2 stores Conv1D weights, (in, out), the transpose of "
            "nn.Linear. attncli takes the order from the model's family, from the config or from names, "
            "and says which; where none settles it, the layout is fused-unknown and nothing is guessed."
        ),
    )


# --- the topics ---------------------------------------------------------------------------------------

HEAD_TOPICS: tuple[Topic, ...] = (
    Topic(
        name="multi-head",
        aliases=(
            "heads",
            "head",
            "mha",
            "gqa",
            "mqa",
            "grouped-query",
            "multi-query",
            "kv-cache",
            "kv-heads",
        ),
        title="several heads side by side, and who shares keys",
        blocks=multi_head,
        sources=(
            "Vaswani et al. 2017, arXiv 1706.03762 §3.2.2",
            "Shazeer 2019, arXiv 1911.02150 (MQA)",
            "Ainslie et al. 2023, arXiv 2305.13245 (GQA)",
        ),
        rules=("ATT101", "ATT102", "ATT414"),
        commands=("inspect CHECKPOINT",),
        see=("query-key-value", "layouts"),
    ),
    Topic(
        name="cross-attention",
        aliases=("encoder-decoder", "encoder-attention", "cross"),
        title="one sequence reads another",
        blocks=cross_attention,
        sources=("Bahdanau et al. 2015, arXiv 1409.0473", "Vaswani et al. 2017, arXiv 1706.03762 §3.2.3"),
        rules=("ATT404", "ATT408", "ATT603"),
        commands=("inspect examples/dates/dates.safetensors", "entropy examples/dates/model.py:build"),
        see=("self-attention", "masks"),
    ),
    Topic(
        name="local-attention",
        aliases=("local", "sliding-window", "window", "sparse-attention", "reach"),
        title="cost against sequence length",
        blocks=local_attention,
        sources=(
            "Child et al. 2019, arXiv 1904.10509 (strided)",
            "Beltagy et al. 2020, arXiv 2004.05150 (window, dilated)",
            "Jiang et al. 2023, arXiv 2310.06825 (a language model with W = 4096)",
        ),
        rules=("ATT406", "ATT407", "ATT408"),
        commands=("entropy MODEL", "inspect CHECKPOINT"),
        see=("masks", "fused-kernels", "multi-head"),
    ),
    Topic(
        name="positions",
        aliases=("rope", "rotary", "alibi", "position", "positional-encoding"),
        title="how order enters: RoPE, biases, added embeddings",
        blocks=positions,
        sources=("Su et al. 2021, arXiv 2104.09864 (RoPE)", "Press et al. 2021, arXiv 2108.12409 (ALiBi)"),
        rules=("ATT301",),
        commands=("inspect CHECKPOINT",),
        see=("scores", "layouts"),
    ),
    Topic(
        name="layouts",
        aliases=("layout", "fused", "fused-qkv", "qkv-order", "checkpoint-layout"),
        title="where a head lies in the weights",
        blocks=layouts,
        sources=(
            "the code of the families named above, in transformers",
            "Shoeybi et al. 2019, arXiv 1909.08053 (heads split over ranks)",
        ),
        rules=("ATT101", "ATT103", "ATT104", "ATT106", "ATT107"),
        commands=("inspect CHECKPOINT", "inspect CHECKPOINT --heads N"),
        see=("multi-head", "query-key-value", "positions"),
    ),
)
