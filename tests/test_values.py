"""Tensor values come back exactly, in pieces and whole, from every dtype, stride and alignment."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from attncli.checkpoint import values as values_module
from attncli.checkpoint.values import DTYPES, PIECE_BYTES, Values
from attncli.errors import CheckpointError
from attncli.records import Array, Checkpoint, Tensor


def stored(tmp_path: Path, tensors: Mapping[str, torch.Tensor], pad: int = 0) -> Checkpoint:
    """Contiguous tensors one after the other in `data.bin`, behind `pad` bytes."""
    records, offset = [], pad
    with (tmp_path / "data.bin").open("wb") as file:
        file.write(bytes(pad))
        for name, tensor in tensors.items():
            raw = raw_bytes(tensor)
            records.append(plain(name, tuple(tensor.shape), str(tensor.dtype)[6:], offset, len(raw)))
            file.write(raw)
            offset += len(raw)
    return checkpoint(tmp_path, *records)


def raw_bytes(tensor: torch.Tensor) -> bytearray:
    raw = bytearray(tensor.numel() * tensor.element_size())
    if raw:
        torch.frombuffer(raw, dtype=torch.uint8).copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
    return raw


def plain(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    offset: int | None,
    size: int,
    strides: tuple[int, ...] | None = None,
    file: str = "data.bin",
) -> Tensor:
    array = Array(name, shape, dtype, file, offset, size, strides)
    return Tensor(name, shape, dtype, file, {"weight": array})


def checkpoint(root: Path, *tensors: Tensor) -> Checkpoint:
    return Checkpoint(str(root), str(root), "folder", "raw", ("data.bin",), 0, tensors)


def joined(values: Values, tensor: Tensor) -> torch.Tensor:
    return torch.cat([piece.clone() for piece in values.pieces(tensor)])


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit by bit: NaN equals NaN, -0 differs from 0."""
    left, right = left.contiguous(), right.contiguous()
    return left.dtype == right.dtype and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


def example(dtype: str, numel: int = 24) -> torch.Tensor:
    patterns = torch.arange(numel * DTYPES[dtype].itemsize) % 251
    if dtype == "bool":
        patterns %= 2
    return patterns.to(torch.uint8).view(DTYPES[dtype])


@pytest.mark.parametrize("pad", [0, 3, 8])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_comes_back_bit_by_bit_at_any_alignment(tmp_path: Path, dtype: str, pad: int) -> None:
    weight = example(dtype).reshape(2, 3, 4)
    found = stored(tmp_path, {"w": weight}, pad)
    with Values(found) as values:
        tensor = found.tensors[0]
        assert values.available(tensor)
        loaded = values.load(tensor)
        assert loaded.shape == (2, 3, 4)
        assert same(loaded, weight)
        assert same(joined(values, tensor), weight.reshape(-1))


