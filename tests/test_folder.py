"""Every kind of model folder reads as the one model that it holds, and says where its files disagree."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

import attncli
from attncli.checkpoint import open_checkpoint
from attncli.errors import AttncliError, CheckpointError, UnsupportedFormatError
from attncli.records import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]

LAYER: Shapes = {
    "model.layers.{}.self_attn.q_proj.weight": (16, 16),
    "model.layers.{}.self_attn.k_proj.weight": (8, 16),
    "model.layers.{}.self_attn.v_proj.weight": (8, 16),
    "model.layers.{}.self_attn.o_proj.weight": (16, 16),
}
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
}


def layer(number: int) -> dict[str, tuple[int, ...]]:
    return {name.format(number): shape for name, shape in LAYER.items()}


def save(path: Path, shapes: Shapes) -> Path:
    """A file of random numbers: safetensors, or torch where the suffix says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt"):
        torch.save({name: torch.from_numpy(value) for name, value in values.items()}, path)
    else:
        save_file(values, path)
    return path


def save_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def save_index(
    folder: Path, shards: Mapping[str, Shapes], name: str = "model.safetensors.index.json"
) -> Path:
    """The shards and the index that names what each holds."""
    for shard, shapes in shards.items():
        save(folder / shard, shapes)
    weight_map = {tensor: shard for shard, shapes in shards.items() for tensor in shapes}
    return save_json(folder / name, {"metadata": {"total_size": 0}, "weight_map": weight_map})


def save_gguf(path: Path, arch: str, shapes: Shapes, heads: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    prefix = "clip.vision" if arch == "clip" else arch
    writer.add_uint32(f"{prefix}.attention.head_count", heads)
    writer.add_uint32(f"{prefix}.embedding_length", 16)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in checkpoint.tensors}


