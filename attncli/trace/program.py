"""A run as a flat program: its operators in order, with the tensors that none of them made.

Plain data alone, so that it can be written down and read again where the user's code is not. Tensors are slots:
numbers of tensors by their memory and geometry, as the tape tells them apart. A slot is the output of an operator, or
a `View`: of a leaf, which no operator made, or of the memory of another slot, where nobody saw the view being made.

An argument is plain as well: None, a bool, an int, a float, a string, a list of these, or an object of one key:
{"slot": 3}, {"dtype": "float16"}, {"device": "cuda:0"}, {"layout": "strided"}, {"memory_format": "channels_last"},
{"generator": 0}, {"float": "nan"}, {"complex": [real, imaginary]}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from attncli.errors import AttncliError


@dataclass(frozen=True, slots=True)
class Leaf:
    """Memory that no operator made. `key`: the name under which its `size` bytes are stored.

    `device`: where it lay. `weight`: a parameter that the model does not know.
    """

    key: str
    kind: Literal["parameter", "buffer", "input", "constant"]
    device: str
    size: int
    weight: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """A tensor on the memory of leaf number `leaf`, or else of slot `of`. `stride`, `offset`: in elements."""

    leaf: int | None
    of: int | None
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugate: bool = False
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """One call. `name`: namespace, operator and overload ("aten.mm.default").

    `outputs`: the slots of the tensors that it returned. `place`: file and line of the user's. `forward`: of an
    operator of the backward pass, the number of the operator whose gradient it computes.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    module: str = ""
    place: tuple[str, int] | None = None
    backward: bool = False
    forward: int | None = None


@dataclass(frozen=True, slots=True)
class Named:
    """A parameter or buffer of the model; of tied ones each name."""

    name: str
    kind: Literal["parameter", "buffer"]
    view: View
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Operators from number `begins` to before `ends`. `parameters`: names of those that it steps."""

    begins: int
    ends: int
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """`views`: by slot. `tensors`: the model's. `inputs`: (name, slot) of what the step was given.

    `shown`: slots of what can be seen afterwards: "output.loss", "gradient of NAME", and parameters and buffers that
    were exchanged for other tensors. `raised`: type and text of what ended the step; `fails`:
    whether its last operator did, and not the user's code. `generators`: devices of random
    generators of the user's own. `device`: where most of it ran. `random`: whether random numbers were drawn.
    `steps_before`: optimiser steps that the training had taken; `moved`: what they threw far out, by the name of the
    parameter (its largest magnitude before, after, the step). `libraries`: modules that define operators which are
    not torch's own.
    """

    operators: tuple[Operator, ...]
    leaves: tuple[Leaf, ...]
    views: Mapping[int, View]
    tensors: tuple[Named, ...]
    inputs: tuple[tuple[str, int], ...] = ()
    shown: Mapping[str, int] = field(default_factory=dict)
    optimizers: tuple[OptimizerStep, ...] = ()
    raised: tuple[str, str] | None = None
    fails: bool = False
    steps_before: int = 0
    moved: Mapping[str, tuple[float, float, int]] = field(default_factory=dict)
    generators: tuple[str, ...] = ()
    device: str = "cpu"
    random: bool = False
    libraries: tuple[str, ...] = ()


def to_plain(program: Program) -> dict[str, Any]:
    """The program as JSON types; module paths and lines are numbers of the tables beside."""
    modules: dict[str, int] = {}
    places: dict[tuple[str, int], int] = {}
    rows = []
    for one in program.operators:
        row: dict[str, Any] = {"op": one.name, "args": list(one.args), "out": list(one.outputs)}
        row["module"] = modules.setdefault(one.module, len(modules))
        if one.kwargs:
            row["kwargs"] = dict(one.kwargs)
        if one.place is not None:
            row["place"] = places.setdefault(one.place, len(places))
        if one.backward:
            row["backward"] = True
        if one.forward is not None:
            row["forward"] = one.forward
        rows.append(row)
    return {
        "device": program.device,
        "random": program.random,
        "raised": list(program.raised) if program.raised is not None else None,
        "fails": program.fails,
        "steps_before": program.steps_before,
        "moved": {name: list(moved) for name, moved in program.moved.items()},
        "generators": list(program.generators),
        "libraries": list(program.libraries),
        "modules": list(modules),
        "places": [list(place) for place in places],
        "leaves": [
            {"key": one.key, "kind": one.kind, "device": one.device, "size": one.size, "weight": one.weight}
            for one in program.leaves
        ],
        "tensors": [
            {"name": one.name, "kind": one.kind, "persistent": one.persistent, "view": _view_row(one.view)}
            for one in program.tensors
        ],
        "inputs": [list(pair) for pair in program.inputs],
        "shown": dict(program.shown),
        "optimizers": [
            {"begins": one.begins, "ends": one.ends, "parameters": list(one.parameters)}
            for one in program.optimizers
        ],
        "views": [{"slot": slot, **_view_row(view)} for slot, view in program.views.items()],
        "operators": rows,
    }


def damaged(subject: str, problem: str) -> AttncliError:
    return AttncliError(
        subject, f"the capsule is damaged: {problem}.", "Copy it again from where it was written."
    )


def extent(view: View, itemsize: int) -> int:
    """Bytes from the start of the memory that a view needs."""
    if 0 in view.shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
    return (view.offset + last + 1) * itemsize


def slots_in(value: Any) -> Iterator[int]:
    """Slots among plain arguments."""
    if isinstance(value, Mapping):
        if set(value) == {"slot"}:
            yield value["slot"]
        else:
            for item in value.values():
                yield from slots_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from slots_in(item)


# --- writing ------------------------------------------------------------------------------------------


def _view_row(view: View) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dtype": view.dtype,
        "shape": list(view.shape),
        "stride": list(view.stride),
        "offset": view.offset,
    }
    row.update({"leaf": view.leaf} if view.leaf is not None else {"of": view.of})
    row.update({name: True for name in ("conjugate", "negative") if getattr(view, name)})
    return row
