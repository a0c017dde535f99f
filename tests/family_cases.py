"""Tiny models of transformers by model type: one row each, with what their designs say of their attention.

A model type's own default configuration is shrunk by the names of its settings; a row adds what the names do
not tell. Nothing is downloaded, and weights are drawn wide enough that no row of attention is nearly uniform.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOKENS = 12
BATCH = 2

Make = Callable[[], dict[str, Tensor]]


class Row(NamedTuple):
    """One model type. `masks`, `scales`, `kv_heads`: all that its calls may show, and each at least once.

    `settings`: besides the shrunk defaults. `batch`: None makes one from the signature. `windows`: tokens.
    `calls`: how many attention calls run, where that is not the number of returned tensors, and `why`: a
    sentence. `read`: a returned tensor → probabilities, where it holds something else; `found`: whether the
    returned tensors are to be found among the calls at all.
    """

    type: str
    masks: tuple[str, ...] = ("none",)
    scales: tuple[float | None, ...] = (8**-0.5,)
    kv_heads: tuple[int, ...] = (4,)
    windows: tuple[int, ...] = ()
    settings: Mapping[str, Any] = {}
    batch: Make | None = None
    calls: int | None = None
    why: str = ""
    read: Callable[[Tensor], Tensor] = lambda tensor: tensor
    found: bool = True


def tiny(row: Row) -> Any:
    """The model of a row in eval mode with eager attention, its weights drawn from a fixed seed."""
    from transformers import CONFIG_MAPPING, AutoModel

    family = CONFIG_MAPPING[row.type]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = family(**_shrunk(family, row.settings))
        model = AutoModel.from_config(config, attn_implementation="eager").eval()
    return livened(model)


def livened(model: Any) -> Any:
    """Weights as large as those of trained models: a fresh one attends to all keys alike."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 1.5 / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(noise * 0.1)
    return model


def ids(length: int = TOKENS, vocabulary: int = 90) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {"input_ids": torch.randint(5, vocabulary, (BATCH, length), generator=draw)}


def floats(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(3))}


def with_decoder(encoder: Mapping[str, Tensor], length: int = 7) -> dict[str, Tensor]:
    return {**encoder, "decoder_input_ids": ids(length)["input_ids"]}


def attention_tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all attention that a model returned, two towers deep."""
    for name, value in output.items():
        if isinstance(value, Mapping):
            yield from attention_tensors(value)
        elif "attentions" in name:
            yield from ((name, tensor) for tensor in _flat(value))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)


def _shrunk(family: Any, settings: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Arguments for a configuration class: its defaults, made small by name, parts of it likewise."""
    default = family()
    values = default.to_dict()
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in settings:
            continue
        part = getattr(default, name, None)
        if depth < 3 and hasattr(part, "to_dict"):
            inner = _shrunk(type(part), {}, depth + 1)
            small[name] = {**inner, "model_type": part.model_type} if part.model_type else inner
        elif name == "layer_types" and isinstance(value, list):
            # One layer of each type, or two of the only one.
            kinds = list(dict.fromkeys(value))
            small[name] = kinds if len(kinds) > 1 else value[:2]
            small |= {key: len(small[name]) for key in _LAYERS if key in values}
        elif type(value) is int and value > 0:
            smaller = _smaller(name, value, values)
            if smaller is not None:
                small[name] = smaller
    return {**small, **settings}


def _smaller(name: str, value: int, values: Mapping[str, Any]) -> int | None:
    if name in SMALL:
        return min(value, SMALL[name])
    if name in ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_key_value_groups"):
        heads = next((values[key] for key in _HEADS if isinstance(values.get(key), int)), None)
        return 4 if value == heads else 1 if value == 1 else 2
    if name.endswith(("token_id", "pad_idx")) and value >= SMALL["vocab_size"]:
        return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(name, 90 + len(name) % 7)
    return None


