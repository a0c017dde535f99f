"""Headers of what torch.save and torch.jit.save write: names, shapes, dtypes and where the bytes lie.

Three containers: the zip archive (torch >= 1.6), the stream of pickles before it, and TorchScript archives.
No tensor data is read and torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from attncli.checkpoint.contents import Contents
from attncli.checkpoint.pickle_values import (
    Call,
    Global,
    PickledTensor,
    Storage,
    item_bytes,
    storage_record,
)
from attncli.checkpoint.pickles import MAX_PICKLE_BYTES, global_anomalies, read_pickle
from attncli.checkpoint.state_dict import Selection, module_tensors, select
from attncli.checkpoint.torchzip import Archive
from attncli.errors import CheckpointError, UnsupportedFormatError
from attncli.records import Anomaly, Array

MAGIC = 0x1950A86A20F9469CFC6C

# Absolute byte offset of a storage's first element and its size in bytes; None where there are no bytes.
Locate = Callable[[Storage], "tuple[int | None, int] | None"]


@dataclass(frozen=True, slots=True)
class Saved:
    """One torch.save'd object as it lies in a file: the inert object, and where its storages are."""

    root: Any
    locate: Locate
    anomalies: tuple[Anomaly, ...]
    scripted: bool = False


def read_zip(path: Path) -> Contents:
    """The weights in a zip archive of torch.save, or in a TorchScript archive.

    Errors: `CheckpointError` where the file is damaged, `UnsupportedFormatError` for a pickled module or a
    torch.package archive.
    """
    with path.open("rb") as file:
        saved = open_zip(file, str(path), path.name)
        return _contents(path, saved, "torchscript" if saved.scripted else "torch")


def read_legacy(path: Path) -> Contents:
    """The weights in a file that torch.save wrote before 1.6, or since then with the old serialization.

    Errors: as `read_zip`.
    """
    import mmap

    subject = str(path)
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise _damaged(subject, "the file is empty.") from error
        with data:
            return _contents(path, open_legacy(data, subject, path.name), "torch-legacy")


def open_zip(file: BinaryIO, subject: str, name: str, *, start: int = 0, size: int | None = None) -> Saved:
    """The object in the torch.save or TorchScript archive in `size` bytes of `file` from `start`."""
    archive = Archive(file, subject, start=start, size=size)
    if not archive.enter("data.pkl"):
        _refuse_without_data(archive)
    if ".data/extern_modules" in archive or ".data/python_version" in archive:
        raise UnsupportedFormatError(
            subject, "this is a torch.package archive, which holds code.", _SAVE_STATE_DICT
        )
    if "byteorder" in archive and archive.read("byteorder", 64).strip() == b"big":
        raise _big_endian(subject)
    pickle = read_pickle(
        archive.read("data.pkl", MAX_PICKLE_BYTES), subject=subject, persistent=storage_record
    )
    scripted = "constants.pkl" in archive
    found: dict[str, tuple[int | None, int]] = {}

    def locate(storage: Storage) -> tuple[int | None, int] | None:
        if storage.location == "meta":
            return None
        place = found.get(storage.key)
        if place is None:
            entry = f"data/{storage.key}"
            offset = archive.offset_of(entry)
            place = found[storage.key] = (offset, archive.size_of(entry) or 0)
        return place

    anomalies = global_anomalies(pickle.globals, name, ("__torch__.",) if scripted else ())
    return Saved(pickle.value, locate, anomalies, scripted)


def open_legacy(data: Any, subject: str, name: str, *, start: int = 0, end: int | None = None) -> Saved:
    """The object in the stream of five pickles and raw storages in `data[start:end]` (bytes or a map)."""
    end = len(data) if end is None else end
    if data[start : start + 1] != b"\x80":
        raise _damaged(subject, "this is no file of torch.save: it should begin with a pickle.")
    magic = read_pickle(data, subject=subject, start=start)
    if type(magic.value) is not int or magic.value != MAGIC:
        raise UnsupportedFormatError(
            subject,
            "this is a pickle, but not one of torch.save: its magic number is missing.",
            "Load it where it came from and save its weights with torch.save or safetensors.",
        )
    version = read_pickle(data, subject=subject, start=magic.end)
    if type(version.value) is not int or version.value != 1001:
        raise _damaged(subject, "the file has an unknown protocol version; 1001 is the only one there is.")
    system = read_pickle(data, subject=subject, start=version.end)
    if isinstance(system.value, dict) and system.value.get("little_endian") is False:
        raise _big_endian(subject)
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage | Global:
        record = storage_record(pid)
        if isinstance(record, Storage):
            storages.setdefault(record.key, record)
        return record

    tree = read_pickle(data, subject=subject, start=system.end, persistent=persistent)
    keys = read_pickle(data, subject=subject, start=tree.end)
    if not isinstance(keys.value, list):
        raise _damaged(subject, "the list of storages is missing after the pickled object.")
    found = _walk_storages(data, subject, keys.value, storages, keys.end, end)

    def locate(storage: Storage) -> tuple[int | None, int] | None:
        place = found.get(storage.key)
        if place is None and storage.location != "meta":
            raise _damaged(subject, f"storage {storage.key} is used by a tensor, but not in the file.")
        return place

    return Saved(tree.value, locate, global_anomalies(tree.globals, name))


