"""Frozen facts that cross the borders between rooms. Standard library only; no tensor ever enters a record.

Top to bottom, in the order in which they arise: what lies in the files (`Array`, `Tensor`, `Checkpoint`),
what attention it makes (`Layer`), what ran (`Call`), what was measured on it (`Measurement`), what is judged of it
(`Finding`), and the whole answer (`Report`). Shapes are in elements, sizes in bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Severity = Literal["note", "warning", "error"]
Evidence = Literal["config", "shape", "run", "option", "assumed", "name"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
SCHEMA = "attncli-report/1"


# --- what lies in the files ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Array:
    """One array as it lies in a file, before wrappers are stripped and quantised parts are joined.

    `dtype` in torch's spelling without the prefix ("float32", "bfloat16", "float8_e4m3fn", "uint8"), or
    the format's own name in lower case for block types ("q4_1", "mxfp4"). `offset`: first byte in `file`
    (a path relative to the checkpoint's root); None where the bytes cannot be addressed (compressed, or
    absent). `strides` in elements; None means C-contiguous.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int | None
    size_bytes: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One logical tensor of the model, as the model's own code would name and shape it.

    `scheme`: "plain", or how it is stored: "gptq", "awq", "bnb-nf4", "bnb-fp4", "bnb-int8", "fp8-block",
    "fp8", "compressed-tensors", "nvfp4", "mxfp4", "mlx", "hqq", "quanto", "gguf", "lora". `dtype`: the
    array's dtype for a plain tensor, otherwise the storage ("int4", "nf4", "float8_e4m3fn", "q4_1").
    `parts`: the arrays that hold it, by their role ("weight" for a plain tensor; "qweight", "scales",
    "qzeros", "g_idx" for GPTQ).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    parts: Mapping[str, Array]
    scheme: str = "plain"
    # Numbers that dequantisation needs and that no part holds, e.g. {"bits": 4, "group_size": 128}.
    quantisation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts.values())


@dataclass(frozen=True, slots=True)
class Config:
    """Settings that lie beside or inside the weights. `source`: "config.json", "GGUF metadata",
    "model_args in checkpoint" …: the words a message uses to say where a number came from."""

    source: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something a reader saw that a rule may judge. Readers state, they never judge.

    `kind`: "pickle-global", "missing-tensor", "missing-shard", "stray-tensor", "duplicate-tensor",
    "wrong-shard" … `subject`: the tensor, file or global it is about.
    """

    kind: str
    subject: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything the headers of one checkpoint say. `root` is the folder that `file` paths are relative to.

    `excluded` counts what was left out, by what it is: {"optimizer": 402, "ema copy": 120}.
    `configs`: the most trusted first.
    """

    path: str
    root: str
    kind: Literal["file", "folder"]
    format: str
    files: tuple[str, ...]
    size_bytes: int
    tensors: tuple[Tensor, ...]
    configs: tuple[Config, ...] = ()
    excluded: Mapping[str, int] = field(default_factory=dict)
    anomalies: tuple[Anomaly, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of all logical tensors; of an adapter's pairs, what is stored."""
        return sum(
            sum(part.numel for part in tensor.parts.values()) if tensor.scheme == "lora" else tensor.numel
            for tensor in self.tensors
        )


# --- what attention it makes --------------------------------------------------------------------------


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


# --- what is judged -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect. `code` is stable ("ATT101"), `name` names the defect, `evidence` holds the numbers."""

    code: str
    name: str
    severity: Severity
    message: str
    advice: str
    layer: str | None = None
    head: int | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)


# --- the whole answer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What one command saw, in the shape of the schema `attncli-report/1`.

    `looked`: whether there was any attention to look at; layers without softmax (`kind` None) are none.
    After a forward pass every call must have been explained as well; a search for NaN looks at every operator
    instead. `run`: what ran, for a command that
    runs the model; `calls`: its attention calls. `notes`: sentences for a person, e.g. what was left out.
    """

    command: str
    version: str
    source: Mapping[str, Any]
    environment: Mapping[str, Any]
    layers: tuple[Layer, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    origins: tuple[Origin, ...] = ()
    findings: tuple[Finding, ...] = ()
    run: Mapping[str, Any] | None = None
    calls: tuple[Call, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def looked(self) -> bool:
        if self.run is not None and "operators_by_phase" in self.run and "calls_seen" not in self.run:
            return bool(self.run.get("operators"))
        if self.run is not None:
            return bool(self.calls) and all(call.explained for call in self.calls)
        return any(layer.kind is not None for layer in self.layers)

    @property
    def verdict(self) -> Literal["clean", "findings", "unobserved"]:
        if self.findings:
            return "findings"
        return "clean" if self.looked else "unobserved"

    def exit_code(self, fail_on: Severity | Literal["never"] = "error") -> int:
        """0 looked and found nothing at or above `fail_on`; 1 found something; 3 nothing to be observed."""
        if fail_on != "never":
            floor = SEVERITIES.index(fail_on)
            if any(SEVERITIES.index(finding.severity) >= floor for finding in self.findings):
                return 1
        return 0 if self.looked else 3

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, keys in the order of the schema."""
        layers = [
            {
                "id": layer.id,
                "path": layer.path,
                "kind": layer.kind,
                "layout": layer.layout,
                "heads": layer.heads,
                "kv_heads": layer.kv_heads,
                "head_dim": layer.head_dim,
                "scale": layer.scale,
                "evidence": layer.evidence,
                "tensors": [_row(tensor, _TENSOR_KEYS) for tensor in layer.tensors],
                "facts": layer.facts,
            }
            for layer in self.layers
        ]
        report: dict[str, Any] = strict_json(
            {
                "schema": SCHEMA,
                "command": self.command,
                "attncli_version": self.version,
                "verdict": self.verdict,
                "source": self.source,
                "environment": self.environment,
                "run": self.run
                if self.run is None
                else {**self.run, "calls": [_row(call, _CALL_KEYS) for call in self.calls]},
                "layers": layers,
                "measurements": [_row(row, _MEASUREMENT_KEYS) for row in self.measurements],
                "origins": [_row(origin, _ORIGIN_KEYS) for origin in self.origins],
                "findings": [_row(row, _FINDING_KEYS) for row in self.findings],
                "notes": list(self.notes),
            }
        )
        return report

    def to_json(self, *, indent: int | None = 2) -> str:
        """Strict JSON (RFC 8259): non-finite numbers are the strings "nan", "inf" and "-inf"."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)


def _row(record: Any, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(record, key) for key in keys}


def strict_json(value: Any) -> Any:
    """`value` with mappings and tuples as JSON types and non-finite floats as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, str):
        # A name out of a hostile header may hold half a surrogate pair, which no UTF-8 file can.
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {strict_json(str(key)): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a report")


# --- the schema's keys, in its order ------------------------------------------------------------------

_TENSOR_KEYS = ("role", "name", "shape", "dtype", "file")
_CALL_KEYS = tuple(item.name for item in fields(Call))
_MEASUREMENT_KEYS = ("metric", "layer", "call", "head", "value", "unit", "precision", "low", "high")
_ORIGIN_KEYS = tuple(item.name for item in fields(Origin))
_FINDING_KEYS = ("code", "name", "severity", "layer", "head", "message", "advice", "evidence")
