"""A Report → one output format per file. Knows records; never judges, never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from attncli.records import Report  # --help names the formats and needs no records


class Format(NamedTuple):
    """How a report is written. `module`: its room, imported on use, whose `text(report)` gives the whole.

    `suffixes`: of files that are meant for it. `rules`: whether `text` also takes the catalogue of rules, which
    this room does not know.
    """

    module: str
    suffixes: tuple[str, ...] = ()
    rules: bool = False

    def text(self, report: Report, rules: Any = ()) -> str:
        write: Callable[..., str] = import_module(f"attncli.render.{self.module}").text
        return write(report, rules) if self.rules else write(report)


def format_of(suffix: str) -> str | None:
    """The format that a file with this suffix is meant for; None where it tells none."""
    return next((name for name, one in FORMATS.items() if suffix.lower() in one.suffixes), None)


FORMATS: dict[str, Format] = {
    "table": Format("table", (".txt",)),
    "json": Format("json_text", (".json",)),
    "markdown": Format("markdown", (".md",)),
    "github": Format("github"),
    "sarif": Format("sarif", (".sarif",), rules=True),
    "junit": Format("junit", (".xml",)),
    "html": Format("html", (".html", ".htm")),
}
