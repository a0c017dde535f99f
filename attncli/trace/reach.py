"""How near the numbers of a run came to the end of their dtype, but for what the code wrote out itself.

A mask of the smallest number hides keys and is no overflow to come: neither where it is made, nor where it is added to
scores. What stands beside it in the same tensor counts by its largest element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from attncli.trace.tape import ALIAS, Node, Ran


@dataclass(slots=True)
class Reach:
    """`largest`: by dtype the largest finite magnitude that any operator made, and the node that did.

    `beyond`: operators whose largest magnitude is beyond `limit`.
    """

    limit: float = math.inf
    largest: dict[torch.dtype, tuple[float, Node]] = field(default_factory=dict)
    beyond: list[tuple[Node, float]] = field(default_factory=list)
    # The largest magnitude in each mask, by the serial of its node.
    _masks: dict[int, float] = field(default_factory=dict)

    def given(self, node: Node, low: float, high: float) -> None:
        """A buffer or an input. Without anything above 0, it hides keys."""
        if low <= -_HIDING and high <= 0.0:
            self._masks[node.serial] = -low

    def made(self, node: Node, run: Ran, low: float, high: float) -> None:
        """An operator gave numbers from `low` to `high`."""
        reached = max(-low, high)
        if reached <= self.limit and reached <= self.largest.get(node.dtype, _NOTHING)[0]:
            return
        if reached >= _HIDING and self._is_mask(node, run, low, high):
            self._masks[node.serial] = reached
            reached = max(0.0, min(-low, high))  # what stands beside it
        if reached > self.largest.get(node.dtype, _NOTHING)[0]:
            self.largest[node.dtype] = (reached, node)
        if reached > self.limit and len(self.beyond) < _MOST:
            self.beyond.append((node, reached))

    def _is_mask(self, node: Node, run: Ran, low: float, high: float) -> bool:
        """Whether the largest magnitude is a number of the code, or one with scores added to it."""
        reached = max(-low, high)
        written = max(map(abs, _literals((run.args, tuple(run.kwargs.values())))), default=0.0)
        if node.op.kind == "factor" or -low < high:
            # A factor of zeros and ones, or one number everywhere; any other factor computes.
            flat = low == high or max(low, -high) == 0.0
            if flat and abs(written - reached) <= written * _ROUNDED:
                return True
        elif reached <= _SCORES_BESIDE * written:
            return True
        operands = node.operands
        if node.op.product:
            # What a product is added to stands in front of its factors.
            operands = operands[:1] if node.op.name.startswith(("add", "badd")) else ()
        return reached <= _SCORES_BESIDE * sum(self._under(ref.node) for ref in operands)

    def _under(self, node: Node) -> float:
        """The magnitude of the mask that a view shows, or that was partly written to; 0 of anything else."""
        waiting, met = [node], 0
        while waiting and met < _MOST_VIEWS:
            one = waiting.pop()
            met += 1
            if one.serial in self._masks:
                return self._masks[one.serial]
            if one.op is ALIAS or one.op.writes or one.op.kind in _VIEWS:
                waiting += [ref.node for ref in one.operands]
        return 0.0


def _literals(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _literals(item)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield value


# --- settings -----------------------------------------------------------------------------------------

# Masks are written as -1e4 (in float16), -1e9, or the smallest number of the dtype.
_HIDING = 1e3
_SCORES_BESIDE = 1.0625
_ROUNDED = 2**-7  # to bfloat16
_VIEWS = frozenset(("reshape", "permute", "expand", "slice", "same"))
_MOST_VIEWS = 16
_MOST = 256
_NOTHING = (0.0, None)
