"""JSON → a flat program, or what is wrong with it: a capsule may come from anybody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from attncli.trace.program import Leaf, Named, Operator, OptimizerStep, Program, View, damaged, slots_in


def program_of(plain: Any, subject: str) -> Program:
    """The program that `to_plain` gave. Errors: AttncliError about `subject` for anything else."""
    try:
        return _program(_mapping(plain, "the program"))
    except _Damaged as error:
        raise damaged(subject, str(error)) from error
    except RecursionError as error:
        raise damaged(subject, "an argument is nested too deeply") from error


class _Damaged(ValueError):  # noqa: N818 - never leaves this file
    """What is wrong with a program, as the end of a sentence."""


def _program(plain: Mapping[str, Any]) -> Program:
    modules = tuple(_text(one, "a module path") for one in _items(plain, "modules"))
    places = tuple(_place(one) for one in _items(plain, "places"))
    leaves = tuple(_leaf(_mapping(one, "a leaf")) for one in _items(plain, "leaves"))
    views: dict[int, View] = {}
    for row in _items(plain, "views"):
        known = _mapping(row, "a view")
        views[_whole(known.get("slot"), "a slot")] = _view(known, len(leaves))
    operators = _operators(_items(plain, "operators"), modules, places)
    raised = plain.get("raised")
    made = {slot for one in operators for slot in one.outputs}
    program = Program(
        operators=operators,
        leaves=leaves,
        views=views,
        tensors=tuple(_named(_mapping(one, "a tensor"), len(leaves)) for one in _items(plain, "tensors")),
        inputs=tuple(_pair(one) for one in _items(plain, "inputs")),
        shown={
            _text(name, "a name"): _whole(slot, "a slot")
            for name, slot in _mapping(plain.get("shown"), "what is shown").items()
        },
        optimizers=_optimizers(_items(plain, "optimizers"), len(operators)),
        raised=None if raised is None else _two_texts(raised),
        fails=_flag(plain.get("fails", False)),
        steps_before=_whole(plain.get("steps_before", 0), "a number of steps"),
        moved={
            _text(name, "a name"): _moved(value)
            for name, value in _mapping(plain.get("moved", {}), "what moved").items()
        },
        generators=tuple(_text(one, "a device") for one in _items(plain, "generators")),
        device=_text(plain.get("device"), "the device"),
        random=_flag(plain.get("random", False)),
        libraries=tuple(_text(one, "a library") for one in _items(plain, "libraries")),
    )
    for slot in (*(slot for _, slot in program.inputs), *program.shown.values()):
        if slot not in views and slot not in made:
            raise _Damaged(f"slot {slot} is no tensor of it")
    _check_slots(program)
    return program


def _operators(
    rows: list[Any], modules: tuple[str, ...], places: tuple[tuple[str, int], ...]
) -> tuple[Operator, ...]:
    found = []
    for number, row in enumerate(rows):
        known = _mapping(row, "an operator")
        place, forward = known.get("place"), known.get("forward")
        found.append(
            Operator(
                name=_text(known.get("op"), "the name of an operator"),
                args=tuple(_items(known, "args")),
                kwargs=_mapping(known.get("kwargs", {}), "named arguments"),
                outputs=tuple(_whole(slot, "a slot") for slot in _items(known, "out")),
                module=modules[_whole(known.get("module"), "a module", len(modules))],
                place=None if place is None else places[_whole(place, "a line", len(places))],
                backward=_flag(known.get("backward", False)),
                forward=None if forward is None else _whole(forward, "a forward operator", number),
            )
        )
    return tuple(found)


def _check_slots(program: Program) -> None:
    """Every slot that is read must be there by then, and what a view lies in as well."""
    there: set[int] = set()

    def read(slot: int) -> None:
        if slot in there:
            return
        view = program.views.get(slot)
        if view is None or (view.of is not None and view.of not in there):
            raise _Damaged(f"slot {slot} is read before it is made")
        there.add(slot)

    for _, slot in program.inputs:
        if slot in program.views:
            read(slot)
    for one in program.operators:
        for slot in slots_in((one.args, one.kwargs)):
            read(_whole(slot, "a slot"))
        there.update(one.outputs)
    for slot in program.shown.values():
        read(slot)


def _optimizers(rows: list[Any], operators: int) -> tuple[OptimizerStep, ...]:
    found: list[OptimizerStep] = []
    outer: list[OptimizerStep] = []
    for row in rows:
        known = _mapping(row, "an optimiser step")
        begins = _whole(known.get("begins"), "an operator", operators + 1)
        ends = _whole(known.get("ends"), "an operator", operators + 1)
        names = tuple(_text(one, "a name") for one in _items(known, "parameters"))
        step = OptimizerStep(begins, ends, names)
        while outer and outer[-1].ends <= begins:
            outer.pop()
        inside = not outer or ends <= outer[-1].ends
        if ends < begins or not inside or (found and begins < found[-1].begins):
            raise _Damaged("its optimiser steps overlap")
        found.append(step)
        outer.append(step)
    return tuple(found)


def _leaf(known: Mapping[str, Any]) -> Leaf:
    kind = known.get("kind")
    if kind not in _KINDS:
        _refuse("the kind of a leaf", kind)
    return Leaf(
        key=_text(known.get("key"), "the name of a leaf"),
        kind=kind,
        device=_text(known.get("device"), "a device"),
        size=_whole(known.get("size"), "the size of a leaf"),
        weight=_flag(known.get("weight", False)),
    )


def _named(known: Mapping[str, Any], leaves: int) -> Named:
    kind = known.get("kind")
    if kind not in ("parameter", "buffer"):
        _refuse("the kind of a tensor", kind)
    view = _view(_mapping(known.get("view"), "a view"), leaves)
    if view.leaf is None:
        raise _Damaged("a tensor of the model lies in no leaf")
    name = _text(known.get("name"), "the name of a tensor")
    return Named(name, kind, view, _flag(known.get("persistent", True)))


def _view(known: Mapping[str, Any], leaves: int) -> View:
    leaf, of = known.get("leaf"), known.get("of")
    if (leaf is None) == (of is None):
        raise _Damaged("a view is of no memory")
    shape = tuple(_whole(size, "a size") for size in _items(known, "shape"))
    stride = tuple(_whole(step, "a stride") for step in _items(known, "stride"))
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        raise _Damaged("a view has another number of strides than of sizes")
    return View(
        leaf=None if leaf is None else _whole(leaf, "a leaf", leaves),
        of=None if of is None else _whole(of, "a slot"),
        dtype=_text(known.get("dtype"), "a dtype"),
        shape=shape,
        stride=stride,
        offset=_whole(known.get("offset"), "an offset"),
        conjugate=_flag(known.get("conjugate", False)),
        negative=_flag(known.get("negative", False)),
    )


def _place(value: Any) -> tuple[str, int]:
    if not isinstance(value, list) or len(value) != 2:
        _refuse("a line of the user's code", value)
    return _text(value[0], "a file"), _whole(value[1], "a line")


def _pair(value: Any) -> tuple[str, int]:
    if not isinstance(value, list) or len(value) != 2:
        _refuse("an input", value)
    return _text(value[0], "the name of an input"), _whole(value[1], "a slot")


def _moved(value: Any) -> tuple[float, float, int]:
    numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
    if not numbers or len(value) != 3:
        _refuse("how far a parameter moved", value)
    return float(value[0]), float(value[1]), _whole(value[2], "a step")


def _two_texts(value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        _refuse("what the step raised", value)
    return _text(value[0], "a type"), _text(value[1], "a message")


def _items(known: Mapping[str, Any], key: str) -> list[Any]:
    value = known.get(key)
    if not isinstance(value, list):
        _refuse(f"{key!r}", value)
    return value


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        _refuse(what, value)
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        _refuse(what, value)
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse("a flag", value)
    return value


def _whole(value: Any, what: str, below: float = math.inf) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < min(below, _LARGEST):
        _refuse(what, value)
    return value


def _refuse(what: str, value: Any) -> NoReturn:
    shown = repr(value)
    raise _Damaged(f"{what} cannot be {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '…'}")


# --- settings -----------------------------------------------------------------------------------------

_KINDS = ("parameter", "buffer", "input", "constant")
_LARGEST = 1 << 62
_MOST_DIMENSIONS = 64
_SHOWN = 60
