"""What one reader hands to the rest of the room: arrays under the names their file gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attncli.records import Anomaly, Array, Config


@dataclass(frozen=True, slots=True)
class Contents:
    """`files` are relative to `root`; `excluded` counts what was left out, by what it is ("optimizer")."""

    format: str
    root: str
    files: tuple[str, ...]
    arrays: tuple[Array, ...]
    configs: tuple[Config, ...] = ()
    excluded: Mapping[str, int] = field(default_factory=dict)
    anomalies: tuple[Anomaly, ...] = ()
