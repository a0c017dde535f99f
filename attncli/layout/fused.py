"""Which layout a site has, and how wide q, k and v are inside its tensors.

The order inside a fused tensor comes from the family, from a name that settles it, or from a shape that does;
otherwise it is unknown. The widths follow from the config's counts where they add up, else from what the
output projection reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from attncli.layout import families
from attncli.layout.geometry import Geometry
from attncli.layout.names import Site
from attncli.layout.settings import Settings
from attncli.records import Evidence


class Widths(NamedTuple):
    """Rows of q, k and v; None where unknown. `gate`: q's rows hold an output gate as large as the queries."""

    q: int | None = None
    k: int | None = None
    v: int | None = None
    gate: bool = False


def layout_of(site: Site, shape: Geometry, nodes: Sequence[Settings]) -> tuple[str, Evidence]:
    roles = set(site.roles)
    if site.mechanism != "softmax":
        return site.mechanism, "name"
    if "kv_a" in roles:
        return "mla", "name"
    if "qkv" in roles:
        return _fused_layout(site, shape, nodes)
    if "kv" in roles:
        return ("k-eq-v" if "q_b" in roles else "q+kv"), "name"
    if "qk" in roles:
        leaf = site.roles["qk"].name
        if re.search(r"query_key(\.|$)", leaf) and shape.fused is not None and shape.fused == shape.v:
            return "shared-qk", "shape"
        return "qk+v", "name"
    if {"q", "k", "v"} <= roles or ({"q_learned", "k", "v"} <= roles):
        return "separate", "name"
    if any(tensor.scheme == "lora" for tensor in site.roles.values()):
        return "separate", "name"
    if {"q", "k"} <= roles:
        return "k-eq-v", "name"
    if "q" in roles and not {"k", "v"} & roles:
        return "kv-shared", "name"
    return "incomplete", "name"


def _fused_layout(site: Site, shape: Geometry, nodes: Sequence[Settings]) -> tuple[str, Evidence]:
    name = site.roles["qkv"].name
    if "attn_qkv" in name.split("."):
        # llama.cpp's converter writes [Q|K|V] whatever the source order was.
        return "fused-block", "name"
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf in ("linear1", "to_qkv_mlp_proj") or "attn_out_proj" in (
        site.roles["o"].name.split(".") if "o" in site.roles else ()
    ):
        return "fused-mlp", "name"
    if "attention_biases" in site.roles:  # LeViT and TinyViT: per head, value heads of their own size
        return "fused-unequal", "name"
    if "rel_pos.relative_position_bias_table" in (
        site.roles["relative_bias"].name if "relative_bias" in site.roles else ""
    ):
        # timm's MaxViT and CoAtNet: the TensorFlow port, told by its 3-D table, is the one with [Q|K|V] blocks.
        return ("fused-head" if len(site.roles["relative_bias"].shape) == 2 else "fused-block"), "shape"
    for settings in nodes:
        order = families.fused_order(settings.model_type, settings.raw)
        if order is not None and leaf not in ("in_proj_weight",):
            if (
                leaf == "qkv"
                and order in ("fused-block", "fused-group", "fused-qvk")
                and settings.affinity < 0
            ):
                continue
            return order, "config"
    for pattern, order in _ORDER_BY_NAME:
        if re.search(pattern, name):
            return order, "name"
    return "fused-unknown", "name"


def widths(layout: str, site: Site, shape: Geometry, nodes: Sequence[Settings]) -> Widths:
    """How many rows of the site's tensors are queries, keys and values."""
    if "qkv" in site.roles:
        return _fused_widths(layout, site, shape, nodes)
    if "kv" in site.roles:
        return _key_value_widths(layout, shape)
    if layout == "qk+v":
        half = shape.fused // 2 if shape.fused is not None else None
        return Widths(half, half, shape.v)
    if layout == "shared-qk":
        return Widths(shape.fused, shape.fused, shape.v)
    return Widths(shape.q, shape.k, shape.k if layout == "k-eq-v" else shape.v)


# --- inside one tensor --------------------------------------------------------------------------------


