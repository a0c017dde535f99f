"""The report as one HTML file that needs nothing else: for a person with a browser, and as an artifact of CI.

Python turns the records into a plain view of strings and numbers (`page`), the template beside this file lays
it out, and the script draws the pictures. The page asks for nothing over the network, and its content security
policy forbids it to; only its own style and script, named by their hashes, take effect.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from attncli.records import Report
from attncli.render.html.page import page
from attncli.render.words import clean


def text(report: Report) -> str:
    """The whole page. The same report gives the same bytes; no name out of a file can become markup."""
    style, script = _file("style.css"), _file("script.js")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    template = environment.from_string(_file("report.html.j2"))
    return template.render(
        page=page(report),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _harmless(value: object) -> object:
    """What the template writes, without control characters and half surrogates, which no UTF-8 file can hold."""
    return value if isinstance(value, Markup) else clean(value)


def _hash(source: str) -> str:
    """The source of a style or script as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
