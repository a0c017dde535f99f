"""Headers of a torch.distributed.checkpoint folder: `.metadata` (a pickle) and *.distcp files.

Megatron-Core's distributed checkpoints are the same. A tensor may lie in many chunks; each chunk is a
torch.save archive somewhere in a .distcp file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attncli.checkpoint.contents import Contents
from attncli.checkpoint.pickle_values import Call, MalformedError, PickledTensor, dtype_name, item_bytes
from attncli.checkpoint.pickles import MAX_PICKLE_BYTES, global_anomalies, read_pickle
from attncli.checkpoint.state_dict import is_optimizer_name, is_training_state_name
from attncli.checkpoint.torchfile import arrays, open_zip
from attncli.errors import CheckpointError
from attncli.records import Anomaly, Array

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where one saved piece of a tensor lies."""

    file: str
    start: int
    size: int


def read(path: Path) -> Contents:
    """The tensors of a distributed checkpoint, in their global shapes.

    A tensor in a single chunk has an offset. Optimizer entries are counted. Chunks in files that do not
    exist are an Anomaly "missing-shard" per file. Errors: `CheckpointError` where `.metadata` is damaged
    or a file is cut short.
    """
    subject = str(path / METADATA)
    try:
        size = (path / METADATA).stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise _damaged(subject, f"it has {size} bytes; at most {MAX_PICKLE_BYTES} are expected.")
        data = (path / METADATA).read_bytes()
    except OSError as error:
        raise _damaged(subject, f"it cannot be read ({error.strerror}).") from error
    pickle = read_pickle(data, subject=subject)
    metadata = _state(pickle.value)
    entries = metadata.get("state_dict_metadata")
    if not isinstance(entries, dict):
        raise _damaged(subject, "it is a pickle, but not the Metadata of torch.distributed.checkpoint.")
    chunks = _chunks(metadata.get("storage_data"), subject)
    excluded: Counter[str] = Counter()
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, entry in entries.items():
        held = _state(entry)
        if not isinstance(name, str) or "size" not in held:
            continue  # bytes: a step count, a config
        if is_optimizer_name(name):
            excluded["optimizer"] += 1
        elif is_training_state_name(name):
            excluded["training state"] += 1
        else:
            tensors[name] = _shape_and_dtype(held, name, subject)
    names = _own_names(list(tensors), metadata.get("planner_data"), bool(excluded))
    missing, sizes = _missing_files(path, chunks)
    seen = list(global_anomalies(pickle.globals, METADATA))
    found = [
        _array(path, names[key], shape, dtype, chunks.get(key, []), sizes, seen)
        for key, (shape, dtype) in tensors.items()
    ]
    return Contents(
        format="torch-distributed",
        root=str(path),
        files=(METADATA, *sorted(sizes)),
        arrays=tuple(found),
        excluded=dict(excluded),
        anomalies=(*seen, *missing),
    )


def _state(value: Any) -> Mapping[str, Any]:
    """The attributes of an inert object."""
    return value.state if isinstance(value, Call) and isinstance(value.state, dict) else {}


def _shape_and_dtype(held: Mapping[str, Any], name: str, subject: str) -> tuple[tuple[int, ...], str]:
    properties = held.get("properties")
    state = properties.state if isinstance(properties, Call) else None
    dtype = (
        state.get("dtype")
        if isinstance(state, dict)
        else state[0]
        if isinstance(state, tuple) and state
        else None
    )
    shape = held["size"]
    try:
        if isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
            return shape, dtype_name(dtype)
    except MalformedError:
        pass
    raise _damaged(subject, f"{name} has no shape and dtype that torch knows.")


