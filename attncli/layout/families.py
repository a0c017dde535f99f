"""What families do by design: the factor on q·k, the order inside fused tensors, gains of 1 + weight.

Facts about published architectures, keyed by `model_type` (Hugging Face) or `general.architecture` (GGUF),
as rows. Nothing here judges; a factor that is not 1/√d is a fact of its family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from attncli.records import Evidence


def scale(
    model_type: str, raw: Mapping[str, Any], head_dim: int | None, layer: int | None
) -> tuple[float | None, Evidence]:
    """The factor that this architecture applies to q·k, and how that is known.

    "config": the config or its model type says so. "assumed": nothing says otherwise, so 1/√head_dim
    (Vaswani et al. 2017). None where the head size is unknown too, or the factor is learned.
    """
    for key, rule in _SCALE_KEYS.items():
        if raw.get(key) is not None:
            value = rule(raw, raw[key], head_dim)
            if value is not None:
                return value, "config"
    if model_type in _UNIT_SCALE:
        return 1.0, "config"
    if model_type in _LEARNED_SCALE:
        return None, "config"
    for types, rule_of_d in _SCALE_OF_HEAD_DIM:
        if model_type in types and head_dim:
            return rule_of_d(head_dim, raw), "config"
    if head_dim is None:
        return None, "assumed"
    standard = 1 / math.sqrt(head_dim)
    if raw.get("scale_attn_by_inverse_layer_idx") and layer is not None:
        return standard / (layer + 1), "config"
    return standard, "config" if model_type in _STANDARD_SCALE else "assumed"


def fused_order(model_type: str, raw: Mapping[str, Any]) -> str | None:
    """The layout of this architecture's fused q/k/v tensor, or None where the type does not settle it."""
    if model_type in ("falcon", "RefinedWeb", "RefinedWebModel"):
        if raw.get("new_decoder_architecture"):
            return "fused-group"
        return "fused-block" if raw.get("multi_query") else "fused-head"
    if model_type == "gpt_bigcode":
        return "fused-block" if raw.get("multi_query", True) else "fused-head"
    if model_type == "chatglm":
        return (
            "fused-block"
            if raw.get("multi_query_attention") or raw.get("multi_query_group_num")
            else "fused-head"
        )
    return _FUSED_ORDER.get(model_type)


def rotary_factor(raw: Mapping[str, Any]) -> float | None:
    """What the rotary embedding multiplies q·k by: 1 for a rotation, m² for YaRN and LongRoPE (m on q and on k).

    At least 1, since some dimensions may stay unrotated. None where the kind of scaling is not known.
    Source: Peng et al. 2023 (YaRN), arXiv 2309.00071, and the rotary utilities of transformers.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    if raw.get("rope.scaling.type") in ("yarn", "longrope"):  # GGUF
        rope = {"type": raw["rope.scaling.type"], "factor": raw.get("rope.scaling.factor")}
        rope["attention_factor"] = raw.get("rope.scaling.attn_factor") if rope["type"] == "longrope" else None
    if not isinstance(rope, Mapping):
        return 1.0
    kinds = [value for value in rope.values() if isinstance(value, Mapping)]  # one per type of layer
    factors = [_stretch(kind, raw) for kind in kinds or [rope]]
    if any(factor is None for factor in factors):
        return None
    return max(1.0, *(factor**2 for factor in factors if factor is not None))


def _stretch(rope: Mapping[str, Any], raw: Mapping[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default", "linear", "dynamic", "llama3", "ntk", "mrope", "none", "proportional"):
        return 1.0
    if kind not in ("yarn", "longrope", "su", "deepseek_yarn"):
        return None
    named = [rope.get(key, raw.get(key)) for key in ("attention_factor", "short_mscale", "long_mscale")]
    given = [
        float(value) for value in named if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    if given:
        return max(given)
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    longest = raw.get("max_position_embeddings")
    if kind in ("longrope", "su"):
        if isinstance(longest, (int, float)) and isinstance(original, (int, float)) and original > 1:
            factor = max(float(factor) if isinstance(factor, (int, float)) else 1.0, longest / original)
            return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return None
    if not isinstance(factor, (int, float)) or isinstance(factor, bool):
        return None
    if isinstance(longest, (int, float)) and isinstance(original, (int, float)) and original > 0:
        factor = max(factor, longest / original)
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if isinstance(mscale, (int, float)) and isinstance(all_dim, (int, float)) and mscale and all_dim:
        return _yarn_m(factor, mscale) / _yarn_m(factor, all_dim)
    return _yarn_m(factor, 1.0)


def _yarn_m(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def gain_is_one_plus_weight(model_type: str) -> bool | None:
    """Whether RMSNorm multiplies by 1 + weight. None: the family is not known, so neither is this."""
    if not model_type:
        return None
    return model_type in _ONE_PLUS_WEIGHT


def gated_query(model_type: str, raw: Mapping[str, Any]) -> bool:
    """Whether q_proj packs [q | gate] per head by this family's definition."""
    return (
        model_type in _GATED_QUERY
        or bool(raw.get("attention_output_gate"))
        or bool(raw.get("attn_output_gate"))
    )


