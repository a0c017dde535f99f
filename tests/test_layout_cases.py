"""The layout of every known family is read right, and nothing else is taken for attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from layout_cases import CASES, Anything, Case, Expect, InverseRoot, OneOf, UnknownOrAssumed

from attncli.layout import attention_layers
from attncli.records import Array, Config, Layer, Tensor

MODULES = Path(__file__).parent / "data" / "attention_modules.tsv"
SOFTMAX_KINDS = ("self", "cross")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_layer_of_the_family_is_read_right(case: Case) -> None:
    layers = layers_of(case)
    unmatched = list(layers)
    complaints: list[str] = []
    for expect in case.expect:
        candidates = [layer for layer in unmatched if _path_agrees(layer, expect, case)]
        if not candidates:
            if not expect.optional:
                complaints.append(f"no layer at {_words(expect.path)}")
            continue
        best = min(candidates, key=lambda layer: len(_disagreements(layer, expect)))
        wrong = _disagreements(best, expect)
        if wrong and expect.optional:
            continue
        unmatched.remove(best)
        complaints += [f"{best.path}: {line}" for line in wrong]
    complaints += [
        f"{layer.path}: no such layer exists, yet it is reported as {layer.kind} ({layer.layout})"
        for layer in unmatched
        if layer.kind in SOFTMAX_KINDS
    ]
    assert not complaints, "\n".join([case.name, *complaints, "", "reported:", *map(_line, layers)])


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_number_says_where_it_comes_from_and_every_id_is_unique(case: Case) -> None:
    layers = layers_of(case)
    for layer in layers:
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(layer, name) is not None:
                assert name in layer.evidence, f"{case.name}, {layer.path}: {name} has no evidence"
    assert len({layer.id for layer in layers}) == len(layers)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_rows_of_heads_lie_inside_their_tensors(case: Case) -> None:
    shapes = {tensor.name: tensor.shape for tensor in tensors_of(case)}
    for layer in layers_of(case):
        terms = [side.rows for term in layer.score_terms for side in (term.query, term.key)]
        for side in (*layer.rows.values(), *terms):
            shape = shapes[side.tensor]
            rows = shape[0] if side.out_axis == 0 else math.prod(shape[1:])
            assert len(side.starts) == layer.heads, f"{case.name}, {layer.path}: {side}"
            assert max(side.starts) + side.width <= rows, f"{case.name}, {layer.path}: {side} in {shape}"


def test_heads_find_their_own_rows_in_every_order() -> None:
    cases = {case.name: case for case in CASES}
    complaints = []
    for row in ROWS:
        case = cases[row.case]
        named = [layer.rows for layer in layers_of(case) if layer.kind in SOFTMAX_KINDS]
        if not named or not {"q", "k"} <= set(named[0]):
            if not row.optional:
                complaints.append(f"{row.case}: no rows are named")
            continue
        for side, expected in ((named[0]["q"], row.query), (named[0]["k"], row.key)):
            if (side.starts, side.width, side.out_axis) != (expected, row.width, row.out_axis):
                complaints.append(f"{row.case}: expected {expected} of width {row.width}, got {side}")
    assert not complaints, "\n".join(complaints)


def test_attention_modules_of_transformers_are_found() -> None:
    rows = [module for module in attention_modules() if module.is_softmax]
    missed = [module for module in rows if not module.found()]
    share = 1 - len(missed) / len(rows)
    names = "\n".join(f"{module.model_type}: {module.kind} at {module.path}" for module in missed)
    assert share >= 0.97, f"found {share:.1%} of {len(rows)}; missed:\n{names}"


def test_roles_of_transformers_modules_follow_their_names() -> None:
    complaints = []
    for module in attention_modules():
        if not module.is_softmax:
            continue
        for layer in module.layers():
            if layer.kind not in SOFTMAX_KINDS:
                continue
            for tensor in layer.tensors:
                leaf = tensor.name.removesuffix(".weight").rsplit(".", 1)[-1]
                expected = ROLE_OF_LEAF.get(leaf)
                if expected and tensor.name.endswith(".weight") and tensor.role not in expected:
                    complaints.append(f"{module.model_type} {tensor.name}: {tensor.role}, not {expected}")
    assert not complaints, "\n".join(complaints)


def test_heads_of_transformers_modules_match_their_configuration() -> None:
    complaints = []
    for module in attention_modules():
        layers = [layer for layer in module.layers() if layer.kind in SOFTMAX_KINDS]
        # Without its output projection a module is a part of another line, and says less than the whole.
        if not module.is_softmax or len(layers) != 1 or "o" not in {t.role for t in layers[0].tensors}:
            continue
        if module.heads and layers[0].heads != module.heads:
            complaints.append(
                f"{module.model_type} {module.path}: {layers[0].heads} heads, not {module.heads}"
            )
    assert not complaints, "\n".join(complaints)


def test_what_is_not_attention_in_transformers_is_left_alone() -> None:
    looked = 0
    claimed = []
    for module in attention_modules():
        if not module.is_softmax:
            looked += 1
            found = [layer.path for layer in module.layers() if layer.kind in SOFTMAX_KINDS]
            if found:
                claimed.append(f"{module.model_type}: {module.kind} at {module.path}")
    blocks = {module.path.rpartition(".")[0] for module in attention_modules()}
    for prefix in sorted(block for block in blocks if not block.endswith(("attention", "attn", "_query"))):
        for sibling in SIBLINGS:
            looked += 1
            tensors = [_tensor(f"{prefix}.{name}".lstrip("."), shape) for name, shape in sibling.items()]
            if any(layer.kind in SOFTMAX_KINDS for layer in attention_layers(tensors, ())):
                claimed.append(f"{prefix} with {sorted(sibling)}")
    assert len(claimed) / looked < 0.005, f"{len(claimed)} of {looked}:\n" + "\n".join(claimed)


# --- from a case to records ----------------------------------------------------------------------------


def layers_of(case: Case) -> tuple[Layer, ...]:
    configs = () if case.config is None else (Config(case.config_source, case.config),)
    return tuple(attention_layers(tensors_of(case), configs))


def tensors_of(case: Case) -> list[Tensor]:
    """The case's tensors; the block scales of an fp8 weight become a part of it, as the readers do it."""
    suffix = "_scale_inv"
    tensors = []
    for name, shape in case.shapes.items():
        if name.endswith(suffix):
            continue
        scale = case.shapes.get(name + suffix)
        if scale is not None:
            parts = {
                "weight": _array(name, shape, "float8_e4m3fn"),
                "weight_scale_inv": _array(name + suffix, scale, "float32"),
            }
            tensors.append(Tensor(name, shape, "float8_e4m3fn", "model.safetensors", parts, "fp8-block"))
        else:
            dtype = "int64" if name.endswith(("_index", "_ids", "_idxs", "_tracked")) else case.dtype
            tensors.append(_tensor(name, shape, dtype, case.metadata_format or "plain"))
    return tensors


