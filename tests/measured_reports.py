"""Reports of a forward pass made by hand: calls with numbers that follow from closed forms, no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from attncli.records import Call, Finding, Layer, Measurement, Report

FLOAT_MAX = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
UNITS = {"entropy": "nats", "entropy_min": "nats", "entropy_rest": "nats"}


def layer(path: str, **changes: Any) -> Layer:
    """A layer; the first number in its path is its index."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    stack = path if at is None else ".".join([*parts[:at], "#", *parts[at + 1 :]])
    index = None if at is None else int(parts[at])
    made = Layer(
        path, path, "self", "separate", 12, 12, 64, 0.125, {"scale": "run"}, (), stack=stack, index=index
    )
    return dataclasses.replace(made, **changes)


def call(index: int, where: str, **changes: Any) -> Call:
    """A fused bidirectional self-attention call of twelve heads over 2 × 128 tokens."""
    made = Call(
        index=index,
        layer=where,
        module=where,
        kernel="flash (CPU)",
        kind="self",
        normaliser="softmax",
        batch=2,
        heads=12,
        kv_heads=12,
        queries=128,
        keys=128,
        head_dim=64,
        dtype="float32",
        scores_dtype="float32",
        stored="nothing",
        scale=0.125,
        factors={"kernel": 0.125},
        mask_kind="none",
        explained=True,
        difference=3e-6,
    )
    return dataclasses.replace(made, **changes)


def numbers(of: Call, heads: Sequence[Mapping[str, Any]] = (), **whole: Any) -> list[Measurement]:
    """Rows for each head: those of an unremarkable head, changed by `heads[head]`, and those of the call."""
    rows = []
    for head in range(of.heads):
        values = {**usual(of, head), **(heads[head % len(heads)] if heads else {})}
        for dtype, most in FLOAT_MAX.items():
            values.setdefault(f"headroom_bits_{dtype}", headroom(values["dot_absmax"], most))
        for metric, value in values.items():
            unit = "bits" if metric.startswith("headroom") else UNITS.get(metric, "")
            rows.append(Measurement(metric, of.layer, value, unit, head, of.index))
    expected = None if of.head_dim is None else of.head_dim**-0.5
    of_call = {
        "scale": of.scale,
        "scale_expected": expected,
        "mask_kind": of.mask_kind,
        "window": of.window,
        "row_sum_min": 1.0,
        "row_sum_max": 1.0,
        "stored_absmax": None,
        **whole,
    }
    rows += [Measurement(metric, of.layer, value, "", None, of.index) for metric, value in of_call.items()]
    return rows


def headroom(dot_absmax: float | None, most: float) -> float | None:
    if dot_absmax is None or math.isnan(dot_absmax):
        return dot_absmax
    if dot_absmax == 0 or math.isinf(dot_absmax):
        return -math.inf if dot_absmax else math.inf
    return math.log2(most / dot_absmax)


def usual(of: Call, head: int) -> dict[str, Any]:
    """What a head that attends to a good part of everything would give; larger with the layer and head."""
    ratio = 0.55 + 0.4 * ((7 * head + 3 * of.index) % 11) / 11
    most = math.log(max(of.keys, 2))
    return {
        "entropy": ratio * most,
        "entropy_min": 0.8 * ratio * most,
        "entropy_ratio": ratio,
        "entropy_rest": 0.95 * ratio * most,
        "sink_mass": 0.08,
        "sink_key": 5,
        "score_max": 4.0 + 0.25 * head,
        "score_min": -6.5,
        "score_std": 1.125,
        "dot_absmax": 52.0 + head,
        "reach": of.keys / 3,
        "peaky_rows": 0.0,
        "rows": of.batch * of.queries,
        "rows_masked": 0,
        "rows_padded": 0,
    }


