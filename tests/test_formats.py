"""What a file is, its bytes tell, whatever its name; what attncli does not read is named, with a remedy."""

import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import attncli
from attncli.checkpoint import open_checkpoint
from attncli.checkpoint.formats import FOREIGN, FORMATS, Head
from attncli.errors import CheckpointError, UnsupportedFormatError

WEIGHTS = {f"layers.0.attn.{side}_proj.weight": torch.ones(8, 8) for side in "qkvo"}


def save_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for side in ("q", "k", "v", "output"):
        writer.add_tensor(f"blk.0.attn_{side}.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: tensor.numpy() for name, tensor in WEIGHTS.items()})


def save_script(path: Path) -> None:
    # torch.jit is deprecated and warns so; files of it will be around for years.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(8, 8))), path)


KNOWN: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file(WEIGHTS, path),
    "gguf": save_gguf,
    "torch": lambda path: torch.save(WEIGHTS, path),
    "torch-legacy": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    "torchscript": save_script,
    "npz": save_npz,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".gguf", ".pt2", ".txt", ".json", "", ".NPZ"])
@pytest.mark.parametrize("written", KNOWN)
def test_the_bytes_tell_the_format_whatever_the_suffix(tmp_path: Path, written: str, suffix: str) -> None:
    path = tmp_path / "plain"
    KNOWN[written](path)
    path = path.rename(tmp_path / f"weights{suffix}")
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == written
    assert checkpoint.files == (path.name,)
    assert checkpoint.parameters == (72 if written == "torchscript" else 256)


@pytest.mark.parametrize(
    "member",
    [
        "model/archive_format",
        "serialized_exported_program.json",
        "model/data/weights/model_weights_config.json",
    ],
)
def test_torch_export_archives_are_told_by_their_members_before_torch_files(
    tmp_path: Path, member: str
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(members(member, "model/data.pkl"))
    first = next(known.name for known in FORMATS if known.recognised(Head(path)))
    assert first == "torch.export archive"


def test_every_format_that_is_read_has_a_name_of_its_own() -> None:
    names = [known.name for known in FORMATS]
    assert len(set(names)) == len(names) == 6


# --- what is only named -------------------------------------------------------------------------------


def members(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def ctranslate2() -> bytes:
    name = b"TransformerSpec\0"
    return struct.pack("<IH", 6, len(name)) + name + struct.pack("<I", 7)


FOREIGN_FILES: dict[str, tuple[bytes, str]] = {
    "a Git LFS pointer, not the weights": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "git lfs pull",
    ),
    "an HTML page, not a checkpoint": (
        b"\n<!DOCTYPE html><html><title>401</title>",
        "download the file itself",
    ),
    "an HDF5 file (Keras or TensorFlow)": (b"\x89HDF\r\n\x1a\n" + bytes(64), "safetensors"),
    "a TensorFlow Lite model": (b"\x1c\0\0\0TFL3" + bytes(32), "converted from"),
    "a CTranslate2 model": (ctranslate2(), "converted from"),
    "a TensorFlow SavedModel": (b"\x08\x01\x12\x9c\x9a\x02\x0a\xee\x0f\x0a\x0c\x0a\x05Const", "Convert it"),
    "a Flax checkpoint (msgpack)": (b"\x83\xa4lm_head\x81\xa6kernel", "from_flax=True"),
    "an ONNX model": (b"\x08\x07\x12\x07pytorch\x1a\x031.9:\xd2\x1d", "exported from"),
    "a torch.package archive": (
        members("model/.data/extern_modules", "model/.data/version"),
        "torch.package",
    ),
    "a Keras archive": (members("config.json", "metadata.json", "model.weights.h5"), "Keras"),
    "a GGML file from before GGUF": (b"tjgg\x03\0\0\0" + bytes(64), "llama.cpp"),
    "a single NumPy array": (npy(), "numpy.savez"),
    "a torch file from before version 0.1.10 (tar)": (tar(), "Unpack it"),
    "a compressed file": (gzip.compress(b"x" * 100), "Unpack it first"),
    "a bare pickle": (pickle.dumps({"a": [1, 2]}), "safetensors"),
    "a text file": (b'{"num_attention_heads": 12}\n', "the folder of the model"),
}


def test_every_row_of_the_table_of_foreign_formats_has_its_file_here() -> None:
    assert [foreign.name for foreign in FOREIGN] == list(FOREIGN_FILES)


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".bin"])
@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_other_formats_are_named_with_their_remedy(tmp_path: Path, name: str, suffix: str) -> None:
    data, remedy = FOREIGN_FILES[name]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    with pytest.raises(UnsupportedFormatError) as caught:
        open_checkpoint(path)
    assert caught.value.subject == str(path)
    assert caught.value.problem == f"this is {name}, which attncli does not read."
    assert remedy in caught.value.remedy
    assert caught.value.remedy.endswith(".")


@pytest.mark.parametrize(
    "data",
    [
        lzma.compress(b"x"),
        b"\x28\xb5\x2f\xfd" + bytes(9),
        b"7z\xbc\xaf\x27\x1c",
        b"BZh91AY&SY",
        b"Rar!\x1a\x07",
    ],
    ids=["xz", "zstd", "7z", "bzip2", "rar"],
)
def test_every_usual_compression_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model").write_bytes(data)
    with pytest.raises(UnsupportedFormatError, match="a compressed file"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_every_binary_protocol_are_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Boom(tmp_path / "ran"), protocol))
    with pytest.raises(UnsupportedFormatError, match="a bare pickle"):
        open_checkpoint(tmp_path / "model.pkl")
    assert not (tmp_path / "ran").exists()


class Boom:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_the_pickle_that_must_not_run_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Boom(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["plain", "naïve – ünïcode\n", "x" * 10_000, "x" + "é" * 4095])
def test_text_in_any_language_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes").write_text(text, encoding="utf-8")
    with pytest.raises(UnsupportedFormatError, match="a text file"):
        open_checkpoint(tmp_path / "notes")


def error_of(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


def test_unknown_bytes_say_what_was_expected_of_the_suffix(tmp_path: Path) -> None:
    for suffix, expected in ((".safetensors", "a length and a JSON header"), (".gguf", "the letters GGUF")):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(b"\xfe\xdc\xba\x98" * 4)
        error = error_of(path)
        assert error.problem == (
            r"the file begins with b'\xfe\xdc\xba\x98\xfe\xdc\xba\x98', which is no known checkpoint format; "
            f"{suffix} should begin with {expected}."
        )
        assert all(known.name in error.remedy for known in FORMATS)
    path = tmp_path / "model"
    path.write_bytes(b"\xfe\xdc\xba\x98" * 4)
    assert error_of(path).problem.endswith("which is no known checkpoint format.")


def test_a_zip_archive_of_something_else_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(members("readme.md", "photo.jpg"))
    assert "none of its members is a known kind of weights" in error_of(path).problem
    whole = tmp_path / "whole"
    torch.save(WEIGHTS, whole)
    path.write_bytes(whole.read_bytes()[:-100])
    error = error_of(path)
    assert error.problem == "this is a zip archive, but its directory of members is missing or damaged."
    assert "truncated" in error.remedy


def test_an_index_under_another_name_is_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": "b"}}))
    with pytest.raises(UnsupportedFormatError, match="a text file"):
        attncli.inspect(tmp_path / "index.json")
