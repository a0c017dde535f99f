"""Headers of torch.export archives (.pt2).

torch >= 2.9 writes each weight as raw bytes beside a JSON table of names, shapes and strides; 2.7 and 2.8
put a torch.save archive among the weights, older ones beside the program. AOTInductor packages hold compiled
code and no names.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from attncli.checkpoint.contents import Contents
from attncli.checkpoint.pickle_values import ITEM_BYTES, PickledTensor, is_contiguous
from attncli.checkpoint.torchfile import arrays, open_zip, selection
from attncli.checkpoint.torchzip import Archive
from attncli.errors import CheckpointError, UnsupportedFormatError
from attncli.records import Anomaly, Array

MAX_JSON_BYTES = 64 << 20
_WEIGHTS = "data/weights/"
_CONFIG = "_weights_config.json"


def read(path: Path) -> Contents:
    """The state dict of an exported program; lifted constants are counted as "constant".

    Errors: `CheckpointError` where the archive is damaged, `UnsupportedFormatError` where it holds no
    state dict. Several models in one archive have their names as prefix.
    """
    with path.open("rb") as file:
        archive = Archive(file, str(path))
        if not (archive.enter("archive_format") or archive.enter("serialized_exported_program.json")):
            archive.enter("version")
        names = archive.names()
        tables = [n for n in names if n.startswith(_WEIGHTS) and n.endswith(_CONFIG)]
        saved = [n for n in names if n.startswith(_WEIGHTS) and n.endswith(".pt")]
        saved += [n for n in names if n in ("serialized_state_dict.pt", "serialized_state_dict.json")]
        found: list[Array] = []
        anomalies: list[Anomaly] = []
        excluded: dict[str, int] = {}
        for table in tables:
            model = table[len(_WEIGHTS) : -len(_CONFIG)]
            found += _from_table(archive, table, path.name, f"{model}." if len(tables) > 1 else "")
        for entry in saved:
            model = entry[len(_WEIGHTS) : -len(".pt")]
            prefix = f"{model}." if len(saved) > 1 else ""
            more, seen = _from_saved(archive, entry, path.name, prefix)
            found += more
            anomalies += seen
        if not tables and not saved:
            _refuse(archive, names)
        lifted = [
            n for n in names if n.startswith("data/constants/") and n.endswith("_constants_config.json")
        ]
        constants = sum(len(_table(archive, table)) for table in lifted)
        if constants:
            excluded["constant"] = constants
    return Contents(
        format="torch-export",
        root=str(path.parent),
        files=(path.name,),
        arrays=tuple(found),
        excluded=excluded,
        anomalies=tuple(anomalies),
    )


def _from_table(archive: Archive, table: str, file: str, prefix: str) -> list[Array]:
    made = []
    for name, payload in _table(archive, table).items():
        meta = payload.get("tensor_meta") if isinstance(payload, dict) else None
        if not isinstance(meta, dict):
            continue  # a custom object
        shape, strides = _ints(archive, meta.get("sizes")), _ints(archive, meta.get("strides"))
        (skip,) = _ints(archive, [meta.get("storage_offset", {"as_int": 0})])
        code = meta.get("dtype")
        dtype = _SCALAR_TYPES.get(code) if isinstance(code, int) else None
        if dtype is None or len(shape) != len(strides):
            raise archive.error(f"{table} gives {name} a dtype or strides that torch.export never writes.")
        kept = None if is_contiguous(shape, strides) or 0 in shape else strides
        width = ITEM_BYTES[dtype]
        size = PickledTensor(None, 0, shape, kept, dtype).span * width
        offset = None
        if not payload.get("use_pickle") and meta.get("layout") == _STRIDED:
            entry = f"{_WEIGHTS}{payload.get('path_name')}"
            available = archive.size_of(entry)
            if available is None or skip * width + size > available:
                raise archive.error(
                    f"{name} {list(shape)} needs {skip * width + size} bytes; {entry} has {available or 0}."
                )
            base = archive.offset_of(entry)
            offset = None if base is None or not size else base + skip * width
        else:
            size = math.prod(shape) * width
        made.append(Array(prefix + name, shape, dtype, file, offset, size, kept))
    return made


def _from_saved(
    archive: Archive, entry: str, file: str, prefix: str
) -> tuple[list[Array], tuple[Anomaly, ...]]:
    """The state dict that lies as a torch.save archive inside this archive."""
    start = archive.offset_of(entry)
    if start is None:
        raise archive.error(f"the entry {entry} is compressed, which torch.export never does.")
    saved = open_zip(archive.file, archive.subject, file, start=start, size=archive.size_of(entry))
    chosen = selection(saved, archive.subject).tensors
    named = {prefix + name: tensor for name, tensor in chosen.items()}
    return list(arrays(named, saved.locate, archive.subject, file)), saved.anomalies


def _table(archive: Archive, name: str) -> dict[str, Any]:
    try:
        table = json.loads(archive.read(name, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise archive.error(f"{name} is no valid JSON ({error}).") from error
    config = table.get("config") if isinstance(table, dict) else None
    if not isinstance(config, dict):
        raise archive.error(f"{name} has no table of weights under the key config.")
    return config


def _ints(archive: Archive, values: Any) -> tuple[int, ...]:
    found: list[int] = []
    for value in values if isinstance(values, list) else ():
        number = value.get("as_int") if isinstance(value, dict) else value
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise archive.error("a weight has a size that is no plain number.")
        found.append(number)
    return tuple(found)


def _refuse(archive: Archive, names: list[str]) -> None:
    if any("aotinductor" in name for name in names):
        raise UnsupportedFormatError(
            archive.subject,
            "this is an AOTInductor package: compiled code whose weights have no names and shapes.",
            "Give the exported program it was compiled from (torch.export.save), or a state dict.",
        )
    if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in names):
        raise CheckpointError(
            archive.subject,
            "this torch.export archive holds a program without weights.",
            "Save it again with torch.export.save, which stores the weights beside the program.",
        )
    raise archive.error("the zip archive holds no program of torch.export.")


_STRIDED = 7
# torch._export.serde.schema.ScalarType
_SCALAR_TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
