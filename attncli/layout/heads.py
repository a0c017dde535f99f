"""Heads, KV heads and head size of one site, each with where it is known from, and the order of a fused tensor.

Trust goes config → shapes → options. A config that the shapes refute is not used for the layer: it becomes
an anomaly that names both numbers. Nothing is filled in by habit: no "probably 64".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from attncli.layout import families
from attncli.layout.fused import layout_of, widths
from attncli.layout.geometry import Geometry
from attncli.layout.names import Site
from attncli.layout.settings import Settings
from attncli.records import Anomaly, Evidence


class Options(NamedTuple):
    """What the user says of the model; used where neither config nor shapes say it."""

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None


@dataclass(slots=True)
class Heads:
    """The resolved facts of one layer. Widths in rows; `gate`: q carries an output gate of its own size."""

    layout: str
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    q: int | None = None
    k: int | None = None
    v: int | None = None
    gate: bool = False
    settings: Settings | None = None
    evidence: dict[str, Evidence] = field(default_factory=dict)
    anomalies: list[Anomaly] = field(default_factory=list)


def resolve(site: Site, shape: Geometry, nodes: Sequence[Settings], options: Options) -> Heads:
    """Everything about heads that can be known of `site`."""
    layout, order_evidence = layout_of(site, shape, nodes)
    found = Heads(layout=layout)
    found.evidence["layout"] = order_evidence
    if layout == "mla":
        _resolve_mla(site, found, nodes, options)
        _note_overruled(found, options)
        return found
    found.q, found.k, found.v, found.gate = widths(layout, site, shape, nodes)
    _resolve_plain(site, shape, found, nodes, options)
    _note_overruled(found, options)
    return found


def _note_overruled(found: Heads, options: Options) -> None:
    """An option that config or shapes contradict is not used; it must not be dropped in silence."""
    for option, given, used, key in (
        ("--heads", options.heads, found.heads, "heads"),
        ("--head-dim", options.head_dim, found.head_dim, "head_dim"),
    ):
        known_from = found.evidence.get(key)
        if given is None or used is None or given == used or known_from in (None, "option"):
            continue
        where = found.settings.where if found.settings and known_from == "config" else "the shapes"
        claim = {"claim": str(given), "used": used, "from": where, "rows": found.q or 0}
        found.anomalies.append(Anomaly("option-overruled", option, claim))


# --- plain and grouped heads --------------------------------------------------------------------------


def _resolve_plain(
    site: Site, shape: Geometry, found: Heads, nodes: Sequence[Settings], options: Options
) -> None:
    width = found.q if found.q is not None else (found.k if "q_learned" in site.roles else None)
    if width is None:
        width = shape.o_in if found.k is None and found.v is None else (found.q or found.k or found.v)
    if width is None or width <= 0:
        _from_options_only(found, options)
        return
    query = site.roles["q"].name if "q" in site.roles else ""
    if site.two_streams:
        _from_options_only(found, options)  # two streams meet at a width of their own, which no config names
        return
    if "experts" in query:
        _spread_over_experts(found, nodes)
        return
    match = _config_match(width, shape, found, nodes)
    if match is not None:
        found.settings, found.heads, dim, from_config = match
        found.evidence["heads"] = "config"
        found.head_dim = dim
        found.evidence["head_dim"] = "config" if from_config else "shape"
        if found.q is not None and "qkv" not in site.roles and width == 2 * found.heads * dim:
            found.gate = True
    else:
        found.settings = _describing(nodes, shape, width)
        _from_shapes(width, shape, found)
        _from_options(width, found, options)
    _check_hints(site, shape, found)
    _resolve_kv(found, options)
    if found.v and found.kv_heads and found.layout != "k-eq-v":
        found.v_head_dim = found.v // found.kv_heads


def _config_match(
    width: int, shape: Geometry, found: Heads, nodes: Sequence[Settings]
) -> tuple[Settings, int, int, bool] | None:
    """The node, heads, head size and whether the config itself names that size; None where no node fits."""
    # Of towers that are named alike, the one of this width.
    for settings in sorted(nodes, key=lambda node: (-node.affinity, shape.q_in not in node.hidden)):
        if not settings.heads or not _speaks_of(settings, shape, width):
            continue
        for heads in settings.heads:
            for dim in settings.head_dims:
                if heads * dim == width or (2 * heads * dim == width and _may_gate(settings, shape, width)):
                    return settings, heads, dim, True
        hinted = shape.heads_hint if shape.heads_hint in {*settings.heads, *settings.listed} else None
        heads = hinted or settings.heads[0]
        if width % heads:
            _refute(found, settings, heads, width, f"{heads} heads")
            return None
        dim = width // heads
        if settings.head_dims and dim not in settings.head_dims and dim != shape.head_dim_hint:
            if shape.head_dim_hint:
                continue
            _refute(found, settings, heads, width, f"{heads} heads × head size {settings.head_dims[0]}")
            return None
        if families.gated_query(settings.model_type, settings.raw) and shape.o_in and 2 * shape.o_in == width:
            return settings, heads, dim // 2, False
        return settings, heads, dim, False
    return None


def _speaks_of(settings: Settings, shape: Geometry, width: int) -> bool:
    """Whether the node is about this layer: of its width, and not named for another tower."""
    widths = settings.hidden
    fits = (
        not widths
        or shape.q_in is None
        or shape.q_in in widths
        or width in widths
        or shape.q_in // 2 in widths
    )
    if any(heads * dim == width for heads in settings.heads for dim in settings.head_dims):
        fits = fits or settings.affinity >= 0
    return fits and (settings.affinity >= 0 or shape.q_in in widths)


def _may_gate(settings: Settings, shape: Geometry, width: int) -> bool:
    return families.gated_query(settings.model_type, settings.raw) or (
        shape.o_in is not None and 2 * shape.o_in == width
    )


def _spread_over_experts(found: Heads, nodes: Sequence[Settings]) -> None:
    """JetMoE: each expert holds some of the query heads; the keys are plain and confirm the head size."""
    for settings in nodes:
        for kv in settings.kv_heads:
            for dim in settings.head_dims:
                if kv * dim == found.k:
                    found.settings = settings
                    found.heads, found.kv_heads, found.head_dim = _first(settings.heads), kv, dim
                    found.evidence.update(kv_heads="config", head_dim="config")
                    if found.heads:
                        found.evidence["heads"] = "config"
                    return
        if settings.heads and not settings.head_dims:
            found.settings, found.heads, found.evidence["heads"] = settings, settings.heads[0], "config"
            return


def _describing(nodes: Sequence[Settings], shape: Geometry, width: int) -> Settings | None:
    """The node that speaks of this tower although its head count did not fit."""
    described = [settings for settings in nodes if _speaks_of(settings, shape, width)]
    return described[0] if described else None


def _refute(found: Heads, settings: Settings, heads: int, width: int, claim: str) -> None:
    found.anomalies.append(
        Anomaly(
            "heads-mismatch",
            settings.where,
            {
                "key": settings.keys.get("heads", "heads"),
                "claim": claim,
                "heads": heads,
                "rows": width,
                **({"head_dim": settings.head_dims[0]} if settings.head_dims else {}),
            },
        )
    )


def _from_shapes(width: int, shape: Geometry, found: Heads) -> None:
    heads, dim = shape.heads_hint, shape.head_dim_hint
    if heads is None and dim and shape.o_in and 2 * shape.o_in == width and shape.o_in % dim == 0:
        heads, found.gate = (
            shape.o_in // dim,
            True,
        )  # [q | gate] per head: twice what the output projection reads
    if heads is None and dim and width % dim == 0:
        heads = width // dim
    if heads and width % heads == 0:
        found.heads = heads
        found.evidence["heads"] = "shape"
        per_head = width // heads
        if dim and per_head == 2 * dim and shape.o_in and 2 * shape.o_in == width:
            per_head, found.gate = dim, True
        found.head_dim = per_head
        found.evidence["head_dim"] = "shape"
        if dim and dim != per_head:
            # Two hints that contradict each other prove neither.
            found.heads = found.head_dim = None
            found.evidence.pop("heads")
            found.evidence.pop("head_dim")


def _from_options(width: int, found: Heads, options: Options) -> None:
    if found.heads is not None:
        return
    heads, dim = options.heads, options.head_dim
    if heads is None and dim and width % dim == 0:
        heads = width // dim
    if not heads:
        return
    if width % heads or (dim and heads * dim not in (width, width // 2)):
        claim = f"{heads} heads" + (f" × head size {dim}" if dim else "")
        found.anomalies.append(
            Anomaly("option-mismatch", "--heads", {"claim": claim, "heads": heads, "rows": width})
        )
        return
    found.heads = heads
    found.head_dim = dim or width // heads
    found.evidence["heads"] = "option" if options.heads else "shape"
    found.evidence["head_dim"] = "option" if options.head_dim else "shape"


def _from_options_only(found: Heads, options: Options) -> None:
    if options.heads:
        found.heads, found.evidence["heads"] = options.heads, "option"
    if options.head_dim:
        found.head_dim, found.evidence["head_dim"] = options.head_dim, "option"
    if options.kv_heads:
        found.kv_heads, found.evidence["kv_heads"] = options.kv_heads, "option"


def _check_hints(site: Site, shape: Geometry, found: Heads) -> None:
    """A count that a config gives must not contradict tensors that can mean nothing else."""
    if found.evidence.get("heads") != "config" or found.heads is None:
        return
    if shape.heads_hint and shape.heads_hint != found.heads and found.layout != "fused-unequal":
        contradiction = {"hint": "heads", "value": shape.heads_hint}
    elif (
        shape.head_dim_hint
        and found.head_dim
        and shape.head_dim_hint not in (found.head_dim, 2 * found.head_dim, found.head_dim // 2)
    ):
        contradiction = {"hint": "head size", "value": shape.head_dim_hint}
    else:
        return
    # A list per stage cannot speak for the layers between stages: there the shape alone decides.
    if not (found.settings and found.settings.listed):
        source = found.settings.where if found.settings else "config"
        found.anomalies.append(
            Anomaly(
                "heads-mismatch",
                source,
                {
                    "key": found.settings.keys.get("heads", "heads") if found.settings else "heads",
                    "claim": f"{found.heads} heads of size {found.head_dim}",
                    "heads": found.heads,
                    "rows": found.q or 0,
                    "tensor": shape.hint_source,
                    **contradiction,
                },
            )
        )
    found.heads = shape.heads_hint or (
        found.q // shape.head_dim_hint if found.q and shape.head_dim_hint else None
    )
    found.head_dim = shape.head_dim_hint or (found.q // found.heads if found.q and found.heads else None)
    found.evidence["heads"] = found.evidence["head_dim"] = "shape"


def _resolve_kv(found: Heads, options: Options) -> None:
    if found.layout == "kv-shared" or (found.k is None and found.v is None):
        claimed = _first(found.settings.kv_heads) if found.settings else None
        if claimed:
            found.kv_heads, found.evidence["kv_heads"] = claimed, "config"
        return
    rows = found.k if found.k is not None else found.v
    assert rows is not None
    if found.head_dim is None:
        return
    if rows % found.head_dim:
        claimed = _first(found.settings.kv_heads) if found.settings else None
        # Keys and values may have another head size than queries only with as many heads.
        if found.heads and rows % found.heads == 0 and found.layout in ("fused-unequal", "q+kv"):
            found.kv_heads, found.evidence["kv_heads"] = found.heads, "shape"
            return
        found.anomalies.append(
            Anomaly("kv-mismatch", "k", {"rows": rows, "head_dim": found.head_dim, "kv_heads": claimed})
        )
        return
    count = rows // found.head_dim
    claims = found.settings.kv_heads if found.settings else ()
    found.kv_heads = count
    found.evidence["kv_heads"] = "config" if count in claims else "shape"
    if claims and count not in claims:
        found.anomalies.append(
            Anomaly(
                "kv-mismatch",
                found.settings.where if found.settings else "config",
                {
                    "key": found.settings.keys.get("kv_heads", "kv_heads") if found.settings else "kv_heads",
                    "kv_heads": claims[0],
                    "found": count,
                    "rows": rows,
                    "head_dim": found.head_dim,
                },
            )
        )
    if not claims and found.evidence.get("heads") == "option" and options.kv_heads == count:
        found.evidence["kv_heads"] = "option"
    if options.kv_heads and options.kv_heads != count:
        found.anomalies.append(
            Anomaly(
                "option-mismatch",
                "--kv-heads",
                {"claim": f"{options.kv_heads} KV heads", "heads": options.kv_heads, "rows": rows},
            )
        )


# --- multi-head latent attention ----------------------------------------------------------------------


def _resolve_mla(site: Site, found: Heads, nodes: Sequence[Settings], options: Options) -> None:
    from attncli.layout.geometry import matrix

    roles = site.roles
    rows = {
        role: matrix(role, roles[role], roles).rows for role in ("q", "q_b", "kv_a", "kv_b") if role in roles
    }
    per_head = {role: roles[role].shape for role in ("k_b", "v_b") if role in roles}
    width = rows.get("q_b", rows.get("q"))
    norm = roles.get("kv_a_norm")
    rank = norm.shape[0] if norm is not None and len(norm.shape) == 1 else None
    found.q = width
    found.k = found.v = rows.get("kv_b")
    settings = next((node for node in nodes if node.affinity >= 0), None)
    found.settings = settings
    heads = _first(settings.heads) if settings else None
    evidence: Evidence = "config"
    if "k_b" in per_head and len(per_head["k_b"]) == 3:
        heads, evidence = per_head["k_b"][0], "shape"
    if heads is None and options.heads:
        heads, evidence = options.heads, "option"
    if heads is None or width is None:
        return
    gated = "q_gate_proj" in roles["q_b"].name if "q_b" in roles else False
    if width % heads:
        if settings is not None and evidence == "config":
            _refute(found, settings, heads, width, f"{heads} heads")
        else:
            claim = {"claim": f"{heads} heads", "heads": heads, "rows": width}
            found.anomalies.append(Anomaly("option-mismatch", "--heads", claim))
        return
    found.heads = found.kv_heads = heads
    found.evidence.update(heads=evidence, kv_heads="shape", head_dim="shape")
    found.head_dim = width // heads
    if settings:
        nope, rope = (settings.raw.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim"))
        if isinstance(nope, int) and isinstance(rope, int) and (nope + rope) * heads <= width:
            found.gate = gated or (nope + rope) * heads != width
            found.head_dim = nope + rope
            found.evidence["head_dim"] = "config"
    rope_dim = rows["kv_a"] - rank if rank is not None and rows["kv_a"] > rank else None
    if found.k and rope_dim is not None and found.k % heads == 0:
        found.v_head_dim = found.k // heads - (found.head_dim - rope_dim)
    elif "v_b" in per_head and len(per_head["v_b"]) == 3:
        found.v_head_dim = per_head["v_b"][1]


def _first(values: Sequence[int]) -> int | None:
    return values[0] if values else None
