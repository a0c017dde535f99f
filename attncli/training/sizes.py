"""How large parameters are after each update, and which of them an update threw far out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attncli.records import Moved
from attncli.training.checks import absmax, largest
from attncli.training.models import Roots


class Sizes:
    """The largest magnitude of each parameter. `moved`: those that one update made a hundred times as large.

    `largest`: the name and the magnitude of the largest of all.
    """

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.moved: deque[Moved] = deque(maxlen=_KEPT)
        self.largest: tuple[str | None, float | None] = (None, None)
        # Of each optimiser: which parameters, and their sizes.
        self._known: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        self._names: dict[int, str] = {}

    def before(self, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        """The first update of an optimiser is about to be made."""
        if id(optimizer) not in self._known:
            self._known[id(optimizer)] = (tuple(map(id, parameters)), largest(parameters))

    def after(
        self, optimizer: Any, parameters: Sequence[Tensor], step: int, shared: Tensor | None, *, every: bool
    ) -> Tensor:
        """The sizes after an update, as one vector. `shared`: those over all processes; `every`: all are to be read."""
        ids = tuple(map(id, parameters))
        known = self._known.get(id(optimizer))
        before = known[1] if known is not None and known[0] == ids else None
        sizes = self._read(parameters, before, step, every=every) if shared is None else shared
        self._known[id(optimizer)] = (ids, sizes)
        self.largest = self._largest_of(parameters, sizes)
        if before is not None and all_finite(sizes):
            grown = _grown(before, sizes)
            if bool(grown.any()):
                self._note(optimizer, parameters, step, grown, before, sizes)
        return sizes

    def _read(self, parameters: Sequence[Tensor], before: Tensor | None, step: int, *, every: bool) -> Tensor:
        """The largest magnitudes of all parameters; of most steps, new for a part of them alone.

        What throws parameters far out throws most of them: where a part stands out, all are looked at.
        """
        if before is None or every or len(parameters) <= _PARTS:
            return largest(parameters)
        part = slice(step % _PARTS, None, _PARTS)
        some = largest(parameters[part])
        if not all_finite(some) or bool(_grown(before[part], some).any()):
            return largest(parameters)
        sizes = before.clone()
        sizes[part] = some
        return sizes

    def _largest_of(self, parameters: Sequence[Tensor], sizes: Tensor) -> tuple[str | None, float | None]:
        if not len(sizes):
            return None, None
        at = int(sizes.argmax())
        key = id(parameters[at])
        if key not in self._names:
            self._names.update(self.roots.names())
        return self._names.get(key), float(sizes[at])

    def _note(
        self,
        optimizer: Any,
        parameters: Sequence[Tensor],
        step: int,
        grown: Tensor,
        before: Tensor,
        after: Tensor,
    ) -> None:
        names = self.roots.names()
        for number in grown.nonzero().flatten().tolist():
            parameter = parameters[number]
            self.moved.append(
                Moved(
                    step,
                    names.get(id(parameter), f"parameter {number}"),
                    float(before[number]),
                    float(after[number]),
                    rate_of(optimizer),
                    absmax(parameter.grad) if parameter.grad is not None else None,
                )
            )


def all_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def rate_of(optimizer: Any) -> float | None:
    """The largest learning rate of an optimiser's groups."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    return max(rates) if rates else None


def _grown(before: Tensor, after: Tensor) -> Tensor:
    return after > _GROWN * before.clamp(min=_SMALL)


# --- settings -----------------------------------------------------------------------------------------

_KEPT = 64
# One step that makes a tensor a hundred times as large; the size of one that was nearly zero is no measure.
_GROWN = 100.0
_SMALL = 1e-3
# One pass over the parameters is spread over this many steps.
_PARTS = 16