def _tensor(name: str, shape: tuple[int, ...], dtype: str = "float16", scheme: str = "plain") -> Tensor:
    array = _array(name, shape, dtype)
    return Tensor(name, shape, dtype, array.file, {"weight": array}, scheme)


def _array(name: str, shape: tuple[int, ...], dtype: str) -> Array:
    return Array(name, shape, dtype, "model.safetensors", 0, 2 * math.prod(shape))


# --- agreement -----------------------------------------------------------------------------------------


def _path_agrees(layer: Layer, expect: Expect, case: Case) -> bool:
    """Exact, but for GGUF, whose flat names leave the last word of a path open."""
    paths = expect.path.values if isinstance(expect.path, OneOf) else (expect.path,)
    if layer.path in paths:
        return True
    return case.metadata_format == "gguf" and layer.path.startswith(tuple(path + "." for path in paths))


def _disagreements(layer: Layer, expect: Expect) -> list[str]:
    wrong = []
    for name in ("kind", "layout", "heads", "kv_heads", "head_dim", "scale"):
        actual, expected = getattr(layer, name), getattr(expect, name)
        if not _agrees(actual, expected, layer.evidence.get(name), layer):
            evidence = layer.evidence.get(name)
            wrong.append(f"{name} is {actual!r} (evidence {evidence}), expected {_words(expected)}")
    for role, ending in expect.roles.items():
        names = [tensor.name for tensor in layer.tensors if tensor.role == role]
        if not any(name.endswith(ending) for name in names):
            wrong.append(f"role {role} is {names or 'absent'}, expected …{ending}")
    for key, expected in expect.facts.items():
        if key not in layer.facts:
            wrong.append(f"fact {key} is absent, expected {_words(expected)}")
        elif not _agrees(layer.facts[key], expected, None, layer):
            wrong.append(f"fact {key} is {layer.facts[key]!r}, expected {_words(expected)}")
    for key, expected in expect.evidence.items():
        if not _agrees(layer.evidence.get(key), expected, None, layer):
            wrong.append(f"evidence of {key} is {layer.evidence.get(key)!r}, expected {_words(expected)}")
    return wrong