def arrays(tensors: dict[str, PickledTensor], locate: Locate, subject: str, file: str) -> tuple[Array, ...]:
    """Each tensor as an array: `size_bytes` runs from its first to its last element, so that strides fit.

    Errors: `CheckpointError` where a tensor reaches beyond its storage.
    """
    made = []
    for name, tensor in tensors.items():
        width = item_bytes(tensor.dtype)
        size = tensor.span * width
        offset = None
        storage = tensor.storage
        place = None if storage is None else locate(storage)
        if storage is None or place is None:
            size = math.prod(tensor.shape) * width
        else:
            # Storages count in their own elements, tensors that view them in theirs.
            skip = tensor.offset * width + storage.view_offset * item_bytes(storage.dtype)
            base, available = place
            if size and skip + size > available:
                raise _damaged(
                    subject,
                    f"tensor {name} {list(tensor.shape)} needs bytes {skip} to {skip + size} of its storage, "
                    f"which has {available}.",
                )
            offset = None if base is None or not size else base + skip
        made.append(Array(name, tensor.shape, tensor.dtype, file, offset, size, tensor.strides))
    return tuple(made)


def selection(saved: Saved, subject: str) -> Selection:
    """The weights of a saved object. Errors: `UnsupportedFormatError` for a pickled module."""
    if saved.scripted:
        return Selection(module_tensors(saved.root, subject))
    if isinstance(saved.root, Call) and saved.root.is_module:
        raise UnsupportedFormatError(
            subject,
            f"this is a whole pickled module of class {saved.root.path}, which needs its own code.",
            _SAVE_STATE_DICT,
        )
    return select(saved.root, subject)


# --- helpers --------------------------------------------------------------------------------------------


def _contents(path: Path, saved: Saved, container: str) -> Contents:
    chosen = selection(saved, str(path))
    doubled = (Anomaly("duplicate-tensor", name, {"file": path.name}) for name in chosen.doubled)
    return Contents(
        format=container,
        root=str(path.parent),
        files=(path.name,),
        arrays=arrays(chosen.tensors, saved.locate, str(path), path.name),
        configs=chosen.configs,
        excluded=chosen.excluded,
        anomalies=(*saved.anomalies, *doubled),
    )


def _walk_storages(
    data: Any, subject: str, keys: list[Any], storages: dict[str, Storage], at: int, end: int
) -> dict[str, tuple[int | None, int]]:
    """Where each storage's bytes lie: each is a count of elements (u64) and then the bytes."""
    found: dict[str, tuple[int | None, int]] = {}
    for key in keys:
        storage = storages.get(str(key)) if isinstance(key, (str, int)) else None
        if storage is None:
            raise _damaged(subject, "the list of storages names one that no tensor uses.")
        count = int.from_bytes(data[at : at + 8], "little")
        size = count * item_bytes(storage.dtype)
        if at + 8 + size > end:
            raise _damaged(
                subject,
                f"the file is cut short: storage {storage.key} needs {size} bytes, "
                f"{max(0, end - at - 8)} are left.",
            )
        found[storage.key] = (at + 8, size)
        at += 8 + size
    return found


def _refuse_without_data(archive: Archive) -> None:
    if archive.enter("archive_format"):
        raise UnsupportedFormatError(
            archive.subject, "this is a torch.export archive.", "Give its name the ending .pt2."
        )
    if archive.enter("model.json"):
        raise UnsupportedFormatError(
            archive.subject,
            "this is a TorchScript archive of torch 1.0 to 1.3.",
            "Load and save it again with a newer torch.",
        )
    raise archive.error("the zip archive has no data.pkl, which torch.save always writes.")


def _damaged(subject: str, problem: str) -> CheckpointError:
    return CheckpointError(
        subject, problem, "Copy or download the file again; if that changes nothing, save it again."
    )


def _big_endian(subject: str) -> CheckpointError:
    return CheckpointError(
        subject,
        "the file was written on a big-endian machine; only little-endian numbers are read.",
        "Load it with torch.load and save it again on a little-endian machine (x86 or ARM).",
    )


_SAVE_STATE_DICT = (
    "Load it with its own code and save the weights alone: torch.save(model.state_dict(), path)."
)
