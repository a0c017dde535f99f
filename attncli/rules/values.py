"""Rules about the numbers in the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from attncli.records import Anomaly, Finding
from attncli.rules.rule import Observed, Rule


def _non_finite(rule: Rule, observed: Observed) -> Iterator[Finding]:
    owner = {tensor.name: layer.id for layer in observed.layers for tensor in layer.tensors}
    counts: dict[str, dict[str, int]] = {}
    for row in observed.measurements:
        if row.metric in ("nan_count", "inf_count") and isinstance(row.value, int) and row.value > 0:
            counts.setdefault(row.layer, {})[row.metric] = row.value
    counted = {owner.get(name) for name in counts}
    for layer, heads in _heads_without_scores(observed).items():
        if layer not in counted:
            yield rule.finding(
                f"{layer}: q, k or the norm in front hold NaN or Inf in {_heads(heads)} (--values counts them).",
                layer=layer,
                head=heads[0] if len(heads) == 1 else None,
                evidence={"heads": heads},
            )
    for name, found in counts.items():
        # A mask buffer is made of −inf on purpose.
        if "nan_count" not in found and _MASK_BUFFER.search(name):
            continue
        parts = [
            f"{found[m]} {label}" for m, label in (("nan_count", "NaN"), ("inf_count", "Inf")) if m in found
        ]
        heads = sorted(
            {
                head
                for anomaly in observed.anomalies
                if anomaly.kind == "nonfinite-head" and anomaly.subject == name
                for head in _query_heads(anomaly)
            }
        )
        where = f" in {_heads(heads)}" if heads else ""
        yield rule.finding(
            f"{name}: {' and '.join(parts)}{where}.",
            layer=owner.get(name),
            head=heads[0] if len(heads) == 1 else None,
            evidence={**found, **({"heads": heads} if heads else {})},
        )


def _heads_without_scores(observed: Observed) -> dict[str, list[int]]:
    """Heads whose typical score is no number although their weights were read: NaN or Inf is among them."""
    unbounded = {
        (r.layer, r.head) for r in observed.measurements if r.metric == "score_bound" and r.value == math.inf
    }
    heads: dict[str, list[int]] = {}
    for row in observed.measurements:
        broken = row.metric == "score_typical" and row.value is None and (row.layer, row.head) in unbounded
        if broken and row.head is not None:
            heads.setdefault(row.layer, []).append(row.head)
    return heads


def _all_zero(rule: Rule, observed: Observed) -> Iterator[Finding]:
    owner = {tensor.name: layer.id for layer in observed.layers for tensor in layer.tensors}
    zero_heads: dict[tuple[str, str], set[int]] = {}
    for anomaly in observed.anomalies:
        role = str(anomaly.evidence.get("role", "projection"))
        if anomaly.kind == "zero-projection":
            yield rule.finding(
                f"{anomaly.subject}: the whole {role} projection is zero.",
                layer=owner.get(anomaly.subject),
                evidence=dict(anomaly.evidence),
            )
        elif anomaly.kind == "zero-head":
            zero_heads.setdefault((anomaly.subject, role), set()).update(_query_heads(anomaly))
    for (name, role), found in zero_heads.items():
        heads = sorted(found)
        yield rule.finding(
            f"{name}: all {role} weights of {_heads(heads)} are zero.",
            layer=owner.get(name),
            head=heads[0] if len(heads) == 1 else None,
            evidence={"heads": heads, "role": role},
        )


def _query_heads(anomaly: Anomaly) -> tuple[int, ...]:
    """The query heads that read these rows: several where they share a KV head."""
    return tuple(anomaly.evidence.get("heads") or (anomaly.evidence["head"],))


def _heads(heads: list[int]) -> str:
    listed = ", ".join(str(head) for head in heads[:8]) + (", …" if len(heads) > 8 else "")
    return f"head {listed}" if len(heads) == 1 else f"heads {listed}"


# The name's end alone: `mask_decoder.….weight` and `mask_token` are weights like any other.
_MASK_BUFFER = re.compile(r"(^|[._])mask(ed_bias)?$|(^|\.)attn\.bias$")

VALUE_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT201",
        name="non-finite-weight",
        severity="error",
        what="A tensor of the checkpoint holds NaN or Inf.",
        why="Everything downstream of it becomes NaN.",
        formula="count of NaN and ±Inf per tensor",
        threshold="> 0; masks made of −inf are left out",
        source="IEEE 754",
        provenance="derived",
        example="layers.3.self_attn.k_proj.weight holds 128 NaN in head 2.",
        remedy="Go back to the last checkpoint without them; look at the loss scale and the learning rate at "
        "that step.",
        check=_non_finite,
    ),
    Rule(
        code="ATT202",
        name="all-zero-head",
        severity="warning",
        what="All weights of a head, or of a whole projection, are zero.",
        why="A head whose q or k is zero attends to everything alike; one whose v or o is zero adds nothing.",
        formula="zeros among the rows (or columns) of one head",
        threshold="all",
        source="attncli",
        provenance="derived",
        example="A pruned head, or a projection that was never loaded.",
        remedy="If the head was pruned on purpose, remove it or ignore this rule; otherwise look for the "
        "tensor in the original.",
        check=_all_zero,
    ),
)
