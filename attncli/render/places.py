"""Where a finding is: a file that a reader of the repository can open, and its line.

Reads the name of the working folder and whether files are there; opens none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote

from attncli.records import Finding, Report


class Place(NamedTuple):
    """`file`: relative to the working folder, with forward slashes, never empty. `line`: from 1; None for no line.

    What lies outside the working folder is "(outside)/NAME": without the way there, which is another one on every
    machine and could be taken for a path inside.
    """

    file: str
    line: int | None = None

    @property
    def uri(self) -> str:
        """`file` as a relative reference of RFC 3986."""
        return quote(self.file.encode("utf-8", "backslashreplace"), safe="/()~")


def places(report: Report) -> Callable[[Finding], Place]:
    """A function that tells where a finding of `report` is.

    The first that is known: the line of the user's code that the finding names, or on which attention of its layer
    was computed; the checkpoint's file that holds the tensor it names, or one of its layer; the source itself.
    """
    lines: dict[str, Place] = {}
    for call in report.calls:
        if (line := _own_line(call.source)) is not None:
            lines.setdefault(call.layer, line)
    named = {t.name: t.file for layer in report.layers for t in layer.tensors if t.file}
    held = {
        layer.id: next((t.file for t in layer.tensors if t.file), "") for layer in reversed(report.layers)
    }
    source = _source(report)

    def files(finding: Finding) -> Iterator[str]:
        yield named.get(str(finding.evidence.get("tensor") or ""), "")
        yield named.get(finding.message.partition(": ")[0], "")
        yield held.get(finding.layer or "", "")
        told = finding.evidence.get("file")
        if isinstance(told, str) and _there(Path(_path(report), told), Path.is_file):
            yield told

    def place(finding: Finding) -> Place:
        line = _own_line(finding.evidence.get("source")) or lines.get(finding.layer or "")
        if line is not None:
            return line
        inner = next(filter(None, files(finding)), "")
        return (_inside(report, inner) if inner else None) or source

    return place


# --- lines of code ------------------------------------------------------------------------------------


def _own_line(source: object) -> Place | None:
    """ "model.py:41" where that is the user's own file: below the working folder, and no installed library's."""
    match = _LINE.fullmatch(source) if isinstance(source, str) else None
    if match is None or int(match[2]) < 1:
        return None
    file = os.path.normpath(_slashed(match[1])).replace(os.sep, "/")
    parts = file.split("/")
    if file.startswith(("/", "<")) or _DRIVE.match(file) or {"..", *_LIBRARIES} & set(parts):
        return None
    return Place(file, int(match[2]))


# --- files of the source ------------------------------------------------------------------------------


def _path(report: Report) -> str:
    path = report.source.get("path")
    return path if isinstance(path, str) else ""


def _source(report: Report) -> Place:
    path = _path(report)
    code = _CODE.fullmatch(path)
    if code is None:
        return Place(_from_here(path))
    if code["file"]:
        return Place(_from_here(code["file"]))
    stem = code["module"].replace(".", "/")
    modules = [f"{root}{stem}{end}" for root in ("", "src/") for end in (".py", "/__init__.py")]
    return Place(next((file for file in modules if _there(Path(file), Path.is_file)), modules[0]))


def _inside(report: Report, file: str) -> Place | None:
    """A file of the checkpoint; None where the source is code, to whose path it is not relative."""
    path = _path(report)
    if report.source.get("kind") == "folder" or (path and _there(Path(path), Path.is_dir)):
        return Place(_from_here(path, file))
    whole = PurePosixPath(_slashed(path))
    if report.source.get("kind") == "file" and whole.name != file:
        return Place(_from_here(str(whole.parent), file))
    return Place(_from_here(path)) if whole.name == file else None


def _from_here(path: str, inner: str = "") -> str:
    """`inner` of `path`, as seen from the working folder."""
    path, inner = _slashed(path), _slashed(inner)
    if not path and not inner:
        return _UNKNOWN
    whole = str(PurePosixPath(path, inner))
    if not _DRIVE.match(whole) or os.name == "nt":
        for seen in (os.path.abspath, os.path.realpath):
            try:
                relative = os.path.relpath(seen(whole), seen(os.curdir)).replace(os.sep, "/")
            except (OSError, ValueError):  # the working folder is gone, another drive, or a name with a NUL
                continue
            if relative.split("/")[0] != "..":
                return relative
    named = [PurePosixPath(path).name, *inner.split("/")]
    return "/".join([_OUTSIDE, *(part for part in named if part not in ("", ".", ".."))])


def _there(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # a name too long, a folder that may not be read, a NUL
        return False


def _slashed(path: str) -> str:
    return path.replace("\\", "/")


# --- tables -------------------------------------------------------------------------------------------

_LINE = re.compile(r"(.+):(\d{1,9})")
_DRIVE = re.compile(r"[A-Za-z]:")
_LIBRARIES = ("site-packages", "dist-packages")
# "path/to/file.py:build" and "pkg.module:build".
_CODE = re.compile(
    r"(?:(?P<file>.+\.py)|(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)):[^\W\d]\w*(?:\.\w+)*", re.DOTALL
)
_OUTSIDE = "(outside)"
_UNKNOWN = "unknown"
