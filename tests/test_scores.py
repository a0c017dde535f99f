"""When the weights prove a bound of q·k, and when they must not: found by attacking real models' bounds."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from attncli.layout import attention_layers, families
from attncli.records import Array, Config, Layer, Tensor

LLAMA = {f"model.layers.0.self_attn.{leaf}_proj.weight": (32, 32) for leaf in ("q", "k", "v", "o")} | {
    "model.layers.0.input_layernorm.weight": (32,),
    "model.norm.weight": (32,),
}
BERT = {
    f"encoder.layer.{number}.attention.{leaf}": shape
    for number in range(2)
    for name in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    for leaf, shape in (
        (f"{name}.weight", (32,) if name.endswith("Norm") else (32, 32)),
        (f"{name}.bias", (32,)),
    )
} | {
    f"{stem}.LayerNorm.{leaf}": (32,)
    for stem in ("embeddings", "encoder.layer.0.output", "encoder.layer.1.output")
    for leaf in ("weight", "bias")
}


def first(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None) -> Layer:
    tensors = [
        Tensor(name, shape, "float32", "f", {"weight": Array(name, shape, "float32", "f", 0, 0)})
        for name, shape in shapes.items()
    ]
    return attention_layers(tensors, [Config("config.json", config)] if config else [])[0]


def llama(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32, **changes}


def test_a_known_family_is_bounded_by_the_norm_in_front() -> None:
    (term,) = first(LLAMA, llama()).score_terms
    assert term.query.before is not None
    assert term.query.before.weight == "model.layers.0.input_layernorm.weight"
    assert term.factor == 1.0


@pytest.mark.parametrize("model_type", ["", "rembert", "mobilebert", "sam", "something_new"])
def test_a_norm_that_only_its_name_puts_in_front_proves_nothing(model_type: str) -> None:
    config = {"model_type": model_type, "num_attention_heads": 4, "hidden_size": 32}
    (term,) = first(BERT, config).score_terms
    assert term.query.before is None
    (term,) = first(BERT, {**config, "model_type": "bert"}).score_terms
    assert term.query.before is not None


def test_a_tensor_of_unknown_part_inside_the_attention_leaves_no_terms() -> None:
    unknown = {**LLAMA, "model.layers.0.self_attn.q_layernorm.norms.0.weight": (8,)}
    assert first(unknown, llama(model_type="stablelm")).score_terms == ()
    harmless = {**LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    assert len(first(harmless, llama()).score_terms) == 1


def test_yarn_stretches_both_q_and_k() -> None:
    rope = {"rope_type": "yarn", "factor": 32.0}
    (term,) = first(LLAMA, llama(rope_scaling=rope)).score_terms
    assert term.factor == pytest.approx((0.1 * math.log(32) + 1) ** 2)


@pytest.mark.parametrize(
    ("rope", "factor"),
    [
        ({"rope_type": "default"}, 1.0),
        ({"rope_type": "llama3", "factor": 8.0}, 1.0),
        ({"type": "linear", "factor": 4.0}, 1.0),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}, 4.0),
        ({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"full": {"rope_type": "yarn", "factor": math.e**10}, "sliding": {"rope_type": "default"}}, 4.0),
        ({"rope_type": "invented"}, None),
        ({"rope_type": "yarn"}, None),
    ],
)
def test_rotary_factor_is_the_square_of_what_multiplies_cosine_and_sine(
    rope: dict[str, Any], factor: float | None
) -> None:
    found = families.rotary_factor({"rope_parameters": rope})
    assert found == (None if factor is None else pytest.approx(factor))


def test_longrope_grows_with_the_logarithm_of_the_context() -> None:
    raw = {
        "rope_scaling": {"type": "longrope"},
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    }
    assert families.rotary_factor(raw) == pytest.approx(1 + math.log(32) / math.log(4096))


def test_an_unknown_rotary_scaling_leaves_no_terms() -> None:
    assert first(LLAMA, llama(rope_scaling={"rope_type": "invented"})).score_terms == ()
