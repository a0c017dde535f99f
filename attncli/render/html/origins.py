"""Where NaN and Inf were born, for the page: one card an origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from attncli.records import Origin
from attncli.render.html.findings import facts
from attncli.render.html.tables import plain


class Card(NamedTuple):
    """`proof`: what was tried and what it gave. `path`: operators from the birth to what shows it."""

    title: str
    message: str
    advice: str
    proved: bool
    proof: str
    facts: tuple[tuple[str, str], ...]
    path: tuple[str, ...]
    evidence: tuple[tuple[str, str], ...]


def card(origin: Origin) -> Card:
    evidence = {name: value for name, value in origin.evidence.items() if name != "proof"}
    known = {
        "value": _VALUES[origin.value],
        "cause": origin.cause,
        "phase": origin.phase,
        "module": origin.module,
        "operator": "" if origin.op == "leaf" else origin.op,
        "source line": origin.source,
        "tensor": origin.tensor,
        "layer": origin.layer,
        "at": plain(origin.at) if origin.at else "",
        "dtype": origin.dtype,
    }
    proof = str(origin.evidence.get("proof") or "not tried")
    return Card(
        _title(origin),
        origin.message,
        origin.advice,
        origin.confirmed is True,
        _PROOFS[origin.confirmed] + proof,
        tuple((name, str(value)) for name, value in known.items() if value),
        _way(origin.path),
        facts(evidence),
    )


def _title(origin: Origin) -> str:
    if origin.op == "leaf":
        return f"{_VALUES[origin.value]} was there before: {origin.tensor or origin.phase}"
    place = f" in {origin.module}" if origin.module else ""
    return f"{_VALUES[origin.value]} born in {origin.op}{place}"


def _way(path: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    steps = [f"{step.get('module') or 'the model'}: {step.get('op', '')}" for step in path]
    if len(steps) <= _MOST_STEPS:
        return tuple(steps)
    half = _MOST_STEPS // 2
    return (*steps[:half], f"{len(steps) - 2 * half} more operators", *steps[-half:])


# --- words --------------------------------------------------------------------------------------------

_MOST_STEPS = 60
_VALUES = {"nan": "NaN", "+inf": "+Inf", "-inf": "−Inf"}
_PROOFS = {True: "Proved: ", False: "Not confirmed: ", None: "Not confirmed: "}
