"""What stands between a run and those who watch it: their errors, other threads, modes that the script has entered."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from attncli.training.around import is_written_down
from attncli.training.functions import Functions
from attncli.training.program import Program


class Guard(ABC):
    """Calls functions of ours beside a run that must not notice them.

    `paused`: whether the hooks are to be silent, as during a replay. `failed`: whether one of ours raised, which ends
    the watch. `elsewhere`: other threads in which something was seen.
    """

    def __init__(self, program: Program) -> None:
        self.functions = Functions(program, self.fail)
        self.paused = 0
        self.failed = False
        self.elsewhere: set[int] = set()
        self._thread = threading.get_ident()

    @abstractmethod
    def has_begun(self) -> bool:
        """Whether anything was seen yet: the first thread in which something is, is the one that trains."""

    @abstractmethod
    def gave_up(self, error: Exception) -> None:
        """Told once, of the error that ended the watch."""

    @property
    @abstractmethod
    def may_measure(self) -> tuple[Callable[..., Any], ...]:
        """Functions that may begin or end a measurement, which is a dispatch mode itself."""

    def guarded(self, function: Callable[..., Any], *given: Any) -> Any:
        """Calls a function of ours. What it raises as an error of ours is told, once, and ends the watch."""
        if self.paused or not self._is_mine() or is_written_down():
            return None
        if self.failed:
            self.functions.close()  # it may have come back to the stack when the call that failed ended
            return None
        if not self.functions.is_open and torch._C._len_torch_function_stack():
            self.functions.close()  # it comes back to the stack behind a call that closed it, such as backward()
        try:
            if torch._C._len_torch_dispatch_stack() or (
                torch._C._len_torch_function_stack() > self.functions.is_open
            ):
                with self._apart(function):
                    return function(*given)
            return function(*given)
        except Exception as error:  # noqa: BLE001 - the run must not end by a fault of ours
            self.fail(error)
            return None

    @contextmanager
    def _apart(self, function: Callable[..., Any]) -> Iterator[None]:
        """Modes that the script has entered hear nothing of what is done inside."""
        with ExitStack() as stack:
            if torch._C._len_torch_function_stack() > self.functions.is_open:
                stack.enter_context(torch._C.DisableTorchFunction())
            if torch._C._len_torch_dispatch_stack() and function not in self.may_measure:
                stack.enter_context(_disable_current_modes())
            yield

    def _is_mine(self) -> bool:
        """Whether this is the thread that trains: the first in which anything is seen."""
        here = threading.get_ident()
        if here == self._thread:
            return True
        if not self.has_begun():
            self._thread = here
            return True
        self.elsewhere.add(here)
        return False

    def fail(self, error: Exception) -> None:
        if not self.failed:
            self.failed = True
            self.functions.close()
            self.gave_up(error)

    @contextmanager
    def silent(self) -> Any:
        """No hook hears anything meanwhile."""
        was_open = self.functions.is_open
        self.functions.close()
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1
            if was_open and not self.failed:
                self.functions.open()
