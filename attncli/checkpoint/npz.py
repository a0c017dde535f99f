"""Headers of .npz archives: one .npy per array, whose header is a Python literal. numpy is not imported."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

from attncli.checkpoint.contents import Contents
from attncli.checkpoint.pickle_values import NUMPY_DTYPES, fortran_strides, item_bytes
from attncli.checkpoint.torchzip import Archive
from attncli.errors import CheckpointError
from attncli.records import Anomaly, Array

# numpy's own limit: a longer literal can crash Python's parser.
MAX_HEADER_BYTES = 10_000


def read(path: Path) -> Contents:
    """The arrays of an .npz file. Object arrays are pickles: left out, with an Anomaly "pickle-object".

    Errors: `CheckpointError` where an entry is damaged, cut short or big-endian.
    """
    found: list[Array] = []
    anomalies: list[Anomaly] = []
    excluded: dict[str, int] = {}
    with path.open("rb") as file:
        archive = Archive(file, str(path))
        for entry in archive.names():
            if not entry.endswith(".npy"):
                continue
            name = entry[: -len(".npy")]
            shape, descr, fortran, data_start = _header(archive, entry)
            if not isinstance(descr, str):
                excluded["structured array"] = excluded.get("structured array", 0) + 1
                if "O" in repr(descr):
                    anomalies.append(Anomaly("pickle-object", name, {"file": path.name}))
                continue
            if descr.lstrip("|<>=").startswith("O"):
                excluded["object array"] = excluded.get("object array", 0) + 1
                anomalies.append(Anomaly("pickle-object", name, {"file": path.name}))
                continue
            dtype = _dtype(archive, entry, descr)
            if dtype is None:
                excluded["text array"] = excluded.get("text array", 0) + 1
                continue
            size = math.prod(shape) * item_bytes(dtype)
            if data_start + size > (archive.size_of(entry) or 0):
                raise archive.error(
                    f"the array {name} {list(shape)} needs {size} bytes; its entry has "
                    f"{max(0, (archive.size_of(entry) or 0) - data_start)}."
                )
            base = archive.offset_of(entry)
            strides = fortran_strides(shape) if fortran and len(shape) > 1 else None
            offset = None if base is None or not size else base + data_start
            found.append(Array(name, shape, dtype, path.name, offset, size, strides))
    return Contents(
        format="npz",
        root=str(path.parent),
        files=(path.name,),
        arrays=tuple(found),
        excluded=excluded,
        anomalies=tuple(anomalies),
    )


def _header(archive: Archive, entry: str) -> tuple[tuple[int, ...], Any, bool, int]:
    """Shape, dtype code, whether the first axis runs fastest, and where in the entry the data begins."""
    data = archive.head(entry, 12 + MAX_HEADER_BYTES)
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3):
        raise archive.error(f"the entry {entry} does not begin like a .npy file of version 1 to 3.")
    width = 2 if data[6] == 1 else 4
    length = int.from_bytes(data[8 : 8 + width], "little")
    if length > MAX_HEADER_BYTES:
        raise archive.error(
            f"the header of {entry} has {length} bytes; at most {MAX_HEADER_BYTES} are expected."
        )
    text = data[8 + width : 8 + width + length]
    try:
        header = ast.literal_eval(text.decode("utf-8" if data[6] == 3 else "latin-1").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise archive.error(f"the header of {entry} is no Python literal.") from error
    shape = header.get("shape") if isinstance(header, dict) else None
    if (
        not isinstance(shape, tuple)
        or len(shape) > 64
        or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
        or "descr" not in header
    ):
        raise archive.error(f"the header of {entry} gives no shape and dtype.")
    return shape, header["descr"], header.get("fortran_order") is True, 8 + width + length


def _dtype(archive: Archive, entry: str, descr: str) -> str | None:
    """torch's name of numpy's dtype code, None for text and dates."""
    code = descr.lstrip("|<>=")
    if descr.startswith(">") and code[1:] != "1":
        raise CheckpointError(
            archive.subject,
            f"the array {entry} is big-endian ({descr}); only little-endian numbers are read.",
            "Save it again with array.astype(array.dtype.newbyteorder('<')).",
        )
    # ml_dtypes' bfloat16 is saved as two bytes without a meaning; weights have no other such type.
    return "bfloat16" if code == "V2" else NUMPY_DTYPES.get(code)
