"""Defaults from `[tool.attncli]` of the nearest pyproject.toml, as click's default map."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from attncli.errors import UsageError


def project_defaults(commands: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Defaults by command. `[tool.attncli]` holds for all commands, `[tool.attncli.COMMAND]` for one.

    `commands`: the parameters that each command has. Errors: `UsageError` for TOML that cannot be read and
    for settings that do not exist.
    """
    file = _nearest()
    if file is None:
        return {}
    table = _table(file)
    shared = {_name(key): value for key, value in table.items() if not isinstance(value, dict)}
    own = {key: value for key, value in table.items() if isinstance(value, dict)}
    _refuse_unknown(file, "[tool.attncli]", shared, _SHARED)
    _refuse_unknown(file, "[tool.attncli]", own, commands)
    defaults = {}
    for command, parameters in commands.items():
        settings = {_name(key): value for key, value in own.get(command, {}).items()}
        _refuse_unknown(file, f"[tool.attncli.{command}]", settings, parameters)
        merged = {**shared, **settings}
        defaults[command] = {name: _value(file, name, value) for name, value in merged.items()}
    return defaults


def _nearest() -> Path | None:
    try:
        here = Path.cwd()
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
        listed = ", ".join(sorted(_shown(name) for name in known))
        raise UsageError(str(file), f"{where} has no setting {_shown(unknown[0])!r}.", f"Known: {listed}.")


def _value(file: Path, name: str, value: Any) -> Any:
    if name in _LISTS and isinstance(value, str):
        return [value]
    if name in _PATHS and isinstance(value, str):
        return str(file.parent / value)
    return value


def _name(key: str) -> str:
    return "output_format" if key == "format" else key.replace("-", "_")


def _shown(name: str) -> str:
    return "format" if name == "output_format" else name.replace("_", "-")


_SHARED = frozenset({"fail_on", "select", "ignore", "baseline", "output_format", "quiet"})
_LISTS = frozenset({"select", "ignore", "layer", "text"})
# Paths in the file are its own neighbours, wherever the command is called.
_PATHS = frozenset({"baseline", "input", "weights", "offload_folder"})