def anomalies(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    return [(anomaly.kind, anomaly.subject) for anomaly in checkpoint.anomalies]


def error_of(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.problem.endswith(".")
    assert caught.value.remedy.endswith((".", "?"))
    return caught.value


SHARDS = {f"model-0000{n + 1}-of-00002.safetensors": layer(n) for n in range(2)}
BOTH = layer(0) | layer(1)


# --- Hugging Face -------------------------------------------------------------------------------------


def test_a_sharded_model_is_all_of_its_shards(tmp_path: Path) -> None:
    save_index(tmp_path, SHARDS)
    save_json(tmp_path / "config.json", CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.format) == ("folder", "sharded safetensors")
    assert checkpoint.files == tuple(SHARDS)
    assert shapes_of(checkpoint) == BOTH
    assert checkpoint.size_bytes == sum((tmp_path / shard).stat().st_size for shard in SHARDS)
    assert anomalies(checkpoint) == []
    report = attncli.inspect(tmp_path)
    assert [(found.heads, found.kv_heads, found.head_dim) for found in report.layers] == [(4, 2, 4)] * 2
    assert report.findings == ()


def test_the_index_given_directly_is_the_same_model(tmp_path: Path) -> None:
    index = save_index(tmp_path, SHARDS)
    save_json(tmp_path / "config.json", CONFIG)
    checkpoint = open_checkpoint(index)
    assert checkpoint.kind == "file"
    assert checkpoint.tensors == open_checkpoint(tmp_path).tensors
    assert attncli.inspect(index).layers == attncli.inspect(tmp_path).layers


def test_shards_without_an_index_are_one_model_too(tmp_path: Path) -> None:
    for shard, shapes in SHARDS.items():
        save(tmp_path / shard, shapes)
    assert shapes_of(open_checkpoint(tmp_path)) == BOTH


def test_torch_shards_with_an_index(tmp_path: Path) -> None:
    shards = {f"pytorch_model-0000{n + 1}-of-00002.bin": layer(n) for n in range(2)}
    save_index(tmp_path, shards, "pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "sharded torch"
    assert shapes_of(checkpoint) == BOTH
    assert anomalies(checkpoint) == []


def test_torch_shards_without_an_index(tmp_path: Path) -> None:
    for n in range(2):
        save(tmp_path / f"pytorch_model-0000{n + 1}-of-00002.bin", layer(n))
    save(tmp_path / "training_args.bin", {"x": (1,)})
    assert shapes_of(open_checkpoint(tmp_path)) == BOTH


def test_safetensors_come_before_torch_files_of_the_same_model(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", layer(0))
    save(tmp_path / "pytorch_model.bin", layer(0) | {"only.in.bin": (1,)})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == ("model.safetensors",)
    assert shapes_of(checkpoint) == layer(0)


def test_safetensors_come_before_torch_shards_and_their_index(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", BOTH)
    shards = {f"pytorch_model-0000{n + 1}-of-00002.bin": layer(n) for n in range(2)}
    save_index(tmp_path, shards, "pytorch_model.bin.index.json")
    assert open_checkpoint(tmp_path).files == ("model.safetensors",)


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_an_index_left_behind_without_any_of_its_shards_hides_no_weights(tmp_path: Path, index: str) -> None:
    save(tmp_path / "model.safetensors", layer(0))
    save_json(tmp_path / index, {"weight_map": {"x": "gone-00001-of-00001.bin"}})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == ("model.safetensors",)
    assert anomalies(checkpoint) == []


def test_the_files_of_a_training_run_are_not_taken_for_the_model(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", layer(0))
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "scaler.pt"):
        save(tmp_path / name, {"x": (1,)})
    assert open_checkpoint(tmp_path).files == ("pytorch_model.bin",)
    (tmp_path / "pytorch_model.bin").unlink()
    assert "none of them are weights" in error_of(tmp_path).problem


def test_subfolders_beside_the_weights_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", layer(0))
    save(tmp_path / "original" / "consolidated.00.pth", {"layers.0.attention.wq.weight": (16, 16)})
    save(tmp_path / "metal" / "model.bin", {"x": (1,)})
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    assert shapes_of(open_checkpoint(tmp_path)) == layer(0)


def test_a_copy_in_mistrals_naming_is_not_added_to_the_model(tmp_path: Path) -> None:
    for shard, shapes in SHARDS.items():
        save(tmp_path / shard, shapes)
    save(tmp_path / "consolidated.safetensors", {"layers.0.attention.wq.weight": (16, 16)})
    assert shapes_of(open_checkpoint(tmp_path)) == BOTH
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    assert shapes_of(open_checkpoint(tmp_path)) == {"layers.0.attention.wq.weight": (16, 16)}


def test_links_into_blobs_as_the_hugging_face_cache_lays_them_out(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    index = save_index(blobs, SHARDS)
    save_json(blobs / "config.json", CONFIG)
    for number, blob in enumerate(sorted(blobs.iterdir())):
        hashed = blob.rename(blobs / f"{number:064x}")
        (snapshot / blob.name).symlink_to(Path("../../blobs") / hashed.name)
    checkpoint = open_checkpoint(snapshot)
    assert shapes_of(checkpoint) == BOTH
    assert anomalies(checkpoint) == []
    assert [config.source for config in checkpoint.configs] == ["config.json"]
    assert checkpoint.size_bytes > 0
    assert shapes_of(open_checkpoint(snapshot / index.name)) == BOTH
    one = open_checkpoint(snapshot / "model-00001-of-00002.safetensors")
    assert shapes_of(one) == layer(0)
    assert attncli.inspect(snapshot, values=True).exit_code() == 0


def test_the_cache_folder_above_the_snapshots_points_to_them(tmp_path: Path) -> None:
    save(tmp_path / "snapshots" / "0123abcd" / "model.safetensors", layer(0))
    save(tmp_path / ".git" / "lfs" / "x.safetensors", layer(0))
    (tmp_path / "blobs").mkdir()
    error = error_of(tmp_path)
    assert error.problem == "the folder itself holds no weights, but folders below it do."
    assert error.remedy == "Give one of them: snapshots/0123abcd."


def test_a_file_given_directly_takes_the_config_beside_it(tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors", layer(0))
    save_json(tmp_path / "config.json", CONFIG)
    checkpoint = open_checkpoint(file)
    assert checkpoint.kind == "file"
    assert [config.source for config in checkpoint.configs] == ["config.json"]
    assert attncli.inspect(file).layers[0].heads == 4


def test_a_file_is_found_by_its_name_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model.safetensors", layer(0))
    save_json(tmp_path / "config.json", CONFIG)
    monkeypatch.chdir(tmp_path)
    for given_path in ("model.safetensors", "."):
        assert attncli.inspect(given_path, values=True).layers[0].heads == 4


@pytest.mark.parametrize(
    "name",
    ["MODEL.SAFETENSORS", "Pytorch_Model.BIN", "weights.PTH", "my model (1).safetensors", "модель-ß.pt"],
)
def test_suffixes_in_capitals_spaces_and_letters_of_any_script(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a folder – ü"
    save(folder / name, layer(0))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.files == (name,)
    assert shapes_of(checkpoint) == layer(0)


# --- several models in one folder ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_two_models_in_one_folder_are_not_mixed(tmp_path: Path, suffix: str) -> None:
    for name in ("epoch1", "epoch2"):
        save(tmp_path / f"{name}.{suffix}", layer(0))
    error = error_of(tmp_path)
    assert "holds 2 checkpoints and no index" in error.problem
    assert f"epoch1.{suffix}, epoch2.{suffix}" in error.problem
    assert error.remedy == "Name one of them."


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("model.safetensors", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"),
        ("model.safetensors", "model-00001-of-00001.safetensors"),
        ("pytorch_model.bin", "pytorch_model_old.bin"),
        ("model.pt", "best.pt"),
    ],
)
def test_the_name_that_every_loader_asks_for_is_the_model(tmp_path: Path, model: str, other: str) -> None:
    save(tmp_path / model, layer(0))
    save(tmp_path / other, layer(1))
    assert open_checkpoint(tmp_path).files == (model,)


def test_torch_files_of_different_networks_are_not_joined(tmp_path: Path) -> None:
    save(tmp_path / "generator.pt", layer(0))
    save(tmp_path / "discriminator.pt", layer(1))
    assert "discriminator.pt, generator.pt" in error_of(tmp_path).problem


def test_unnumbered_safetensors_that_share_no_tensor_are_one_model(tmp_path: Path) -> None:
    save(tmp_path / "weights.00.safetensors", layer(0))
    save(tmp_path / "weights.01.safetensors", layer(1))
    assert shapes_of(open_checkpoint(tmp_path)) == BOTH


def test_leftovers_of_another_split_are_not_mixed_in(tmp_path: Path) -> None:
    for shard, shapes in SHARDS.items():
        save(tmp_path / shard, shapes)
    save(tmp_path / "model-00001-of-00003.safetensors", layer(0))
    assert "3 checkpoints" in error_of(tmp_path).problem


def test_shards_that_each_have_a_name_of_their_own(tmp_path: Path) -> None:
    for n in range(2):
        save(tmp_path / f"shard-0000{n + 1}-model-0000{n + 1}-of-00002.safetensors", layer(n))
    assert shapes_of(open_checkpoint(tmp_path)) == BOTH


def test_a_gap_in_the_numbering_of_shards_is_an_error_by_name(tmp_path: Path) -> None:
    for n in (1, 3):
        save(tmp_path / f"model-0000{n}-of-00003.safetensors", layer(n))
    error = error_of(tmp_path)
    assert error.problem == "1 of 3 files it names are missing: model-00002-of-00003.safetensors."


# --- index against headers ----------------------------------------------------------------------------


def disagreeing(tmp_path: Path, weight_map: Mapping[str, str], shards: Mapping[str, Shapes]) -> Checkpoint:
    for shard, shapes in shards.items():
        save(tmp_path / shard, shapes)
    save_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    return open_checkpoint(tmp_path)


ONE, TWO = SHARDS


def finding(path: Path) -> Mapping[str, Any]:
    """The evidence of the only finding, which is of ATT001."""
    (found,) = attncli.inspect(path).findings
    assert (found.code, found.name) == ("ATT001", "index-disagrees")
    return {"severity": found.severity, "message": found.message, **found.evidence}


def test_a_tensor_of_the_index_that_no_shard_holds(tmp_path: Path) -> None:
    checkpoint = disagreeing(
        tmp_path,
        dict.fromkeys(layer(0), ONE) | dict.fromkeys(layer(1), TWO) | {"lm_head.weight": TWO},
        SHARDS,
    )
    assert anomalies(checkpoint) == [("missing-tensor", "lm_head.weight")]
    found = finding(tmp_path)
    assert found["severity"] == "error"
    assert found["names"] == ["lm_head.weight"]
    assert attncli.inspect(tmp_path).exit_code() == 1


def test_a_tensor_in_a_shard_that_the_index_does_not_know(tmp_path: Path) -> None:
    shards = {ONE: layer(0), TWO: layer(1) | {"stray.weight": (1,)}}
    checkpoint = disagreeing(tmp_path, dict.fromkeys(layer(0), ONE) | dict.fromkeys(layer(1), TWO), shards)
    assert anomalies(checkpoint) == [("stray-tensor", "stray.weight")]
    assert finding(tmp_path)["severity"] == "warning"
    assert "stray.weight" in shapes_of(checkpoint)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    weight_map = dict.fromkeys(layer(0), ONE) | dict.fromkeys(layer(1), TWO)
    moved = next(iter(layer(1)))
    checkpoint = disagreeing(tmp_path, weight_map | {moved: ONE}, SHARDS)
    assert anomalies(checkpoint) == [("wrong-shard", moved)]
    assert checkpoint.anomalies[0].evidence == {"index": ONE, "file": TWO}
    assert finding(tmp_path)["severity"] == "error"


def test_a_tensor_in_two_shards_is_read_where_the_index_says(tmp_path: Path) -> None:
    twice = next(iter(layer(0)))
    weight_map = dict.fromkeys(layer(0), ONE) | dict.fromkeys(layer(1), TWO) | {twice: TWO}
    shards = {ONE: layer(0), TWO: layer(1) | {twice: (16, 16)}}
    checkpoint = disagreeing(tmp_path, weight_map, shards)
    assert anomalies(checkpoint) == [("duplicate-tensor", twice)]
    assert checkpoint.anomalies[0].evidence == {"files": [ONE, TWO]}
    assert next(t for t in checkpoint.tensors if t.name == twice).file == TWO
    assert finding(tmp_path)["severity"] == "error"


def test_a_shard_of_another_split_beside_the_index_is_a_stray_file(tmp_path: Path) -> None:
    weight_map = dict.fromkeys(layer(0), ONE) | dict.fromkeys(layer(1), TWO)
    save(tmp_path / "model-00001-of-00003.safetensors", layer(0))
    checkpoint = disagreeing(tmp_path, weight_map, SHARDS)
    assert anomalies(checkpoint) == [("stray-file", "model-00001-of-00003.safetensors")]
    assert finding(tmp_path)["severity"] == "warning"


def test_shards_that_are_missing_are_listed(tmp_path: Path) -> None:
    save(tmp_path / ONE, layer(0))
    weight_map = {"a": ONE, "b": TWO, **{f"c{n}": f"model-9999{n}-of-00002.safetensors" for n in range(4)}}
    save_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    error = error_of(tmp_path)
    assert error.subject == str(tmp_path / "model.safetensors.index.json")
    assert error.problem == (
        f"5 of 6 files it names are missing: {TWO}, model-99990-of-00002.safetensors, "
        "model-99991-of-00002.safetensors and 2 more."
    )


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../x",
        "..",
        "C:\\x",
        "C:x",
        "a\\b",
        "x\0y",
        "",
        3,
        None,
        ["a"],
    ],
)
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, shard: object) -> None:
    folder = tmp_path / "inner"
    save(folder / ONE, layer(0))
    save(tmp_path / "model.safetensors", layer(0))
    save_json(folder / "model.safetensors.index.json", {"weight_map": {"a": ONE, "b": shard}})
    error = error_of(folder)
    assert f"points tensor 'b' at {shard!r}, outside its own folder" in error.problem


def test_shards_in_a_subfolder_of_the_index(tmp_path: Path) -> None:
    save(tmp_path / "parts" / "a.safetensors", layer(0))
    save_json(
        tmp_path / "model.safetensors.index.json",
        {"weight_map": dict.fromkeys(layer(0), "parts/a.safetensors")},
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == ("parts/a.safetensors",)
    assert {tensor.file for tensor in checkpoint.tensors} == {"parts/a.safetensors"}
    assert anomalies(checkpoint) == []
    assert attncli.inspect(tmp_path, values=True).exit_code() == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "nul", "[" * 10**5]
)
def test_an_index_that_is_no_index(tmp_path: Path, text: str) -> None:
    save(tmp_path / ONE, layer(0))
    (tmp_path / "model.safetensors.index.json").write_text(text)
    error = error_of(tmp_path / "model.safetensors.index.json")
    assert "JSON" in error.problem or "weight_map" in error.problem


def test_shards_that_git_lfs_did_not_fetch_say_so(tmp_path: Path) -> None:
    save_index(tmp_path, SHARDS)
    (tmp_path / TWO).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UnsupportedFormatError, match="Git LFS pointer") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.subject == str(tmp_path / TWO)
    assert "git lfs pull" in caught.value.remedy


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["weight_map", "metadata"]),
            st.recursive(
                st.none() | st.floats() | st.text(max_size=4),
                lambda inner: (
                    st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
                ),
                max_leaves=4,
            ),
            max_size=3,
        ),
        st.fixed_dictionaries(
            {
                "weight_map": st.dictionaries(
                    st.text(max_size=8) | st.sampled_from(list(layer(0))),
                    st.text(max_size=6)
                    | st.sampled_from(["a.safetensors", "./a.safetensors", "a", "b/a", "."]),
                    max_size=4,
                )
            }
        ),
    )
)
def test_whatever_an_index_holds_only_our_own_error_comes_out(tmp_path: Path, index: object) -> None:
    save(tmp_path / "a.safetensors", layer(0))
    raw = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / "x.safetensors.index.json").write_bytes(raw)
    for path in (tmp_path, tmp_path / "x.safetensors.index.json"):
        with suppress(AttncliError):
            attncli.inspect(path).to_json()


