"""What attncli teaches, as blocks that any format can draw: pages of `attncli explain` and `attncli rules`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Prose:
    """One paragraph, broken wherever the width asks for it."""

    text: str


@dataclass(frozen=True, slots=True)
class Formula:
    """Lines that stay as they are: formulas, code, commands. At most 38 characters each."""

    lines: tuple[str, ...]


class Column(NamedTuple):
    """`shown`: how a number is written, as `format` takes it (".2f", ",") "bytes" or "count"; text stays as it
    is.

    "" writes four significant digits.
    """

    name: str
    shown: str = ""


Row = tuple[str | int | float, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of names and numbers, each as long as `columns`. `caption`: what is computed, in one sentence."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """(label, text) in the order in which they are read."""

    rows: tuple[tuple[str, str], ...]


Block = Prose | Formula | Table | Facts


@dataclass(frozen=True, slots=True)
class Page:
    """`mark`: a word behind the title, which for a rule is its severity. `values`: the same for a program."""

    title: str
    blocks: tuple[Block, ...]
    mark: Literal["", "note", "warning", "error"] = ""
    values: Mapping[str, Any] = field(default_factory=dict)
