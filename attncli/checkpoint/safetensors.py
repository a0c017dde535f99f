"""safetensors headers: u64 length, JSON, then data. Every promise of the header is checked against the file.

Source: the format description of the safetensors project: header ≤ 100 MB, offsets without holes or overlaps.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attncli.checkpoint.contents import Contents
from attncli.errors import CheckpointError
from attncli.records import Array, Config


def looks_like(head: bytes) -> bool:
    """Whether these first bytes begin a safetensors file: a length, then `{`."""
    return len(head) >= 9 and head[8:9] == b"{"


def read(path: Path) -> Contents:
    """Names, shapes, dtypes and offsets from the header alone."""
    header, data_start, data_size = _header(path)
    metadata = header.pop("__metadata__", None)
    arrays = [_array(path, name, entry, data_start, data_size) for name, entry in header.items()]
    _check_layout(path, arrays, data_start, data_size)
    return Contents(
        format="safetensors",
        root=str(path.parent),
        files=(path.name,),
        arrays=tuple(arrays),
        configs=_embedded_config(metadata),
    )


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise CheckpointError(
                str(path),
                f"the file ends after {size} bytes; a safetensors header needs at least 8.",
                _DOWNLOAD_AGAIN,
            )
        length = int.from_bytes(head, "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            limit = (
                "100 MB, the format's own limit"
                if size - 8 > _MAX_HEADER_BYTES
                else f"the {size - 8} bytes that follow"
            )
            raise CheckpointError(
                str(path),
                f"the header claims {length} bytes, more than {limit}.",
                "The file is truncated or is no safetensors file. " + _DOWNLOAD_AGAIN,
            )
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise CheckpointError(
            str(path),
            f"the header begins with {raw[:8]!r}; a safetensors header begins with a {{.",
            "The file is damaged or is no safetensors file. " + _DOWNLOAD_AGAIN,
        )
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            str(path), f"the header is not valid JSON ({error}).", _DOWNLOAD_AGAIN
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(str(path), "the header is JSON, but not an object of tensors.", _DOWNLOAD_AGAIN)
    return header, 8 + length, size - 8 - length


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise CheckpointError(
            str(path),
            f"the header names {_label(twice)} twice; every name must be unique.",
            "Write the file again with the safetensors library.",
        )
    return found


def _array(path: Path, name: str, entry: Any, data_start: int, data_size: int) -> Array:
    # Large models have 60,000 tensors: here is only what a sound entry needs.
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            str(path),
            f"tensor {_label(name)} lacks dtype, shape or data_offsets.",
            "Write the file again with the safetensors library.",
        ) from error
    if (
        type(dtype) is not str
        or type(shape) is not list
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n < _MAX_COUNT for n in (*shape, begin, end))
        or not begin <= end <= data_size
        or math.prod(shape) * _BITS.get(dtype, 0) != ((end - begin) * 8 if dtype in _BITS else 0)
    ):
        raise _unsound(path, _label(name), dtype, shape, begin, end, data_size)
    return Array(
        name, tuple(shape), _DTYPES.get(dtype, dtype.lower()), path.name, data_start + begin, end - begin
    )


def _unsound(
    path: Path, label: str, dtype: Any, shape: Any, begin: Any, end: Any, data_size: int
) -> CheckpointError:
    """What is wrong with an entry that `_array` refused."""
    whole = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS else [None]
    if not isinstance(dtype, str) or any(type(n) is not int or not 0 <= n < _MAX_COUNT for n in whole):
        given = f"{shape!r}, [{begin!r}, {end!r}]"
        return CheckpointError(
            str(path),
            f"tensor {label} has a shape or offsets that are no counts: {given[:200]}.",
            "Write the file again with the safetensors library.",
        )
    if not begin <= end <= data_size:
        return CheckpointError(
            str(path),
            f"tensor {label} lies at bytes {begin} to {end}, but the file holds {data_size} bytes of data.",
            "The file is truncated. " + _DOWNLOAD_AGAIN,
        )
    needed = math.prod(shape) * _BITS[dtype] // 8
    return CheckpointError(
        str(path),
        f"tensor {label} of shape {tuple(shape)} and dtype {dtype} needs {needed} bytes, but its offsets "
        f"span {end - begin}.",
        "Write the file again with the safetensors library.",
    )


def _label(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:200] + "…")


def _check_layout(path: Path, arrays: list[Array], data_start: int, data_size: int) -> None:
    position = data_start
    previous = ""
    for array in sorted(arrays, key=lambda a: (a.offset or 0, a.size_bytes)):
        offset = array.offset or 0
        if offset < position:
            raise CheckpointError(
                str(path),
                f"tensors {_label(previous)} and {_label(array.name)} overlap in the file.",
                "Write the file again with the safetensors library.",
            )
        if offset > position:
            raise _unclaimed(path, position, offset)
        position = offset + array.size_bytes
        previous = array.name
    if position < data_start + data_size:
        raise _unclaimed(path, position, data_start + data_size)


def _unclaimed(path: Path, start: int, end: int) -> CheckpointError:
    """Loaders refuse a file with such a hole, so that nothing can hide in it."""
    return CheckpointError(
        str(path),
        f"bytes {start} to {end} of the file belong to no tensor; a header must account for all of them.",
        "Write the file again with the safetensors library, or download it again.",
    )


def _embedded_config(metadata: Any) -> tuple[Config, ...]:
    """`__metadata__` holds strings; some writers put a JSON config into one of them."""
    if not isinstance(metadata, Mapping):
        return ()
    values: dict[str, Any] = {}
    nested: list[Config] = []
    for key, text in metadata.items():
        if not isinstance(text, str):
            continue
        if text.startswith("{") and len(text) < _MAX_CONFIG_CHARS:
            try:
                inner = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(inner, dict):
                nested.append(Config(f"{key} in the safetensors metadata", inner))
        elif text.isdigit() and len(text) < 10:
            values[str(key)] = int(text)
        elif len(text) < 256:
            values[str(key)] = text
    plain = (
        (Config("safetensors metadata", values),) if any(isinstance(v, int) for v in values.values()) else ()
    )
    return (*nested, *plain)


# --- tables -------------------------------------------------------------------------------------------

_MAX_HEADER_BYTES = 100_000_000
_MAX_CONFIG_CHARS = 1_000_000
_MAX_DIMENSIONS = 64
_MAX_COUNT = 1 << 63
_DOWNLOAD_AGAIN = "Download or copy it again and compare its size with the original."
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn",
    "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
