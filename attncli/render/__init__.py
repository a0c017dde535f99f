"""A Report → one output format per file. Knows records; never judges, never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from attncli.records import Report  # --help names the formats and needs no records


class Format(NamedTuple):
    """How a report is written. `module`: its room, imported on use, whose `text(report)` gives the whole.

    `suffixes`: of files that are meant for it. `takes`: what else `text` is given by name: "rules", the catalogue,
    which this room does not know, and "fail_on", from which severity on the command fails.
    """

    module: str
    suffixes: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()

    def text(self, report: Report, **known: Any) -> str:
        write: Callable[..., str] = import_module(f"attncli.render.{self.module}").text
        return write(report, **{name: known[name] for name in self.takes if name in known})


def format_of(suffix: str) -> str | None:
    """The format that a file with this suffix is meant for; None where it tells none."""
    return next((name for name, one in FORMATS.items() if suffix.lower() in one.suffixes), None)


FORMATS: dict[str, Format] = {
    "table": Format("table", (".txt",)),
    "json": Format("json_text", (".json",)),
    "markdown": Format("markdown", (".md",)),
    "github": Format("github"),
    "sarif": Format("sarif", (".sarif",), takes=("rules", "fail_on")),
    "junit": Format("junit", (".xml",), takes=("fail_on",)),
    "html": Format("html", (".html", ".htm")),
}