def _chunks(storage_data: Any, subject: str) -> dict[str, list[_Chunk]]:
    """The pieces of each entry, by its name."""
    found: dict[str, list[_Chunk]] = {}
    for key, info in storage_data.items() if isinstance(storage_data, dict) else ():
        name, place = _state(key).get("fqn"), _state(info)
        file, start, size = place.get("relative_path"), place.get("offset"), place.get("length")
        if (
            not isinstance(name, str)
            or not isinstance(file, str)
            or type(start) is not int
            or type(size) is not int
        ):
            continue
        if start < 0 or size < 0 or "\0" in file or file.startswith(("/", "\\")) or ".." in Path(file).parts:
            raise _damaged(subject, f"{name} is said to lie in {file!r}, which is outside the checkpoint.")
        found.setdefault(name, []).append(_Chunk(file, start, size))
    return found


def _missing_files(path: Path, chunks: Mapping[str, list[_Chunk]]) -> tuple[list[Anomaly], dict[str, int]]:
    """An anomaly for each file that is not there, and the sizes of those that are."""
    uses = Counter(chunk.file for pieces in chunks.values() for chunk in pieces)
    sizes: dict[str, int] = {}
    missing = []
    for file, count in uses.items():
        if (path / file).is_file():
            sizes[file] = (path / file).stat().st_size
        else:
            missing.append(Anomaly("missing-shard", file, {"file": METADATA, "chunks": count}))
    return missing, sizes


def _array(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    pieces: list[_Chunk],
    sizes: Mapping[str, int],
    seen: list[Anomaly],
) -> Array:
    size = math.prod(shape) * item_bytes(dtype)
    file = pieces[0].file if pieces else METADATA
    for piece in pieces:
        if piece.file in sizes and piece.start + piece.size > sizes[piece.file]:
            raise _damaged(
                str(path / piece.file),
                f"the file is cut short: {name} needs bytes up to {piece.start + piece.size}, "
                f"and it has {sizes[piece.file]}.",
            )
    if len(pieces) == 1 and file in sizes and size:
        whole = _whole(path, pieces[0], name, seen)
        if whole is not None and whole.shape == shape and whole.dtype == dtype:
            return whole
    return Array(name, shape, dtype, file, None, size)


def _whole(path: Path, piece: _Chunk, name: str, seen: list[Anomaly]) -> Array | None:
    """The one tensor in a chunk; None where it was transformed (compressed) on its way to the file."""
    with (path / piece.file).open("rb") as file:
        file.seek(piece.start)
        if file.read(4) != b"PK\x03\x04":
            return None
        saved = open_zip(file, str(path / piece.file), piece.file, start=piece.start, size=piece.size)
        seen += saved.anomalies
        if not isinstance(saved.root, PickledTensor):
            return None
        return arrays({name: saved.root}, saved.locate, str(path / piece.file), piece.file)[0]


def _own_names(names: list[str], planner_data: Any, has_siblings: bool) -> dict[str, str]:
    """The names without the key under which the model's state dict was saved ("model", "app").

    The planner recorded how names were flattened: ("model", "h.0.weight") had a container,
    ("model.h.0.weight",) had none. Without that record a first segment that all names share goes only if
    it is "app" or "state_dict", or "model" beside other things that were saved.
    """
    recorded = planner_data if isinstance(planner_data, dict) else {}
    paths: dict[str, tuple[str, ...]] = {}
    for name in names:
        path = recorded.get(name)
        if isinstance(path, tuple) and path and all(isinstance(part, (str, int)) for part in path):
            paths[name] = tuple(str(part) for part in path)
        else:
            head, _, rest = name.partition(".")
            whole = head not in ("app", "state_dict") and not (head == "model" and has_siblings)
            paths[name] = (name,) if whole or not rest or recorded else (head, rest)
    while len({path[0] for path in paths.values()}) == 1 and all(len(path) > 1 for path in paths.values()):
        if next(iter(paths.values()))[0] not in _CONTAINERS:
            break
        paths = {name: path[1:] for name, path in paths.items()}
    return {name: ".".join(path) for name, path in paths.items()}


def _damaged(subject: str, problem: str) -> CheckpointError:
    return CheckpointError(
        subject, problem, "Copy the whole folder again; if that changes nothing, save the checkpoint again."
    )


_CONTAINERS = frozenset(
    {"model", "app", "state_dict", "module", "model_state_dict", "state", "net", "params", "weights"}
)
