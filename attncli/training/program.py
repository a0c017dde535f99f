"""What a step did outside and at the border of its modules, so that it can be repeated without the user's script.

A step is a short program: calls of modules, functions of torch on what they returned (the loss), and backward
passes. Each is written down as it happens, with its arguments by reference, and can be called again. Modules are
called as a whole: what happens inside them their own code repeats.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attncli.training.around import Around, as_then, autocast, place


class Slot(NamedTuple):
    """A tensor that an earlier entry made."""

    number: int


class Given(NamedTuple):
    """A tensor that was there, and how often it had been written to. `cut`: its own history was not seen."""

    tensor: Tensor
    version: int
    cut: bool


@dataclass(slots=True)
class Entry:
    """One call. `outputs`: the slots of the tensors that it returned; `place`: file and line of the user's."""

    what: Any
    args: Any
    kwargs: Any
    around: Around
    place: tuple[str, int] | None
    outputs: tuple[int, ...] = ()
    made: list[weakref.ref[Tensor]] = field(default_factory=list)
    reads: frozenset[int] = frozenset()

    @property
    def is_backward(self) -> bool:
        return self.what is torch.autograd.backward

    @property
    def is_effect(self) -> bool:
        """Whether it is run for what it does to gradients, not for what it returns."""
        return self.is_backward or self.what is _clear


@dataclass
class Program:
    """The entries of the step that is running. `full`: it grew beyond what is kept."""

    entries: list[Entry] = field(default_factory=list)
    full: bool = False
    _slots: dict[int, tuple[weakref.ref[Tensor], int, int]] = field(default_factory=dict)
    _next: int = 0
    # Bytes of tensors that only this program may hold.
    _held: int = 0
    # Of this step: whether a module was called, and how many entries are older than it.
    _has_module: bool = False
    _older: int = 0
    _last_of_before: int = 0

    def module_called(self, module: nn.Module, args: Any, kwargs: Any, output: Any, around: Around) -> None:
        self._has_module = True
        self._add(Entry(module, args, kwargs, around, place()), output)
        self._bounded()

    def function_called(
        self, func: Any, args: Any, kwargs: Any, output: Any, random: tuple[Any, ...] | None = None
    ) -> None:
        around = Around(torch.is_grad_enabled(), autocast(), random)
        self._add(Entry(func, args, kwargs, around, place()), output)
        self._bounded()

    def backward_called(self, args: Any, kwargs: Any) -> None:
        self._add(
            Entry(
                torch.autograd.backward,
                args,
                kwargs,
                Around(torch.is_grad_enabled(), autocast(), None),
                place(),
            ),
            None,
        )

    def cleared(self, parameters: Sequence[Tensor]) -> bool:
        """Gradients were set to zero; whether there were any of this step."""
        if not any(entry.is_backward for entry in self.entries):
            return False
        around = Around(False, (), None)
        self._add(Entry(_clear, (_Parameters(tuple(parameters)),), {}, around, None), None)
        return True

    def step_ended(self) -> None:
        """Forgets all but what tensors that are still alive were made by."""
        self.entries = [entry for entry in self.entries if not entry.is_effect]
        # What no gradient flows through is given to the next step as it is: a state that is carried on for ever.
        self._sweep(with_gradients=True)
        self.full = self._has_module = False
        self._held, self._older, self._last_of_before = 0, len(self.entries), self._next

    def knows(self, tensor: Tensor) -> bool:
        """Whether an entry made this tensor, and nothing that was not seen has written to it since."""
        known = self._slots.get(id(tensor))
        return known is not None and known[0]() is tensor and known[2] == _version(tensor)

    def needed(self) -> list[Entry]:
        """The entries that the backward passes of this step depend on, or all where there was none yet."""
        wanted: set[int] = set()
        backward = any(entry.is_backward for entry in self.entries)
        kept: list[Entry] = []
        for entry in reversed(self.entries):
            if not backward or entry.is_effect or wanted & {*entry.outputs}:
                wanted |= entry.reads
                kept.append(entry)
        return kept[::-1]

    def given(self) -> Iterator[Given]:
        """The tensors that the needed entries were handed from outside."""
        for entry in self.needed():
            yield from (one for one in flat((entry.args, entry.kwargs)) if isinstance(one, Given))

    def first_given(self) -> Iterator[list[Tensor]]:
        """The tensors from outside that modules were handed: their own code names them."""
        for entry in self.needed():
            if isinstance(entry.what, nn.Module):
                yield [one.tensor for one in flat((entry.args, entry.kwargs)) if isinstance(one, Given)]

    def modules(self) -> list[nn.Module]:
        """The modules that the needed entries call, each once."""
        found = {id(entry.what): entry.what for entry in self.needed() if isinstance(entry.what, nn.Module)}
        return list(found.values())

    def _add(self, entry: Entry, output: Any) -> None:
        if len(self.entries) >= MOST_ENTRIES:
            self._sweep()
            if len(self.entries) >= MOST_ENTRIES:
                self.full = True
                return
        reads: set[int] = set()
        # A value of an earlier step is what it is now where no gradient goes back to what made it.
        cuts = not entry.around.gradients or getattr(entry.what, "__name__", "") in _CUTTING
        entry.args = _mapped(entry.args, lambda tensor: self._operand(tensor, reads, cuts))
        entry.kwargs = _mapped(entry.kwargs, lambda tensor: self._operand(tensor, reads, cuts))
        entry.reads = frozenset(reads)
        made = [one for one in flat(output) if isinstance(one, Tensor)]
        given = {id(one.tensor) for one in flat((entry.args, entry.kwargs)) if isinstance(one, Given)}
        if any(id(one) in given for one in made):
            return  # it would keep alive what it wrote to, and write to it once more
        entry.outputs = tuple(self._slot(tensor) for tensor in made)
        entry.made = [self._slots[id(tensor)][0] for tensor in made]
        self.entries.append(entry)

    def _bounded(self) -> None:
        """Holds no more of what the run would have let go than a batch or some."""
        if not self._has_module and self._held > _MOST_BEFORE:
            # A long computation between two steps, which is no preparation of a batch.
            del self.entries[self._older :]
            self._held = 0
        elif self._held > _MOST_HELD:
            self.entries.clear()
            self._held, self._older, self.full = 0, 0, True

    def _operand(self, tensor: Tensor, reads: set[int], cuts: bool) -> Slot | Given:
        if cuts and self.knows(tensor) and self._slots[id(tensor)][1] <= self._last_of_before:
            # Not the tensor itself: held here, it would keep all that it was made of.
            return Given(tensor.detach(), _version(tensor), False)
        if self.knows(tensor):
            number = self._slots[id(tensor)][1]
            reads.add(number)
            return Slot(number)
        if not tensor.requires_grad:
            self._held += tensor.numel() * tensor.element_size()
        return Given(tensor, _version(tensor), tensor.grad_fn is not None)

    def _slot(self, tensor: Tensor) -> int:
        """The slot of an output: the tensor's own where it was written in place."""
        known = self._slots.get(id(tensor))
        if known is not None and known[0]() is tensor:
            number = known[1]
        else:
            self._next += 1
            number = self._next
        self._slots[id(tensor)] = (weakref.ref(tensor), number, _version(tensor))
        return number

    def _sweep(self, *, with_gradients: bool = False) -> None:
        wanted: set[int] = set()
        kept: list[Entry] = []
        for entry in reversed(self.entries):
            made = [tensor for reference in entry.made if (tensor := reference()) is not None]
            alive = any(tensor.requires_grad or not with_gradients for tensor in made)
            if entry.is_effect or alive or wanted & {*entry.outputs}:
                wanted |= entry.reads
                kept.append(entry)
        self.entries = kept[::-1]
        known = {number for entry in self.entries for number in entry.outputs}
        self._slots = {
            key: one for key, one in self._slots.items() if one[0]() is not None and one[1] in known
        }


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class UnseenError(Exception):
    """A part of the step was made by something that was not seen. Its text says what."""


