"""Defaults from `[tool.attncli]` of the nearest pyproject.toml, as click's default map."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from attncli.errors import UsageError


class Configured(str):
    """A value from the settings, which gives way to what the name of a file says."""


class Option(NamedTuple):
    """An option as a setting: the parameter behind it, and whether it may be given more than once."""

    parameter: str
    several: bool


def project_defaults(
    commands: Mapping[str, Mapping[str, Option]], start: Path | None = None
) -> dict[str, Any]:
    """Defaults by command. `[tool.attncli]` holds for all commands, `[tool.attncli.COMMAND]` for one.

    `commands`: the options of each command, by their long names without dashes. A setting for all commands counts
    for those that have the option. `start`: the folder from which pyproject.toml is looked for, the working folder
    unless given. Errors: `UsageError` for TOML that cannot be read and for settings that do not exist.
    """
    file = _nearest(start)
    if file is None:
        return {}
    table = _table(file)
    shared = {_option(key): value for key, value in table.items() if not isinstance(value, dict)}
    own = {key: value for key, value in table.items() if isinstance(value, dict)}
    _refuse_unknown(
        file, "[tool.attncli]", shared, {name for options in commands.values() for name in options}
    )
    _refuse_unknown(file, "[tool.attncli]", own, commands)
    defaults = {}
    for command, options in commands.items():
        settings = {_option(key): value for key, value in own.get(command, {}).items()}
        _refuse_unknown(file, f"[tool.attncli.{command}]", settings, options)
        merged = {**shared, **settings}
        defaults[command] = {
            options[name].parameter: _value(file, name, value, options[name].several)
            for name, value in merged.items()
            if name in options
        }
    return defaults


def _nearest(start: Path | None) -> Path | None:
    try:
        here = start or Path.cwd()
    except OSError:  # the working folder was removed
        return None
    return next(
        (f / "pyproject.toml" for f in (here, *here.parents) if (f / "pyproject.toml").is_file()), None
    )


def _table(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UsageError(
            str(file), f"its settings cannot be read ({error.strerror}).", "Check its permissions."
        ) from error
    if "attncli" not in text:
        return {}
    # Python 3.10 has no tomllib; tomli is the same parser under its first name.
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        table: dict[str, Any] = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise UsageError(str(file), f"it is not valid TOML ({error}).", "Mend the file.") from error
    for key in ("tool", "attncli"):
        table = table.get(key, {})
        if not isinstance(table, dict):
            raise UsageError(str(file), f"{key} is no table of settings.", "Write [tool.attncli] above them.")
    return table


def _refuse_unknown(file: Path, where: str, given: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        remedy = f"Did you mean {near[0]!r}? " if near else ""
        remedy += f"Known: {', '.join(sorted(known))}."
        raise UsageError(str(file), f"{where} has no setting {unknown[0]!r}.", remedy)


def _value(file: Path, name: str, value: Any, several: bool) -> Any:
    if name == "format" and isinstance(value, str):
        return Configured(value)
    if several and not isinstance(value, list):
        value = [value]
    if name in _PATHS:
        beside = [_beside(file, item) for item in _listed(value)]
        return beside if isinstance(value, list) else beside[0]
    return value


def _beside(file: Path, item: Any) -> Any:
    return str(file.parent / item) if isinstance(item, str) and item != "-" else item  # "-" is stdout


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _option(key: str) -> str:
    return key.replace("_", "-")


# Paths in the file are its own neighbours, wherever the command is called.
_PATHS = frozenset(
    {"baseline", "write-baseline", "input", "weights", "offload-folder", "output", "save-repro"}
)
