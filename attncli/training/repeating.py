"""A step that was written down, run again from its entries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attncli.training.around import as_then
from attncli.training.program import Entry, Given, Kept, Rebuilt, Slot, flat, node_of, number_of, span_begins


class UnseenError(Exception):
    """A part of the step was made by something that was not seen. Its text says what: "a tensor of shape …"."""


def is_cut(entry: Entry) -> bool:
    """Whether it was handed a tensor with a history that was not seen."""
    return any(isinstance(one, Given) and one.cut for one in flat((entry.args, entry.kwargs)))


def repeat(
    entries: list[Entry], stand_in: Callable[[nn.Module], nn.Module] = lambda module: module
) -> tuple[Tensor, ...]:
    """Runs the entries again; what its backward passes began at, or the last outputs.

    `stand_in`: the module to be called in place of another: the one inside a wrapper that talks to other processes.
    Errors: `UnseenError` where gradients would flow into what was not seen; whatever the entries raise.
    """
    values: dict[int, Tensor] = {}
    shown: tuple[Tensor, ...] = ()
    for entry in entries:
        args = _restored(entry.args, values)
        kwargs = _restored(entry.kwargs, values)
        what = stand_in(entry.what) if isinstance(entry.what, nn.Module) else entry.what
        if entry.is_backward:
            roots = flat(args[0] if args else kwargs["tensors"])
            shown = (*shown, *(one for one in roots if isinstance(one, Tensor)))
        if entry.has_weights:
            args, weights = args
            what = functools.partial(torch.func.functional_call, what, weights)
            args, kwargs = (tuple(args), dict(kwargs)), {}
        if entry.writes and isinstance(entry.args[0], Given):
            args = (args[0].detach().clone(), *args[1:])  # as it was then, each time
        with as_then(entry.around), _Catching(entry.kept) as caught:
            result = _called(what, args, kwargs, entry.place)
        values.update(caught.found(entry.what))
        # What writes into a tensor and returns nothing has made that tensor.
        returned = args[0] if result is None and args and not entry.is_effect else result
        made = [one for one in flat(returned) if isinstance(one, Tensor)]
        values.update(zip(entry.outputs, made, strict=False))
        if not entry.is_backward and made and not any(one.is_backward for one in entries):
            shown = tuple(made)
    return shown


def _called(what: Any, args: Any, kwargs: Any, said_place: tuple[str, int] | None) -> Any:
    """Calls on behalf of a line of the user's: whoever looks for it reads `said_place` here."""
    return what(*args, **kwargs)


class _Catching(TorchFunctionMode):
    """Catches the tensors that a module keeps to itself, while it runs."""

    def __init__(self, kept: Mapping[int, Kept]) -> None:
        super().__init__()
        self._slots = {(one.node, one.output): slot for slot, one in kept.items()}
        self._kept, self._found = kept, dict[int, Tensor]()
        self._begin = 0

    def __enter__(self) -> _Catching:
        self._begin = span_begins()
        if self._kept:
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._kept:
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What a function of the user's own makes is seen where it is used.
        for one in flat((result, args, kwargs)):
            node = node_of(one) if isinstance(one, Tensor) else None
            if node is None:
                continue
            slot = self._slots.get((number_of(node) - self._begin, one.output_nr))
            if slot is not None:
                self._found[slot] = one
        return result

    def found(self, module: Any) -> dict[int, Tensor]:
        for slot, one in self._kept.items():
            tensor = self._found.get(slot)
            node = node_of(tensor) if tensor is not None else None
            if tensor is None or (tuple(tensor.shape), type(node).__name__) != (one.shape, one.kind):
                raise UnseenError(
                    f"a tensor of shape {one.shape} that {type(module).__name__} keeps to itself"
                )
        return self._found


# --- arguments ----------------------------------------------------------------------------------------


def _restored(value: Any, values: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Slot):
        if value.number not in values:
            raise UnseenError("a tensor that was made before the step was written down")
        return values[value.number]
    if isinstance(value, Given):
        if value.cut:
            raise UnseenError(f"a tensor of shape {tuple(value.tensor.shape)} whose making was not seen")
        return value.tensor
    if isinstance(value, Rebuilt):
        import copy

        made = copy.copy(value.value)
        for name, item in value.items.items():
            made[name] = _restored(item, values)
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_restored(item, values) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_restored(item, values) for item in value)
    if type(value) is dict:
        return {name: _restored(item, values) for name, item in value.items()}
    return value
