"""A Report → one output format per file. Knows records; never judges, never imports torch."""

from __future__ import annotations

from collections.abc import Callable

from attncli.records import Report


def as_table(report: Report) -> str:
    from attncli.render import table  # rich is imported only where a table is drawn

    return table.text(report)


def as_json(report: Report) -> str:
    return report.to_json() + "\n"


def as_html(report: Report) -> str:
    from attncli.render import html  # so is jinja2 for a page

    return html.text(report)


def as_markdown(report: Report) -> str:
    from attncli.render import markdown

    return markdown.text(report)


def as_github(report: Report) -> str:
    from attncli.render import github

    return github.text(report)


def as_sarif(report: Report) -> str:
    from attncli.render import sarif

    return sarif.text(report)


def as_junit(report: Report) -> str:
    from attncli.render import junit

    return junit.text(report)


# Formats that are text as a whole. The table is drawn on a console instead (`table.draw`).
TEXT_FORMATS: dict[str, Callable[[Report], str]] = {
    "table": as_table,
    "json": as_json,
    "markdown": as_markdown,
    "github": as_github,
    "sarif": as_sarif,
    "junit": as_junit,
    "html": as_html,
}
# What the name of a file says of the format wanted in it.
SUFFIXES: dict[str, str] = {
    ".txt": "table",
    ".json": "json",
    ".md": "markdown",
    ".sarif": "sarif",
    ".xml": "junit",
    ".html": "html",
    ".htm": "html",
}
