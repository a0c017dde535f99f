"""Buffers that steps write to, as they were when the step began."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Buffers:
    """Copies of those buffers of the models that were seen to change; the others are never copied."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[nn.Module], list[Tensor]]] = {}
        self._versions: dict[int, int] = {}
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, module: nn.Module, *, first: bool) -> None:
        """A module is about to be called. `first`: for the first time in this step."""
        if not first:
            return
        known = self._known.get(id(module))
        if known is None or known[0]() is not module:
            known = self._known[id(module)] = (weakref.ref(module), list(module.buffers()))
        for buffer in known[1]:
            version = buffer._version
            if self._versions.setdefault(id(buffer), version) != version:
                self._versions[id(buffer)] = version
                self._values[id(buffer)] = (buffer, buffer.detach().clone())

    @contextmanager
    def as_then(self) -> Iterator[None]:
        """The buffers as they were when the step began; afterwards as they are now."""
        now = [(buffer, buffer.detach().clone()) for buffer, _ in self._values.values()]
        try:
            _write(list(self._values.values()))
            yield
        finally:
            _write(now)


def _write(values: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in values:
            buffer.copy_(value)
