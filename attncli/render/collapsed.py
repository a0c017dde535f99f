"""Findings that say the same of several layers, as one: "h.{0–11}.attn"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from attncli.records import SEVERITIES, Finding, Layer
from attncli.render.folds import Fold


class Collapsed(NamedTuple):
    """One or more findings of one rule and severity whose messages differ in numbers alone.

    `where`: the layers, folded; "" where the findings are of none. `message`: what the first of them says without
    saying where; `at`: the layer it says it of. `more`: how many there are besides, where they give other numbers.
    """

    findings: tuple[Finding, ...]
    where: str
    message: str
    at: str
    more: int

    @property
    def first(self) -> Finding:
        return self.findings[0]

    @property
    def sentence(self) -> str:
        if not self.more:
            return self.message
        return f"{self.message} ({f'{self.at}, ' if self.at else ''}and {self.more} more like it)"


def collapsed(findings: Iterable[Finding], layers: Sequence[Layer]) -> list[Collapsed]:
    """The gravest first, inside one severity in the order of their first finding."""
    known = {layer.id: layer for layer in layers}
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.severity, finding.code, re.sub(_NUMBER, "#", finding.message))
        groups.setdefault(key, []).append(finding)
    made = [_collapsed(group, known) for group in groups.values()]
    return sorted(made, key=lambda one: -SEVERITIES.index(one.first.severity))


def tally(findings: Sequence[Finding]) -> str:
    """ "2 errors, 1 warning"; "" without findings."""
    counts = {one: sum(finding.severity == one for finding in findings) for one in reversed(SEVERITIES)}
    return ", ".join(f"{n} {one}{'s' if n != 1 else ''}" for one, n in counts.items() if n)


# --- building blocks ----------------------------------------------------------------------------------


def _collapsed(group: Sequence[Finding], known: dict[str, Layer]) -> Collapsed:
    said = [_without_place(finding, known) for finding in group]
    at, message = said[0]
    alike = len({words for _, words in said}) == 1
    return Collapsed(tuple(group), _where(group, known), message, at, 0 if alike else len(group) - 1)


def _without_place(finding: Finding, known: dict[str, Layer]) -> tuple[str, str]:
    """The layer that the message begins with, and the rest; "" and the message where it begins with none."""
    layer = known.get(finding.layer or "")
    for name in filter(None, (finding.layer, layer.path if layer else "")):
        if finding.message.startswith(f"{name}: "):
            return name, finding.message[len(name) + 2 :]
    return "", finding.message


def _where(group: Sequence[Finding], known: dict[str, Layer]) -> str:
    ids = list(dict.fromkeys(finding.layer for finding in group if finding.layer))
    layers = [known[one] for one in ids if one in known]
    alike = len({layer.stack for layer in layers}) == 1 and all(layer.index is not None for layer in layers)
    if len(layers) == len(ids) > 1 and alike and "#" in layers[0].stack:
        return Fold(tuple(layers)).label
    paths = [(known[one].path or one) if one in known else one for one in ids]
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(paths[:_NAMED]) + more


# --- tables -------------------------------------------------------------------------------------------

_NAMED = 3
# As `words.number` writes them: "21", "21.4", "1.2e+05", and "12 345".
_NUMBER = r"\d+(?: \d{3}\b)*(?:\.\d+)?(?:e[+-]?\d+)?"
