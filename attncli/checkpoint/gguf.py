"""GGUF files: metadata, tensor names, shapes and block types from the header alone, in milliseconds.

The format is length-prefixed throughout, so a vocabulary can only be passed by walking its string lengths.
That walk is the cost of the whole read; nothing on the way is decoded or kept. Standard library only: no
numpy, no torch, and no byte of tensor data is read. Every count and length in the file is untrusted and is
held against the bytes that are left before anything is looped over or allocated.

Source: the GGUF specification of ggml (docs/gguf.md), versions 1 to 3.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from attncli.checkpoint.contents import Contents
from attncli.checkpoint.ggml import GGML_TYPES
from attncli.errors import CheckpointError, UnsupportedFormatError
from attncli.records import Anomaly, Array, Config

MAX_HEADER_BYTES = 1 << 28  # real headers stay below 30 MB, even with a 262k vocabulary and its merges
MAX_ELEMENTS_WALKED = 1 << 22  # strings and nested arrays passed one by one; real files stay below 1 million
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_DIMS = 8  # ggml has 4
MAX_DEPTH = 4  # arrays of arrays
MAX_NAME_BYTES = 1 << 16
MAX_NUMEL = 1 << 62
KEPT_STRING_BYTES = 1 << 12  # longer ones are chat templates and embedded tokenizers
KEPT_ELEMENTS = 1 << 12  # per-layer arrays are short, token scores and types are long
KEPT_BYTES = 1 << 25  # all names and kept values of one file


def read(path: Path) -> Contents:
    """The header of one GGUF file, or of all files of a split one when given any of them.

    Shapes are in torch's order [out, in], the reverse of ggml's `ne`. Missing files of a split are
    "missing-shard" anomalies; types not in `GGML_TYPES` are "unknown-type" and have no offset. Raises
    CheckpointError where a header is damaged, hostile or points outside its file.
    """
    names, missing = _siblings(path)
    shards = [_read_file(path.with_name(name)) for name in names]
    values: dict[str, Any] = {}
    arrays: list[Array] = []
    anomalies = [
        Anomaly("missing-shard", name, {"missing": len(missing), "of": len(missing) + len(names)})
        for name in missing[:100]
    ]
    seen: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        anomalies.extend(shard.anomalies)
        anomalies.extend(_split_anomalies(name, shard.values))
        for key, value in shard.values.items():
            values.setdefault(key, value)  # only the first file of a split holds the model's metadata
        for array in shard.arrays:
            if array.name in seen:
                anomalies.append(
                    Anomaly("duplicate-tensor", array.name, {"files": [seen[array.name], array.file]})
                )
            else:
                seen[array.name] = array.file
                arrays.append(array)
    expected = values.get("split.tensors.count")
    if isinstance(expected, int) and expected != len(arrays) and len(names) > 1 and not missing:
        evidence = {"split.tensors.count": expected, "found": len(arrays)}
        anomalies.append(Anomaly("missing-tensor", names[0], evidence))
    return Contents(
        format="gguf",
        root=str(path.parent),
        files=tuple(names),
        arrays=tuple(arrays),
        configs=(Config("GGUF metadata", values),),
        anomalies=tuple(anomalies),
    )


# --- one file -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Shard:
    values: dict[str, Any] = field(default_factory=dict)
    arrays: list[Array] = field(default_factory=list)
    anomalies: list[Anomaly] = field(default_factory=list)


def _read_file(path: Path) -> _Shard:
    try:
        if not path.is_file():
            raise CheckpointError(
                str(path), "this is not a file.", "Give the path of a .gguf file or of a checkpoint folder."
            )
        with path.open("rb", buffering=0) as file:
            return _read_header(_Header(path, file, path.stat().st_size))
    except OSError as error:
        problem = f"the file cannot be read: {error.strerror or error}."
        raise CheckpointError(str(path), problem, "Check the path and its permissions.") from error


def _read_header(header: _Header) -> _Shard:
    _check_magic(header)
    shard = _Shard()
    n_tensors = header.count("tensors", MAX_TENSORS, least_bytes=2 * header.word.size + 8)
    n_keys = header.count("metadata keys", MAX_KEYS, least_bytes=header.word.size + 5)
    for _ in range(n_keys):
        key = header.name("a metadata key", MAX_NAME_BYTES)
        known, value = _read_value(header, header.u32())
        if key in shard.values:
            shard.anomalies.append(Anomaly("duplicate-key", key, {"file": header.path.name}))
        elif known:
            shard.values[key] = value
    alignment = shard.values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        header.damaged(f"general.alignment is {alignment!r}; expected a power of two.")
    rows = [_read_tensor_row(header) for _ in range(n_tensors)]
    data_start = (header.position + alignment - 1) // alignment * alignment
    for name, shape, type_id, offset in rows:
        shard.arrays.append(_array(header, shard, name, shape, type_id, data_start + offset))
    _note_overlaps(shard)
    return shard


def _check_magic(header: _Header) -> None:
    magic = header.take(4) if header.size >= 4 else b""
    if magic in _LEGACY_MAGICS:
        raise UnsupportedFormatError(
            str(header.path),
            f"this is a {_LEGACY_MAGICS[magic]} file, the format before GGUF.",
            "Convert it with llama.cpp's convert_llama_ggml_to_gguf.py, or use a GGUF release of the model.",
        )
    if magic != b"GGUF":
        header.damaged(f"the file starts with {magic!r}; expected b'GGUF'.")
    raw = header.take(4)
    version = int.from_bytes(raw, "little")
    if version & 0xFFFF == 0 and 0 < int.from_bytes(raw, "big") < 0x100:
        raise UnsupportedFormatError(
            str(header.path),
            "this is a big-endian GGUF file; attncli reads little-endian ones.",
            "Convert it with gguf-convert-endian FILE little (from the gguf package).",
        )
    if version not in (1, 2, 3):
        header.damaged(f"it says it is GGUF version {version}; versions 1 to 3 are known.")
    if version == 1:
        header.word = struct.Struct("<I")


def _read_value(header: _Header, kind: int) -> tuple[bool, Any]:
    """Whether the value was kept, and the value. Long strings, long arrays and arrays of strings are not."""
    if kind in _SCALARS:
        scalar = _SCALARS[kind]
        header.keep(scalar.size)
        return True, scalar.unpack(header.take(scalar.size))[0]
    if kind == _STRING:
        length = header.length("a string", 1)
        if length > KEPT_STRING_BYTES:
            header.skip(length)
            return False, None
        return True, header.text(length)
    if kind != _ARRAY:
        header.damaged(f"metadata value type {kind} is not known.")
    kind = header.u32()
    if kind not in _SCALARS:
        _skip_elements(header, kind, depth=1)
        return False, None
    scalar = _SCALARS[kind]
    count = header.length("an array", scalar.size)
    if count > KEPT_ELEMENTS:
        header.skip(count * scalar.size)
        return False, None
    header.keep(count * 32)  # what a Python number takes
    code = scalar.format[1:]
    return True, struct.unpack(f"<{count}{code}", header.take(count * scalar.size))


def _skip_elements(header: _Header, kind: int, depth: int) -> None:
    """Passes the count and the elements of an array whose element type was just read."""
    if kind in _SCALARS:
        size = _SCALARS[kind].size
        header.skip(header.length("an array", size) * size)
    elif kind == _STRING:
        header.skip_strings(header.length("an array of strings", header.word.size))
    elif kind == _ARRAY:
        if depth == MAX_DEPTH:
            header.damaged(f"arrays are nested more than {MAX_DEPTH} deep.")
        count = header.length("an array of arrays", header.word.size + 4)
        header.walk(count)
        for _ in range(count):
            _skip_elements(header, header.u32(), depth + 1)
    else:
        header.damaged(f"array element type {kind} is not known.")


def _read_tensor_row(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    name = header.name("a tensor name", MAX_NAME_BYTES)
    n_dims = header.u32()
    if n_dims > MAX_DIMS:
        header.damaged(f"tensor {name!r} has {n_dims} dimensions; expected at most {MAX_DIMS}.")
    ne = [header.integer() for _ in range(n_dims)]
    if math.prod(max(n, 1) for n in ne) > MAX_NUMEL:
        header.damaged(f"tensor {name!r} has the impossible size {' × '.join(map(str, ne))}.")
    type_id = header.u32()
    (offset,) = _U64.unpack(header.take(8))
    return name, tuple(reversed(ne)), type_id, offset


def _array(
    header: _Header, shard: _Shard, name: str, shape: tuple[int, ...], type_id: int, offset: int
) -> Array:
    file = header.path.name
    block = GGML_TYPES.get(type_id)
    if block is None:
        shard.anomalies.append(Anomaly("unknown-type", name, {"ggml_type": type_id, "file": file}))
        return Array(name, shape, f"ggml_type_{type_id}", file, None, 0)
    row = shape[-1] if shape else 1
    if row % block.elements:
        header.damaged(
            f"tensor {name!r} has rows of {row} elements, not divisible by the {block.elements} of a "
            f"{block.dtype} block."
        )
    size_bytes = math.prod(shape) // block.elements * block.size_bytes
    if offset + size_bytes > header.size:
        header.damaged(
            f"tensor {name!r} ends at byte {offset + size_bytes}, but the file ends at {header.size}."
        )
    return Array(name, shape, block.dtype, file, offset, size_bytes)


def _note_overlaps(shard: _Shard) -> None:
    end, owner = 0, ""
    for array in sorted((a for a in shard.arrays if a.size_bytes and a.offset), key=lambda a: a.offset or 0):
        offset = array.offset or 0
        if offset < end:
            shard.anomalies.append(Anomaly("overlapping-tensors", array.name, {"with": owner}))
        if offset + array.size_bytes > end:
            end, owner = offset + array.size_bytes, array.name


# --- split files --------------------------------------------------------------------------------------


def _siblings(path: Path) -> tuple[list[str], list[str]]:
    """The names of the files that are there, in order, and of those that are missing."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [path.name], []
    try:
        there = {sibling.name for sibling in path.parent.iterdir()}
    except OSError:
        there = set()
    there.add(path.name)  # if it does not exist, opening it says so
    count = match["count"]
    names = [f"{match['stem']}-{number:05d}-of-{count}.gguf" for number in range(1, int(count) + 1)]
    return [name for name in names if name in there], [name for name in names if name not in there]


