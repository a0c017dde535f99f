"""Text → stdout or a file, whatever becomes of the reader, the disk or the process on the way."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from attncli.errors import UsageError


def write(text: str, file: Path) -> None:
    """Writes all of `text` or nothing: a reader never meets half a report. Errors: `UsageError`."""
    try:
        _write(text, file)
    except OSError as error:
        raise UsageError(
            str(file),
            f"the report cannot be written there ({error.strerror}).",
            "Give a file in an existing folder.",
        ) from error


def write_stdout(text: str, *, as_json: bool = False) -> None:
    """Writes to stdout; a reader that went away is no error. Errors: `UsageError` where the disk is full."""
    with reader():
        sys.stdout.write(_escaped(text) if as_json else text)
        sys.stdout.flush()


@contextlib.contextmanager
def reader() -> Iterator[None]:
    """What is printed inside has a reader that may go away."""
    try:
        yield
    except BrokenPipeError:
        silence_stdout()
    except OSError as error:
        silence_stdout()
        raise UsageError(
            "stdout",
            f"the report cannot be written ({error.strerror}).",
            "Check the disk, or write to a file with -o.",
        ) from error


def silence_stdout() -> None:
    """Nobody can read on: what is left in the buffer goes nowhere, so that the interpreter ends quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(text: str, file: Path) -> None:
    data = text.encode("utf-8", "backslashreplace")
    target = file.resolve()  # a symbolic link stays one
    mode = None
    with contextlib.suppress(OSError):
        mode = target.stat().st_mode
    if mode is not None and not stat.S_ISREG(mode):
        target.write_bytes(data)  # a pipe or a device: nothing to put another file in place of
        return
    scratch = target.with_name(f".{target.name[:100]}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        if mode is not None:
            scratch.chmod(stat.S_IMODE(mode))
        scratch.replace(target)
    except PermissionError:
        # A folder in which no file can be made may still hold one that can be written.
        if mode is None:
            raise
        target.write_bytes(data)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _escaped(text: str) -> str:
    """JSON text with `\\u` escapes where stdout could not hold a character, which it would show as "?"."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
    return text
