"""Distributed checkpoints read as torch wrote them, in one chunk or many, and with a file lost."""

import contextlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from attncli.checkpoint.distributed import read
from attncli.errors import CheckpointError
from attncli.records import Array

pytestmark = pytest.mark.filterwarnings("ignore")
STATE = {
    "h.0.q_proj.weight": torch.arange(12.0).reshape(4, 3),
    "h.0.q_proj.bias": torch.arange(4).to(torch.bfloat16),
    "positions": torch.arange(7),
}


def save(folder: Path, saved: dict) -> Path:
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    return folder


def values(root: Path, array: Array) -> torch.Tensor:
    assert array.offset is not None
    with (root / array.file).open("rb") as file:
        file.seek(array.offset)
        data = bytearray(file.read(array.size_bytes))
    return torch.frombuffer(data, dtype=getattr(torch, array.dtype)).reshape(array.shape)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda state: state, ""),
        (lambda state: {"model": state}, ""),
        (lambda state: {"app": {"model": state}}, ""),
        (lambda state: {"encoder": state}, "encoder."),
        (lambda state: {f"model.{name}": tensor for name, tensor in state.items()}, "model."),
    ],
)
def test_tensors_read_as_torch_wrote_them(tmp_path, wrap, prefix):
    contents = read(save(tmp_path / "c", wrap(STATE)))
    assert contents.format == "torch-distributed"
    assert contents.root == str(tmp_path / "c")
    assert contents.files == (".metadata", "__0_0.distcp")
    assert contents.anomalies == ()
    found = {array.name: array for array in contents.arrays}
    assert set(found) == {prefix + name for name in STATE}
    for name, tensor in STATE.items():
        array = found[prefix + name]
        assert (array.shape, f"torch.{array.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert torch.equal(values(tmp_path / "c", array), tensor)


def test_the_optimizer_is_counted_and_left_out(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    contents = read(save(tmp_path / "c", saved))
    assert {array.name for array in contents.arrays} == {"weight", "bias"}
    assert contents.excluded == {"optimizer": 6}


def write(folder: Path, metadata: Metadata) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def storage_info(file: str, offset: int, length: int) -> object:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(file, offset, length)


def sharded(file_1: str = "__1_0.distcp") -> Metadata:
    """One (4, 3) tensor in two chunks of rows, as two ranks write it, with Megatron's kind of keys."""
    size = torch.Size([4, 3])
    halves = [ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([2, 3])) for start in (0, 2)]
    name = "decoder.layers.self_attention.linear_qkv.weight"
    properties = TensorProperties(dtype=torch.bfloat16)
    return Metadata(
        state_dict_metadata={
            name: TensorStorageMetadata(properties, size, halves),
            f"optimizer.state.exp_avg.{name}": TensorStorageMetadata(properties, size, halves),
            "decoder.layers._extra_state": BytesStorageMetadata(),
        },
        storage_data={
            MetadataIndex(name, torch.Size([0, 0]), 0): storage_info("__0_0.distcp", 0, 10),
            MetadataIndex(name, torch.Size([2, 0]), 1): storage_info(file_1, 0, 10),
        },
    )


def test_a_sharded_tensor_has_its_global_shape_and_no_offset(tmp_path):
    folder = write(tmp_path / "c", sharded())
    for rank in (0, 1):
        (folder / f"__{rank}_0.distcp").write_bytes(bytes(10))
    contents = read(folder)
    (array,) = contents.arrays
    assert array.name == "decoder.layers.self_attention.linear_qkv.weight"
    assert (array.shape, array.dtype, array.offset, array.size_bytes) == ((4, 3), "bfloat16", None, 24)
    assert contents.excluded == {"optimizer": 1}
    assert contents.files == (".metadata", "__0_0.distcp", "__1_0.distcp")
    assert contents.anomalies == ()


def test_a_lost_file_is_told_by_name(tmp_path):
    folder = write(tmp_path / "c", sharded())
    (folder / "__0_0.distcp").write_bytes(bytes(10))
    contents = read(folder)
    assert [array.shape for array in contents.arrays] == [(4, 3)]
    (anomaly,) = contents.anomalies
    assert (anomaly.kind, anomaly.subject) == ("missing-shard", "__1_0.distcp")
    assert anomaly.evidence == {"file": ".metadata", "chunks": 1}
    assert contents.files == (".metadata", "__0_0.distcp")


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("exit 1",)


def test_code_inside_a_chunk_is_reported(tmp_path):
    folder = save(tmp_path / "c", {"w": torch.ones(2)})
    buffer = io.BytesIO()
    torch.save(_Evil(), buffer)
    name = MetadataIndex("w", torch.Size([0]), 0)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.storage_data = {name: storage_info("__0_0.distcp", 0, len(buffer.getvalue()))}
    (folder / "__0_0.distcp").write_bytes(buffer.getvalue())
    contents = read(write(folder, metadata))
    assert [(a.name, a.shape, a.offset) for a in contents.arrays] == [("w", (2,), None)]
    (anomaly,) = contents.anomalies
    assert anomaly.evidence == {"file": "__0_0.distcp", "count": 1, "dangerous": True}


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert caught.value.problem.endswith(".")
    assert caught.value.remedy.endswith(".")
    return caught.value


def test_a_file_cut_short_is_refused(tmp_path):
    folder = save(tmp_path / "c", STATE)
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-10])
    error = refused(folder)
    assert error.subject == str(shard)
    assert "the file is cut short" in error.problem


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a/../../b", "\\x", "a\0b"])
def test_paths_out_of_the_folder_are_refused(tmp_path, file):
    assert "outside the checkpoint" in refused(write(tmp_path / "c", sharded(file))).problem


def test_metadata_that_is_none_is_refused(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    assert "cannot be read" in refused(folder).problem
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    assert "not the Metadata" in refused(folder).problem
    (folder / ".metadata").write_bytes(b"")
    assert "cut short" in refused(folder).problem
    broken = sharded()
    next(iter(broken.state_dict_metadata.values())).size = "ten"
    write(folder, broken)
    assert "has no shape and dtype" in refused(folder).problem


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Path, bytes]:
    made = save(tmp_path_factory.mktemp("dcp") / "c", STATE)
    return made, (made / ".metadata").read_bytes()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=5))
def test_changed_bytes_read_or_are_refused_and_nothing_else(folder, changes):
    path, whole = folder
    data = bytearray(whole)
    for at, byte in changes:
        data[at % len(data)] = byte
    (path / ".metadata").write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read(path)
