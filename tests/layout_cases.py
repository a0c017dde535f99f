"""Tiny checkpoints of every known attention layout, each with the layers that must be read from it.

One row is one family or naming scheme: names and shapes as the published checkpoints have them, shrunk, and
the settings that lie beside them. Numbers are chosen so that no two readings of a tensor agree by accident:
usually D=24 (hidden), H=6 (query heads), K=2 (key heads), d=5 (head size), so that H·d is not D.
A row lists all its layers: nothing else in it may be taken for attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any


@dataclass(frozen=True)
class OneOf:
    """Any of these is right: the facts leave it open."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class UnknownOrAssumed:
    """The files do not say: None, a guess whose evidence is "assumed", or `value` if it was worked out."""

    value: Any = None


@dataclass(frozen=True)
class Anything:
    """Not judged by this row."""


@dataclass(frozen=True)
class InverseRoot:
    """1/√head_dim of whatever head size was read."""


ANY = Anything()
INVERSE_ROOT = InverseRoot()


@dataclass(frozen=True)
class Expect:
    """One layer. `roles`: role → how its tensor's name ends. `optional`: may be a layer of its own."""

    path: str | OneOf
    kind: str | OneOf | None
    layout: str | OneOf
    heads: Any
    kv_heads: Any
    head_dim: Any
    scale: Any = INVERSE_ROOT
    roles: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True)
