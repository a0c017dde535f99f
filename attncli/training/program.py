"""What a step did outside and at the border of its modules, so that it can be repeated without the user's script.

A step is a short program: calls of modules, functions of torch on what they returned (the loss), and backward
passes. Each is written down as it happens, with its arguments by reference, and can be called again. Modules are
called as a whole: what happens inside them their own code repeats.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attncli.training.around import Around, autocast, place


class Slot(NamedTuple):
    """A tensor that an earlier entry made."""

    number: int


class Given(NamedTuple):
    """A tensor that was there, and how often it had been written to. `cut`: its own history was not seen."""

    tensor: Tensor
    version: int
    cut: bool


class Operands(NamedTuple):
    """What a call is given, with slots in place of tensors. `reads`: the slots; `given`: who comes from outside."""

    args: Any
    kwargs: Any
    reads: frozenset[int]
    given: frozenset[int]


class Span(NamedTuple):
    """The nodes of autograd's graph that were made while a module ran, by their numbers."""

    begin: int
    end: int


class Kept(NamedTuple):
    """A tensor that a module made and did not return: a loss that it keeps, what a hook took out.

    `node`: which of the nodes of autograd's graph that were made while it ran; `output`: which output of that node.
    """

    node: int
    output: int
    shape: tuple[int, ...]
    kind: str


