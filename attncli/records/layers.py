"""What attention the tensors of a checkpoint or model make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from attncli.records.stored import Anomaly

Evidence = Literal["config", "shape", "run", "option", "assumed", "name"]


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Where the rows of each query head's projection lie in one weight, so that no reader needs layout lore.

    `starts`: one first row per *query* head (keys of grouped heads repeat their start). `width`: rows a head.
    `out_axis`: 0 for Linear and Conv [out, in, …], 1 for Conv1D [in, out] and [D, H, d]; the other axes
    are flattened. `bias`: a 1-D tensor, with its own `bias_starts`.
    """

    tensor: str
    starts: tuple[int, ...]
    width: int
    out_axis: Literal[0, 1] = 0
    bias: str | None = None
    bias_starts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation whose gain bounds what comes after it. `weight` None means gain 1 everywhere.

    `kind` "rms": x·g/rms(x); "layer": mean removed first, `bias` added; "l2": unit length. `plus_one`: the
    gain is 1 + weight (Gemma). `size`: number of elements it normalises over.
    """

    kind: Literal["rms", "layer", "l2"]
    weight: str | None
    bias: str | None = None
    plus_one: bool = False
    size: int = 0


@dataclass(frozen=True, slots=True)
class ScoreSide:
    """One side (query or key) of one term of the dot product: input norm → projection rows → norm after it.

    `after_starts`: where each head's gain starts in the norm after the projection (all 0 where heads share
    it); empty without one.
    """

    rows: HeadRows
    before: Norm | None
    after: Norm | None = None
    after_starts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreTerm:
    """q·k is the sum of its terms: one for plain attention, two for MLA (content and rotary part).

    `factor`: what multiplies the term besides its sides (YaRN's rotary embedding stretches q and k).
    """

    query: ScoreSide
    key: ScoreSide
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """One tensor in its role: "q", "k", "v", "o", "qkv", "kv", "q_norm", "sinks", "q_bias" …"""

    role: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer. None is "unknown"; nothing here is a guess that does not say so in `evidence`.

    `layout`: one of `attncli.layout.LAYOUTS`. `scale`: the factor on q·k. `stack`: the path with the
    layer's number as "#", shared by all layers of one stack; `index`: that number. `facts`: what differs by
    design and is no finding (gate, sinks, window, soft cap, RoPE order, value head size, …).
    `rows`: where each head lies, by side "q", "k", "v", "o" (o by its input axis). `score_terms` is how to
    bound q·k from the weights; empty where that is not possible.
    """

    id: str
    path: str
    kind: Literal["self", "cross"] | None
    layout: str
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    scale: float | None
    evidence: Mapping[str, Evidence]
    tensors: tuple[LayerTensor, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, HeadRows] = field(default_factory=dict)
    score_terms: tuple[ScoreTerm, ...] = ()
    anomalies: tuple[Anomaly, ...] = ()
    stack: str = ""
    index: int | None = None


def structure(layers: Sequence[Layer]) -> str:
    """16 hex digits for what the layers are: paths, kinds, layouts, heads, and the shape of each tensor in its role.

    Neither values nor dtypes nor file formats count, so a quantised or fine-tuned copy has the structure of its
    original.
    """
    import hashlib  # OpenSSL takes its time to load, and tables show no fingerprint

    rows = [
        [
            layer.path,
            layer.kind,
            layer.layout,
            layer.heads,
            layer.kv_heads,
            layer.head_dim,
            sorted([tensor.role, list(tensor.shape)] for tensor in layer.tensors),
        ]
        for layer in sorted(layers, key=lambda layer: layer.path)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
