"""One parameter name → the roles it can play: the vocabulary of attention, and the rule behind most of it.

Names that follow the pattern of swapping q → k → v need no entry; the tables at the foot hold only the names
that cannot be guessed from their form. A new spelling is one row there.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

# A role and the spelling it came in: "q_proj" → ("q", "{q}_proj"); only equal spellings pair up.
Role = tuple[str, str]


class Place(NamedTuple):
    """One way to read a name: the module that holds it, its leaf there, "weight" or "bias", and its role."""

    container: str
    leaf: str
    param: str
    role: str
    spelling: str


def places(name: str) -> list[Place]:
    """Each way in which the tensor of this name can belong to an attention module."""
    segments = name.split(".")
    param = segments.pop() if len(segments) > 1 and segments[-1] in _PARAMETERS else ""
    if not segments:
        return []
    if len(segments) > 1 and segments[-1] in _WRAPPER_SUFFIXES:
        inner = _role(segments[-2])
        thin = segments[-1] not in ("proj", "projection") or segments[-2] in _BARE_NAMES
        if inner is not None and inner[0] in PROJECTIONS and thin:
            segments.pop()
    found = []
    # Dotted leaves are few; their last word tells at once whether one is possible.
    for steps in (1, 2, 3) if segments[-1] in _LAST_OF_DOTTED else (1,):
        if len(segments) < steps:
            break
        leaf = ".".join(segments[-steps:])
        role = _role(leaf)
        if role is not None:
            found.append(Place(".".join(segments[:-steps]), leaf, param, *role))
    return found


@lru_cache(maxsize=65536)
def _role(leaf: str) -> Role | None:
    if leaf in EXACT:
        return EXACT[leaf], leaf
    if "." in leaf:
        return None
    for pattern, role in _PATTERNS:
        if pattern.fullmatch(leaf):
            return role, leaf
    for token, role in _FUSED_TOKENS:
        if re.search(rf"(?:^|_|(?<=[a-z])(?=[A-Z])){token}(?=_|$)", leaf):
            return role, leaf
    if leaf[len(prefix_of(leaf)) :] in _BARE_OUTPUTS and leaf not in _BARE_OUTPUTS:
        return "o", leaf
    matches = list(_QKV_TOKEN.finditer(leaf))
    if len(matches) != 1:
        return None
    match = matches[0]
    token = match.group("token")
    for style in _STYLES:
        if token in style:
            role_name = "qkvo"[style.index(token)]
            spelling = f"{leaf[: match.start('token')]}{{{style[0]}}}{leaf[match.end('token') :]}"
            return role_name, spelling
    return None


def prefix_of(leaf: str) -> str:
    """What a flat name says before the role: "cross_attn_" of `cross_attn_q`, "layer0_" of `layer0_q`; "" mostly."""
    match = _NAMES_AN_ATTENTION.match(leaf) or _NUMBERED.match(leaf)
    return match.group() if match else ""


# --- tables -------------------------------------------------------------------------------------------

_PARAMETERS = frozenset({"weight", "bias", "kernel", "scale", "gamma", "beta", "w", "b"})
# Thin modules around one Linear; dropped only behind a projection's own name.
_WRAPPER_SUFFIXES = frozenset({"linear", "conv", "convolution", "base_layer", "proj", "projection", "lin"})
_BARE_NAMES = frozenset({"query", "key", "value", "output", "q", "k", "v", "o", "out"})
PROJECTIONS = frozenset({"q", "k", "v", "o", "qkv", "kv", "qk"})
_STYLES = (
    ("q", "k", "v", "o"),
    ("Q", "K", "V", "O"),
    ("query", "key", "value", "output"),
    ("queries", "keys", "values", "outputs"),
    ("Query", "Key", "Value", "Output"),
)
_QKV_TOKEN = re.compile(
    r"(?:(?:^|(?<=_))[wW]?|(?<=[a-z]))(?P<token>quer(?:y|ies)|keys?|values?|outputs?|Query|Key|Value|Output"
    r"|(?<![A-Za-z])[qkvoQKVO]|(?<=^w)[qkvo]|(?<=_w)[qkvo]|(?<=^W)[qkvo])(?=_|content_|pos_|$|\d*$)"
)
_FUSED_TOKENS = (
    ("(?:g?qkv|QKV|query_key_value|queries_keys_values)", "qkv"),
    ("(?:W?w?qkv)", "qkv"),
    ("(?:w?W?kv|KV|key_value|keys_values)", "kv"),
    ("(?:qk|QK|query_key|queries_keys)", "qk"),
)
_BARE_OUTPUTS = frozenset({"proj", "out", "output", "out_proj", "o_proj", "o", "dense"})
# A flat name that counts its layers: `layer0_q_proj`.
_NUMBERED = re.compile(r"[A-Za-z_]*\d+_(?=[A-Za-z])")
# A flat name that itself names an attention: `cross_attn_q`, `attn_q`, `self_attn_query_content_proj`.
# `sa_`/`ca_` are the DETR family's self- and cross-attention.
_NAMES_AN_ATTENTION = re.compile(
    r"(?:[a-z]+_)*?(?:cross|self|enc|dec)?_?att(?:n|ention)?_(?=.)|[sc]a_(?=[qkv])"
)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (
            r"(?:\w+_)?(?:q|query)_(?:layer_?norm|norm|ln|l2_clip)|(?:norm|layer_norm|ln)_q|norm_query|query_norm|q_sub_norm|q_norm_x",
            "q_norm",
        ),
        (
            r"(?:\w+_)?(?:k|key)_(?:layer_?norm|norm|ln)|(?:norm|layer_norm|ln)_k|norm_key|key_norm|k_sub_norm|k_norm_x|k_rope_only_layernorm",
            "k_norm",
        ),
        (r"(?:attn_)?(?:v|value)_(?:layer_?norm|norm|ln)|norm_v", "v_norm"),
        (r"norm_added_q", "added_q_norm"),
        (r"norm_added_k", "added_k_norm"),
        (r"lambda_[qk]\d?|lambda_\w+", "lambda"),
        (r"(?:attn_)?sinks?|attention_sink_bias|attn_sinks|sink_proj", "sinks"),
        (r"logit_scale|per_dim_scale|temperature", "logit_scale"),
        (r"pos_bias_[uv]|bias_u|r_[wrs]_bias", "pos_bias"),
        (r"rel_pos_[hw]|rel_pos_emb", "rel_pos"),
        (r"attention_biases", "attention_biases"),
        (
            r"relative_attention_bias|relative_position_bias_table|(?:attn|cross_attn)_rel_b|relative_position_bias",
            "relative_bias",
        ),
        (r".*(?:masked_bias|inv_freq|relative_position_index|relative_coords_table|rotary_emb)", "buffer"),
        (r"sampling_offsets", "sampling_offsets"),
        (r"in_proj_qkvz|in_proj_qkv|in_proj_ba", "gdn"),
        (r"(?:o|out|output)_(?:layer_?)?norm", "o_norm"),
        (r"emb_rel_[kv]", "relative_key"),
        (r"time_decay|time_first|time_faaaa", "time_decay"),
        (r"time_maa_.*|time_mix_.*", "time_mix"),
        (r"A_log", "a_log"),
        (r"x_proj", "ssm_x"),
        (r"dt_proj|dt_bias|dt", "ssm_dt"),
        (r"g_proj|gate_proj|attn_gate|gate|output_gate_proj", "gate"),
        (r"output_gate", "lightning_gate"),
        (r"w_g", "additive_weight"),
        (r"cls_token|probe|latent|latents|pooling_attention_query|query_tokens", "learned_q"),
        (r"bias_k", "bias_k"),
        (r"bias_v", "bias_v"),
    )
)
EXACT: dict[str, str] = {
    # output projections, the more specific first: the order is the preference
    "o_proj": "o",
    "out_proj": "o",
    "output.dense": "o",
    "to_out.0": "o",
    "wo": "o",
    "Wo": "o",
    "out_lin": "o",
    "linear_out": "o",
    "linear_proj": "o",
    "attn_output": "o",
    "cross_attn_o": "o",
    "attn_out_proj": "o",
    "attn_out": "o",
    "c_proj": "o",
    "dense": "o",
    "proj": "o",
    "proj_out": "o",
    "proj_attn": "o",
    "projection": "o",
    "projection_layer": "o",
    "post_proj": "o",
    "project_out": "o",
    "attention_out": "o",
    "output_proj": "o",
    "output_linear": "o",
    "self_attn.output_proj": "o",
    "cross_attn.output_proj": "o",
    "out": "o",
    "o": "o",
    "output": "o",
    "to_out": "o",
    "linear": "o",
    "post": "o",
    "final": "o",
    "linear2": "o",
    "W_O": "o",
    "o_b_proj": "o",
    "o_a_proj": "o_a",
    "output_projection.o_proj": "o",
    "output_projection.gate_proj": "gate",
    "experts.output_linear": "o",
    "experts.input_linear": "q_experts",
    "to_add_out": "added_o",
    # fused tensors whose name does not spell qkv
    "in_proj_weight": "qkv",
    "in_proj": "qkv",
    "c_attn": "qkv",
    "W_pack": "qkv",
    "att_proj": "qkv",
    "linear1": "qkv",
    "qkv_linear": "qkv",
    "attn": "qkv",
    # The Annotated Transformer keeps its four projections in one list.
    "linears.0": "q",
    "linears.1": "k",
    "linears.2": "v",
    "linears.3": "o",
    "proj_x": "o",
    "in_proj_bias": "in_proj_bias",
    # multi-head latent attention
    "q_a_proj": "q_a",
    "wq_a": "q_a",
    "linear_q_down_proj": "q_a",
    "attn_q_a": "q_a",
    "q_b_proj": "q_b",
    "wq_b": "q_b",
    "linear_q_up_proj": "q_b",
    "attn_q_b": "q_b",
    "q_gate_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_a_proj": "kv_a",
    "wkv_a": "kv_a",
    "wkv_a_with_mqa": "kv_a",
    "linear_kv_down_proj": "kv_a",
    "attn_kv_a_mqa": "kv_a",
    "kv_b_proj": "kv_b",
    "wkv_b": "kv_b",
    "linear_kv_up_proj": "kv_b",
    "attn_kv_b": "kv_b",
    "attn_k_b": "k_b",
    "attn_v_b": "v_b",
    "q_a_layernorm": "q_a_norm",
    "q_a_norm": "q_a_norm",
    "attn_q_a_norm": "q_a_norm",
    "linear_q_up_proj.layer_norm_weight": "q_a_norm",
    "kv_a_layernorm": "kv_a_norm",
    "kv_a_norm": "kv_a_norm",
    "kv_norm": "kv_a_norm",
    "attn_kv_a_norm": "kv_a_norm",
    "linear_kv_up_proj.layer_norm_weight": "kv_a_norm",
    # norms one level down
    "norm.query_norm": "q_norm",
    "norm.key_norm": "k_norm",
    "relative_position_bias.relative_position_bias_table": "relative_bias",
    "rel_pos.relative_position_bias_table": "relative_bias",
    # biases that are parameters of their own
    "b_Q": "q_bias",
    "b_K": "k_bias",
    "b_V": "v_bias",
    "b_O": "o_bias",
    "q_bias": "q_bias",
    "k_bias": "k_bias",
    "v_bias": "v_bias",
    # state-space modules
    "conv1d": "conv1d",
    "forget_gate.A_log": "a_log",
    "A_log": "a_log",
    "x_proj": "ssm_x",
    "in_proj_ssm": "ssm_in",
    "ssm_a": "a_log",
    "ssm_in": "ssm_in",
    "ssm_conv1d": "conv1d",
    "ssm_dt": "ssm_dt",
    "ssm_x": "ssm_x",
    # bidirectional cross-attention between two streams
    "vision_proj": "bi_q",
    "text_proj": "bi_k",
    "values_text_proj": "bi_v",
    "out_vision_proj": "bi_o",
    "values_vision_proj": "bi_added_v",
    "out_text_proj": "bi_added_o",
    # keys' own helpers that spell a role but are none
    "k_sconv": "conv",
    "v_sconv": "conv",
    "rel_logits_proj": "relative_bias",
    "relative_k_proj": "relative_key",
    "pos_key_proj": "pos_key",
    "pos_query_proj": "pos_query",
    "r_kernel": "relative_key",
}
_LAST_OF_DOTTED = frozenset(leaf.rpartition(".")[2] for leaf in EXACT if "." in leaf)
