"""Tensor names, shapes and configs → attention layers. Knows no file formats and reads no tensor data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from attncli.layout import families
from attncli.layout.geometry import Geometry, geometry
from attncli.layout.headlists import joined_heads
from attncli.layout.heads import Heads, Options, resolve
from attncli.layout.names import Site, attention_sites, layer_index, template
from attncli.layout.rows import head_rows
from attncli.layout.scores import Surroundings, holds_more_than_is_known, score_terms
from attncli.layout.settings import SettingsReader
from attncli.records import Anomaly, Config, Evidence, Layer, LayerTensor, Tensor

__all__ = ["LAYOUTS", "Options", "attention_layers"]


def attention_layers(
    tensors: Sequence[Tensor], configs: Sequence[Config] = (), options: Options | None = None
) -> tuple[Layer, ...]:
    """Every attention layer of a checkpoint, in file order of its first tensor, by natural order of its path.

    Facts come from configs, then shapes, then `options`; `Layer.evidence` says which. A layer that is no
    softmax attention (linear attention, state space, deformable) is listed with `kind` None.
    """
    reader = SettingsReader(configs)
    by_name = {tensor.name: tensor for tensor in tensors}
    is_gguf = any(config.source.startswith("GGUF") for config in configs)
    sites = attention_sites(tensors)
    paths = {site.path for site in sites}
    names = sorted(by_name)
    layers = [_layer(site, reader, by_name, names, is_gguf, paths, options or Options()) for site in sites]
    ordered = sorted(joined_heads(layers), key=lambda layer: _natural(layer.path))
    return _without_unexplained_sharing(ordered, reader)


def _without_unexplained_sharing(layers: Sequence[Layer], reader: SettingsReader) -> tuple[Layer, ...]:
    """Layers without k and v, or without v, share them by design or have lost them.

    Shared keys are a tail of the stack; with a config, only where the config says so. Values that are the
    keys are so in every layer of a stack, or the config says that they differ by layer.
    """
    nodes = list(reader.nodes)
    sharing = any(node.get("num_kv_shared_layers") for node in nodes)
    key_is_value = any(node.get("attention_k_eq_v") for node in nodes)
    out = []
    for layer in layers:
        if layer.layout not in ("kv-shared", "k-eq-v"):
            out.append(layer)
            continue
        stack = [other for other in layers if other.stack == layer.stack]
        if layer.layout == "kv-shared" and not sharing:
            tail = [other for other in stack if other.layout == "kv-shared"]
            lost = bool(nodes) or len(tail) < 2 or tail != stack[-len(tail) :]
            out.append(_incomplete(layer, ["k", "v"]) if lost else layer)
        elif layer.layout == "k-eq-v" and not key_is_value and any(o.layout == "separate" for o in stack):
            out.append(_incomplete(layer, ["v"]))
        else:
            out.append(layer)
    return tuple(out)


def _incomplete(layer: Layer, missing: list[str]) -> Layer:
    lost = Anomaly("missing-projection", layer.path, {"missing": missing})
    return replace(layer, layout="incomplete", anomalies=(*layer.anomalies, lost))


def _layer(
    site: Site,
    reader: SettingsReader,
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    is_gguf: bool,
    paths: set[str],
    options: Options,
) -> Layer:
    index = layer_index(site.path)
    nodes = reader.for_layer(site.path, index)
    shape = geometry(site)
    if site.mechanism != "softmax":
        return _bare(site)
    heads = resolve(site, shape, nodes, options)
    settings = heads.settings or (nodes[0] if nodes and nodes[0].affinity >= 0 else None)
    model_type = settings.model_type if settings else reader.model_type
    raw: Mapping[str, Any] = settings.raw if settings else next(iter(reader.nodes), {})
    kind, kind_evidence = _kind(site, shape, paths, tensors)
    evidence: dict[str, Evidence] = {**heads.evidence, "kind": kind_evidence}
    scale, evidence["scale"] = _scale(site, model_type, raw, heads, index, is_gguf)
    rows = head_rows(site, shape, heads, model_type)
    around = Surroundings(tensors, model_type, is_gguf, raw, names)
    anomalies = [*heads.anomalies, *_layout_anomalies(site, heads)]
    if not holds_more_than_is_known(site, around):
        anomalies += _width_anomalies(site, shape, heads)
    return Layer(
        id=site.path or ROOT,
        path=site.path,
        kind=kind,
        layout=heads.layout,
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        scale=scale,
        evidence=evidence,
        tensors=_layer_tensors(site),
        facts=_facts(site, shape, heads, raw, model_type, is_gguf, index),
        score_terms=score_terms(site, shape, heads, around, rows, kind),
        rows=rows,
        anomalies=tuple(anomalies),
        stack=template(site.path),
        index=index,
    )


def _bare(site: Site) -> Layer:
    return Layer(
        id=site.path or ROOT,
        path=site.path,
        kind=None,
        layout=site.mechanism,
        heads=None,
        kv_heads=None,
        head_dim=None,
        scale=None,
        evidence={"layout": "name"},
        tensors=_layer_tensors(site),
        stack=template(site.path),
        index=layer_index(site.path),
    )


def _layer_tensors(site: Site) -> tuple[LayerTensor, ...]:
    order = {role: number for number, role in enumerate(_ROLE_ORDER)}
    ranked = sorted(site.roles.items(), key=lambda item: order.get(item[0].removesuffix("_bias"), len(order)))
    return tuple(
        LayerTensor(role, t.name, t.shape, t.dtype, t.file) for role, t in ranked if role != "buffer"
    )


def _kind(
    site: Site, shape: Geometry, paths: set[str], tensors: Mapping[str, Tensor]
) -> tuple[Any, Evidence]:
    """Self or cross: what the name says, then what the widths of q's and k's inputs say."""
    name = f"{site.path}.{site.spelling}" if site.spelling.startswith(("cross", "self", "enc")) else site.path
    parent, _, last = site.path.rpartition(".")
    if re.search(_CROSS, name):
        return "cross", "name"
    if last == "multihead_attn" and (f"{parent}.self_attn" if parent else "self_attn") in paths:
        return "cross", "name"
    if last == "attn2" and any(p.startswith(f"{parent}.attn1") for p in paths):
        return "cross", "name"
    if any(f"{parent}.{query}" in tensors for query in ("probe", "latent", "latents")):
        return "cross", "name"  # a learned query that pools what the keys come from
    if site.two_streams or "q_learned" in site.roles or "learned_q" in site.roles:
        return "cross", "name"
    if shape.q_in and shape.k_in and shape.q_in != shape.k_in and not {"q_b", "kv_a"} & set(site.roles):
        return "cross", "shape"
    return "self", "name"


def _scale(
    site: Site, model_type: str, raw: Mapping[str, Any], heads: Heads, index: int | None, is_gguf: bool
) -> tuple[float | None, Evidence]:
    if not model_type:
        named = families.query_scale_named(site.path)
        if named is not None:
            return named, "name"
    if "logit_scale" in site.roles:
        return None, "name"
    if "qkv" in site.roles and site.roles["qkv"].name.endswith("in_proj_weight") and heads.head_dim:
        return heads.head_dim**-0.5, "name"  # torch.nn.MultiheadAttention knows no other factor
    return families.scale(model_type, raw, heads.head_dim, index)


def _facts(
    site: Site,
    shape: Geometry,
    heads: Heads,
    raw: Mapping[str, Any],
    model_type: str,
    is_gguf: bool,
    index: int | None,
) -> dict[str, Any]:
    """What differs by design. Only what is there is named."""
    roles = site.roles
    facts: dict[str, Any] = {}
    if heads.gate:
        facts["gate"] = "per-head" if heads.layout in ("separate", "mla", "fused-group") else "block"
    elif "gate" in roles:
        facts["gate"] = "separate"
    if heads.v_head_dim and heads.v_head_dim != heads.head_dim:
        facts["v_head_dim"] = heads.v_head_dim
    if shape.q_in:
        facts["in_features"] = shape.q_in
    if heads.heads is None and heads.q and heads.k and heads.q % heads.k == 0 and heads.q != heads.k:
        facts["queries_per_kv_head"] = heads.q // heads.k
    cap = raw.get("attn_logit_softcapping") or (30.0 if model_type == "grok-1" else None)
    if isinstance(cap, (int, float)) and cap:
        facts["soft_cap"] = float(cap)
    if "sinks" in roles:
        facts["sinks"] = True
    for role, label in (
        ("q_norm", "q norm"),
        ("relative_bias", "relative bias"),
        ("attention_biases", "relative bias"),
        ("pos_bias", "relative position"),
        ("lambda", "differential"),
    ):
        if role in roles:
            facts[label.replace(" ", "_")] = True
    if "logit_scale" in roles and len(roles["logit_scale"].shape) == 3:
        facts["cosine"] = True
    if any(role.endswith("_bias") and role[:-5] in ("q", "k", "v", "qkv", "kv", "qk") for role in roles):
        facts["bias"] = True
    order = _order(site, heads)
    if order is not None:
        facts["order"] = order
    if shape.out_axis == 1:
        facts["orientation"] = "in, out"
    if shape.stacked:
        facts["stacked_layers"] = shape.stacked
    window = _at(raw.get("sliding_window"), index)
    types = raw.get("layer_types")
    if isinstance(types, (list, tuple)) and index is not None and index < len(types):
        facts["layer_type"] = str(types[index])
        if "sliding" not in str(types[index]):
            window = None
    elif raw.get("use_sliding_window") is False:
        window = None
    if isinstance(window, int) and window > 0:
        facts["window"] = window
    if (
        re.search(r"(^|\.)layers\.\d+\.attention$", site.path)
        and "q" in roles
        and roles["q"].name.endswith("wq.weight")
    ) or (is_gguf and model_type in _INTERLEAVED_GGUF):
        facts["rope_order"] = "interleaved"
    if families.kv_head_is_modulo(model_type):
        facts["kv_head_of_query_head"] = "h mod kv_heads"
    if heads.settings is not None and "per_layer" in heads.settings.keys:
        facts["per_layer_heads"] = True
    ranks = {t.quantisation.get("rank") for t in roles.values() if t.scheme == "lora"}
    if ranks:
        facts["adapter"] = f"LoRA of rank {'/'.join(map(str, sorted(r for r in ranks if r)))}"
    schemes = sorted({tensor.scheme for tensor in roles.values() if tensor.scheme not in ("plain", "lora")})
    if schemes:
        facts["quantisation"] = ", ".join(schemes)
    return facts


def _order(site: Site, heads: Heads) -> str | None:
    """What lies where in the rows of a fused tensor, with numbers where they are known."""
    d, v_dim = heads.head_dim, heads.v_head_dim or heads.head_dim
    known = bool(heads.heads and heads.kv_heads and d)
    if heads.layout == "fused-block":
        blocks = [("Q", heads.q), ("K", heads.k), ("V", heads.v)]
        if heads.gate:
            blocks.insert(0, ("gate", heads.q))
        return " | ".join(f"{name} {rows}" if rows else name for name, rows in blocks)
    if heads.layout in ("fused-head", "fused-unequal"):
        return f"{heads.heads} × (q {d}, k {d}, v {v_dim})" if known else "q, k, v per head"
    if heads.layout == "fused-group":
        if not known or not heads.heads or not heads.kv_heads:
            return "queries, key, value per KV head"
        ratio = heads.heads // heads.kv_heads
        queries = f"{ratio} q, {ratio} gate" if heads.gate else f"{ratio} q"
        return f"{heads.kv_heads} × ({queries}, k, v) of {d}"
    if heads.layout == "fused-mlp":
        return "MLP | Q | K | V" if "in_proj" in site.roles["qkv"].name else "Q | K | V | MLP"
    return _FIXED_ORDERS.get(heads.layout)


def _at(value: Any, index: int | None) -> Any:
    if isinstance(value, (list, tuple)):
        return value[index] if index is not None and index < len(value) else None
    return value


def _layout_anomalies(site: Site, heads: Heads) -> list[Anomaly]:
    found = []
    if heads.layout == "incomplete":
        missing = [role for role in ("q", "k", "v") if role not in site.roles]
        found.append(Anomaly("missing-projection", site.path, {"missing": missing}))
    if heads.heads and heads.kv_heads and heads.heads % heads.kv_heads:
        found.append(
            Anomaly("kv-not-dividing", site.path, {"heads": heads.heads, "kv_heads": heads.kv_heads})
        )
    return found


def _width_anomalies(site: Site, shape: Geometry, heads: Heads) -> list[Anomaly]:
    """Tensors of one layer that cannot work together, whatever its siblings look like."""
    found = []
    for role in ("q", "k", "v", "o", "qkv"):
        weight, bias = site.roles.get(role), site.roles.get(f"{role}_bias")
        if weight is None or bias is None or len(weight.shape) != 2 or len(bias.shape) != 1:
            continue
        if bias.shape[0] not in weight.shape:
            evidence = {"role": role, "bias": bias.shape[0], "rows": list(weight.shape)}
            found.append(Anomaly("bias-mismatch", bias.name, evidence))
    if heads.layout != "separate" or not shape.sliceable or not heads.heads or not heads.head_dim:
        return found
    if any(role.startswith("added_") for role in site.roles):
        return found  # a second set of projections shares the output
    if heads.v is not None and heads.kv_heads and heads.v % heads.kv_heads:
        evidence = {"role": "v", "rows": heads.v, "kv_heads": heads.kv_heads}
        found.append(Anomaly("width-mismatch", site.roles["v"].name, evidence))
    read = heads.heads * (heads.v_head_dim or heads.head_dim)
    if shape.o_in is not None and shape.o_in != read and "o_a" not in site.roles and "o" in site.roles:
        evidence = {"role": "o", "columns": shape.o_in, "heads": heads.heads, "expected": read}
        found.append(Anomaly("width-mismatch", site.roles["o"].name, evidence))
    return found


def _natural(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path) if part]


# --- tables -------------------------------------------------------------------------------------------

_CROSS = re.compile(
    r"cross_?attn|cross_?attention|crossattention|encoder_attn|EncDecAttention|inter_attention|encoder_decoder_attention"
    r"|(^|\.)encoder_att(ention)?(\.|$)|src_attn|visual_attention|context_attn|cross_attn_image|encdec_attn|enc_dec_attn"
    r"|attn_[a-z]+_to_[a-z]+|(^|\.)ca(\.|$|_)",
)
_INTERLEAVED_GGUF = frozenset(
    {
        "llama",
        "llama4",
        "deci",
        "baichuan",
        "starcoder",
        "internlm2",
        "minicpm",
        "xverse",
        "command-r",
        "cohere2",
        "olmo",
        "arctic",
        "deepseek",
        "deepseek2",
        "chatglm",
        "granite",
        "granitemoe",
        "mistral3",
        "smollm3",
        "arcee",
        "bailingmoe",
    }
)
_FIXED_ORDERS = {
    "fused-qvk": "4 × (Q | V | K)",
    "fused-rank": "(Q | K | V) per tensor-parallel rank",
    "fused-unknown": "unknown",
    "q+kv": "K | V",
    "qk+v": "Q | K",
}
_ROLE_ORDER = (
    "qkv gate q_a q_a_norm q q_b q_norm qk kv_a kv_a_norm k k_norm kv_b kv k_b v v_b q_learned o_a o "
    "added_q added_k added_v added_o sinks relative_bias attention_biases pos_bias logit_scale lambda"
).split()
# The id of an attention whose tensors have no module in their names at all.
ROOT = "(root)"
# What each layout means, in rows of the output axis: H heads, K KV heads, d head size, r = H/K.
LAYOUTS: dict[str, str] = {
    "separate": "one tensor each for q, k and v",
    "module-per-head": "each head is a module with its own q, k and v",
    "fused-block": "[Q | K | V] blocks: H·d, K·d, K·d rows",
    "fused-head": "[H, 3, d]: q, k, v of head 0, then of head 1, …",
    "fused-group": "[K, r + 2, d]: per KV head its r query heads, its key, its value",
    "fused-qvk": "4 model-parallel blocks of [Q | V | K]",
    "fused-rank": "[Q | K | V] per tensor-parallel rank",
    "fused-unequal": "per head (d, d, d_v): value heads have a size of their own",
    "fused-mlp": "q, k, v and the MLP's input in one tensor",
    "fused-unknown": "one tensor for q, k and v; neither name nor config settles the order",
    "q+kv": "q, and one tensor [K | V]",
    "qk+v": "one tensor [Q | K], and v",
    "shared-qk": "one tensor serves as q and k",
    "mla": "multi-head latent attention: low-rank kv, rotary part apart",
    "k-eq-v": "no v: the keys are the values",
    "kv-shared": "q and o only: keys and values come from another layer",
    "linear-attention": "linear attention: no softmax, so no entropy",
    "ssm": "state-space layer: no attention",
    "deformable": "deformable attention: sampled offsets, no q·k",
    "incomplete": "a projection is missing",
    "functional": "seen in a run: a function of tensors, without weights of its own",
}
