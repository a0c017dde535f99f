"""What a step did outside and at the border of its modules, so that it can be repeated without the user's script.

A step is a short program: calls of modules, functions of torch on what they returned (the loss), and backward
passes. Each is written down as it happens, with its arguments by reference, and can be called again. Modules are
called as a whole: what happens inside them their own code repeats.

Functions are seen by a function mode, and only between the first module call of a step and its backward pass. The
mode lies at the bottom of the stack of modes, so that modes which the script enters and leaves meanwhile meet as
they would without it.
"""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


class Slot(NamedTuple):
    """A tensor that an earlier entry made."""

    number: int


class Given(NamedTuple):
    """A tensor that was there, and how often it had been written to. `cut`: its own history was not seen."""

    tensor: Tensor
    version: int
    cut: bool


class Around(NamedTuple):
    """The settings under which an entry ran. `random`: only of calls of modules."""

    gradients: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    random: tuple[Any, ...] | None


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
        self._add(Entry(module, args, kwargs, around, _place()), output)
        self._bounded()

    def function_called(
        self, func: Any, args: Any, kwargs: Any, output: Any, random: tuple[Any, ...] | None = None
    ) -> None:
        around = Around(torch.is_grad_enabled(), _autocast(), random)
        self._add(Entry(func, args, kwargs, around, _place()), output)
        self._bounded()

    def backward_called(self, args: Any, kwargs: Any) -> None:
        self._add(Entry(torch.autograd.backward, args, kwargs, _around(), _place()), None)

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
            yield from (one for one in _flat((entry.args, entry.kwargs)) if isinstance(one, Given))

    def first_given(self) -> Iterator[list[Tensor]]:
        """The tensors from outside that modules were handed: their own code names them."""
        for entry in self.needed():
            if isinstance(entry.what, nn.Module):
                yield [one.tensor for one in _flat((entry.args, entry.kwargs)) if isinstance(one, Given)]

    def modules(self) -> list[nn.Module]:
        """The modules that the needed entries call, each once."""
        found = {id(entry.what): entry.what for entry in self.needed() if isinstance(entry.what, nn.Module)}
        return list(found.values())

    def _add(self, entry: Entry, output: Any) -> None:
        if len(self.entries) >= _MOST_ENTRIES:
            self._sweep()
            if len(self.entries) >= _MOST_ENTRIES:
                self.full = True
                return
        reads: set[int] = set()
        # A value of an earlier step is what it is now where no gradient goes back to what made it.
        cuts = not entry.around.gradients or getattr(entry.what, "__name__", "") in _CUTTING
        entry.args = _mapped(entry.args, lambda tensor: self._operand(tensor, reads, cuts))
        entry.kwargs = _mapped(entry.kwargs, lambda tensor: self._operand(tensor, reads, cuts))
        entry.reads = frozenset(reads)
        made = [one for one in _flat(output) if isinstance(one, Tensor)]
        given = {id(one.tensor) for one in _flat((entry.args, entry.kwargs)) if isinstance(one, Given)}
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
    return any(isinstance(one, Given) and one.cut for one in _flat((entry.args, entry.kwargs)))


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
                one for one in _flat(args[0] if args else kwargs["tensors"]) if isinstance(one, Tensor)
            )
        with _as_then(entry.around):
            result = _called(what, args, kwargs, entry.place)
        # What writes into a tensor and returns nothing has made that tensor.
        returned = args[0] if result is None and args and not entry.is_effect else result
        made = [one for one in _flat(returned) if isinstance(one, Tensor)]
        values.update(zip(entry.outputs, made, strict=False))
        if not entry.is_backward and made:
            shown = tuple(made) if not any(one.is_backward for one in entries) else shown
    return shown


def _called(what: Any, args: Any, kwargs: Any, said_place: tuple[str, int] | None) -> Any:
    """Calls on behalf of a line of the user's: whoever looks for it reads `said_place` here."""
    return what(*args, **kwargs)


def index_beyond(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """ "; cross_entropy was given label 7 at [3], of 5 classes" where a call failed for such a label; otherwise ""."""
    name = getattr(func, "__name__", "")
    given = [*args, *kwargs.values()]
    tensors = [one for one in given if isinstance(one, Tensor)]
    if name not in _WITH_LABELS or len(tensors) < 2 or tensors[0].dim() < 1:
        return ""
    scores, labels = tensors[:2]
    if labels.is_floating_point():
        return ""
    classes = scores.shape[1 if scores.dim() > 1 else 0]
    ignored = kwargs.get("ignore_index", -100)
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignored)
    if not bool(wrong.any()):
        return ""
    at = wrong.nonzero()[0].tolist()
    return f"; {name} was given label {int(labels[tuple(at)])} at {at}, of {classes} classes"


