"""Tensor values on demand: pieces that fit a core's cache, or one whole tensor. The torch side of this room.

Files are mapped, never read whole: pages that were handed out are given back to the system behind the reader,
so that a scan of any size holds a few megabytes. This file must not know what is computed on the values.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

from attncli.errors import CheckpointError
from attncli.records import Array, Checkpoint, Tensor


class Values:
    """The values of one checkpoint's tensors; closes its files on exit.

    A piece stays valid for as long as it is held: only resident pages are given back behind the reader, never
    the mapping.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._root = Path(checkpoint.root)
        self._tensors: dict[str, Tensor] = {}
        for tensor in checkpoint.tensors:
            self._tensors.setdefault(tensor.name, tensor)
        self._maps: OrderedDict[str, _MappedFile] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Values:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file. A file whose pieces are still held somewhere closes with the last of them."""
        with self._lock:
            self._maps.clear()

    def find(self, name: str) -> Tensor | None:
        """The tensor of that name; the first one where a checkpoint holds several."""
        return self._tensors.get(name)

    def available(self, tensor: Tensor) -> bool:
        """Whether `load` can give the values: every part lies addressable in a file, its form is understood.

        Opens no file: a file that vanished or was cut short since its header was read is an error of `load`.
        """
        if any(part.offset is None for part in tensor.parts.values()) or not tensor.parts:
            return False
        if tensor.scheme == "plain":
            part = tensor.parts.get("weight")
            return (
                part is not None
                and part.dtype in DTYPES
                and _numel_or_zero(part.shape) == _numel_or_zero(tensor.shape)
            )
        from attncli.checkpoint.dequantize import supported

        return bool(supported(tensor))

    def pieces(self, tensor: Tensor) -> Iterator[torch.Tensor]:
        """The elements of a plain tensor as 1-D tensors of at most `PIECE_BYTES`, in the order of the file.

        Read-only: they share the file's pages. Raises CheckpointError where the file cannot give them.
        """
        for part in self.parts(tensor):
            yield from part

    def parts(self, tensor: Tensor) -> Iterator[Iterator[torch.Tensor]]:
        """The same pieces in groups of some megabytes, for threads: one group to each, in any order."""
        array = self._plain_part(tensor)
        if array.numel == 0:
            return
        dtype = DTYPES[array.dtype]
        start, span = _extent(array)
        mapped = self._mapped(array)
        if _is_dense(array):
            for first in range(start, start + span, PART_BYTES):
                yield mapped.pieces(first, min(PART_BYTES, start + span - first), dtype)
            return
        view = torch.as_strided(mapped.view(start, span, dtype), array.shape, array.strides or ())
        yield (block.reshape(-1) for block in _blocks(view))

    def load(self, tensor: Tensor) -> torch.Tensor:
        """The whole tensor in its logical shape, in memory of its own.

        A plain one keeps its dtype; a quantised one is float32. Raises CheckpointError where the file
        cannot give it, or where `available` is False.
        """
        if not self.available(tensor):
            raise CheckpointError(
                tensor.name,
                f"its values cannot be read: stored as {tensor.scheme} {tensor.dtype} in {tensor.file}.",
                "Leave the option that reads values away, or save the checkpoint as plain safetensors.",
            )
        if tensor.scheme == "plain":
            return self._read(self._plain_part(tensor)).reshape(tensor.shape)
        from attncli.checkpoint.dequantize import dequantize

        return dequantize(tensor, {role: self._read(part) for role, part in tensor.parts.items()})

    # --- one array ------------------------------------------------------------------------------------

    def _plain_part(self, tensor: Tensor) -> Array:
        part = tensor.parts.get("weight")
        if tensor.scheme != "plain" or part is None or part.offset is None or part.dtype not in DTYPES:
            raise CheckpointError(
                tensor.name,
                f"its values cannot be read: stored as {tensor.scheme} {tensor.dtype} in {tensor.file}.",
                "Leave the option that reads values away, or save the checkpoint as plain safetensors.",
            )
        return part

    def _read(self, array: Array) -> torch.Tensor:
        """`array` in memory of its own, in its shape; flat uint8 where torch has no such dtype."""
        dtype = DTYPES.get(array.dtype)
        if array.numel == 0:
            return torch.empty(array.shape, dtype=dtype or torch.uint8)
        start, span = _extent(array)
        path = self._path(array)
        try:
            with path.open("rb", buffering=0) as file:
                _check_end(path, array, start + span, os.fstat(file.fileno()).st_size)
                buffer = bytearray(span)
                view, done = memoryview(buffer), 0
                file.seek(start)
                # One call reads 2 GB at most on Linux.
                while done < span and (count := file.readinto(view[done:])):
                    done += count
                _check_end(path, array, start + span, start + done)
        except OSError as error:
            raise _unreadable(path, error) from error
        flat = torch.frombuffer(buffer, dtype=dtype or torch.uint8)
        if dtype is None:
            return flat
        if array.strides is None:
            return flat.reshape(array.shape)
        return torch.as_strided(flat, array.shape, array.strides).contiguous()

    def _path(self, array: Array) -> Path:
        """Where `array` lies. A name that leads out of the checkpoint is refused; links inside it are the
        user's own (the Hugging Face cache consists of them) and are followed."""
        parts = Path(array.file).parts
        if Path(array.file).is_absolute() or ".." in parts or "\0" in array.file or not parts:
            raise CheckpointError(
                str(self._root),
                f"tensor {array.name} claims to lie in {array.file!r}, outside the checkpoint.",
                "Do not trust this checkpoint: an index that points elsewhere can read any file of yours.",
            )
        return self._root / array.file

    def _mapped(self, array: Array) -> _MappedFile:
        path = self._path(array)
        start, span = _extent(array)
        with self._lock:
            mapped = self._maps.pop(array.file, None)
            if mapped is None:
                while len(self._maps) >= MAX_OPEN_FILES:
                    self._maps.popitem(last=False)
                try:
                    size = path.stat().st_size
                    _check_end(path, array, start + span, size)
                    mapped = _MappedFile(path)
                except OSError as error:
                    raise _unreadable(path, error) from error
            self._maps[array.file] = mapped
        # Reading a mapped page behind the end of a file kills the process: look at the size every time.
        _check_end(path, array, start + span, mapped.size())
        return mapped


