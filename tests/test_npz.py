"""Headers of .npz files agree with numpy, down to the bytes at each offset."""

import contextlib
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attncli.checkpoint.npz import MAX_HEADER_BYTES, read
from attncli.errors import CheckpointError
from attncli.records import Array


def values(root: Path, array: Array, dtype: str) -> np.ndarray:
    assert array.offset is not None
    flat = np.fromfile(root / array.file, dtype=dtype, count=array.numel, offset=array.offset)
    if array.strides is None:
        return flat.reshape(array.shape)
    return np.lib.stride_tricks.as_strided(flat, array.shape, [s * flat.itemsize for s in array.strides])


def test_arrays_read_as_numpy_wrote_them(tmp_path):
    state = {
        "h.0/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
        "turned": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        "half": np.ones(5, np.float16),
        "counts": np.arange(3),
        "flag": np.array(True),
        "wave": np.ones(2, np.complex64),
        "bytes": np.arange(4, dtype=np.uint8),
    }
    np.savez(tmp_path / "w.npz", **state)
    contents = read(tmp_path / "w.npz")
    assert (contents.format, contents.files) == ("npz", ("w.npz",))
    found = {array.name: array for array in contents.arrays}
    assert list(found) == list(state)
    for name, array in state.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype.name
        assert found[name].size_bytes == array.nbytes
        assert np.array_equal(values(tmp_path, found[name], array.dtype.str), array)
    assert found["turned"].strides == (1, 3)
    assert found["h.0/kernel"].strides is None


def test_a_compressed_file_gives_shapes_without_offsets(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", w=np.zeros((100, 3)), empty=np.zeros((0, 2)))
    assert [(a.name, a.shape, a.offset, a.size_bytes) for a in read(tmp_path / "w.npz").arrays] == [
        ("w", (100, 3), None, 2400),
        ("empty", (0, 2), None, 0),
    ]


def test_object_arrays_are_left_out_and_told(tmp_path):
    np.savez(
        tmp_path / "w.npz",
        w=np.ones(2),
        o=np.array([{}, 1], object),
        t=np.array(["a"]),
        r=np.zeros(2, "i4,f4"),
    )
    contents = read(tmp_path / "w.npz")
    assert [array.name for array in contents.arrays] == ["w"]
    assert contents.excluded == {"object array": 1, "text array": 1, "structured array": 1}
    (anomaly,) = contents.anomalies
    assert (anomaly.kind, anomaly.subject, anomaly.evidence) == ("pickle-object", "o", {"file": "w.npz"})


def test_two_byte_voids_are_bfloat16(tmp_path):
    np.savez(tmp_path / "w.npz", w=np.zeros((2, 3), "V2"))
    (array,) = read(tmp_path / "w.npz").arrays
    assert (array.dtype, array.size_bytes) == ("bfloat16", 12)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert caught.value.subject == str(path)
    assert re.search(r"\.$", caught.value.remedy)
    return caught.value.problem


def test_big_endian_arrays_are_refused_with_a_remedy(tmp_path):
    np.savez(tmp_path / "w.npz", w=np.ones(2, ">f4"))
    assert "big-endian" in refused(tmp_path / "w.npz")


def entry(header: bytes, data: bytes = b"", version: int = 1) -> bytes:
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(width, "little") + header + data


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "does not begin like a .npy file"),
        (b"PK\x03\x04 and so on", "does not begin like a .npy file"),
        (entry(b"x", version=9), "does not begin like a .npy file"),
        (entry(b"__import__('os')"), "no Python literal"),
        (entry(b"(" * 3000), "no Python literal"),
        (entry(b"-" * 9000 + b"1"), "no Python literal"),
        (entry(b" " * (MAX_HEADER_BYTES + 1)), f"at most {MAX_HEADER_BYTES} are expected"),
        (entry(b"[1]"), "gives no shape and dtype"),
        (entry(b"{'descr': '<f4', 'shape': (-1,)}"), "gives no shape and dtype"),
        (entry(b"{'descr': '<f4', 'shape': (True,)}"), "gives no shape and dtype"),
        (entry(b"{'descr': '<f4', 'shape': (10,)}", bytes(39)), "w [10] needs 40 bytes; its entry has 39."),
        (entry(b"{'descr': '<f4', 'shape': (10,)}", bytes(36), 2), "needs 40 bytes"),
    ],
)
def test_damaged_headers_are_refused_with_their_reason(tmp_path, content, problem):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", content)
    assert problem in refused(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, w=np.ones(100))
    path.write_bytes(path.read_bytes()[:-30])
    assert "no readable zip archive" in refused(path)


def _seed() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones((2, 3), np.float32), o=np.asfortranarray(np.ones((3, 4))))
    return buffer.getvalue()


SEED = _seed()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_changed_bytes_read_or_are_refused_and_nothing_else(tmp_path, changes):
    data = bytearray(SEED)
    for at, byte in changes:
        data[at] = byte
    path = tmp_path / "fuzz.npz"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        for array in read(path).arrays:
            assert array.offset is None or array.offset + array.size_bytes <= len(data)