def _fused_widths(layout: str, site: Site, shape: Geometry, nodes: Sequence[Settings]) -> Widths:
    total, out = shape.fused, shape.o_in
    if total is None:
        return Widths()
    if layout == "fused-mlp":
        # Attention works at the model's own width there; the rest of the rows are the MLP's.
        width = shape.q_in if shape.q_in and total > 3 * shape.q_in else None
        return Widths(width, width, width)
    if "gqkv" in site.roles["qkv"].name:
        width = total // 4 if total % 4 == 0 else None
        return Widths(width, width, width, gate=True)
    if layout == "fused-unequal":
        if shape.heads_hint and out and (total - out) % 2 == 0:
            return Widths((total - out) // 2, (total - out) // 2, out)
        return Widths()
    gated = any(families.gated_query(settings.model_type, settings.raw) for settings in nodes)
    for heads, dim, kv, v_dim in _claims(nodes):
        if gated and 2 * (heads + kv) * dim == total:
            return Widths(2 * heads * dim, kv * dim, kv * dim, gate=True)
        if (heads + kv) * dim + kv * v_dim == total:
            return Widths(heads * dim, kv * dim, kv * v_dim)
    for width in (out, *(heads * dim for heads, dim, _, _ in _claims(nodes)), shape.q_in):
        rest = total - width if width else 0
        if width and rest > 0 and rest % 2 == 0 and rest // 2 <= width and width % (rest // 2) == 0:
            return Widths(width, rest // 2, rest // 2)
    if total % 3 == 0 and out is None:
        return Widths(total // 3, total // 3, total // 3)
    return Widths()


def _key_value_widths(layout: str, shape: Geometry) -> Widths:
    queries = shape.q if shape.q is not None else shape.o_in
    rows, out = shape.fused, shape.o_in
    if rows is None or layout == "k-eq-v":
        return Widths(queries, rows, rows)
    if queries is not None and out is not None and rows == queries + out and out != queries:
        return Widths(queries, queries, out)  # LeViT: value heads of their own size
    return Widths(queries, rows // 2, rows // 2)


def _claims(nodes: Sequence[Settings]) -> list[tuple[int, int, int, int]]:
    """(heads, head size, KV heads, value head size) as each node gives them."""
    claims = []
    for settings in nodes:
        for heads in settings.heads:
            for dim in settings.head_dims:
                for kv in settings.kv_heads or (heads,):
                    v_dim = settings.raw.get("v_head_dim")
                    claims.append((heads, dim, kv, v_dim if isinstance(v_dim, int) else dim))
    return claims


# --- tables -------------------------------------------------------------------------------------------

# Names that settle the order of a fused tensor by themselves. The first match wins; no match: unknown.
_ORDER_BY_NAME: tuple[tuple[str, str], ...] = (
    (r"(^|\.)in_proj_weight$", "fused-block"),
    (r"(^|\.)c_attn\.", "fused-block"),
    (r"(^|\.)W_pack\.", "fused-block"),
    (r"(^|\.)att_proj\.", "fused-block"),
    (r"(^|\.)Wqkv\.", "fused-block"),
    (r"(^|\.)wqkv\.", "fused-group"),
    (r"(^|\.)linear_qkv\.", "fused-group"),
    (r"(^|\.)qkv_linear\.", "fused-block"),
    (r"(^|\.)gqkv_proj\.", "fused-block"),
    (
        r"(^|\.)(attn_block|attn_grid)\.attn\.qkv\.",
        "fused-unknown",
    ),  # MaxViT: either order, by a flag no file holds
    (r"(^|\.)self\.in_proj\.", "fused-head"),  # DeBERTa v1
    (r"(^|\.)attn\.attn\.", "fused-group"),  # litgpt before it stored [Q|K|V]
    (
        r"(^|\.)(gpt_neox\.layers|transformer\.h|h)\.\d+\.(attention|self_attention|attn)\.query_key_value\.",
        "fused-group",
    ),
    (r"(^|\.)layers\.\d+\.self_attn\.query_key_value\.", "fused-head"),  # Persimmon
    (
        r"(^|\.)language_model\.(encoder|decoder|transformer)\.layers\.\d+\.(self_)?attention\.query_key_value\.",
        "fused-group",
    ),
    (r"(^|\.)qkv_proj\.", "fused-block"),
    (r"(^|\.)to_qkv\.", "fused-block"),
    (r"(^|\.)(qkv|qkv_[a-z]|w_qkv|[a-z_]*attn_qkv)(\.|$)", "fused-block"),
    (r"(^|\.)queries_keys_values\.", "fused-unequal"),
)
