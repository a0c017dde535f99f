"""Hand-made reports to be compared: of a checkpoint, and of a run. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rule_cases import ran

from attncli.records import Finding, Layer, LayerTensor, Measurement, Report

RUN: Mapping[str, Any] = {"batch": "text", "inputs": {"input_ids": {"shape": [1, 32], "dtype": "int64"}}}


def layer(path: str = "layers.0.attn", *, dtype: str = "float32", **changes: Any) -> Layer:
    """Four heads of 16 with separate projections; `shape` is that of all of them."""
    shape = changes.pop("shape", (64, 64))
    made = Layer(
        id=path,
        path=path,
        kind="self",
        layout="separate",
        heads=4,
        kv_heads=4,
        head_dim=16,
        scale=0.25,
        evidence={"heads": "config", "scale": "config"},
        tensors=tuple(
            LayerTensor(role, f"{path}.{role}_proj.weight", shape, dtype, "m.safetensors") for role in "qkvo"
        ),
    )
    return replace(made, **changes)


def stack(count: int, prefix: str = "layers", **changes: Any) -> tuple[Layer, ...]:
    return tuple(layer(f"{prefix}.{index}.attn", **changes) for index in range(count))


def checkpoint(*layers: Layer, **changes: Any) -> Report:
    """What `inspect` gives."""
    made = Report(
        command="inspect",
        version="0.1.0",
        source={
            "kind": "file",
            "path": "m.safetensors",
            "format": "safetensors",
            "files": 1,
            "bytes": 800,
            "parameters": 200,
            "tensors": 4 * len(layers),
        },
        environment={"python": "3.11", "torch": None},
        layers=layers or stack(2),
    )
    return replace(made, **changes)


def measured(
    numbers: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    *,
    layers: Sequence[Layer] = (),
    call: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] = RUN,
    **changes: Any,
) -> Report:
    """What `entropy` gives of one call a layer, healthy but for `numbers` (one mapping a layer, or one for all)."""
    shown = tuple(layers) or stack(2)
    each = [numbers] * len(shown) if isinstance(numbers, Mapping) else [*numbers, *[{}] * len(shown)]
    runs = [
        ran(index, numbers=given, layer=one.id, module=one.id, **(call or {}))
        for index, (one, given) in enumerate(zip(shown, each, strict=False))
    ]
    rows: list[Measurement] = []
    for made, values in runs:
        for metric, value in values.items():
            per_head = value if isinstance(value, (list, tuple)) else [value] * made.heads
            rows += [
                Measurement(metric, made.layer, one, head=head, call=made.index)
                for head, one in enumerate(per_head)
            ]
    report = Report(
        command="entropy",
        version="0.1.0",
        source={"kind": "huggingface", "path": "model", "format": "huggingface", "parameters": 200},
        environment={"python": "3.11", "torch": "2.9", "device": "cpu", "dtype": "float32"},
        layers=shown,
        measurements=tuple(rows),
        run={**run, "calls_seen": len(runs), "calls_measured": len(runs)},
        calls=tuple(made for made, _ in runs),
    )
    return replace(report, **changes)


def finding(
    message: str, where: str | None = None, code: str = "ATT501", severity: Any = "warning", **evidence: Any
) -> Finding:
    return Finding(code, "large-scores", severity, message, "Clip them.", where, None, evidence)