def test_pieces_are_small_flat_and_cover_a_large_tensor_once(tmp_path: Path) -> None:
    weight = torch.arange(3 * PIECE_BYTES // 4 + 5, dtype=torch.int32)
    found = stored(tmp_path, {"w": weight})
    with Values(found) as values:
        pieces = list(values.pieces(found.tensors[0]))
        assert len(pieces) == 4
        assert all(piece.dim() == 1 and piece.numel() * 4 <= PIECE_BYTES for piece in pieces)
        assert torch.equal(torch.cat(pieces), weight)


def test_a_piece_outlives_its_reader(tmp_path: Path) -> None:
    weight = torch.arange(2 * PIECE_BYTES, dtype=torch.uint8)
    found = stored(tmp_path, {"w": weight})
    with Values(found) as values:
        first = next(values.pieces(found.tensors[0]))
    assert torch.equal(first, weight[:PIECE_BYTES])


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((40, 30), (1, 40)),  # transposed: dense in another order
        ((20, 30), (60, 1)),  # every other row: holes between
        ((20, 15), (60, 2)),
        ((5, 4, 3), (3, 15, 1)),  # permuted
        ((4, 1, 3), (3, 999, 1)),  # a stride nobody uses
    ],
)
def test_strides_are_honoured(tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    storage = torch.arange(1200, dtype=torch.float32)
    (tmp_path / "data.bin").write_bytes(b"pad!" + raw_bytes(storage))
    expected = torch.as_strided(storage, shape, strides)
    tensor = plain("w", shape, "float32", 4, 4800, strides)
    with Values(checkpoint(tmp_path, tensor)) as values:
        assert torch.equal(values.load(tensor), expected)
        assert values.load(tensor).is_contiguous()
        assert torch.equal(joined(values, tensor).sort().values, expected.reshape(-1).sort().values)


def test_a_large_strided_tensor_comes_in_small_pieces(tmp_path: Path) -> None:
    storage = torch.arange(PIECE_BYTES, dtype=torch.int32)
    (tmp_path / "data.bin").write_bytes(raw_bytes(storage))
    tensor = plain("w", (PIECE_BYTES // 2,), "int32", 0, 4 * PIECE_BYTES, (2,))
    with Values(checkpoint(tmp_path, tensor)) as values:
        pieces = list(values.pieces(tensor))
        assert max(piece.numel() for piece in pieces) * 4 <= PIECE_BYTES
        assert torch.equal(torch.cat(pieces).sort().values, storage[::2])


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    found = stored(tmp_path, {"empty": torch.empty(0, 5), "scalar": torch.tensor(3.5)})
    with Values(found) as values:
        empty, scalar = found.tensors
        assert list(values.pieces(empty)) == []
        assert values.load(empty).shape == (0, 5)
        assert values.load(scalar).shape == ()
        assert joined(values, scalar).tolist() == [3.5]


def test_a_checkpoint_of_empty_tensors_only_opens_no_file(tmp_path: Path) -> None:
    tensor = plain("empty", (0,), "float32", 0, 0, file="absent.bin")
    with Values(checkpoint(tmp_path, tensor)) as values:
        assert list(values.pieces(tensor)) == []
        assert values.load(tensor).numel() == 0


def test_more_shards_than_files_kept_open_are_all_read(tmp_path: Path) -> None:
    shards = 3 * values_module.MAX_OPEN_FILES
    tensors = []
    for shard in range(shards):
        (tmp_path / f"{shard}.bin").write_bytes(raw_bytes(torch.tensor([float(shard)])))
        tensors.append(plain(f"w{shard}", (1,), "float32", 0, 4, file=f"{shard}.bin"))
    with Values(checkpoint(tmp_path, *tensors)) as values:
        for _ in range(2):
            assert [joined(values, tensor).item() for tensor in tensors] == list(range(shards))


def test_reading_gives_no_warning_about_memory_that_is_not_writable(tmp_path: Path) -> None:
    found = stored(tmp_path, {"w": torch.ones(4)})
    with warnings.catch_warnings(), Values(found) as values:
        warnings.simplefilter("error")
        assert joined(values, found.tensors[0]).tolist() == [1.0] * 4


def test_find_gives_the_first_tensor_of_a_name(tmp_path: Path) -> None:
    first, second = plain("w", (1,), "float32", 0, 4), plain("w", (2,), "float32", 4, 8)
    with Values(checkpoint(tmp_path, first, second)) as values:
        assert values.find("w") is first
        assert values.find("v") is None


# --- quantised ----------------------------------------------------------------------------------------


def test_a_block_quantised_tensor_is_dequantised_to_float32(tmp_path: Path) -> None:
    # q8_0: a float16 scale and 32 int8 per block.
    scale = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    block = torch.arange(-16, 16, dtype=torch.int8)
    raw = torch.cat([scale, block.view(torch.uint8)]).repeat(4)
    (tmp_path / "data.bin").write_bytes(raw_bytes(raw))
    array = Array("w", (2, 64), "q8_0", "data.bin", 0, 4 * 34)
    tensor = Tensor("w", (2, 64), "q8_0", "data.bin", {"weight": array}, scheme="gguf")
    with Values(checkpoint(tmp_path, tensor)) as values:
        assert values.available(tensor)
        loaded = values.load(tensor)
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, block.float().mul(0.5).repeat(4).reshape(2, 64))
        with pytest.raises(CheckpointError, match="cannot be read"):
            list(values.pieces(tensor))


# --- what cannot be read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        plain("w", (4,), "float32", None, 16),  # compressed: no place in the file
        plain("w", (4,), "float4_e2m1fn_x2", 0, 2),  # no such dtype in torch to compute with
        Tensor("w", (4,), "float32", "data.bin", {}),
        Tensor("w", (4,), "int4", "data.bin", {"weight": Array("w", (4,), "int4", "data.bin", 0, 2)}, "hqq"),
    ],
)
def test_what_cannot_be_read_is_said_to_be_unavailable_and_refused(tmp_path: Path, tensor: Tensor) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(64))
    with Values(checkpoint(tmp_path, tensor)) as values:
        assert not values.available(tensor)
        with pytest.raises(CheckpointError) as caught:
            values.load(tensor)
        assert str(caught.value).startswith("w: its values cannot be read: stored as ")
        assert caught.value.remedy.endswith(".")
        with pytest.raises(CheckpointError):
            list(values.pieces(tensor))


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_file_cut_short_since_its_header_was_read_is_an_error(tmp_path: Path, when: str) -> None:
    found = stored(tmp_path, {"a": torch.ones(1000), "b": torch.ones(3000)})
    path = tmp_path / "data.bin"
    with Values(found) as values:
        if when == "between":
            joined(values, found.tensors[0])
        path.write_bytes(path.read_bytes()[:9000])
        for read in (values.load, lambda tensor: list(values.pieces(tensor))):
            with pytest.raises(CheckpointError) as caught:
                read(found.tensors[1])
            assert str(caught.value) == (
                f"{path}: tensor b of shape [3000] needs bytes up to 16,000, but the file has 9,000. "
                "Copy or download the file again, and read it only once it is complete."
            )


