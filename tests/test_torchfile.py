"""Headers of torch.save and TorchScript files agree with torch, down to the bytes at each offset."""

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attncli.checkpoint.contents import Contents
from attncli.checkpoint.torchfile import read_legacy, read_zip
from attncli.errors import CheckpointError, UnsupportedFormatError
from attncli.records import Array

DTYPES = [
    torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
]  # fmt: skip
READERS = {"zip": read_zip, "legacy": read_legacy}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 6)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 2)])
        self.register_buffer("positions", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.q_proj(x)
        for layer in self.layers:
            x = layer(x)
        return x + self.positions.sum()


def save(
    tmp_path: Path, saved: object, container: str = "zip", name: str = "w.pt", **options: object
) -> Path:
    path = tmp_path / name
    torch.save(saved, path, _use_new_zipfile_serialization=container == "zip", **options)
    return path


def values(root: Path, array: Array) -> torch.Tensor:
    """What torch sees in the bytes at the array's offset."""
    assert array.offset is not None
    dtype = getattr(torch, array.dtype)
    with (root / array.file).open("rb") as file:
        file.seek(array.offset)
        data = bytearray(file.read(array.size_bytes))
    assert len(data) == array.size_bytes
    flat = torch.frombuffer(data, dtype=dtype)
    if array.strides is None:
        return flat.reshape(array.shape)
    return torch.as_strided(flat, array.shape, array.strides)


def by_name(contents: Contents) -> dict[str, Array]:
    assert len({array.name for array in contents.arrays}) == len(contents.arrays)
    return {array.name: array for array in contents.arrays}


def agrees(contents: Contents, state: dict[str, torch.Tensor]) -> None:
    found = by_name(contents)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape)
        assert f"torch.{found[name].dtype}" == str(tensor.dtype)
        if tensor.numel():
            assert torch.equal(values(Path(contents.root), found[name]), tensor.detach())


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict_reads_as_torch_wrote_it(tmp_path, container, protocol):
    state = Block().state_dict()
    path = save(tmp_path, state, container, pickle_protocol=protocol)
    contents = READERS[container](path)
    agrees(contents, state)
    assert contents.format == {"zip": "torch", "legacy": "torch-legacy"}[container]
    assert contents.root == str(tmp_path)
    assert contents.files == ("w.pt",)
    assert contents.anomalies == ()
    assert contents.excluded == {}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_reads_as_torch_wrote_it(tmp_path, container, dtype):
    tensor = torch.arange(1, 8).to(dtype) if dtype != torch.float8_e8m0fnu else torch.ones(7).to(dtype)
    contents = READERS[container](save(tmp_path, {"w": tensor}, container))
    (array,) = contents.arrays
    assert f"torch.{array.dtype}" == str(dtype)
    assert torch.equal(values(tmp_path, array).view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_views_share_a_storage_and_keep_their_strides(tmp_path, container):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "base": base,
        "turned": base.t(),
        "rows": base[1:3],
        "column": base[:, 2],
        "every_other": base[::2, 1::2],
        "spread": torch.ones(1).expand(3, 4),
        "one": base[2:3, 3:4],
        "tied": base,
    }
    contents = READERS[container](save(tmp_path, state, container))
    agrees(contents, state)
    found = by_name(contents)
    assert found["turned"].strides == (1, 6)
    assert found["rows"].strides is None
    assert found["rows"].offset == found["base"].offset + 6 * 4
    assert found["column"].size_bytes == (1 + 3 * 6) * 4
    assert found["spread"].strides == (0, 0)
    assert found["spread"].size_bytes == 4
    assert found["tied"].offset == found["base"].offset


