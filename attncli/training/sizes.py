"""How large parameters are after each update, and which of them an update threw far out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncli.records import Moved
from attncli.training.checks import absmax, is_sharded, largest
from attncli.training.models import Roots


class Sizes:
    """The largest magnitude of each parameter. `moved`: those that one update made a hundred times as large.

    `largest`: the name and the magnitude of the largest of all.
    """

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.moved: deque[Moved] = deque(maxlen=_KEPT)
        self.largest: tuple[str | None, float | None] = (None, None)
        # Of each optimiser: which parameters, and the sizes of their pieces.
        self._known: dict[int, _Known] = {}
        self._names: dict[int, str] = {}

    def before(self, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        """The first update of an optimiser is about to be made."""
        if id(optimizer) not in self._known:
            self._known[id(optimizer)] = _Known.of(parameters)

    def after(
        self, optimizer: Any, parameters: Sequence[Tensor], step: int, shared: Tensor | None, *, every: bool
    ) -> Tensor:
        """The sizes after an update, as one vector. `shared`: those over all processes; `every`: all are to be read."""
        known = self._known.get(id(optimizer))
        same = known is not None and known.ids == tuple(map(id, parameters))
        before = known.sizes() if known is not None and same else None
        if shared is not None:
            sizes = shared
            self._known[id(optimizer)] = _Known(
                tuple(map(id, parameters)), [None] * len(parameters), shared, torch.arange(len(parameters))
            )
        else:
            if known is None or not same or before is None:
                known = self._known[id(optimizer)] = _Known.of(parameters)
            else:
                known.read(parameters, step, every=every)
            sizes = known.sizes()
        self.largest = self._largest_of(parameters, sizes)
        if before is not None and all_finite(sizes):
            grown = _grown(before, sizes)
            if bool(grown.any()):
                self._note(optimizer, parameters, step, grown, before, sizes)
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


@dataclass
class _Known:
    """Parameters in pieces. `cuts`: where a piece lies in its parameter, None for all of it; `owners`: whose it is."""

    ids: tuple[int, ...]
    cuts: list[slice | None]
    values: Tensor
    owners: Tensor

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> _Known:
        """All of them read. A piece is at most a sixteenth of all, so that reading is spread evenly over steps."""
        whole = sum(one.numel() for one in parameters)
        longest = max(_SHORTEST, -(-whole // _PARTS))
        cuts: list[slice | None] = []
        owners: list[int] = []
        for number, parameter in enumerate(parameters):
            length = parameter.numel()
            if length <= longest or is_sharded(parameter) or not parameter.is_contiguous():
                cuts.append(None)
                owners.append(number)
            else:
                cuts += [slice(start, start + longest) for start in range(0, length, longest)]
                owners += [number] * (len(cuts) - len(owners))
        known = cls(tuple(map(id, parameters)), cuts, torch.zeros(0), torch.tensor(owners, dtype=torch.long))
        known.values = largest(known._pieces(parameters, range(len(cuts))))
        return known

    def sizes(self) -> Tensor:
        """The largest magnitude of each parameter; NaN spreads to it."""
        if len(self.values) == len(self.ids):
            return self.values
        found = torch.zeros(len(self.ids), dtype=self.values.dtype)
        return found.scatter_reduce(0, self.owners, self.values, "amax")

    def read(self, parameters: Sequence[Tensor], step: int, *, every: bool) -> None:
        """Reads all pieces anew, or of most steps a part of them.

        What throws parameters far out throws most of them: where a part stands out, all are looked at.
        """
        count = len(self.cuts)
        if not every and (count > _PARTS or any(cut is not None for cut in self.cuts)):
            part = range(step % _PARTS, count, _PARTS)
            some = largest(self._pieces(parameters, part))
            before = self.values[part.start :: part.step]
            if all_finite(some) and not bool(_grown(before, some).any()):
                self.values = self.values.clone()
                self.values[part.start :: part.step] = some
                return
        self.values = largest(self._pieces(parameters, range(count)))

    def _pieces(self, parameters: Sequence[Tensor], numbers: Iterable[int]) -> list[Tensor]:
        owners = self.owners.tolist()
        found = []
        for number in numbers:
            cut, parameter = self.cuts[number], parameters[owners[number]]
            found.append(parameter if cut is None else parameter.detach().view(-1)[cut])
        return found


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
# Elements below which cutting a parameter costs more than reading it.
_SHORTEST = 1 << 16
