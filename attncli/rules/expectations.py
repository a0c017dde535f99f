"""What the user says the model is, against what it is: `--expect heads=32,kv_heads=8`."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import Expectation, Finding, Layer, structure
from attncli.rules.rule import Observed, Rule


class Expectable(NamedTuple):
    """Something to expect: its type, and what a layer, or all of them together, say of it; None: not known."""

    type: type
    of_layer: Callable[[Layer, Observed], Any] | None = None
    of_all: Callable[[Sequence[Layer]], Any] | None = None


def _unmet(rule: Rule, observed: Observed) -> Iterator[Finding]:
    attention = [layer for layer in observed.layers if layer.kind is not None]
    for expected in observed.expected:
        chosen = [layer for layer in attention if _chosen(layer, expected.pattern)]
        key = EXPECTABLE[expected.key]
        if key.of_all is not None:
            found = key.of_all(chosen)
            if found != expected.value:
                yield _finding(rule, expected, None, _where(expected), found)
        elif not chosen:
            yield _finding(rule, expected, None, _where(expected), None, "no such attention layer")
        elif key.of_layer is not None:
            for layer in chosen:
                said = key.of_layer(layer, observed)
                if not _fits(said, expected.value):
                    yield _finding(rule, expected, layer.id, layer.path or layer.id, said)


def _finding(
    rule: Rule, expected: Expectation, layer: str | None, where: str, found: Any, words: str = ""
) -> Finding:
    told = words or ("nothing that is known" if found is None else _shown(found))
    return rule.finding(
        f"{where}: {expected.key}: expected {_shown(expected.value)}, found {told}.",
        layer=layer,
        evidence={"key": expected.key, "expected": expected.value, "found": found},
    )


def _where(expected: Expectation) -> str:
    return f"layers {expected.pattern}" if expected.pattern else "the model"


def _chosen(layer: Layer, pattern: str) -> bool:
    if pattern.isdecimal():
        return layer.index == int(pattern)
    return not pattern or layer.path == pattern or fnmatch.fnmatchcase(layer.path, pattern)


def _fits(said: Any, value: Any) -> bool:
    if isinstance(said, frozenset):
        return value in said
    if isinstance(value, float) and isinstance(said, (int, float)):
        return math.isclose(said, value, rel_tol=1e-3)
    return bool(said == value)


def _shown(value: Any) -> str:
    if isinstance(value, frozenset):
        return " + ".join(sorted(value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- what can be expected -----------------------------------------------------------------------------


def _dtype(layer: Layer, observed: Observed) -> str | None:
    dtypes = {t.dtype for t in layer.tensors if t.role in _QUERIES}
    return dtypes.pop() if len(dtypes) == 1 else None


def _masks(layer: Layer, observed: Observed) -> frozenset[str] | None:
    """The kinds that the masks of all of its calls have in common."""
    masks = [call.mask_kind for call in observed.calls if call.layer == layer.id]
    if not masks or None in masks:
        return None
    return frozenset.intersection(*(frozenset((mask or "").split(" + ")) for mask in masks))


def _window(layer: Layer, observed: Observed) -> Any:
    """In tokens; "none" where a run showed none."""
    windows = {call.window for call in observed.calls if call.layer == layer.id}
    seen = windows.pop() if len(windows) == 1 else layer.facts.get("window")
    ran = any(call.layer == layer.id for call in observed.calls)
    return NONE if seen is None and ran else seen


NONE = "none"
_QUERIES = ("q", "qkv", "qk", "q_a", "q_b")
EXPECTABLE: Mapping[str, Expectable] = {
    "layers": Expectable(int, of_all=len),
    "heads": Expectable(int, lambda layer, observed: layer.heads),
    "kv_heads": Expectable(int, lambda layer, observed: layer.kv_heads),
    "head_dim": Expectable(int, lambda layer, observed: layer.head_dim),
    "layout": Expectable(str, lambda layer, observed: layer.layout),
    "kind": Expectable(str, lambda layer, observed: layer.kind),
    "scale": Expectable(float, lambda layer, observed: layer.scale),
    "dtype": Expectable(str, _dtype),
    "mask": Expectable(str, _masks),
    "window": Expectable(int, _window),
    "structure": Expectable(str, of_all=structure),
}

# --- tables -------------------------------------------------------------------------------------------

EXPECTATION_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT801",
        name="not-as-expected",
        severity="error",
        what="The model is not what --expect says it is.",
        why="A checkpoint of another size or layout, or a changed config, passes unnoticed until it is served.",
        formula="the value of each attention layer = the value expected; a scale to three digits",
        threshold="any difference, and any value that is not known",
        source="the user's --expect",
        provenance="derived",
        example="--expect heads=32,kv_heads=8 and a checkpoint of 32 KV heads.",
        remedy="Check that this is the checkpoint you mean; if the change is intended, change --expect.",
        check=_unmet,
    ),
)