@pytest.mark.filterwarnings("ignore")
def test_unusual_tensors_are_survived(tmp_path):
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.note = "x"
    state = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "meta": torch.empty(7, 2, device="meta"),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "attributed": attributed,
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(4, 3).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "conjugate": torch.zeros(2, dtype=torch.complex64).conj(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 2, torch.qint8),
        "per_channel": torch.quantize_per_channel(
            torch.ones(3, 2), torch.ones(3), torch.zeros(3).long(), 0, torch.qint8
        ),
    }
    found = by_name(read_zip(save(tmp_path, state)))
    assert list(found) == list(state)
    assert found["scalar"].shape == ()
    assert values(tmp_path, found["scalar"]).item() == 3.0
    assert (found["empty"].shape, found["empty"].offset, found["empty"].size_bytes) == ((0, 5), None, 0)
    assert (found["meta"].shape, found["meta"].offset, found["meta"].size_bytes) == ((7, 2), None, 56)
    assert (found["sparse"].shape, found["sparse"].offset) == ((3, 3), None)
    assert (found["csr"].shape, found["csr"].dtype) == ((4, 3), "float32")
    assert found["quantised"].dtype == "qint8"
    assert found["quantised"].size_bytes == 3
    assert found["per_channel"].shape == (3, 2)


@pytest.mark.parametrize("compile_module", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 4))])
@pytest.mark.filterwarnings("ignore")
def test_torchscript_names_come_from_the_module_tree(tmp_path, compile_module):
    model = Block()
    compile_module(model).save(tmp_path / "s.pt")
    contents = read_zip(tmp_path / "s.pt")
    assert contents.format == "torchscript"
    assert contents.anomalies == ()
    found, state = by_name(contents), model.state_dict()
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert torch.equal(values(tmp_path, found[name]), tensor)


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_a_pickled_module_is_refused_by_the_name_of_its_class(tmp_path, container):
    path = save(tmp_path, Block(), container)
    with pytest.raises(UnsupportedFormatError) as caught:
        READERS[container](path)
    assert caught.value.subject == str(path)
    assert caught.value.problem == (
        f"this is a whole pickled module of class {Block.__module__}.Block, which needs its own code."
    )
    assert "torch.save(model.state_dict(), path)" in caught.value.remedy


@pytest.mark.filterwarnings("ignore")
def test_a_pickled_module_inside_a_checkpoint_gives_its_state_dict(tmp_path):
    model = Block()
    model.register_buffer("cache", torch.ones(9), persistent=False)
    contents = read_zip(save(tmp_path, {"epoch": 3, "model": model}))
    agrees(contents, model.state_dict())
    assert f"{Block.__module__}.Block" in [anomaly.subject for anomaly in contents.anomalies]


def test_a_checkpoint_gives_weights_settings_and_counts(tmp_path):
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_head": 2},
        "iter_num": 1,
    }
    contents = read_zip(save(tmp_path, saved))
    agrees(contents, model.state_dict())
    assert contents.excluded == {"optimizer": 5 * 3}
    (config,) = contents.configs
    assert (config.source, dict(config.values)) == ("model_args in the checkpoint", {"n_head": 2})


class _Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_code_in_a_checkpoint_never_runs_and_is_reported(tmp_path, container):
    trace = tmp_path / "ran"
    path = save(tmp_path, {"w": torch.ones(2), "x": _Evil(f"touch {trace}")}, container)
    contents = READERS[container](path)
    assert not trace.exists()
    assert [array.name for array in contents.arrays] == ["w"]
    (anomaly,) = contents.anomalies
    assert (anomaly.kind, anomaly.subject) == ("pickle-global", f"{os.system.__module__}.system")
    assert anomaly.evidence == {"file": "w.pt", "count": 1, "dangerous": True}