@dataclass(slots=True)
class Entry:
    """One call. `outputs`: the slots of the tensors that it returned; `place`: file and line of the user's.

    `touches`: slots of tensors whose memory it wrote to through another tensor. `span`, `kept`: of modules, by slot.
    `writes`: its first argument is written to. `has_weights`: `args` are those of a module and the weights, by name,
    that it was called with in place of its own.
    """

    what: Any
    args: Any
    kwargs: Any
    around: Around
    place: tuple[str, int] | None
    outputs: tuple[int, ...] = ()
    made: list[weakref.ref[Tensor]] = field(default_factory=list)
    reads: frozenset[int] = frozenset()
    writes: bool = False
    touches: frozenset[int] = frozenset()
    span: Span | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    has_weights: bool = False

    @property
    def gives(self) -> set[int]:
        """All slots that have another value after it."""
        return {*self.outputs, *self.touches, *self.kept}

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
    # By identity of a tensor: it, its number, and how often it had been written to.
    _slots: dict[int, tuple[weakref.ref[Tensor], int, int]] = field(default_factory=dict)
    # Which of them lie in the same memory.
    _places: dict[Any, set[int]] = field(default_factory=dict)
    _next: int = 0
    # Bytes of tensors that only this program may hold.
    _held: int = 0
    # Of this step: whether a module was called, and how many entries are older than it.
    _has_module: bool = False
    _older: int = 0
    _last_of_before: int = 0
    # Steps in a row that were more than is kept.
    _full_steps: int = 0

    def module_called(
        self,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
        around: Around,
        span: Span | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`span`: see `Span`; `weights`: all it was called with, where they were not its own."""
        self._has_module = True
        given = (args, dict(weights)) if weights else args
        entry = Entry(module, given, kwargs, around, place(), span=span, has_weights=bool(weights))
        self._add(entry, output)
        self._bounded()

    def before(self, func: Any, args: Any, kwargs: Any) -> Operands:
        """The operands of a function that is about to write to one of them."""
        return self._operands(func, args, kwargs, torch.is_grad_enabled())

    def function_called(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        output: Any,
        random: tuple[Any, ...] | None = None,
        before: Operands | None = None,
    ) -> None:
        """`before`: the operands as they were, of a function that wrote to one of them."""
        around = Around(torch.is_grad_enabled(), autocast(), random)
        self._add(Entry(func, args, kwargs, around, place()), output, before)
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
        if not self.is_hopeless:
            self._full_steps = self._full_steps + 1 if self.full else 0
        self.entries = [entry for entry in self.entries if not entry.is_effect]
        # What no gradient flows through is given to the next step as it is: a state that is carried on for ever.
        self._sweep(with_gradients=True)
        self.full, self._has_module = self.is_hopeless, False
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
            if not backward or entry.is_effect or wanted & entry.gives:
                wanted |= entry.reads
                kept.append(entry)
        return kept[::-1]

    @property
    def is_hopeless(self) -> bool:
        """Whether step after step is more than is kept, so that nothing needs to be written down."""
        return self._full_steps >= _FULL_STEPS

    def passes(self) -> list[list[Entry]]:
        """For each backward pass of the step the entries that it depends on, with it."""
        found = []
        for at, entry in enumerate(self.entries):
            if entry.is_backward:
                wanted, kept = set(entry.reads), [entry]
                for one in reversed(self.entries[:at]):
                    if not one.is_effect and wanted & one.gives:
                        wanted |= one.reads
                        kept.append(one)
                found.append(kept[::-1])
        return found

    def given(self, entries: Iterable[Entry] | None = None) -> Iterator[Given]:
        """The tensors that the needed entries, or these, were handed from outside."""
        for entry in self.needed() if entries is None else entries:
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

    def _operands(self, func: Any, args: Any, kwargs: Any, gradients: bool) -> Operands:
        reads: set[int] = set()
        # A value of an earlier step is what it is now where no gradient goes back to what made it.
        cuts = not gradients or getattr(func, "__name__", "") in _CUTTING
        given: set[int] = set()

        def operand(tensor: Tensor) -> Slot | Given:
            found = self._operand(tensor, reads, cuts)
            if type(found) is Given:
                given.add(id(found.tensor))
            return found

        args = _mapped(args, operand)
        kwargs = _mapped(kwargs, operand) if kwargs else kwargs
        return Operands(args, kwargs, frozenset(reads), frozenset(given))

    def _add(self, entry: Entry, output: Any, before: Operands | None = None) -> None:
        if self.full:
            return
        writes = before is not None
        if len(self.entries) >= MOST_ENTRIES:
            self._sweep()
            if len(self.entries) > MOST_ENTRIES // 2:  # looking again and again would take for ever
                self.entries.clear()
                self.full = True
                return
        before = before or self._operands(entry.what, entry.args, entry.kwargs, entry.around.gradients)
        entry.args, entry.kwargs, entry.reads, given = before
        if not (given or entry.reads or entry.is_effect or isinstance(entry.what, nn.Module)):
            return  # made of no tensor, such as random numbers: it is given to the step like its batch
        made = (
            [output]
            if isinstance(output, Tensor)
            else [one for one in flat(output) if isinstance(one, Tensor)]
        )
        if given and any(id(one) in given for one in made):
            return  # it would keep alive what it wrote to, and write to it once more
        entry.writes = writes
        if writes and made:
            entry.touches = self._touched(made[0])
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
        node = node_of(tensor)
        if node is not None and (number := self._kept(tensor, node)):
            reads.add(number)
            return Slot(number)
        return Given(tensor, _version(tensor), node is not None)

    def _kept(self, tensor: Tensor, node: Any) -> int:
        """A new slot for a tensor that a module of this step made and kept to itself; 0 for others."""
        number = number_of(node)
        for entry in self.entries[self._older :]:
            if entry.span is not None and entry.span.begin <= number < entry.span.end:
                slot = self._slot(tensor)
                shape, kind = tuple(tensor.shape), type(node).__name__
                entry.kept[slot] = Kept(number - entry.span.begin, tensor.output_nr, shape, kind)
                entry.made.append(self._slots[id(tensor)][0])
                return slot
        return 0

    def _touched(self, written: Tensor) -> frozenset[int]:
        """Slots of other tensors in the same memory: they are known with what was written as well."""
        found = set()
        for key in self._places.get(_memory(written), ()):
            known = self._slots.get(key)
            tensor = known[0]() if known is not None else None
            if known is None or tensor is None or tensor is written or known[2] != _version(tensor) - 1:
                continue
            self._slots[key] = (known[0], known[1], known[2] + 1)
            found.add(known[1])
        return frozenset(found)

    def _slot(self, tensor: Tensor) -> int:
        """The slot of an output: the tensor's own where it was written in place."""
        known = self._slots.get(id(tensor))
        if known is not None and known[0]() is tensor:
            number = known[1]
        else:
            self._next += 1
            number = self._next
            self._places.setdefault(_memory(tensor), set()).add(id(tensor))
        self._slots[id(tensor)] = (weakref.ref(tensor), number, _version(tensor))
        return number

    def _sweep(self, *, with_gradients: bool = False) -> None:
        wanted: set[int] = set()
        kept: list[Entry] = []
        for entry in reversed(self.entries):
            made = [tensor for reference in entry.made if (tensor := reference()) is not None]
            alive = any(tensor.requires_grad or not with_gradients for tensor in made)
            if entry.is_effect or alive or wanted & entry.gives:
                wanted |= entry.reads
                kept.append(entry)
        self.entries = kept[::-1]
        known = {number for entry in self.entries for number in (*entry.outputs, *entry.kept)}
        self._slots = {
            key: one for key, one in self._slots.items() if one[0]() is not None and one[1] in known
        }
        self._places = {}
        for key, (reference, _, _) in self._slots.items():
            tensor = reference()
            if tensor is not None:
                self._places.setdefault(_memory(tensor), set()).add(key)


def span_begins() -> int:
    """The number that the next node of autograd's graph will have."""
    return int(torch._C._autograd._get_sequence_nr())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def node_of(tensor: Tensor) -> Any:
    """What autograd knows of the making of a tensor; None for nothing."""
    try:
        return tensor.grad_fn
    except RuntimeError:  # a view that was written to under no_grad has no history that one may ask for
        return None


def number_of(node: Any) -> int:
    """When a node of autograd's graph was made, among those of its thread; −1 where it does not say."""
    number = getattr(node, "_sequence_nr", None)
    return int(number()) if number is not None else -1


def _memory(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


class _Parameters:
    """Parameters that are handed on as a whole."""

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        self.parameters = parameters


def _clear(given: _Parameters) -> None:
    for parameter in given.parameters:
        parameter.grad = None


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
    if type(value) in _PLAIN:
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, operand) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, operand) for item in value)
    if type(value) is dict:
        return {name: _mapped(item, operand) for name, item in value.items()}
    if isinstance(value, Mapping):
        return Rebuilt(value, {name: _mapped(item, operand) for name, item in value.items()})
    return value


class Rebuilt(NamedTuple):
    """A mapping of a class of its own, which is copied when it is needed again."""

    value: Any
    items: dict[Any, Any]


# --- tables -------------------------------------------------------------------------------------------

# A step of more functions than these outside its modules is no loss any more.
MOST_ENTRIES = 4096
_MOST_BEFORE = 64 << 20
_MOST_HELD = 1 << 30
_FULL_STEPS = 3
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, slice))
_CUTTING = frozenset(("detach", "detach_", "numpy", "tolist"))
