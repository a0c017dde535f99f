"""The functions of torch that a script calls outside its modules, written down while a step is under way.

A mode sees them, and only between the beginning of a step and its backward pass. It lies at the bottom of the stack of
modes, so that modes which the script enters and leaves meanwhile meet as they would without it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from attncli.training.around import is_written_down, place, random_states
from attncli.training.program import MOST_ENTRIES, Operands, Program


class Functions(TorchFunctionMode):
    """Writes down the functions that are called while it is open. `broken`: is told what went wrong in it."""

    def __init__(self, program: Program, broken: Callable[[Exception], None]) -> None:
        super().__init__()
        self.program, self.broken = program, broken
        self.is_open = False
        self.failed: tuple[Any, Any, Any, tuple[str, int] | None] | None = None
        # Where this step handed a number to Python that is not finite, and the number.
        self.handed: list[tuple[tuple[str, int], float]] = []

    def open(self) -> None:
        if self.program.is_hopeless:
            return
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
        if getattr(func, "__name__", "") in _ATTRIBUTES and getattr(func, "__self__", None) in _GRADIENT:
            return func(*args, **kwargs)  # as often as there are parameters, in every step
        if torch.compiler.is_compiling() or is_written_down():
            return func(*args, **kwargs)
        if not self.is_open or self.program.full:
            return _at_users_line(_original(func), args, kwargs)
        if not torch.is_grad_enabled() and not self.program.entries:
            return _at_users_line(_original(func), args, kwargs)  # an evaluation between two steps
        func = _original(func)
        before = self._before(func, args, kwargs) if _writes(func) else None
        random = random_states() if getattr(func, "__name__", "") in _DRAWS else None
        try:
            result = _at_users_line(func, args, kwargs)
        except Exception:
            self.failed = (func, args, kwargs, place())
            raise
        try:
            if isinstance(result, float) and not math.isfinite(result) and (line := place()) is not None:
                self.handed.append((line, result))
            if self.is_open and _tells(func, result):
                written = args[0] if result is None else result
                self.program.function_called(func, args, kwargs, written, random, before)
        except Exception as error:  # noqa: BLE001 - a fault of ours is no fault of the script's
            self.broken(error)
        return result

    def _before(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operands | None:
        """The operands of a function that is about to write to one, with a copy of it if its making was not seen."""
        if not args or not isinstance(args[0], Tensor):
            return None
        try:
            with torch._C.DisableTorchFunction():
                if not self.program.knows(args[0]) and args[0].numel() <= _MOST_COPIED:
                    args = (args[0].detach().clone(), *args[1:])
                return self.program.before(func, args, kwargs)
        except Exception as error:  # noqa: BLE001 - a fault of ours is no fault of the script's
            self.broken(error)
            return None


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
        if len(_LINES) < MOST_ENTRIES:
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


# --- tables -------------------------------------------------------------------------------------------

_LINE = lambda func, args, kwargs: func(*args, **kwargs)  # noqa: E731 - one line, which any line can stand for
_LINES: dict[tuple[str, int], FunctionType] = {}
# The name by which those who show tracebacks know such a frame.
FRAME = "attncli_calls"

_ATTRIBUTES = frozenset(("__get__", "__set__"))
_GRADIENT = (Tensor.grad, Tensor.requires_grad)
# Backward passes are entries of their own; gradients that are read are there, as parameters are.
_SEEN_OTHERWISE = frozenset(("backward", "register_hook", "grad"))
_MOST_COPIED = 1 << 24
_DRAWS = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout rand_like randn_like "
    "randint_like bernoulli bernoulli_ multinomial normal normal_ uniform_ exponential_ random_ poisson rrelu rrelu_ "
    "gumbel_softmax cauchy_ geometric_ log_normal_ scaled_dot_product_attention dropout_ alpha_dropout_".split()
)
_WITH_LABELS = ("cross_entropy", "nll_loss")