def _agrees(actual: Any, expected: Any, evidence: str | None, layer: Layer) -> bool:
    if isinstance(expected, Anything):
        return True
    if isinstance(expected, OneOf):
        return any(_agrees(actual, value, evidence, layer) for value in expected.values)
    if isinstance(expected, UnknownOrAssumed):
        return (
            actual is None
            or evidence == "assumed"
            or (expected.value is not None and actual == expected.value)
        )
    if isinstance(expected, InverseRoot):
        if layer.head_dim is None:
            return actual is None
        expected = 1 / math.sqrt(layer.head_dim)
    if isinstance(expected, float) and isinstance(actual, (int, float)):
        return math.isclose(actual, expected, rel_tol=1e-6)
    return bool(actual == expected)


def _words(expected: Any) -> str:
    if isinstance(expected, OneOf):
        return " or ".join(_words(value) for value in expected.values)
    if isinstance(expected, UnknownOrAssumed):
        return "unknown or assumed" + ("" if expected.value is None else f" or {expected.value!r}")
    if isinstance(expected, InverseRoot):
        return "1/sqrt(head_dim)"
    return "anything" if isinstance(expected, Anything) else repr(expected)


def _line(layer: Layer) -> str:
    tensors = ", ".join(f"{tensor.role}={tensor.name.removeprefix(layer.path)}" for tensor in layer.tensors)
    return (
        f"  {layer.path} {layer.kind} {layer.layout} heads {layer.heads}/{layer.kv_heads} x {layer.head_dim} "
        f"scale {layer.scale} {dict(layer.evidence)} {dict(layer.facts)} [{tensors}]"
    )


# --- the modules of transformers -----------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """One line of the table: a module of class `kind` (its name in transformers) with its weights."""

    model_type: str
    kind: str
    path: str
    weights: Mapping[str, tuple[int, ...]]
    biases: tuple[str, ...]
    scaling: float | None
    config: Mapping[str, Any]

    @property
    def heads(self) -> int | None:
        """The configured number where this module's head size agrees; other towers have their own."""
        heads = self.config.get("num_attention_heads")
        if heads is None or self.scaling is None:
            return None
        rows = heads * round(self.scaling**-2)
        return heads if any(shape[0] == rows for shape in self.weights.values()) else None

    @property
    def is_softmax(self) -> bool:
        return not self.kind.endswith(tuple(NOT_SOFTMAX_ATTENTION))

    def layers(self) -> tuple[Layer, ...]:
        tensors = [_tensor(f"{self.path}.{name}", shape) for name, shape in self.weights.items()]
        for name in self.biases:
            shape = self.weights.get(f"{name}.weight")
            if shape is not None:
                conv1d = name.rpartition(".")[2] in ("c_attn", "q_attn", "c_proj") and "GPT2" in self.kind
                tensors.append(_tensor(f"{self.path}.{name}.bias", (shape[1] if conv1d else shape[0],)))
        return tuple(attention_layers(tensors, (Config("config.json", self.config),)))

    def found(self) -> bool:
        """Whether a resolved layer is this module, lies inside it or contains it."""
        return any(
            f"{layer.path}.".startswith(f"{self.path}.") or f"{self.path}.".startswith(f"{layer.path}.")
            for layer in self.layers()
            if layer.kind in SOFTMAX_KINDS
        )


def attention_modules() -> Sequence[Module]:
    return tuple(_modules())


