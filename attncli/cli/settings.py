"""Defaults from `[tool.attncli]` of the nearest pyproject.toml, as click's default map."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from attncli.errors import UsageError


def project_defaults() -> dict[str, Any]:
    """Defaults per command: keys of `[tool.attncli]` hold for every command, those of `[tool.attncli.COMMAND]` for one."""
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
    shared = {_name(key): _value(value) for key, value in table.items() if not isinstance(value, dict)}
    unknown = set(shared) - _SHARED
    if unknown:
        raise UsageError(
            str(file),
            f"[tool.attncli] has no setting {sorted(unknown)[0].replace('_', '-')!r}.",
            f"Known: {', '.join(sorted(k.replace('_', '-') for k in _SHARED))}.",
        )
    own = {
        key: {_name(k): _value(v) for k, v in value.items()}
        for key, value in table.items()
        if isinstance(value, dict)
    }
    return {command: {**shared, **own.get(command, {})} for command in ("inspect",)}


def _parse(file: Path, text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(str(file), f"it is not valid TOML ({error}).", "Mend the file.") from error


def _name(key: str) -> str:
    return {"format": "output_format"}.get(key, key.replace("-", "_"))


def _value(value: Any) -> Any:
    return value


_SHARED = frozenset({"fail_on", "select", "ignore", "baseline", "output_format", "quiet"})