def test_reading_imports_neither_torch_nor_numpy(tmp_path):
    path = save(tmp_path, Block().state_dict())
    code = (
        "import sys; from pathlib import Path; from attncli.checkpoint.torchfile import read_zip; "
        f"assert len(read_zip(Path({str(path)!r})).arrays) == 6; "
        "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- hostile and damaged files --------------------------------------------------------------------------


def rewritten(
    path: Path, change: dict[str, bytes | None], *, prefix: str = "w/", compress: bool = False
) -> Path:
    """The archive with some entries replaced, removed (None) or added, under another folder name."""
    target = path.with_name("changed.pt")
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", method) as new:
        entries: dict[str, bytes | None] = {n.partition("/")[2]: old.read(n) for n in old.namelist()}
        for name, data in {**entries, **change}.items():
            if data is not None:
                new.writestr(prefix + name, data)
    return target


def refused(reader, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        reader(path)
    assert caught.value.subject == str(path)
    assert caught.value.problem.endswith(".")
    assert caught.value.remedy.endswith(".")
    return caught.value.problem


@pytest.mark.parametrize("prefix", ["archive/", "mymodel/", "a/b/", ""])
def test_any_folder_in_the_archive_will_do(tmp_path, prefix):
    state = Block().state_dict()
    agrees(read_zip(rewritten(save(tmp_path, state), {}, prefix=prefix)), state)


def test_a_compressed_archive_gives_shapes_without_offsets(tmp_path):
    contents = read_zip(rewritten(save(tmp_path, {"w": torch.ones(300)}), {}, compress=True))
    assert [(a.shape, a.offset) for a in contents.arrays] == [((300,), None)]


def test_big_endian_files_are_refused_with_a_remedy(tmp_path):
    path = save(tmp_path, {"w": torch.ones(2)})
    assert "big-endian" in refused(read_zip, rewritten(path, {"byteorder": b"big"}))
    old = save(tmp_path, {"w": torch.ones(2)}, "legacy", "old.pt")
    data = old.read_bytes()
    flag = data.index(b"little_endian") + len(b"little_endianq\x02") - 0
    at = data.index(b"\x88", flag - 2)
    old.write_bytes(data[:at] + b"\x89" + data[at + 1 :])
    assert "big-endian" in refused(read_legacy, old)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    path = save(tmp_path, {"w": torch.ones(10)})
    assert "tensor w [10] needs bytes 0 to 40 of its storage, which has 36." in refused(
        read_zip, rewritten(path, {"data/0": bytes(36)})
    )
    assert "no entry data/0" in refused(read_zip, rewritten(path, {"data/0": None}))


def test_files_cut_short_are_refused(tmp_path):
    path = save(tmp_path, Block().state_dict())
    whole = path.read_bytes()
    for end in (1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "zip archive" in refused(read_zip, path)
    old = save(tmp_path, {"w": torch.ones(100)}, "legacy", "old.pt")
    whole = old.read_bytes()
    old.write_bytes(whole[:-1])
    assert "the file is cut short: storage" in refused(read_legacy, old)
    for end in range(0, len(whole) - 400, 7):
        old.write_bytes(whole[:end])
        refused(read_legacy, old)


def test_other_archives_and_pickles_are_named(tmp_path):
    path = save(tmp_path, {"w": torch.ones(2)})
    assert "torch.package" in refused(read_zip, rewritten(path, {".data/extern_modules": b""}))
    assert "no data.pkl" in refused(read_zip, rewritten(path, {"data.pkl": None}))
    assert "torch.export" in refused(read_zip, rewritten(path, {"data.pkl": None, "archive_format": b"pt2"}))
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps({"w": 1}))
    assert "not one of torch.save" in refused(read_legacy, plain)
    plain.write_bytes(b"hello")
    assert "should begin with a pickle" in refused(read_legacy, plain)
    plain.write_bytes(b"")
    assert "the file is empty." in refused(read_legacy, plain)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = save(tmp_path, {"w": torch.ones(2)})
    bomb = rewritten(path, {"data.pkl": bytes(8 << 20)}, compress=True)
    assert "a zip bomb." in refused(read_zip, bomb)
    monkeypatch.setattr("attncli.checkpoint.torchfile.MAX_PICKLE_BYTES", 8 << 10)
    assert "at most 8192 are expected." in refused(read_zip, bomb)


def test_an_encrypted_or_lying_directory_is_refused(tmp_path):
    path = rewritten(save(tmp_path, {"w": torch.ones(2)}), {})
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")
    lying = bytearray(whole)
    struct.pack_into("<I", lying, entry + 42, len(whole) * 2)  # where the entry begins
    path.write_bytes(lying)
    assert "the entry data.pkl of the zip archive is damaged" in refused(read_zip, path)
    before = bytearray(whole)
    end = whole.rindex(b"PK\x05\x06") + 16  # where the directory begins: entries move before the file
    struct.pack_into("<I", before, end, struct.unpack_from("<I", before, end)[0] + 5000)
    path.write_bytes(before)
    refused(read_zip, path)
    longer = bytearray(whole)
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))
    struct.pack_into("<II", longer, entry + 20, 1 << 20, 1 << 20)
    path.write_bytes(longer)
    assert "the entry data/0 ends beyond the end of the file" in refused(read_zip, path)
    locked = bytearray(whole)
    for at in range(len(locked) - 4):
        if locked[at : at + 4] == b"PK\x01\x02":
            locked[at + 8] |= 1
    path.write_bytes(locked)
    assert "encrypted" in refused(read_zip, path)


