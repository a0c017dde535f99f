"""A checkpoint → its attention layers, from headers alone; with its values, what they say."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attncli import __version__, records
from attncli.api.report import Progress, Report, environment, fits, matching, without_match
from attncli.checkpoint import open_checkpoint
from attncli.layout import Options, attention_layers
from attncli.records import Anomaly, Checkpoint, Expectation, Layer, Measurement
from attncli.rules import Observed, judge, overflow_measurements


def inspect(
    path: str | Path,
    *,
    values: bool = False,
    bounds: bool = False,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: Sequence[str] = (),
    expected: Sequence[Expectation] = (),
    asks_heads: bool = True,
    contents: bool = False,
    progress: Progress | None = None,
) -> Report:
    """The attention layout of every layer of a checkpoint, from its headers.

    `values`: also count NaN, Inf and zeros of every tensor, with largest magnitude and RMS. `bounds`: also
    bound |q·k| per head from the weights. Both read tensor data and import torch; nothing else does.
    `heads`, `kv_heads`, `head_dim` serve where neither config nor shapes tell. `layers`: glob patterns; only
    layers whose path matches one are kept. `expected`: what the layers are to be; `asks_heads`: whether a
    note may ask for `heads`. `contents`: with `values`, also a fingerprint of each tensor's elements.
    Errors: `attncli.errors.AttncliError`.
    """
    checkpoint = open_checkpoint(path)
    found = attention_layers(checkpoint.tensors, checkpoint.configs, Options(heads, kv_heads, head_dim))
    chosen = matching(found, layers, str(path))
    read = _Reading((), (), ())
    if values or bounds:
        read = _read_values(
            checkpoint, chosen, values=values, bounds=bounds, contents=contents, progress=progress
        )
    measurements = (*read.measurements, *overflow_measurements(read.measurements))
    anomalies = (*checkpoint.anomalies, *read.anomalies)
    observed = Observed(chosen, measurements, anomalies, expected=tuple(expected))
    return Report(
        command="inspect",
        version=__version__,
        source=_source(checkpoint),
        environment=environment(),
        layers=chosen,
        measurements=measurements,
        findings=judge(observed),
        notes=(
            *without_match("layer", layers, lambda pattern: any(fits(layer, pattern) for layer in found)),
            *_notes(checkpoint, chosen, asks_heads),
            *read.notes,
        ),
    )


# --- values -------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    measurements: tuple[Measurement, ...]
    anomalies: tuple[Anomaly, ...]
    notes: tuple[str, ...]


def _read_values(
    checkpoint: Checkpoint,
    layers: tuple[Layer, ...],
    *,
    values: bool,
    bounds: bool,
    contents: bool,
    progress: Progress | None,
) -> _Reading:
    with warnings.catch_warnings():
        # torch without numpy works, but says so on every import.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        from attncli.checkpoint.values import Values
        from attncli.weights import digest_measurements, head_anomalies, score_bounds, value_measurements

    measurements: list[Measurement] = []
    anomalies: list[Anomaly] = []
    notes: list[str] = []
    with Values(checkpoint) as store:
        if values:
            stored = _as_stored(checkpoint.tensors)
            total = sum(tensor.size_bytes for tensor in stored)
            scan = value_measurements(stored, store, _counting(progress, "reading values", total))
            measurements.extend(scan.measurements)
            anomalies.extend(scan.skipped)
            anomalies.extend(head_anomalies(layers, scan.measurements, store))
            if contents:
                tick = _counting(progress, "comparing values", total)
                measurements.extend(digest_measurements(stored, store, tick))
            if scan.skipped:
                notes.append(
                    f"values not observed in {_many(scan.skipped, 'tensor')}: {_reasons(scan.skipped)}"
                )
        if bounds:
            softmax = [layer for layer in layers if layer.kind is not None]
            count = _counting(progress, "bounding scores", len(softmax))
            result = score_bounds(softmax, store, (lambda _: count(1)) if count else None)
            measurements.extend(result.measurements)
            anomalies.extend(result.skipped)
            if result.skipped:
                notes.append(
                    f"scores not bounded in {len(result.skipped)} layers: {_reasons(result.skipped)}"
                )
            notes.extend(_bound_notes(result.ingredients))
    return _Reading(tuple(measurements), tuple(anomalies), tuple(notes))


def _as_stored(tensors: Sequence[records.Tensor]) -> list[records.Tensor]:
    """LoRA pairs as the two tensors in the file: their product says nothing without the weight it changes."""
    stored: list[records.Tensor] = []
    for tensor in tensors:
        if tensor.scheme == "lora":
            parts = tensor.parts.values()
            stored += [records.Tensor(p.name, p.shape, p.dtype, p.file, {"weight": p}) for p in parts]
        else:
            stored.append(tensor)
    return stored


def _counting(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    import threading

    done = 0
    lock = threading.Lock()

    def tick(amount: int) -> None:
        nonlocal done
        with lock:
            done += amount
            progress(what, min(done, total), total)

    return tick


def _many(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"


def _reasons(skipped: Sequence[Anomaly]) -> str:
    reasons: dict[str, int] = {}
    for anomaly in skipped:
        reason = str(anomaly.evidence.get("reason", _SKIPPED.get(anomaly.kind, anomaly.kind)))
        reasons[reason] = reasons.get(reason, 0) + 1
    return "; ".join(f"{reason} ({count})" for reason, count in reasons.items())


def _bound_notes(ingredients: Sequence[Any]) -> list[str]:
    """What the bounds rest on, said once per combination."""
    used: dict[str, int] = {}
    for item in ingredients:
        if item.input_norm is None and not (item.query_norm and item.key_norm):
            used[_NO_BOUND] = used.get(_NO_BOUND, 0) + 1
            continue
        parts = [f"{_NORMS.get(item.input_norm, item.input_norm)} in front"] if item.input_norm else []
        parts += ["q/k norm"] if item.query_norm or item.key_norm else []
        parts += ["biases"] if item.biases else []
        label = f"bounded by {', '.join(parts)}"
        used[label] = used.get(label, 0) + 1
    return [f"scores of {count} layer{'s' if count != 1 else ''} {label}" for label, count in used.items()]


# --- what the report says of its surroundings ---------------------------------------------------------


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "kind": checkpoint.kind,
        "path": checkpoint.path,
        "format": checkpoint.format,
        "files": len(checkpoint.files),
        "bytes": checkpoint.size_bytes,
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint.tensors),
    }


def _notes(checkpoint: Checkpoint, layers: Sequence[Layer], asks_heads: bool) -> list[str]:
    notes = [f"{count} {what} tensors left out" for what, count in checkpoint.excluded.items() if count]
    shard = _SHARD.search(Path(checkpoint.path).name) if checkpoint.kind == "file" else None
    if shard:
        notes.append(
            f"this is one of {int(shard.group(1))} shards: layers may be split between them; give the folder"
        )
    unknown = sum(layer.kind is not None and layer.heads is None for layer in layers)
    if unknown:
        tells = (
            "the config gives no count that fits"
            if checkpoint.configs
            else "no config and no shape tells them"
        )
        remedies = [
            *(["give --heads"] if asks_heads else []),
            *([] if checkpoint.configs else ["put the config.json beside the weights"]),
        ]
        remedy = f"; {', or '.join(remedies)}" if remedies else ""
        notes.append(f"heads of {unknown} layer{'s' if unknown != 1 else ''} are unknown: {tells}{remedy}")
    return notes


# --- tables -------------------------------------------------------------------------------------------

_SKIPPED = {
    "no-score-terms": "the weights alone do not determine q·k there, or heads are unknown",
    "unread-values": "not readable",
}
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(?!gguf)")
_NO_BOUND = "without a bound: the norm in front of q and k is not certain (a config.json may tell it)"
_NORMS = {"rms": "a norm without bias", "layer": "a LayerNorm", "l2": "unit norm"}
