"""Path → tensor names, shapes and dtypes from headers alone; values only on demand (`values.py`).

No torch, nothing unpickled that could run code, no tensor data. The formats are rows in `formats.py`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from attncli.checkpoint.adapters import join_lora
from attncli.checkpoint.contents import Contents
from attncli.checkpoint.folder import configs_beside, missing_shards, read_folder, read_index
from attncli.checkpoint.formats import read_file
from attncli.checkpoint.quantized import logical_tensors
from attncli.checkpoint.wrappers import strip_wrappers
from attncli.errors import CheckpointError
from attncli.records import Array, Checkpoint, Config

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, a file or a folder. Errors: `CheckpointError` with what was found and what to try."""
    location = Path(path)
    try:
        if not location.exists():
            raise CheckpointError(str(path), "there is no such file or folder.", _near(location))
        if location.is_dir():
            contents = read_folder(location)
        elif location.name.endswith(".index.json"):
            contents = read_index(location)
        elif location.is_file():
            contents = read_file(location)
        else:
            raise CheckpointError(
                str(path), "this is neither a file nor a folder.", "Give a checkpoint file or a model folder."
            )
    except PermissionError as error:
        raise CheckpointError(
            str(error.filename or path),
            "no permission to read it.",
            "Change its permissions, or run as a user who may read it.",
        ) from error
    except OSError as error:
        raise CheckpointError(
            str(error.filename or path),
            f"it cannot be read ({error.strerror or error}).",
            "Check the path and the disk.",
        ) from error
    return _joined(location, contents)


def _joined(location: Path, contents: Contents) -> Checkpoint:
    missing = [anomaly.subject for anomaly in contents.anomalies if anomaly.kind == "missing-shard"]
    if missing:
        raise missing_shards(location, missing, len(contents.files) + len(missing))
    beside, broken = configs_beside(location if location.is_dir() else location.parent)
    configs = (*beside, *contents.configs)
    names = strip_wrappers([array.name for array in contents.arrays])
    arrays = [
        array if array.name == name else replace(array, name=name)
        for array, name in zip(contents.arrays, names, strict=True)
    ]
    adapted, rest = join_lora(arrays)
    tensors, unknown = logical_tensors(rest, configs, lambda array: _small_bytes(contents.root, array))
    root = Path(contents.root)
    return Checkpoint(
        path=str(location),
        root=contents.root,
        kind="folder" if location.is_dir() else "file",
        format=contents.format,
        files=contents.files,
        size_bytes=sum((root / file).stat().st_size for file in contents.files),
        tensors=(*tensors, *adapted),
        configs=_without_duplicates(configs),
        excluded=contents.excluded,
        anomalies=(*contents.anomalies, *broken, *unknown),
    )


def _small_bytes(root: str, array: Array) -> bytes:
    """The bytes of an array that describes another one (a stored shape, a quantisation state)."""
    if array.offset is None or array.size_bytes > _MAX_DESCRIPTION_BYTES:
        return b""
    with (Path(root) / array.file).open("rb") as file:
        file.seek(array.offset)
        return file.read(array.size_bytes)


def _without_duplicates(configs: tuple[Config, ...]) -> tuple[Config, ...]:
    kept: list[Config] = []
    for config in configs:
        if config not in kept:
            kept.append(config)
    return tuple(kept)


def _near(path: Path) -> str:
    """A name in the same folder that the user may have meant."""
    import difflib

    parent = path.parent
    if parent.is_dir():
        close = difflib.get_close_matches(path.name, os.listdir(parent), n=1)
        if close:
            return f"Did you mean {parent / close[0]}?"
        return "Check the path."
    return f"The folder {parent} does not exist either."


_MAX_DESCRIPTION_BYTES = 1 << 20
