"""The whole answer of one command, and its strict JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from attncli.records.judged import SEVERITIES, Change, Finding, Severity
from attncli.records.layers import Layer, structure
from attncli.records.runs import AttentionMap, Call, Measurement, Origin

SCHEMA = "attncli-report/1"


@dataclass(frozen=True)
class Report:
    """What one command saw, in the shape of the schema `attncli-report/1`.

    `looked`: whether there was any attention to look at; layers without softmax (`kind` None) are none.
    After a forward pass every call must have been explained as well; a search for NaN looks at every operator
    instead. `run`: what ran, for a command that
    runs the model; `calls`: its attention calls. `notes`: sentences for a person, e.g. what was left out.
    `known`: findings of a baseline, which are told and do not fail. `maps`: the heads that were asked for.
    `changes`: what differs from the report that this one was compared with.
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
    known: tuple[Finding, ...] = ()
    maps: tuple[AttentionMap, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def looked(self) -> bool:
        if self.run is not None and "training" in self.run:
            return bool(self.run["training"].get("seen"))
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
                "structure": structure(self.layers),
                "environment": self.environment,
                "run": self.run
                if self.run is None
                else {**self.run, "calls": [_row(call, _CALL_KEYS) for call in self.calls]},
                "layers": layers,
                "measurements": [_row(row, _MEASUREMENT_KEYS) for row in self.measurements],
                "origins": [_row(origin, _ORIGIN_KEYS) for origin in self.origins],
                "findings": [_row(row, _FINDING_KEYS) for row in self.findings],
                "known": [_row(row, _FINDING_KEYS) for row in self.known],
                "maps": [_row(row, _MAP_KEYS) for row in self.maps],
                "changes": [_row(row, _CHANGE_KEYS) for row in self.changes],
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
_FINDING_KEYS = ("code", "name", "severity", "layer", "head", "message", "advice", "evidence", "fingerprint")
_MAP_KEYS = tuple(item.name for item in fields(AttentionMap))
_CHANGE_KEYS = tuple(item.name for item in fields(Change))
