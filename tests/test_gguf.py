"""GGUF headers: what a real writer writes is read back, and what a hostile one writes is refused quickly."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncli.checkpoint import gguf
from attncli.checkpoint.contents import Contents
from attncli.checkpoint.ggml import GGML_TYPES, BlockType
from attncli.errors import CheckpointError, UnsupportedFormatError
from attncli.records import Anomaly


def text(value: str | bytes, word: str = "<Q") -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(word, len(raw)) + raw


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def row(name: str, ne: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def header(
    pairs: list[bytes] | None = None,
    rows: list[bytes] | None = None,
    *,
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    data: int = 4096,
) -> bytes:
    pairs, rows = pairs or [], rows or []
    counts = (
        len(rows) if n_tensors is None else n_tensors,
        len(pairs) if n_keys is None else n_keys,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(rows)
    return head + bytes(-len(head) % 32) + bytes(data)


def read(tmp_path: Path, content: bytes) -> Contents:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return gguf.read(path)


def refusal(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, content)
    assert caught.value.subject == str(tmp_path / "model.gguf")
    assert caught.value.problem.endswith(".")
    assert caught.value.remedy.endswith(".")
    return caught.value.problem


def written(path: Path) -> None:
    """A small model by the reference writer, with a value of every type and tensors of many block types."""
    writer = reference.GGUFWriter(path, "llama")
    writer.add_uint8("a.uint8", 200)
    writer.add_int8("a.int8", -100)
    writer.add_uint16("a.uint16", 60_000)
    writer.add_int16("a.int16", -30_000)
    writer.add_uint32("a.uint32", 4_000_000_000)
    writer.add_int32("a.int32", -2_000_000_000)
    writer.add_uint64("a.uint64", 1 << 63)
    writer.add_int64("a.int64", -(1 << 62))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Wärme ‖")
    writer.add_string("tokenizer.chat_template", "x" * 5000)
    writer.add_array("llama.attention.head_count", [8, 8, 4])
    writer.add_token_list(["a", "bc", ""] * 3000)
    writer.add_token_scores([0.0] * 9000)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((8, 512), dtype=np.float32)
    for kind in ("F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0", "MXFP4", "BF16"):
        quantised = reference.quants.quantize(values, reference.GGMLQuantizationType[kind])
        raw_dtype = None if kind in ("F32", "F16") else reference.GGMLQuantizationType[kind]
        writer.add_tensor(f"blk.0.{kind}.weight", quantised, raw_dtype=raw_dtype)
    for kind in ("Q2_K", "Q6_K", "IQ2_XXS", "IQ1_M", "NVFP4", "Q1_0"):
        _, size = reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind]]
        elements, _ = reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind]]
        raw = np.zeros((4, 512 // elements * size), dtype=np.uint8)
        writer.add_tensor(f"blk.1.{kind}.weight", raw, raw_dtype=reference.GGMLQuantizationType[kind])
    writer.add_tensor("experts", np.zeros((2, 3, 64), dtype=np.float32))
    writer.add_tensor("ids", np.zeros(7, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- agreement with the reference reader --------------------------------------------------------------


def test_tensors_agree_with_the_reference_reader(tmp_path: Path) -> None:
    written(tmp_path / "model.gguf")
    contents = gguf.read(tmp_path / "model.gguf")
    oracle = reference.GGUFReader(tmp_path / "model.gguf")
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32"}
    expected = [
        (
            t.name,
            tuple(int(n) for n in reversed(t.shape)),
            names.get(t.tensor_type.name, t.tensor_type.name.lower()),
            int(t.data_offset),
            int(t.n_bytes),
        )
        for t in oracle.tensors
    ]
    assert [(a.name, a.shape, a.dtype, a.offset, a.size_bytes) for a in contents.arrays] == expected
    assert contents.format == "gguf"
    assert contents.files == ("model.gguf",)
    assert contents.root == str(tmp_path)
    assert {a.file for a in contents.arrays} == {"model.gguf"}
    assert contents.anomalies == ()


def test_metadata_agrees_with_the_reference_reader(tmp_path: Path) -> None:
    written(tmp_path / "model.gguf")
    (config,) = gguf.read(tmp_path / "model.gguf").configs
    assert config.source == "GGUF metadata"
    fields = reference.GGUFReader(tmp_path / "model.gguf").fields
    for key, value in config.values.items():
        expected = fields[key].contents()
        assert value == (tuple(expected) if isinstance(expected, list) else expected), key
    left_out = {"tokenizer.chat_template", "tokenizer.ggml.tokens", "tokenizer.ggml.scores"}
    assert set(fields) - set(config.values) - left_out == {
        "GGUF.version",
        "GGUF.tensor_count",
        "GGUF.kv_count",
    }
    assert left_out.isdisjoint(config.values)
    assert config.values["a.string"] == "Wärme ‖"
    assert config.values["llama.attention.head_count"] == (8, 8, 4)


def test_the_type_table_agrees_with_the_reference() -> None:
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    names |= {f"I{n}": f"int{n}" for n in (8, 16, 32, 64)}
    for kind, (elements, size_bytes) in reference.GGML_QUANT_SIZES.items():
        expected = BlockType(names.get(kind.name, kind.name.lower()), elements, size_bytes)
        assert GGML_TYPES[int(kind)] == expected


def test_shapes_are_in_torch_order_and_offsets_count_from_the_file_start(tmp_path: Path) -> None:
    contents = read(tmp_path, header(rows=[row("w", (8, 3), offset=64)]))
    (array,) = contents.arrays
    assert array.shape == (3, 8)
    assert array.offset == 96 + 64  # 24 bytes of counts and 41 of the row, padded to 96
    assert array.size_bytes == 96


def test_a_scalar_tensor_has_one_element(tmp_path: Path) -> None:
    (array,) = read(tmp_path, header(rows=[row("s", ())])).arrays
    assert (array.shape, array.numel, array.size_bytes) == ((), 1, 4)


def test_version_1_has_32_bit_lengths(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<III", 1, 1, 1) + text("general.alignment", "<I")
    head += struct.pack("<II", 4, 64) + text("w", "<I") + struct.pack("<IIIIQ", 2, 4, 5, 1, 0)
    contents = read(tmp_path, head + bytes(-len(head) % 64) + bytes(40))
    (array,) = contents.arrays
    assert (array.shape, array.dtype, array.size_bytes) == ((5, 4), "float16", 40)
    assert array.offset == 128


def test_a_larger_alignment_moves_the_data(tmp_path: Path) -> None:
    pairs = [pair("general.alignment", 4, struct.pack("<I", 1024))]
    (array,) = read(tmp_path, header(pairs, [row("w", (8,))])).arrays
    assert array.offset == 1024


def test_strings_are_walked_across_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf._Header, "WINDOW_BYTES", 64)
    strings = [b"x" * (i * 37 % 211) for i in range(500)]
    array = struct.pack("<IQ", 8, len(strings)) + b"".join(text(s) for s in strings)
    pairs = [pair("tokens", 9, array), pair("after", 8, text("here"))]
    contents = read(tmp_path, header(pairs, [row("w", (8,))]))
    assert contents.configs[0].values == {"after": "here"}
    assert contents.arrays[0].name == "w"


def test_nested_arrays_are_passed(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", 5, 2) + bytes(8)
    strings = struct.pack("<IQ", 8, 1) + text("abc")
    nested = struct.pack("<IQ", 9, 3) + inner + strings + inner
    contents = read(tmp_path, header([pair("nested", 9, nested), pair("after", 7, b"\1")]))
    assert contents.configs[0].values == {"after": True}


def test_an_unknown_type_is_recorded_by_number(tmp_path: Path) -> None:
    contents = read(tmp_path, header(rows=[row("w", (7, 2), kind=99), row("v", (4,))]))
    first, second = contents.arrays
    assert (first.dtype, first.shape, first.offset, first.size_bytes) == ("ggml_type_99", (2, 7), None, 0)
    assert second.dtype == "float32"
    assert contents.anomalies == (Anomaly("unknown-type", "w", {"ggml_type": 99, "file": "model.gguf"}),)


def test_a_tensor_twice_is_an_anomaly_and_kept_once(tmp_path: Path) -> None:
    contents = read(tmp_path, header(rows=[row("w", (4,)), row("w", (8,), offset=32)]))
    assert [array.shape for array in contents.arrays] == [(4,)]
    assert [(a.kind, a.subject) for a in contents.anomalies] == [("duplicate-tensor", "w")]


def test_a_key_twice_is_an_anomaly_and_the_first_counts(tmp_path: Path) -> None:
    contents = read(tmp_path, header([pair("k", 0, b"\1"), pair("k", 0, b"\2")]))
    assert contents.configs[0].values == {"k": 1}
    assert [(a.kind, a.subject) for a in contents.anomalies] == [("duplicate-key", "k")]


def test_tensors_that_share_bytes_are_an_anomaly(tmp_path: Path) -> None:
    contents = read(
        tmp_path, header(rows=[row("a", (16,)), row("b", (8,), offset=32), row("c", (8,), offset=64)])
    )
    assert contents.anomalies == (Anomaly("overlapping-tensors", "b", {"with": "a"}),)


# --- split files --------------------------------------------------------------------------------------


def split(tmp_path: Path, **changes: Any) -> list[Path]:
    """Three files of a split, each with one tensor; `changes` overrides split values of the second."""
    paths = []
    for number in range(3):
        count, no, total = 3, number, 3
        if number == 1:
            count, no = changes.get("count", count), changes.get("no", no)
        total = changes.get("total", total)
        pairs = [
            pair("split.count", 2, struct.pack("<H", count)),
            pair("split.no", 2, struct.pack("<H", no)),
            pair("split.tensors.count", 5, struct.pack("<i", total)),
        ]
        if number == 0:
            pairs.append(pair("general.architecture", 8, text("llama")))
        path = tmp_path / f"big-0000{number + 1}-of-00003.gguf"
        path.write_bytes(header(pairs, [row(f"w{number}", (8,))]))
        paths.append(path)
    return paths


@pytest.mark.parametrize("given_number", [0, 1, 2])
def test_any_file_of_a_split_reads_all_of_it(tmp_path: Path, given_number: int) -> None:
    paths = split(tmp_path)
    contents = gguf.read(paths[given_number])
    assert contents.files == tuple(path.name for path in paths)
    assert [(a.name, a.file) for a in contents.arrays] == [(f"w{i}", paths[i].name) for i in range(3)]
    assert contents.configs[0].values["general.architecture"] == "llama"
    assert contents.anomalies == ()


def test_a_missing_file_of_a_split_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    contents = gguf.read(paths[2])
    assert contents.files == (paths[0].name, paths[2].name)
    assert contents.anomalies == (Anomaly("missing-shard", paths[1].name, {"missing": 1, "of": 3}),)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"count": 4}, Anomaly("wrong-shard", "big-00002-of-00003.gguf", {"split.count": 4, "expected": 3})),
        ({"no": 2}, Anomaly("wrong-shard", "big-00002-of-00003.gguf", {"split.no": 2, "expected": 1})),
        (
            {"total": 4},
            Anomaly("missing-tensor", "big-00001-of-00003.gguf", {"split.tensors.count": 4, "found": 3}),
        ),
    ],
)
def test_a_split_that_contradicts_itself_is_an_anomaly(
    tmp_path: Path, changes: dict[str, int], expected: Anomaly
) -> None:
    assert gguf.read(split(tmp_path, **changes)[0]).anomalies == (expected,)


def test_a_renamed_file_of_a_split_says_that_others_are_missing(tmp_path: Path) -> None:
    path = split(tmp_path)[0].rename(tmp_path / "mine.gguf")
    expected = Anomaly("missing-shard", "mine.gguf", {"split.count": 3, "split.no": 0})
    assert gguf.read(path).anomalies == (expected,)


# --- hostile and damaged files ------------------------------------------------------------------------


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    assert "starts with b'PK" in refusal(tmp_path, b"PK\3\4" + bytes(100))
    assert "starts with b''" in refusal(tmp_path, b"")
    assert "GGJT file, the format before GGUF" in refusal(tmp_path, b"tjgg" + bytes(100))
    assert "version 77" in refusal(tmp_path, header(version=77))


def test_big_endian_files_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = reference.GGUFWriter(path, "llama", endianess=reference.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedFormatError, match="big-endian"):
        gguf.read(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="not a file"):
            gguf.read(path)


HUGE = (1 << 64) - 1
TEN_MILLION = 10_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(n_tensors=TEN_MILLION), "10000000 tensors"),
        (header(n_keys=TEN_MILLION), "10000000 metadata keys"),
        (header(n_tensors=HUGE), f"{HUGE} tensors"),
        (header(n_keys=HUGE), f"{HUGE} metadata keys"),
        (header([struct.pack("<Q", TEN_MILLION)]), "a metadata key says it has 10000000"),
        (header([pair("k", 8, struct.pack("<Q", HUGE))]), "a string says it has"),
        (header([pair("k", 9, struct.pack("<IQ", 0, TEN_MILLION))]), "an array says it has 10000000"),
        (header([pair("k", 9, struct.pack("<IQ", 12, HUGE // 8 + 1))]), "an array says it has"),
        (header([pair("k", 9, struct.pack("<IQ", 8, TEN_MILLION))]), "an array of strings says it has"),
        (
            header([pair("k", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", HUGE))]),
            "more bytes were expected",
        ),
        (header([pair("k", 9, struct.pack("<IQ", 9, TEN_MILLION))]), "an array of arrays says it has"),
        (header([pair("k", 9, struct.pack("<IQ", 9, 1) * 9)]), "nested more than 4 deep"),
        (header([pair("k", 9, struct.pack("<IQ", 77, 1))]), "array element type 77"),
        (header([pair("k", 77, b"")]), "metadata value type 77"),
        (
            header([pair("general.alignment", 4, struct.pack("<I", 0))]),
            "alignment is 0; expected a power of two",
        ),
        (header([pair("general.alignment", 4, struct.pack("<I", 48))]), "alignment is 48"),
        (header([pair("general.alignment", 8, text("32"))]), "alignment is '32'"),
        (header(rows=[row("w", (1,) * 9)]), "'w' has 9 dimensions; expected at most 8"),
        (header(rows=[row("w", (1 << 40, 1 << 40))]), "impossible size 1099511627776 × 1099511627776"),
        (header(rows=[row("w", (HUGE, 0))]), "impossible size"),
        (header(rows=[row("w", (33,), kind=2)]), "rows of 33 elements, not divisible by the 32 of a q4_0"),
        (header(rows=[row("w", (2048,))]), "'w' ends at byte 8256, but the file ends at 4160"),
        (header(rows=[row("w", (8,), offset=HUGE)]), "'w' ends at byte"),
        (header([pair("k", 4, struct.pack("<I", 1))])[:30], "1 metadata keys; expected at most 0"),
        (
            header(rows=[row("a-long-name", (8,))])[:50],
            "8 more bytes were expected, but the file ends at byte 50",
        ),
        (header([struct.pack("<Q", 1 << 17) + bytes(1 << 17)]), "a metadata key has 131072 bytes"),
    ],
)
def test_hostile_headers_are_refused_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    start = time.perf_counter()
    problem = refusal(tmp_path, content)
    assert message in problem
    assert time.perf_counter() - start < 0.5  # a loop over ten million would take seconds


@pytest.mark.parametrize("kind", [8, 9])
def test_many_empty_elements_in_a_sparse_file_are_refused(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(header([pair("k", 9, struct.pack("<IQ", kind, 1 << 30))], data=0))
        file.truncate(1 << 36)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"its arrays hold|says it has"):
        gguf.read(path)
    assert time.perf_counter() - start < 0.5


def test_a_sparse_header_beyond_any_real_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(header([pair("k", 9, struct.pack("<IQ", 0, 1 << 33))], data=0))
        file.truncate(1 << 36)
    with pytest.raises(CheckpointError, match="an array says it has 8589934592"):
        gguf.read(path)


def test_every_cut_of_a_file_is_refused_or_read(tmp_path: Path) -> None:
    content = header(
        [pair("k", 8, text("v")), pair("h", 9, struct.pack("<IQ", 4, 2) + bytes(8))], [row("w", (8,))]
    )
    full = len(content.rstrip(b"\0"))
    for size in range(0, full, 3):
        with pytest.raises(CheckpointError):
            read(tmp_path, content[:size])


def test_memory_stays_small_for_a_long_vocabulary(tmp_path: Path) -> None:
    strings = b"".join(text("x" * (i % 30)) for i in range(100_000))
    content = header([pair("tokens", 9, struct.pack("<IQ", 8, 100_000) + strings)], [row("w", (8,))])
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    gguf.read(path)
    tracemalloc.start()
    gguf.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * gguf._Header.WINDOW_BYTES


def test_reading_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, attncli.checkpoint.gguf; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


VALID = header(
    [
        pair("general.alignment", 4, struct.pack("<I", 32)),
        pair("tokens", 9, struct.pack("<IQ", 8, 3) + text("a") + text("bc") + text("")),
        pair("nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 5, 2) + bytes(8)),
        pair("scores", 9, struct.pack("<IQ", 6, 3) + bytes(12)),
    ],
    [row("w", (32, 2), kind=2), row("v", (8,), offset=64)],
    data=128,
)
INTERESTING = [0, 1, 8, 9, 127, 128, 255]


@settings(max_examples=150, deadline=2000)
@given(
    edits=st.lists(
        st.tuples(st.integers(4, len(VALID) - 129), st.sampled_from(INTERESTING) | st.integers(0, 255)),
        min_size=1,
        max_size=6,
    ),
    cut=st.none() | st.integers(0, len(VALID)),
)
def test_damaged_headers_raise_nothing_but_checkpoint_errors(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(VALID)
    for at, value in edits:
        content[at] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(bytes(content[:cut]))
    try:
        contents = gguf.read(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right
        return
    for array in contents.arrays:
        assert array.offset is None or array.offset + array.size_bytes <= len(content)
