"""Calls of fused kernels: everything stands in one operator's arguments, and its output is the proof.

Knows kernels and statistics; must not know how attention that a model writes itself is recognised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from attncli.trace import check
from attncli.trace.axes import axes, mixes_tokens
from attncli.trace.factors import linear_factor
from attncli.trace.fused import FusedScores
from attncli.trace.kernels import fused
from attncli.trace.maps import Drawn, Maps, fused_maps
from attncli.trace.origins import kind_of, kv_heads_of, parameters_of, sources_of, user_line
from attncli.trace.pending import Seen, dtype_name, with_bias
from attncli.trace.statistics import FusedCall, fused_difference, fused_statistics
from attncli.trace.tape import Node, Ran, Tape


def fused_call(tape: Tape, node: Node, run: Ran, maps: Maps | None = None) -> Seen:
    """What one call of a fused kernel did, checked against its output."""
    taken = fused(node.op.name, run)
    call = taken.call
    refs = node.operands
    query, key, value = refs[0].node, refs[1].node, refs[2].node
    factor_query, factor_key = linear_factor(query), linear_factor(key)
    facts: dict[str, Any] = {
        "module": node.module,
        "kernel": taken.kernel,
        "kind": kind_of(tape, query, key),
        "normaliser": "softmax",
        "dtype": dtype_name(taken.query.dtype),
        "scores_dtype": "float64" if taken.query.dtype == torch.float64 else "float32",
        "stored": "nothing",
        "head_dim": taken.query.shape[-1],
        "dropout": taken.dropout,
        **sources_of(tape, query, key, value),
        "parameters": parameters_of(query, key, value),
        "source": user_line(),
    }
    if call is None or taken.output_BHTV is None:
        shape = taken.query.shape
        sizes = {"batch": shape[0], "heads": 0, "kv_heads": 0, "queries": 0, "keys": 0}
        return Seen({**facts, **sizes, "scale": None, "reason": taken.reason}, None)
    if facts["kind"] == "cross":
        call = replace(call, same_tokens=False)
    numbers = fused_statistics(call)
    if taken.dropout > 0:
        answer = check.fused_with_dropout(logsumexp_difference(call, run.outputs), taken.query.dtype)
    else:
        answer = check.fused(fused_difference(call, taken.output_BHTV), taken.query.dtype)
    zeros_and_ones = call.known[0][0].added_shape(numbers.mask_kind) if numbers.bias and call.known else None
    batch, heads, queries, _ = call.q_BHTD.shape
    drawn: tuple[Drawn, ...] = ()
    if maps is not None and answer.explained:
        drawn = fused_maps(call, maps.chosen(node.module, facts["parameters"], batch, heads))
    # What was read of the mask refers to the call and the call to it: q and k would outlive their layer.
    call.known.clear()
    factors = {"query": factor_query, "key": factor_key, "kernel": call.scale}
    scale = None if factor_query is None or factor_key is None else factor_query * factor_key * call.scale
    facts |= {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads_of(key, heads, call.k_BKSD.shape[1]),
        "queries": queries,
        "keys": call.k_BKSD.shape[2],
        "scale": scale,
        "factors": {name: value for name, value in factors.items() if value is not None and value != 1.0},
        "soft_cap": call.soft_cap,
        "sinks": call.sinks_H is not None,
        "softmax_axis": _fused_axis(query, taken.query),
        "mask_kind": with_bias(numbers.mask_kind, zeros_and_ones) if numbers.bias else numbers.mask_kind,
        "window": numbers.window,
        "causal_offset": numbers.causal_offset,
        "explained": answer.explained,
        "difference": answer.difference,
        "reason": answer.reason,
    }
    before = abs((factor_query or 1.0) * (factor_key or 1.0))
    found = numbers.per_head.get("dot_absmax")
    dots = tuple(value / before for value in found if value is not None) if found is not None else None
    seen = Seen(facts, numbers, dots, None, before, drawn=drawn)
    if all(_mixes_tokens(node, tensor) for node, tensor in ((query, taken.query), (key, taken.key))):
        seen.tokens_per_head = queries / max(1, heads)
    return seen


def logsumexp_difference(call: FusedCall, outputs: Sequence[Tensor], rows: int = 16) -> float | None:
    """How far the logsumexp that a kernel returns lies from that of recomputed rows; None where it returns none.

    Of some rows of some heads, relative to the largest (or to 1). The kernel's is (B, H, T), (B, H, T, 1), or longer
    by padding; a row without a key is left out.
    """
    batch, heads, queries, _ = call.q_BHTD.shape
    if len(outputs) < 2 or call.sinks_H is not None or not call.k_BKSD.shape[2]:
        return None
    given = outputs[1]
    if given.dim() == 4 and given.shape[-1] == 1:
        given = given[..., 0]
    fits = given.dim() == 3 and given.shape[:2] == (batch, heads) and given.shape[2] >= queries > 0
    if not fits or not given.is_floating_point():
        return None
    source = FusedScores(call)
    chosen_R = torch.linspace(0, queries - 1, min(rows, queries), device=given.device).round().long()
    worst, largest = 0.0, 1.0
    for b, h in {(0, 0), (batch - 1, heads - 1), (batch // 2, heads // 2)}:
        expected_R = source.chosen_rows(b, h, chosen_R).logsumexp(-1)
        apart_R = (expected_R - given[b, h, chosen_R].to(expected_R.dtype)).abs()
        known_R = expected_R.isfinite()
        if bool(known_R.any()):
            worst = max(worst, float(apart_R[known_R].nan_to_num(math.inf).amax()))
            largest = max(largest, float(expected_R[known_R].abs().amax()))
    return worst / largest


def opaque_call(node: Node) -> Seen:
    """Attention that vanished into one operator: seen, not measured."""
    shape = node.shape
    facts = {
        "module": node.module,
        "kernel": node.op.name,
        "kind": None,
        "normaliser": "softmax",
        "batch": shape[0] if shape else 0,
        "heads": 0,
        "kv_heads": 0,
        "queries": shape[1] if len(shape) > 1 else 0,
        "keys": 0,
        "head_dim": None,
        "dtype": dtype_name(node.dtype),
        "scores_dtype": dtype_name(node.dtype),
        "stored": "nothing",
        "scale": None,
        "source": user_line(),
        "reason": f"it ran inside one operator, {node.op.name}, which shows no scores",
    }
    return Seen(facts, None)


def _mixes_tokens(node: Node, tensor: Tensor) -> bool:
    """Whether the rows of q or k, as the kernel wants them, are slices of tokens."""
    return tensor.dim() == 4 and mixes_tokens(axes(node, {})[-2])


def _fused_axis(query: Node, tensor: Tensor) -> Literal["keys", "heads"]:
    """Heads where queries should be: q was given as (B, T, H, D) to a kernel that wants (B, H, T, D)."""
    if tensor.dim() != 4:
        return "keys"
    found = axes(query, {})
    rows, heads = found[-2], found[-3]
    swapped = (
        bool(rows)
        and bool(heads)
        and all(atom.kind == "feature" for atom in rows)
        and all(atom.kind == "position" for atom in heads)
    )
    return "heads" if swapped else "keys"
