"""What is known of a bad value: where it began, and which tensors it went through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attncli.trace.ops import Op
from attncli.trace.origins import Place
from attncli.trace.tape import Node, Ref

Role = Literal["birth", "fill", "leaf", "unwritten", "outside"]


class Trail(NamedTuple):
    """One kind of bad value ("nan", "+inf", "-inf") in one tensor: whether it was meant to be, and whence it came."""

    intended: bool
    origins: tuple[int, ...]


Bad = dict[str, Trail]


class Forward(NamedTuple):
    """A forward operator that autograd knows. `at`: how many operators had run before it."""

    op: str
    module: str
    place: Place | None
    at: int
    node: Node


@dataclass(slots=True, eq=False)
class Origin:
    """Where bad values began. `facts`: numbers taken at the spot. `at`: how many operators had run before.

    `forward`: the operator whose gradient was being computed. `masks`: origins of intended values that took
    part. `absorbed`: operators that made finite numbers of it by arithmetic; `hidden`: those that chose other
    values instead. `step`: how many optimiser steps had been taken. Of a leaf, `at` and `position` are the operator
    and the operand where it was met first; of a value that was written to outside torch, where it was read.
    """

    number: int
    role: Role
    kinds: tuple[str, ...]
    phase: str
    op: Op
    node: Node
    at: int
    module: str
    place: Place | None
    dtype: torch.dtype
    forward: Forward | None = None
    name: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    masks: tuple[int, ...] = ()
    absorbed: list[Node] = field(default_factory=list)
    hidden: list[Node] = field(default_factory=list)
    step: int = 0
    position: int = 0
    reader: Node | None = None


class Operand(NamedTuple):
    ref: Ref
    value: Tensor
    bad: Bad