@pytest.mark.parametrize("file", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", "", "a\0b"])
def test_a_name_that_leads_out_of_the_checkpoint_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    root = tmp_path / "checkpoint"
    root.mkdir()
    tensor = plain("w", (4,), "float32", 0, 16, file=file)
    with Values(checkpoint(root, tensor)) as values:
        for read in (values.load, lambda tensor: list(values.pieces(tensor))):
            with pytest.raises(CheckpointError, match="outside the checkpoint") as caught:
                read(tensor)
            assert "Do not trust this checkpoint" in caught.value.remedy


def test_a_link_inside_the_checkpoint_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(raw_bytes(torch.ones(4)))
    root = tmp_path / "snapshot"
    root.mkdir()
    try:
        (root / "data.bin").symlink_to(tmp_path / "blob")
    except OSError:
        pytest.skip("no links on this file system")
    tensor = plain("w", (4,), "float32", 0, 16)
    with Values(checkpoint(root, tensor)) as values:
        assert values.load(tensor).tolist() == [1.0] * 4
        assert joined(values, tensor).tolist() == [1.0] * 4


def test_a_missing_file_and_a_folder_in_its_place_are_errors_with_a_remedy(tmp_path: Path) -> None:
    tensor = plain("w", (4,), "float32", 0, 16)
    with Values(checkpoint(tmp_path, tensor)) as values:
        for read in (values.load, lambda tensor: list(values.pieces(tensor))):
            with pytest.raises(CheckpointError, match="no such file"):
                read(tensor)
    (tmp_path / "data.bin").mkdir()
    with Values(checkpoint(tmp_path, tensor)) as values:
        for read in (values.load, lambda tensor: list(values.pieces(tensor))):
            with pytest.raises(CheckpointError, match=r"data\.bin: "):
                read(tensor)


@pytest.mark.parametrize(
    ("shape", "strides"), [((1 << 40,), (0,)), ((1 << 20, 1 << 20), (0, 0)), ((4,), (-1,)), ((4,), None)]
)
def test_strides_that_claim_more_than_a_file_can_hold_are_refused_without_allocating(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(64))
    tensor = plain("w", shape, "float32", 0 if strides else -16, 64, strides)
    with Values(checkpoint(tmp_path, tensor)) as values:
        for read in (values.load, lambda tensor: list(values.pieces(tensor))):
            with pytest.raises(CheckpointError, match="claims shape"):
                read(tensor)