class Case:
    """One checkpoint. `metadata_format`: the storage scheme of its tensors ("gguf"); None is plain."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any] | None
    expect: tuple[Expect, ...]
    config_source: str = "config.json"
    dtype: str = "float16"
    metadata_format: str | None = None


def weights(*texts: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes from lines such as `h.{0,1}.attn.c_attn.weight 24 72 +b1`.

    Braces repeat the line for each word in them. `+b` adds the bias of size shape[0], `+b1` that of shape[1].
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for line in "\n".join(texts).splitlines():
        if not line.strip():
            continue
        pattern, *rest = line.split()
        shape = tuple(int(word) for word in rest if not word.startswith("+"))
        for name in _expanded(pattern):
            shapes[name] = shape
            for flag in rest:
                if flag.startswith("+b"):
                    shapes[name.removesuffix("weight") + "bias"] = (shape[int(flag[2:] or 0)],)
    return shapes


def layer(path: str | OneOf, spec: str, scale: Any = INVERSE_ROOT, **settings: Any) -> Expect:
    """One expectation. `spec`: kind, layout, heads, kv_heads, head_dim, e.g. "self fused-group 6 2 5".

    `a|b` is either, `*` not judged, `?` not to be known from these files, `?6` either that or 6.
    """
    kind, layout, heads, kv_heads, head_dim = (_value(word) for word in spec.split())
    return Expect(path, kind, layout, heads, kv_heads, head_dim, scale, **settings)


def layers(path: str, count: int, spec: str, **settings: Any) -> tuple[Expect, ...]:
    """The same expectation for layers 0 … count-1; `{}` in `path` is the number."""
    return tuple(layer(path.format(index), spec, **settings) for index in range(count))


def _value(word: str) -> Any:
    if word == "*":
        return ANY
    if "|" in word:
        return OneOf(tuple(_value(part) for part in word.split("|")))
    if word.startswith("?"):
        return UnknownOrAssumed(int(word[1:]) if word[1:] else None)
    return None if word == "None" else int(word) if word.isdigit() else word


def _expanded(pattern: str) -> list[str]:
    pieces = re.split(r"\{([^}]*)\}", pattern)
    choices = [piece.split(",") if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return ["".join(words) for words in product(*choices)]


# --- what surrounds the attention of a family: never attention itself ----------------------------------

LLAMA_REST = """
model.embed_tokens.weight 64 24
model.layers.{0,1}.mlp.{gate,up}_proj.weight 44 24
model.layers.{0,1}.mlp.down_proj.weight 24 44
model.layers.{0,1}.{input,post_attention}_layernorm.weight 24
model.norm.weight 24
lm_head.weight 64 24
"""
LLAMA_WIDE = """
model.layers.{0,1}.self_attn.q_proj.weight 30 24
model.layers.{0,1}.self_attn.{k,v}_proj.weight 10 24
model.layers.{0,1}.self_attn.o_proj.weight 24 30
"""
LLAMA_ROLES = {"q": ".q_proj.weight", "k": ".k_proj.weight", "v": ".v_proj.weight", "o": ".o_proj.weight"}
OUT_ROLES = {**LLAMA_ROLES, "o": ".out_proj.weight"}
WIDE = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 5, "hidden_size": 24}
BERT_REST = """
embeddings.word_embeddings.weight 64 24
embeddings.position_embeddings.weight 32 24
embeddings.token_type_embeddings.weight 2 24
embeddings.position_ids 1 32
embeddings.LayerNorm.weight 24 +b
encoder.layer.{0,1}.attention.output.LayerNorm.weight 24 +b
encoder.layer.{0,1}.intermediate.dense.weight 44 24 +b
encoder.layer.{0,1}.output.dense.weight 24 44 +b
encoder.layer.{0,1}.output.LayerNorm.weight 24 +b
pooler.dense.weight 24 24 +b
cls.predictions.transform.dense.weight 24 24 +b
cls.predictions.decoder.weight 64 24 +b
cls.seq_relationship.weight 2 24 +b
classifier.out_proj.weight 24 24 +b
"""
BERT = {"num_attention_heads": 6, "hidden_size": 24}
BERT_ROLES = {
    "q": ".self.query.weight",
    "k": ".self.key.weight",
    "v": ".self.value.weight",
    "o": ".output.dense.weight",
}
GPT2_REST = """
wte.weight 64 24
wpe.weight 32 24
h.{0,1}.ln_{1,2}.weight 24 +b
ln_f.weight 24 +b
"""
NANO_REST = """
transformer.wte.weight 64 24
transformer.wpe.weight 32 24
transformer.h.{0,1}.ln_{1,2}.weight 24
transformer.h.{0,1}.mlp.c_fc.weight 44 24
transformer.h.{0,1}.mlp.c_proj.weight 24 44
transformer.ln_f.weight 24
lm_head.weight 64 24
"""
BLOOM_MLP = """
{prefix}.{0,1}.mlp.dense_h_to_4h.weight 44 24 +b
{prefix}.{0,1}.mlp.dense_4h_to_h.weight 24 44 +b
{prefix}.{0,1}.input_layernorm.weight 24 +b
{prefix}.{0,1}.post_attention_layernorm.weight 24 +b
"""
TIMM_REST = """
cls_token 1 1 24
pos_embed 1 17 24
patch_embed.proj.weight 24 3 4 4 +b
blocks.{0,1}.norm{1,2}.weight 24 +b
blocks.{0,1}.mlp.fc1.weight 44 24 +b
blocks.{0,1}.mlp.fc2.weight 24 44 +b
blocks.{0,1}.ls{1,2}.gamma 24
norm.weight 24 +b
head.weight 10 24 +b
"""
MLA_REST = """
model.embed_tokens.weight 64 40
model.layers.{0,1}.{input,post_attention}_layernorm.weight 40
model.layers.0.mlp.{gate,up}_proj.weight 44 40
model.layers.0.mlp.down_proj.weight 40 44
model.layers.1.mlp.gate.weight 3 40
model.layers.1.mlp.gate.e_score_correction_bias 3
model.layers.1.mlp.experts.{0,1,2}.{gate,up}_proj.weight 12 40
model.layers.1.mlp.experts.{0,1,2}.down_proj.weight 40 12
model.layers.1.mlp.shared_experts.{gate,up}_proj.weight 12 40
model.layers.1.mlp.shared_experts.down_proj.weight 40 12
model.norm.weight 40
lm_head.weight 64 40
"""
# H=6, content size 5, rotary size 2, value size 4, ranks 9 and 11.
MLA = {
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "hidden_size": 40,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "kv_lora_rank": 11,
}
GGUF_REST = """
token_embd.weight 64 24
blk.{0,1}.{attn_norm,ffn_norm}.weight 24
blk.{0,1}.{ffn_gate,ffn_up}.weight 44 24
blk.{0,1}.ffn_down.weight 24 44
output_norm.weight 24
output.weight 64 24
rope_freqs.weight 2
"""
MAMBA = """
{prefix}.in_proj.weight 96 24
{prefix}.conv1d.weight 48 1 4 +b
{prefix}.x_proj.weight 34 48
{prefix}.dt_proj.weight 48 2 +b
{prefix}.A_log 48 16
{prefix}.D 48
{prefix}.out_proj.weight 24 48
"""


def at(text: str, prefix: str) -> str:
    """`text` with `{prefix}` filled in; other braces stay."""
    return text.replace("{prefix}", prefix)


# --- separate q, k, v, o -------------------------------------------------------------------------------

SEPARATE: tuple[Case, ...] = (
    Case(
        "llama",
        weights(LLAMA_WIDE, LLAMA_REST),
        {"model_type": "llama", **WIDE},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            roles=LLAMA_ROLES,
            evidence={"heads": "config"},
        ),
    ),
    Case(
        "llama_without_config",
        weights(LLAMA_WIDE, LLAMA_REST),
        None,
        layers("model.layers.{}.self_attn", 2, "self separate ? ? ?", roles=LLAMA_ROLES),
    ),
    Case(
        "mistral_head_dim_from_hidden_size",
        weights(
            """
            model.layers.{0,1}.self_attn.{q,o}_proj.weight 24 24
            model.layers.{0,1}.self_attn.{k,v}_proj.weight 8 24
            model.layers.{0,1}.self_attn.rotary_emb.inv_freq 2
            """,
            LLAMA_REST,
        ),
        {"model_type": "mistral", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        layers("model.layers.{}.self_attn", 2, "self separate 6 2 4", roles=LLAMA_ROLES),
    ),
    Case(
        "llama_without_num_key_value_heads",
        weights("model.layers.{0,1}.self_attn.{q,k,v,o}_proj.weight 24 24", LLAMA_REST),
        {"model_type": "llama", "num_attention_heads": 6, "hidden_size": 24},
        layers("model.layers.{}.self_attn", 2, "self separate 6 6 4", roles=LLAMA_ROLES),
    ),
    Case(
        "qwen2_bias_on_qkv",
        weights(
            """
            model.layers.{0,1}.self_attn.q_proj.weight 24 24 +b
            model.layers.{0,1}.self_attn.{k,v}_proj.weight 8 24 +b
            model.layers.{0,1}.self_attn.o_proj.weight 24 24
            """,
            LLAMA_REST,
        ),
        {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 4",
            roles={
                **LLAMA_ROLES,
                "q_bias": ".q_proj.bias",
                "k_bias": ".k_proj.bias",
                "v_bias": ".v_proj.bias",
            },
        ),
    ),
    Case(
        "qwen3_head_norms",
        weights(LLAMA_WIDE, LLAMA_REST, "model.layers.{0,1}.self_attn.{q,k}_norm.weight 5"),
        {"model_type": "qwen3", **WIDE},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            roles={**LLAMA_ROLES, "q_norm": ".q_norm.weight", "k_norm": ".k_norm.weight"},
        ),
    ),
    Case(
        "qwen3_without_config",
        weights(LLAMA_WIDE, LLAMA_REST, "model.layers.{0,1}.self_attn.{q,k}_norm.weight 5"),
        None,
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            roles=LLAMA_ROLES,
            evidence={"heads": "shape", "kv_heads": "shape", "head_dim": "shape"},
        ),
    ),
    Case(
        "qwen3_config_without_head_dim_lies",
        # hidden_size // heads would be 4; the norm says 5.
        weights(LLAMA_WIDE, LLAMA_REST, "model.layers.{0,1}.self_attn.{q,k}_norm.weight 5"),
        {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        layers("model.layers.{}.self_attn", 2, "self separate 6 2 5"),
    ),
    Case(
        "olmo2_norm_over_all_heads",
        weights(
            LLAMA_WIDE,
            LLAMA_REST,
            "model.layers.{0,1}.self_attn.q_norm.weight 30",
            "model.layers.{0,1}.self_attn.k_norm.weight 10",
        ),
        {"model_type": "olmo2", **WIDE},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            roles={"q_norm": ".q_norm.weight", "k_norm": ".k_norm.weight"},
        ),
    ),
    Case(
        "olmo2_without_config",
        weights(
            LLAMA_WIDE,
            LLAMA_REST,
            "model.layers.{0,1}.self_attn.q_norm.weight 30",
            "model.layers.{0,1}.self_attn.k_norm.weight 10",
        ),
        None,
        layers("model.layers.{}.self_attn", 2, "self separate ? ? ?"),
    ),
    Case(
        "command_r_plus_norm_per_head",
        weights(
            LLAMA_WIDE,
            LLAMA_REST,
            "model.layers.{0,1}.self_attn.q_norm.weight 6 5",
            "model.layers.{0,1}.self_attn.k_norm.weight 2 5",
        ),
        {
            "model_type": "cohere",
            "use_qk_norm": True,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 24,
        },
        layers("model.layers.{}.self_attn", 2, "self separate 6 2 5", roles={"q_norm": ".q_norm.weight"}),
    ),
    Case(
        "command_r_plus_without_config",
        weights(
            LLAMA_WIDE,
            LLAMA_REST,
            "model.layers.{0,1}.self_attn.q_norm.weight 6 5",
            "model.layers.{0,1}.self_attn.k_norm.weight 2 5",
        ),
        None,
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            evidence={"heads": "shape", "kv_heads": "shape", "head_dim": "shape"},
        ),
    ),
    Case(
        "hunyuan_query_layernorm",
        weights(LLAMA_WIDE, LLAMA_REST, "model.layers.{0,1}.self_attn.{query,key}_layernorm.weight 5"),
        {"model_type": "hunyuan_v1_dense", **WIDE},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            roles={**LLAMA_ROLES, "q_norm": ".query_layernorm.weight", "k_norm": ".key_layernorm.weight"},
        ),
    ),
    Case(
        "lfm2_short_conv_and_attention",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.0.conv.in_proj.weight 72 24
            model.layers.0.conv.out_proj.weight 24 24
            model.layers.0.conv.conv.weight 24 1 3
            model.layers.1.self_attn.q_proj.weight 24 24
            model.layers.1.self_attn.{k,v}_proj.weight 8 24
            model.layers.1.self_attn.out_proj.weight 24 24
            model.layers.1.self_attn.{q,k}_layernorm.weight 4
            model.layers.{0,1}.feed_forward.{w1,w3}.weight 44 24
            model.layers.{0,1}.feed_forward.w2.weight 24 44
            model.layers.{0,1}.{operator_norm,ffn_norm}.weight 24
            model.embedding_norm.weight 24
            """
        ),
        {
            "model_type": "lfm2",
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 24,
            "layer_types": ["conv", "full_attention"],
        },
        (
            layer(
                "model.layers.1.self_attn",
                "self separate 6 2 4",
                roles={**OUT_ROLES, "q_norm": ".q_layernorm.weight", "k_norm": ".k_layernorm.weight"},
            ),
        ),
    ),
    Case(
        "afmoe_output_gate",
        weights(
            LLAMA_WIDE,
            LLAMA_REST,
            "model.layers.{0,1}.self_attn.{q,k}_norm.weight 5",
            "model.layers.{0,1}.self_attn.gate_proj.weight 30 24",
        ),
        {"model_type": "afmoe", **WIDE},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            roles={**LLAMA_ROLES, "gate": ".self_attn.gate_proj.weight"},
            facts={"gate": "separate"},
        ),
    ),
    Case(
        "laguna_gate_per_head",
        weights(
            LLAMA_WIDE,
            LLAMA_REST,
            "model.layers.{0,1}.self_attn.{q,k}_norm.weight 5",
            "model.layers.{0,1}.self_attn.g_proj.weight 6 24",
        ),
        {"model_type": "laguna", **WIDE},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            roles={**LLAMA_ROLES, "gate": ".g_proj.weight"},
            facts={"gate": "separate"},
        ),
    ),
    Case(
        "step3p5_heads_differ_per_layer",
        weights(
            LLAMA_REST,
            """
            model.layers.0.self_attn.q_proj.weight 30 24
            model.layers.0.self_attn.o_proj.weight 24 30
            model.layers.0.self_attn.g_proj.weight 6 24
            model.layers.1.self_attn.q_proj.weight 40 24
            model.layers.1.self_attn.o_proj.weight 24 40
            model.layers.1.self_attn.g_proj.weight 8 24
            model.layers.{0,1}.self_attn.{k,v}_proj.weight 10 24
            model.layers.{0,1}.self_attn.{q,k}_norm.weight 5
            """,
        ),
        {
            "model_type": "step3p5",
            "num_attention_heads": 6,
            "num_sliding_attention_heads": 8,
            "num_attention_groups": 2,
            "head_dim": 5,
            "hidden_size": 24,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        (
            layer("model.layers.0.self_attn", "self separate 6 2 5", facts={"gate": "separate"}),
            layer("model.layers.1.self_attn", "self separate 8 2 5", facts={"gate": "separate"}),
        ),
    ),
    Case(
        "gemma2_soft_cap_and_own_scale",
        weights(LLAMA_WIDE, LLAMA_REST, "model.layers.{0,1}.{pre,post}_feedforward_layernorm.weight 24"),
        {
            "model_type": "gemma2",
            **WIDE,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        layers("model.layers.{}.self_attn", 2, "self separate 6 2 5", scale=0.25, facts={"soft_cap": 50.0}),
    ),
    Case(
        "gemma3_text_tower",
        weights(LLAMA_WIDE, LLAMA_REST, "model.layers.{0,1}.self_attn.{q,k}_norm.weight 5"),
        {"model_type": "gemma3_text", **WIDE, "query_pre_attn_scalar": 64, "attn_logit_softcapping": None},
        layers("model.layers.{}.self_attn", 2, "self separate 6 2 5", scale=0.125),
    ),
    Case(
        "granite_attention_multiplier",
        weights(LLAMA_WIDE, LLAMA_REST),
        {"model_type": "granite", **WIDE, "attention_multiplier": 0.0625},
        layers("model.layers.{}.self_attn", 2, "self separate 6 2 5", scale=0.0625),
    ),
    Case(
        "gpt_oss_sinks",
        weights(
            """
            model.layers.{0,1}.self_attn.q_proj.weight 30 24 +b
            model.layers.{0,1}.self_attn.{k,v}_proj.weight 10 24 +b
            model.layers.{0,1}.self_attn.o_proj.weight 24 30 +b
            model.layers.{0,1}.self_attn.sinks 6
            model.layers.{0,1}.mlp.router.weight 3 24 +b
            model.layers.{0,1}.mlp.experts.gate_up_proj 3 24 88
            model.layers.{0,1}.mlp.experts.gate_up_proj_bias 3 88
            model.layers.{0,1}.mlp.experts.down_proj 3 44 24
            model.layers.{0,1}.{input,post_attention}_layernorm.weight 24
            model.embed_tokens.weight 64 24
            """
        ),
        {"model_type": "gpt_oss", **WIDE},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            roles={**LLAMA_ROLES, "sinks": ".sinks", "o_bias": ".o_proj.bias"},
            facts={"sinks": True},
        ),
    ),
    Case(
        "gpt_oss_without_config",
        # The sinks say how many query heads there are; the rest follows from the shapes.
        weights(LLAMA_WIDE, LLAMA_REST, "model.layers.{0,1}.self_attn.sinks 6"),
        None,
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            facts={"sinks": True},
            evidence={"heads": "shape"},
        ),
    ),
    Case(
        "mimo_v2_flash_value_size_differs",
        weights(
            LLAMA_REST,
            """
            model.layers.{0,1}.self_attn.q_proj.weight 42 24
            model.layers.0.self_attn.k_proj.weight 14 24
            model.layers.0.self_attn.v_proj.weight 10 24
            model.layers.1.self_attn.k_proj.weight 21 24
            model.layers.1.self_attn.v_proj.weight 15 24
            model.layers.1.self_attn.attention_sink_bias 6
            model.layers.{0,1}.self_attn.o_proj.weight 24 30
            """,
        ),
        {
            "model_type": "mimo_v2_flash",
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "swa_num_attention_heads": 6,
            "swa_num_key_value_heads": 3,
            "head_dim": 7,
            "v_head_dim": 5,
            "swa_head_dim": 7,
            "swa_v_head_dim": 5,
            "hidden_size": 24,
            "hybrid_layer_pattern": [0, 1],
        },
        (
            layer("model.layers.0.self_attn", "self separate 6 2 7", facts={"v_head_dim": 5}),
            layer(
                "model.layers.1.self_attn",
                "self separate 6 3 7",
                roles={"sinks": ".attention_sink_bias"},
                facts={"v_head_dim": 5, "sinks": True},
            ),
        ),
    ),
    Case(
        "bitnet_sub_norm",
        weights(LLAMA_WIDE, LLAMA_REST, "model.layers.{0,1}.self_attn.attn_sub_norm.weight 30"),
        {"model_type": "bitnet", **WIDE},
        layers("model.layers.{}.self_attn", 2, "self separate 6 2 5", roles=LLAMA_ROLES),
    ),
    Case(
        "phi_dense",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.{0,1}.self_attn.{q_proj,k_proj,v_proj,dense}.weight 24 24 +b
            model.layers.{0,1}.mlp.fc1.weight 44 24 +b
            model.layers.{0,1}.mlp.fc2.weight 24 44 +b
            model.layers.{0,1}.input_layernorm.weight 24 +b
            """
        ),
        {"model_type": "phi", "num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 24},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 6 4",
            roles={**LLAMA_ROLES, "o": ".self_attn.dense.weight"},
        ),
    ),
    Case(
        "moshi_linear_wrapper",
        weights(
            """
            decoder.model.layers.{0,1}.self_attn.{q,k,v,o}_proj.linear.weight 24 24
            decoder.model.layers.{0,1}.mlp.fc1.weight 44 24
            decoder.model.layers.{0,1}.mlp.fc2.weight 24 22
            decoder.model.layers.{0,1}.input_layernorm.weight 24
            """
        ),
        {"model_type": "moshi", "num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 24},
        layers(
            "decoder.model.layers.{}.self_attn",
            2,
            "self separate 6 6 4",
            roles={"q": ".q_proj.linear.weight", "o": ".o_proj.linear.weight"},
        ),
    ),
    Case(
        "mllama_cross_attention_layer",
        weights(
            LLAMA_REST,
            """
            model.layers.0.self_attn.q_proj.weight 24 24
            model.layers.0.self_attn.{k,v}_proj.weight 8 24
            model.layers.0.self_attn.o_proj.weight 24 24
            model.layers.1.cross_attn.q_proj.weight 24 24
            model.layers.1.cross_attn.{k,v}_proj.weight 8 24
            model.layers.1.cross_attn.o_proj.weight 24 24
            model.layers.1.cross_attn.{q,k}_norm.weight 4
            model.layers.1.cross_attn_attn_gate 1
            model.layers.1.cross_attn_mlp_gate 1
            """,
        ),
        {
            "model_type": "mllama_text_model",
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 24,
            "cross_attention_layers": [1],
        },
        (
            layer("model.layers.0.self_attn", "self separate 6 2 4"),
            layer("model.layers.1.cross_attn", "cross separate 6 2 4", roles={"q_norm": ".q_norm.weight"}),
        ),
    ),
    Case(
        "llava_two_towers_two_configs",
        weights(
            """
            model.vision_tower.vision_model.embeddings.patch_embedding.weight 20 3 4 4
            model.vision_tower.vision_model.encoder.layers.{0,1}.self_attn.{k,v,q,out}_proj.weight 20 20 +b
            model.vision_tower.vision_model.encoder.layers.{0,1}.layer_norm{1,2}.weight 20 +b
            model.vision_tower.vision_model.encoder.layers.{0,1}.mlp.fc1.weight 44 20 +b
            model.vision_tower.vision_model.encoder.layers.{0,1}.mlp.fc2.weight 20 44 +b
            model.multi_modal_projector.linear_{1,2}.weight 24 24 +b
            model.language_model.embed_tokens.weight 64 24
            model.language_model.layers.{0,1}.self_attn.q_proj.weight 30 24
            model.language_model.layers.{0,1}.self_attn.{k,v}_proj.weight 10 24
            model.language_model.layers.{0,1}.self_attn.o_proj.weight 24 30
            model.language_model.layers.{0,1}.mlp.{gate,up}_proj.weight 44 24
            model.language_model.layers.{0,1}.mlp.down_proj.weight 24 44
            """
        ),
        {
            "model_type": "llava",
            "text_config": {"model_type": "mistral", **WIDE},
            "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 4, "hidden_size": 20},
        },
        (
            *layers("model.vision_tower.vision_model.encoder.layers.{}.self_attn", 2, "self separate 4 4 5"),
            *layers("model.language_model.layers.{}.self_attn", 2, "self separate 6 2 5"),
        ),
    ),
    Case(
        "qwen2_vl_fused_vision_separate_text",
        weights(
            LLAMA_REST,
            """
            visual.patch_embed.proj.weight 20 3 2 4 4
            visual.blocks.{0,1}.attn.qkv.weight 60 20 +b
            visual.blocks.{0,1}.attn.proj.weight 20 20 +b
            visual.blocks.{0,1}.norm{1,2}.weight 20 +b
            visual.blocks.{0,1}.mlp.fc1.weight 44 20 +b
            visual.blocks.{0,1}.mlp.fc2.weight 20 44 +b
            visual.merger.mlp.{0,2}.weight 24 24 +b
            model.layers.{0,1}.self_attn.q_proj.weight 24 24 +b
            model.layers.{0,1}.self_attn.{k,v}_proj.weight 8 24 +b
            model.layers.{0,1}.self_attn.o_proj.weight 24 24
            """,
        ),
        {
            "model_type": "qwen2_vl",
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 24,
            "vision_config": {"depth": 2, "embed_dim": 20, "num_heads": 4, "hidden_size": 24},
        },
        (
            *layers("visual.blocks.{}.attn", 2, "self fused-block 4 4 5", roles={"qkv": ".qkv.weight"}),
            *layers("model.layers.{}.self_attn", 2, "self separate 6 2 4"),
        ),
    ),
    Case(
        "bart",
        weights(
            """
            model.shared.weight 64 24
            model.encoder.embed_positions.weight 34 24
            model.encoder.layers.{0,1}.self_attn.{k,v,q,out}_proj.weight 24 24 +b
            model.encoder.layers.{0,1}.self_attn_layer_norm.weight 24 +b
            model.encoder.layers.{0,1}.fc1.weight 44 24 +b
            model.encoder.layers.{0,1}.fc2.weight 24 44 +b
            model.decoder.layers.{0,1}.{self_attn,encoder_attn}.{k,v,q,out}_proj.weight 24 24 +b
            model.decoder.layers.{0,1}.{self_attn,encoder_attn}_layer_norm.weight 24 +b
            model.decoder.layers.{0,1}.fc1.weight 44 24 +b
            model.decoder.layers.{0,1}.fc2.weight 24 44 +b
            final_logits_bias 1 64
            """
        ),
        {"model_type": "bart", "d_model": 24, "encoder_attention_heads": 6, "decoder_attention_heads": 4},
        (
            *layers("model.encoder.layers.{}.self_attn", 2, "self separate 6 6 4", roles=OUT_ROLES),
            *layers("model.decoder.layers.{}.self_attn", 2, "self separate 4 4 6"),
            *layers("model.decoder.layers.{}.encoder_attn", 2, "cross separate 4 4 6", roles=OUT_ROLES),
        ),
    ),
    Case(
        "opt",
        weights(
            """
            model.decoder.embed_tokens.weight 64 20
            model.decoder.embed_positions.weight 34 24
            model.decoder.project_in.weight 24 20
            model.decoder.project_out.weight 20 24
            model.decoder.layers.{0,1}.self_attn.{k,v,q,out}_proj.weight 24 24 +b
            model.decoder.layers.{0,1}.self_attn_layer_norm.weight 24 +b
            model.decoder.layers.{0,1}.fc1.weight 44 24 +b
            model.decoder.layers.{0,1}.fc2.weight 24 44 +b
            lm_head.weight 64 20
            """
        ),
        {"model_type": "opt", "hidden_size": 24, "word_embed_proj_dim": 20, "num_attention_heads": 6},
        layers("model.decoder.layers.{}.self_attn", 2, "self separate 6 6 4", roles=OUT_ROLES),
    ),
    Case(
        "whisper_hf_key_without_bias",
        weights(
            """
            model.encoder.conv{1,2}.weight 24 8 3 +b
            model.encoder.layers.0.self_attn.{v,q,out}_proj.weight 24 24 +b
            model.encoder.layers.0.self_attn.k_proj.weight 24 24
            model.encoder.layers.0.fc1.weight 44 24 +b
            model.encoder.layers.0.fc2.weight 24 44 +b
            model.decoder.layers.0.{self_attn,encoder_attn}.{v,q,out}_proj.weight 24 24 +b
            model.decoder.layers.0.{self_attn,encoder_attn}.k_proj.weight 24 24
            model.decoder.layers.0.fc1.weight 44 24 +b
            model.decoder.layers.0.fc2.weight 24 44 +b
            """
        ),
        {"model_type": "whisper", "d_model": 24, "encoder_attention_heads": 6, "decoder_attention_heads": 4},
        (
            layer("model.encoder.layers.0.self_attn", "self separate 6 6 4", roles=OUT_ROLES),
            layer("model.decoder.layers.0.self_attn", "self separate 4 4 6"),
            layer("model.decoder.layers.0.encoder_attn", "cross separate 4 4 6"),
        ),
    ),
    Case(
        "clip_hf",
        weights(
            """
            logit_scale
            text_model.embeddings.token_embedding.weight 64 20
            text_model.encoder.layers.{0,1}.self_attn.{k,v,q,out}_proj.weight 20 20 +b
            text_model.encoder.layers.{0,1}.mlp.fc1.weight 44 20 +b
            text_model.encoder.layers.{0,1}.mlp.fc2.weight 20 44 +b
            vision_model.embeddings.class_embedding 24
            vision_model.embeddings.patch_embedding.weight 24 3 4 4
            vision_model.encoder.layers.{0,1}.self_attn.{k,v,q,out}_proj.weight 24 24 +b
            vision_model.encoder.layers.{0,1}.mlp.fc1.weight 44 24 +b
            vision_model.encoder.layers.{0,1}.mlp.fc2.weight 24 44 +b
            text_projection.weight 16 20
            visual_projection.weight 16 24
            """
        ),
        {
            "model_type": "clip",
            "text_config": {"num_attention_heads": 5, "hidden_size": 20},
            "vision_config": {"num_attention_heads": 6, "hidden_size": 24},
        },
        (
            *layers("text_model.encoder.layers.{}.self_attn", 2, "self separate 5 5 4", roles=OUT_ROLES),
            *layers("vision_model.encoder.layers.{}.self_attn", 2, "self separate 6 6 4"),
        ),
    ),
    Case(
        "siglip_pooling_head",
        weights(
            """
            logit_scale 1
            logit_bias 1
            vision_model.encoder.layers.0.self_attn.{k,v,q,out}_proj.weight 24 24 +b
            vision_model.encoder.layers.0.mlp.fc1.weight 44 24 +b
            vision_model.encoder.layers.0.mlp.fc2.weight 24 44 +b
            vision_model.head.probe 1 1 24
            vision_model.head.attention.in_proj_weight 72 24
            vision_model.head.attention.in_proj_bias 72
            vision_model.head.attention.out_proj.weight 24 24 +b
            vision_model.head.layernorm.weight 24 +b
            vision_model.head.mlp.fc1.weight 44 24 +b
            vision_model.head.mlp.fc2.weight 24 44 +b
            """
        ),
        {"model_type": "siglip", "vision_config": {"num_attention_heads": 6, "hidden_size": 24}},
        (
            layer("vision_model.encoder.layers.0.self_attn", "self separate 6 6 4"),
            # The probe asks, the patches answer: cross by what it does, self by its module's name.
            layer("vision_model.head.attention", "self|cross fused-block 6 6 4"),
        ),
    ),
    Case(
        "detr_with_resnet_backbone",
        weights(
            """
            model.backbone.conv_encoder.model.conv1.weight 8 3 7 7
            model.backbone.conv_encoder.model.bn1.{weight,bias,running_mean,running_var} 8
            model.backbone.conv_encoder.model.layer1.0.conv{1,2}.weight 8 8 3 3
            model.input_projection.weight 24 8 1 1 +b
            model.query_position_embeddings.weight 10 24
            model.encoder.layers.0.self_attn.{k,v,q,out}_proj.weight 24 24 +b
            model.encoder.layers.0.fc1.weight 44 24 +b
            model.encoder.layers.0.fc2.weight 24 44 +b
            model.decoder.layers.0.{self_attn,encoder_attn}.{k,v,q,out}_proj.weight 24 24 +b
            class_labels_classifier.weight 10 24 +b
            bbox_predictor.layers.{0,1}.weight 24 24 +b
            """
        ),
        {"model_type": "detr", "d_model": 24, "encoder_attention_heads": 6, "decoder_attention_heads": 6},
        (
            layer("model.encoder.layers.0.self_attn", "self separate 6 6 4"),
            layer("model.decoder.layers.0.self_attn", "self separate 6 6 4"),
            layer("model.decoder.layers.0.encoder_attn", "cross separate 6 6 4"),
        ),
    ),
    Case(
        "gpt_neo_unscaled",
        weights(
            """
            transformer.wte.weight 64 24
            transformer.wpe.weight 32 24
            transformer.h.{0,1}.attn.attention.{q,k,v}_proj.weight 24 24
            transformer.h.{0,1}.attn.attention.out_proj.weight 24 24 +b
            transformer.h.{0,1}.attn.attention.bias 1 1 16 16
            transformer.h.{0,1}.attn.attention.masked_bias
            transformer.h.{0,1}.mlp.c_fc.weight 44 24 +b
            transformer.h.{0,1}.mlp.c_proj.weight 24 44 +b
            """
        ),
        {"model_type": "gpt_neo", "num_heads": 6, "hidden_size": 24, "num_layers": 2},
        layers(
            "transformer.h.{}.attn.attention",
            2,
            "self separate 6 6 4",
            scale=1.0,
            roles={**OUT_ROLES, "o_bias": ".out_proj.bias"},
        ),
    ),
    Case(
        "gptj",
        weights(
            """
            transformer.wte.weight 64 24
            transformer.h.{0,1}.attn.{q,k,v,out}_proj.weight 24 24
            transformer.h.{0,1}.attn.bias 1 1 16 16
            transformer.h.{0,1}.attn.masked_bias
            transformer.h.{0,1}.mlp.fc_in.weight 44 24 +b
            transformer.h.{0,1}.mlp.fc_out.weight 24 44 +b
            transformer.h.{0,1}.ln_1.weight 24 +b
            lm_head.weight 64 24 +b
            """
        ),
        {"model_type": "gptj", "n_head": 6, "n_embd": 24, "n_layer": 2, "rotary_dim": 2},
        layers("transformer.h.{}.attn", 2, "self separate 6 6 4", roles=OUT_ROLES),
    ),
    Case(
        "wav2vec2",
        weights(
            """
            wav2vec2.feature_extractor.conv_layers.{0,1}.conv.weight 8 8 3
            wav2vec2.feature_projection.projection.weight 24 8 +b
            wav2vec2.encoder.pos_conv_embed.conv.weight_g 1 1 8
            wav2vec2.encoder.pos_conv_embed.conv.weight_v 24 2 8
            wav2vec2.encoder.layers.{0,1}.attention.{k,v,q,out}_proj.weight 24 24 +b
            wav2vec2.encoder.layers.{0,1}.feed_forward.intermediate_dense.weight 44 24 +b
            wav2vec2.encoder.layers.{0,1}.feed_forward.output_dense.weight 24 44 +b
            wav2vec2.masked_spec_embed 24
            lm_head.weight 32 24 +b
            """
        ),
        {"model_type": "wav2vec2", "num_attention_heads": 6, "hidden_size": 24},
        layers("wav2vec2.encoder.layers.{}.attention", 2, "self separate 6 6 4", roles=OUT_ROLES),
    ),
    Case(
        "wavlm_gated_relative_bias",
        weights(
            """
            encoder.layers.{0,1}.attention.{k,v,q,out}_proj.weight 24 24 +b
            encoder.layers.{0,1}.attention.gru_rel_pos_const 1 6 1 1
            encoder.layers.{0,1}.attention.gru_rel_pos_linear.weight 8 4 +b
            encoder.layers.0.attention.rel_attn_embed.weight 320 6
            encoder.layers.{0,1}.feed_forward.intermediate_dense.weight 44 24 +b
            encoder.layers.{0,1}.feed_forward.output_dense.weight 24 44 +b
            """
        ),
        {"model_type": "wavlm", "num_attention_heads": 6, "hidden_size": 24},
        layers("encoder.layers.{}.attention", 2, "self separate 6 6 4", roles=OUT_ROLES),
    ),
    Case(
        "fairseq_bias_kv",
        weights(
            """
            encoder.sentence_encoder.embed_tokens.weight 33 24
            encoder.sentence_encoder.layers.{0,1}.self_attn.{k,v,q,out}_proj.weight 24 24 +b
            encoder.sentence_encoder.layers.{0,1}.self_attn.bias_{k,v} 1 1 24
            encoder.sentence_encoder.layers.{0,1}.fc1.weight 44 24 +b
            encoder.sentence_encoder.layers.{0,1}.fc2.weight 24 44 +b
            """
        ),
        {"encoder_attention_heads": 6, "encoder_embed_dim": 24, "arch": "roberta_large"},
        layers("encoder.sentence_encoder.layers.{}.self_attn", 2, "self separate 6 6 4", roles=OUT_ROLES),
        config_source="args in checkpoint",
    ),
    Case(
        "bert",
        weights(
            BERT_REST,
            """
            encoder.layer.{0,1}.attention.self.{query,key,value}.weight 24 24 +b
            encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            """,
        ),
        {"model_type": "bert", **BERT},
        layers(
            "encoder.layer.{}.attention",
            2,
            "self separate 6 6 4",
            roles={**BERT_ROLES, "o": ".attention.output.dense.weight"},
        ),
    ),
    Case(
        "bert_without_config",
        weights(
            BERT_REST,
            """
            encoder.layer.{0,1}.attention.self.{query,key,value}.weight 24 24 +b
            encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            """,
        ),
        None,
        layers("encoder.layer.{}.attention", 2, "self separate ? ? ?"),
    ),
    Case(
        "blip_text_crossattention",
        weights(
            """
            text_decoder.bert.encoder.layer.0.attention.self.{query,key,value}.weight 24 24 +b
            text_decoder.bert.encoder.layer.0.attention.output.dense.weight 24 24 +b
            text_decoder.bert.encoder.layer.0.crossattention.self.query.weight 24 24 +b
            text_decoder.bert.encoder.layer.0.crossattention.self.{key,value}.weight 24 20 +b
            text_decoder.bert.encoder.layer.0.crossattention.output.dense.weight 24 24 +b
            text_decoder.bert.encoder.layer.0.intermediate.dense.weight 44 24 +b
            text_decoder.bert.encoder.layer.0.output.dense.weight 24 44 +b
            vision_model.encoder.layers.0.self_attn.qkv.weight 60 20 +b
            vision_model.encoder.layers.0.self_attn.projection.weight 20 20 +b
            """
        ),
        {
            "model_type": "blip",
            "text_config": {"num_attention_heads": 6, "hidden_size": 24, "encoder_hidden_size": 20},
            "vision_config": {"num_attention_heads": 4, "hidden_size": 20},
        },
        (
            layer("text_decoder.bert.encoder.layer.0.attention", "self separate 6 6 4"),
            layer("text_decoder.bert.encoder.layer.0.crossattention", "cross separate 6 6 4"),
            layer(
                "vision_model.encoder.layers.0.self_attn",
                "self fused-block 4 4 5",
                roles={"qkv": ".qkv.weight", "o": ".projection.weight"},
            ),
        ),
    ),
    Case(
        "albert_one_shared_layer",
        weights(
            """
            albert.embeddings.word_embeddings.weight 64 8
            albert.encoder.embedding_hidden_mapping_in.weight 24 8 +b
            albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{query,key}.weight 24 24 +b
            albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{value,dense}.weight 24 24 +b
            albert.encoder.albert_layer_groups.0.albert_layers.0.attention.LayerNorm.weight 24 +b
            albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight 44 24 +b
            albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight 24 44 +b
            albert.pooler.weight 24 24 +b
            """
        ),
        {"model_type": "albert", **BERT},
        (
            layer(
                "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
                "self separate 6 6 4",
                roles={"q": ".query.weight", "o": ".dense.weight"},
            ),
        ),
    ),
    Case(
        "mpnet_relative_bias_outside",
        weights(
            """
            mpnet.encoder.layer.{0,1}.attention.attn.{q,k,v,o}.weight 24 24 +b
            mpnet.encoder.layer.{0,1}.attention.LayerNorm.weight 24 +b
            mpnet.encoder.layer.{0,1}.intermediate.dense.weight 44 24 +b
            mpnet.encoder.layer.{0,1}.output.dense.weight 24 44 +b
            mpnet.encoder.relative_attention_bias.weight 32 6
            """
        ),
        {"model_type": "mpnet", **BERT},
        layers(
            "mpnet.encoder.layer.{}.attention.attn",
            2,
            "self separate 6 6 4",
            roles={"q": ".attn.q.weight", "o": ".attn.o.weight"},
        ),
    ),
    Case(
        "longformer_global_projections",
        weights(
            BERT_REST,
            """
            encoder.layer.{0,1}.attention.self.{query,key,value}.weight 24 24 +b
            encoder.layer.{0,1}.attention.self.{query_global,key_global,value_global}.weight 24 24 +b
            encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            """,
        ),
        {"model_type": "longformer", **BERT, "attention_window": [4, 4]},
        layers("encoder.layer.{}.attention", 2, "self separate 6 6 4", roles=BERT_ROLES),
    ),
    Case(
        "luke_entity_queries",
        weights(
            BERT_REST,
            """
            encoder.layer.{0,1}.attention.self.{query,key,value}.weight 24 24 +b
            encoder.layer.{0,1}.attention.self.{w2e_query,e2w_query,e2e_query}.weight 24 24 +b
            encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            """,
        ),
        {"model_type": "luke", **BERT},
        layers("encoder.layer.{}.attention", 2, "self separate 6 6 4", roles=BERT_ROLES),
    ),
    Case(
        "lilt_layout_stream",
        weights(
            """
            encoder.layer.0.attention.self.{query,key,value}.weight 24 24 +b
            encoder.layer.0.attention.self.{layout_query,layout_key,layout_value}.weight 6 6 +b
            encoder.layer.0.attention.output.dense.weight 24 24 +b
            encoder.layer.0.attention.layout_output.dense.weight 6 6 +b
            encoder.layer.0.intermediate.dense.weight 44 24 +b
            encoder.layer.0.output.dense.weight 24 44 +b
            encoder.layer.0.layout_intermediate.dense.weight 11 6 +b
            encoder.layer.0.layout_output.dense.weight 6 11 +b
            """
        ),
        {"model_type": "lilt", **BERT, "channel_shrink_ratio": 4},
        (
            layer("encoder.layer.0.attention", "self separate 6 6 4", roles=BERT_ROLES),
            layer("encoder.layer.0.attention", "self separate 6 6 1", scale=ANY, optional=True),
        ),
    ),
    Case(
        "lxmert_att",
        weights(
            """
            lxmert.encoder.layer.0.attention.self.{query,key,value}.weight 24 24 +b
            lxmert.encoder.layer.0.attention.output.dense.weight 24 24 +b
            lxmert.encoder.x_layers.0.visual_attention.att.{query,key,value}.weight 24 24 +b
            lxmert.encoder.x_layers.0.visual_attention.output.dense.weight 24 24 +b
            lxmert.encoder.x_layers.0.lang_self_att.self.{query,key,value}.weight 24 24 +b
            lxmert.encoder.x_layers.0.lang_self_att.output.dense.weight 24 24 +b
            lxmert.encoder.x_layers.0.lang_inter.dense.weight 44 24 +b
            lxmert.encoder.x_layers.0.lang_output.dense.weight 24 44 +b
            lxmert.encoder.visn_fc.visn_fc.weight 24 20 +b
            """
        ),
        {"model_type": "lxmert", **BERT},
        (
            layer("lxmert.encoder.layer.0.attention", "self separate 6 6 4"),
            # The module carries both directions across the modalities; only the code says so.
            layer("lxmert.encoder.x_layers.0.visual_attention", "self|cross separate 6 6 4"),
            layer("lxmert.encoder.x_layers.0.lang_self_att", "self separate 6 6 4"),
        ),
    ),
    Case(
        "vit_on_disk",
        weights(
            """
            vit.embeddings.cls_token 1 1 24
            vit.embeddings.patch_embeddings.projection.weight 24 3 4 4 +b
            vit.encoder.layer.{0,1}.attention.attention.{query,key,value}.weight 24 24 +b
            vit.encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            vit.encoder.layer.{0,1}.intermediate.dense.weight 44 24 +b
            vit.encoder.layer.{0,1}.output.dense.weight 24 44 +b
            vit.encoder.layer.{0,1}.layernorm_{before,after}.weight 24 +b
            classifier.weight 10 24 +b
            """
        ),
        {"model_type": "vit", **BERT},
        layers(
            "vit.encoder.layer.{}.attention",
            2,
            "self separate 6 6 4",
            roles={"q": ".attention.attention.query.weight", "o": ".attention.output.dense.weight"},
        ),
    ),
    Case(
        "beit_on_disk_no_key_bias",
        weights(
            """
            beit.encoder.layer.{0,1}.attention.attention.{query,value}.weight 24 24 +b
            beit.encoder.layer.{0,1}.attention.attention.key.weight 24 24
            beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table 52 6
            beit.encoder.layer.1.attention.attention.relative_position_bias.relative_position_bias_table 52 6
            beit.encoder.layer.{0,1}.attention.attention.relative_position_bias.relative_position_index 17 17
            beit.encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            beit.encoder.layer.{0,1}.intermediate.dense.weight 44 24 +b
            beit.encoder.layer.{0,1}.output.dense.weight 24 44 +b
            beit.encoder.layer.{0,1}.lambda_{1,2} 24
            """
        ),
        None,
        layers(
            "beit.encoder.layer.{}.attention",
            2,
            "self separate 6 6 4",
            roles={"relative_bias": ".relative_position_bias_table"},
            evidence={"heads": "shape"},
        ),
    ),
    Case(
        "swin_hf_heads_from_bias_table",
        weights(
            """
            swin.encoder.layers.0.blocks.0.attention.self.{query,key,value}.weight 24 24 +b
            swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table 49 3
            swin.encoder.layers.0.blocks.0.attention.self.relative_position_index 16 16
            swin.encoder.layers.0.blocks.0.attention.output.dense.weight 24 24 +b
            swin.encoder.layers.0.blocks.0.intermediate.dense.weight 96 24 +b
            swin.encoder.layers.0.blocks.0.output.dense.weight 24 96 +b
            swin.encoder.layers.0.downsample.reduction.weight 48 96
            swin.encoder.layers.1.blocks.0.attention.self.{query,key,value}.weight 48 48 +b
            swin.encoder.layers.1.blocks.0.attention.self.relative_position_bias_table 49 6
            swin.encoder.layers.1.blocks.0.attention.self.relative_position_index 16 16
            swin.encoder.layers.1.blocks.0.attention.output.dense.weight 48 48 +b
            """
        ),
        {"model_type": "swin", "embed_dim": 24, "num_heads": [3, 6], "depths": [1, 1], "hidden_size": 48},
        (
            layer(
                "swin.encoder.layers.0.blocks.0.attention",
                "self separate 3 3 8",
                roles={"relative_bias": ".relative_position_bias_table"},
            ),
            layer("swin.encoder.layers.1.blocks.0.attention", "self separate 6 6 8"),
        ),
    ),
    Case(
        "swinv2_hf_cosine",
        weights(
            """
            encoder.layers.0.blocks.0.attention.self.logit_scale 3 1 1
            encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.0.weight 512 2 +b
            encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.2.weight 3 512
            encoder.layers.0.blocks.0.attention.self.{query,value}.weight 24 24 +b
            encoder.layers.0.blocks.0.attention.self.key.weight 24 24
            encoder.layers.0.blocks.0.attention.output.dense.weight 24 24 +b
            encoder.layers.0.blocks.0.intermediate.dense.weight 96 24 +b
            encoder.layers.0.blocks.0.output.dense.weight 24 96 +b
            """
        ),
        {"model_type": "swinv2", "embed_dim": 24, "num_heads": [3], "depths": [1], "hidden_size": 24},
        (
            layer(
                "encoder.layers.0.blocks.0.attention",
                "self separate 3 3 8",
                scale=None,
                roles={"logit_scale": ".logit_scale"},
            ),
        ),
    ),
    Case(
        "t5",
        weights(
            """
            shared.weight 64 24
            {encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,k,v}.weight 30 24
            {encoder,decoder}.block.{0,1}.layer.0.SelfAttention.o.weight 24 30
            {encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight 32 6
            {encoder,decoder}.block.{0,1}.layer.0.layer_norm.weight 24
            decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v}.weight 30 24
            decoder.block.{0,1}.layer.1.EncDecAttention.o.weight 24 30
            encoder.block.{0,1}.layer.1.DenseReluDense.wi.weight 44 24
            encoder.block.{0,1}.layer.1.DenseReluDense.wo.weight 24 44
            decoder.block.{0,1}.layer.2.DenseReluDense.wi_{0,1}.weight 44 24
            decoder.block.{0,1}.layer.2.DenseReluDense.wo.weight 24 44
            """
        ),
        {"model_type": "t5", "d_model": 24, "d_kv": 5, "num_heads": 6, "d_ff": 44},
        (
            *layers(
                "encoder.block.{}.layer.0.SelfAttention",
                2,
                "self separate 6 6 5",
                scale=1.0,
                roles={"q": ".q.weight", "k": ".k.weight", "v": ".v.weight", "o": ".o.weight"},
            ),
            *layers("decoder.block.{}.layer.0.SelfAttention", 2, "self separate 6 6 5", scale=1.0),
            *layers("decoder.block.{}.layer.1.EncDecAttention", 2, "cross separate 6 6 5", scale=1.0),
        ),
    ),
    Case(
        "umt5_bias_in_every_layer_without_config",
        weights(
            """
            shared.weight 64 24
            encoder.block.{0,1}.layer.0.SelfAttention.{q,k,v}.weight 30 24
            encoder.block.{0,1}.layer.0.SelfAttention.o.weight 24 30
            encoder.block.{0,1}.layer.0.SelfAttention.relative_attention_bias.weight 32 6
            encoder.block.{0,1}.layer.1.DenseReluDense.wi_{0,1}.weight 44 24
            encoder.block.{0,1}.layer.1.DenseReluDense.wo.weight 24 44
            """
        ),
        None,
        layers(
            "encoder.block.{}.layer.0.SelfAttention",
            2,
            "self separate 6 6 5",
            scale=OneOf((1.0, None)),
            roles={"relative_bias": ".relative_attention_bias.weight"},
            evidence={"heads": "shape"},
        ),
    ),
    Case(
        "mt5",
        weights(
            """
            shared.weight 64 24
            decoder.block.0.layer.0.SelfAttention.{q,k,v}.weight 30 24
            decoder.block.0.layer.0.SelfAttention.o.weight 24 30
            decoder.block.0.layer.1.EncDecAttention.{q,k,v}.weight 30 24
            decoder.block.0.layer.1.EncDecAttention.o.weight 24 30
            decoder.block.0.layer.2.DenseReluDense.wi_{0,1}.weight 44 24
            decoder.block.0.layer.2.DenseReluDense.wo.weight 24 44
            """
        ),
        {"model_type": "mt5", "d_model": 24, "d_kv": 5, "num_heads": 6},
        (
            layer("decoder.block.0.layer.0.SelfAttention", "self separate 6 6 5", scale=1.0),
            layer("decoder.block.0.layer.1.EncDecAttention", "cross separate 6 6 5", scale=1.0),
        ),
    ),
    Case(
        "longt5_local",
        weights(
            """
            encoder.block.{0,1}.layer.0.LocalSelfAttention.{q,k,v}.weight 30 24
            encoder.block.{0,1}.layer.0.LocalSelfAttention.o.weight 24 30
            encoder.block.0.layer.0.LocalSelfAttention.relative_attention_bias.weight 32 6
            encoder.block.{0,1}.layer.1.DenseReluDense.wi_{0,1}.weight 44 24
            encoder.block.{0,1}.layer.1.DenseReluDense.wo.weight 24 44
            """
        ),
        {"model_type": "longt5", "d_model": 24, "d_kv": 5, "num_heads": 6},
        layers("encoder.block.{}.layer.0.LocalSelfAttention", 2, "self separate 6 6 5", scale=1.0),
    ),
    Case(
        "pix2struct",
        weights(
            """
            encoder.encoder.layer.0.attention.{query,key,value}.weight 20 20
            encoder.encoder.layer.0.attention.output.weight 20 20
            encoder.encoder.layer.0.mlp.wi_{0,1}.weight 44 20
            encoder.encoder.layer.0.mlp.wo.weight 20 44
            decoder.layer.0.self_attention.attention.{query,key,value}.weight 24 24
            decoder.layer.0.self_attention.attention.output.weight 24 24
            decoder.layer.0.self_attention.attention.relative_attention_bias.weight 32 6
            decoder.layer.0.encoder_decoder_attention.attention.{query,key,value}.weight 24 24
            decoder.layer.0.encoder_decoder_attention.attention.output.weight 24 24
            decoder.layer.0.mlp.DenseReluDense.wi_{0,1}.weight 44 24
            decoder.layer.0.mlp.DenseReluDense.wo.weight 24 44
            """
        ),
        {
            "model_type": "pix2struct",
            "text_config": {"num_heads": 6, "hidden_size": 24, "d_kv": 4},
            "vision_config": {"num_attention_heads": 4, "hidden_size": 20, "d_kv": 5},
        },
        (
            layer(
                "encoder.encoder.layer.0.attention",
                "self separate 4 4 5",
                scale=1.0,
                roles={"o": ".attention.output.weight"},
            ),
            layer("decoder.layer.0.self_attention.attention", "self separate 6 6 4", scale=1.0),
            layer("decoder.layer.0.encoder_decoder_attention.attention", "cross separate 6 6 4", scale=1.0),
        ),
    ),
    Case(
        "distilbert",
        weights(
            """
            distilbert.embeddings.word_embeddings.weight 64 24
            distilbert.transformer.layer.{0,1}.attention.{q,k,v,out}_lin.weight 24 24 +b
            distilbert.transformer.layer.{0,1}.sa_layer_norm.weight 24 +b
            distilbert.transformer.layer.{0,1}.ffn.lin1.weight 44 24 +b
            distilbert.transformer.layer.{0,1}.ffn.lin2.weight 24 44 +b
            vocab_transform.weight 24 24 +b
            """
        ),
        {"model_type": "distilbert", "n_heads": 6, "dim": 24, "n_layers": 2},
        layers(
            "distilbert.transformer.layer.{}.attention",
            2,
            "self separate 6 6 4",
            roles={"q": ".q_lin.weight", "o": ".out_lin.weight"},
        ),
    ),
    Case(
        "xlm",
        weights(
            """
            transformer.embeddings.weight 64 24
            transformer.attentions.{0,1}.{q,k,v,out}_lin.weight 24 24 +b
            transformer.layer_norm{1,2}.{0,1}.weight 24 +b
            transformer.ffns.{0,1}.lin1.weight 44 24 +b
            transformer.ffns.{0,1}.lin2.weight 24 44 +b
            pred_layer.proj.weight 64 24 +b
            """
        ),
        {"model_type": "xlm", "n_heads": 6, "emb_dim": 24, "n_layers": 2},
        layers("transformer.attentions.{}", 2, "self separate 6 6 4", roles={"o": ".out_lin.weight"}),
    ),
    Case(
        "ctrl",
        weights(
            """
            transformer.w.weight 64 24
            transformer.h.{0,1}.multi_head_attention.{Wq,Wk,Wv,dense}.weight 24 24 +b
            transformer.h.{0,1}.ffn.0.weight 44 24 +b
            transformer.h.{0,1}.ffn.2.weight 24 44 +b
            transformer.h.{0,1}.layernorm{1,2}.weight 24 +b
            """
        ),
        {"model_type": "ctrl", "n_head": 6, "n_embd": 24, "n_layer": 2},
        layers(
            "transformer.h.{}.multi_head_attention",
            2,
            "self separate 6 6 4",
            roles={"q": ".Wq.weight", "k": ".Wk.weight", "v": ".Wv.weight", "o": ".dense.weight"},
        ),
    ),
    Case(
        "deberta_v2",
        weights(
            """
            deberta.embeddings.word_embeddings.weight 64 24
            deberta.encoder.rel_embeddings.weight 16 24
            deberta.encoder.layer.{0,1}.attention.self.{query_proj,key_proj,value_proj}.weight 24 24 +b
            deberta.encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            deberta.encoder.layer.{0,1}.intermediate.dense.weight 44 24 +b
            deberta.encoder.layer.{0,1}.output.dense.weight 24 44 +b
            """
        ),
        {
            "model_type": "deberta-v2",
            **BERT,
            "relative_attention": True,
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
        },
        layers(
            "deberta.encoder.layer.{}.attention",
            2,
            "self separate 6 6 4",
            scale=1 / math.sqrt(3 * 4),
            roles={"q": ".query_proj.weight", "o": ".attention.output.dense.weight"},
        ),
    ),
    Case(
        "deberta_v2_own_position_projections",
        weights(
            """
            deberta.encoder.layer.0.attention.self.{query_proj,key_proj,value_proj}.weight 24 24 +b
            deberta.encoder.layer.0.attention.self.{pos_key_proj,pos_query_proj}.weight 24 24 +b
            deberta.encoder.layer.0.attention.output.dense.weight 24 24 +b
            deberta.encoder.layer.0.intermediate.dense.weight 44 24 +b
            deberta.encoder.layer.0.output.dense.weight 24 44 +b
            """
        ),
        {
            "model_type": "deberta-v2",
            **BERT,
            "relative_attention": True,
            "share_att_key": False,
            "pos_att_type": "p2c|c2p",
        },
        (
            layer(
                "deberta.encoder.layer.0.attention",
                "self separate 6 6 4",
                scale=1 / math.sqrt(3 * 4),
                roles={"q": ".self.query_proj.weight", "k": ".self.key_proj.weight"},
            ),
        ),
    ),
    Case(
        "prophetnet",
        weights(
            """
            prophetnet.encoder.layers.0.self_attn.{query_proj,key_proj,value_proj,out_proj}.weight 24 24 +b
            prophetnet.encoder.layers.0.feed_forward.intermediate.weight 44 24 +b
            prophetnet.encoder.layers.0.feed_forward.output.weight 24 44 +b
            prophetnet.decoder.ngram_embeddings.weight 2 24
            prophetnet.decoder.layers.0.self_attn.{query_proj,key_proj,value_proj,out_proj}.weight 24 24 +b
            prophetnet.decoder.layers.0.self_attn.relative_pos_embeddings.weight 128 24 +b
            prophetnet.decoder.layers.0.cross_attn.{query_proj,key_proj,value_proj,out_proj}.weight 24 24 +b
            prophetnet.decoder.layers.0.feed_forward.intermediate.weight 44 24 +b
            prophetnet.decoder.layers.0.feed_forward.output.weight 24 44 +b
            """
        ),
        {
            "model_type": "prophetnet",
            "hidden_size": 24,
            "num_encoder_attention_heads": 6,
            "num_decoder_attention_heads": 4,
        },
        (
            layer("prophetnet.encoder.layers.0.self_attn", "self separate 6 6 4"),
            layer("prophetnet.decoder.layers.0.self_attn", "self separate 4 4 6"),
            layer("prophetnet.decoder.layers.0.cross_attn", "cross separate 4 4 6"),
        ),
    ),
    Case(
        "cpmant_project_q",
        weights(
            """
            cpmant.encoder.layers.{0,1}.self_att.layernorm_before_attention.weight 24
            cpmant.encoder.layers.{0,1}.self_att.self_attention.{project_q,project_k,project_v}.weight 30 24
            cpmant.encoder.layers.{0,1}.self_att.self_attention.attention_out.weight 24 30
            cpmant.encoder.layers.{0,1}.ffn.ffn.w_in.{w_0,w_1}.weight 44 24
            cpmant.encoder.layers.{0,1}.ffn.ffn.w_out.weight 24 44
            cpmant.position_bias.relative_attention_bias 1536 6
            cpmant.input_embedding.weight 64 24
            """
        ),
        {"model_type": "cpmant", "num_attention_heads": 6, "dim_head": 5, "hidden_size": 24},
        layers(
            "cpmant.encoder.layers.{}.self_att.self_attention",
            2,
            "self separate 6 6 5",
            roles={"q": ".project_q.weight", "o": ".attention_out.weight"},
        ),
    ),
    Case(
        "funnel",
        weights(
            """
            funnel.encoder.blocks.{0,1}.0.attention.q_head.weight 30 24
            funnel.encoder.blocks.{0,1}.0.attention.{k_head,v_head}.weight 30 24 +b
            funnel.encoder.blocks.{0,1}.0.attention.post_proj.weight 24 30 +b
            funnel.encoder.blocks.{0,1}.0.attention.{r_w_bias,r_r_bias,r_s_bias} 6 5
            funnel.encoder.blocks.{0,1}.0.attention.r_kernel 24 6 5
            funnel.encoder.blocks.{0,1}.0.attention.seg_embed 2 6 5
            funnel.encoder.blocks.{0,1}.0.attention.layer_norm.weight 24 +b
            funnel.encoder.blocks.{0,1}.0.ffn.linear_1.weight 44 24 +b
            funnel.encoder.blocks.{0,1}.0.ffn.linear_2.weight 24 44 +b
            """
        ),
        {"model_type": "funnel", "d_model": 24, "n_head": 6, "d_head": 5},
        layers(
            "funnel.encoder.blocks.{}.0.attention",
            2,
            "self separate 6 6 5",
            roles={"q": ".q_head.weight", "o": ".post_proj.weight", "k_bias": ".k_head.bias"},
        ),
    ),
    Case(
        "funnel_without_config",
        weights(
            """
            funnel.encoder.blocks.{0,1}.0.attention.q_head.weight 30 24
            funnel.encoder.blocks.{0,1}.0.attention.{k_head,v_head}.weight 30 24 +b
            funnel.encoder.blocks.{0,1}.0.attention.post_proj.weight 24 30 +b
            funnel.encoder.blocks.{0,1}.0.attention.{r_w_bias,r_r_bias,r_s_bias} 6 5
            funnel.encoder.blocks.{0,1}.0.attention.r_kernel 24 6 5
            """
        ),
        None,
        layers("funnel.encoder.blocks.{}.0.attention", 2, "self separate 6 6 5", evidence={"heads": "shape"}),
    ),
    Case(
        "xlnet_three_dimensional_parameters",
        weights(
            """
            transformer.mask_emb 1 1 24
            transformer.word_embedding.weight 64 24
            transformer.layer.{0,1}.rel_attn.{q,k,v,o,r} 24 6 5
            transformer.layer.{0,1}.rel_attn.{r_r_bias,r_s_bias,r_w_bias} 6 5
            transformer.layer.{0,1}.rel_attn.seg_embed 2 6 5
            transformer.layer.{0,1}.rel_attn.layer_norm.weight 24 +b
            transformer.layer.{0,1}.ff.layer_1.weight 44 24 +b
            transformer.layer.{0,1}.ff.layer_2.weight 24 44 +b
            """
        ),
        {"model_type": "xlnet", "d_model": 24, "n_head": 6, "d_head": 5, "n_layer": 2},
        layers(
            "transformer.layer.{}.rel_attn",
            2,
            "self separate 6 6 5",
            roles={"q": ".q", "k": ".k", "v": ".v", "o": ".o"},
        ),
    ),
    Case(
        "xlnet_without_config",
        weights(
            """
            transformer.layer.{0,1}.rel_attn.{q,k,v,o,r} 24 6 5
            transformer.layer.{0,1}.rel_attn.{r_r_bias,r_s_bias,r_w_bias} 6 5
            transformer.layer.{0,1}.ff.layer_1.weight 44 24 +b
            transformer.layer.{0,1}.ff.layer_2.weight 24 44 +b
            """
        ),
        None,
        layers(
            "transformer.layer.{}.rel_attn",
            2,
            "self separate 6 6 5",
            evidence={"heads": "shape", "head_dim": "shape"},
        ),
    ),
    Case(
        "squeezebert_grouped_conv1d",
        # Four groups: the second axis is 24/4.
        weights(
            """
            transformer.encoder.layers.{0,1}.attention.{query,key,value}.weight 24 6 1
            transformer.encoder.layers.{0,1}.attention.{query,key,value}.bias 24
            transformer.encoder.layers.{0,1}.post_attention.conv1d.weight 24 24 1 +b
            transformer.encoder.layers.{0,1}.intermediate.conv1d.weight 44 6 1 +b
            transformer.encoder.layers.{0,1}.output.conv1d.weight 24 11 1 +b
            """
        ),
        {"model_type": "squeezebert", **BERT, "q_groups": 4, "k_groups": 4, "v_groups": 4},
        tuple(
            layer(
                OneOf(
                    (f"transformer.encoder.layers.{index}.attention", f"transformer.encoder.layers.{index}")
                ),
                "self separate 6 6 4",
                roles={"q": ".query.weight", "v": ".value.weight"},
            )
            for index in range(2)
        ),
    ),
    Case(
        "conv1d_kernel_one",
        weights(
            """
            encoder.layers.{0,1}.attention.{query,key,value}.weight 24 24 1
            encoder.layers.{0,1}.attention.{query,key,value}.bias 24
            encoder.layers.{0,1}.intermediate.conv1d.weight 44 24 1 +b
            """
        ),
        BERT,
        layers("encoder.layers.{}.attention", 2, "self separate 6 6 4"),
    ),
    Case(
        "ldm_vae_mid_attention",
        weights(
            """
            {encoder,decoder}.conv_in.weight 24 3 3 3 +b
            {encoder,decoder}.mid.block_1.conv1.weight 24 24 3 3 +b
            {encoder,decoder}.mid.attn_1.norm.weight 24 +b
            {encoder,decoder}.mid.attn_1.{q,k,v,proj_out}.weight 24 24 1 1 +b
            {encoder,decoder}.mid.block_2.conv1.weight 24 24 3 3 +b
            quant_conv.weight 8 8 1 1 +b
            """
        ),
        None,
        tuple(
            # One head in the code; the file does not say so.
            layer(
                f"{side}.mid.attn_1",
                "self separate ?1 ?1 ?24",
                roles={"q": ".q.weight", "o": ".proj_out.weight"},
            )
            for side in ("encoder", "decoder")
        ),
    ),
    Case(
        "wav2vec2_conformer",
        weights(
            """
            encoder.layers.{0,1}.self_attn.{linear_q,linear_k,linear_v,linear_out}.weight 24 24 +b
            encoder.layers.{0,1}.self_attn.linear_pos.weight 24 24
            encoder.layers.{0,1}.self_attn.{pos_bias_u,pos_bias_v} 6 4
            encoder.layers.{0,1}.ffn{1,2}.intermediate_dense.weight 44 24 +b
            encoder.layers.{0,1}.ffn{1,2}.output_dense.weight 24 44 +b
            encoder.layers.{0,1}.conv_module.pointwise_conv1.weight 48 24 1
            encoder.layers.{0,1}.conv_module.depthwise_conv.weight 24 1 31
            encoder.layers.{0,1}.conv_module.batch_norm.{weight,bias,running_mean,running_var} 24
            """
        ),
        {"model_type": "wav2vec2-conformer", **BERT},
        layers(
            "encoder.layers.{}.self_attn",
            2,
            "self separate 6 6 4",
            roles={"q": ".linear_q.weight", "o": ".linear_out.weight", "pos_bias": ".pos_bias_u"},
        ),
    ),
    Case(
        "nemo_conformer_without_config",
        weights(
            """
            encoder.layers.{0,1}.self_attn.{linear_q,linear_k,linear_v,linear_out}.weight 24 24 +b
            encoder.layers.{0,1}.self_attn.linear_pos.weight 24 24
            encoder.layers.{0,1}.self_attn.{pos_bias_u,pos_bias_v} 6 4
            encoder.layers.{0,1}.feed_forward1.linear1.weight 44 24 +b
            encoder.layers.{0,1}.feed_forward1.linear2.weight 24 44 +b
            encoder.layers.{0,1}.conv.pointwise_conv1.weight 48 24 1 +b
            """
        ),
        None,
        layers(
            "encoder.layers.{}.self_attn",
            2,
            "self separate 6 6 4",
            evidence={"heads": "shape", "head_dim": "shape"},
        ),
    ),
    Case(
        "parakeet_bias_u",
        weights(
            """
            encoder.layers.{0,1}.self_attn.{q,k,v,o}_proj.weight 30 24 +b
            encoder.layers.{0,1}.self_attn.relative_k_proj.weight 30 24
            encoder.layers.{0,1}.self_attn.{bias_u,bias_v} 6 5
            encoder.layers.{0,1}.feed_forward1.linear1.weight 44 24 +b
            """.replace("{q,k,v,o}", "{q,k,v}"),
            "encoder.layers.{0,1}.self_attn.o_proj.weight 24 30 +b",
        ),
        {"model_type": "parakeet_encoder", "num_attention_heads": 6, "hidden_size": 24, "head_dim": 5},
        layers("encoder.layers.{}.self_attn", 2, "self separate 6 6 5", roles=LLAMA_ROLES),
    ),
    Case(
        "meta_llama_pth",
        weights(
            """
            tok_embeddings.weight 64 24
            layers.{0,1}.attention.{wq,wo}.weight 24 24
            layers.{0,1}.attention.{wk,wv}.weight 8 24
            layers.{0,1}.feed_forward.{w1,w3}.weight 44 24
            layers.{0,1}.feed_forward.w2.weight 24 44
            layers.{0,1}.{attention_norm,ffn_norm}.weight 24
            norm.weight 24
            output.weight 64 24
            rope.freqs 2
            """
        ),
        {"dim": 24, "n_heads": 6, "n_kv_heads": 2, "n_layers": 2, "vocab_size": 64},
        layers(
            "layers.{}.attention",
            2,
            "self separate 6 2 4",
            roles={"q": ".wq.weight", "k": ".wk.weight", "v": ".wv.weight", "o": ".wo.weight"},
            facts={"rope_order": "interleaved"},
        ),
        config_source="params.json",
    ),
    Case(
        "mistral_consolidated_head_dim",
        weights(
            """
            tok_embeddings.weight 64 24
            layers.{0,1}.attention.wq.weight 30 24
            layers.{0,1}.attention.{wk,wv}.weight 10 24
            layers.{0,1}.attention.wo.weight 24 30
            layers.{0,1}.feed_forward.{w1,w3}.weight 44 24
            layers.{0,1}.feed_forward.w2.weight 24 44
            norm.weight 24
            """
        ),
        {"dim": 24, "n_heads": 6, "n_kv_heads": 2, "head_dim": 5, "n_layers": 2, "hidden_dim": 44},
        layers("layers.{}.attention", 2, "self separate 6 2 5", facts={"rope_order": "interleaved"}),
        config_source="params.json",
    ),
    Case(
        "whisper_original",
        weights(
            """
            encoder.positional_embedding 1500 24
            encoder.conv{1,2}.weight 24 8 3 +b
            encoder.blocks.{0,1}.attn.{query,value,out}.weight 24 24 +b
            encoder.blocks.{0,1}.attn.key.weight 24 24
            encoder.blocks.{0,1}.attn_ln.weight 24 +b
            encoder.blocks.{0,1}.mlp.0.weight 96 24 +b
            encoder.blocks.{0,1}.mlp.2.weight 24 96 +b
            decoder.token_embedding.weight 64 24
            decoder.blocks.{0,1}.{attn,cross_attn}.{query,value,out}.weight 24 24 +b
            decoder.blocks.{0,1}.{attn,cross_attn}.key.weight 24 24
            decoder.blocks.{0,1}.{attn_ln,cross_attn_ln}.weight 24 +b
            decoder.blocks.{0,1}.mlp.0.weight 96 24 +b
            decoder.blocks.{0,1}.mlp.2.weight 24 96 +b
            """
        ),
        {
            "n_audio_head": 6,
            "n_audio_state": 24,
            "n_audio_layer": 2,
            "n_text_head": 4,
            "n_text_state": 24,
            "n_text_layer": 2,
            "n_mels": 8,
        },
        (
            *layers(
                "encoder.blocks.{}.attn",
                2,
                "self separate 6 6 4",
                roles={"q": ".query.weight", "o": ".out.weight", "v_bias": ".value.bias"},
            ),
            *layers("decoder.blocks.{}.attn", 2, "self separate 4 4 6"),
            *layers("decoder.blocks.{}.cross_attn", 2, "cross separate 4 4 6"),
        ),
        config_source="dims in checkpoint",
    ),
    Case(
        "diffusers_unet_sd15",
        # Here `attention_head_dim` is the number of heads: diffusers keeps the misnomer for old checkpoints.
        weights(
            """
            conv_in.weight 24 4 3 3 +b
            time_embedding.linear_1.weight 96 24 +b
            down_blocks.0.resnets.0.conv1.weight 24 24 3 3 +b
            down_blocks.0.resnets.0.time_emb_proj.weight 24 96 +b
            down_blocks.0.attentions.0.proj_{in,out}.weight 24 24 1 1 +b
            down_blocks.0.attentions.0.transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight 24 24
            down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight 24 24 +b
            down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight 24 24
            down_blocks.0.attentions.0.transformer_blocks.0.attn2.{to_k,to_v}.weight 24 20
            down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight 24 24 +b
            down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight 192 24 +b
            down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight 24 96 +b
            down_blocks.0.attentions.0.transformer_blocks.0.norm{1,2,3}.weight 24 +b
            """
        ),
        {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": 6,
            "cross_attention_dim": 20,
            "block_out_channels": [24, 48],
        },
        (
            layer(
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
                "self separate 6 6 4",
                roles={"q": ".to_q.weight", "o": ".to_out.0.weight"},
            ),
            layer("down_blocks.0.attentions.0.transformer_blocks.0.attn2", "cross separate 6 6 4"),
        ),
    ),
    Case(
        "diffusers_unet_sdxl_heads_per_level",
        weights(
            """
            down_blocks.{0,1}.resnets.0.conv1.weight 24 24 3 3 +b
            down_blocks.0.attentions.0.transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight 24 24
            down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight 24 24 +b
            down_blocks.1.attentions.0.transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight 48 48
            down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight 48 48 +b
            mid_block.attentions.0.transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight 48 48
            mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight 48 48 +b
            up_blocks.0.attentions.0.transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight 48 48
            up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight 48 48 +b
            up_blocks.1.attentions.0.transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight 24 24
            up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight 24 24 +b
            """
        ),
        {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": [3, 6],
            "cross_attention_dim": 20,
            "block_out_channels": [24, 48],
        },
        (
            layer("down_blocks.0.attentions.0.transformer_blocks.0.attn1", "self separate 3 3 8"),
            layer("down_blocks.1.attentions.0.transformer_blocks.0.attn1", "self separate 6 6 8"),
            layer("mid_block.attentions.0.transformer_blocks.0.attn1", "self separate 6 6 8"),
            layer("up_blocks.0.attentions.0.transformer_blocks.0.attn1", "self separate 6 6 8"),
            layer("up_blocks.1.attentions.0.transformer_blocks.0.attn1", "self separate 3 3 8"),
        ),
    ),
    Case(
        "sd15_single_file_without_config",
        weights(
            """
            model.diffusion_model.input_blocks.1.1.proj_in.weight 24 24 1 1 +b
            model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight 24 24
            model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight 24 24 +b
            model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight 24 24
            model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.{to_k,to_v}.weight 24 20
            model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight 24 24 +b
            model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight 192 24 +b
            first_stage_model.encoder.mid.attn_1.{q,k,v,proj_out}.weight 16 16 1 1 +b
            cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.{k,v}_proj.weight 20 20 +b
            cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.{q,out}_proj.weight 20 20 +b
            alphas_cumprod 1000
            """
        ),
        None,
        tuple(
            layer(path, spec)
            for path, spec in (
                ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1", "self separate ? ? ?"),
                ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2", "cross separate ? ? ?"),
                ("first_stage_model.encoder.mid.attn_1", "self separate ?1 ?1 ?16"),
                ("cond_stage_model.transformer.text_model.encoder.layers.0.self_attn", "self separate ? ? ?"),
            )
        ),
    ),
    Case(
        "diffusers_ip_adapter",
        weights(
            """
            down_blocks.0.attentions.0.transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight 24 24
            down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight 24 24 +b
            down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight 24 24
            down_blocks.0.attentions.0.transformer_blocks.0.attn2.{to_k,to_v}.weight 24 20
            down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight 24 24 +b
            down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.{to_k_ip,to_v_ip}.0.weight 24 20
            down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight 192 24 +b
            encoder_hid_proj.image_projection_layers.0.image_embeds.weight 80 16 +b
            """
        ),
        {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": 6,
            "cross_attention_dim": 20,
            "block_out_channels": [24],
        },
        (
            layer("down_blocks.0.attentions.0.transformer_blocks.0.attn1", "self separate 6 6 4"),
            layer("down_blocks.0.attentions.0.transformer_blocks.0.attn2", "cross separate 6 6 4"),
        ),
    ),
    Case(
        "diffusers_dit",
        weights(
            """
            pos_embed.proj.weight 30 4 2 2 +b
            transformer_blocks.{0,1}.attn1.{to_q,to_k,to_v}.weight 30 30 +b
            transformer_blocks.{0,1}.attn1.to_out.0.weight 30 30 +b
            transformer_blocks.{0,1}.attn2.to_q.weight 30 30 +b
            transformer_blocks.{0,1}.attn2.{to_k,to_v}.weight 30 20 +b
            transformer_blocks.{0,1}.attn2.to_out.0.weight 30 30 +b
            transformer_blocks.{0,1}.ff.net.0.proj.weight 120 30 +b
            transformer_blocks.{0,1}.ff.net.2.weight 30 120 +b
            transformer_blocks.{0,1}.scale_shift_table 6 30
            """
        ),
        {
            "_class_name": "PixArtTransformer2DModel",
            "num_attention_heads": 6,
            "attention_head_dim": 5,
            "cross_attention_dim": 20,
        },
        (
            *layers("transformer_blocks.{}.attn1", 2, "self separate 6 6 5"),
            *layers("transformer_blocks.{}.attn2", 2, "cross separate 6 6 5"),
        ),
    ),
    Case(
        "diffusers_sd3_added_projections",
        weights(
            """
            transformer_blocks.{0,1}.attn.{to_q,to_k,to_v}.weight 30 30 +b
            transformer_blocks.{0,1}.attn.{add_q_proj,add_k_proj,add_v_proj}.weight 30 30 +b
            transformer_blocks.{0,1}.attn.to_out.0.weight 30 30 +b
            transformer_blocks.{0,1}.attn.to_add_out.weight 30 30 +b
            transformer_blocks.{0,1}.attn.{norm_q,norm_k,norm_added_q,norm_added_k}.weight 5
            transformer_blocks.{0,1}.ff.net.0.proj.weight 120 30 +b
            transformer_blocks.{0,1}.ff_context.net.0.proj.weight 120 30 +b
            transformer_blocks.{0,1}.norm1.linear.weight 180 30 +b
            context_embedder.weight 30 20 +b
            """
        ),
        {"_class_name": "SD3Transformer2DModel", "num_attention_heads": 6, "attention_head_dim": 5},
        layers(
            "transformer_blocks.{}.attn",
            2,
            "self separate 6 6 5",
            roles={
                "q": ".to_q.weight",
                "o": ".to_out.0.weight",
                "added_q": ".add_q_proj.weight",
                "added_k": ".add_k_proj.weight",
                "added_v": ".add_v_proj.weight",
                "added_o": ".to_add_out.weight",
                "q_norm": ".norm_q.weight",
                "k_norm": ".norm_k.weight",
            },
        ),
    ),
    Case(
        "diffusers_flux_single_block_without_output",
        weights(
            """
            single_transformer_blocks.{0,1}.attn.{to_q,to_k,to_v}.weight 30 30 +b
            single_transformer_blocks.{0,1}.attn.{norm_q,norm_k}.weight 5
            single_transformer_blocks.{0,1}.proj_mlp.weight 120 30 +b
            single_transformer_blocks.{0,1}.proj_out.weight 30 150 +b
            single_transformer_blocks.{0,1}.norm.linear.weight 90 30 +b
            """
        ),
        {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 6, "attention_head_dim": 5},
        tuple(
            layer(
                OneOf((f"single_transformer_blocks.{index}.attn", f"single_transformer_blocks.{index}")),
                "self separate 6 6 5",
                roles={"q": ".to_q.weight", "k": ".to_k.weight", "v": ".to_v.weight"},
            )
            for index in range(2)
        ),
    ),
    Case(
        "diffusers_vae_legacy_names",
        weights(
            """
            encoder.conv_in.weight 24 3 3 3 +b
            encoder.mid_block.resnets.0.conv1.weight 24 24 3 3 +b
            encoder.mid_block.attentions.0.group_norm.weight 24 +b
            encoder.mid_block.attentions.0.{query,key,value,proj_attn}.weight 24 24 +b
            """
        ),
        {"_class_name": "AutoencoderKL", "block_out_channels": [12, 24]},
        (
            layer(
                "encoder.mid_block.attentions.0",
                "self separate ?1 ?1 ?24",
                roles={"q": ".query.weight", "o": ".proj_attn.weight"},
            ),
        ),
    ),
    Case(
        "grok1",
        weights(
            """
            transformer.in_out_embed.weight 64 24
            transformer.decoder_layer.{0,1}.multi_head_attention.query.weight 30 24
            transformer.decoder_layer.{0,1}.multi_head_attention.{key,value}.weight 10 24
            transformer.decoder_layer.{0,1}.multi_head_attention.linear.weight 24 30
            transformer.decoder_layer.{0,1}.router.weight 3 24
            transformer.decoder_layer.{0,1}.moe.{0,1,2}.{linear,linear_v}.weight 44 24
            transformer.decoder_layer.{0,1}.moe.{0,1,2}.linear_1.weight 24 44
            transformer.decoder_layer.{0,1}.{rms_norm,rms_norm_1,rms_norm_2,rms_norm_3}.scale 24
            """
        ),
        {"model_type": "grok-1", **WIDE, "attn_output_multiplier": 0.375},
        layers(
            "transformer.decoder_layer.{}.multi_head_attention",
            2,
            "self separate 6 2 5",
            scale=0.375,
            roles={"q": ".query.weight", "o": ".multi_head_attention.linear.weight"},
        ),
    ),
    Case(
        "exaone3_remote",
        weights(
            """
            transformer.wte.weight 64 24
            transformer.h.{0,1}.attn.attention.q_proj.weight 30 24
            transformer.h.{0,1}.attn.attention.{k,v}_proj.weight 10 24
            transformer.h.{0,1}.attn.attention.out_proj.weight 24 30
            transformer.h.{0,1}.mlp.{c_fc_0,c_fc_1}.weight 44 24
            transformer.h.{0,1}.mlp.c_proj.weight 24 44
            """
        ),
        {"model_type": "exaone", **WIDE},
        layers("transformer.h.{}.attn.attention", 2, "self separate 6 2 5", roles=OUT_ROLES),
    ),
    Case(
        "llada_projections_beside_the_mlp",
        weights(
            """
            model.transformer.wte.weight 64 24
            model.transformer.blocks.{0,1}.{q,k,v}_proj.weight 24 24
            model.transformer.blocks.{0,1}.attn_out.weight 24 24
            model.transformer.blocks.{0,1}.{attn_norm,ff_norm}.weight 24
            model.transformer.blocks.{0,1}.{ff_proj,up_proj}.weight 44 24
            model.transformer.blocks.{0,1}.ff_out.weight 24 44
            model.transformer.ff_out.weight 64 24
            """
        ),
        {"model_type": "llada", "n_heads": 6, "n_kv_heads": 6, "d_model": 24, "n_layers": 2},
        layers(
            "model.transformer.blocks.{}",
            2,
            "self separate 6 6 4",
            roles={"q": ".q_proj.weight", "o": ".attn_out.weight"},
        ),
    ),
    Case(
        "sam_mask_decoder",
        weights(
            """
            mask_decoder.iou_token.weight 1 24
            mask_decoder.transformer.layers.0.self_attn.{q,k,v,out}_proj.weight 24 24 +b
            mask_decoder.transformer.layers.0.cross_attn_token_to_image.{q,k,v}_proj.weight 12 24 +b
            mask_decoder.transformer.layers.0.cross_attn_token_to_image.out_proj.weight 24 12 +b
            mask_decoder.transformer.layers.0.cross_attn_image_to_token.{q,k,v}_proj.weight 12 24 +b
            mask_decoder.transformer.layers.0.cross_attn_image_to_token.out_proj.weight 24 12 +b
            mask_decoder.transformer.layers.0.mlp.lin1.weight 44 24 +b
            mask_decoder.transformer.layers.0.mlp.lin2.weight 24 44 +b
            mask_decoder.transformer.final_attn_token_to_image.{q,k,v}_proj.weight 12 24 +b
            mask_decoder.transformer.final_attn_token_to_image.out_proj.weight 24 12 +b
            """
        ),
        None,
        (
            *(
                layer(f"mask_decoder.transformer.{path}", f"{kind} separate ? ? ?")
                for path, kind in (
                    ("layers.0.self_attn", "self"),
                    ("layers.0.cross_attn_token_to_image", "cross"),
                    ("layers.0.cross_attn_image_to_token", "cross"),
                    # Cross by what it does; nothing in its name or shape says so.
                    ("final_attn_token_to_image", "self|cross"),
                )
            ),
        ),
    ),
)


# --- fused tensors -------------------------------------------------------------------------------------

FUSED: tuple[Case, ...] = (
    Case(
        "torch_multihead_attention",
        weights(
            """
            layers.{0,1}.self_attn.in_proj_weight 72 24
            layers.{0,1}.self_attn.in_proj_bias 72
            layers.{0,1}.self_attn.out_proj.weight 24 24 +b
            layers.{0,1}.multihead_attn.in_proj_weight 72 24
            layers.{0,1}.multihead_attn.in_proj_bias 72
            layers.{0,1}.multihead_attn.out_proj.weight 24 24 +b
            layers.{0,1}.linear1.weight 44 24 +b
            layers.{0,1}.linear2.weight 24 44 +b
            layers.{0,1}.norm{1,2,3}.weight 24 +b
            """
        ),
        None,
        (
            *layers(
                "layers.{}.self_attn",
                2,
                "self fused-block ? ? ?",
                roles={"qkv": ".in_proj_weight", "qkv_bias": ".in_proj_bias", "o": ".out_proj.weight"},
            ),
            *layers("layers.{}.multihead_attn", 2, "cross fused-block ? ? ?"),
        ),
    ),
    Case(
        "torch_multihead_attention_kdim",
        weights(
            """
            fusion.attn.q_proj_weight 24 24
            fusion.attn.k_proj_weight 24 20
            fusion.attn.v_proj_weight 24 16
            fusion.attn.in_proj_bias 72
            fusion.attn.out_proj.weight 24 24 +b
            """
        ),
        {"num_heads": 6, "embed_dim": 24},
        (
            # Keys of another width come from elsewhere.
            layer(
                "fusion.attn",
                "cross separate 6 6 4",
                roles={
                    "q": ".q_proj_weight",
                    "k": ".k_proj_weight",
                    "v": ".v_proj_weight",
                    "qkv_bias": ".in_proj_bias",
                },
            ),
        ),
    ),
    Case(
        "torch_multihead_attention_add_bias_kv",
        weights(
            """
            pool.attn.in_proj_weight 72 24
            pool.attn.in_proj_bias 72
            pool.attn.bias_{k,v} 1 1 24
            pool.attn.out_proj.weight 24 24 +b
            """
        ),
        {"num_heads": 6, "embed_dim": 24},
        (layer("pool.attn", "self|cross fused-block 6 6 4"),),
    ),
    Case(
        "clip_openai_without_config",
        weights(
            """
            positional_embedding 77 20
            text_projection 20 16
            logit_scale
            visual.class_embedding 24
            visual.conv1.weight 24 3 4 4
            visual.proj 24 16
            visual.transformer.resblocks.{0,1}.attn.in_proj_weight 72 24
            visual.transformer.resblocks.{0,1}.attn.in_proj_bias 72
            visual.transformer.resblocks.{0,1}.attn.out_proj.weight 24 24 +b
            visual.transformer.resblocks.{0,1}.mlp.c_fc.weight 96 24 +b
            visual.transformer.resblocks.{0,1}.mlp.c_proj.weight 24 96 +b
            visual.transformer.resblocks.{0,1}.ln_{1,2}.weight 24 +b
            transformer.resblocks.{0,1}.attn.in_proj_weight 60 20
            transformer.resblocks.{0,1}.attn.in_proj_bias 60
            transformer.resblocks.{0,1}.attn.out_proj.weight 20 20 +b
            transformer.resblocks.{0,1}.mlp.c_fc.weight 80 20 +b
            transformer.resblocks.{0,1}.mlp.c_proj.weight 20 80 +b
            token_embedding.weight 64 20
            """
        ),
        None,
        (
            *layers("visual.transformer.resblocks.{}.attn", 2, "self fused-block ? ? ?"),
            *layers("transformer.resblocks.{}.attn", 2, "self fused-block ? ? ?"),
        ),
    ),
    Case(
        "open_clip",
        weights(
            """
            visual.transformer.resblocks.{0,1}.attn.in_proj_weight 72 24
            visual.transformer.resblocks.{0,1}.attn.in_proj_bias 72
            visual.transformer.resblocks.{0,1}.attn.out_proj.weight 24 24 +b
            visual.transformer.resblocks.{0,1}.mlp.c_fc.weight 96 24 +b
            visual.transformer.resblocks.{0,1}.mlp.c_proj.weight 24 96 +b
            transformer.resblocks.{0,1}.attn.in_proj_weight 60 20
            transformer.resblocks.{0,1}.attn.in_proj_bias 60
            transformer.resblocks.{0,1}.attn.out_proj.weight 20 20 +b
            transformer.resblocks.{0,1}.mlp.c_fc.weight 80 20 +b
            transformer.resblocks.{0,1}.mlp.c_proj.weight 20 80 +b
            """
        ),
        {
            "model_cfg": {
                "embed_dim": 16,
                "vision_cfg": {"layers": 2, "width": 24, "head_width": 4, "patch_size": 4},
                "text_cfg": {"width": 20, "heads": 5, "layers": 2},
            }
        },
        (
            *layers("visual.transformer.resblocks.{}.attn", 2, "self fused-block 6 6 4"),
            *layers("transformer.resblocks.{}.attn", 2, "self fused-block 5 5 4"),
        ),
        config_source="open_clip_config.json",
    ),
    Case(
        "torchvision_vit",
        weights(
            """
            class_token 1 1 24
            conv_proj.weight 24 3 4 4 +b
            encoder.pos_embedding 1 17 24
            encoder.layers.encoder_layer_{0,1}.self_attention.in_proj_weight 72 24
            encoder.layers.encoder_layer_{0,1}.self_attention.in_proj_bias 72
            encoder.layers.encoder_layer_{0,1}.self_attention.out_proj.weight 24 24 +b
            encoder.layers.encoder_layer_{0,1}.mlp.0.weight 44 24 +b
            encoder.layers.encoder_layer_{0,1}.mlp.3.weight 24 44 +b
            heads.head.weight 10 24 +b
            """
        ),
        None,
        layers("encoder.layers.encoder_layer_{}.self_attention", 2, "self fused-block ? ? ?"),
    ),
    Case(
        "gpt2_conv1d",
        weights(
            GPT2_REST,
            """
            h.{0,1}.attn.c_attn.weight 24 72 +b1
            h.{0,1}.attn.c_proj.weight 24 24 +b1
            h.{0,1}.attn.bias 1 1 32 32
            h.{0,1}.mlp.c_fc.weight 24 96 +b1
            h.{0,1}.mlp.c_proj.weight 96 24 +b1
            """,
        ),
        {"model_type": "gpt2", "n_head": 6, "n_embd": 24, "n_layer": 2, "n_ctx": 32},
        layers(
            "h.{}.attn",
            2,
            "self fused-block 6 6 4",
            roles={"qkv": ".c_attn.weight", "qkv_bias": ".c_attn.bias", "o": ".attn.c_proj.weight"},
        ),
    ),
    Case(
        "gpt2_without_config",
        weights(
            GPT2_REST,
            """
            h.{0,1}.attn.c_attn.weight 24 72 +b1
            h.{0,1}.attn.c_proj.weight 24 24 +b1
            h.{0,1}.attn.bias 1 1 32 32
            h.{0,1}.mlp.c_fc.weight 24 96 +b1
            h.{0,1}.mlp.c_proj.weight 96 24 +b1
            """,
        ),
        None,
        layers("h.{}.attn", 2, "self fused-block ? ? ?"),
    ),
    Case(
        "gpt2_cross_attention_and_scale_by_layer",
        weights(
            """
            transformer.h.{0,1}.attn.c_attn.weight 24 72 +b1
            transformer.h.{0,1}.attn.c_proj.weight 24 24 +b1
            transformer.h.{0,1}.crossattention.c_attn.weight 24 48 +b1
            transformer.h.{0,1}.crossattention.q_attn.weight 24 24 +b1
            transformer.h.{0,1}.crossattention.c_proj.weight 24 24 +b1
            transformer.h.{0,1}.{ln_1,ln_2,ln_cross_attn}.weight 24 +b
            transformer.h.{0,1}.mlp.c_fc.weight 24 96 +b1
            transformer.h.{0,1}.mlp.c_proj.weight 96 24 +b1
            """
        ),
        {
            "model_type": "gpt2",
            "n_head": 6,
            "n_embd": 24,
            "n_layer": 2,
            "add_cross_attention": True,
            "scale_attn_by_inverse_layer_idx": True,
        },
        (
            *(
                layer(f"transformer.h.{index}.attn", "self fused-block 6 6 4", scale=0.5 / (index + 1))
                for index in range(2)
            ),
            *(
                layer(
                    f"transformer.h.{index}.crossattention",
                    "cross q+kv 6 6 4",
                    scale=0.5 / (index + 1),
                    roles={
                        "q": ".q_attn.weight",
                        "kv": ".crossattention.c_attn.weight",
                        "o": ".c_proj.weight",
                    },
                )
                for index in range(2)
            ),
        ),
    ),
    Case(
        "jais_scale_by_d",
        weights(
            """
            transformer.h.{0,1}.attn.c_attn.weight 24 72 +b1
            transformer.h.{0,1}.attn.c_proj.weight 24 24 +b1
            transformer.h.{0,1}.mlp.{c_fc,c_fc2}.weight 24 44 +b1
            transformer.h.{0,1}.mlp.c_proj.weight 44 24 +b1
            transformer.relative_pe.slopes 6 1
            """
        ),
        {"model_type": "jais", "n_head": 6, "n_embd": 24, "n_layer": 2, "mup_scale_qk_dot_by_d": True},
        layers("transformer.h.{}.attn", 2, "self fused-block 6 6 4", scale=0.25),
    ),
    Case(
        "nanogpt_linear",
        weights(
            NANO_REST,
            """
            transformer.h.{0,1}.attn.c_attn.weight 72 24
            transformer.h.{0,1}.attn.c_proj.weight 24 24
            transformer.h.{0,1}.attn.bias 1 1 16 16
            """,
        ),
        {"n_layer": 2, "n_head": 6, "n_embd": 24, "block_size": 16, "bias": False, "vocab_size": 64},
        layers(
            "transformer.h.{}.attn",
            2,
            "self fused-block 6 6 4",
            roles={"qkv": ".c_attn.weight", "o": ".attn.c_proj.weight"},
        ),
        config_source="model_args in checkpoint",
    ),
    Case(
        "linear_c_attn_without_config",
        # nanoGPT stacks [Q|K|V], StarCoder-1 with all heads interleaves per head: the file alone cannot say.
        weights(
            NANO_REST,
            """
            transformer.h.{0,1}.attn.c_attn.weight 72 24 +b
            transformer.h.{0,1}.attn.c_proj.weight 24 24 +b
            """,
        ),
        None,
        layers("transformer.h.{}.attn", 2, "self fused-block|fused-unknown ? ? ?"),
    ),
    Case(
        "qwen1_kv_channels",
        weights(
            """
            transformer.wte.weight 64 24
            transformer.h.{0,1}.attn.c_attn.weight 90 24 +b
            transformer.h.{0,1}.attn.c_proj.weight 24 30
            transformer.h.{0,1}.mlp.{w1,w2}.weight 44 24
            transformer.h.{0,1}.mlp.c_proj.weight 24 44
            transformer.h.{0,1}.ln_{1,2}.weight 24
            """
        ),
        {"model_type": "qwen", "num_attention_heads": 6, "kv_channels": 5, "hidden_size": 24},
        layers("transformer.h.{}.attn", 2, "self fused-block 6 6 5"),
    ),
    Case(
        "gpt_bigcode_multi_query",
        weights(
            NANO_REST,
            """
            transformer.h.{0,1}.attn.c_attn.weight 32 24 +b
            transformer.h.{0,1}.attn.c_proj.weight 24 24 +b
            """,
        ),
        {"model_type": "gpt_bigcode", "n_head": 6, "n_embd": 24, "n_layer": 2, "multi_query": True},
        layers("transformer.h.{}.attn", 2, "self fused-block 6 1 4", roles={"qkv": ".c_attn.weight"}),
    ),
    Case(
        "gpt_bigcode_all_heads",
        weights(
            NANO_REST,
            """
            transformer.h.{0,1}.attn.c_attn.weight 72 24 +b
            transformer.h.{0,1}.attn.c_proj.weight 24 24 +b
            """,
        ),
        {"model_type": "gpt_bigcode", "n_head": 6, "n_embd": 24, "n_layer": 2, "multi_query": False},
        layers("transformer.h.{}.attn", 2, "self fused-head 6 6 4"),
    ),
    Case(
        "bloom",
        weights(
            """
            word_embeddings.weight 64 24
            word_embeddings_layernorm.weight 24 +b
            h.{0,1}.self_attention.query_key_value.weight 72 24 +b
            h.{0,1}.self_attention.dense.weight 24 24 +b
            """,
            at(BLOOM_MLP, "h"),
        ),
        {"model_type": "bloom", "n_head": 6, "hidden_size": 24, "n_layer": 2},
        layers(
            "h.{}.self_attention",
            2,
            "self fused-head 6 6 4",
            roles={
                "qkv": ".query_key_value.weight",
                "qkv_bias": ".query_key_value.bias",
                "o": ".dense.weight",
            },
        ),
    ),
    Case(
        "gpt_neox",
        weights(
            """
            gpt_neox.embed_in.weight 64 24
            gpt_neox.layers.{0,1}.attention.query_key_value.weight 72 24 +b
            gpt_neox.layers.{0,1}.attention.dense.weight 24 24 +b
            gpt_neox.layers.{0,1}.attention.bias 1 1 16 16
            gpt_neox.layers.{0,1}.attention.masked_bias
            gpt_neox.layers.{0,1}.attention.rotary_emb.inv_freq 1
            embed_out.weight 64 24
            """,
            at(BLOOM_MLP, "gpt_neox.layers"),
        ),
        {"model_type": "gpt_neox", "num_attention_heads": 6, "hidden_size": 24, "rotary_pct": 0.5},
        layers("gpt_neox.layers.{}.attention", 2, "self fused-head 6 6 4"),
    ),
    Case(
        "gpt_neox_japanese_no_bias",
        weights(
            """
            gpt_neox_japanese.embed_in.weight 64 24
            gpt_neox_japanese.layers.{0,1}.attention.query_key_value.weight 72 24
            gpt_neox_japanese.layers.{0,1}.attention.dense.weight 24 24
            gpt_neox_japanese.layers.1.attention.dense_bias 24
            gpt_neox_japanese.layers.{0,1}.mlp.dense_h_to_4h.weight 44 24
            gpt_neox_japanese.layers.{0,1}.mlp.dense_4h_to_h.weight 24 44
            """
        ),
        {"model_type": "gpt_neox_japanese", "num_attention_heads": 6, "hidden_size": 24},
        layers("gpt_neox_japanese.layers.{}.attention", 2, "self fused-head 6 6 4"),
    ),
    Case(
        "persimmon_head_norms",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.{0,1}.self_attn.query_key_value.weight 72 24 +b
            model.layers.{0,1}.self_attn.dense.weight 24 24 +b
            model.layers.{0,1}.self_attn.{q,k}_layernorm.weight 4 +b
            """,
            at(BLOOM_MLP, "model.layers"),
        ),
        {"model_type": "persimmon", "num_attention_heads": 6, "hidden_size": 24},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self fused-head 6 6 4",
            roles={"qkv": ".query_key_value.weight", "q_norm": ".q_layernorm.weight"},
        ),
    ),
    Case(
        "falcon_new_decoder",
        weights(
            """
            transformer.word_embeddings.weight 64 24
            transformer.h.{0,1}.self_attention.query_key_value.weight 40 24
            transformer.h.{0,1}.self_attention.dense.weight 24 24
            transformer.h.{0,1}.mlp.dense_h_to_4h.weight 96 24
            transformer.h.{0,1}.mlp.dense_4h_to_h.weight 24 96
            transformer.h.{0,1}.{ln_attn,ln_mlp}.weight 24 +b
            """
        ),
        {
            "model_type": "falcon",
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "hidden_size": 24,
            "new_decoder_architecture": True,
            "multi_query": True,
        },
        layers("transformer.h.{}.self_attention", 2, "self fused-group 6 2 4"),
    ),
    Case(
        "falcon_7b_multi_query_config_lies",
        # num_kv_heads repeats the number of heads in the published file; 32 rows leave room for one key head.
        weights(
            """
            transformer.word_embeddings.weight 64 24
            transformer.h.{0,1}.self_attention.query_key_value.weight 32 24
            transformer.h.{0,1}.self_attention.dense.weight 24 24
            transformer.h.{0,1}.mlp.dense_h_to_4h.weight 96 24
            transformer.h.{0,1}.mlp.dense_4h_to_h.weight 24 96
            transformer.h.{0,1}.input_layernorm.weight 24 +b
            """
        ),
        {
            "model_type": "falcon",
            "num_attention_heads": 6,
            "num_kv_heads": 6,
            "hidden_size": 24,
            "new_decoder_architecture": False,
            "multi_query": True,
        },
        layers("transformer.h.{}.self_attention", 2, "self fused-block 6 1 4"),
    ),
    Case(
        "falcon_rw_all_heads",
        weights(
            """
            transformer.word_embeddings.weight 64 24
            transformer.h.{0,1}.self_attention.query_key_value.weight 72 24 +b
            transformer.h.{0,1}.self_attention.dense.weight 24 24 +b
            """,
            at(BLOOM_MLP, "transformer.h"),
        ),
        {
            "model_type": "falcon",
            "num_attention_heads": 6,
            "hidden_size": 24,
            "new_decoder_architecture": False,
            "multi_query": False,
            "alibi": True,
        },
        layers("transformer.h.{}.self_attention", 2, "self fused-head 6 6 4"),
    ),
    Case(
        "query_key_value_without_config",
        # Per head, per group or in blocks: all three families use these names.
        weights(
            """
            encoder.layers.{0,1}.self_attention.query_key_value.weight 72 24 +b
            encoder.layers.{0,1}.self_attention.dense.weight 24 24 +b
            """,
            at(BLOOM_MLP, "encoder.layers"),
        ),
        None,
        layers(
            "encoder.layers.{}.self_attention",
            2,
            "self fused-unknown|fused-head|fused-group|fused-block ? ? ?",
        ),
    ),
    Case(
        "chatglm2_multi_query_groups",
        weights(
            """
            transformer.embedding.word_embeddings.weight 64 24
            transformer.rotary_pos_emb.inv_freq 1
            transformer.encoder.layers.{0,1}.self_attention.query_key_value.weight 50 24 +b
            transformer.encoder.layers.{0,1}.self_attention.dense.weight 24 30
            transformer.encoder.layers.{0,1}.mlp.dense_h_to_4h.weight 88 24
            transformer.encoder.layers.{0,1}.mlp.dense_4h_to_h.weight 24 44
            transformer.encoder.layers.{0,1}.input_layernorm.weight 24
            transformer.output_layer.weight 64 24
            """
        ),
        {
            "model_type": "chatglm",
            "num_attention_heads": 6,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 5,
            "hidden_size": 24,
            "add_qkv_bias": True,
        },
        layers("transformer.encoder.layers.{}.self_attention", 2, "self fused-block 6 2 5"),
    ),
    Case(
        "chatglm1_per_head",
        weights(
            """
            transformer.word_embeddings.weight 64 24
            transformer.layers.{0,1}.attention.query_key_value.weight 72 24 +b
            transformer.layers.{0,1}.attention.dense.weight 24 24 +b
            transformer.layers.{0,1}.attention.rotary_emb.inv_freq 1
            """,
            at(BLOOM_MLP, "transformer.layers"),
        ),
        {
            "model_type": "chatglm",
            "num_attention_heads": 6,
            "hidden_size": 24,
            "position_encoding_2d": True,
            "inner_hidden_size": 44,
        },
        layers("transformer.layers.{}.attention", 2, "self fused-head 6 6 4"),
    ),
    Case(
        "megatron_core",
        weights(
            """
            embedding.word_embeddings.weight 64 24
            decoder.layers.{0,1}.self_attention.linear_qkv.weight 50 24
            decoder.layers.{0,1}.self_attention.linear_qkv.layer_norm_weight 24
            decoder.layers.{0,1}.self_attention.linear_proj.weight 24 30
            decoder.layers.{0,1}.mlp.linear_fc1.weight 88 24
            decoder.layers.{0,1}.mlp.linear_fc1.layer_norm_weight 24
            decoder.layers.{0,1}.mlp.linear_fc2.weight 24 44
            decoder.final_layernorm.weight 24
            output_layer.weight 64 24
            """
        ),
        {"num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 5, "hidden_size": 24},
        layers(
            "decoder.layers.{}.self_attention",
            2,
            "self fused-group 6 2 5",
            roles={"qkv": ".linear_qkv.weight", "o": ".linear_proj.weight"},
        ),
        config_source="args in checkpoint",
    ),
    Case(
        "megatron_core_output_gate",
        weights(
            """
            decoder.layers.{0,1}.self_attention.linear_qkv.weight 80 24
            decoder.layers.{0,1}.self_attention.linear_proj.weight 24 30
            decoder.layers.{0,1}.self_attention.{q,k}_layernorm.weight 5
            decoder.layers.{0,1}.mlp.linear_fc1.weight 88 24
            decoder.layers.{0,1}.mlp.linear_fc2.weight 24 44
            """
        ),
        {
            "num_attention_heads": 6,
            "num_query_groups": 2,
            "kv_channels": 5,
            "hidden_size": 24,
            "attention_output_gate": True,
        },
        layers(
            "decoder.layers.{}.self_attention",
            2,
            "self fused-group 6 2 5",
            facts={"gate": ANY},
            roles={"qkv": ".linear_qkv.weight", "q_norm": ".q_layernorm.weight"},
        ),
        config_source="args in checkpoint",
    ),
    Case(
        "megatron_core_cross",
        weights(
            """
            decoder.layers.0.self_attention.linear_qkv.weight 90 24
            decoder.layers.0.self_attention.linear_proj.weight 24 30
            decoder.layers.0.cross_attention.linear_q.weight 30 24
            decoder.layers.0.cross_attention.linear_kv.weight 60 24
            decoder.layers.0.cross_attention.linear_proj.weight 24 30
            decoder.layers.0.mlp.linear_fc1.weight 44 24
            decoder.layers.0.mlp.linear_fc2.weight 24 44
            """
        ),
        {"num_attention_heads": 6, "kv_channels": 5, "hidden_size": 24},
        (
            layer("decoder.layers.0.self_attention", "self fused-group|fused-head 6 6 5"),
            layer(
                "decoder.layers.0.cross_attention",
                "cross q+kv 6 6 5",
                roles={"q": ".linear_q.weight", "kv": ".linear_kv.weight", "o": ".linear_proj.weight"},
            ),
        ),
        config_source="args in checkpoint",
    ),
    Case(
        "megatron_legacy",
        weights(
            """
            language_model.embedding.word_embeddings.weight 64 24
            language_model.encoder.layers.{0,1}.self_attention.query_key_value.weight 90 24 +b
            language_model.encoder.layers.{0,1}.self_attention.dense.weight 24 30 +b
            language_model.decoder.layers.0.self_attention.query_key_value.weight 90 24 +b
            language_model.decoder.layers.0.self_attention.dense.weight 24 30 +b
            language_model.decoder.layers.0.inter_attention.query.weight 30 24 +b
            language_model.decoder.layers.0.inter_attention.key_value.weight 60 24 +b
            language_model.decoder.layers.0.inter_attention.dense.weight 24 30 +b
            """,
            at(BLOOM_MLP, "language_model.encoder.layers"),
        ),
        {"num_attention_heads": 6, "kv_channels": 5, "hidden_size": 24, "checkpoint_version": 3.0},
        (
            *layers(
                "language_model.encoder.layers.{}.self_attention", 2, "self fused-head|fused-group 6 6 5"
            ),
            layer("language_model.decoder.layers.0.self_attention", "self fused-head|fused-group 6 6 5"),
            layer(
                "language_model.decoder.layers.0.inter_attention",
                "cross q+kv 6 6 5",
                roles={"q": ".query.weight", "kv": ".key_value.weight"},
            ),
        ),
        config_source="args in checkpoint",
    ),
    Case(
        "internlm2_wqkv",
        weights(
            """
            model.tok_embeddings.weight 64 24
            model.layers.{0,1}.attention.wqkv.weight 40 24
            model.layers.{0,1}.attention.wo.weight 24 24
            model.layers.{0,1}.feed_forward.{w1,w3}.weight 44 24
            model.layers.{0,1}.feed_forward.w2.weight 24 44
            model.layers.{0,1}.{attention_norm,ffn_norm}.weight 24
            output.weight 64 24
            """
        ),
        {"model_type": "internlm2", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        layers(
            "model.layers.{}.attention",
            2,
            "self fused-group 6 2 4",
            roles={"qkv": ".wqkv.weight", "o": ".wo.weight"},
        ),
    ),
    Case(
        "baichuan_w_pack",
        weights(
            LLAMA_REST,
            """
            model.layers.{0,1}.self_attn.W_pack.weight 72 24
            model.layers.{0,1}.self_attn.o_proj.weight 24 24
            """,
        ),
        {"model_type": "baichuan", "num_attention_heads": 6, "hidden_size": 24},
        layers("model.layers.{}.self_attn", 2, "self fused-block 6 6 4", roles={"qkv": ".W_pack.weight"}),
    ),
    Case(
        "mpt_softmax_scale",
        weights(
            """
            transformer.wte.weight 64 24
            transformer.blocks.{0,1}.attn.Wqkv.weight 72 24
            transformer.blocks.{0,1}.attn.out_proj.weight 24 24
            transformer.blocks.{0,1}.ffn.up_proj.weight 96 24
            transformer.blocks.{0,1}.ffn.down_proj.weight 24 96
            transformer.blocks.{0,1}.norm_{1,2}.weight 24
            """
        ),
        {
            "model_type": "mpt",
            "n_heads": 6,
            "d_model": 24,
            "n_layers": 2,
            "attn_config": {"attn_type": "multihead_attention", "softmax_scale": 0.3, "qk_ln": False},
        },
        layers(
            "transformer.blocks.{}.attn",
            2,
            "self fused-block 6 6 4",
            scale=0.3,
            roles={"qkv": ".Wqkv.weight", "o": ".out_proj.weight"},
        ),
    ),
    Case(
        "llm_foundry_grouped",
        weights(
            """
            transformer.wte.weight 64 24
            transformer.blocks.{0,1}.attn.Wqkv.weight 40 24
            transformer.blocks.{0,1}.attn.q_ln.weight 24
            transformer.blocks.{0,1}.attn.k_ln.weight 8
            transformer.blocks.{0,1}.attn.out_proj.weight 24 24
            transformer.blocks.{0,1}.ffn.up_proj.weight 96 24
            transformer.blocks.{0,1}.ffn.down_proj.weight 24 96
            """
        ),
        {
            "model_type": "mpt",
            "n_heads": 6,
            "d_model": 24,
            "attn_config": {
                "attn_type": "grouped_query_attention",
                "kv_n_heads": 2,
                "clip_qkv": 8.0,
                "softmax_scale": None,
                "qk_ln": True,
            },
        },
        layers(
            "transformer.blocks.{}.attn",
            2,
            "self fused-block 6 2 4",
            roles={"q_norm": ".q_ln.weight", "k_norm": ".k_ln.weight"},
        ),
    ),
    Case(
        "llm_foundry_unfused",
        weights(
            """
            transformer.blocks.{0,1}.attn.Wq.weight 24 24
            transformer.blocks.{0,1}.attn.{Wk,Wv}.weight 8 24
            transformer.blocks.{0,1}.attn.out_proj.weight 24 24
            transformer.blocks.{0,1}.ffn.up_proj.weight 96 24
            transformer.blocks.{0,1}.ffn.down_proj.weight 24 96
            """
        ),
        {
            "model_type": "mpt",
            "n_heads": 6,
            "d_model": 24,
            "attn_config": {"kv_n_heads": 2, "fused_qkv": False},
        },
        layers(
            "transformer.blocks.{}.attn",
            2,
            "self separate 6 2 4",
            roles={"q": ".Wq.weight", "k": ".Wk.weight", "v": ".Wv.weight", "o": ".out_proj.weight"},
        ),
    ),
    Case(
        "dbrx",
        weights(
            """
            transformer.wte.weight 64 24
            transformer.blocks.{0,1}.norm_attn_norm.attn.Wqkv.weight 40 24
            transformer.blocks.{0,1}.norm_attn_norm.attn.out_proj.weight 24 24
            transformer.blocks.{0,1}.norm_attn_norm.norm_{1,2}.weight 24
            transformer.blocks.{0,1}.ffn.router.layer.weight 3 24
            transformer.blocks.{0,1}.ffn.experts.mlp.{w1,v1,w2} 132 24
            """
        ),
        {
            "model_type": "dbrx",
            "n_heads": 6,
            "d_model": 24,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8},
        },
        layers("transformer.blocks.{}.norm_attn_norm.attn", 2, "self fused-block 6 2 4"),
    ),
    Case(
        "modernbert_mlp_also_has_wo",
        weights(
            """
            model.embeddings.tok_embeddings.weight 64 24
            model.layers.{0,1}.attn.Wqkv.weight 72 24
            model.layers.{0,1}.attn.Wo.weight 24 24
            model.layers.1.attn_norm.weight 24
            model.layers.{0,1}.mlp.Wi.weight 88 24
            model.layers.{0,1}.mlp.Wo.weight 24 44
            model.layers.{0,1}.mlp_norm.weight 24
            head.dense.weight 24 24
            """
        ),
        {"model_type": "modernbert", "num_attention_heads": 6, "hidden_size": 24},
        layers(
            "model.layers.{}.attn",
            2,
            "self fused-block 6 6 4",
            roles={"qkv": ".Wqkv.weight", "o": ".attn.Wo.weight"},
        ),
    ),
    Case(
        "nomic_bert",
        weights(
            """
            embeddings.word_embeddings.weight 64 24
            encoder.layers.{0,1}.attn.Wqkv.weight 72 24
            encoder.layers.{0,1}.attn.out_proj.weight 24 24
            encoder.layers.{0,1}.mlp.{fc11,fc12}.weight 44 24
            encoder.layers.{0,1}.mlp.fc2.weight 24 44
            encoder.layers.{0,1}.norm{1,2}.weight 24 +b
            """
        ),
        {"model_type": "nomic_bert", "n_head": 6, "n_embd": 24, "n_layer": 2},
        layers("encoder.layers.{}.attn", 2, "self fused-block 6 6 4", roles={"o": ".out_proj.weight"}),
    ),
    Case(
        "phi2_remote_mixer",
        weights(
            """
            transformer.embd.wte.weight 64 24
            transformer.h.{0,1}.mixer.Wqkv.weight 72 24 +b
            transformer.h.{0,1}.mixer.out_proj.weight 24 24 +b
            transformer.h.{0,1}.mixer.rotary_emb.inv_freq 1
            transformer.h.{0,1}.mlp.fc1.weight 96 24 +b
            transformer.h.{0,1}.mlp.fc2.weight 24 96 +b
            lm_head.linear.weight 64 24 +b
            """
        ),
        {"model_type": "phi-msft", "n_head": 6, "n_embd": 24, "n_layer": 2, "n_head_kv": None},
        layers("transformer.h.{}.mixer", 2, "self fused-block 6 6 4", roles={"qkv": ".Wqkv.weight"}),
    ),
    Case(
        "phi3",
        weights(
            LLAMA_REST,
            """
            model.layers.{0,1}.self_attn.qkv_proj.weight 40 24
            model.layers.{0,1}.self_attn.o_proj.weight 24 24
            model.layers.{0,1}.mlp.gate_up_proj.weight 88 24
            """,
        ),
        {"model_type": "phi3", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self fused-block 6 2 4",
            roles={"qkv": ".qkv_proj.weight", "o": ".o_proj.weight"},
        ),
    ),
    Case(
        "vllm_saved_llama",
        weights(
            LLAMA_REST,
            """
            model.layers.{0,1}.self_attn.qkv_proj.weight 50 24
            model.layers.{0,1}.self_attn.o_proj.weight 24 30
            model.layers.{0,1}.mlp.gate_up_proj.weight 88 24
            """,
        ),
        {"model_type": "llama", **WIDE},
        layers("model.layers.{}.self_attn", 2, "self fused-block 6 2 5"),
    ),
    Case(
        "openelm_heads_per_layer",
        weights(
            """
            transformer.token_embeddings.weight 64 24
            transformer.layers.0.attn.qkv_proj.weight 40 24
            transformer.layers.0.attn.out_proj.weight 24 20
            transformer.layers.1.attn.qkv_proj.weight 60 24
            transformer.layers.1.attn.out_proj.weight 24 30
            transformer.layers.{0,1}.attn.{q,k}_norm.weight 5
            transformer.layers.{0,1}.ffn.proj_1.weight 88 24
            transformer.layers.{0,1}.ffn.proj_2.weight 24 44
            transformer.layers.{0,1}.{attn_norm,ffn_norm}.weight 24
            """
        ),
        {
            "model_type": "openelm",
            "num_query_heads": [4, 6],
            "num_kv_heads": [2, 3],
            "head_dim": 5,
            "model_dim": 24,
            "num_transformer_layers": 2,
        },
        (
            layer(
                "transformer.layers.0.attn",
                "self fused-block 4 2 5",
                roles={"qkv": ".qkv_proj.weight", "o": ".out_proj.weight", "q_norm": ".q_norm.weight"},
            ),
            layer("transformer.layers.1.attn", "self fused-block 6 3 5"),
        ),
    ),
    Case(
        "mimo_v2_5_tensor_parallel_ranks",
        # 352 rows are 4 ranks of 88: one scale row a rank makes 4; one grid over all rows would make 3.
        weights(
            """
            model.layers.{0,1}.self_attn.qkv_proj.weight 352 40
            model.layers.{0,1}.self_attn.qkv_proj.weight_scale_inv 4 1
            model.layers.{0,1}.self_attn.o_proj.weight 40 128
            model.layers.{0,1}.mlp.{gate,up}_proj.weight 44 40
            model.layers.{0,1}.mlp.down_proj.weight 40 44
            model.layers.{0,1}.{input,post_attention}_layernorm.weight 40
            """
        ),
        {
            "model_type": "mimo_v2",
            "architectures": ["MiMoV2ForCausalLM"],
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 24,
            "v_head_dim": 16,
            "hidden_size": 40,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        },
        layers(
            "model.layers.{}.self_attn",
            2,
            "self fused-rank 8 4 24",
            roles={"qkv": ".qkv_proj.weight", "o": ".o_proj.weight"},
            facts={"v_head_dim": 16},
        ),
    ),
    Case(
        "codegen_query_value_key",
        weights(
            """
            transformer.wte.weight 64 32
            transformer.h.{0,1}.attn.qkv_proj.weight 96 32
            transformer.h.{0,1}.attn.out_proj.weight 32 32
            transformer.h.{0,1}.attn.causal_mask 1 1 16 16
            transformer.h.{0,1}.mlp.fc_in.weight 44 32 +b
            transformer.h.{0,1}.mlp.fc_out.weight 32 44 +b
            lm_head.weight 64 32 +b
            """
        ),
        {"model_type": "codegen", "n_head": 8, "n_embd": 32, "n_layer": 2, "rotary_dim": 2},
        layers("transformer.h.{}.attn", 2, "self fused-qvk 8 8 4", roles={"qkv": ".qkv_proj.weight"}),
    ),
    Case(
        "deberta_v1_in_proj",
        weights(
            """
            deberta.encoder.rel_embeddings.weight 16 24
            deberta.encoder.layer.{0,1}.attention.self.in_proj.weight 72 24
            deberta.encoder.layer.{0,1}.attention.self.{q_bias,v_bias} 24
            deberta.encoder.layer.{0,1}.attention.self.pos_proj.weight 24 24
            deberta.encoder.layer.{0,1}.attention.self.pos_q_proj.weight 24 24 +b
            deberta.encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            deberta.encoder.layer.{0,1}.intermediate.dense.weight 44 24 +b
            deberta.encoder.layer.{0,1}.output.dense.weight 24 44 +b
            """
        ),
        {"model_type": "deberta", **BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        layers(
            "deberta.encoder.layer.{}.attention",
            2,
            "self fused-head 6 6 4",
            scale=1 / math.sqrt(3 * 4),
            roles={"qkv": ".in_proj.weight", "q_bias": ".q_bias", "v_bias": ".v_bias"},
        ),
    ),
    Case(
        "layoutlmv2_qkv_linear",
        weights(
            """
            layoutlmv2.encoder.rel_pos_bias.weight 6 32
            layoutlmv2.encoder.layer.{0,1}.attention.self.qkv_linear.weight 72 24
            layoutlmv2.encoder.layer.{0,1}.attention.self.{q_bias,v_bias} 1 1 24
            layoutlmv2.encoder.layer.{0,1}.attention.output.dense.weight 24 24 +b
            layoutlmv2.encoder.layer.{0,1}.intermediate.dense.weight 44 24 +b
            layoutlmv2.encoder.layer.{0,1}.output.dense.weight 24 44 +b
            layoutlmv2.visual.backbone.bottom_up.stem.conv1.weight 8 3 7 7
            """
        ),
        {"model_type": "layoutlmv2", **BERT, "fast_qkv": True},
        layers(
            "layoutlmv2.encoder.layer.{}.attention",
            2,
            "self fused-block 6 6 4",
            roles={"qkv": ".qkv_linear.weight", "q_bias": ".q_bias"},
        ),
    ),
    Case(
        "bark_mlp_also_has_in_proj",
        weights(
            """
            semantic.input_embeds_layer.weight 64 24
            semantic.layers.{0,1}.attn.att_proj.weight 72 24
            semantic.layers.{0,1}.attn.out_proj.weight 24 24
            semantic.layers.{0,1}.attn.bias 1 1 16 16
            semantic.layers.{0,1}.mlp.in_proj.weight 96 24
            semantic.layers.{0,1}.mlp.out_proj.weight 24 96
            fine_acoustics.layers.0.attn.att_proj.weight 60 20
            fine_acoustics.layers.0.attn.out_proj.weight 20 20
            fine_acoustics.layers.0.mlp.in_proj.weight 80 20
            fine_acoustics.layers.0.mlp.out_proj.weight 20 80
            """
        ),
        {
            "model_type": "bark",
            "semantic_config": {"num_heads": 6, "hidden_size": 24, "num_layers": 2},
            "fine_acoustics_config": {"num_heads": 4, "hidden_size": 20, "num_layers": 1},
        },
        (
            *layers(
                "semantic.layers.{}.attn",
                2,
                "self fused-block 6 6 4",
                roles={"qkv": ".att_proj.weight", "o": ".attn.out_proj.weight"},
            ),
            layer("fine_acoustics.layers.0.attn", "self fused-block 4 4 5"),
        ),
    ),
    Case(
        "olmo1_native",
        weights(
            """
            model.transformer.wte.weight 64 24
            model.transformer.blocks.{0,1}.att_proj.weight 72 24
            model.transformer.blocks.{0,1}.attn_out.weight 24 24
            model.transformer.blocks.{0,1}.ff_proj.weight 88 24
            model.transformer.blocks.{0,1}.ff_out.weight 24 44
            """
        ),
        {"model_type": "olmo", "n_heads": 6, "d_model": 24, "n_layers": 2, "clip_qkv": None},
        layers(
            "model.transformer.blocks.{}",
            2,
            "self fused-block 6 6 4",
            roles={"qkv": ".att_proj.weight", "o": ".attn_out.weight"},
        ),
    ),
    Case(
        "molmo_native_grouped",
        weights(
            """
            model.transformer.wte.embedding 64 24
            model.transformer.blocks.{0,1}.att_proj.weight 40 24 +b
            model.transformer.blocks.{0,1}.attn_out.weight 24 24
            model.transformer.blocks.{0,1}.{attn_norm,ff_norm}.weight 24
            model.transformer.blocks.{0,1}.ff_proj.weight 88 24
            model.transformer.blocks.{0,1}.ff_out.weight 24 44
            model.transformer.ff_out.weight 64 24
            """
        ),
        {"model_type": "molmo", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        layers("model.transformer.blocks.{}", 2, "self fused-block 6 2 4"),
    ),
    Case(
        "timm_vit",
        weights(TIMM_REST, "blocks.{0,1}.attn.qkv.weight 72 24 +b", "blocks.{0,1}.attn.proj.weight 24 24 +b"),
        {"architecture": "vit_tiny_patch4", "num_classes": 10, "num_features": 24},
        layers(
            "blocks.{}.attn",
            2,
            "self fused-block ? ? ?",
            roles={"qkv": ".attn.qkv.weight", "qkv_bias": ".qkv.bias", "o": ".attn.proj.weight"},
        ),
    ),
    Case(
        "timm_vit_head_norms",
        weights(
            TIMM_REST,
            "blocks.{0,1}.attn.qkv.weight 72 24",
            "blocks.{0,1}.attn.{q_norm,k_norm}.weight 4 +b",
            "blocks.{0,1}.attn.proj.weight 24 24 +b",
        ),
        None,
        layers(
            "blocks.{}.attn", 2, "self fused-block 6 6 4", evidence={"heads": "shape", "head_dim": "shape"}
        ),
    ),
    Case(
        "timm_eva_split_bias",
        weights(
            TIMM_REST,
            "blocks.{0,1}.attn.qkv.weight 72 24",
            "blocks.{0,1}.attn.{q_bias,v_bias} 24",
            "blocks.{0,1}.attn.proj.weight 24 24 +b",
            "blocks.{0,1}.attn.relative_position_bias_table 52 6",
            "blocks.{0,1}.attn.relative_position_index 17 17",
        ),
        None,
        layers(
            "blocks.{}.attn",
            2,
            "self fused-block 6 6 4",
            roles={"q_bias": ".q_bias", "v_bias": ".v_bias"},
            evidence={"heads": "shape"},
        ),
    ),
    Case(
        "timm_swin_heads_from_bias_table",
        weights(
            """
            patch_embed.proj.weight 24 3 4 4 +b
            layers.0.blocks.{0,1}.attn.qkv.weight 72 24 +b
            layers.0.blocks.{0,1}.attn.proj.weight 24 24 +b
            layers.0.blocks.{0,1}.attn.relative_position_bias_table 49 3
            layers.0.blocks.{0,1}.attn.relative_position_index 16 16
            layers.0.blocks.1.attn_mask 4 16 16
            layers.0.blocks.{0,1}.mlp.fc1.weight 96 24 +b
            layers.0.blocks.{0,1}.mlp.fc2.weight 24 96 +b
            layers.1.downsample.reduction.weight 48 96
            layers.1.blocks.0.attn.qkv.weight 144 48 +b
            layers.1.blocks.0.attn.proj.weight 48 48 +b
            layers.1.blocks.0.attn.relative_position_bias_table 49 6
            head.fc.weight 10 48 +b
            """
        ),
        {"architecture": "swin_tiny", "num_classes": 10},
        (
            *layers(
                "layers.0.blocks.{}.attn",
                2,
                "self fused-block 3 3 8",
                roles={"relative_bias": ".relative_position_bias_table"},
                evidence={"heads": "shape"},
            ),
            layer("layers.1.blocks.0.attn", "self fused-block 6 6 8"),
        ),
    ),
    Case(
        "timm_swinv2_cosine",
        weights(
            """
            layers.0.blocks.{0,1}.attn.qkv.weight 72 24
            layers.0.blocks.{0,1}.attn.{q_bias,v_bias} 24
            layers.0.blocks.{0,1}.attn.logit_scale 3 1 1
            layers.0.blocks.{0,1}.attn.cpb_mlp.0.weight 512 2 +b
            layers.0.blocks.{0,1}.attn.cpb_mlp.2.weight 3 512
            layers.0.blocks.{0,1}.attn.relative_coords_table 1 7 7 2
            layers.0.blocks.{0,1}.attn.relative_position_index 16 16
            layers.0.blocks.{0,1}.attn.proj.weight 24 24 +b
            layers.0.blocks.{0,1}.mlp.fc1.weight 96 24 +b
            layers.0.blocks.{0,1}.mlp.fc2.weight 24 96 +b
            """
        ),
        None,
        layers(
            "layers.0.blocks.{}.attn",
            2,
            "self fused-block 3 3 8",
            scale=None,
            roles={"logit_scale": ".logit_scale", "q_bias": ".q_bias"},
            evidence={"heads": "shape"},
        ),
    ),
    Case(
        "timm_maxvit_head_first",
        # By default interleaved per head; some configurations of the same names are not.
        weights(
            """
            stages.0.blocks.0.conv.conv1_1x1.weight 96 24 1 1
            stages.0.blocks.0.conv.se.fc1.weight 6 96 1 1 +b
            stages.0.blocks.0.conv.se.fc2.weight 96 6 1 1 +b
            stages.0.blocks.0.{attn_block,attn_grid}.attn.qkv.weight 72 24 +b
            stages.0.blocks.0.{attn_block,attn_grid}.attn.proj.weight 24 24 +b
            stages.0.blocks.0.{attn_block,attn_grid}.attn.rel_pos.relative_position_bias_table 49 3
            stages.0.blocks.0.{attn_block,attn_grid}.attn.rel_pos.relative_position_index 16 16
            stages.0.blocks.0.{attn_block,attn_grid}.mlp.fc1.weight 96 24 +b
            stages.0.blocks.0.{attn_block,attn_grid}.mlp.fc2.weight 24 96 +b
            stages.0.blocks.0.{attn_block,attn_grid}.norm{1,2}.weight 24 +b
            """
        ),
        {"architecture": "maxvit_nano_rw_256", "num_classes": 10},
        tuple(
            layer(
                f"stages.0.blocks.0.{part}.attn",
                "self fused-head|fused-unknown 3 3 8",
                roles={"relative_bias": ".relative_position_bias_table"},
            )
            for part in ("attn_block", "attn_grid")
        ),
    ),
    Case(
        "timm_coatnet_conv_qkv_order_unknown",
        weights(
            """
            stages.2.blocks.0.attn.qkv.weight 72 24 1 1 +b
            stages.2.blocks.0.attn.proj.weight 24 24 1 1 +b
            stages.2.blocks.0.attn.rel_pos.relative_position_bias_table 49 3
            stages.2.blocks.0.norm1.weight 24 +b
            stages.2.blocks.0.mlp.fc1.weight 96 24 1 1 +b
            stages.2.blocks.0.mlp.fc2.weight 24 96 1 1 +b
            """
        ),
        None,
        (
            layer(
                "stages.2.blocks.0.attn",
                "self fused-head|fused-unknown|fused-block 3 3 8",
                evidence={"heads": "shape"},
            ),
        ),
    ),
    Case(
        "sam_head_size_from_rel_pos",
        weights(
            """
            image_encoder.pos_embed 1 8 8 24
            image_encoder.blocks.{0,1}.attn.qkv.weight 72 24 +b
            image_encoder.blocks.{0,1}.attn.proj.weight 24 24 +b
            image_encoder.blocks.{0,1}.attn.{rel_pos_h,rel_pos_w} 27 4
            image_encoder.blocks.{0,1}.mlp.lin1.weight 96 24 +b
            image_encoder.blocks.{0,1}.mlp.lin2.weight 24 96 +b
            image_encoder.neck.0.weight 16 24 1 1
            """
        ),
        None,
        layers("image_encoder.blocks.{}.attn", 2, "self fused-block 6 6 4", evidence={"head_dim": "shape"}),
    ),
    Case(
        "sam2_hiera_widening_layer",
        weights(
            """
            image_encoder.trunk.blocks.0.attn.qkv.weight 72 24 +b
            image_encoder.trunk.blocks.0.attn.proj.weight 24 24 +b
            image_encoder.trunk.blocks.1.attn.qkv.weight 144 24 +b
            image_encoder.trunk.blocks.1.attn.proj.weight 48 48 +b
            image_encoder.trunk.blocks.1.proj.weight 48 24 +b
            image_encoder.trunk.blocks.0.mlp.layers.{0,1}.weight 24 24 +b
            image_encoder.trunk.blocks.1.mlp.layers.{0,1}.weight 48 48 +b
            """
        ),
        None,
        layers("image_encoder.trunk.blocks.{}.attn", 2, "self fused-block ? ? ?"),
    ),
    Case(
        "cait_talking_heads_and_class_attention",
        weights(
            """
            blocks.0.attn.qkv.weight 72 24 +b
            blocks.0.attn.proj.weight 24 24 +b
            blocks.0.attn.{proj_l,proj_w}.weight 6 6 +b
            blocks.0.gamma_{1,2} 24
            blocks.0.mlp.fc1.weight 96 24 +b
            blocks.0.mlp.fc2.weight 24 96 +b
            blocks_token_only.0.attn.{q,k,v,proj}.weight 24 24 +b
            blocks_token_only.0.mlp.fc1.weight 96 24 +b
            blocks_token_only.0.mlp.fc2.weight 24 96 +b
            """
        ),
        None,
        (
            layer(
                "blocks.0.attn",
                "self fused-block ?6 ?6 ?4",
                roles={"qkv": ".qkv.weight", "o": ".attn.proj.weight"},
            ),
            layer("blocks_token_only.0.attn", "self|cross separate ? ? ?"),
        ),
    ),
    Case(
        "levit_hf_value_wider_than_key",
        weights(
            """
            levit.encoder.stages.0.layers.0.module.attention_biases 3 49
            levit.encoder.stages.0.layers.0.module.queries_keys_values.linear.weight 48 24
            levit.encoder.stages.0.layers.0.module.queries_keys_values.batch_norm.{weight,bias} 48
            levit.encoder.stages.0.layers.0.module.queries_keys_values.batch_norm.running_mean 48
            levit.encoder.stages.0.layers.0.module.queries_keys_values.batch_norm.running_var 48
            levit.encoder.stages.0.layers.0.module.projection.linear.weight 24 24
            levit.encoder.stages.0.layers.0.module.projection.batch_norm.{weight,bias} 24
            levit.encoder.stages.0.layers.1.module.linear_up.linear.weight 48 24
            levit.encoder.stages.0.layers.1.module.linear_down.linear.weight 24 48
            """
        ),
        {
            "model_type": "levit",
            "hidden_sizes": [24],
            "num_attention_heads": [3],
            "key_dim": [4],
            "attention_ratio": [2],
            "depths": [1],
        },
        (
            layer(
                "levit.encoder.stages.0.layers.0.module",
                "self fused-unequal 3 3 4",
                roles={"qkv": ".queries_keys_values.linear.weight"},
                facts={"v_head_dim": 8},
            ),
        ),
    ),
    Case(
        "timm_efficientformer_without_config",
        # 36 rows and 24 inputs of the output leave key size 2, value size 8 for the 3 heads of the biases.
        weights(
            """
            stages.3.blocks.0.token_mixer.attention_biases 3 49
            stages.3.blocks.0.token_mixer.attention_bias_idxs 49 49
            stages.3.blocks.0.token_mixer.qkv.weight 36 24 +b
            stages.3.blocks.0.token_mixer.proj.weight 24 24 +b
            stages.3.blocks.0.mlp.fc1.weight 96 24 +b
            stages.3.blocks.0.mlp.fc2.weight 24 96 +b
            """
        ),
        None,
        (
            layer(
                "stages.3.blocks.0.token_mixer",
                "self fused-unequal 3 3 2",
                facts={"v_head_dim": 8},
                evidence={"heads": "shape"},
            ),
        ),
    ),
    Case(
        "tiny_vit_equal_sizes",
        weights(
            """
            stages.1.blocks.0.attn.attention_biases 3 49
            stages.1.blocks.0.attn.norm.weight 24 +b
            stages.1.blocks.0.attn.qkv.weight 72 24 +b
            stages.1.blocks.0.attn.proj.weight 24 24 +b
            stages.1.blocks.0.local_conv.conv.weight 24 1 3 3
            stages.1.blocks.0.mlp.fc1.weight 96 24 +b
            stages.1.blocks.0.mlp.fc2.weight 24 96 +b
            """
        ),
        {"architecture": "tiny_vit_5m_224"},
        (
            layer(
                "stages.1.blocks.0.attn", "self fused-unequal|fused-head 3 3 8", evidence={"heads": "shape"}
            ),
        ),
    ),
    Case(
        "timm_parallel_scaling_block",
        weights(
            """
            blocks.{0,1}.in_norm.weight 24 +b
            blocks.{0,1}.in_proj.weight 160 24
            blocks.{0,1}.mlp_bias 88
            blocks.{0,1}.{q_norm,k_norm}.weight 4 +b
            blocks.{0,1}.attn_out_proj.weight 24 24 +b
            blocks.{0,1}.mlp_out_proj.weight 24 88 +b
            """
        ),
        None,
        layers(
            "blocks.{}",
            2,
            "self fused-mlp 6 6 4",
            roles={"qkv": ".in_proj.weight", "o": ".attn_out_proj.weight", "q_norm": ".q_norm.weight"},
            evidence={"heads": "shape"},
        ),
    ),
    Case(
        "timm_tnt_two_attentions_a_block",
        weights(
            """
            blocks.0.attn_in.qk.weight 24 12
            blocks.0.attn_in.v.weight 12 12
            blocks.0.attn_in.proj.weight 12 12 +b
            blocks.0.mlp_in.fc1.weight 48 12 +b
            blocks.0.mlp_in.fc2.weight 12 48 +b
            blocks.0.proj.weight 24 192
            blocks.0.attn_out.qk.weight 48 24
            blocks.0.attn_out.v.weight 24 24
            blocks.0.attn_out.proj.weight 24 24 +b
            blocks.0.mlp.fc1.weight 96 24 +b
            blocks.0.mlp.fc2.weight 24 96 +b
            """
        ),
        None,
        tuple(
            layer(
                f"blocks.0.{part}",
                "self qk+v ? ? ?",
                roles={"qk": ".qk.weight", "v": ".v.weight", "o": f".{part}.proj.weight"},
            )
            for part in ("attn_in", "attn_out")
        ),
    ),
    Case(
        "timm_convit_gated_positional",
        weights(
            """
            blocks.0.attn.qk.weight 48 24
            blocks.0.attn.v.weight 24 24
            blocks.0.attn.proj.weight 24 24 +b
            blocks.0.attn.pos_proj.weight 6 3 +b
            blocks.0.attn.gating_param 6
            blocks.0.mlp.fc1.weight 96 24 +b
            blocks.0.mlp.fc2.weight 24 96 +b
            """
        ),
        None,
        (
            layer(
                "blocks.0.attn",
                "self qk+v ?6 ?6 ?4",
                roles={"qk": ".qk.weight", "v": ".v.weight", "o": ".attn.proj.weight"},
            ),
        ),
    ),
    Case(
        "timm_pvt_v2",
        weights(
            """
            stages.0.blocks.0.attn.q.weight 24 24 +b
            stages.0.blocks.0.attn.kv.weight 48 24 +b
            stages.0.blocks.0.attn.proj.weight 24 24 +b
            stages.0.blocks.0.attn.sr.weight 24 24 8 8 +b
            stages.0.blocks.0.attn.norm.weight 24 +b
            stages.0.blocks.0.mlp.fc1.weight 96 24 +b
            stages.0.blocks.0.mlp.dwconv.weight 96 1 3 3 +b
            stages.0.blocks.0.mlp.fc2.weight 24 96 +b
            """
        ),
        None,
        (
            layer(
                "stages.0.blocks.0.attn",
                "self q+kv ? ? ?",
                roles={"q": ".q.weight", "kv": ".kv.weight", "o": ".attn.proj.weight"},
            ),
        ),
    ),
    Case(
        "timm_attention_pool_latent",
        weights(
            """
            attn_pool.latent 1 1 24
            attn_pool.q.weight 24 24 +b
            attn_pool.kv.weight 48 24 +b
            attn_pool.proj.weight 24 24 +b
            attn_pool.norm.weight 24 +b
            attn_pool.mlp.fc1.weight 96 24 +b
            attn_pool.mlp.fc2.weight 24 96 +b
            """
        ),
        None,
        (layer("attn_pool", "self|cross q+kv ? ? ?"),),
    ),
    Case(
        "granite_speech_to_kv",
        weights(
            """
            encoder.layers.{0,1}.attn.pre_norm.weight 24 +b
            encoder.layers.{0,1}.attn.to_q.weight 30 24
            encoder.layers.{0,1}.attn.to_kv.weight 60 24
            encoder.layers.{0,1}.attn.to_out.weight 24 30 +b
            encoder.layers.{0,1}.attn.rel_pos_emb.weight 65 5
            encoder.layers.{0,1}.ff1.up_proj.weight 96 24 +b
            encoder.layers.{0,1}.ff1.down_proj.weight 24 96 +b
            encoder.layers.{0,1}.conv.up_conv.weight 96 24 1 +b
            """
        ),
        {"model_type": "granite_speech", "encoder_config": {"num_heads": 6, "dim_head": 5, "hidden_dim": 24}},
        layers(
            "encoder.layers.{}.attn",
            2,
            "self q+kv 6 6 5",
            roles={"q": ".to_q.weight", "kv": ".to_kv.weight", "o": ".to_out.weight"},
        ),
    ),
    Case(
        "flamingo_perceiver_resampler",
        weights(
            """
            perceiver.latents 8 24
            perceiver.layers.{0,1}.0.norm_media.weight 24 +b
            perceiver.layers.{0,1}.0.norm_latents.weight 24 +b
            perceiver.layers.{0,1}.0.to_q.weight 30 24
            perceiver.layers.{0,1}.0.to_kv.weight 60 24
            perceiver.layers.{0,1}.0.to_out.weight 24 30
            perceiver.layers.{0,1}.1.1.weight 96 24
            perceiver.layers.{0,1}.1.3.weight 24 96
            """
        ),
        None,
        layers("perceiver.layers.{}.0", 2, "self|cross q+kv ? ? ?"),
    ),
    Case(
        "reformer_shared_query_key",
        weights(
            """
            reformer.embeddings.word_embeddings.weight 64 24
            reformer.encoder.layers.0.attention.self_attention.{query,key,value}.weight 15 24
            reformer.encoder.layers.1.attention.self_attention.query_key.weight 15 24
            reformer.encoder.layers.1.attention.self_attention.value.weight 15 24
            reformer.encoder.layers.{0,1}.attention.output.dense.weight 24 15
            reformer.encoder.layers.{0,1}.attention.layer_norm.weight 24 +b
            reformer.encoder.layers.{0,1}.feed_forward.dense.dense.weight 44 24 +b
            reformer.encoder.layers.{0,1}.feed_forward.output.dense.weight 24 44 +b
            """
        ),
        {
            "model_type": "reformer",
            "num_attention_heads": 3,
            "attention_head_size": 5,
            "hidden_size": 24,
            "attn_layers": ["local", "lsh"],
        },
        (
            layer("reformer.encoder.layers.0.attention", "self separate 3 3 5"),
            layer(
                "reformer.encoder.layers.1.attention",
                "self shared-qk 3 3 5",
                scale=ANY,
                roles={
                    "qk": ".query_key.weight",
                    "v": ".value.weight",
                    "o": ".attention.output.dense.weight",
                },
            ),
        ),
    ),
    Case(
        "jetmoe_experts_hold_q_and_o",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.{0,1}.self_attention.kv_proj.weight 20 24
            model.layers.{0,1}.self_attention.experts.input_linear.weight 3 10 24
            model.layers.{0,1}.self_attention.experts.output_linear.weight 3 24 10
            model.layers.{0,1}.self_attention.experts.bias 24
            model.layers.{0,1}.self_attention.experts.router.layer.weight 3 24
            model.layers.{0,1}.mlp.input_linear.weight 3 88 24
            model.layers.{0,1}.mlp.output_linear.weight 3 24 44
            model.layers.{0,1}.mlp.bias 24
            model.layers.{0,1}.mlp.router.layer.weight 3 24
            """
        ),
        {
            "model_type": "jetmoe",
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "kv_channels": 5,
            "hidden_size": 24,
        },
        layers(
            "model.layers.{}.self_attention",
            2,
            "self q+kv|incomplete 4|None 2 5",
            roles={"kv": ".kv_proj.weight"},
        ),
    ),
    Case(
        "flux_double_blocks_original",
        weights(
            """
            img_in.weight 24 16 +b
            double_blocks.0.{img_attn,txt_attn}.qkv.weight 72 24 +b
            double_blocks.0.{img_attn,txt_attn}.norm.{query_norm,key_norm}.scale 4
            double_blocks.0.{img_attn,txt_attn}.proj.weight 24 24 +b
            double_blocks.0.{img_mlp,txt_mlp}.0.weight 96 24 +b
            double_blocks.0.{img_mlp,txt_mlp}.2.weight 24 96 +b
            double_blocks.0.{img_mod,txt_mod}.lin.weight 144 24 +b
            final_layer.linear.weight 16 24 +b
            """
        ),
        None,
        tuple(
            layer(
                f"double_blocks.0.{stream}",
                "self fused-block 6 6 4",
                roles={"qkv": ".qkv.weight", "q_norm": ".norm.query_norm.scale", "o": ".proj.weight"},
                evidence={"heads": "shape"},
            )
            for stream in ("img_attn", "txt_attn")
        ),
    ),
    Case(
        "flux_single_block_original",
        weights(
            """
            single_blocks.{0,1}.linear1.weight 168 24 +b
            single_blocks.{0,1}.linear2.weight 24 120 +b
            single_blocks.{0,1}.norm.{query_norm,key_norm}.scale 4
            single_blocks.{0,1}.modulation.lin.weight 72 24 +b
            """
        ),
        None,
        layers(
            "single_blocks.{}",
            2,
            "self fused-mlp 6 6 4",
            roles={"qkv": ".linear1.weight", "o": ".linear2.weight", "q_norm": ".norm.query_norm.scale"},
            evidence={"heads": "shape"},
        ),
    ),
    Case(
        "flux2_single_block_diffusers",
        weights(
            """
            single_transformer_blocks.{0,1}.attn.to_qkv_mlp_proj.weight 210 30
            single_transformer_blocks.{0,1}.attn.{norm_q,norm_k}.weight 5
            single_transformer_blocks.{0,1}.attn.to_out.weight 30 90
            """
        ),
        {"_class_name": "Flux2Transformer2DModel", "num_attention_heads": 6, "attention_head_dim": 5},
        layers(
            "single_transformer_blocks.{}.attn",
            2,
            "self fused-mlp 6 6 5",
            roles={"qkv": ".to_qkv_mlp_proj.weight", "o": ".to_out.weight"},
        ),
    ),
    Case(
        "sd3_original",
        weights(
            """
            model.diffusion_model.x_embedder.proj.weight 24 4 2 2 +b
            model.diffusion_model.joint_blocks.0.{x_block,context_block}.attn.qkv.weight 72 24 +b
            model.diffusion_model.joint_blocks.0.{x_block,context_block}.attn.{ln_q,ln_k}.weight 4
            model.diffusion_model.joint_blocks.0.{x_block,context_block}.attn.proj.weight 24 24 +b
            model.diffusion_model.joint_blocks.0.{x_block,context_block}.mlp.fc1.weight 96 24 +b
            model.diffusion_model.joint_blocks.0.{x_block,context_block}.mlp.fc2.weight 24 96 +b
            model.diffusion_model.joint_blocks.0.{x_block,context_block}.adaLN_modulation.1.weight 144 24 +b
            """
        ),
        None,
        tuple(
            layer(
                f"model.diffusion_model.joint_blocks.0.{stream}.attn",
                "self fused-block 6 6 4",
                roles={"qkv": ".attn.qkv.weight", "q_norm": ".ln_q.weight"},
                evidence={"heads": "shape"},
            )
            for stream in ("x_block", "context_block")
        ),
    ),
    Case(
        "hunyuan_video_original",
        weights(
            """
            double_blocks.0.{img_attn_qkv,txt_attn_qkv}.weight 72 24 +b
            double_blocks.0.{img_attn_q_norm,img_attn_k_norm,txt_attn_q_norm,txt_attn_k_norm}.weight 4
            double_blocks.0.{img_attn_proj,txt_attn_proj}.weight 24 24 +b
            double_blocks.0.{img_mlp,txt_mlp}.fc1.weight 96 24 +b
            double_blocks.0.{img_mlp,txt_mlp}.fc2.weight 24 96 +b
            single_blocks.0.linear1.weight 168 24 +b
            single_blocks.0.linear2.weight 24 120 +b
            single_blocks.0.{q_norm,k_norm}.weight 4
            """
        ),
        None,
        (
            *(
                layer(
                    OneOf(
                        (
                            f"double_blocks.0.{stream}_attn",
                            f"double_blocks.0.{stream}_attn_qkv",
                            "double_blocks.0",
                        )
                    ),
                    "self fused-block 6 6 4",
                    roles={"qkv": f".{stream}_attn_qkv.weight", "o": f".{stream}_attn_proj.weight"},
                )
                for stream in ("img", "txt")
            ),
            layer("single_blocks.0", "self fused-mlp 6 6 4"),
        ),
    ),
    Case(
        "mochi_original_two_streams",
        weights(
            """
            blocks.0.attn.qkv_x.weight 72 24
            blocks.0.attn.qkv_y.weight 72 20
            blocks.0.attn.{q_norm_x,k_norm_x,q_norm_y,k_norm_y}.weight 4
            blocks.0.attn.proj_x.weight 24 24 +b
            blocks.0.attn.proj_y.weight 20 24 +b
            blocks.0.mlp_x.w1.weight 96 24
            blocks.0.mlp_x.w2.weight 24 48
            """
        ),
        None,
        (
            layer("blocks.0.attn", "self fused-block 6 6 4", roles={"qkv": ".qkv_x.weight"}),
            layer("blocks.0.attn", "self fused-block 6 6 4", optional=True),
        ),
    ),
    Case(
        "litgpt_blocks",
        weights(
            """
            transformer.wte.weight 64 24
            transformer.h.{0,1}.attn.qkv.weight 50 24
            transformer.h.{0,1}.attn.proj.weight 24 30
            transformer.h.{0,1}.mlp.{fc_1,fc_2}.weight 44 24
            transformer.h.{0,1}.mlp.proj.weight 24 44
            transformer.h.{0,1}.norm_{1,2}.weight 24
            """
        ),
        {"n_head": 6, "n_query_groups": 2, "head_size": 5, "n_embd": 24, "n_layer": 2},
        layers(
            "transformer.h.{}.attn",
            2,
            "self fused-block 6 2 5",
            roles={"qkv": ".attn.qkv.weight", "o": ".attn.proj.weight"},
        ),
        config_source="model_config.yaml",
    ),
    Case(
        "litgpt_legacy_groups",
        weights(
            """
            transformer.h.{0,1}.attn.attn.weight 50 24
            transformer.h.{0,1}.attn.proj.weight 24 30
            transformer.h.{0,1}.mlp.{fc_1,fc_2}.weight 44 24
            transformer.h.{0,1}.mlp.proj.weight 24 44
            """
        ),
        {"n_head": 6, "n_query_groups": 2, "head_size": 5, "n_embd": 24, "n_layer": 2},
        layers(
            "transformer.h.{}.attn",
            2,
            "self fused-group 6 2 5",
            roles={"qkv": ".attn.attn.weight", "o": ".attn.proj.weight"},
        ),
        config_source="model_config.yaml",
    ),
    Case(
        "hrm_text_gate_query_key_value",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.{H_module,L_module}.layers.0.self_attn.gqkv_proj.weight 96 24
            model.{H_module,L_module}.layers.0.self_attn.o_proj.weight 24 24
            model.{H_module,L_module}.layers.0.mlp.gate_up_proj.weight 88 24
            model.{H_module,L_module}.layers.0.mlp.down_proj.weight 24 44
            """
        ),
        {"model_type": "hrm_text", "num_attention_heads": 6, "hidden_size": 24},
        tuple(
            layer(
                f"model.{module}.layers.0.self_attn",
                "self fused-block 6 6 4",
                roles={"qkv": ".gqkv_proj.weight", "o": ".o_proj.weight"},
                facts={"gate": ANY},
            )
            for module in ("H_module", "L_module")
        ),
    ),
)


# --- q_proj is not H·d, layers without keys, linear attention beside softmax attention -------------------

ODD: tuple[Case, ...] = (
    Case(
        "minimax_lightning_is_not_softmax",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.0.self_attn.q_proj.weight 36 24
            model.layers.0.self_attn.{k,v}_proj.weight 12 24
            model.layers.0.self_attn.o_proj.weight 24 36
            model.layers.1.self_attn.qkv_proj.weight 108 24
            model.layers.1.self_attn.out_proj.weight 24 36
            model.layers.1.self_attn.output_gate.weight 36 24
            model.layers.1.self_attn.norm.weight 36
            model.layers.1.self_attn.slope_rate 6 1 1
            model.layers.{0,1}.mlp.gate.weight 2 24
            model.layers.{0,1}.mlp.experts.gate_up_proj 2 18 24
            model.layers.{0,1}.mlp.experts.down_proj 2 24 9
            """
        ),
        {
            "model_type": "minimax",
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "hidden_size": 24,
            "layer_types": ["full_attention", "linear_attention"],
        },
        (
            layer("model.layers.0.self_attn", "self separate 6 2 6"),
            layer("model.layers.1.self_attn", "None linear-attention * * *", scale=ANY),
        ),
    ),
    Case(
        "qwen3_next_gated_delta_and_gated_attention",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.0.linear_attn.dt_bias 4
            model.layers.0.linear_attn.A_log 4
            model.layers.0.linear_attn.conv1d.weight 40 1 4
            model.layers.0.linear_attn.in_proj_qkvz.weight 52 24
            model.layers.0.linear_attn.in_proj_ba.weight 8 24
            model.layers.0.linear_attn.norm.weight 3
            model.layers.0.linear_attn.out_proj.weight 24 12
            model.layers.1.self_attn.q_proj.weight 60 24
            model.layers.1.self_attn.{k,v}_proj.weight 10 24
            model.layers.1.self_attn.o_proj.weight 24 30
            model.layers.1.self_attn.{q,k}_norm.weight 5
            model.layers.{0,1}.mlp.gate.weight 2 24
            model.layers.{0,1}.mlp.experts.{0,1}.{gate,up}_proj.weight 9 24
            model.layers.{0,1}.mlp.experts.{0,1}.down_proj.weight 24 9
            model.layers.{0,1}.mlp.shared_expert_gate.weight 1 24
            """
        ),
        {
            "model_type": "qwen3_next",
            **WIDE,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 7,
            "linear_value_head_dim": 3,
            "layer_types": ["linear_attention", "full_attention"],
        },
        (
            layer("model.layers.0.linear_attn", "None linear-attention * * *", scale=ANY),
            layer(
                "model.layers.1.self_attn",
                "self separate 6 2 5",
                roles=LLAMA_ROLES,
                facts={"gate": "per-head"},
            ),
        ),
    ),
    Case(
        "qwen3_next_attention_without_config",
        # The output projection takes half as many columns as q has rows: the other half is the gate.
        weights(
            LLAMA_REST,
            """
            model.layers.{0,1}.self_attn.q_proj.weight 60 24
            model.layers.{0,1}.self_attn.{k,v}_proj.weight 10 24
            model.layers.{0,1}.self_attn.o_proj.weight 24 30
            model.layers.{0,1}.self_attn.{q,k}_norm.weight 5
            """,
        ),
        None,
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            facts={"gate": "per-head"},
            evidence={"heads": "shape"},
        ),
    ),
    Case(
        "qwen3_5_delta_in_blocks",
        weights(
            """
            model.language_model.layers.0.linear_attn.A_log 4
            model.language_model.layers.0.linear_attn.dt_bias 4
            model.language_model.layers.0.linear_attn.conv1d.weight 40 1 4
            model.language_model.layers.0.linear_attn.in_proj_qkv.weight 40 24
            model.language_model.layers.0.linear_attn.in_proj_z.weight 12 24
            model.language_model.layers.0.linear_attn.{in_proj_a,in_proj_b}.weight 4 24
            model.language_model.layers.0.linear_attn.out_proj.weight 24 12
            model.language_model.layers.1.self_attn.q_proj.weight 60 24
            model.language_model.layers.1.self_attn.{k,v}_proj.weight 10 24
            model.language_model.layers.1.self_attn.o_proj.weight 24 30
            model.language_model.layers.1.self_attn.{q,k}_norm.weight 5
            model.language_model.layers.{0,1}.mlp.{gate,up}_proj.weight 44 24
            model.language_model.layers.{0,1}.mlp.down_proj.weight 24 44
            """
        ),
        {
            "model_type": "qwen3_5",
            "text_config": {
                "model_type": "qwen3_5_text",
                **WIDE,
                "layer_types": ["linear_attention", "full_attention"],
            },
        },
        (
            layer("model.language_model.layers.0.linear_attn", "None linear-attention * * *", ANY),
            layer(
                "model.language_model.layers.1.self_attn", "self separate 6 2 5", facts={"gate": "per-head"}
            ),
        ),
    ),
    Case(
        "kimi_linear_delta_layers_have_q_k_v_names",
        weights(
            MLA_REST,
            """
            model.layers.0.self_attn.{q,k,v}_proj.weight 30 40
            model.layers.0.self_attn.{q_conv1d,k_conv1d,v_conv1d}.weight 30 1 4
            model.layers.0.self_attn.A_log 1 1 6 1
            model.layers.0.self_attn.dt_bias 30
            model.layers.0.self_attn.{f_a_proj,g_a_proj}.weight 5 40
            model.layers.0.self_attn.{f_b_proj,g_b_proj}.weight 30 5
            model.layers.0.self_attn.b_proj.weight 6 40
            model.layers.0.self_attn.o_norm.weight 5
            model.layers.0.self_attn.o_proj.weight 40 30
            model.layers.1.self_attn.q_proj.weight 42 40
            model.layers.1.self_attn.kv_a_proj_with_mqa.weight 13 40
            model.layers.1.self_attn.kv_a_layernorm.weight 11
            model.layers.1.self_attn.kv_b_proj.weight 54 11
            model.layers.1.self_attn.o_proj.weight 40 24
            """,
        ),
        {
            "model_type": "kimi_linear",
            **MLA,
            "q_lora_rank": None,
            "head_dim": 5,
            "linear_attn_config": {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 6, "head_dim": 5},
        },
        (
            layer("model.layers.0.self_attn", "None linear-attention * * *", scale=ANY),
            layer("model.layers.1.self_attn", "self mla 6 6|1 7", facts={"v_head_dim": 4}),
        ),
    ),
    Case(
        "deepseek_v3",
        weights(
            MLA_REST,
            """
            model.layers.{0,1}.self_attn.q_a_proj.weight 9 40
            model.layers.{0,1}.self_attn.q_a_layernorm.weight 9
            model.layers.{0,1}.self_attn.q_b_proj.weight 42 9
            model.layers.{0,1}.self_attn.kv_a_proj_with_mqa.weight 13 40
            model.layers.{0,1}.self_attn.kv_a_layernorm.weight 11
            model.layers.{0,1}.self_attn.kv_b_proj.weight 54 11
            model.layers.{0,1}.self_attn.o_proj.weight 40 24
            """,
        ),
        {
            "model_type": "deepseek_v3",
            **MLA,
            "q_lora_rank": 9,
            "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        layers(
            "model.layers.{}.self_attn",
            2,
            "self mla 6 6|1 7",
            scale=(0.1 * math.log(40) + 1) ** 2 / math.sqrt(7),
            roles={
                "q_a": ".q_a_proj.weight",
                "q_b": ".q_b_proj.weight",
                "kv_a": ".kv_a_proj_with_mqa.weight",
                "kv_b": ".kv_b_proj.weight",
                "o": ".o_proj.weight",
            },
            facts={"v_head_dim": 4},
        ),
    ),
    Case(
        "deepseek_v3_without_config",
        # H·dn = 54 − 24 = 30, H·dr = 42 − 30 = 12, dr = 13 − 11 = 2: six heads, from shapes alone.
        weights(
            MLA_REST,
            """
            model.layers.{0,1}.self_attn.q_a_proj.weight 9 40
            model.layers.{0,1}.self_attn.q_a_layernorm.weight 9
            model.layers.{0,1}.self_attn.q_b_proj.weight 42 9
            model.layers.{0,1}.self_attn.kv_a_proj_with_mqa.weight 13 40
            model.layers.{0,1}.self_attn.kv_a_layernorm.weight 11
            model.layers.{0,1}.self_attn.kv_b_proj.weight 54 11
            model.layers.{0,1}.self_attn.o_proj.weight 40 24
            """,
        ),
        None,
        layers("model.layers.{}.self_attn", 2, "self mla ?6 * ?7"),
    ),
    Case(
        "deepseek_v2_lite_plain_q",
        weights(
            MLA_REST,
            """
            model.layers.{0,1}.self_attn.q_proj.weight 42 40
            model.layers.{0,1}.self_attn.kv_a_proj_with_mqa.weight 13 40
            model.layers.{0,1}.self_attn.kv_a_layernorm.weight 11
            model.layers.{0,1}.self_attn.kv_b_proj.weight 54 11
            model.layers.{0,1}.self_attn.o_proj.weight 40 24
            """,
        ),
        {"model_type": "deepseek_v2", **MLA, "q_lora_rank": None},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self mla 6 6|1 7",
            roles={"q": ".q_proj.weight", "kv_a": ".kv_a_proj_with_mqa.weight"},
            facts={"v_head_dim": 4},
        ),
    ),
    Case(
        "deepseek_v32_indexer_is_no_layer",
        weights(
            MLA_REST,
            """
            model.layers.{0,1}.self_attn.q_a_proj.weight 9 40
            model.layers.{0,1}.self_attn.q_a_layernorm.weight 9
            model.layers.{0,1}.self_attn.q_b_proj.weight 42 9
            model.layers.{0,1}.self_attn.kv_a_proj_with_mqa.weight 13 40
            model.layers.{0,1}.self_attn.kv_a_layernorm.weight 11
            model.layers.{0,1}.self_attn.kv_b_proj.weight 54 11
            model.layers.{0,1}.self_attn.o_proj.weight 40 24
            model.layers.{0,1}.self_attn.indexer.wq_b.weight 32 9
            model.layers.{0,1}.self_attn.indexer.wk.weight 8 40
            model.layers.{0,1}.self_attn.indexer.k_norm.weight 8 +b
            model.layers.{0,1}.self_attn.indexer.weights_proj.weight 4 40
            """,
        ),
        {"model_type": "deepseek_v32", **MLA, "q_lora_rank": 9, "index_n_heads": 4, "index_head_dim": 8},
        layers("model.layers.{}.self_attn", 2, "self mla 6 6|1 7"),
    ),
    Case(
        "longcat_flash_two_attentions_a_layer",
        weights(
            """
            model.embed_tokens.weight 64 40
            model.layers.0.self_attn.{0,1}.q_a_proj.weight 9 40
            model.layers.0.self_attn.{0,1}.q_a_layernorm.weight 9
            model.layers.0.self_attn.{0,1}.q_b_proj.weight 42 9
            model.layers.0.self_attn.{0,1}.kv_a_proj_with_mqa.weight 13 40
            model.layers.0.self_attn.{0,1}.kv_a_layernorm.weight 11
            model.layers.0.self_attn.{0,1}.kv_b_proj.weight 54 11
            model.layers.0.self_attn.{0,1}.o_proj.weight 40 24
            model.layers.0.mlps.{0,1}.{gate,up}_proj.weight 44 40
            model.layers.0.mlps.{0,1}.down_proj.weight 40 44
            model.layers.0.mlp.router.classifier.weight 4 40
            """
        ),
        {"model_type": "longcat_flash", **MLA, "q_lora_rank": 9},
        layers("model.layers.0.self_attn.{}", 2, "self mla 6 6|1 7", scale=ANY),
    ),
    Case(
        "deepseek_original_names",
        weights(
            """
            embed.weight 64 40
            layers.{0,1}.attn.wq_a.weight 9 40
            layers.{0,1}.attn.q_norm.weight 9
            layers.{0,1}.attn.wq_b.weight 42 9
            layers.{0,1}.attn.wkv_a.weight 13 40
            layers.{0,1}.attn.kv_norm.weight 11
            layers.{0,1}.attn.wkv_b.weight 54 11
            layers.{0,1}.attn.wo.weight 40 24
            layers.{0,1}.{attn_norm,ffn_norm}.weight 40
            layers.{0,1}.ffn.{w1,w3}.weight 44 40
            layers.{0,1}.ffn.w2.weight 40 44
            norm.weight 40
            head.weight 64 40
            """
        ),
        {
            "dim": 40,
            "n_heads": 6,
            "n_layers": 2,
            "q_lora_rank": 9,
            "kv_lora_rank": 11,
            "qk_nope_head_dim": 5,
            "qk_rope_head_dim": 2,
            "v_head_dim": 4,
        },
        layers(
            "layers.{}.attn",
            2,
            "self mla 6 6|1 7",
            roles={
                "q_a": ".wq_a.weight",
                "q_b": ".wq_b.weight",
                "kv_a": ".wkv_a.weight",
                "kv_b": ".wkv_b.weight",
            },
            facts={"v_head_dim": 4},
        ),
    ),
    Case(
        "megatron_core_mla",
        weights(
            """
            decoder.layers.{0,1}.self_attention.linear_q_down_proj.weight 9 40
            decoder.layers.{0,1}.self_attention.linear_q_up_proj.weight 42 9
            decoder.layers.{0,1}.self_attention.linear_q_up_proj.layer_norm_weight 9
            decoder.layers.{0,1}.self_attention.linear_kv_down_proj.weight 13 40
            decoder.layers.{0,1}.self_attention.linear_kv_up_proj.weight 54 11
            decoder.layers.{0,1}.self_attention.linear_kv_up_proj.layer_norm_weight 11
            decoder.layers.{0,1}.self_attention.linear_proj.weight 40 24
            decoder.layers.{0,1}.input_layernorm.weight 40
            decoder.layers.{0,1}.mlp.linear_fc1.weight 88 40
            decoder.layers.{0,1}.mlp.linear_fc2.weight 40 44
            """
        ),
        {
            "num_attention_heads": 6,
            "hidden_size": 40,
            "multi_latent_attention": True,
            "q_lora_rank": 9,
            "kv_lora_rank": 11,
            "qk_head_dim": 5,
            "qk_pos_emb_head_dim": 2,
            "v_head_dim": 4,
        },
        layers(
            "decoder.layers.{}.self_attention",
            2,
            "self mla 6 6|1 7",
            scale=ANY,
            roles={
                "q_a": ".linear_q_down_proj.weight",
                "q_b": ".linear_q_up_proj.weight",
                "kv_a": ".linear_kv_down_proj.weight",
                "kv_b": ".linear_kv_up_proj.weight",
                "o": ".linear_proj.weight",
            },
        ),
        config_source="args in checkpoint",
    ),
    Case(
        "bailing_hybrid_gated_mla",
        weights(
            MLA_REST,
            """
            model.layers.0.self_attn.{q,k,v}_proj.weight 30 40
            model.layers.0.self_attn.conv1d.weight 90 1 4
            model.layers.0.self_attn.forget_gate.A_log 6
            model.layers.0.self_attn.forget_gate.f_proj.weight 30 40
            model.layers.0.self_attn.b_proj.weight 6 40
            model.layers.0.self_attn.o_norm.weight 5
            model.layers.0.self_attn.o_proj.weight 40 30
            model.layers.0.self_attn.g_proj.weight 30 40
            model.layers.1.self_attn.q_proj.weight 42 40
            model.layers.1.self_attn.kv_a_proj_with_mqa.weight 13 40
            model.layers.1.self_attn.kv_a_layernorm.weight 11
            model.layers.1.self_attn.kv_b_proj.weight 54 11
            model.layers.1.self_attn.o_proj.weight 40 24
            model.layers.1.self_attn.g_proj.weight 6 40
            """,
        ),
        {"model_type": "bailing_hybrid", **MLA, "q_lora_rank": None, "head_dim": 5},
        (
            layer("model.layers.0.self_attn", "None linear-attention * * *", scale=ANY),
            layer(
                "model.layers.1.self_attn",
                "self mla 6 6|1 7",
                facts={"gate": "separate", "v_head_dim": 4},
                roles={"gate": ".g_proj.weight"},
            ),
        ),
    ),
    Case(
        "deepseek_v4_one_shared_key_value_head",
        weights(
            """
            model.embed_tokens.weight 64 40
            model.layers.{0,1}.self_attn.sinks 6
            model.layers.{0,1}.self_attn.q_a_proj.weight 9 40
            model.layers.{0,1}.self_attn.q_a_norm.weight 9
            model.layers.{0,1}.self_attn.q_b_proj.weight 48 9
            model.layers.{0,1}.self_attn.kv_proj.weight 8 40
            model.layers.{0,1}.self_attn.kv_norm.weight 8
            model.layers.{0,1}.self_attn.o_a_proj.weight 14 24
            model.layers.{0,1}.self_attn.o_b_proj.weight 40 14
            model.layers.{0,1}.self_attn.compressor.position_bias 4 8
            model.layers.{0,1}.self_attn.compressor.kv_proj.weight 8 40
            model.layers.{0,1}.self_attn.compressor.gate_proj.weight 8 40
            model.layers.{0,1}.self_attn.compressor.kv_norm.weight 8
            model.layers.1.self_attn.compressor.indexer.kv_proj.weight 4 40
            model.layers.1.self_attn.compressor.indexer.q_b_proj.weight 16 9
            model.layers.{0,1}.mlp.gate.weight 3 40
            model.layers.{0,1}.mlp.experts.gate_up_proj 3 24 40
            model.layers.{0,1}.mlp.experts.down_proj 3 40 12
            """
        ),
        {
            "model_type": "deepseek_v4",
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "hidden_size": 40,
            "q_lora_rank": 9,
        },
        layers(
            "model.layers.{}.self_attn",
            2,
            "self k-eq-v 6 1 8",
            roles={"q_a": ".q_a_proj.weight", "q_b": ".self_attn.q_b_proj.weight", "sinks": ".sinks"},
            facts={"sinks": True},
        ),
    ),
    Case(
        "gemma4_keys_are_values",
        weights(
            LLAMA_REST,
            """
            model.layers.0.self_attn.q_proj.weight 30 24
            model.layers.0.self_attn.{k,v}_proj.weight 10 24
            model.layers.0.self_attn.o_proj.weight 24 30
            model.layers.0.self_attn.{q,k}_norm.weight 5
            model.layers.1.self_attn.q_proj.weight 48 24
            model.layers.1.self_attn.k_proj.weight 8 24
            model.layers.1.self_attn.o_proj.weight 24 48
            model.layers.1.self_attn.{q,k}_norm.weight 8
            """,
        ),
        {
            "model_type": "gemma4_text",
            **WIDE,
            "global_head_dim": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (
            layer("model.layers.0.self_attn", "self separate 6 2 5", scale=1.0),
            layer(
                "model.layers.1.self_attn",
                "self k-eq-v 6 1 8",
                scale=1.0,
                roles={"q": ".q_proj.weight", "k": ".k_proj.weight", "o": ".o_proj.weight"},
            ),
        ),
    ),
    Case(
        "gemma3n_keys_from_an_earlier_layer",
        weights(
            """
            model.language_model.embed_tokens.weight 64 24
            model.language_model.layers.0.self_attn.q_proj.weight 30 24
            model.language_model.layers.0.self_attn.{k,v}_proj.weight 10 24
            model.language_model.layers.0.self_attn.{q,k}_norm.weight 5
            model.language_model.layers.1.self_attn.q_proj.weight 30 24
            model.language_model.layers.1.self_attn.q_norm.weight 5
            model.language_model.layers.{0,1}.self_attn.o_proj.weight 24 30
            model.language_model.layers.{0,1}.mlp.{gate,up}_proj.weight 44 24
            model.language_model.layers.{0,1}.mlp.down_proj.weight 24 44
            model.language_model.layers.{0,1}.altup.modality_router.weight 4 24
            model.language_model.layers.{0,1}.altup.prediction_coefs.weight 16 4
            model.language_model.layers.{0,1}.laurel.linear_left.weight 8 24
            model.language_model.layers.{0,1}.laurel.linear_right.weight 24 8
            model.language_model.layers.{0,1}.per_layer_input_gate.weight 8 24
            model.language_model.layers.{0,1}.per_layer_projection.weight 24 8
            """
        ),
        {
            "model_type": "gemma3n",
            "text_config": {"model_type": "gemma3n_text", **WIDE, "num_kv_shared_layers": 1},
        },
        (
            layer("model.language_model.layers.0.self_attn", "self separate 6 2 5", scale=1.0),
            layer(
                "model.language_model.layers.1.self_attn",
                "self kv-shared 6 2|None 5",
                scale=1.0,
                roles={"q": ".q_proj.weight", "o": ".o_proj.weight"},
            ),
        ),
    ),
    Case(
        "zamba_concatenated_input",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.1.shared_transf.self_attn.{q,k,v}_proj.weight 48 48
            model.layers.1.shared_transf.self_attn.o_proj.weight 24 48
            model.layers.1.shared_transf.feed_forward.{gate,up}_proj.weight 44 24
            model.layers.1.shared_transf.feed_forward.down_proj.weight 24 44
            model.layers.1.shared_transf.input_layernorm.weight 48
            model.layers.1.linear.weight 24 24
            """,
            at(MAMBA, "model.layers.0.mamba"),
            at(MAMBA, "model.layers.1.mamba_decoder.mamba"),
        ),
        {
            "model_type": "zamba",
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "hidden_size": 24,
            "attention_hidden_size": 48,
            "attention_head_dim": 8,
        },
        (
            layer(
                "model.layers.1.shared_transf.self_attn",
                "self separate 6 6 8",
                scale=0.5,
                roles=LLAMA_ROLES,
                facts={"in_features": 48},
            ),
        ),
    ),
    Case(
        "zamba2_concatenated_input_with_adapters",
        weights(
            """
            model.layers.1.shared_transformer.self_attn.{q,k,v}_proj.weight 48 48
            model.layers.1.shared_transformer.self_attn.o_proj.weight 24 48
            model.layers.1.shared_transformer.self_attn.linear_q_adapter_list.0.0.weight 4 48
            model.layers.1.shared_transformer.self_attn.linear_q_adapter_list.0.1.weight 48 4
            model.layers.1.shared_transformer.feed_forward.gate_up_proj.weight 88 24
            model.layers.1.shared_transformer.feed_forward.down_proj.weight 24 44
            model.layers.1.shared_transformer.feed_forward.gate_up_proj_adapter_list.0.0.weight 4 24
            model.layers.1.linear.weight 24 24
            """,
            at(MAMBA, "model.layers.0.mamba"),
        ),
        {
            "model_type": "zamba2",
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "num_query_groups": 6,
            "hidden_size": 24,
            "attention_hidden_size": 48,
            "attention_head_dim": 8,
        },
        (layer("model.layers.1.shared_transformer.self_attn", "self separate 6 6 8", scale=0.5),),
    ),
    Case(
        "decilm_key_heads_per_layer",
        weights(
            LLAMA_REST,
            """
            model.layers.{0,1}.self_attn.{q,o}_proj.weight 24 24
            model.layers.0.self_attn.{k,v}_proj.weight 8 24
            model.layers.1.self_attn.{k,v}_proj.weight 12 24
            """,
        ),
        {
            "model_type": "deci",
            "num_attention_heads": 6,
            "num_key_value_heads_per_layer": [2, 3],
            "hidden_size": 24,
        },
        (
            layer("model.layers.0.self_attn", "self separate 6 2 4"),
            layer("model.layers.1.self_attn", "self separate 6 3 4"),
        ),
    ),
    Case(
        "decilm_blocks_without_attention",
        weights(
            """
            model.layers.0.self_attn.{q,o}_proj.weight 24 24
            model.layers.0.self_attn.{k,v}_proj.weight 8 24
            model.layers.1.self_attn.linear_attn.weight 24 24
            model.layers.{0,1,2}.mlp.{gate,up}_proj.weight 44 24
            model.layers.{0,1,2}.mlp.down_proj.weight 24 44
            model.layers.{0,1}.input_layernorm.weight 24
            """
        ),
        {
            "model_type": "nemotron-nas",
            "num_attention_heads": 6,
            "num_key_value_heads": None,
            "hidden_size": 24,
            "block_configs": [
                {"attention": {"n_heads_in_group": 3, "no_op": False, "replace_with_linear": False}},
                {"attention": {"n_heads_in_group": None, "no_op": False, "replace_with_linear": True}},
                {"attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}},
            ],
        },
        (layer("model.layers.0.self_attn", "self separate 6 2 4"),),
    ),
    Case(
        "plamo_config_lies_about_key_heads",
        weights(
            """
            model.embed_tokens.weight 64 40
            model.layers.layers.{0,1}.self_attn.{q,o}_proj.weight 40 40
            model.layers.layers.{0,1}.self_attn.{k,v}_proj.weight 20 40
            model.layers.layers.{0,1}.self_attn.rotary_emb.inv_freq 2
            model.layers.layers.{0,1}.mlp.{gate,up}_proj.weight 44 40
            model.layers.layers.{0,1}.mlp.down_proj.weight 40 44
            model.layers.layers.{0,1}.norm.weight 40
            """
        ),
        {
            "model_type": "plamo",
            "num_attention_heads": 10,
            "num_key_value_heads": 10,
            "n_shared_head": 2,
            "hidden_size": 40,
        },
        layers("model.layers.layers.{}.self_attn", 2, "self separate 10 5 4", evidence={"kv_heads": "shape"}),
    ),
    Case(
        "plamo2_mixers",
        weights(
            """
            model.layers.layers.0.mixer.in_proj.weight 96 24
            model.layers.layers.0.mixer.conv1d.weight 48 1 4
            model.layers.layers.0.mixer.bcdt_proj.weight 34 48
            model.layers.layers.0.mixer.dt_proj.weight 6 2
            model.layers.layers.0.mixer.A_log 6
            model.layers.layers.0.mixer.D 6
            model.layers.layers.0.mixer.out_proj.weight 24 48
            model.layers.layers.1.mixer.qkv_proj.weight 50 24
            model.layers.layers.1.mixer.o_proj.weight 24 30
            model.layers.layers.1.mixer.q_weight 6 5
            model.layers.layers.1.mixer.k_weight 2 5
            model.layers.layers.{0,1}.mlp.gate_up_proj.weight 88 24
            model.layers.layers.{0,1}.mlp.down_proj.weight 24 44
            """
        ),
        {
            "model_type": "plamo2",
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size_per_head": 5,
            "hidden_size": 24,
        },
        (layer("model.layers.layers.1.mixer", "self fused-block 6 2 5", scale=ANY),),
    ),
    Case(
        "diffllama_differential",
        weights(
            LLAMA_REST,
            """
            model.layers.{0,1}.self_attn.{q,o}_proj.weight 24 24
            model.layers.{0,1}.self_attn.{k,v}_proj.weight 8 24
            model.layers.{0,1}.self_attn.{lambda_q1,lambda_k1,lambda_q2,lambda_k2} 4
            """,
        ),
        {"model_type": "diffllama", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 4",
            roles={**LLAMA_ROLES, "lambda": ".lambda_q1"},
        ),
    ),
    Case(
        "jamba_attention_among_mamba",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.1.self_attn.q_proj.weight 24 24
            model.layers.1.self_attn.{k,v}_proj.weight 8 24
            model.layers.1.self_attn.o_proj.weight 24 24
            model.layers.0.mamba.{dt_layernorm,b_layernorm,c_layernorm}.weight 2
            model.layers.1.feed_forward.router.weight 2 24
            model.layers.1.feed_forward.experts.{0,1}.{gate,up}_proj.weight 44 24
            model.layers.1.feed_forward.experts.{0,1}.down_proj.weight 24 44
            """,
            at(MAMBA, "model.layers.0.mamba"),
        ),
        {"model_type": "jamba", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24},
        (layer("model.layers.1.self_attn", "self separate 6 2 4"),),
    ),
    Case(
        "falcon_h1_attention_and_mamba_in_one_layer",
        weights(
            """
            model.layers.{0,1}.self_attn.q_proj.weight 30 24
            model.layers.{0,1}.self_attn.{k,v}_proj.weight 10 24
            model.layers.{0,1}.self_attn.o_proj.weight 24 30
            model.layers.{0,1}.mamba.in_proj.weight 122 24
            model.layers.{0,1}.mamba.conv1d.weight 68 1 4 +b
            model.layers.{0,1}.mamba.{A_log,D,dt_bias} 6
            model.layers.{0,1}.mamba.out_proj.weight 24 48
            model.layers.{0,1}.feed_forward.{gate,up}_proj.weight 44 24
            model.layers.{0,1}.feed_forward.down_proj.weight 24 44
            """
        ),
        {"model_type": "falcon_h1", **WIDE, "key_multiplier": 0.5},
        # The multiplier of the keys may be told as part of the scale or apart from it.
        layers(
            "model.layers.{}.self_attn",
            2,
            "self separate 6 2 5",
            scale=OneOf((1 / math.sqrt(5), 0.5 / math.sqrt(5))),
        ),
    ),
    Case(
        "nemotron_h_every_block_is_a_mixer",
        weights(
            """
            backbone.embeddings.weight 64 24
            backbone.layers.0.mixer.in_proj.weight 122 24
            backbone.layers.0.mixer.conv1d.weight 68 1 4 +b
            backbone.layers.0.mixer.{A_log,D,dt_bias} 6
            backbone.layers.0.mixer.norm.weight 48
            backbone.layers.0.mixer.out_proj.weight 24 48
            backbone.layers.1.mixer.up_proj.weight 44 24
            backbone.layers.1.mixer.down_proj.weight 24 44
            backbone.layers.2.mixer.q_proj.weight 30 24
            backbone.layers.2.mixer.{k,v}_proj.weight 10 24
            backbone.layers.2.mixer.o_proj.weight 24 30
            backbone.layers.{0,1,2}.norm.weight 24
            """
        ),
        {"model_type": "nemotron_h", **WIDE, "hybrid_override_pattern": "M-*"},
        (layer("backbone.layers.2.mixer", "self separate 6 2 5", roles=LLAMA_ROLES),),
    ),
    Case(
        "recurrent_gemma_temporal_blocks",
        weights(
            """
            model.embed_tokens.weight 64 24
            model.layers.0.temporal_block.{linear_x,linear_y,linear_out}.weight 24 24 +b
            model.layers.0.temporal_block.conv_1d.weight 24 1 4 +b
            model.layers.0.temporal_block.rg_lru.{input_gate_weight,recurrent_gate_weight} 6 4 4
            model.layers.0.temporal_block.rg_lru.{input_gate_bias,recurrent_gate_bias} 6 4
            model.layers.0.temporal_block.rg_lru.recurrent_param 24
            model.layers.1.temporal_block.q_proj.weight 24 24
            model.layers.1.temporal_block.{k,v}_proj.weight 4 24
            model.layers.1.temporal_block.o_proj.weight 24 24 +b
            model.layers.{0,1}.mlp_block.{gate,up}_proj.weight 44 24 +b
            model.layers.{0,1}.mlp_block.down_proj.weight 24 44 +b
            """
        ),
        {
            "model_type": "recurrent_gemma",
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "hidden_size": 24,
            "block_types": ["recurrent", "attention"],
        },
        (layer("model.layers.1.temporal_block", "self separate 6 1 4", roles=LLAMA_ROLES),),
    ),
    Case(
        "deformable_detr",
        weights(
            """
            model.encoder.layers.0.self_attn.sampling_offsets.weight 96 24 +b
            model.encoder.layers.0.self_attn.attention_weights.weight 48 24 +b
            model.encoder.layers.0.self_attn.{value_proj,output_proj}.weight 24 24 +b
            model.encoder.layers.0.fc1.weight 44 24 +b
            model.encoder.layers.0.fc2.weight 24 44 +b
            model.decoder.layers.0.self_attn.{k,v,q,out}_proj.weight 24 24 +b
            model.decoder.layers.0.encoder_attn.sampling_offsets.weight 96 24 +b
            model.decoder.layers.0.encoder_attn.attention_weights.weight 48 24 +b
            model.decoder.layers.0.encoder_attn.{value_proj,output_proj}.weight 24 24 +b
            model.level_embed 4 24
            model.reference_points.weight 2 24 +b
            """
        ),
        {
            "model_type": "deformable_detr",
            "d_model": 24,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
        },
        (
            layer("model.encoder.layers.0.self_attn", "None deformable * * *", ANY, optional=True),
            layer("model.decoder.layers.0.self_attn", "self separate 6 6 4"),
            layer("model.decoder.layers.0.encoder_attn", "None deformable * * *", ANY, optional=True),
        ),
    ),
)


