"""Path → tensor names, shapes and dtypes from headers alone; values only on demand (`values.py`).

No torch, nothing unpickled that could run code, no tensor data. The formats are rows in `formats.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from attncli.checkpoint.adapters import join_lora
from attncli.checkpoint.contents import Contents
from attncli.checkpoint.folder import FETCH_AGAIN, configs_beside, missing_shards, read_folder, read_index
from attncli.checkpoint.formats import read_file
from attncli.checkpoint.quantized import logical_tensors
from attncli.checkpoint.wrappers import strip_wrappers
from attncli.errors import CheckpointError
from attncli.records import Array, Checkpoint, Config

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, a file or a folder. Errors: `CheckpointError`."""
    if not str(path):
        raise CheckpointError("''", "the path is empty.", "Give a checkpoint file or a model folder.")
    location = Path(path)
    try:
        if location.is_symlink() and not location.exists():
            raise CheckpointError(
                str(path), f"this is a link to {location.readlink()}, which is not there.", FETCH_AGAIN
            )
        if not location.exists():
            raise CheckpointError(str(path), "there is no such file or folder.", _near(location))
        if location.is_dir():
            contents = read_folder(location)
        elif not location.is_file():
            # A pipe or a device could keep its reader waiting for ever.
            raise CheckpointError(
                str(path), "this is neither a file nor a folder.", "Give a checkpoint file or a model folder."
            )
        elif location.name.endswith(".index.json"):
            contents = read_index(location)
        else:
            contents = read_file(location)
        return _joined(location, contents)
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


def _joined(location: Path, contents: Contents) -> Checkpoint:
    missing = [anomaly.subject for anomaly in contents.anomalies if anomaly.kind == "missing-shard"]
    if missing:
        raise missing_shards(location, missing, len(contents.files) + len(missing))
    _check_names(location, contents.arrays)
    beside, broken = (
        configs_beside(location) if location.is_dir() else configs_beside(location.parent, location.name)
    )
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


def _check_names(location: Path, arrays: Sequence[Array]) -> None:
    longest = max(arrays, key=lambda array: len(array.name), default=None)
    if longest is not None and len(longest.name) > _MAX_NAME_CHARS:
        raise CheckpointError(
            str(location),
            f"the name of a tensor in {longest.file} has {len(longest.name)} characters; at most "
            f"{_MAX_NAME_CHARS} are expected.",
            "Do not trust this checkpoint: no framework writes such a name.",
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
        names = [entry.name for entry in islice(parent.iterdir(), _MAX_COMPARED)]
        close = difflib.get_close_matches(path.name, names, n=1)
        if close:
            return f"Did you mean {parent / close[0]}?"
        return "Check the path."
    if re.match(r"[a-z]+:/", str(path)) or (len(path.parts) == 2 and not path.is_absolute()):
        return "A model on a hub has to be downloaded first: attncli reads files and folders of this machine."
    return f"The folder {parent} does not exist either."


_MAX_DESCRIPTION_BYTES = 1 << 20
# The longest names of real models have some 200 characters; what reads names takes time that grows faster.
_MAX_NAME_CHARS = 4096
_MAX_COMPARED = 2000