def _split_anomalies(name: str, values: dict[str, Any]) -> Sequence[Anomaly]:
    """Where a file's own idea of its place in a split is not the one in its name."""
    match = _SPLIT_NAME.fullmatch(name)
    count, number = values.get("split.count"), values.get("split.no")
    if match is None:
        if isinstance(count, int) and count > 1:
            return [Anomaly("missing-shard", name, {"split.count": count, "split.no": number})]
        return []
    anomalies = []
    if count is not None and count != int(match["count"]):
        evidence = {"split.count": count, "expected": int(match["count"])}
        anomalies.append(Anomaly("wrong-shard", name, evidence))
    if number is not None and number != int(match["number"]) - 1:
        evidence = {"split.no": number, "expected": int(match["number"]) - 1}
        anomalies.append(Anomaly("wrong-shard", name, evidence))
    return anomalies


# --- bytes --------------------------------------------------------------------------------------------


class _Header:
    """A cursor over the start of one file, through a window that moves forward and never grows.

    A window of bytes rather than a mmap: reading integers from bytes is a third faster, a file that is cut
    short meanwhile is an error and not a signal, and resident memory stays at the window's size.
    """

    WINDOW_BYTES = 1 << 20

    def __init__(self, path: Path, file: BinaryIO | Any, size: int) -> None:
        self.path = path
        self.size = size
        self.word = _U64
        self._file = file
        self._window = b""
        self._start = 0  # of the window, in the file
        self._at = 0  # of the cursor, in the window
        self._walked = 0
        self._kept = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    @property
    def left(self) -> int:
        return max(min(self.size, MAX_HEADER_BYTES) - self.position, 0)

    def damaged(self, problem: str) -> NoReturn:
        raise CheckpointError(
            str(self.path),
            f"byte {self.position} of the header: {problem}",
            "Download or convert the file again, and compare its size or checksum with the source.",
        )

    def take(self, size: int) -> bytes:
        if self._at + size > len(self._window):
            self._refill(size)
        chunk = self._window[self._at : self._at + size]
        self._at += size
        return chunk

    def skip(self, size: int) -> None:
        if size > self.left:
            self._past_end(size)
        self._at += size

    def skip_strings(self, count: int) -> None:
        """Passes `count` strings. The hot loop: a vocabulary and its merges are 300,000 of them."""
        self.walk(count)
        unpack, prefix, left = self.word.unpack_from, self.word.size, count
        while left:
            if self._at + prefix > len(self._window):
                self._refill(prefix)
            window, at = self._window, self._at
            try:
                for remaining in range(left, 0, -1):  # noqa: B007 - read where the loop is left early
                    at += prefix + unpack(window, at)[0]
                left = 0
            except (
                struct.error,
                OverflowError,
            ):  # the cursor left the window, which costs no check per string
                left = remaining
            self.skip(at - self._at)

    def walk(self, count: int) -> None:
        self._walked += count
        if self._walked > MAX_ELEMENTS_WALKED:
            self.damaged(f"its arrays hold {self._walked} strings; expected at most {MAX_ELEMENTS_WALKED}.")

    def keep(self, size: int) -> None:
        self._kept += size
        if self._kept > KEPT_BYTES:
            self.damaged(f"its short metadata values are larger than {KEPT_BYTES} bytes.")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def integer(self) -> int:
        return int.from_bytes(self.take(self.word.size), "little")

    def length(self, what: str, element_bytes: int) -> int:
        """A count of elements of at least `element_bytes` each, which the file is long enough to hold."""
        length = self.integer()
        if length * element_bytes > self.left:
            self.damaged(f"{what} says it has {length} elements, but {self.left} bytes are left.")
        return length

    def count(self, what: str, most: int, least_bytes: int) -> int:
        count = self.integer()
        if count > most or count * least_bytes > self.left:
            self.damaged(
                f"it says it has {count} {what}; expected at most {min(most, self.left // least_bytes)} "
                f"in a file of {self.size} bytes."
            )
        return count

    def name(self, what: str, most: int) -> str:
        length = self.length(what, 1)
        if length > most:
            self.damaged(f"{what} has {length} bytes; expected at most {most}.")
        return self.text(length)

    def text(self, length: int) -> str:
        self.keep(length)
        return self.take(length).decode("utf-8", "backslashreplace")

    def _refill(self, size: int) -> None:
        if size > self.left:
            self._past_end(size)
        self._start, self._at = self.position, 0
        self._file.seek(self._start)
        self._window = self._file.read(max(self.WINDOW_BYTES, size)) or b""
        if len(self._window) < size:
            self._past_end(size)

    def _past_end(self, size: int) -> NoReturn:
        if self.position + size > self.size:
            self.damaged(f"{size} more bytes were expected, but the file ends at byte {self.size}.")
        self.damaged(f"the header is larger than {MAX_HEADER_BYTES} bytes.")


# --- tables -------------------------------------------------------------------------------------------

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_LEGACY_MAGICS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA adapter"}
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
