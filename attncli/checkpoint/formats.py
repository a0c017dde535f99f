"""Which format a file is, told by its bytes: a row per format that is read, a row per format only named.

The suffix decides nothing; it is used once, to word an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from attncli.checkpoint import safetensors
from attncli.checkpoint.contents import Contents
from attncli.errors import CheckpointError, UnsupportedFormatError


class Head:
    """The first bytes of a file, and the member names if it is a zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file:
            self.start = file.read(4096)

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Names in the zip's central directory; () when it is no zip or a broken one."""
        if not self.start.startswith(b"PK"):
            return ()
        import zipfile

        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return ()

    def has_member(self, pattern: str) -> bool:
        return any(re.search(pattern, name) for name in self.members)


class Format(NamedTuple):
    name: str
    recognised: Callable[[Head], bool]
    read: Callable[[Path], Contents]


class Foreign(NamedTuple):
    """A format attncli names but does not read, and what to do instead."""

    name: str
    recognised: Callable[[Head], bool]
    remedy: str


def read_file(path: Path) -> Contents:
    """The contents of one file, whatever its suffix."""
    head = Head(path)
    if head.size == 0:
        raise CheckpointError(str(path), "the file is empty.", "Download or copy it again.")
    for known in FORMATS:
        if known.recognised(head):
            return known.read(path)
    for foreign in FOREIGN:
        if foreign.recognised(head):
            raise UnsupportedFormatError(
                str(path), f"this is {foreign.name}, which attncli does not read.", foreign.remedy
            )
    if head.start.startswith(b"PK"):
        problem = "this is a zip archive, but " + (
            "none of its members is a known kind of weights."
            if head.members
            else "its directory of members is missing or damaged."
        )
        raise CheckpointError(
            str(path), problem, "If it should be a checkpoint, it is truncated: download or copy it again."
        )
    suffix = path.suffix.lower()
    expected = {".safetensors": "a length and a JSON header", ".gguf": "the letters GGUF"}.get(suffix)
    begins = f"{head.start[:8]!r}"
    problem = f"the file begins with {begins}, which is no known checkpoint format" + (
        f"; {suffix} should begin with {expected}." if expected else "."
    )
    raise CheckpointError(str(path), problem, f"Known formats: {', '.join(known.name for known in FORMATS)}.")


def _reader(room: str, function: str = "read") -> Callable[[Path], Contents]:
    """A reader that is imported when a file needs it: start-up is paid on every call, readers are many."""

    def read(path: Path) -> Contents:
        found: Callable[[Path], Contents] = getattr(import_module(f"attncli.checkpoint.{room}"), function)
        return found(path)

    return read