def _modules() -> Iterator[Module]:
    with MODULES.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(("#", "model_type\t")):
                continue
            model_type, kind, path, weights, biases, scaling, heads, kv_heads, head_dim, hidden = line.rstrip(
                "\n"
            ).split("\t")
            config: dict[str, Any] = {"model_type": model_type}
            for key, value in (
                ("num_attention_heads", heads),
                ("num_key_value_heads", kv_heads),
                ("head_dim", head_dim),
                ("hidden_size", hidden),
            ):
                if value.isdigit():
                    config[key] = int(value)
            yield Module(
                model_type,
                kind,
                path,
                dict(_shape(word) for word in weights.split()),
                tuple(biases.split(",")) if biases else (),
                float(number) if (number := scaling.partition("=")[2])[:1].isdigit() else None,
                config,
            )


def _shape(word: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = word.removesuffix("]").partition("[")
    return name, tuple(int(size) for size in sizes.split("x") if size)


# --- tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """First rows of each query head and of the key that it meets, in the first layer of a case.

    `optional`: there is more to the scores than these rows, so that none may be named.
    """

    case: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    width: int
    out_axis: int = 0
    optional: bool = False


def _each(count: int, step: int, first: int = 0, times: int = 1) -> tuple[int, ...]:
    """`count` starts, `step` apart, each repeated `times`."""
    return tuple(first + step * index for index in range(count) for _ in range(times))


ROWS: tuple[Rows, ...] = (
    Rows("llama", _each(6, 5), _each(2, 5, times=3), 5),
    Rows("qwen3_next_attention_without_config", _each(6, 10), _each(2, 5, times=3), 5),
    Rows("plamo_config_lies_about_key_heads", _each(10, 4), _each(5, 4) * 2, 4),
    Rows("xlnet_three_dimensional_parameters", _each(6, 5), _each(6, 5), 5, out_axis=1, optional=True),
    Rows("torch_multihead_attention_add_bias_kv", _each(6, 4), _each(6, 4, 24), 4, optional=True),
    Rows("gpt2_conv1d", _each(6, 4), _each(6, 4, 24), 4, out_axis=1),
    Rows("nanogpt_linear", _each(6, 4), _each(6, 4, 24), 4),
    Rows("gpt_bigcode_multi_query", _each(6, 4), (24,) * 6, 4),
    Rows("gpt_bigcode_all_heads", _each(6, 12), _each(6, 12, 4), 4),
    Rows("bloom", _each(6, 12), _each(6, 12, 4), 4),
    Rows("deberta_v1_in_proj", _each(6, 12), _each(6, 12, 4), 4, optional=True),
    Rows("falcon_new_decoder", (0, 4, 8, 20, 24, 28), _each(2, 20, 12, times=3), 4),
    Rows("falcon_7b_multi_query_config_lies", _each(6, 4), (24,) * 6, 4),
    Rows("chatglm2_multi_query_groups", _each(6, 5), _each(2, 5, 30, times=3), 5),
    Rows("megatron_core", (0, 5, 10, 25, 30, 35), _each(2, 25, 15, times=3), 5),
    Rows("megatron_core_output_gate", (0, 5, 10, 40, 45, 50), _each(2, 40, 30, times=3), 5),
    Rows("internlm2_wqkv", (0, 4, 8, 20, 24, 28), _each(2, 20, 12, times=3), 4),
    Rows("phi3", _each(6, 4), _each(2, 4, 24, times=3), 4),
    # Four blocks of [Q 8 | V 8 | K 8].
    Rows("codegen_query_value_key", (0, 4, 24, 28, 48, 52, 72, 76), (16, 20, 40, 44, 64, 68, 88, 92), 4),
    Rows("levit_hf_value_wider_than_key", _each(3, 16), _each(3, 16, 4), 4),
    Rows("timm_parallel_scaling_block", _each(6, 4, 88), _each(6, 4, 112), 4),
    Rows("flux_single_block_original", _each(6, 4), _each(6, 4, 24), 4),
    Rows("granite_speech_to_kv", _each(6, 5), _each(6, 5), 5),
    Rows("hrm_text_gate_query_key_value", _each(6, 4, 24), _each(6, 4, 48), 4),
    Rows("litgpt_legacy_groups", (0, 5, 10, 25, 30, 35), _each(2, 25, 15, times=3), 5),
    Rows("gguf_falcon_grouped_blocks", _each(6, 4), _each(2, 4, 24, times=3), 4),
)

# Role by the last word of a name, for the words that mean one thing everywhere.
ROLE_OF_LEAF: dict[str, tuple[str, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "out_proj": ("o",),
    "query": ("q",),
    "key": ("k",),
    "value": ("v",),
    "q_lin": ("q",),
    "k_lin": ("k",),
    "v_lin": ("v",),
    "out_lin": ("o",),
    "qkv": ("qkv",),
    "Wqkv": ("qkv",),
    "query_key_value": ("qkv",),
    "c_attn": ("qkv",),
    "q_norm": ("q_norm", "q_a"),
    "k_norm": ("k_norm",),
    "q_a_proj": ("q_a",),
    "q_b_proj": ("q_b",),
    "kv_a_proj_with_mqa": ("kv_a",),
    "kv_b_proj": ("kv_b",),
}

# Endings of class names in transformers: "Attention" without a softmax over products of queries and keys.
NOT_SOFTMAX_ATTENTION: dict[str, str] = {
    "BailingHybridDeltaAttention": "gated delta rule, linear attention",
    "Glm5NextTextLinearAttention": "gated delta rule, linear attention",
    "KimiLinearDeltaAttention": "gated delta rule, linear attention",
    "OlmoHybridLinearAttentionDecoderLayer": "gated delta rule, linear attention",
    "MiniMaxLightningAttention": "lightning attention, linear",
    "MobileViTV2LinearSelfAttention": "one context score a token, no products of queries and keys",
    "SwiftFormerEfficientAdditiveAttention": "additive, no products of queries and keys",
    "RwkvSelfAttention": "recurrence",
    "PatchTSMixerGatedAttention": "a softmax over features of one linear layer",
    "Inkling2BlockAttentionResidual": "a single query vector over earlier blocks",
    "EdgeTamVideoMemoryAttentionMLP": "an MLP",
    "CvtSelfAttentionProjection": "one convolution of a projection",
    "CvtSelfAttentionConvProjection": "one convolution of a projection",
    "NeoMMEExclusiveSelfAttention": "one number",
    "Phi4MultimodalAudioRelativeAttentionBias": "a table of biases",
    "DabDetrAttention": "the output projection alone; the rest lies in its parent",
    "MultiscaleDeformableAttention": "sampled points, no keys",
}

# What stands beside attention in a block.
SIBLINGS: tuple[dict[str, tuple[int, ...]], ...] = (
    {"mlp.gate_proj.weight": (44, 24), "mlp.up_proj.weight": (44, 24), "mlp.down_proj.weight": (24, 44)},
    {"mlp.fc1.weight": (44, 24), "mlp.fc1.bias": (44,), "mlp.fc2.weight": (24, 44), "mlp.fc2.bias": (24,)},
    {"mlp.in_proj.weight": (72, 24), "mlp.out_proj.weight": (24, 24)},
    {"mlp.c_fc.weight": (24, 72), "mlp.c_proj.weight": (72, 24)},
    {"mlp.dense_h_to_4h.weight": (72, 24), "mlp.dense_4h_to_h.weight": (24, 72)},
    {"mlp.Wi.weight": (72, 24), "mlp.Wo.weight": (24, 36)},
    {"intermediate.dense.weight": (72, 24), "output.dense.weight": (24, 72)},
    {
        "feed_forward.w1.weight": (44, 24),
        "feed_forward.w2.weight": (24, 44),
        "feed_forward.w3.weight": (44, 24),
    },
    {
        "mlp.gate.weight": (3, 24),
        "mlp.experts.gate_up_proj": (3, 88, 24),
        "mlp.experts.down_proj": (3, 24, 44),
    },
    {"input_layernorm.weight": (24,), "post_attention_layernorm.weight": (24,)},
    {"conv.in_proj.weight": (72, 24), "conv.conv.weight": (24, 1, 3), "conv.out_proj.weight": (24, 24)},
)
