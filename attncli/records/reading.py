"""JSON report → `Report`: what `Report.to_dict` wrote, back as records.

Every field is read as its record declares it, so a new field of a record is read without a line here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attncli.records.judged import Change, Finding
from attncli.records.layers import Layer
from attncli.records.report import SCHEMA, Report
from attncli.records.runs import AttentionMap, Call, Measurement, Origin


def report_from(values: Mapping[str, Any]) -> Report:
    """The report whose `to_dict()` is `values`; non-finite numbers come back from their strings.

    What the JSON does not hold stays empty: of a layer its `rows`, `score_terms`, `anomalies`, `stack` and `index`.
    Keys that newer reports have may be missing, keys that no record knows are left out. Errors: `ValueError` with
    what is wrong and where, for another schema too.
    """
    schema = values.get("schema")
    if schema != SCHEMA:
        known = isinstance(schema, str) and schema.startswith("attncli-")
        raise ValueError(f"its schema is {schema}, not {SCHEMA}" if known else "it is no report of attncli")
    try:
        return _report(values)
    except _Misfit as wrong:
        raise ValueError(f"{wrong.where or 'the report'} {wrong.problem}") from None


class _Misfit(ValueError):  # noqa: N818 - never leaves this file
    """A value that is not what its place asks for. `where` grows on the way out: "layers[3].heads"."""

    def __init__(self, problem: str, expected: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected
        self.where = ""

    def inside(self, outer: str) -> _Misfit:
        joint = "" if not self.where or self.where.startswith("[") else "."
        self.where = f"{outer}{joint}{self.where}"
        return self


# Reads one value; `_Misfit` where it is of another type.
Reader = Callable[[Any], Any]


def _refuse_impossible(lists: Mapping[str, Any]) -> None:
    """Errors: `_Misfit` for what no report of attncli holds, though every value is of its type."""
    for number, layer in enumerate(lists["layers"]):
        for name in ("heads", "kv_heads", "head_dim"):
            count = getattr(layer, name)
            if count is not None and count < 1:
                raise _Misfit(f"is {count}").inside(name).inside(f"layers[{number}]")
    for number, row in enumerate(lists["measurements"]):
        if (
            isinstance(row.value, str)
            and row.metric not in _IN_WORDS
            and not row.metric.startswith("overflow_")
        ):
            raise (
                _Misfit(f"is {row.value!r}, which is no number")
                .inside("value")
                .inside(f"measurements[{number}]")
            )


def _report(values: Mapping[str, Any]) -> Report:
    run = _named("run", _reader(Mapping[str, Any] | None), values.get("run"))
    lists: dict[str, Any] = {
        name: _named(name, _list_reader(_reader(record)), values.get(name, []))
        for name, record in _RECORDS.items()
    }
    command = _needed(values, "command", str)
    if "layers" not in values:
        raise _Misfit("has no layers")
    _refuse_impossible(lists)
    return Report(
        command=command,
        version=_needed(values, "attncli_version", str),
        source=_needed(values, "source", Mapping[str, Any]),
        environment=_needed(values, "environment", Mapping[str, Any]),
        layers=lists["layers"],
        measurements=lists["measurements"],
        origins=lists["origins"],
        findings=lists["findings"],
        run=None if run is None else {key: value for key, value in run.items() if key != "calls"},
        calls=_named("run.calls", _reader(tuple[Call, ...]), (run or {}).get("calls", [])),
        notes=_named("notes", _reader(tuple[str, ...]), values.get("notes", [])),
        known=lists["known"],
        maps=lists["maps"],
        changes=tuple(map(_with_numbers, lists["changes"])),
    )


def _needed(values: Mapping[str, Any], name: str, hint: Any) -> Any:
    if name not in values:
        raise _Misfit(f"lacks the key {name!r}")
    return _named(name, _reader(hint), values[name])


def _named(name: str, read: Reader, value: Any) -> Any:
    try:
        return read(value)
    except _Misfit as wrong:
        raise wrong.inside(name) from None


def _with_numbers(change: Change) -> Change:
    """A change of a number holds numbers, also where they are not finite."""
    if change.kind != "metric":
        return change
    before, after = (
        _NON_FINITE.get(side, side) if isinstance(side, str) else side
        for side in (change.before, change.after)
    )
    return replace(change, before=before, after=after)


# --- a reader for each type ---------------------------------------------------------------------------


@cache
def _reader(hint: Any) -> Reader:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return _as_it_is
    if is_dataclass(hint):
        return _record_reader(hint)
    if origin in (Union, UnionType):
        return _union_reader(arguments)
    if origin is tuple:
        return _list_reader(_reader(arguments[0]))
    if origin is not None and origin is not Literal:
        return _mapping_reader(_reader(arguments[1]))
    return _literal_reader(arguments) if origin is Literal else _PLAIN[hint]


def _as_it_is(value: Any) -> Any:
    return value


def _record_reader(record: Any) -> Reader:
    hints = get_type_hints(record)
    readers = {item.name: _reader(hints[item.name]) for item in fields(record)}
    needed = [
        item.name for item in fields(record) if item.default is MISSING and item.default_factory is MISSING
    ]

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _is_not(value, "an object")
        for name in needed:
            if name not in value:
                raise _Misfit(f"lacks the key {name!r}")
        name = ""
        made = {}
        try:
            for name, reader in readers.items():
                if name in value:
                    made[name] = reader(value[name])
        except _Misfit as wrong:
            raise wrong.inside(name) from None
        return record(**made)

    return read


def _union_reader(members: tuple[Any, ...]) -> Reader:
    readers = [_reader(member) for member in members if member is not NoneType]
    optional = NoneType in members

    def read(value: Any) -> Any:
        if value is None and optional:
            return None
        expected = []
        for reader in readers:
            try:
                return reader(value)
            except _Misfit as wrong:
                # Inside a list or an object the first complaint is the one that helps.
                if wrong.where:
                    raise
                expected.append(wrong.expected)
        *others, last = list(dict.fromkeys(expected)) + (["null"] if optional else [])
        raise _is_not(value, f"{', '.join(others)} or {last}")

    return read


def _list_reader(item: Reader) -> Reader:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _is_not(value, "a list")
        made: list[Any] = []
        try:
            made.extend(map(item, value))
        except _Misfit as wrong:
            raise wrong.inside(f"[{len(made)}]") from None
        return tuple(made)

    return read


def _mapping_reader(item: Reader) -> Reader:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _is_not(value, "an object")
        return {key: _named(key, item, one) for key, one in value.items()}

    return read


def _literal_reader(allowed: tuple[Any, ...]) -> Reader:
    def read(value: Any) -> Any:
        if isinstance(value, str) and value in allowed:
            return value
        raise _is_not(value, f"one of {', '.join(allowed)}")

    return read


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _is_not(value, "text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    raise _is_not(value, "a number")


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _is_not(value, "a whole number")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _is_not(value, "true or false")
    return value


def _is_not(value: Any, expected: str) -> _Misfit:
    shown = _NAMES.get(type(value)) or repr(value)
    return _Misfit(f"is {shown if len(shown) <= 40 else shown[:39] + '…'}, not {expected}", expected)


# --- tables -------------------------------------------------------------------------------------------

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_PLAIN: dict[Any, Reader] = {str: _text, float: _number, int: _whole_number, bool: _truth}
_NAMES = {dict: "an object", list: "a list", NoneType: "null"}
_RECORDS: dict[str, Any] = {
    "layers": Layer,
    "measurements": Measurement,
    "origins": Origin,
    "findings": Finding,
    "known": Finding,
    "maps": AttentionMap,
    "changes": Change,
}

# Measurements whose value is a word.
_IN_WORDS = ("mask_kind", "softmax_dtype", "contents")