# --- GGUF: names of its own, settings under the architecture's name --------------------------------------

GGUF: tuple[Case, ...] = (
    Case(
        "gguf_llama",
        weights(
            GGUF_REST,
            """
            blk.{0,1}.attn_q.weight 30 24
            blk.{0,1}.{attn_k,attn_v}.weight 10 24
            blk.{0,1}.attn_output.weight 24 30
            """,
        ),
        {
            "general.architecture": "llama",
            "llama.attention.head_count": 6,
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 5,
            "llama.attention.value_length": 5,
            "llama.embedding_length": 24,
            "llama.block_count": 2,
        },
        layers(
            "blk.{}",
            2,
            "self separate 6 2 5",
            roles={
                "q": ".attn_q.weight",
                "k": ".attn_k.weight",
                "v": ".attn_v.weight",
                "o": ".attn_output.weight",
            },
            facts={"rope_order": "interleaved"},
            evidence={"heads": "config"},
        ),
        config_source="GGUF metadata",
        dtype="q4_0",
        metadata_format="gguf",
    ),
    Case(
        "gguf_heads_per_layer",
        weights(
            """
            token_embd.weight 64 24
            blk.0.shortconv.in_proj.weight 72 24
            blk.0.shortconv.conv.weight 24 3
            blk.0.shortconv.out_proj.weight 24 24
            blk.1.attn_q.weight 24 24
            blk.1.{attn_k,attn_v}.weight 8 24
            blk.1.{attn_q_norm,attn_k_norm}.weight 4
            blk.1.attn_output.weight 24 24
            blk.{0,1}.{attn_norm,ffn_norm}.weight 24
            blk.{0,1}.{ffn_gate,ffn_up}.weight 44 24
            blk.{0,1}.ffn_down.weight 24 44
            """
        ),
        {
            "general.architecture": "lfm2",
            "lfm2.attention.head_count": 6,
            "lfm2.attention.head_count_kv": [0, 2],
            "lfm2.embedding_length": 24,
        },
        (
            layer(
                "blk.1",
                "self separate 6 2 4",
                roles={"q_norm": ".attn_q_norm.weight", "k_norm": ".attn_k_norm.weight"},
            ),
        ),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_openelm_arrays_and_fused",
        weights(
            """
            token_embd.weight 64 24
            blk.0.attn_qkv.weight 40 24
            blk.0.attn_output.weight 24 20
            blk.1.attn_qkv.weight 60 24
            blk.1.attn_output.weight 24 30
            blk.{0,1}.{attn_q_norm,attn_k_norm}.weight 5
            blk.{0,1}.ffn_gate.weight 44 24
            """
        ),
        {
            "general.architecture": "openelm",
            "openelm.attention.head_count": [4, 6],
            "openelm.attention.head_count_kv": [2, 3],
            "openelm.attention.key_length": 5,
            "openelm.embedding_length": 24,
        },
        (
            layer("blk.0", "self fused-block 4 2 5", roles={"qkv": ".attn_qkv.weight"}),
            layer("blk.1", "self fused-block 6 3 5"),
        ),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_bloom_reordered_to_blocks",
        weights(
            """
            token_embd.weight 64 24
            token_embd_norm.weight 24 +b
            blk.{0,1}.attn_norm.weight 24 +b
            blk.{0,1}.attn_qkv.weight 72 24 +b
            blk.{0,1}.attn_output.weight 24 24 +b
            blk.{0,1}.ffn_up.weight 96 24 +b
            blk.{0,1}.ffn_down.weight 24 96 +b
            """
        ),
        {
            "general.architecture": "bloom",
            "bloom.attention.head_count": 6,
            "bloom.attention.head_count_kv": 6,
            "bloom.embedding_length": 24,
        },
        layers("blk.{}", 2, "self fused-block 6 6 4", roles={"qkv_bias": ".attn_qkv.bias"}),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_falcon_grouped_blocks",
        weights(
            """
            token_embd.weight 64 24
            blk.{0,1}.{attn_norm,attn_norm_2}.weight 24 +b
            blk.{0,1}.attn_qkv.weight 40 24
            blk.{0,1}.attn_output.weight 24 24
            blk.{0,1}.ffn_up.weight 96 24
            blk.{0,1}.ffn_down.weight 24 96
            """
        ),
        {
            "general.architecture": "falcon",
            "falcon.attention.head_count": 6,
            "falcon.attention.head_count_kv": 2,
            "falcon.embedding_length": 24,
        },
        layers("blk.{}", 2, "self fused-block 6 2 4"),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_granite_scale",
        weights(
            GGUF_REST,
            """
            blk.{0,1}.{attn_q,attn_output}.weight 24 24
            blk.{0,1}.{attn_k,attn_v}.weight 8 24
            """,
        ),
        {
            "general.architecture": "granite",
            "granite.attention.head_count": 6,
            "granite.attention.head_count_kv": 2,
            "granite.attention.scale": 0.0625,
            "granite.embedding_length": 24,
        },
        layers("blk.{}", 2, "self separate 6 2 4", scale=0.0625),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_gemma2_soft_cap",
        weights(
            GGUF_REST,
            """
            blk.{0,1}.attn_q.weight 30 24
            blk.{0,1}.{attn_k,attn_v}.weight 10 24
            blk.{0,1}.attn_output.weight 24 30
            blk.{0,1}.{post_attention_norm,post_ffw_norm}.weight 24
            """,
        ),
        {
            "general.architecture": "gemma2",
            "gemma2.attention.head_count": 6,
            "gemma2.attention.head_count_kv": 2,
            "gemma2.attention.key_length": 5,
            "gemma2.attention.value_length": 5,
            "gemma2.attn_logit_softcapping": 50.0,
            "gemma2.embedding_length": 24,
        },
        layers("blk.{}", 2, "self separate 6 2 5", scale=ANY, facts={"soft_cap": 50.0}),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_gpt_oss_sinks",
        weights(
            """
            token_embd.weight 64 24
            blk.{0,1}.attn_q.weight 30 24 +b
            blk.{0,1}.{attn_k,attn_v}.weight 10 24 +b
            blk.{0,1}.attn_output.weight 24 30 +b
            blk.{0,1}.attn_sinks.weight 6
            blk.{0,1}.ffn_gate_inp.weight 3 24 +b
            blk.{0,1}.{ffn_gate_exps,ffn_up_exps}.weight 3 44 24
            blk.{0,1}.ffn_down_exps.weight 3 24 44
            """
        ),
        {
            "general.architecture": "gpt-oss",
            "gpt-oss.attention.head_count": 6,
            "gpt-oss.attention.head_count_kv": 2,
            "gpt-oss.attention.key_length": 5,
            "gpt-oss.attention.value_length": 5,
            "gpt-oss.embedding_length": 24,
        },
        layers(
            "blk.{}",
            2,
            "self separate 6 2 5",
            roles={"sinks": ".attn_sinks.weight", "q_bias": ".attn_q.bias"},
            facts={"sinks": True},
        ),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_qwen3next_gate_stays_interleaved",
        weights(
            """
            token_embd.weight 64 24
            blk.0.attn_qkv.weight 40 24
            blk.0.attn_gate.weight 12 24
            blk.0.ssm_conv1d.weight 40 4
            blk.0.{ssm_a,ssm_dt.bias} 4
            blk.0.ssm_ba.weight 8 24
            blk.0.ssm_norm.weight 3
            blk.0.ssm_out.weight 24 12
            blk.1.attn_q.weight 60 24
            blk.1.{attn_k,attn_v}.weight 10 24
            blk.1.{attn_q_norm,attn_k_norm}.weight 5
            blk.1.attn_output.weight 24 30
            blk.{0,1}.{attn_norm,post_attention_norm}.weight 24
            blk.{0,1}.{ffn_gate,ffn_up}.weight 44 24
            blk.{0,1}.ffn_down.weight 24 44
            """
        ),
        {
            "general.architecture": "qwen3next",
            "qwen3next.attention.head_count": 6,
            "qwen3next.attention.head_count_kv": 2,
            "qwen3next.attention.key_length": 5,
            "qwen3next.attention.value_length": 5,
            "qwen3next.embedding_length": 24,
        },
        (
            layer("blk.0", "None linear-attention|ssm * * *", scale=ANY, optional=True),
            layer("blk.1", "self separate 6 2 5", facts={"gate": "per-head"}),
        ),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_t5_cross",
        weights(
            """
            token_embd.weight 64 24
            {enc,dec}.blk.0.{attn_q,attn_k,attn_v}.weight 30 24
            {enc,dec}.blk.0.attn_o.weight 24 30
            {enc,dec}.blk.0.attn_rel_b.weight 32 6
            {enc,dec}.blk.0.{attn_norm,ffn_norm}.weight 24
            {enc,dec}.blk.0.{ffn_gate,ffn_up}.weight 44 24
            {enc,dec}.blk.0.ffn_down.weight 24 44
            dec.blk.0.{cross_attn_q,cross_attn_k,cross_attn_v}.weight 30 24
            dec.blk.0.cross_attn_o.weight 24 30
            dec.blk.0.cross_attn_norm.weight 24
            {enc,dec}.output_norm.weight 24
            """
        ),
        {
            "general.architecture": "t5",
            "t5.attention.head_count": 6,
            "t5.attention.key_length": 5,
            "t5.attention.value_length": 5,
            "t5.embedding_length": 24,
            "t5.attention.relative_buckets_count": 32,
        },
        (
            layer("enc.blk.0", "self separate 6 6 5", scale=1.0, roles={"q": "enc.blk.0.attn_q.weight"}),
            layer("dec.blk.0", "self separate 6 6 5", scale=1.0, roles={"o": ".attn_o.weight"}),
            layer(
                "dec.blk.0",
                "cross separate 6 6 5",
                scale=1.0,
                roles={"q": ".cross_attn_q.weight", "o": ".cross_attn_o.weight"},
            ),
        ),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_mla_fused_up_projection",
        weights(
            """
            token_embd.weight 64 40
            blk.{0,1}.attn_q_a.weight 9 40
            blk.{0,1}.attn_q_a_norm.weight 9
            blk.{0,1}.attn_q_b.weight 42 9
            blk.{0,1}.attn_kv_a_mqa.weight 13 40
            blk.{0,1}.attn_kv_a_norm.weight 11
            blk.{0,1}.attn_kv_b.weight 54 11
            blk.{0,1}.attn_output.weight 40 24
            blk.{0,1}.{ffn_gate,ffn_up}.weight 44 40
            blk.{0,1}.ffn_down.weight 40 44
            """
        ),
        {
            "general.architecture": "deepseek2",
            "deepseek2.attention.head_count": 6,
            "deepseek2.attention.head_count_kv": 6,
            "deepseek2.attention.key_length": 7,
            "deepseek2.attention.value_length": 4,
            "deepseek2.attention.q_lora_rank": 9,
            "deepseek2.attention.kv_lora_rank": 11,
            "deepseek2.rope.dimension_count": 2,
            "deepseek2.embedding_length": 40,
        },
        layers(
            "blk.{}",
            2,
            "self mla 6 6|1 7",
            roles={
                "q_a": ".attn_q_a.weight",
                "q_b": ".attn_q_b.weight",
                "kv_a": ".attn_kv_a_mqa.weight",
                "kv_b": ".attn_kv_b.weight",
            },
            facts={"v_head_dim": 4},
        ),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_mla_split_key_and_value",
        weights(
            """
            token_embd.weight 64 40
            blk.{0,1}.attn_q_a.weight 9 40
            blk.{0,1}.attn_q_a_norm.weight 9
            blk.{0,1}.attn_q_b.weight 42 9
            blk.{0,1}.attn_kv_a_mqa.weight 13 40
            blk.{0,1}.attn_kv_a_norm.weight 11
            blk.{0,1}.attn_k_b.weight 6 11 5
            blk.{0,1}.attn_v_b.weight 6 4 11
            blk.{0,1}.attn_output.weight 40 24
            blk.{0,1}.{ffn_gate,ffn_up}.weight 44 40
            blk.{0,1}.ffn_down.weight 40 44
            """
        ),
        {
            "general.architecture": "deepseek2",
            "deepseek2.attention.head_count": 6,
            "deepseek2.attention.head_count_kv": 1,
            "deepseek2.attention.key_length": 13,
            "deepseek2.attention.value_length": 11,
            "deepseek2.attention.key_length_mla": 7,
            "deepseek2.attention.value_length_mla": 4,
            "deepseek2.attention.q_lora_rank": 9,
            "deepseek2.attention.kv_lora_rank": 11,
            "deepseek2.rope.dimension_count": 2,
            "deepseek2.embedding_length": 40,
        },
        layers(
            "blk.{}",
            2,
            "self mla 6 6|1 7",
            roles={"q_a": ".attn_q_a.weight", "kv_a": ".attn_kv_a_mqa.weight", "o": ".attn_output.weight"},
            facts={"v_head_dim": 4},
        ),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "gguf_vision_tower",
        weights(
            """
            v.patch_embd.weight 24 3 4 4
            v.blk.{0,1}.{attn_q,attn_k,attn_v,attn_out}.weight 24 24 +b
            v.blk.{0,1}.{ln1,ln2}.weight 24 +b
            v.blk.{0,1}.ffn_up.weight 44 24 +b
            v.blk.{0,1}.ffn_down.weight 24 44 +b
            mm.{0,2}.weight 30 24 +b
            """
        ),
        {
            "general.architecture": "clip",
            "clip.has_vision_encoder": True,
            "clip.vision.attention.head_count": 6,
            "clip.vision.embedding_length": 24,
            "clip.vision.block_count": 2,
        },
        layers("v.blk.{}", 2, "self separate 6 6 4", roles={"o": ".attn_out.weight"}),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
)


# --- nothing here is softmax attention -------------------------------------------------------------------

NEGATIVE: tuple[Case, ...] = (
    Case(
        "plain_mlp",
        weights(
            """
            net.{0,2,4}.weight 24 24 +b
            layers.{0,1}.fc1.weight 44 24 +b
            layers.{0,1}.fc2.weight 24 44 +b
            output.weight 10 24 +b
            """
        ),
        None,
        (),
    ),
    Case(
        "mlp_in_proj_and_out_proj",
        weights(
            """
            blocks.{0,1}.mlp.in_proj.weight 72 24
            blocks.{0,1}.mlp.out_proj.weight 24 24
            blocks.{0,1}.mixer.in_proj.weight 72 24
            blocks.{0,1}.mixer.out_proj.weight 24 24
            blocks.{0,1}.conv.in_proj.weight 72 24
            """
        ),
        {"hidden_size": 24, "num_attention_heads": 6},
        (),
    ),
    Case(
        "mlp_inside_a_tower_named_attention",
        # "attention" stands in the path, but not in the module that holds in_proj.
        weights(
            """
            memory_attention.layers.{0,1}.mlp.in_proj.weight 72 24
            memory_attention.layers.{0,1}.mlp.out_proj.weight 24 24
            gated_cross_attn_layers.0.conv.in_proj.weight 72 24
            gated_cross_attn_layers.0.conv.out_proj.weight 24 24
            """
        ),
        {"hidden_size": 24, "num_attention_heads": 6},
        (),
    ),
    Case(
        "resnet_with_batch_norm_and_squeeze_excite",
        weights(
            """
            conv1.weight 8 3 7 7
            bn1.{weight,bias,running_mean,running_var} 8
            bn1.num_batches_tracked
            layer1.{0,1}.conv{1,2}.weight 8 8 3 3
            layer1.{0,1}.bn{1,2}.{weight,bias,running_mean,running_var} 8
            layer1.{0,1}.se.{fc1,fc2}.weight 8 8 1 1 +b
            layer1.{0,1}.attn.fc.weight 8 8 1 1
            layer2.0.downsample.0.weight 16 8 1 1
            fc.weight 10 16 +b
            """
        ),
        {"architecture": "seresnet"},
        (),
    ),
    Case(
        "unet_of_convolutions",
        weights(
            """
            time_embedding.linear_{1,2}.weight 24 24 +b
            down_blocks.0.resnets.0.conv{1,2}.weight 24 24 3 3 +b
            down_blocks.0.resnets.0.time_emb_proj.weight 24 24 +b
            down_blocks.0.downsamplers.0.conv.weight 24 24 3 3 +b
            conv_out.weight 4 24 3 3 +b
            """
        ),
        {"_class_name": "UNet2DModel", "attention_head_dim": 6},
        (),
    ),
    Case(
        "mamba1",
        weights(
            """
            backbone.embeddings.weight 64 24
            backbone.layers.{0,1}.norm.weight 24
            backbone.norm_f.weight 24
            """,
            at(MAMBA, "backbone.layers.0.mixer"),
            at(MAMBA, "backbone.layers.1.mixer"),
        ),
        {"model_type": "mamba", "hidden_size": 24, "state_size": 16},
        (),
    ),
    Case(
        "mamba2",
        weights(
            """
            backbone.embeddings.weight 64 24
            backbone.layers.{0,1}.mixer.{A_log,D,dt_bias} 6
            backbone.layers.{0,1}.mixer.conv1d.weight 68 1 4 +b
            backbone.layers.{0,1}.mixer.in_proj.weight 122 24
            backbone.layers.{0,1}.mixer.norm.weight 48
            backbone.layers.{0,1}.mixer.out_proj.weight 24 48
            """
        ),
        {"model_type": "mamba2", "hidden_size": 24, "num_heads": 6, "head_dim": 8},
        (),
    ),
    Case(
        "gguf_mamba",
        weights(
            """
            token_embd.weight 64 24
            blk.{0,1}.attn_norm.weight 24
            blk.{0,1}.ssm_in.weight 96 24
            blk.{0,1}.ssm_conv1d.weight 48 4 +b
            blk.{0,1}.ssm_x.weight 34 48
            blk.{0,1}.ssm_dt.weight 48 2 +b
            blk.{0,1}.ssm_a 48 16
            blk.{0,1}.ssm_d 48
            blk.{0,1}.ssm_out.weight 24 48
            """
        ),
        {"general.architecture": "mamba", "mamba.attention.head_count": 0, "mamba.embedding_length": 24},
        (),
        config_source="GGUF metadata",
        metadata_format="gguf",
    ),
    Case(
        "xlstm",
        weights(
            """
            embeddings.weight 64 24
            blocks.{0,1}.norm_mlstm.weight 24
            blocks.{0,1}.mlstm_layer.{q,k}.weight 12 24
            blocks.{0,1}.mlstm_layer.{v,ogate_preact,out_proj}.weight 24 24
            blocks.{0,1}.mlstm_layer.{igate_preact,fgate_preact}.weight 6 24 +b
            blocks.{0,1}.mlstm_layer.multihead_norm.weight 24
            blocks.{0,1}.ffn.{proj_up_gate,proj_up}.weight 44 24
            blocks.{0,1}.ffn.proj_down.weight 24 44
            """
        ),
        {"model_type": "xlstm", "hidden_size": 24, "num_heads": 6},
        (),
    ),
    Case(
        "rwkv",
        weights(
            """
            blocks.{0,1}.attention.{time_decay,time_first} 24
            blocks.{0,1}.attention.{time_mix_key,time_mix_value,time_mix_receptance} 1 1 24
            blocks.{0,1}.attention.{key,value,receptance,output}.weight 24 24
            blocks.{0,1}.feed_forward.{time_mix_key,time_mix_receptance} 1 1 24
            blocks.{0,1}.feed_forward.key.weight 96 24
            blocks.{0,1}.feed_forward.receptance.weight 24 24
            blocks.{0,1}.feed_forward.value.weight 24 96
            """
        ),
        {"model_type": "rwkv", "hidden_size": 24, "attention_hidden_size": 24},
        (),
    ),
    Case(
        "lstm",
        weights(
            """
            lstm.{weight_ih_l0,weight_hh_l0} 96 24
            lstm.{bias_ih_l0,bias_hh_l0} 96
            in_proj.weight 72 24 +b
            out_proj.weight 10 24 +b
            """
        ),
        None,
        (),
    ),
    Case(
        "mixture_of_experts_without_attention",
        weights(
            """
            layers.{0,1}.router.weight 3 24
            layers.{0,1}.gate.wg.weight 3 24
            layers.{0,1}.experts.{0,1,2}.w1.weight 44 24
            layers.{0,1}.experts.{0,1,2}.w2.weight 24 44
            layers.{0,1}.experts.{0,1,2}.w3.weight 44 24
            layers.{0,1}.experts.gate_up_proj 3 88 24
            """
        ),
        {"num_attention_heads": 6, "hidden_size": 24},
        (),
    ),
    Case(
        "embeddings_that_sound_like_attention",
        weights(
            """
            memory.key_value_memory.weight 64 24
            key_embedding.weight 64 24
            value_embeds.{0,1}.weight 64 24
            query_tokens 1 8 24
            query_position_embeddings.weight 10 24
            object_queries.weight 10 24
            query_embed.weight 10 24
            qa_outputs.weight 2 24 +b
            classifier.dense.weight 24 24 +b
            classifier.out_proj.weight 10 24 +b
            value_head.summary.weight 1 24 +b
            """
        ),
        {"hidden_size": 24},
        (),
    ),
    Case(
        "block_residual_query_only",
        weights(
            """
            model.layers.{0,1}.attn_residual.query 24
            model.layers.{0,1}.mlp.{gate,up}_proj.weight 44 24
            model.layers.{0,1}.mlp.down_proj.weight 24 44
            """
        ),
        {"hidden_size": 24, "num_attention_heads": 6},
        (),
    ),
    Case(
        "pointwise_gated_attention_of_patchtsmixer",
        weights(
            """
            model.encoder.mlp_mixer_encoder.mixers.0.feature_mixer.mlp.{fc1,fc2}.weight 24 24 +b
            model.encoder.mlp_mixer_encoder.mixers.0.feature_mixer.gating_block.attn_layer.weight 24 24 +b
            """
        ),
        {"model_type": "patchtsmixer", "d_model": 24},
        (),
    ),
    Case(
        "convolutional_codec",
        weights(
            """
            encoder.layers.0.conv.weight_g 24 1 1
            encoder.layers.0.conv.weight_v 24 1 7
            quantizer.layers.{0,1}.codebook.embed 64 24
            quantizer.{input_proj,output_proj}.weight 24 24 1
            """
        ),
        {"model_type": "encodec", "hidden_size": 24},
        (),
    ),
)

CASES: tuple[Case, ...] = SEPARATE + FUSED + ODD + GGUF + NEGATIVE