def _is_text(head: Head) -> bool:
    try:
        text = head.start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head.start) - 3:
            return False
        text = head.start[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\n\r\t\f" for character in text)


def _is_saved_model(head: Head) -> bool:
    # protobuf field 1 (schema version 1), then a meta graph, whose own first field is its MetaInfoDef
    return re.match(rb"\x08\x01\x12[\x80-\xff]{1,4}[\x00-\x7f]\x0a", head.start, re.DOTALL) is not None


def _is_msgpack_map(head: Head) -> bool:
    # a map (of at most 15 entries, or of at most 65535) that begins with a short word: the name of a module
    return re.match(rb"([\x81-\x8f]|\xde..)([\xa1-\xbf]|\xd9.)[A-Za-z_]", head.start, re.DOTALL) is not None


def _is_onnx(head: Head) -> bool:
    start = head.start
    # protobuf field 1 (ir_version, small), then producer_name, opset or graph
    return (
        start[:1] == b"\x08"
        and len(start) > 2
        and 1 <= start[1] <= 32
        and start[2] in (0x12, 0x3A, 0x42, 0x1A)
    )


def _is_ctranslate2(head: Head) -> bool:
    start = head.start
    if len(start) < 8 or int.from_bytes(start[:4], "little") > 64:
        return False
    length = int.from_bytes(start[4:6], "little")
    return 4 < length < 100 and b"Spec" in start[6 : 6 + length]


def _starts(*magics: bytes) -> Callable[[Head], bool]:
    return lambda head: head.start.startswith(magics)


# --- tables -------------------------------------------------------------------------------------------

_LEGACY_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."

FORMATS: tuple[Format, ...] = (
    Format(
        "safetensors",
        lambda head: safetensors.looks_like(head.start) and not head.start[:8].isspace(),
        safetensors.read,
    ),
    Format("GGUF", _starts(b"GGUF", b"FUGG"), _reader("gguf")),
    Format(
        "torch.export archive",
        lambda head: head.has_member(
            r"(^|/)archive_format$|(^|/)serialized_exported_program\.json$|(^|/)data/weights/.*config\.json$"
        ),
        _reader("export"),
    ),
    Format(
        "torch zip file", lambda head: head.has_member(r"(^|/)data\.pkl$"), _reader("torchfile", "read_zip")
    ),
    Format(
        "legacy torch file",
        lambda head: (
            head.start.startswith(_LEGACY_TORCH)
            or b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head.start[:24]
        ),
        _reader("torchfile", "read_legacy"),
    ),
    Format("npz", lambda head: head.has_member(r"\.npy$"), _reader("npz")),
)

FOREIGN: tuple[Foreign, ...] = (
    Foreign(
        "a Git LFS pointer, not the weights",
        _starts(b"version https://git-lfs"),
        "Run `git lfs pull` in that repository, or download the file itself.",
    ),
    Foreign(
        "an HTML page, not a checkpoint",
        lambda head: bool(re.match(rb"\s*<(!doctype|html)", head.start, re.I)),
        "The download returned a web page (often a login or error page): download the file itself.",
    ),
    Foreign(
        "an HDF5 file (Keras or TensorFlow)",
        _starts(b"\x89HDF\r\n"),
        "Load the model in its framework and save its weights with the safetensors library.",
    ),
    Foreign(
        "a TensorFlow Lite model",
        lambda head: head.start[4:8] == b"TFL3",
        "Give the checkpoint that it was converted from.",
    ),
    Foreign(
        "a CTranslate2 model",
        _is_ctranslate2,
        "Give the Hugging Face or OpenNMT checkpoint that it was converted from.",
    ),
    Foreign(
        "a TensorFlow SavedModel",
        _is_saved_model,
        "Convert it to a PyTorch or safetensors checkpoint.",
    ),
    Foreign(
        "a Flax checkpoint (msgpack)",
        _is_msgpack_map,
        "Convert it: load with from_flax=True in transformers and save_pretrained.",
    ),
    Foreign(
        "an ONNX model",
        _is_onnx,
        "Give the PyTorch checkpoint that it was exported from; its graph renames the weights.",
    ),
    Foreign(
        "a torch.package archive",
        lambda head: head.has_member(r"(^|/)\.data/extern_modules$"),
        "Load it with torch.package and save model.state_dict() with safetensors or torch.save.",
    ),
    Foreign(
        "a Keras archive",
        lambda head: head.has_member(r"model\.weights\.h5$"),
        "Convert it to safetensors from Keras.",
    ),
    Foreign(
        "a GGML file from before GGUF",
        _starts(b"lmgg", b"tjgg", b"fmgg", b"algg"),
        "Convert it to GGUF with llama.cpp's convert scripts.",
    ),
    Foreign(
        "a single NumPy array",
        _starts(b"\x93NUMPY"),
        "A checkpoint needs names: save the arrays together with numpy.savez.",
    ),
    Foreign(
        "a torch file from before version 0.1.10 (tar)",
        lambda head: head.start[257:262] == b"ustar",
        "Unpack it if it is an archive of a checkpoint; if it is an old torch file, load it with torch and "
        "save it again.",
    ),
    Foreign(
        "a compressed file",
        _starts(b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"BZh", b"Rar!"),
        "Unpack it first and give the checkpoint inside.",
    ),
    Foreign(
        "a bare pickle",
        lambda head: (
            head.start[:1] == b"\x80" and head.start[1:2] in b"\x02\x03\x04\x05" and len(head.start) > 1
        ),
        "attncli reads pickles only inside torch files: load it where you trust it, and save the arrays with "
        "torch.save or safetensors.",
    ),
    Foreign("a text file", _is_text, "Give the file that holds the weights, or the folder of the model."),
)

FOLDER_FORMATS: tuple[tuple[str, str, Callable[[Path], Contents]], ...] = (
    ("distributed checkpoint", ".metadata", _reader("distributed")),
)
