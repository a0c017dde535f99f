"""Packed arrays become logical tensors with the shape the model's own code has."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from attncli.checkpoint.quantized import logical_tensors
from attncli.errors import CheckpointError
from attncli.records import Anomaly, Array, Config, Tensor

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint32": 4, "int64": 8}


def array(name: str, shape: tuple[int, ...], dtype: str = "float16") -> Array:
    return Array(name, shape, dtype, "model.safetensors", 0, math.prod(shape) * SIZES.get(dtype, 1))


def join(
    arrays: Sequence[Array],
    settings: Mapping[str, Any] | None = None,
    content: Mapping[str, bytes] | None = None,
    key: str = "quantization_config",
) -> tuple[dict[str, Tensor], tuple[Anomaly, ...]]:
    configs = [Config("config.json", {key: settings})] if settings is not None else []

    def read_bytes(asked: Array) -> bytes:
        assert content is not None, f"{asked.name} must not be read"
        return content[asked.name]

    tensors, anomalies = logical_tensors(arrays, configs, read_bytes)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    return {tensor.name: tensor for tensor in tensors}, anomalies


def gptq(
    bits: int = 4, *, ins: int = 256, outs: int = 64, groups: int = 2, order: bool = True
) -> list[Array]:
    arrays = [
        array("q_proj.qweight", (ins * bits // 32, outs), "int32"),
        array("q_proj.qzeros", (groups, outs * bits // 32), "int32"),
        array("q_proj.scales", (groups, outs)),
    ]
    return [*arrays, array("q_proj.g_idx", (ins,), "int32")] if order else arrays


def reason(anomalies: Sequence[Anomaly]) -> str:
    (anomaly,) = anomalies
    assert anomaly.kind == "unknown-quantisation"
    return str(anomaly.evidence["reason"])


# --- plain and GGUF -----------------------------------------------------------------------------------


def test_plain_arrays_become_tensors_one_to_one() -> None:
    arrays = [array("embed.weight", (10, 4)), array("norm.scale", (4,)), array("x.weight_scale", (1,))]
    tensors, anomalies = join(arrays)
    assert [(t.name, t.shape, t.dtype, t.scheme) for t in tensors.values()] == [
        (a.name, a.shape, "float16", "plain") for a in arrays
    ]
    assert tensors["norm.scale"].parts == {"weight": arrays[1]}
    assert anomalies == ()


def test_block_types_of_gguf_keep_their_name() -> None:
    tensors, _ = join(
        [array("a", (4, 32), "q4_1"), array("b", (4,), "float32"), array("c", (2,), "ggml_type_99")]
    )
    assert [(t.dtype, t.scheme) for t in tensors.values()] == [
        ("q4_1", "gguf"),
        ("float32", "plain"),
        ("ggml_type_99", "gguf"),
    ]


def test_the_order_of_the_file_is_kept() -> None:
    arrays = [array("a", (1,)), *gptq(), array("z", (1,))]
    tensors, _ = join(arrays)
    assert list(tensors) == ["a", "q_proj.weight", "z"]


# --- GPTQ and AWQ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [True, False])
def test_gptq_packs_along_the_inputs(bits: int, order: bool) -> None:
    tensors, anomalies = join(gptq(bits, order=order))
    assert anomalies == ()
    tensor = tensors["q_proj.weight"]
    assert (tensor.shape, tensor.dtype, tensor.scheme) == ((64, 256), f"int{bits}", "gptq")
    assert tensor.quantisation == {"bits": bits, "group_size": 128, "zero_offset": 1}
    assert set(tensor.parts) == {"qweight", "qzeros", "scales"} | ({"g_idx"} if order else set())
    assert len(tensors) == 1


def test_gptq_v2_stores_its_zeros_as_they_are() -> None:
    tensors, _ = join(gptq(), {"bits": 4, "checkpoint_format": "gptq_v2"})
    assert tensors["q_proj.weight"].quantisation["zero_offset"] == 0


def test_gptq_without_zeros_takes_its_bits_from_the_config() -> None:
    arrays = [a for a in gptq(order=False) if "qzeros" not in a.name]
    tensors, _ = join(arrays, {"bits": 4, "group_size": 128})
    assert tensors["q_proj.weight"].shape == (64, 256)
    plain, anomalies = join(arrays)
    assert list(plain) == [a.name for a in arrays]
    assert "the shapes fit several settings" in reason(anomalies)


def test_gptq_shapes_go_before_a_wrong_config() -> None:
    tensors, _ = join(gptq(4), {"bits": 8})
    assert tensors["q_proj.weight"].quantisation["bits"] == 4


def test_settings_are_found_in_quantize_config_json() -> None:
    arrays = [a for a in gptq(8, order=False) if "qzeros" not in a.name]
    configs = [Config("config.json", {}), Config("quantize_config.json", {"bits": 8, "group_size": 128})]
    tensors, _ = logical_tensors(arrays, configs, lambda _: b"")
    assert tensors[0].dtype == "int8"


def test_awq_packs_along_the_outputs() -> None:
    arrays = [
        array("q_proj.qweight", (256, 8), "int32"),
        array("q_proj.qzeros", (2, 8), "int32"),
        array("q_proj.scales", (2, 64)),
        array("q_proj.bias", (64,)),
    ]
    tensors, anomalies = join(arrays)
    tensor = tensors["q_proj.weight"]
    assert (tensor.shape, tensor.dtype, tensor.scheme) == ((64, 256), "int4", "awq")
    assert tensor.quantisation == {"bits": 4, "group_size": 128}
    assert tensors["q_proj.bias"].scheme == "plain"
    assert anomalies == ()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([array("q_proj.qweight", (32, 64), "int32")], "no scales"),
        (
            [array("q_proj.qweight", (32, 64), "int8"), array("q_proj.scales", (2, 64))],
            "not a table of int32",
        ),
        (
            [array("q_proj.qweight", (32, 64), "int32"), array("q_proj.scales", (2, 63))],
            "neither GPTQ nor AWQ",
        ),
        (
            [array("q_proj.qweight", (32, 0), "int32"), array("q_proj.scales", (0, 0))],
            "several settings or none",
        ),
        ([*gptq()[:3], array("q_proj.g_idx", (99,), "int32")], "several settings or none (none)"),
        ([array("q_proj.weight_packed", (4, 8), "int32")], "no weight_scale"),
        (
            [
                array("q_proj.weight_packed", (4, 8), "uint8"),
                array("q_proj.weight_scale", (4, 3), "float8_e4m3fn"),
            ],
            "do not fit",
        ),
        ([array("q_proj.W_q", (4, 8), "uint8")], "no shape"),
        ([array("q_proj.weight", (8, 1), "uint8"), array("q_proj.weight.absmax", (1,))], "no quant_state"),
        ([array("q_proj.weight", (4, 8), "uint32"), array("q_proj.scales", (3, 1))], "do not fit"),
        (
            [array("q_proj.weight._data", (4, 8), "uint8"), array("q_proj.weight._scale", (4, 1))],
            "in no header",
        ),
    ],
)
def test_what_cannot_be_understood_stays_as_it_is_and_says_why(arrays: list[Array], message: str) -> None:
    tensors, anomalies = join(arrays)
    assert message in reason(anomalies)
    assert anomalies[0].subject == "q_proj.weight"
    assert list(tensors) == [a.name for a in arrays]
    assert {t.scheme for t in tensors.values()} == {"plain"}


def test_a_plain_weight_beside_its_packed_self_is_an_anomaly() -> None:
    tensors, anomalies = logical_tensors([array("q_proj.weight", (64, 256)), *gptq()], [], lambda _: b"")
    assert [t.name for t in tensors] == ["q_proj.weight", "q_proj.weight"]
    assert anomalies == (Anomaly("duplicate-tensor", "q_proj.weight", {"with": "q_proj.qweight"}),)


# --- bitsandbytes -------------------------------------------------------------------------------------


def bnb(kind: str = "nf4", state: Any = None, **changes: Any) -> tuple[list[Array], dict[str, bytes]]:
    values = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [48, 64]}
    values |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25} | changes
    raw = json.dumps(values).encode() if state is None else state
    name = f"q_proj.weight.quant_state.bitsandbytes__{kind}"
    arrays = [
        array("q_proj.weight", (1536, 1), "uint8"),
        array("q_proj.weight.absmax", (48,), "uint8"),
        array("q_proj.weight.nested_absmax", (1,), "float32"),
        array("q_proj.weight.nested_quant_map", (256,), "float32"),
        array("q_proj.weight.quant_map", (16,), "float32"),
        array(name, (len(raw),), "uint8"),
    ]
    return arrays, {name: raw}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("backwards", [False, True])
def test_bitsandbytes_keeps_its_shape_in_json(kind: str, backwards: bool) -> None:
    arrays, content = bnb(kind)
    tensors, anomalies = join(arrays[::-1] if backwards else arrays, content=content)
    assert anomalies == ()
    (tensor,) = tensors.values()
    assert (tensor.name, tensor.shape, tensor.dtype) == ("q_proj.weight", (48, 64), kind)
    assert tensor.scheme == f"bnb-{kind}"
    assert tensor.quantisation == {
        "bits": 4,
        "group_size": 64,
        "nested_group_size": 256,
        "nested_offset": 0.25,
    }
    assert set(tensor.parts) == {
        "weight",
        "absmax",
        "nested_absmax",
        "nested_quant_map",
        "quant_map",
        "quant_state",
    }


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 60_000, "is not JSON"),
        (b"[1, 2]", "has no shape"),
        (b'{"shape": "48, 64"}', "has no shape"),
        (b'{"shape": [48, -64]}', "has no shape"),
        (b'{"shape": [48, true]}', "has no shape"),
        (b'{"shape": [48.0, 64]}', "has no shape"),
        (b'{"shape": [48, 65]}', "1536 bytes of 4-bit pairs"),
        (b'{"shape": [' + b"9" * 5000 + b"]}", "is not JSON"),
        (b" " * 70_000, "expected at most 65536"),
        (b'{"shape": [48, 64], "blocksize": 3}', "blocks of 3 values"),
        (b'{"shape": [48, 64], "blocksize": 1099511627774}', "blocks of 1099511627774 values"),
    ],
)
def test_a_hostile_quant_state_is_an_anomaly(state: bytes, message: str) -> None:
    arrays, content = bnb(state=state)
    tensors, anomalies = join(arrays, content=content)
    assert message in reason(anomalies)
    assert len(tensors) == len(arrays)


def test_an_unreadable_quant_state_is_an_anomaly() -> None:
    def read_bytes(asked: Array) -> bytes:
        raise CheckpointError(asked.name, "its bytes are compressed.", "Unpack it.")

    _, anomalies = logical_tensors(bnb()[0], [], read_bytes)
    assert "cannot be read: its bytes are compressed." in reason(anomalies)


def test_llm_int8_has_its_scales_as_a_part() -> None:
    arrays = [
        array("q_proj.SCB", (8,), "float32"),
        array("q_proj.weight", (8, 16), "int8"),
        array("q_proj.weight_format", (), "uint8"),
    ]
    tensors, _ = join(arrays)
    (tensor,) = tensors.values()
    assert (tensor.name, tensor.shape, tensor.dtype, tensor.scheme) == (
        "q_proj.weight",
        (8, 16),
        "int8",
        "bnb-int8",
    )


# --- fp8 and int8 with scales ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "weight", "scale", "scheme", "block"),
    [
        ("weight_scale_inv", (300, 256), (3, 2), "fp8-block", (128, 128)),
        ("scale", (300, 256), (3, 2), "fp8-block", (128, 128)),
        ("weight_scale", (256, 128), (2, 1), "fp8-block", (128, 128)),
        ("weight_scale", (16, 64), (16, 2), "fp8-block", (1, 32)),
        ("weight_scale_inv", (4, 256, 256), (4, 2, 2), "fp8-block", (128, 128)),
        ("weight_scale_inv", (300, 256), (5, 2), "fp8-block", None),
        ("weight_scale", (16, 64), (), "fp8", None),
        ("weight_scale", (16, 64), (1,), "fp8", None),
        ("weight_scale", (16, 64), (16, 1), "fp8", None),
        ("weight_scale", (16, 64), (16,), "fp8", None),
        ("scale_weight", (16, 64), (1,), "fp8", None),
    ],
)
def test_fp8_weights_carry_their_scales(
    suffix: str,
    weight: tuple[int, ...],
    scale: tuple[int, ...],
    scheme: str,
    block: tuple[int, int] | None,
) -> None:
    arrays = [
        array(f"q_proj.{suffix}", scale, "float32"),
        array("q_proj.weight", weight, "float8_e4m3fn"),
        array("q_proj.input_scale", (1,), "float32"),
        array("q_proj.k_scale", (1,), "float32"),
    ]
    tensors, anomalies = join(arrays)
    assert anomalies == ()
    tensor = tensors["q_proj.weight"]
    assert (tensor.shape, tensor.dtype, tensor.scheme) == (weight, "float8_e4m3fn", scheme)
    assert tensor.quantisation.get("block_size") == block
    assert set(tensor.parts) == {"weight", "weight_scale", "input_scale"}
    assert list(tensors) == ["q_proj.weight", "q_proj.k_scale"]


def test_the_block_size_of_the_config_is_used_or_none_is() -> None:
    arrays = [
        array("q_proj.weight", (96, 96), "float8_e4m3fn"),
        array("q_proj.weight_scale_inv", (2, 2), "float32"),
    ]
    told, _ = join(arrays, {"weight_block_size": [48, 64]})
    assert told["q_proj.weight"].quantisation["block_size"] == (48, 64)
    wrong, _ = join(arrays, {"weight_block_size": [128, 128]})
    assert "block_size" not in wrong["q_proj.weight"].quantisation


def test_fp8_without_scales_is_plain() -> None:
    tensors, anomalies = join(
        [array("q_proj.weight", (4, 4), "float8_e4m3fn"), array("a.weight_scale", (1,))]
    )
    assert tensors["q_proj.weight"].scheme == "plain"
    assert anomalies == ()


def test_expert_weights_without_a_weight_suffix_are_found() -> None:
    arrays = [
        array("experts.gate_up_proj", (4, 256, 256), "float8_e4m3fn"),
        array("experts.gate_up_proj_scale_inv", (4, 2, 2), "float32"),
    ]
    tensors, _ = join(arrays)
    assert [(t.name, t.scheme) for t in tensors.values()] == [("experts.gate_up_proj", "fp8-block")]


# --- compressed-tensors, NVFP4, MXFP4 -------------------------------------------------------------------


def test_compressed_tensors_keep_their_shape_in_an_array() -> None:
    arrays = [
        array("q_proj.weight_packed", (64, 32), "int32"),
        array("q_proj.weight_scale", (64, 2), "bfloat16"),
        array("q_proj.weight_shape", (2,), "int64"),
    ]
    content = {"q_proj.weight_shape": struct.pack("<qq", 64, 256)}
    (tensor,) = join(arrays, content=content)[0].values()
    assert (tensor.name, tensor.shape, tensor.dtype) == ("q_proj.weight", (64, 256), "int4")
    assert tensor.scheme == "compressed-tensors"
    assert tensor.quantisation == {"bits": 4, "group_size": 128}
    for wrong in (
        struct.pack("<qq", 63, 256),
        struct.pack("<qq", 64, -1),
        struct.pack("<qq", 64, 9999),
        b"12",
    ):
        tensors, anomalies = join(arrays, content={"q_proj.weight_shape": wrong})
        assert reason(anomalies)
        assert len(tensors) == 3


def test_compressed_tensors_without_a_shape_use_the_config() -> None:
    arrays = [
        array("q_proj.weight_packed", (64, 64), "int32"),
        array("q_proj.weight_scale", (64, 1), "bfloat16"),
    ]
    settings = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    (tensor,) = join(arrays, settings)[0].values()
    assert (tensor.shape, tensor.dtype) == ((64, 256), "int8")


def test_int8_with_scales_is_compressed_tensors() -> None:
    arrays = [array("q_proj.weight", (8, 16), "int8"), array("q_proj.weight_scale", (8, 1), "bfloat16")]
    (tensor,) = join(arrays)[0].values()
    assert (tensor.shape, tensor.dtype, tensor.scheme) == ((8, 16), "int8", "compressed-tensors")


def test_nvfp4_of_compressed_tensors_and_of_modelopt_agree() -> None:
    compressed = [
        array("q_proj.weight_packed", (8, 32), "uint8"),
        array("q_proj.weight_scale", (8, 4), "float8_e4m3fn"),
        array("q_proj.weight_global_scale", (1,), "float32"),
        array("q_proj.input_global_scale", (1,), "float32"),
    ]
    modelopt = [
        array("q_proj.weight", (8, 32), "uint8"),
        array("q_proj.weight_scale", (8, 4), "float8_e4m3fn"),
        array("q_proj.weight_scale_2", (), "float32"),
        array("q_proj.input_scale", (), "float32"),
    ]
    for arrays in (compressed, modelopt, modelopt[::-1]):
        tensors, anomalies = join(arrays)
        (tensor,) = tensors.values()
        assert (tensor.name, tensor.shape, tensor.dtype) == ("q_proj.weight", (8, 64), "nvfp4")
        assert tensor.scheme == "nvfp4"
        assert tensor.quantisation == {"bits": 4, "group_size": 16}
        assert anomalies == ()


@pytest.mark.parametrize("separator", ["_", "."])
def test_mxfp4_blocks_of_gpt_oss_become_expert_weights(separator: str) -> None:
    arrays = [
        array(f"experts.gate_up_proj{separator}blocks", (4, 64, 3, 16), "uint8"),
        array(f"experts.gate_up_proj{separator}scales", (4, 64, 3), "uint8"),
        array("experts.gate_up_proj_bias", (4, 64), "bfloat16"),
    ]
    tensors, _ = join(arrays)
    assert list(tensors) == ["experts.gate_up_proj", "experts.gate_up_proj_bias"]
    tensor = tensors["experts.gate_up_proj"]
    assert (tensor.shape, tensor.dtype, tensor.scheme) == ((4, 64, 96), "mxfp4", "mxfp4")


def test_fp4_groups_of_another_size_are_unknown() -> None:
    arrays = [array("q_proj.weight_packed", (8, 4), "uint8"), array("q_proj.weight_scale", (8, 8), "uint8")]
    assert "do not fit" in reason(join(arrays)[1])


def test_scalars_where_tables_belong_are_plain() -> None:
    tensors, anomalies = join([array("q_proj.weight", (2,), "uint32"), array("q_proj.scales", ())])
    assert len(tensors) == 2
    assert anomalies == ()


def test_other_arrays_called_blocks_are_plain() -> None:
    tensors, anomalies = join([array("encoder.blocks", (4, 16)), array("encoder.scales", (4,))])
    assert {t.scheme for t in tensors.values()} == {"plain"}
    assert anomalies == ()


# --- MLX, HQQ, quanto -----------------------------------------------------------------------------------


def mlx(cols: int = 32, groups: int = 4, name: str = "q_proj") -> list[Array]:
    return [
        array(f"{name}.biases", (8, groups)),
        array(f"{name}.scales", (8, groups)),
        array(f"{name}.weight", (8, cols), "uint32"),
    ]


@pytest.mark.parametrize(
    ("settings", "shape", "dtype"),
    [
        ({"bits": 4, "group_size": 64}, (8, 256), "int4"),
        ({"bits": 8, "group_size": 32}, (8, 128), "int8"),
        ({"bits": 4, "group_size": 64, "q_proj": {"bits": 8, "group_size": 32}}, (8, 128), "int8"),
    ],
)
def test_mlx_takes_its_group_size_from_the_config(
    settings: dict[str, Any], shape: tuple[int, int], dtype: str
) -> None:
    tensors, anomalies = join(mlx(), settings, key="quantization")
    (tensor,) = tensors.values()
    assert (tensor.shape, tensor.dtype, tensor.scheme) == (shape, dtype, "mlx")
    assert anomalies == ()


def test_mlx_settings_of_a_layer_are_found_below_a_wrapper() -> None:
    settings = {"bits": 4, "group_size": 64, "layers.0.q_proj": {"bits": 8, "group_size": 32}}
    tensors, _ = join(mlx(name="language_model.layers.0.q_proj"), settings, key="quantization")
    assert tensors["language_model.layers.0.q_proj.weight"].dtype == "int8"


def test_mlx_shapes_alone_serve_where_they_allow_one_answer() -> None:
    (tensor,) = join(mlx(cols=20, groups=2))[0].values()  # 320 bits a group: only 5 × 64
    assert (tensor.shape, tensor.dtype) == ((8, 128), "int5")
    tensors, anomalies = join(mlx())  # 256 bits: 8 × 32, 4 × 64 or 2 × 128
    assert "(32, 64, 128)" in reason(anomalies)
    assert len(tensors) == 3


@pytest.mark.parametrize(
    ("groups", "dtype", "ins"), [(8, "mxfp4", 256), (16, "nvfp4", 256), (4, "mxfp8", 128)]
)
def test_mlx_without_biases_is_a_microscaling_format(groups: int, dtype: str, ins: int) -> None:
    arrays = [array("q_proj.weight", (8, 32), "uint32"), array("q_proj.scales", (8, groups), "uint8")]
    (tensor,) = join(arrays)[0].values()
    assert (tensor.shape, tensor.dtype, tensor.scheme) == ((8, ins), dtype, "mlx")


def test_hqq_and_quanto_have_their_logical_shape() -> None:
    hqq = [
        array("q_proj.W_q", (512, 1), "uint8"),
        array("q_proj.scale", (16, 1)),
        array("q_proj.zero", (16, 1)),
        array("q_proj.shape", (2,), "int64"),
    ]
    (tensor,) = join(hqq, content={"q_proj.shape": struct.pack("<qq", 16, 64)})[0].values()
    assert (tensor.name, tensor.shape, tensor.dtype) == ("q_proj.weight", (16, 64), "int4")
    quanto = [array("q_proj.weight._data", (8, 16), "int8"), array("q_proj.weight._scale", (8, 1))]
    (tensor,) = join(quanto)[0].values()
    assert (tensor.name, tensor.shape, tensor.scheme) == ("q_proj.weight", (8, 16), "quanto")


# --- configurations that lie ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": "four", "group_size": -1},
        {"bits": True, "group_size": 1 << 80},
        {"bits": None, "config_groups": {"a": 3, "b": {"weights": [1]}}},
        {"weight_block_size": "128"},
        {"weight_block_size": [0, 128]},
        {"weight_block_size": [128, 128, 128]},
    ],
)
def test_nonsense_in_a_config_is_no_setting(settings: dict[str, Any]) -> None:
    fp8 = [
        array("k_proj.weight", (256, 256), "float8_e4m3fn"),
        array("k_proj.weight_scale", (2, 2), "float32"),
    ]
    tensors, anomalies = join([*gptq(), *fp8], settings)
    assert tensors["q_proj.weight"].quantisation["bits"] == 4
    assert tensors["k_proj.weight"].quantisation["block_size"] == (128, 128)
    assert anomalies == ()


def test_joining_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, attncli.checkpoint.quantized; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
