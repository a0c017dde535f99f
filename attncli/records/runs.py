"""What ran, and what was measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# --- what ran -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call of one forward pass, as the dataflow shows it. None is "not recovered".

    `layer`: the id of its `Layer`; `module`: the path of the innermost module it ran in ("" for a free
    function). `index` counts calls in the order in which they ran. `kernel`: "softmax" for scores that the
    model's own code made, otherwise the fused kernel ("flash (CPU)", "efficient (CUDA)", "flex_attention").
    `normaliser`: "softmax", "softmax by hand", "softmax plus one", "sigmoid", "relu", "other".
    `scale`: the product of all scalar factors on q·k between the projections and the normaliser;
    `factors` says where each stood: "query", "key" (before the product), "scores" (after it), "kernel".
    `stored`: what the product writes to memory in `scores_dtype`: "raw" q·k, "scaled" q·k, or "nothing" (fused).
    `mask_kind`: "none", "causal", "sliding window", "future only", "padding", "other", "0/1 bias (causal)" or
    "(padding)" and "zero fill (…)" where zeros and ones hide nothing, joined by " + ", with
    "bias" for a finite additive one. `causal_offset`: key j is visible to query i where
    j ≤ i + offset + (S − T): 0 is right, −1 hides the diagonal, 1 shows one future key; None where not causal.
    `softmax_axis`: what the normaliser sums over. "keys" is right; "channels" is a design of its own; "queries",
    "heads" (also where heads lie where the keys should) and "batch" are mistakes.
    `query_sources`, `key_sources`, `value_sources`: the inputs ("input NAME") and earlier calls ("call N")
    that the values of each come from.
    `explained`: a sample of rows was recomputed from what was captured and gave what the model got;
    `difference` is the largest relative difference, `reason` says what did not fit.
    """

    index: int
    layer: str
    module: str
    kernel: str
    kind: Literal["self", "cross"] | None
    normaliser: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int | None
    dtype: str
    scores_dtype: str
    stored: Literal["raw", "scaled", "nothing"]
    scale: float | None
    factors: Mapping[str, float] = field(default_factory=dict)
    mask_kind: str | None = None
    window: int | None = None
    causal_offset: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    softmax_axis: Literal["keys", "queries", "channels", "heads", "batch"] = "keys"
    subtracts_maximum: bool = True
    masked_after_softmax: bool = False
    dropout_before_softmax: bool = False
    query_sources: tuple[str, ...] = ()
    key_sources: tuple[str, ...] = ()
    value_sources: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    explained: bool = False
    difference: float | None = None
    reason: str = ""


# --- what was measured --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number. `layer`: a layer's id, or a tensor's name for a weight metric; `head` None: of no head."""

    metric: str
    layer: str
    value: float | int | str | None
    unit: str = ""
    head: int | None = None
    call: int | None = None
    precision: Literal["exact", "bracket", "sampled"] = "exact"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a NaN or Inf that can be seen was born.

    `value`: "nan", "+inf" or "-inf". `op`: the operator without namespace; "leaf" where the value was there before
    anything ran. `source`: the user's line; of a backward operator, the line of the forward operator whose gradient
    it computes. `at`: batch, head, query and key in attention scores, otherwise {"index": […]}. `confirmed`: whether
    the symptom was gone when the step was repeated with the change that `evidence["proof"]` tells; None where that
    was not tried or not possible. `path`: what passed the value on, up to what is seen.
    """

    value: str
    phase: Literal["parameter", "buffer", "input", "forward", "backward", "optimizer"]
    cause: str
    confirmed: bool | None
    module: str
    op: str
    source: str | None
    tensor: str | None
    layer: str | None
    at: Mapping[str, Any] | None
    dtype: str
    evidence: Mapping[str, Any]
    path: tuple[Mapping[str, str], ...]
    message: str
    advice: str


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """The attention probabilities of one head for one row of the batch, at most 64 × 64 numbers.

    `probs[i][j]`: of the queries from `query_starts[i]` to the next start, the mean probability that falls on all
    keys from `key_starts[j]` to the next start. Rows sum to 1, or to less where a learned sink, softmax plus one or a
    mask behind the softmax takes the rest. A row without an allowed key is None. `queries`,
    `keys`: the real lengths. `query_tokens`, `key_tokens`: the text of each block of tokens; empty where the batch
    is no text.
    """

    layer: str
    call: int
    head: int
    batch: int
    queries: int
    keys: int
    query_starts: tuple[int, ...]
    key_starts: tuple[int, ...]
    probs: tuple[tuple[float, ...] | None, ...]
    query_tokens: tuple[str, ...] = ()
    key_tokens: tuple[str, ...] = ()