class _Reference:
    """Something that the pickler writes as a persistent id."""

    def __init__(self, *pid: object) -> None:
        self.pid = pid


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.pid if isinstance(value, _Reference) else None


class _Rebuild:
    def __init__(self, *args: object) -> None:
        self.args = args

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor_v2, self.args


def hand_made(path: Path, tree: object, keys: list[str], storages: bytes) -> Path:
    stream = io.BytesIO()
    for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(head, stream, protocol=2)
    _Pickler(stream, protocol=2).dump(tree)
    pickle.dump(keys, stream, protocol=2)
    path.write_bytes(stream.getvalue() + storages)
    return path


def test_views_of_storages_in_old_files_count_from_their_root(tmp_path):
    numbers = torch.arange(10.0)
    data = struct.pack("<Q", 10) + numbers.numpy().tobytes()
    view = _Reference("storage", torch.FloatStorage, "7", "cpu", 10, ("8", 4, 6))
    tree = {"w": _Rebuild(view, 1, (2, 2), (2, 1), False, {})}
    path = hand_made(tmp_path / "old.pt", tree, ["7"], data)
    (array,) = read_legacy(path).arrays
    assert torch.equal(values(tmp_path, array), numbers[5:9].reshape(2, 2))
    assert torch.equal(torch.load(path, weights_only=False)["w"], numbers[5:9].reshape(2, 2))


@pytest.mark.parametrize(
    ("keys", "storages", "problem"),
    [
        (["7"], struct.pack("<Q", 1 << 62), "the file is cut short: storage 7"),
        (["8"], b"", "names one that no tensor uses"),
        ([], b"", "storage 7 is used by a tensor, but not in the file"),
        ({}, b"", "the list of storages is missing"),
    ],
)
def test_old_files_whose_storages_do_not_fit_are_refused(tmp_path, keys, storages, problem):
    storage = _Reference("storage", torch.FloatStorage, "7", "cpu", 4, None)
    path = hand_made(tmp_path / "old.pt", {"w": _Rebuild(storage, 0, (4,), (1,), False, {})}, keys, storages)
    assert problem in refused(read_legacy, path)


def test_persistent_ids_that_torch_never_writes_are_refused(tmp_path):
    for pid in (
        ("storage",),
        ("storage", 1, "0", "cpu", 4, None),
        ("else", 2),
        ("storage", torch.FloatStorage, "0", "cpu", -1),
    ):
        path = hand_made(tmp_path / "old.pt", {"w": _Reference(*pid)}, [], b"")
        assert "torch" in refused(read_legacy, path)


def _saved(container: str) -> bytes:
    buffer = io.BytesIO()
    state = {"model": {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3)}, "args": {"n": 1}}
    torch.save(state, buffer, _use_new_zipfile_serialization=container == "zip")
    return buffer.getvalue()


SEEDS = {container: _saved(container) for container in READERS}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["zip", "legacy"]),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_changed_bytes_read_or_are_refused_and_nothing_else(tmp_path, container, changes):
    data = bytearray(SEEDS[container])
    for at, byte in changes:
        data[at % len(data)] = byte
    path = tmp_path / "fuzz.pt"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        for array in READERS[container](path).arrays:
            assert array.offset is None or array.offset + array.size_bytes <= len(data)
