"""What is judged of the facts: findings, what makes two of them the same one, and what changed between reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")


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

    @property
    def fingerprint(self) -> str:
        """32 hex digits for the rule and the place: the layer and what the message is about, whatever it counts.

        Where one rule judges several properties of a place, `evidence["key"]` names the property. The same in every
        run, on every machine and in any order; which head is the worst and by how much may change, and so may line
        numbers.
        """
        import hashlib  # OpenSSL takes its time to load, and most reports have no findings

        subject = re.sub(r"(?<![A-Za-z0-9._])\d+", "#", self.message.partition(": ")[0])
        parts = [self.code, self.layer or "", subject]
        if "key" in self.evidence:
            parts.append(str(self.evidence["key"]))
        key = "\0".join(parts)
        return hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the user says that attention layers are. `pattern`: a glob on their paths, or a number; "" for all."""

    pattern: str
    key: str
    value: int | float | str


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two reports, `before` in the first and `after` in the second; None where it is absent.

    `kind`: "added" or "removed" (a whole layer), "structure" (`what`: "heads", "layout", "q shape", "q dtype" …),
    "metric" (`what`: the metric; `layer` may be a tensor's name), "finding" (`what`: the rule's code; `before` and
    `after`: the message) or "source" (`what`: "parameters", "format", "structure" …).
    """

    kind: Literal["added", "removed", "structure", "metric", "finding", "source"]
    layer: str | None
    head: int | None
    what: str
    before: Any
    after: Any