# --- seeing functions ---------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    """Writes down the functions that are called while it is open. `broken`: is told what went wrong in it."""

    def __init__(self, program: Program, broken: Callable[[Exception], None]) -> None:
        super().__init__()
        self.program, self.broken = program, broken
        self.is_open = False
        self.failed: tuple[Any, Any, Any, tuple[str, int] | None] | None = None

    def open(self) -> None:
        self.is_open = True
        if self not in _get_current_function_mode_stack():
            _at_bottom(self, present=True)

    def close(self) -> None:
        """Hears nothing from now on. While one of its own calls runs it is off the stack, and comes back after it."""
        self.is_open = False
        if self in _get_current_function_mode_stack():
            _at_bottom(self, present=False)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Closed for a while, as for a loader that makes its batch in this process."""
        was_open = self.is_open
        if was_open:
            self.close()
        try:
            yield
        finally:
            if was_open:
                self.open()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if not self.is_open:
            return _at_users_line(_original(func), args, kwargs)
        if not torch.is_grad_enabled() and not self.program.entries:
            return _at_users_line(_original(func), args, kwargs)  # an evaluation between two steps
        func = _original(func)
        before = self._before(func, args)
        random = _random() if getattr(func, "__name__", "") in _DRAWS else None
        try:
            result = _at_users_line(func, args, kwargs)
        except Exception:
            self.failed = (func, args, kwargs, _place())
            raise
        try:
            if self.is_open and _tells(func, result) and any(map(_has_tensor, (args, kwargs))):
                written = args[0] if result is None else result
                self.program.function_called(func, before, kwargs, written, random)
        except Exception as error:  # noqa: BLE001 - a fault of ours is no fault of the script's
            self.broken(error)
        return result

    def _before(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, with a copy of a tensor of unknown making that the function is about to write to."""
        if not _writes(func) or not args or not isinstance(args[0], Tensor) or self.program.knows(args[0]):
            return args
        with torch._C.DisableTorchFunction():
            return args if args[0].numel() > _MOST_COPIED else (args[0].detach().clone(), *args[1:])


def _original(func: Any) -> Any:
    """The function of torch that was called, where a script has put one of its own in its place.

    Such a function calls the original, which finds the mode and hands on what its name means now: the script's.
    """
    if getattr(func, "__module__", None) is None or str(func.__module__).partition(".")[0] == "torch":
        return func
    handing_on = sys._getframe(2)
    frame = handing_on.f_back
    if handing_on.f_code.co_name != "handle_torch_function" or frame is None:
        return func
    return FunctionType(frame.f_code, frame.f_globals, frame.f_code.co_name)


def _at_users_line(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls `func` as if the user's line did: Python and torch say of a warning which line it comes from."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "attncli"):
        if frame.f_back is None:
            return func(*args, **kwargs)
        frame = frame.f_back
    key = (frame.f_code.co_filename, frame.f_lineno)
    known = _LINES.get(key)
    if known is None or known.__globals__ is not frame.f_globals:
        code = _LINE.__code__.replace(co_filename=key[0], co_firstlineno=key[1], co_name=FRAME)
        known = FunctionType(code, frame.f_globals, FRAME)
        if len(_LINES) < _MOST_ENTRIES:
            _LINES[key] = known
    return known(func, args, kwargs)


def _at_bottom(mode: TorchFunctionMode, *, present: bool) -> None:
    """Puts a mode under all others, or takes it out from there; the others stay as they are."""
    others = [one for one in _get_current_function_mode_stack() if one is not mode]
    while torch._C._len_torch_function_stack():
        _pop_mode()
    for one in [mode, *others] if present else others:
        _push_mode(one)


def _tells(func: Any, result: Any) -> bool:
    """Whether a function made or wrote a tensor: attributes and sizes are no part of a step."""
    if result is None:
        return _writes(func)
    if isinstance(result, Tensor):
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name not in _SEEN_OTHERWISE
    return isinstance(result, (tuple, list)) and any(isinstance(one, Tensor) for one in result)


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


# --- surroundings -------------------------------------------------------------------------------------


def around_module() -> Around:
    """The settings now, with the random states."""
    return Around(torch.is_grad_enabled(), _autocast(), _random())


def _around() -> Around:
    return Around(torch.is_grad_enabled(), _autocast(), None)


def _autocast() -> tuple[tuple[str, bool, torch.dtype], ...]:
    return tuple(
        (kind, True, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind)
    )


def _random() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return (
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
        on_gpu,
    )


@contextmanager
def _as_then(around: Around) -> Iterator[None]:
    if around.random is not None:
        on_cpu, python, numpy, on_gpu = around.random
        torch.set_rng_state(on_cpu)
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(around.gradients))
        for kind, enabled, dtype in around.autocast:
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
        yield


def _place() -> tuple[str, int] | None:
    """The innermost line of code that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "attncli"):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _has_tensor(value: Any) -> bool:
    """What is made of no tensor, such as random numbers, is given to the step like its batch."""
    return any(isinstance(one, Tensor) for one in _flat(value))


# --- arguments ----------------------------------------------------------------------------------------


def _flat(value: Any) -> Iterator[Any]:
    """What lies in tuples, lists, mappings and the fields of outputs."""
    if isinstance(value, (Slot, Given)):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _flat(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from _flat(getattr(value, name, None))
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


_LINE = lambda func, args, kwargs: func(*args, **kwargs)  # noqa: E731 - one line, which any line can stand for
_LINES: dict[tuple[str, int], FunctionType] = {}
# The name by which those who show tracebacks know such a frame.
FRAME = "attncli_calls"

# --- tables -------------------------------------------------------------------------------------------

_KINDS = ("cpu", "cuda", *(("mps",) if torch.backends.mps.is_available() else ()))
# Backward passes are entries of their own; gradients that are read are there, as parameters are.
_SEEN_OTHERWISE = frozenset(("backward", "register_hook", "grad"))
# A step of more functions than these outside its modules is no loss any more.
_MOST_ENTRIES = 4096
_MOST_COPIED = 1 << 24
_MOST_BEFORE = 64 << 20
_MOST_HELD = 1 << 30
_CUTTING = frozenset(("detach", "detach_", "numpy", "tolist"))
_DRAWS = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout rand_like randn_like "
    "randint_like bernoulli bernoulli_ multinomial normal normal_ uniform_ exponential_ random_ poisson rrelu rrelu_ "
    "gumbel_softmax cauchy_ geometric_ log_normal_ scaled_dot_product_attention dropout_ alpha_dropout_".split()
)
_WITH_LABELS = ("cross_entropy", "nll_loss")
