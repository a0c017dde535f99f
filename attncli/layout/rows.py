"""Where each head lies: for every layout, the first row of each query head's q, k and v, and its columns of o.

The arithmetic of `LAYOUTS` and nothing else. d is the head size, d_v the value head size, r = H/K query
heads share one KV head; starts are given per *query* head, so that the starts of shared keys repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from attncli.layout import families
from attncli.layout.geometry import Geometry
from attncli.layout.heads import Heads
from attncli.layout.names import Site
from attncli.records import HeadRows


class _Plan(NamedTuple):
    """H query heads of size d, the KV head of each, widths of the q and k blocks, and what precedes q."""

    heads: int
    kv_heads: int
    d: int
    d_v: int
    kv_of: list[int]
    q_width: int
    k_width: int
    gate: bool
    fused: int


_Starts = tuple[list[int], list[int], list[int]]


def head_rows(site: Site, shape: Geometry, heads: Heads, model_type: str) -> dict[str, HeadRows]:
    """Rows by side: "q", "k", "v" and "o" (o by its input axis). Empty where heads or order are unknown."""
    if site.mechanism != "softmax" or not shape.sliceable:
        return {}
    if not heads.heads or not heads.head_dim or not heads.kv_heads or heads.heads % heads.kv_heads:
        return {}
    plan = _Plan(
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        d=heads.head_dim,
        d_v=heads.v_head_dim or heads.head_dim,
        kv_of=_kv_of(heads.heads, heads.kv_heads, model_type),
        q_width=heads.q or 0,
        k_width=heads.k or 0,
        gate=heads.gate,
        fused=shape.fused or 0,
    )
    rows: dict[str, HeadRows] = {}
    starts = _STARTS.get(heads.layout)
    if starts is not None and "q_learned" not in site.roles:
        q, k, v = starts(plan, site)
        for side, first, width in (("q", q, plan.d), ("k", k, plan.d), ("v", v, plan.d_v)):
            found = _side(site, side, first, width, shape, heads)
            if found is not None:
                rows[side] = found
    if shape.o_in == plan.heads * plan.d_v and "o" in site.roles and len(site.roles["o"].shape) == 2:
        columns = [h * plan.d_v for h in range(plan.heads)]
        axis: Literal[0, 1] = 0 if shape.out_axis == 1 else 1
        rows["o"] = HeadRows(site.roles["o"].name, tuple(columns), plan.d_v, axis)
    return rows


def _side(
    site: Site, side: str, starts: list[int], width: int, shape: Geometry, heads: Heads
) -> HeadRows | None:
    role = next((r for r in _HOLDERS[side] if r in site.roles), None)
    if role is None or not starts:
        return None
    bias, bias_starts = _bias(site, role, side, starts, width, heads)
    return HeadRows(site.roles[role].name, tuple(starts), width, shape.out_axis, bias, tuple(bias_starts))


def _bias(
    site: Site, role: str, side: str, starts: list[int], width: int, heads: Heads
) -> tuple[str | None, list[int]]:
    roles = site.roles
    if f"{role}_bias" in roles and role != side:
        return roles[f"{role}_bias"].name, starts
    if f"{side}_bias" in roles:  # its own, or split off a fused weight (BEiT, DeBERTa v1, LayoutLMv2)
        own = starts if role == side else [h * width for h in range(len(starts))]
        return roles[f"{side}_bias"].name, own
    if "qkv_bias" in roles and role == side:  # nn.MultiheadAttention with kdim ≠ embed_dim
        lead = {"q": 0, "k": heads.q or 0, "v": (heads.q or 0) + (heads.k or 0)}[side]
        return roles["qkv_bias"].name, [lead + start for start in starts]
    return None, []


def _kv_of(heads: int, kv_heads: int, model_type: str) -> list[int]:
    if families.kv_head_is_modulo(model_type):
        return [h % kv_heads for h in range(heads)]
    return [h // (heads // kv_heads) for h in range(heads)]


# --- one function per layout --------------------------------------------------------------------------


def _separate(plan: _Plan, site: Site) -> _Starts:
    step = 2 * plan.d if plan.gate and "gate" not in site.roles else plan.d
    q = [h * step for h in range(plan.heads)]
    return q, [g * plan.d for g in plan.kv_of], [g * plan.d_v for g in plan.kv_of]


def _block(plan: _Plan, site: Site) -> _Starts:
    lead = plan.q_width if plan.gate else 0  # hrm_text: [gate | q | k | v]
    k0 = lead + plan.q_width
    v0 = k0 + plan.k_width
    q = [lead + h * plan.d for h in range(plan.heads)]
    return q, [k0 + g * plan.d for g in plan.kv_of], [v0 + g * plan.d_v for g in plan.kv_of]


def _head(plan: _Plan, site: Site) -> _Starts:
    q = [h * 3 * plan.d for h in range(plan.heads)]
    return q, [start + plan.d for start in q], [start + 2 * plan.d for start in q]


def _group(plan: _Plan, site: Site) -> _Starts:
    r = plan.heads // plan.kv_heads
    queries = (2 * r if plan.gate else r) * plan.d
    span = queries + 2 * plan.d
    q = [(h // r) * span + (h % r) * plan.d for h in range(plan.heads)]
    k = [(h // r) * span + queries for h in range(plan.heads)]
    return q, k, [start + plan.d for start in k]


def _qvk(plan: _Plan, site: Site) -> _Starts:
    """CodeGen: four model-parallel blocks, each [Q | V | K] of its quarter of the heads."""
    local = plan.heads // 4
    if local * 4 != plan.heads:
        return [], [], []
    q = [(h // local) * 3 * local * plan.d + (h % local) * plan.d for h in range(plan.heads)]
    return q, [start + 2 * local * plan.d for start in q], [start + local * plan.d for start in q]


def _unequal(plan: _Plan, site: Site) -> _Starts:
    q = [h * (2 * plan.d + plan.d_v) for h in range(plan.heads)]
    return q, [start + plan.d for start in q], [start + 2 * plan.d for start in q]


def _mlp(plan: _Plan, site: Site) -> _Starts:
    """ViT-22B style blocks store [mlp | q | k | v]; Flux single blocks [q | k | v | mlp]."""
    lead = plan.fused - 3 * plan.q_width if "in_proj" in site.roles["qkv"].name else 0
    q = [lead + h * plan.d for h in range(plan.heads)]
    return q, [start + plan.q_width for start in q], [start + 2 * plan.q_width for start in q]


def _query_and_kv(plan: _Plan, site: Site) -> _Starts:
    q = [h * plan.d for h in range(plan.heads)]
    if "attention_biases" in site.roles:  # LeViT: per head (d, d_v)
        k = [h * (plan.d + plan.d_v) for h in range(plan.heads)]
        return q, k, [start + plan.d for start in k]
    k = [g * plan.d for g in plan.kv_of]
    return q, k, [plan.k_width + g * plan.d_v for g in plan.kv_of]


def _qk_and_v(plan: _Plan, site: Site) -> _Starts:
    q = [h * plan.d for h in range(plan.heads)]
    return q, [plan.q_width + start for start in q], [h * plan.d_v for h in range(plan.heads)]


def _shared_qk(plan: _Plan, site: Site) -> _Starts:
    q = [h * plan.d for h in range(plan.heads)]
    return q, q, [h * plan.d_v for h in range(plan.heads)]


# --- tables -------------------------------------------------------------------------------------------

# Which tensor holds a side, the first that is there.
_HOLDERS = {"q": ("q", "qkv", "qk"), "k": ("k", "qkv", "kv", "qk"), "v": ("v", "qkv", "kv")}
_STARTS: dict[str, Callable[[_Plan, Site], _Starts]] = {
    "separate": _separate,
    "k-eq-v": _separate,
    "fused-block": _block,
    "fused-head": _head,
    "fused-group": _group,
    "fused-qvk": _qvk,
    "fused-unequal": _unequal,
    "fused-mlp": _mlp,
    "q+kv": _query_and_kv,
    "qk+v": _qk_and_v,
    "shared-qk": _shared_qk,
}
