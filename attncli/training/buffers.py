"""Buffers that steps write to, as they were when the step began."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


class Buffers:
    """Copies of those buffers of the models that were seen to change; the others are never copied."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[nn.Module], list[Tensor]]] = {}
        self._versions: dict[int, int] = {}
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._always: list[tuple[Tensor, Tensor]] = []

    def before(self, module: nn.Module, *, first: bool) -> None:
        """A module is about to be called. `first`: for the first time in this step."""
        if not first:
            return
        known = self._known.get(id(module))
        if known is None or known[0]() is not module:
            known = self._known[id(module)] = (weakref.ref(module), list(module.buffers()))
            for buffer in _running(module):
                self._values[id(buffer)] = (buffer, torch.empty_like(buffer))
                self._always.append(self._values[id(buffer)])
        if self._always:
            with torch.no_grad():
                torch._foreach_copy_([copy for _, copy in self._always], [one for one, _ in self._always])
        for buffer in known[1]:
            version = buffer._version
            if self._versions.setdefault(id(buffer), version) != version:
                self._versions[id(buffer)] = version
                self._values[id(buffer)] = (buffer, buffer.detach().clone())

    @contextmanager
    def as_then(self) -> Iterator[None]:
        """The buffers as they were when the step began; afterwards as they are now."""
        with unwritten(one for _, buffers in self._known.values() for one in buffers):
            _write(list(self._values.values()))
            yield

    def put_back(self) -> None:
        """The buffers as they were when the step began, for good."""
        _write(list(self._values.values()))


class Inputs:
    """Copies of what those modules are given that write to it. That a module does shows when it first did."""

    def __init__(self) -> None:
        self._writers: list[weakref.ref[nn.Module]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> list[tuple[Tensor, int, Tensor | None]]:
        """(tensor, version, copy) of the arguments of a module that is about to be called."""
        writes = any(one() is module for one in self._writers)
        return [
            (one, one._version, one.detach().clone() if writes and one.grad_fn is None else None)
            for one in args
            if isinstance(one, Tensor) and not one.is_inference()
        ]

    def after(
        self, module: nn.Module, args: tuple[Any, ...], before: list[tuple[Tensor, int, Tensor | None]]
    ) -> tuple[Any, ...]:
        """The arguments as they were, as far as they are known."""
        written = [one for one in before if one[0]._version != one[1]]
        if not written:
            return args
        if not any(one() is module for one in self._writers):
            self._writers.append(weakref.ref(module))
        copies = {id(tensor): copy for tensor, _, copy in written if copy is not None}
        return tuple(copies.get(id(one), one) for one in args)


def _running(module: nn.Module) -> Iterator[Tensor]:
    """The statistics of normalisations, which their kernels write to without counting it as a write."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            yield from (one for one in part._buffers.values() if one is not None)


@contextmanager
def unwritten(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Whatever is written to these tensors inside, they are as before afterwards, for autograd as well."""
    before = [(one, one.detach().clone()) for one in tensors if one.device.type != "meta"]
    with ExitStack() as stack:
        for one, _ in before:
            stack.enter_context(_unsafe_preserve_version_counter(one))
        try:
            yield
        finally:
            _write(before)


def _write(values: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in values:
            buffer.copy_(value)