def _named(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


# --- tables -------------------------------------------------------------------------------------------

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")

SMALL = {
    **_named(32, "hidden_size d_model n_embd dim embed_dim embedding_size encoder_hidden_size"),
    **_named(32, "decoder_hidden_size text_embed_dim d_embed emb_dim model_dim decoder_hidden_dim"),
    **_named(32, "encoder_hidden_dim projection_dim hidden_dim out_hidden_size embedding_dim"),
    **_named(32, "word_embed_proj_dim width attention_hidden_size dim_model encoder_dim decoder_dim"),
    **_named(32, "hidden_channels channels"),
    **_named(2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    **_named(2, "num_decoder_layers num_encoder_layers depth num_hidden_groups e_layers d_layers"),
    **_named(2, "l_layers x_layers r_layers num_blocks num_transformer_layers"),
    **_named(2, "decoder_num_hidden_layers encoder_num_hidden_layers num_encoder_blocks"),
    **_named(4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads"),
    **_named(4, "decoder_attention_heads heads num_cross_attention_heads num_self_attention_heads"),
    **_named(4, "attention_heads decoder_num_attention_heads num_encoder_attention_heads"),
    **_named(4, "num_decoder_attention_heads encoder_num_attention_heads"),
    **_named(48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner"),
    **_named(48, "ffn_hidden_size d_inner hidden_dim_ffn feed_forward_size mlp_dim dim_feedforward"),
    **_named(48, "encoder_intermediate_size decoder_intermediate_size"),
    **_named(99, "vocab_size n_vocab src_vocab_size tgt_vocab_size"),
    **_named(64, "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions"),
    **_named(64, "max_seq_len"),
    **_named(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_named(2, "num_experts_per_tok moe_topk top_k"),
    **_named(16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    **_named(16, "q_lora_rank kv_lora_rank moe_shared_expert_intermediate_size"),
    **_named(1, "n_group topk_group"),
    **_named(8, "head_dim d_kv qk_nope_head_dim v_head_dim attention_head_size kv_channels"),
    **_named(8, "attn_head_dim head_size d_head"),
    **_named(4, "qk_rope_head_dim"),
    **_named(5, "sliding_window local_attention window_size_llm"),
    **_named(32, "image_size img_size"),
    **_named(8, "patch_size"),
    **_named(8, "num_mel_bins"),
}

D8 = 8**-0.5
CAUSAL = ("causal",)
CAUSAL_WINDOW = ("causal", "causal + sliding window")
CAUSAL_NONE = ("causal", "none")

_MLA = {"num_key_value_heads": 4, "head_dim": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "use_mamba_kernels": False,
}
_GEMMA3N = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
    "activation_sparsity_pattern": [0.0, 0.0],
    "intermediate_size": [48, 48],
}
_WHISPER = {
    "max_source_positions": 20,
    "num_mel_bins": 8,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}
_SPEECH = {
    "num_mel_bins": 8,
    "input_feat_per_channel": 8,
    "conv_channels": 32,
    "max_source_positions": 40,
    "max_target_positions": 40,
}
_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_queries": 5,
    "backbone_config": _BACKBONE,
}
_SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}
_PERCEIVER = {
    "num_latents": 8,
    "d_latents": 32,
    "d_model": 16,
    "num_blocks": 1,
    "num_self_attends_per_block": 2,
}
_HIERA = {
    "image_size": [32, 32],
    "patch_size": [3, 3],
    "patch_stride": [4, 4],
    "patch_padding": [1, 1],
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "query_stride": [2, 2],
    "num_query_pool": 1,
    "masked_unit_size": [4, 4],
}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def _heads_first(probs: Tensor) -> Tensor:
    """Blocks of queries stand before the heads: (B, blocks, H, T, S) → (B, H, blocks, T, S)."""
    return probs.transpose(1, 2) if probs.dim() == 5 else probs


ROWS = (
    # Ordinary: the row is the whole story.
    Row("albert"),
    Row("apertus", CAUSAL),
    Row("arcee", CAUSAL),
    Row("audioflamingo3_encoder"),
    Row("axk2", CAUSAL, scales=(12**-0.5,)),
    Row("bart", CAUSAL_NONE),
    Row("beit"),
    Row("bert"),
    Row("bigbird_pegasus", CAUSAL_NONE),
    Row("biogpt", CAUSAL),
    Row("bitnet", CAUSAL, kv_heads=(2,)),
    Row("blenderbot", CAUSAL_NONE),
    Row("blenderbot-small", CAUSAL_NONE),
    Row("blip"),
    Row("bloom", ("causal + bias",)),
    Row("camembert"),
    Row("canine"),
    Row("chinese_clip"),
    Row("clip", CAUSAL_NONE),
    Row("clipseg", CAUSAL_NONE),
    Row("cohere", CAUSAL),
    Row("cohere2", CAUSAL_WINDOW, windows=(5,)),
    Row("cohere2_moe", CAUSAL_WINDOW, windows=(5,)),
    Row("convbert", kv_heads=(2,)),
    Row("ctrl", CAUSAL),
    Row("cwm", CAUSAL_WINDOW, kv_heads=(2,), windows=(5,)),
    Row("data2vec-text"),
    Row("decision_transformer", CAUSAL, scales=(32**-0.5,), kv_heads=(1,)),
    Row("deepseek_v32", CAUSAL, scales=(12**-0.5,)),
    Row("deit"),
    Row("dinov2"),
    Row("dinov2_with_registers"),
    Row("distilbert"),
    Row("dpr"),
    Row("electra"),
    Row("esmc"),
    Row("eurobert"),
    Row("exaone4", CAUSAL_WINDOW, windows=(5,)),
    Row("falcon", CAUSAL, kv_heads=(1,)),
    Row("flaubert"),
    Row("flex_olmo", CAUSAL),
    Row("fsmt"),
    Row("gemma", CAUSAL),
    Row("gemma2", CAUSAL_WINDOW, scales=(256**-0.5,), kv_heads=(2,), windows=(5,)),
    Row("gemma3_text", CAUSAL_WINDOW, scales=(256**-0.5,), kv_heads=(2,), windows=(5,)),
    Row("git", CAUSAL),
    Row("glm", CAUSAL, kv_heads=(2,)),
    Row("glm4", CAUSAL, kv_heads=(2,)),
    Row("glm4_moe", CAUSAL, kv_heads=(2,)),
    Row("glm4_moe_lite", CAUSAL, scales=(12**-0.5,)),
    Row("glm_moe_dsa", CAUSAL, scales=(12**-0.5,)),
    Row("glmasr_encoder"),
    Row("gpt2", CAUSAL),
    Row("gpt_bigcode", CAUSAL, kv_heads=(1,)),
    Row("gpt_neox", CAUSAL),
    Row("gpt_neox_japanese", CAUSAL),
    Row("gpt_oss", CAUSAL_WINDOW, kv_heads=(2,), windows=(5,)),
    Row("granite", CAUSAL, scales=(1.0,)),
    Row("granitemoe", CAUSAL, scales=(1.0,)),
    Row("granitemoeshared", CAUSAL, scales=(1.0,)),
    Row("helium", CAUSAL),
    Row("hubert"),
    Row("ibert"),
    Row("ijepa"),
    Row("imagegpt", CAUSAL),
    Row("layoutlm"),
    Row("lfm2", CAUSAL, kv_heads=(2,)),
    Row("lfm3", CAUSAL_WINDOW, kv_heads=(2,), windows=(5,)),
    Row("lfm3_vl_vision", kv_heads=(2,)),
    Row("llama", CAUSAL),
    Row("llama4_text", CAUSAL, kv_heads=(2,)),
    Row("llava", CAUSAL),
    Row("marian", CAUSAL_NONE),
    Row("markuplm"),
    Row("mbart", CAUSAL_NONE),
    Row("megatron-bert"),
    Row("minicpm3", CAUSAL, scales=(12**-0.5,)),
    Row("minimax_m2", CAUSAL, kv_heads=(2,)),
    Row("mistral", ("causal + sliding window",), kv_heads=(2,), windows=(5,)),
    Row("mistral4", CAUSAL, scales=(0.636768,)),
    Row("mixtral", CAUSAL, kv_heads=(2,)),
    Row("mlcd"),
    Row("mllama", CAUSAL, kv_heads=(2,)),
    Row("modernbert", ("none", "sliding window"), windows=(5,)),
    Row("modernbert-decoder", CAUSAL_WINDOW, windows=(5,)),
    Row("molmo2_text", CAUSAL, kv_heads=(2,)),
    Row("moshi", CAUSAL),
    Row("mpnet", ("bias",)),
    Row("mpt", ("causal + bias",)),
    Row("mt5", ("bias", "causal + bias", "none"), scales=(1.0,)),
    Row("nanochat", CAUSAL),
    Row("nomic_bert"),
    Row("nystromformer"),
    Row("olmo", CAUSAL),
    Row("olmo2", CAUSAL),
    Row("olmo3", CAUSAL_WINDOW, windows=(5,)),
    Row("olmo_hybrid", CAUSAL),
    Row("olmoe", CAUSAL),
    Row("opt", CAUSAL),
    Row("owlv2", CAUSAL_NONE),
    Row("parakeet_ctc", ("bias",)),
    Row("pegasus", CAUSAL_NONE),
    Row("persimmon", CAUSAL),
    Row("phi", CAUSAL),
    Row("phi3", CAUSAL),
    Row("phimoe", CAUSAL, kv_heads=(2,)),
    Row("pixtral", ("other",)),
    Row("plbart", CAUSAL_NONE),
    Row("qwen2", CAUSAL),
    Row("qwen2_audio_encoder"),
    Row("qwen2_moe", CAUSAL),
    Row("qwen3", CAUSAL),
    Row("qwen3_5_text", CAUSAL, kv_heads=(2,)),
    Row("qwen3_moe", CAUSAL, kv_heads=(2,)),
    Row("rembert"),
    Row("roberta"),
    Row("roformer"),
    Row("sapiens2"),
    Row("seed_oss", CAUSAL, kv_heads=(2,)),
    Row("sew"),
    Row("sew-d", ("bias",), scales=(24**-0.5,)),
    Row("smollm3", CAUSAL, kv_heads=(2,)),
    Row("stablelm", CAUSAL),
    Row("starcoder2", CAUSAL, kv_heads=(2,)),
    Row("switch_transformers", ("bias", "causal + bias", "none"), scales=(1.0,)),
    Row(
        "t5gemma",
        ("causal", "causal + sliding window", "none", "sliding window"),
        scales=(256**-0.5,),
        kv_heads=(2,),
        windows=(5, 11),
    ),
    Row("tipsv2"),
    Row("ultrabert", ("none", "sliding window"), windows=(11,)),
    Row("vision-text-dual-encoder"),
    Row("vit"),
    Row("vit_msn"),
    Row("wav2vec2-bert", ("bias",)),
    Row("xlm"),
    Row("xlm-roberta-xl"),
    # Scales, masks and heads of their own.
    Row(
        "deberta",
        ("bias",),
        (24**-0.5,),
        settings={"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    ),
    Row(
        "deberta-v2",
        ("bias",),
        (24**-0.5,),
        settings={"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
    Row("t5", ("bias", "causal + bias", "none"), (1.0,)),
    Row(
        "deepseek_v2",
        CAUSAL,
        (12**-0.5,),
        settings={**_MLA, "topk_method": "greedy"},
    ),
    Row("deepseek_v3", CAUSAL, (12**-0.5,), settings=_MLA),
    Row(
        "deepseek_v4",
        ("causal + sliding window", "other"),
        kv_heads=(1,),
        windows=(5,),
    ),
    Row(
        "gpt_neo",
        CAUSAL_WINDOW,
        (1.0,),
        windows=(5,),
        settings={"attention_types": [[["global", "local"], 1]], "window_size": 5},
    ),
    Row("gptj", CAUSAL, settings={"rotary_dim": 8}),
    Row("codegen", CAUSAL, settings={"rotary_dim": 8}),
    Row("jamba", CAUSAL, kv_heads=(2,), settings=_JAMBA),
    Row("jetmoe", CAUSAL, kv_heads=(2,)),
    Row(
        "qwen2_vl_text",
        CAUSAL,
        kv_heads=(2,),
        settings={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    ),
    Row("gemma3n_text", CAUSAL_WINDOW, (1.0,), (2,), (5,), settings=_GEMMA3N),
    Row(
        "esm",
        settings={
            "vocab_size": 33,
            "position_embedding_type": "rotary",
            "pad_token_id": 1,
            "mask_token_id": 4,
        },
        batch=lambda: ids(vocabulary=30),
    ),
    # Encoders and decoders, sound and sight.
    Row(
        "whisper",
        CAUSAL_NONE,
        settings=_WHISPER,
        batch=lambda: with_decoder(floats("input_features", 2, 8, 40)),
    ),
    Row(
        "speech_to_text",
        CAUSAL_NONE,
        settings=_SPEECH,
        batch=lambda: with_decoder(floats("input_features", 2, 40, 8)),
    ),
    Row("moonshine", CAUSAL_NONE, batch=lambda: with_decoder(floats("input_values", 2, 4000))),
    Row("detr", settings=_DETR, batch=lambda: floats("pixel_values", 2, 3, 64, 64)),
    Row(
        "yolos",
        settings={"image_size": [32, 32], "num_detection_tokens": 4},
        batch=lambda: floats("pixel_values", 2, 3, 32, 32),
    ),
    Row("videomae", settings={"num_frames": 4}, batch=lambda: floats("pixel_values", 1, 4, 3, 32, 32)),
    Row(
        "vivit",
        settings={"num_frames": 4, "tubelet_size": [2, 8, 8]},
        batch=lambda: floats("pixel_values", 1, 4, 3, 32, 32),
    ),
    Row(
        "segformer", kv_heads=(2, 4), settings=_SEGFORMER, batch=lambda: floats("pixel_values", 2, 3, 32, 32)
    ),
    Row("perceiver", scales=(8**-0.5, 0.5), settings=_PERCEIVER, batch=lambda: floats("inputs", 2, 10, 16)),
    # Local and sparse.
    Row("longformer", ("other",), (1.0,), settings={"attention_window": 4}, batch=lambda: ids(16)),
    Row(
        "led",
        ("causal", "none", "other"),
        (1.0, 8**-0.5),
        settings={"attention_window": 4},
        batch=lambda: with_decoder(ids(16)),
    ),
    Row(
        "longt5",
        ("causal + bias", "causal + sliding window + padding + bias", "none"),
        (1.0,),
        settings={"local_radius": 3},
        windows=(7,),
        read=_heads_first,
    ),
    Row("hiera", kv_heads=(2, 4), settings=_HIERA, batch=lambda: floats("pixel_values", 2, 3, 32, 32)),
    Row("xlnet", ("bias",)),
    # What the model returns is not what it computes.
    Row(
        "swin",
        ("bias",),
        kv_heads=(2, 4),
        settings=_SWIN,
        batch=lambda: floats("pixel_values", 2, 3, 32, 32),
        calls=4,
        why="Returns the attention of the last block of each stage only.",
    ),
    Row(
        "swinv2",
        ("bias",),
        (None,),
        (2, 4),
        settings=_SWIN,
        batch=lambda: floats("pixel_values", 2, 3, 32, 32),
        calls=4,
        why="Returns the attention of the last block of each stage only.",
    ),
    Row(
        "timesformer",
        settings={"num_frames": 4},
        batch=lambda: floats("pixel_values", 1, 4, 3, 32, 32),
        calls=4,
        why="Returns attention over space only, not over time.",
    ),
    Row("aimv2_vision_model", calls=3, why="Returns no attention of its pooling head."),
    Row("siglip", calls=5, why="Returns no attention of its pooling head."),
    Row("siglip_vision_model", calls=3, why="Returns no attention of its pooling head."),
    Row("flava", calls=6, why="Returns no attention of its multimodal encoder among those of the towers."),
    Row("diffllama", CAUSAL, calls=4, why="Computes the same weights twice a layer and returns the first."),
    Row("squeezebert", read=lambda tensor: tensor.softmax(-1), why="Returns the scores before the softmax."),
    Row(
        "cpmant",
        ("bias",),
        (128**-0.5,),
        calls=2,
        why="Cuts its learned prompt out of the tensors that it returns.",
        found=False,
    ),
    Row(
        "big_bird",
        settings={
            "block_size": 4,
            "num_random_blocks": 1,
            "max_position_embeddings": 64,
            "attention_type": "block_sparse",
        },
        batch=lambda: ids(48),
        calls=10,
        why="Assembles one map of all tokens from the softmaxes of five kinds of blocks.",
        found=False,
    ),
    Row("qwen2_5_vl_vision", calls=4, why="Returns hidden states under the name of attentions.", found=False),
    # No softmax attention at all.
    Row("mamba", (), (), (), calls=0),
    Row("falcon_mamba", (), (), (), calls=0),
    Row("fnet", (), (), (), calls=0),
    Row("resnet", (), (), (), settings=_RESNET, batch=lambda: floats("pixel_values", 2, 3, 32, 32), calls=0),
    Row("mobilenet_v1", (), (), (), calls=0),
    Row("poolformer", (), (), (), calls=0),
    Row(
        "rwkv",
        (),
        (),
        (),
        calls=0,
        why="Returns its linear attention, which is no distribution.",
        found=False,
    ),
)
