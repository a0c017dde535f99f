"""How q·k of each head comes out of the weights: rows per head, the norm in front, the norm behind.

Feeds the weight bounds and nothing else. A term is given only where every factor of q·k is accounted for;
a positional term inside the product, a convolution or an unknown norm gain leaves the layer without terms.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attncli.layout import families
from attncli.layout.geometry import Geometry
from attncli.layout.heads import Heads
from attncli.layout.names import Site, layer_index
from attncli.records import HeadRows, Norm, ScoreSide, ScoreTerm, Tensor


class Surroundings(NamedTuple):
    """What the rest of the checkpoint says that a site alone does not: every tensor by name, and the family.

    `gain_known`: whether a norm's weight is known to be its gain (GGUF stores gains; the family says).
    """

    tensors: Mapping[str, Tensor]
    model_type: str
    is_gguf: bool
    settings: Mapping[str, Any]
    sorted_names: Sequence[str]

    @property
    def plus_one(self) -> bool:
        return not self.is_gguf and families.gain_is_one_plus_weight(self.model_type) is True

    @property
    def structure_known(self) -> bool:
        """Whether it is known for certain which norm feeds the projections: a proof must not rest on a name."""
        return self.is_gguf or self.model_type in families.NORM_BEFORE_ATTENTION

    @property
    def gain_known(self) -> bool:
        return self.is_gguf or families.gain_is_one_plus_weight(self.model_type) is not None


def score_terms(
    site: Site,
    shape: Geometry,
    heads: Heads,
    around: Surroundings,
    rows: Mapping[str, HeadRows],
    kind: str | None,
) -> tuple[ScoreTerm, ...]:
    """The terms whose sum is q·k, or () where the weights do not determine its size."""
    if site.mechanism != "softmax" or not shape.sliceable or around.model_type in _SCALED_BEHIND_THE_NORM:
        return ()
    if any(tensor.scheme == "lora" for tensor in site.roles.values()):
        return ()  # a change of the weights bounds nothing by itself
    if {"pos_bias", "pos_query", "pos_key", "q_learned", "relative_key"} & set(
        site.roles
    ) or "added_q" in site.roles:
        return ()
    if not heads.heads or not heads.head_dim or not heads.kv_heads:
        return ()
    rotary = families.rotary_factor(around.settings)
    if rotary is None or holds_more_than_is_known(site, around):
        return ()
    before = _input_norm(site, around)
    if heads.layout == "mla":
        return _mla_terms(site, heads, around, before, rotary)
    key_before = _memory_norm(site, around) if kind == "cross" else before
    query, key = rows.get("q"), rows.get("k")
    if query is None or key is None:
        return ()
    after_q, starts_q, sure_q = _after(site, "q_norm", heads, query, around)
    after_k, starts_k, sure_k = _after(site, "k_norm", heads, key, around)
    if not (sure_q and sure_k):
        return ()
    left = ScoreSide(query, before, after_q, starts_q)
    return (ScoreTerm(left, ScoreSide(key, key_before, after_k, starts_k), rotary),)


def holds_more_than_is_known(site: Site, around: Surroundings) -> bool:
    """Whether the attention holds tensors whose part in q·k is not known: a norm per head, a convolution."""
    known = {tensor.name for tensor in site.roles.values()}
    prefix = f"{site.path}.attn_" if around.is_gguf and not site.path.endswith("attn") else f"{site.path}."
    names = around.sorted_names
    first = bisect.bisect_left(names, prefix)
    for name in itertools.takewhile(lambda name: name.startswith(prefix), names[first:]):
        if name not in known and not _HARMLESS.search(name):
            return True
    return False


# --- latent attention ----------------------------------------------------------------------------------


def _mla_terms(
    site: Site, heads: Heads, around: Surroundings, before: Norm | None, factor: float
) -> tuple[ScoreTerm, ...]:
    """Content part over the two latents, rotary part over the query latent and the input."""
    roles = site.roles
    if "kv_b" not in roles or "kv_a" not in roles or heads.gate or not heads.heads or not heads.head_dim:
        return ()
    count, d = heads.heads, heads.head_dim
    kv_norm = _norm(around, roles["kv_a_norm"].name) if "kv_a_norm" in roles else None
    q_role = "q_b" if "q_b" in roles else "q"
    q_norm = (
        (_norm(around, roles["q_a_norm"].name) if "q_a_norm" in roles else None)
        if q_role == "q_b"
        else before
    )
    rank = kv_norm.size if kv_norm else 0
    rope = roles["kv_a"].shape[0] - rank
    nope = d - rope
    if rank <= 0 or rope < 0 or nope <= 0 or heads.v_head_dim is None:
        return ()
    per_head = nope + heads.v_head_dim
    q_name, kv_name = roles[q_role].name, roles["kv_b"].name
    content = ScoreTerm(
        ScoreSide(HeadRows(q_name, tuple(h * d for h in range(count)), nope), q_norm),
        ScoreSide(HeadRows(kv_name, tuple(h * per_head for h in range(count)), nope), kv_norm),
    )
    if rope == 0:
        return (content,)
    rotary = ScoreTerm(
        ScoreSide(HeadRows(q_name, tuple(h * d + nope for h in range(count)), rope), q_norm),
        ScoreSide(HeadRows(roles["kv_a"].name, (rank,) * count, rope), before),
        factor,
    )
    return content, rotary


# --- norms --------------------------------------------------------------------------------------------


def _norm(around: Surroundings, weight: str) -> Norm | None:
    """The norm with that weight; None where its gain cannot be told from its weight."""
    tensor = around.tensors.get(weight)
    if tensor is None or len(tensor.shape) != 1:
        return None
    bias = re.sub(
        r"weight$|scale$|gamma$",
        lambda m: {"weight": "bias", "scale": "bias", "gamma": "beta"}[m.group()],
        weight,
    )
    has_bias = bias != weight and bias in around.tensors
    if not has_bias and not around.gain_known:
        return None
    return Norm(
        "layer" if has_bias else "rms", weight, bias if has_bias else None, around.plus_one, tensor.shape[0]
    )


def _after(
    site: Site, role: str, heads: Heads, rows: HeadRows, around: Surroundings
) -> tuple[Norm | None, tuple[int, ...], bool]:
    """The norm on q or k after its projection, where each head's gain starts, and whether that is certain."""
    count, d = heads.heads or 0, heads.head_dim or 0
    if "logit_scale" in site.roles and len(site.roles["logit_scale"].shape) == 3:
        return Norm("l2", None, size=d), (0,) * count, True  # cosine attention
    tensor = site.roles.get(role)
    if tensor is None:
        return None, (), True
    norm = _norm(around, tensor.name) if len(tensor.shape) == 1 else None
    if len(tensor.shape) == 2 and tensor.shape[1] == d and around.structure_known:
        norm = Norm("rms", tensor.name, None, around.plus_one, d)
        first = [start // heads.head_dim * d if heads.head_dim else 0 for start in rows.starts]
        return norm, tuple(min(start, (tensor.shape[0] - 1) * d) for start in first), True
    if norm is None or not around.structure_known:
        return None, (), False
    if norm.size == d:
        return norm, (0,) * count, True
    full = heads.q if role == "q_norm" else heads.k
    if norm.size == full and heads.layout == "separate" and not heads.gate:
        return norm, rows.starts, True
    return None, (), False


def _input_norm(site: Site, around: Surroundings) -> Norm | None:
    """The norm whose output the query projection reads, where names and structure leave no doubt."""
    tensors = around.tensors
    fused_norm = site.roles.get("qkv")
    if fused_norm is not None:
        inside = fused_norm.name.removesuffix("weight") + "layer_norm_weight"
        if inside in tensors:  # Megatron-Core keeps the norm inside the projection
            return _norm(around, inside)
    block = _block(site.path)
    tail = site.path[len(block) :].lstrip(".")
    dot = f"{block}." if block else ""
    for leaf, fits, needs_final in _PRE_NORMS:
        for param in ("weight", "scale", "gamma"):
            name = f"{dot}{leaf}.{param}"
            if name not in tensors or not re.search(fits, tail):
                continue
            final = needs_final and _has_final_norm(block, tensors)
            # Without a family, only a stack that closes with a norm of its own shows that it is pre-norm.
            if (around.structure_known and (final or not needs_final)) or (final and not around.model_type):
                return _norm(around, name)
    if not around.structure_known:
        return None
    return _previous_block_norm(site, block, around)


def _previous_block_norm(site: Site, block: str, around: Surroundings) -> Norm | None:
    """Post-norm stacks: the attention reads the norm that closes the block before it, or the embedding's."""
    index = layer_index(site.path)
    if index is None or not re.search(r"\.\d+$", block):
        return None
    stack = block[: block.rindex(".")]
    for closing, embedding in _POST_NORMS:
        if f"{block}.{closing}.weight" not in around.tensors:
            continue
        if index > 0:
            return _norm(around, f"{stack}.{index - 1}.{closing}.weight")
        root = re.sub(r"(^|\.)(encoder\.layer|transformer\.layer|encoder\.layers|layers)$", "", stack)
        return _norm(around, f"{root}.{embedding}.weight" if root else f"{embedding}.weight")
    return None


def _memory_norm(site: Site, around: Surroundings) -> Norm | None:
    """The encoder's final norm, which cross-attention keys read."""
    found = re.match(r"(.*?)decoder\.", site.path)
    if found is None:
        return None
    for leaf in ("encoder.layer_norm", "encoder.final_layer_norm", "encoder.norm", "encoder.ln_post"):
        name = f"{found.group(1)}{leaf}.weight"
        if name in around.tensors:
            return _norm(around, name)
    return None


def _block(path: str) -> str:
    """The block that holds the attention: up to the last number of `path`, or its parent."""
    match = re.match(r"(.*[._]\d+|\d+)(?:\.|$)(?!.*[._]\d+(?:\.|$))", path)
    if match:
        return match.group(1)
    return path.rpartition(".")[0]


def _has_final_norm(block: str, tensors: Mapping[str, Tensor]) -> bool:
    """A norm after the whole stack: only pre-norm models have one."""
    stack = re.sub(r"\.\d+$", "", block)
    parents = {stack.rpartition(".")[0], stack, stack.rpartition(".")[0].rpartition(".")[0]}
    return any(
        f"{parent}.{leaf}.weight" in tensors if parent else f"{leaf}.weight" in tensors
        for parent in parents
        for leaf in (
            "layer_norm",
            "ln_f",
            "ln_final",
            "ln_post",
            "final_layer_norm",
            "norm_f",
            "final_layernorm",
            "post_layernorm",
        )
    )


# --- tables -------------------------------------------------------------------------------------------

# Buffers, and what acts on values or output alone.
_HARMLESS = re.compile(
    r"inv_freq|rotary|masked_bias|attn\.bias$|causal_mask|relative_position|\.(o_proj|out_proj|dense|proj|c_proj|wo)\."
    r"|attn_output|attn_norm\.(weight|bias)$|LayerNorm\.(weight|bias)$|g_idx$"
)
# Families that multiply q or k again between norm and product, or that normalise without a weight to see.
_SCALED_BEHIND_THE_NORM = frozenset(
    {"falcon_h1", "muse", "llama4", "llama4_text", "reformer", "longcat_flash", "timesfm", "timesfm2_5"}
)
# (norm beside the attention, where the attention must lie in the block, whether a final norm must prove pre-norm)
_PRE_NORMS: tuple[tuple[str, str, bool], ...] = (
    ("input_layernorm", r"^(self_attn|self_attention|attention|attn|mixer)", False),
    ("attention_norm", r"^attention", False),
    ("attn_norm", r"^(attn|attention|self_attn|)$", False),
    ("ln_attn", r"self_attention", False),
    ("operator_norm", r"self_attn", False),
    ("ln_1", r"^(attn|self_attention)", True),
    ("norm_1", r"^attn", False),
    ("layer_norm1", r"^self_attn", False),
    ("layernorm_before", r"^attention", False),
    ("attn_ln", r"^attn$", False),
    ("cross_attn_ln", r"^cross_attn$", False),
    ("layer_norm", r"^(SelfAttention|EncDecAttention|LocalSelfAttention)$", False),
    ("self_attn_layer_norm", r"^self_attn", True),
    ("encoder_attn_layer_norm", r"^encoder_attn", True),
    ("attention_layernorm", r"^attention", False),
)
# (norm that closes a block, norm of the embeddings) of post-norm encoders
_POST_NORMS: tuple[tuple[str, str], ...] = (
    ("output.LayerNorm", "embeddings.LayerNorm"),
    ("output_layer_norm", "embeddings.LayerNorm"),
)