ON_KEY_0 = {
    "entropy": 0.14,
    "entropy_min": 0.02,
    "entropy_ratio": 0.03,
    "entropy_rest": 2.9,
    "sink_mass": 0.97,
    "sink_key": 0,
    "peaky_rows": 0.8,
}
DIAGONAL = {
    "entropy": 0.31,
    "entropy_min": 0.003,
    "entropy_ratio": 0.06,
    "entropy_rest": 0.29,
    "sink_mass": 0.02,
    "sink_key": 17,
    "reach": 0.4,
    "peaky_rows": 0.6,
}
EVEN = {"entropy": 4.85, "entropy_ratio": 0.9996, "entropy_rest": 4.84, "score_max": 0.02, "score_std": 0.004}


def report(command: str, calls: Sequence[tuple[Call, Sequence[Measurement]]], **changes: Any) -> Report:
    """The report of a run of these calls on a synthetic batch."""
    made = [pair[0] for pair in calls]
    run = {
        "batch": "synthetic",
        "inputs": {
            "input_ids": {"shape": [2, 128], "dtype": "int64"},
            "attention_mask": {"shape": [2, 128], "dtype": "int64"},
        },
        "calls_seen": len(made),
        "calls_measured": len(made),
        "difference": 3e-6,
        "notes": [],
    }
    kinds = {c.layer: c.kind for c in made}
    heads = {c.layer: c.heads for c in made}
    layers = [layer(p, kind=kind, heads=heads[p], kv_heads=heads[p]) for p, kind in kinds.items()]
    return Report(
        command=command,
        version="0.1.0",
        source={"kind": "huggingface", "path": "./minilm", "format": "safetensors", "parameters": 22713216},
        environment={"python": "3.11.0", "torch": "2.13.0", "device": "cpu", "dtype": "float32"},
        layers=changes.pop("layers", tuple(layers)),
        measurements=tuple(row for pair in calls for row in pair[1]),
        run={**run, **changes.pop("run", {})},
        calls=tuple(made),
        **changes,
    )


def encoder(command: str, layers: int = 6, heads: int = 12, **changes: Any) -> Report:
    """An encoder: head 3 of layer 2 lies on key 0, head 5 of layer 4 is even, layer 1 head 0 diagonal."""
    special = {(2, 3): ON_KEY_0, (4, 5): EVEN, (1, 0): DIAGONAL}
    made = []
    for index in range(layers):
        one = call(index, f"encoder.layer.{index}.attention.self", heads=heads, kv_heads=heads)
        made.append((one, numbers(one, [special.get((index, head), {}) for head in range(heads)])))
    return report(command, made, **changes)


def language_model(command: str, layers: int = 30, heads: int = 9) -> Report:
    """A causal model whose layers but the first two lie on key 0, every sixth with a window."""
    made = []
    for index in range(layers):
        window = {} if index % 6 else {"mask_kind": "causal + sliding window", "window": 64}
        one = call(
            index,
            f"model.layers.{index}.self_attn",
            heads=heads,
            kv_heads=3,
            mask_kind="causal",
            causal_offset=0,
        )
        one = dataclasses.replace(one, **window)
        sink = {**ON_KEY_0, "sink_mass": 0.7 + 0.009 * index}
        made.append((one, numbers(one, [sink if index > 1 else {}])))
    return report(command, made)


def encoder_decoder(command: str, cross: Sequence[Mapping[str, Any]], **changes: Any) -> Report:
    """Two layers of causal self- and of cross-attention with four heads; the last cross-attention as `cross`."""
    made = []
    for index in range(2):
        inner = {"heads": 4, "kv_heads": 4, "queries": 40, "head_dim": 32, "scale": 32**-0.5}
        own = call(
            2 * index,
            f"decoder.layers.{index}.self_attn",
            keys=40,
            mask_kind="causal",
            causal_offset=0,
            **inner,
        )
        other = call(2 * index + 1, f"decoder.layers.{index}.encoder_attn", kind="cross", keys=42, **inner)
        made.append((own, numbers(own)))
        made.append((other, numbers(other, cross if index == 1 else ())))
    return report(command, made, **changes)


def finding(code: str, name: str, severity: Any, message: str, where: str | None = None) -> Finding:
    return Finding(code, name, severity, message, "Multiply q·k by 1/√64.", where)