# --- Meta, PEFT, DCP, diffusers, GGUF, DeepSpeed ------------------------------------------------------


def ranks(folder: Path, embeddings: tuple[int, int], count: int = 2) -> None:
    """Two layers of width 16 with 4 heads of 4 and 2 KV heads, split over `count` ranks."""
    for rank in range(count):
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings.weight": embeddings,
            "norm.weight": (16,),
            "output.weight": (32 // count, 16),
        }
        for n in range(2):
            base = f"layers.{n}"
            shapes |= {
                f"{base}.attention.wq.weight": (16 // count, 16),
                f"{base}.attention.wk.weight": (8 // count, 16),
                f"{base}.attention.wv.weight": (8 // count, 16),
                f"{base}.attention.wo.weight": (16, 16 // count),
                f"{base}.feed_forward.w1.weight": (24 // count, 16),
                f"{base}.feed_forward.w2.weight": (16, 24 // count),
                f"{base}.attention_norm.weight": (16,),
            }
        save(folder / f"consolidated.{rank:02d}.pth", shapes)
    save_json(folder / "params.json", {"dim": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2})


@pytest.mark.parametrize("embeddings", [(32, 8), (16, 16)], ids=["width-split", "vocabulary-split"])
def test_metas_ranks_are_summed_to_the_whole_model(tmp_path: Path, embeddings: tuple[int, int]) -> None:
    ranks(tmp_path, embeddings)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "Meta consolidated"
    assert checkpoint.files == ("consolidated.00.pth", "consolidated.01.pth")
    assert anomalies(checkpoint) == []
    shapes = shapes_of(checkpoint)
    assert shapes["tok_embeddings.weight"] == shapes["output.weight"] == (32, 16)
    assert shapes["norm.weight"] == shapes["layers.1.attention_norm.weight"] == (16,)
    for n in range(2):
        assert shapes[f"layers.{n}.attention.wq.weight"] == (16, 16)
        assert shapes[f"layers.{n}.attention.wk.weight"] == (8, 16)
        assert shapes[f"layers.{n}.attention.wo.weight"] == (16, 16)
        assert shapes[f"layers.{n}.feed_forward.w1.weight"] == (24, 16)
        assert shapes[f"layers.{n}.feed_forward.w2.weight"] == (16, 24)
    report = attncli.inspect(tmp_path)
    assert [(found.heads, found.kv_heads, found.head_dim) for found in report.layers] == [(4, 2, 4)] * 2
    assert report.findings == ()


def test_one_rank_is_the_whole_model_as_it_is(tmp_path: Path) -> None:
    ranks(tmp_path, (32, 16), count=1)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == ("consolidated.00.pth",)
    assert all(part.offset is not None for tensor in checkpoint.tensors for part in tensor.parts.values())


def test_a_missing_rank_is_an_error_by_name(tmp_path: Path) -> None:
    ranks(tmp_path, (32, 4), count=4)
    (tmp_path / "consolidated.02.pth").unlink()
    assert "1 of 4 files it names are missing: consolidated.02.pth." in error_of(tmp_path).problem


def test_a_tensor_that_one_rank_lacks_is_an_anomaly(tmp_path: Path) -> None:
    ranks(tmp_path, (32, 8))
    save(tmp_path / "consolidated.01.pth", {"norm.weight": (16,)})
    checkpoint = open_checkpoint(tmp_path)
    assert ("missing-tensor", "layers.0.attention.wq.weight") in anomalies(checkpoint)
    assert attncli.inspect(tmp_path).exit_code() == 1


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_peft_adapter_joins_its_pairs(tmp_path: Path, name: str) -> None:
    base = "base_model.model.model.layers.0.self_attn"
    pairs = {"q_proj": (16, 16), "v_proj": (8, 16)}
    shapes: dict[str, tuple[int, ...]] = {}
    for proj, (out, inner) in pairs.items():
        shapes[f"{base}.{proj}.lora_A.weight"] = (2, inner)
        shapes[f"{base}.{proj}.lora_B.weight"] = (out, 2)
    save(tmp_path / name, shapes)
    save_json(
        tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "base"}
    )
    save_json(tmp_path / "base" / "config.json", CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    assert {t.name: (t.shape, t.scheme) for t in checkpoint.tensors} == {
        f"model.layers.0.self_attn.{proj}.weight": (shape, "lora") for proj, shape in pairs.items()
    }
    assert [config.source for config in checkpoint.configs] == [
        "adapter_config.json",
        "config.json of the base model",
    ]
    report = attncli.inspect(tmp_path)
    assert report.findings == ()
    assert [layer.heads for layer in report.layers] == [4]


@pytest.mark.parametrize("base", ["broken", "a\0b", "x" * 5000, "nowhere", 3])
def test_an_adapter_whose_base_model_cannot_be_read_is_still_an_adapter(tmp_path: Path, base: object) -> None:
    save(
        tmp_path / "adapter_model.safetensors",
        {"q_proj.lora_A.weight": (2, 8), "q_proj.lora_B.weight": (4, 2)},
    )
    save_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": base})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    checkpoint = open_checkpoint(tmp_path)
    assert [config.source for config in checkpoint.configs] == ["adapter_config.json"]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_of_torch_distributed_checkpoint(tmp_path: Path) -> None:
    save_distributed(
        {"model": {name: torch.zeros(shape) for name, shape in BOTH.items()}}, checkpoint_id=tmp_path
    )
    save_json(tmp_path / "config.json", CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "torch-distributed"
    assert shapes_of(checkpoint) == BOTH
    assert [found.heads for found in attncli.inspect(tmp_path).layers] == [4, 4]
    next(tmp_path.glob("*.distcp")).unlink()
    assert "files it names are missing: __0_0.distcp" in error_of(tmp_path).problem


def pipeline(folder: Path) -> None:
    save_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    attention = {f"attn1.to_{side}.weight": (16, 16) for side in "qkv"} | {"attn1.to_out.0.weight": (16, 16)}
    save(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        {f"mid_block.attentions.0.transformer_blocks.0.{name}": shape for name, shape in attention.items()},
    )
    save(folder / "unet" / "diffusion_pytorch_model.bin", {"unused": (1,)})
    save_json(
        folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "attention_head_dim": 2}
    )
    save(
        folder / "text_encoder" / "model.safetensors",
        {
            f"text_model.encoder.layers.0.self_attn.{side}.weight": (16, 16)
            for side in ("q_proj", "k_proj", "v_proj", "out_proj")
        },
    )
    save_json(
        folder / "text_encoder" / "config.json", {"model_type": "clip_text_model", "num_attention_heads": 4}
    )
    save_json(folder / "scheduler" / "scheduler_config.json", {})


def test_a_diffusers_pipeline_is_all_of_its_components(tmp_path: Path) -> None:
    pipeline(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "diffusers pipeline"
    assert checkpoint.files == (
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    )
    report = attncli.inspect(tmp_path, values=True)
    assert {layer.path: layer.heads for layer in report.layers} == {
        "text_encoder.text_model.encoder.layers.0.self_attn": 4,
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1": 2,
    }
    assert report.findings == ()
    assert len({m.layer for m in report.measurements if m.metric == "absmax"}) == 8


def test_the_projector_beside_a_gguf_model_is_counted_and_left_out(tmp_path: Path) -> None:
    text = {f"blk.0.attn_{side}.weight": (16, 16) for side in ("q", "k", "v", "output")}
    vision = {f"v.blk.0.attn_{side}.weight": (16, 16) for side in ("q", "k", "v", "out")}
    save_gguf(tmp_path / "model-Q8_0.gguf", "llama", text)
    save_gguf(tmp_path / "mmproj-model-f16.gguf", "clip", vision, heads=2)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == ("model-Q8_0.gguf",)
    assert shapes_of(checkpoint) == text
    report = attncli.inspect(tmp_path)
    assert {found.path: found.heads for found in report.layers} == {"blk.0": 4}
    assert "4 projector (mmproj) tensors left out" in report.notes


def test_a_folder_with_nothing_but_a_projector_is_the_projector(tmp_path: Path) -> None:
    vision = {f"v.blk.0.attn_{side}.weight": (16, 16) for side in ("q", "k", "v", "out")}
    save_gguf(tmp_path / "mmproj-model-f16.gguf", "clip", vision)
    assert shapes_of(open_checkpoint(tmp_path)) == vision


def test_two_quantisations_in_one_folder_are_not_chosen_between(tmp_path: Path) -> None:
    for name in ("model.Q4_0.gguf", "model.Q8_0.gguf"):
        save_gguf(tmp_path / name, "llama", {"blk.0.attn_q.weight": (16, 16)})
    error = error_of(tmp_path)
    assert "model.Q4_0.gguf, model.Q8_0.gguf" in error.problem
    assert error.remedy == "Name one of them."


def test_the_states_of_deepspeed_zero(tmp_path: Path) -> None:
    states = tmp_path / "global_step10"
    save(states / "mp_rank_00_model_states.pt", layer(0))
    for rank in range(2):
        save(states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"x": (1,)})
    assert shapes_of(open_checkpoint(states)) == layer(0)
    (states / "mp_rank_00_model_states.pt").unlink()
    for rank in range(2):
        save(states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", {"x": (0,)})
    (tmp_path / "zero_to_fp32.py").write_text("")
    (tmp_path / "latest").write_text("global_step10")
    save(tmp_path / "rng_state_0.pth", {"x": (1,)})
    for folder in (tmp_path, states):
        with pytest.raises(UnsupportedFormatError, match="a DeepSpeed ZeRO checkpoint") as caught:
            open_checkpoint(folder)
        assert "zero_to_fp32.py" in caught.value.remedy


# --- configs ------------------------------------------------------------------------------------------


def test_a_config_that_is_no_json_is_a_finding_and_the_weights_are_read(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", layer(0))
    (tmp_path / "config.json").write_text('{"num_attention_heads": ')
    assert anomalies(open_checkpoint(tmp_path)) == [("unreadable-config", "config.json")]
    (found,) = attncli.inspect(tmp_path).findings
    assert (found.code, found.severity) == ("ATT004", "warning")


def test_a_config_without_permission_is_a_finding_and_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model.safetensors", layer(0))
    save_json(tmp_path / "config.json", CONFIG)
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (found,) = open_checkpoint(tmp_path).anomalies
    assert (found.kind, found.subject) == ("unreadable-config", "config.json")
    assert found.evidence["problem"] == "it cannot be read (Permission denied)."


# --- no weights at all --------------------------------------------------------------------------------


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    error = error_of(tmp_path)
    assert error.problem == "the folder holds no files."
    assert "*.safetensors" in error.remedy


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("../blobs/0000")
    (tmp_path / "model.safetensors").symlink_to("../blobs/0123")
    error = error_of(tmp_path)
    assert error.subject == str(tmp_path / "model.safetensors")
    assert error.problem == "this is a link to a file that is not there."
    assert error_of(tmp_path / "model.safetensors").problem == (
        "this is a link to ../blobs/0123, which is not there."
    )


def test_a_folder_of_other_files_names_some_of_them(tmp_path: Path) -> None:
    for n in range(6):
        (tmp_path / f"notes{n}.txt").write_text("x")
    assert "6 files (notes0.txt, notes1.txt, notes2.txt, notes3.txt, …)" in error_of(tmp_path).problem


def test_a_name_that_was_mistyped_gets_a_suggestion(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", layer(0))
    error = error_of(tmp_path / "modle.safetensors")
    assert error.problem == "there is no such file or folder."
    assert error.remedy == f"Did you mean {tmp_path / 'model.safetensors'}?"
    assert error_of(tmp_path / "no" / "x").remedy == f"The folder {tmp_path / 'no'} does not exist either."


FOREIGN_FOLDERS = {
    "an Orbax checkpoint (JAX)": (["_METADATA", "manifest.ocdbt"], "orbax"),
    "a TensorFlow SavedModel": (["saved_model.pb"], "Convert"),
    "a TensorFlow checkpoint": (["model.ckpt.index", "model.ckpt.data-00000-of-00001"], "Convert"),
    "a Flax checkpoint (msgpack)": (["flax_model.msgpack", "config.json"], "from_flax=True"),
    "a TensorFlow checkpoint (HDF5)": (["tf_model.h5"], "from_tf=True"),
    "an ONNX model": (["model.onnx", "model.onnx.data"], "PyTorch checkpoint"),
    "an OpenVINO model": (["openvino_model.xml", "openvino_model.bin"], "PyTorch checkpoint"),
}


@pytest.mark.parametrize("name", FOREIGN_FOLDERS)
def test_folders_of_other_frameworks_are_named_with_their_remedy(tmp_path: Path, name: str) -> None:
    files, remedy = FOREIGN_FOLDERS[name]
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UnsupportedFormatError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.problem == f"this is {name}, which attncli does not read."
    assert remedy in caught.value.remedy


def test_readable_weights_beside_foreign_ones_are_read(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", layer(0))
    for file in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx"):
        (tmp_path / file).write_bytes(b"x")
    assert shapes_of(open_checkpoint(tmp_path)) == layer(0)
