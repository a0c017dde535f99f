"""Defaults from `[tool.attncli]` of the nearest pyproject.toml, as click's default map."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from attncli.errors import UsageError


def project_defaults() -> dict[str, Any]:
    """Defaults per command. Keys of `[tool.attncli]` hold for all, those of `[tool.attncli.COMMAND]` for one."""
    file = next(
        (f / "pyproject.toml" for f in (Path.cwd(), *Path.cwd().parents) if (f / "pyproject.toml").is_file()),
        None,
    )
    if file is None:
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if "tool.attncli" not in text:
        return {}
    table = _parse(file, text).get("tool", {}).get("attncli", {})
    shared = {_name(key): value for key, value in table.items() if not isinstance(value, dict)}
    unknown = set(shared) - _SHARED
    if unknown:
        raise UsageError(
            str(file),
            f"[tool.attncli] has no setting {sorted(unknown)[0].replace('_', '-')!r}.",
            f"Known: {', '.join(sorted(k.replace('_', '-') for k in _SHARED))}.",
        )
    own = {
        key: {_name(k): v for k, v in value.items()}
        for key, value in table.items()
        if isinstance(value, dict)
    }
    return {command: {**shared, **own.get(command, {})} for command in ("inspect",)}


def _parse(file: Path, text: str) -> dict[str, Any]:
    # Python 3.10 has no tomllib; tomli is the same parser under its first name.
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        table: dict[str, Any] = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise UsageError(str(file), f"it is not valid TOML ({error}).", "Mend the file.") from error
    return table


def _name(key: str) -> str:
    return {"format": "output_format"}.get(key, key.replace("-", "_"))


_SHARED = frozenset({"fail_on", "select", "ignore", "baseline", "output_format", "quiet"})