class _MappedFile:
    """One file as bytes in memory, read-only, with as few of its pages resident as possible."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _advise(self._map, "MADV_SEQUENTIAL")
        # torch warns, once, that the buffer is read-only; nothing here writes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            # A tensor keeps the map alive but does not keep it from being closed, and a piece of a closed
            # map is a crash: so nothing here closes a map, it goes with the last tensor that looks into it.
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def size(self) -> int:
        """Bytes the file has now, which may be fewer than were mapped."""
        return min(self._map.size(), len(self._map))

    def view(self, start: int, span: int, dtype: torch.dtype) -> torch.Tensor:
        """`span` bytes as a 1-D tensor; a copy where they do not lie on a multiple of the element size."""
        part = self._bytes[start : start + span]
        if start % dtype.itemsize:  # vectorised kernels may rely on alignment
            part = part.clone()
        return part.view(dtype)

    def pieces(self, start: int, span: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """`span` bytes in pieces. Who asks for the next piece has read the one before: its pages go."""
        for first in range(start, start + span, PIECE_BYTES):
            size = min(PIECE_BYTES, start + span - first)
            yield self.view(first, size, dtype)
            self._drop(first, first + size)

    def _drop(self, start: int, end: int) -> None:
        # Touching a page also maps its neighbours, which may have been given back already.
        start = max(0, start - _NEIGHBOUR_BYTES)
        start -= start % mmap.ALLOCATIONGRANULARITY
        end -= end % mmap.ALLOCATIONGRANULARITY
        if start < end:
            _advise(self._map, "MADV_DONTNEED", start, end - start)


def _advise(mapped: mmap.mmap, option: str, start: int = 0, length: int = 0) -> None:
    """madvise where the platform has it. Advice only: without it the scan needs more resident memory."""
    value = getattr(mmap, option, None)
    advise = getattr(mapped, "madvise", None)
    if value is not None and advise is not None:
        advise(value, start, length or len(mapped))


def _extent(array: Array) -> tuple[int, int]:
    """First byte and number of bytes that `array` spans in its file."""
    assert array.offset is not None
    dtype = DTYPES.get(array.dtype)
    if dtype is None:
        return array.offset, array.size_bytes
    if array.numel == 0:
        return array.offset, 0
    if array.strides is None:
        return array.offset, array.numel * dtype.itemsize
    reach = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    return array.offset, (reach + 1) * dtype.itemsize


def _is_dense(array: Array) -> bool:
    """Whether the elements fill their span without holes or repeats, in whatever order."""
    if array.strides is None:
        return True
    expected = 1
    for stride, size in sorted(zip(array.strides, array.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _blocks(view: torch.Tensor) -> Iterator[torch.Tensor]:
    """`view` in parts of at most PIECE_BYTES, halved along the longest dimension until they fit."""
    if view.numel() * view.element_size() <= PIECE_BYTES:
        yield view
        return
    longest = max(range(view.dim()), key=lambda dim: view.shape[dim])
    for half in view.chunk(2, longest):
        yield from _blocks(half)


def _check_end(path: Path, array: Array, end: int, size: int) -> None:
    """Raises CheckpointError where `array` does not lie in a file of `size` bytes."""
    if end > size:
        raise CheckpointError(
            str(path),
            f"tensor {array.name} of shape {list(array.shape)} needs bytes up to {end:,}, but the file has "
            f"{size:,}.",
            "Copy or download the file again, and read it only once it is complete.",
        )
    dtype = DTYPES.get(array.dtype)
    # Strides of 0 repeat elements: a file of a kilobyte could claim terabytes.
    repeats = dtype is not None and array.numel * dtype.itemsize > max(size, 1 << 20)
    if repeats or (array.offset or 0) < 0 or min((*array.shape, *(array.strides or ())), default=0) < 0:
        raise CheckpointError(
            str(path),
            f"tensor {array.name} claims shape {list(array.shape)} with strides {list(array.strides or ())} "
            f"at byte {array.offset}, which a file of {size:,} bytes cannot hold.",
            "Do not trust this checkpoint: no framework writes such a tensor.",
        )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = error.strerror or type(error).__name__
    return CheckpointError(
        str(path),
        f"the file that holds the values cannot be read: {reason[:1].lower()}{reason[1:]}.",
        "Check that every shard lies beside the others and that you may read it.",
    )


def _numel_or_zero(shape: tuple[int, ...]) -> int:
    return math.prod(shape) if all(size >= 0 for size in shape) else 0


# Large enough that handing a piece over costs nothing beside reading it; its reader cuts it for the cache.
PIECE_BYTES = 4 << 20
# What one thread takes at a time: little enough that no thread waits long for the last one.
PART_BYTES = 16 << 20
MAX_OPEN_FILES = 8
_NEIGHBOUR_BYTES = 128 << 10
DTYPES: dict[str, torch.dtype] = {
    name: dtype
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
        "complex128",
        "complex64",
    )
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
