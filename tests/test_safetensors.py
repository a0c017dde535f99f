"""safetensors headers: what the library writes is read as it lies; what it refuses is refused, and why."""

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import attncli
from attncli.checkpoint import open_checkpoint
from attncli.checkpoint.safetensors import read
from attncli.checkpoint.values import Values
from attncli.errors import AttncliError, CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]  # fmt: skip


def write(
    path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> Path:
    """A file with this header and data; `length` replaces the true length of the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def problem(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert caught.value.subject == str(path)
    assert caught.value.problem.endswith(".")
    assert caught.value.remedy.endswith(".")
    assert len(str(caught.value)) < 2000
    return caught.value.problem


def library_reads(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            list(file.keys())
    except SafetensorError:
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_shapes_and_bytes_of_every_dtype_are_where_the_header_says(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    numbers = torch.arange(24).remainder(2) if dtype is torch.bool else torch.arange(24) % 7
    tensors = {"a.weight": numbers.to(dtype).reshape(2, 3, 4), "b": numbers[:5].to(dtype)}
    tensors |= {"scalar": numbers[3].to(dtype), "empty": numbers[:0].to(dtype).reshape(0, 4)}
    # A dtype that stays the same shares its memory, which the library refuses.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "w.safetensors")
    contents = read(tmp_path / "w.safetensors")
    assert (contents.format, contents.files) == ("safetensors", ("w.safetensors",))
    assert {array.name for array in contents.arrays} == tensors.keys()
    raw = (tmp_path / "w.safetensors").read_bytes()
    for array in contents.arrays:
        tensor = tensors[array.name]
        assert array.shape == tuple(tensor.shape)
        assert getattr(torch, array.dtype) is dtype
        assert array.size_bytes == tensor.numel() * tensor.element_size()
        assert array.offset is not None
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert raw[array.offset : array.offset + array.size_bytes] == expected


@pytest.mark.parametrize(
    ("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F8_E4M3", 8), ("F64", 64)]
)
def test_sizes_of_every_width_are_checked(tmp_path: Path, dtype: str, bits: int) -> None:
    path = write(tmp_path / "w", {"a": entry(0, bits, [8], dtype)}, bytes(bits))
    assert read(path).arrays[0].size_bytes == bits
    path = write(tmp_path / "w", {"a": entry(0, bits, [9], dtype)}, bytes(bits))
    assert f"needs {9 * bits // 8} bytes, but its offsets span {bits}" in problem(path)


def test_a_tensor_of_more_dimensions_than_torch_handles_is_refused(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "w", {"a": entry(0, 4, [1] * 64)}, bytes(4))).arrays[0].shape) == 64
    assert "no counts" in problem(write(tmp_path / "w", {"a": entry(0, 4, [1] * 65)}, bytes(4)))


def test_a_dtype_of_the_future_keeps_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "w", {"a": entry(0, 3, [4], "F5_E9M9")}, bytes(3))
    assert read(path).arrays[0].dtype == "f5_e9m9"


def test_the_padding_behind_the_header_is_no_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "w", json.dumps({"a": entry(0, 4)}).encode() + b"   ", bytes(4))
    (array,) = read(path).arrays
    assert array.offset == path.stat().st_size - 4


def test_a_config_among_the_metadata_is_read(tmp_path: Path) -> None:
    metadata = {"format": "pt", "config": '{"num_attention_heads": 4}', "n_heads": "8", "broken": "{"}
    path = write(tmp_path / "w", {"__metadata__": metadata, "a": entry(0, 4)}, bytes(4))
    configs = {config.source: dict(config.values) for config in read(path).configs}
    assert configs == {
        "config in the safetensors metadata": {"num_attention_heads": 4},
        "safetensors metadata": {"format": "pt", "n_heads": 8},
    }


@pytest.mark.parametrize("metadata", [None, 3, [], "x", {"a": 3}, {"a": None}, {"a": "[" * 10**5}])
def test_metadata_of_another_kind_is_passed_over(tmp_path: Path, metadata: object) -> None:
    path = write(tmp_path / "w", {"__metadata__": metadata, "a": entry(0, 4)}, bytes(4))
    assert read(path).configs == ()


# --- damaged and hostile ------------------------------------------------------------------------------


def test_a_file_cut_inside_its_data_says_how_far_it_should_reach(tmp_path: Path) -> None:
    path = write(tmp_path / "w", {"a": entry(0, 4), "b": entry(4, 12)}, bytes(9))
    assert problem(path) == "tensor 'b' lies at bytes 4 to 12, but the file holds 9 bytes of data."


@pytest.mark.parametrize("size", range(8))
def test_a_file_cut_inside_its_length_says_so(tmp_path: Path, size: int) -> None:
    (tmp_path / "w").write_bytes(bytes(size))
    assert problem(tmp_path / "w").startswith(f"the file ends after {size} bytes;")


@pytest.mark.parametrize(
    ("length", "limit"),
    [
        (1 << 63, "the 20 bytes that follow"),
        ((1 << 64) - 1, "20 bytes"),
        (100_000_000, "20 bytes"),
        (21, "20 bytes"),
    ],
)
def test_a_header_cannot_be_longer_than_its_file(tmp_path: Path, length: int, limit: str) -> None:
    path = write(tmp_path / "w", b"{" + b" " * 19, length=length)
    assert problem(path).startswith(f"the header claims {length} bytes, more than ")
    assert limit in problem(path)


def test_a_header_above_the_limit_of_the_format_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "w", b"{", length=100_000_001)
    with path.open("r+b") as file:
        file.truncate(200_000_000)  # sparse: takes no space
    assert problem(path) == ("the header claims 100000001 bytes, more than 100 MB, the format's own limit.")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "tensors 'a' and 'b' overlap"),
        ({"a": entry(0, 12), "b": entry(4, 8)}, "tensors 'a' and 'b' overlap"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, "belong to no tensor"),
        ({"a": entry(4, 12)}, "belong to no tensor"),
        ({"a": entry(0, 8)}, "belong to no tensor"),
        ({"a": entry(0, 12, [4])}, "needs 16 bytes, but its offsets span 12"),
        ({"a": entry(0, 12, [-3])}, "no counts"),
        ({"a": entry(-4, 8)}, "no counts"),
        ({"a": entry(8, 4, [0])}, "lies at bytes 8 to 4"),
        ({"a": entry(0, 12, 3)}, "no counts"),
        ({"a": entry(0, 12, None) | {"shape": None}}, "no counts"),
        ({"a": entry(0, 12, [True])}, "no counts"),
        ({"a": entry(0, 12, [3.0])}, "no counts"),
        ({"a": entry(0, 12, [float("nan")])}, "no counts"),
        ({"a": entry(0, 12, ["3"])}, "no counts"),
        ({"a": entry(0, 12, [1 << 63])}, "no counts"),
        ({"a": entry(0, 12, [10**4000, 10**4000])}, "no counts"),
        ({"a": entry(0, 12, [1] * 1000)}, "no counts"),
        ({"a": entry(0, 12, [1 << 63], "F5_E9M9")}, "no counts"),
        ({"a": entry(0, 12, dtype=3)}, "no counts"),
        ({"a": entry(0, 12) | {"data_offsets": [0]}}, "lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "F32"}}, "lacks dtype, shape or data_offsets"),
        ({"a": None}, "lacks dtype, shape or data_offsets"),
        ({"a": [1, 2]}, "lacks dtype, shape or data_offsets"),
        ({"x" * 100_000: None}, "lacks dtype, shape or data_offsets"),
        (b"[]", "begins with b'[]'"),
        (b"null", "begins with b'null'"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} trailing', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"{" + b"[" * 100_000, "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
    ],
)  # fmt: skip
def test_every_promise_of_the_header_is_checked(
    tmp_path: Path, header: Mapping[str, Any] | bytes, expected: str
) -> None:
    path = write(tmp_path / "w", header, bytes(12))
    assert expected in problem(path)
    assert not library_reads(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": %s, "a": %s}',
        '{"__metadata__": {"k": "1", "k": "2"}, "a": %s, "b": %s}',
        '{"a": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}, "b": %s}',
    ],
)
def test_a_name_that_occurs_twice_is_refused(tmp_path: Path, text: str) -> None:
    rows = [json.dumps(entry(0, 4)), json.dumps(entry(4, 8))]
    path = write(tmp_path / "w", (text % tuple(rows[-text.count("%s") :])).encode(), bytes(8))
    assert "twice; every name must be unique" in problem(path)


def test_empty_tensors_may_lie_anywhere_between_others(tmp_path: Path) -> None:
    header = {"z": entry(0, 0, [0]), "a": entry(0, 4), "y": entry(4, 4, [3, 0]), "b": entry(4, 8)}
    path = write(tmp_path / "w", header, bytes(8))
    assert len(read(path).arrays) == 4
    assert library_reads(path)


def test_values_that_vanish_after_the_header_was_read_are_our_own_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layers.0.attn.q_proj.weight": torch.ones(64, 64)}, path)
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(5000)
    with Values(checkpoint) as values, pytest.raises(CheckpointError, match="needs bytes up to"):
        values.load(checkpoint.tensors[0])


_NAMES = st.sampled_from(
    ["__metadata__", "a", "q_proj.weight", "layers.0.attn.k_proj.weight", "x.lora_A.weight"]
)
_NUMBERS = st.integers(-2, 40) | st.integers() | st.floats() | st.none() | st.text(max_size=3)
_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F4", "BOOL", "Q9", ""]) | _NUMBERS,
        "shape": st.lists(st.integers(0, 5) | _NUMBERS, max_size=4) | _NUMBERS,
        "data_offsets": st.lists(st.integers(0, 64) | _NUMBERS, max_size=3) | _NUMBERS,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(_NAMES | st.text(max_size=6), _ENTRIES | _NUMBERS, max_size=4).map(
        lambda header: json.dumps(header).encode()
    )
    | st.binary(max_size=40),
    data=st.binary(max_size=64),
    length=st.none() | st.integers(0, (1 << 64) - 1) | st.integers(0, 80),
)
def test_whatever_a_header_holds_only_our_own_error_comes_out(
    tmp_path: Path, header: bytes, data: bytes, length: int | None
) -> None:
    path = write(tmp_path / "w.safetensors", header, data, length)
    with suppress(AttncliError):
        attncli.inspect(path, values=True).to_json()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_byte_in_the_header_is_read_as_the_library_reads_it_or_refused(
    tmp_path: Path, change: int, byte: int
) -> None:
    path = tmp_path / "w.safetensors"
    tensors = {f"layers.{n}.attn.q_proj.weight": np.zeros((n + 1, 4), np.float32) for n in range(4)}
    save_file({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    raw = bytearray(path.read_bytes())
    raw[change % (8 + int.from_bytes(raw[:8], "little"))] = byte
    path.write_bytes(raw)
    try:
        shapes = {array.name: array.shape for array in read(path).arrays}
    except CheckpointError:
        return
    if library_reads(path):  # stricter in one thing: it knows no dtypes beyond its own
        with safe_open(path, "pt") as file:
            assert shapes == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