def kv_head_is_modulo(model_type: str) -> bool:
    """PLaMo repeats the whole list of KV heads: query head h reads KV head h mod K, not h // (H/K)."""
    return model_type == "plamo"


def _power(exponent: float) -> Callable[[Mapping[str, Any], Any, int | None], float | None]:
    return lambda raw, value, head_dim: (
        float(value) ** exponent if isinstance(value, (int, float)) and value > 0 else None
    )


def _as_is(raw: Mapping[str, Any], value: Any, head_dim: int | None) -> float | None:
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        else None
    )


def _one_over_d(raw: Mapping[str, Any], value: Any, head_dim: int | None) -> float | None:
    return 1 / head_dim if value and head_dim else None


def _unit_if_off(raw: Mapping[str, Any], value: Any, head_dim: int | None) -> float | None:
    return 1.0 if value is False else None


def _deberta(head_dim: int, raw: Mapping[str, Any]) -> float:
    kinds = raw.get("pos_att_type") or ()
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    return 1 / math.sqrt(head_dim * (1 + sum(kind in ("c2p", "p2c") for kind in kinds)))


def _mla_yarn(head_dim: int, raw: Mapping[str, Any]) -> float:
    """(d_nope + d_rope)^-1/2 · m², m = 0.1·mscale_all_dim·ln(factor) + 1 under YaRN (DeepSeek-V2)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    factor, all_dim = (
        (rope.get("factor"), rope.get("mscale_all_dim")) if isinstance(rope, Mapping) else (None, None)
    )
    correction = 1.0
    if isinstance(factor, (int, float)) and factor > 1 and isinstance(all_dim, (int, float)) and all_dim:
        correction = (0.1 * all_dim * math.log(factor) + 1.0) ** 2
    return correction / math.sqrt(head_dim)


def query_scale_named(names: str) -> float | None:
    """The factor that the tensors' own names give away where there is no config: T5's modules only."""
    return (
        1.0
        if re.search(
            r"(^|\.)(SelfAttention|EncDecAttention|LocalSelfAttention|TransientGlobalSelfAttention)(\.|$)",
            names,
        )
        else None
    )


# --- tables -------------------------------------------------------------------------------------------

_SCALE_KEYS: dict[str, Callable[[Mapping[str, Any], Any, int | None], float | None]] = {
    "attention_multiplier": _as_is,  # Granite, HyperCLOVA-X (muP)
    "query_pre_attn_scalar": _power(-0.5),  # Gemma 2 and 3, T5Gemma, VaultGemma
    "attn_output_multiplier": _as_is,  # Grok-1
    "softmax_scale": _as_is,  # MPT, GGUF
    "mup_scale_qk_dot_by_d": _one_over_d,  # JAIS, BTLM
    "scale_qk_dot_by_d": _one_over_d,
    "scale_attn_weights": _unit_if_off,  # GPT-2 family
    "scale_qk": _unit_if_off,  # diffusers
}
_UNIT_SCALE = frozenset(
    "t5 mt5 umt5 longt5 switch_transformers pop2piano pix2struct pix2struct_text_model "
    "pix2struct_vision_model udop t5encoder gpt_neo dia dia_encoder dia_decoder gemma3n gemma3n_text "
    "gemma4 gemma4_text gemma4_vision gemma4_unified gemma4_unified_text embedding_gemma2 "
    "embedding_gemma2_text diffusion_gemma gemma4_assistant".split()
)
_LEARNED_SCALE = frozenset("swinv2 swin2sr timesfm timesfm2_5 videoprism".split())
_DEBERTA = frozenset({"deberta", "deberta-v2", "sew-d"})
_MLA = frozenset(
    "deepseek_v2 deepseek_v3 deepseek_v32 deepseek2 kimi_k2 kimi_k25 kimi_linear glm4_moe_lite "
    "glm_moe_dsa minicpm3 longcat_flash youtu axk1 axk2 bailing_hybrid hy_v4 mistral4".split()
)
_SCALE_OF_HEAD_DIM: tuple[tuple[frozenset[str], Callable[[int, Mapping[str, Any]], float]], ...] = (
    (_DEBERTA, _deberta),
    (_MLA, _mla_yarn),
    (frozenset({"zamba", "zamba2"}), lambda d, raw: (d / 2) ** -0.5),
    (frozenset({"inkling", "inkling_text", "inkling_mm_model"}), lambda d, raw: 1 / d),
)
# Families whose published code is read to multiply by 1/√head_dim.
_STANDARD_SCALE = frozenset(
    "llama mistral mixtral qwen2 qwen2_moe qwen2_vl qwen2_5_vl qwen3 qwen3_moe qwen3_vl qwen3_next phi "
    "phi3 phimoe gpt2 gpt_neox gptj bloom falcon mpt codegen gpt_bigcode opt bart mbart pegasus marian "
    "m2m_100 blenderbot whisper bert roberta xlm-roberta camembert electra albert distilbert mpnet vit "
    "deit clip siglip olmo olmo2 olmo3 olmoe cohere cohere2 starcoder2 stablelm smollm3 gemma internlm2 "
    "baichuan modernbert persimmon gpt_oss glm glm4 dbrx layoutlm layoutlmv2 wav2vec2 hubert esm xlnet".split()
)
_FUSED_ORDER = {
    "gpt2": "fused-block",
    "openai-gpt": "fused-block",
    "imagegpt": "fused-block",
    "decision_transformer": "fused-block",
    "bloom": "fused-head",
    "gpt_neox": "fused-head",
    "gpt_neox_japanese": "fused-head",
    "persimmon": "fused-head",
    "fuyu": "fused-head",
    "codegen": "fused-qvk",
    "deberta": "fused-head",
    "internlm2": "fused-group",
    "internvl_chat": "fused-group",
    "baichuan": "fused-block",
    "mpt": "fused-block",
    "dbrx": "fused-block",
    "modernbert": "fused-block",
    "phi3": "fused-block",
    "phi4_multimodal": "fused-block",
    "openelm": "fused-block",
    "mimo_v2": "fused-rank",
    "mimo_v2_flash": "fused-rank",
    "mimo_v2_5": "fused-rank",
    "maxxvit": "fused-head",
    "levit": "fused-unequal",
    "tiny_vit": "fused-unequal",
}
_ONE_PLUS_WEIGHT = frozenset(
    "gemma gemma2 gemma3 gemma3_text recurrent_gemma vaultgemma t5gemma t5gemma2 paligemma qwen3_next "
    "qwen3_5 qwen3_5_moe nemotron".split()
)
_GATED_QUERY = frozenset({"qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen4_exp"})
# Families in which the norm that stands where the names say is known to feed q, k and v directly, and in
# which q/k norms are what their names say. Read in their published code; a proof rests on nothing less.
NORM_BEFORE_ATTENTION = frozenset(
    "llama mistral mixtral ministral ministral3 qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2 gemma3 "
    "gemma3_text nemotron olmo2 olmo3 olmoe cohere cohere2 phi phi3 phimoe glm glm4 smollm3 starcoder2 granite "
    "granitemoe gpt2 gpt_neox gptj gpt_neo bloom falcon mpt codegen gpt_bigcode opt mbart pegasus whisper bert "
    "roberta xlm-roberta camembert electra distilbert vit deit clip clip_text_model clip_vision_model siglip "
    "siglip_text_model siglip_vision_model t5 mt5 umt5 deepseek_v2 deepseek_v3 gpt_oss exaone4 hunyuan_v1_dense "
    "diffllama bitnet arcee ernie4_5 seed_oss internlm2 swinv2 swin2sr stablelm persimmon".split()
)
