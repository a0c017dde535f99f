"""Hand-written models: attention in the spellings of tutorials and small libraries, without any config."""

import pytest

from attncli.layout import Options, attention_layers
from attncli.records import Array, Config, Layer, Tensor


def layers_of(shapes: dict[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    return attention_layers(
        [
            Tensor(name, shape, "float32", "f", {"weight": Array(name, shape, "float32", "f", 0, 0)})
            for name, shape in shapes.items()
        ]
    )


def test_a_list_of_head_modules_is_one_layer_with_as_many_heads() -> None:
    shapes = {
        f"blocks.{block}.sa.heads.{head}.{leaf}.weight": (8, 32)
        for block in range(2)
        for head in range(4)
        for leaf in ("key", "query", "value")
    }
    layers = layers_of(
        {**shapes, "blocks.0.sa.proj.weight": (32, 32), "blocks.0.ffwd.net.0.weight": (128, 32)}
    )
    assert [(layer.path, layer.layout, layer.heads, layer.head_dim) for layer in layers] == [
        ("blocks.0.sa", "module-per-head", 4, 8),
        ("blocks.1.sa", "module-per-head", 4, 8),
    ]
    assert layers[0].evidence["heads"] == "shape"
    assert len(layers[0].tensors) == 12


def test_heads_of_unequal_shape_stay_layers_of_their_own() -> None:
    shapes = {
        f"sa.heads.{head}.{leaf}.weight": (8 + head, 32)
        for head in range(2)
        for leaf in ("key", "query", "value")
    }
    assert [layer.layout for layer in layers_of(shapes)] == ["separate", "separate"]


def test_layers_counted_in_a_flat_name_are_layers_of_their_own() -> None:
    shapes = {
        f"layer{number}_{leaf}_proj.weight": (32, 32)
        for number in range(2)
        for leaf in ("q", "k", "v", "out")
    }
    layers = layers_of(shapes)
    assert [layer.path for layer in layers] == ["layer0", "layer1"]
    for number, layer in enumerate(layers):
        assert [tensor.role for tensor in layer.tensors] == ["q", "k", "v", "o"]
        assert all(tensor.name.startswith(f"layer{number}_") for tensor in layer.tensors)


def test_four_linears_of_an_attention_are_q_k_v_and_output() -> None:
    shapes = {
        f"decoder.layers.0.{name}.linears.{number}.weight": (32, 32)
        for name in ("self_attn", "src_attn")
        for number in range(4)
    }
    layers = layers_of(shapes)
    assert [(layer.path, layer.kind) for layer in layers] == [
        ("decoder.layers.0.self_attn", "self"),
        ("decoder.layers.0.src_attn", "cross"),
    ]
    assert [(tensor.role, tensor.name[-8]) for tensor in layers[0].tensors] == [
        ("q", "0"),
        ("k", "1"),
        ("v", "2"),
        ("o", "3"),
    ]


def test_a_list_of_linears_outside_an_attention_is_none() -> None:
    assert layers_of({f"mlp.linears.{number}.weight": (32, 32) for number in range(4)}) == ()


def test_tensors_without_a_module_form_a_layer_at_the_root() -> None:
    (layer,) = layers_of({f"{leaf}.weight": (32, 32) for leaf in ("query", "key", "value")})
    assert (layer.id, layer.path) == ("(root)", "")


@pytest.mark.parametrize("leaf", ["x_proj", "dt_proj"])
def test_a_state_space_layer_is_listed_as_what_it_is(leaf: str) -> None:
    shapes = {
        f"layers.0.mixer.{leaf}.weight": (34, 64),
        "layers.0.mixer.A_log": (64, 16),
        "layers.0.mixer.in_proj.weight": (128, 32),
    }
    (layer,) = layers_of(shapes)
    assert (layer.kind, layer.layout) == (None, "ssm")


def test_weights_of_transformer_lens_tell_heads_by_their_own_axis() -> None:
    shapes = {f"blocks.0.attn.W_{letter}": (4, 32, 8) for letter in "QKV"} | {
        "blocks.0.attn.W_O": (4, 8, 32),
        "blocks.0.attn.b_Q": (4, 8),
    }
    (layer,) = layers_of(shapes)
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.evidence["heads"]) == (4, 4, 8, "shape")
    assert {tensor.role for tensor in layer.tensors} == {"q", "k", "v", "o", "q_bias"}


@pytest.mark.parametrize(
    "names",
    [
        ("attention.key_layer", "attention.query_layer", "attention.energy_layer"),  # additive (Bahdanau)
        ("memory.key", "memory.value"),
        ("mlp.in_proj", "mlp.out_proj"),
    ],
)
def test_what_has_no_query_key_and_value_is_no_attention(names: tuple[str, ...]) -> None:
    assert layers_of({f"{name}.weight": (96, 32) for name in names}) == ()


LLAMA = {
    f"model.layers.{number}.self_attn.{leaf}_proj.weight": (32, 32)
    for number in range(4)
    for leaf in ("q", "k", "v", "o")
}


def with_config(
    shapes: dict[str, tuple[int, ...]], config: dict[str, object], options: Options | None = None
) -> tuple[Layer, ...]:
    tensors = [
        Tensor(name, shape, "float32", "f", {"weight": Array(name, shape, "float32", "f", 0, 0)})
        for name, shape in shapes.items()
    ]
    return attention_layers(tensors, [Config("config.json", config)], options)


def test_an_option_that_the_config_overrules_is_named_and_not_used() -> None:
    layers = with_config(LLAMA, {"num_attention_heads": 4}, Options(heads=16))
    assert {layer.heads for layer in layers} == {4}
    (anomaly,) = layers[0].anomalies
    assert (anomaly.kind, anomaly.subject) == ("option-overruled", "--heads")
    assert (anomaly.evidence["claim"], anomaly.evidence["used"]) == ("16", 4)
    assert with_config(LLAMA, {"num_attention_heads": 4}, Options(heads=4))[0].anomalies == ()


def test_one_layer_without_values_among_whole_ones_has_lost_them() -> None:
    shapes = {
        name: shape for name, shape in LLAMA.items() if name != "model.layers.2.self_attn.v_proj.weight"
    }
    layers = with_config(shapes, {"num_attention_heads": 4})
    assert [layer.layout for layer in layers] == ["separate", "separate", "incomplete", "separate"]
    assert layers[2].anomalies[-1].evidence["missing"] == ["v"]


def test_values_that_are_the_keys_in_every_layer_are_a_design() -> None:
    shapes = {name: shape for name, shape in LLAMA.items() if ".v_proj." not in name}
    assert {layer.layout for layer in with_config(shapes, {"num_attention_heads": 4})} == {"k-eq-v"}


def test_a_config_in_capitals_is_read() -> None:
    (layer, *_) = with_config(LLAMA, {"HEADS": 4, "LAYERS": 4})
    assert (layer.heads, layer.evidence["heads"]) == (4, "config")


@pytest.mark.parametrize(
    ("name", "shape", "subject"),
    [
        ("q_proj.bias", (16,), "model.layers.1.self_attn.q_proj.bias"),
        ("v_proj.weight", (33, 32), "model.layers.1.self_attn.v_proj.weight"),
        ("o_proj.weight", (32, 48), "model.layers.1.self_attn.o_proj.weight"),
    ],
)
def test_tensors_of_one_layer_that_cannot_work_together_are_named(
    name: str, shape: tuple[int, ...], subject: str
) -> None:
    config = {"num_attention_heads": 4}
    assert all(layer.anomalies == () for layer in with_config(LLAMA, config))
    broken = {**LLAMA, f"model.layers.1.self_attn.{name}": shape}
    layers = with_config(broken, config)
    assert [anomaly.subject for anomaly in layers[1].anomalies] == [subject]
    assert layers[0].anomalies == layers[2].anomalies == ()


def test_an_output_that_also_reads_something_unknown_is_no_defect() -> None:
    shapes = {f"encoder.layer.0.attention.self.{leaf}.weight": (16, 32) for leaf in ("query", "key", "value")}
    shapes |= {
        "encoder.layer.0.attention.self.conv_out_layer.weight": (16, 32),
        "encoder.layer.0.attention.output.dense.weight": (32, 32),
    }
    (layer,) = with_config(shapes, {"num_attention_heads": 4, "hidden_size": 32})
    assert (layer.heads, layer.anomalies) == (4, ())


def test_self_and_cross_attention_flat_in_one_decoder_layer_are_two_layers() -> None:
    names = (
        "sa_qcontent_proj",
        "sa_qpos_proj",
        "sa_kcontent_proj",
        "sa_kpos_proj",
        "sa_v_proj",
        "self_attn.out_proj",
    )
    names += (
        *tuple(name.replace("sa_", "ca_") for name in names[:5]),
        "ca_qpos_sine_proj",
        "cross_attn.out_proj",
    )
    shapes = {f"transformer.decoder.layers.0.{name}.weight": (32, 32) for name in names}
    layers = with_config(shapes, {"num_attention_heads": 4, "d_model": 32})
    assert [(layer.path, layer.kind, layer.heads) for layer in layers] == [
        ("transformer.decoder.layers.0.ca", "cross", 4),
        ("transformer.decoder.layers.0.sa", "self", 4),
    ]
    for layer, prefix in zip(layers, ("ca", "sa"), strict=True):
        by_role = {tensor.role: tensor.name.split(".")[-2] for tensor in layer.tensors}
        assert [by_role[role] for role in "qkv"] == [
            f"{prefix}_qcontent_proj",
            f"{prefix}_kcontent_proj",
            f"{prefix}_v_proj",
        ]


def test_two_streams_that_attend_to_each_other_are_cross_attention_of_unknown_width() -> None:
    names = (
        "vision_proj",
        "text_proj",
        "values_vision_proj",
        "values_text_proj",
        "out_vision_proj",
        "out_text_proj",
    )
    shapes = {f"fusion.attn.{name}.weight": (64, 32) for name in names}
    (layer,) = with_config(shapes, {"num_attention_heads": 4, "hidden_size": 32})
    assert (layer.kind, layer.layout, layer.heads) == ("cross", "separate", None)
    assert {"q", "k", "v", "o", "added_v", "added_o"} <= {tensor.role for tensor in layer.tensors}
