"""What --expect says, read: "heads=32,kv_heads=8" or "decoder.*:kind=cross"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from attncli.errors import UsageError
from attncli.layout import LAYOUTS
from attncli.records import Expectation
from attncli.rules import EXPECTABLE, NONE


def expectations(texts: Iterable[str]) -> tuple[Expectation, ...]:
    """One expectation per key. A glob of layer paths and ":" in front narrows those that follow it in the text.

    Errors: `UsageError` for keys, layouts and numbers that do not exist.
    """
    return tuple(expected for text in texts for expected in _read(text))


def _read(text: str) -> Iterator[Expectation]:
    pattern, colon, rest = text.partition(":")
    if not colon or "=" in pattern:
        pattern, rest = "", text
    pairs = [pair.strip() for pair in rest.split(",") if pair.strip()]
    if not pairs:
        raise UsageError("--expect", f"{text!r} names nothing to expect.", _FORM)
    for pair in pairs:
        given, equals, value = (part.strip() for part in pair.partition("="))
        key = given.replace("-", "_")
        if not equals or not value:
            raise UsageError("--expect", f"{pair!r} is no key=value.", _FORM)
        if key not in EXPECTABLE:
            raise UsageError("--expect", f"nothing is called {given!r}.", _suggestion(key, EXPECTABLE))
        choices = _CHOICES.get(key)
        if choices is not None and value not in choices:
            raise UsageError("--expect", f"no {key} is called {value!r}.", _suggestion(value, choices))
        yield Expectation(pattern.strip(), key, _value(key, value))


def _value(key: str, value: str) -> int | float | str:
    kind = EXPECTABLE[key].type
    if key == "window" and value.lower() == NONE:
        return NONE
    try:
        return kind(value)  # type: ignore[no-any-return]
    except ValueError as error:
        number = "a whole number" if kind is int else "a number"
        raise UsageError("--expect", f"{key} is {number}, which {value!r} is not.", _FORM) from error


def _suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"{f'Did you mean {near[0]!r}? ' if near else ''}Known: {', '.join(known)}."


_CHOICES = {"layout": tuple(LAYOUTS), "kind": ("self", "cross")}
_FORM = "Write --expect heads=32,kv_heads=8 or --expect 'decoder.*:kind=cross'."