class _Parameters:
    """Parameters that are handed on as a whole."""

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        self.parameters = parameters


def _clear(given: _Parameters) -> None:
    for parameter in given.parameters:
        parameter.grad = None


def is_cut(entry: Entry) -> bool:
    """Whether it was handed a tensor with a history that was not seen."""
    return any(isinstance(one, Given) and one.cut for one in flat((entry.args, entry.kwargs)))


def repeat(
    entries: list[Entry], stand_in: Callable[[nn.Module], nn.Module] = lambda module: module
) -> tuple[Tensor, ...]:
    """Runs the entries again; what the last backward pass began at, or the last outputs.

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
            shown = tuple(
                one for one in flat(args[0] if args else kwargs["tensors"]) if isinstance(one, Tensor)
            )
        with as_then(entry.around):
            result = _called(what, args, kwargs, entry.place)
        # What writes into a tensor and returns nothing has made that tensor.
        returned = args[0] if result is None and args and not entry.is_effect else result
        made = [one for one in flat(returned) if isinstance(one, Tensor)]
        values.update(zip(entry.outputs, made, strict=False))
        if not entry.is_backward and made:
            shown = tuple(made) if not any(one.is_backward for one in entries) else shown
    return shown


def _called(what: Any, args: Any, kwargs: Any, said_place: tuple[str, int] | None) -> Any:
    """Calls on behalf of a line of the user's: whoever looks for it reads `said_place` here."""
    return what(*args, **kwargs)


# --- arguments ----------------------------------------------------------------------------------------


def flat(value: Any) -> Iterator[Any]:
    """What lies in tuples, lists, mappings and the fields of outputs."""
    if isinstance(value, (Slot, Given)):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from flat(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from flat(getattr(value, name, None))
    else:
        yield value


def _mapped(value: Any, operand: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return operand(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, operand) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, operand) for item in value)
    if type(value) is dict:
        return {name: _mapped(item, operand) for name, item in value.items()}
    if isinstance(value, Mapping):
        return _Rebuilt(value, {name: _mapped(item, operand) for name, item in value.items()})
    return value


class _Rebuilt(NamedTuple):
    """A mapping of a class of its own, which is copied when it is needed again."""

    value: Any
    items: dict[Any, Any]


def _restored(value: Any, values: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Slot):
        if value.number not in values:
            raise UnseenError("a value that was made before the step was recorded")
        return values[value.number]
    if isinstance(value, Given):
        if value.cut:
            raise UnseenError(f"a tensor of shape {tuple(value.tensor.shape)} whose making was not seen")
        return value.tensor
    if isinstance(value, _Rebuilt):
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


# --- tables -------------------------------------------------------------------------------------------

# A step of more functions than these outside its modules is no loss any more.
MOST_ENTRIES = 4096
_MOST_BEFORE = 64 << 20
_MOST_HELD = 1 << 30
_CUTTING = frozenset(("detach", "detach_", "numpy", "tolist"))
