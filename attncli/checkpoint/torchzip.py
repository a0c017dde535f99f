"""A zip archive seen as named byte ranges of the file it lies in. Nothing is ever extracted.

An archive may itself lie inside another file (a shard of torch.distributed.checkpoint, an entry of an older
torch.export archive), so it begins at any byte. `zipfile` is imported where it is used: its import costs
more than reading a header.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, BinaryIO

from attncli.errors import CheckpointError

if TYPE_CHECKING:
    import zipfile

MAX_ENTRIES = 500_000
MAX_RATIO = 200


class Archive:
    """The entries of the zip archive in `size` bytes of `file` from `start`. `prefix` is the folder that
    holds the entry `marker` ("mymodel/" for "mymodel/data.pkl"), "" without one.

    Errors: `CheckpointError` where it is no zip archive, cut short, encrypted or has too many entries.
    """

    def __init__(self, file: BinaryIO, subject: str, *, start: int = 0, size: int | None = None) -> None:
        import zipfile

        self.subject = subject
        self.file = file
        self.start = start
        self.size = file.seek(0, 2) - start if size is None else size
        try:
            self._zip = zipfile.ZipFile(io.BufferedReader(Slice(file, start, self.size)))
        except _zip_errors() as error:
            raise self.error(
                f"this is no readable zip archive ({error}): its directory should stand at its end."
            ) from error
        infos = self._zip.infolist()
        if len(infos) > MAX_ENTRIES:
            raise self.error(
                f"the zip archive lists {len(infos)} entries; at most {MAX_ENTRIES} are expected."
            )
        # A folder above all entries, as torch.save writes it, is not part of their names here.
        self.entries: dict[str, zipfile.ZipInfo] = {info.filename: info for info in infos}
        self.prefix = ""

    def enter(self, marker: str) -> bool:
        """Whether some folder holds the entry `marker`; from then on names are relative to that folder."""
        found = [name for name in self.entries if name == marker or name.endswith("/" + marker)]
        if not found:
            return False
        self.prefix = min(found, key=lambda name: (name.count("/"), name))[: -len(marker)]
        return True

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.entries

    def names(self) -> list[str]:
        """All names below `prefix`, without it."""
        return [name[len(self.prefix) :] for name in self.entries if name.startswith(self.prefix)]

    def size_of(self, name: str) -> int | None:
        """Bytes of an entry's content, None where there is no such entry."""
        info = self.entries.get(self.prefix + name)
        return None if info is None else info.file_size

    def read(self, name: str, limit: int) -> bytes:
        """The content of a small entry.

        Errors: `CheckpointError` above `limit` bytes, or if it unpacks to more than 200 times its size in
        the file.
        """
        info = self.entries.get(self.prefix + name)
        if info is None:
            raise self.error(f"the zip archive has no entry {name}.")
        if info.file_size > limit:
            raise self.error(f"the entry {name} has {info.file_size} bytes; at most {limit} are expected.")
        if info.file_size > max(1 << 20, MAX_RATIO * info.compress_size):
            raise self.error(
                f"the entry {name} unpacks from {info.compress_size} to {info.file_size} bytes: a zip bomb."
            )
        try:
            with self._zip.open(info) as stream:
                data = stream.read(info.file_size + 1)
        except _zip_errors() as error:
            raise self.error(f"the entry {name} of the zip archive is damaged ({error}).") from error
        if len(data) != info.file_size:
            raise self.error(f"the entry {name} has {len(data)} bytes, not {info.file_size} as announced.")
        return data

    def head(self, name: str, size: int) -> bytes:
        """At most the first `size` bytes of an entry's content."""
        info = self.entries.get(self.prefix + name)
        if info is None:
            raise self.error(f"the zip archive has no entry {name}.")
        try:
            with self._zip.open(info) as stream:
                return stream.read(size)
        except _zip_errors() as error:
            raise self.error(f"the entry {name} of the zip archive is damaged ({error}).") from error

    def offset_of(self, name: str) -> int | None:
        """First byte of an entry's content in the file, None where it is compressed.

        Errors: `CheckpointError` where there is no such entry or it lies outside the file.
        """
        info = self.entries.get(self.prefix + name)
        if info is None:
            raise self.error(f"the zip archive has no entry {name}.")
        if info.compress_type != 0 or info.flag_bits & 1:
            return None
        header = b""
        if 0 <= info.header_offset < self.size:
            self.file.seek(self.start + info.header_offset)
            header = self.file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise self.error(f"the entry {name} has no header where the archive's directory says.")
        name_size, extra_size = struct.unpack_from("<HH", header, 26)
        offset = info.header_offset + 30 + name_size + extra_size
        if offset + info.file_size > self.size:
            raise self.error(f"the entry {name} ends beyond the end of the file: the file was cut short.")
        return int(self.start + offset)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(
            self.subject, problem, "Copy or download the file again; if that changes nothing, save it again."
        )


class Slice(io.RawIOBase):
    """Read-only view of `size` bytes of `file` from `start`."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise OSError("seek before the start of the archive")
        self._at = at
        return at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(view), self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _zip_errors() -> tuple[type[Exception], ...]:
    """What `zipfile` raises for archives that are damaged, encrypted or of a kind it does not read."""
    import zipfile

    return (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        OverflowError,
        KeyError,
        IndexError,
        struct.error,
        zlib.error,
    )
