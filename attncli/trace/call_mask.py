"""What hides keys from the queries of a fused call, and what is added to its scores: masks, rules, functions.

This file must not know q and k.

Suffixes: B batch, H query heads, T queries, S keys, C the columns of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attncli.trace.masks import RowFacts, interval_facts, mask_facts
from attncli.trace.zero_one import added_shape

if TYPE_CHECKING:
    from attncli.trace.statistics import FusedCall


class CallMask:
    """Everything between q·k and the softmax that hides keys or adds to scores."""

    def __init__(self, call: FusedCall, shape: tuple[int, int, int, int]) -> None:
        self.call = call
        self.shape = shape
        self.device = call.q_BHTD.device
        self.mask = None if call.mask is None else _narrowed(call.mask.detach())
        self.hides = self.mask is not None
        self.threshold = HIDING
        self.has_bias = False
        self._is_bool = self.mask is not None and self.mask.dtype == torch.bool
        if self.mask is None or not self.mask.numel():
            self.mask, self.hides, self._is_bool = None, False, False
        elif self._is_bool:
            self.hides = not bool(self.mask.all())
        else:
            self._judge_floats(self.mask)
        self.changes_scores = self.has_bias or call.bias is not None
        self._score_bias = False

    def added_shape(self, visible: str) -> str | None:
        """The shape of a mask of zeros and ones that is added, and so hides nothing; None where there is none."""
        if self.mask is None or self._is_bool or not self.has_bias:
            return None
        return added_shape(self.mask, visible)

    def facts(self) -> RowFacts:
        batch, heads, queries, keys = self.shape
        left, right = self._limits()
        if not math.prod(self.shape) or not (self.hides or self.call.visible or self.call.bias):
            return interval_facts(queries, keys, left, right, self.device)
        differing = self.visible(slice(0, batch), slice(0, heads), slice(0, 1)).shape
        facts = mask_facts(self.visible, differing[0], differing[1], queries, keys, self.device)
        self.has_bias = self.has_bias or self._score_bias
        return facts

    def visible(self, b: slice, h: slice, t: slice | Tensor, keys: slice | Tensor = slice(None)) -> Tensor:
        """True where a key may be attended to, in 4 dimensions of which those that all share are 1."""
        indices = self._indices(b, h, t, keys)
        *_, i_T1, j_S = indices
        left, right = self._limits()
        seen = (j_S >= 0).view(1, 1, 1, -1)
        if left is not None:
            seen = seen & (j_S >= i_T1 - left)
        if right is not None:
            seen = seen & (j_S <= i_T1 + right)
        if self.mask is not None and self.hides:
            part = _part(self.mask, b, h, t, keys)
            seen = seen & (part if self._is_bool else ~(part <= self.threshold))
        if self.call.visible is not None:
            seen = seen & self.call.visible(*indices)
        if self.call.bias is not None:
            bias = self.call.bias(torch.zeros((), device=self.device), *indices)
            shown = ~(bias <= HIDING)
            seen = seen & shown
            self._score_bias = self._score_bias or bool(((bias != 0) & shown).any())
        return seen

    def biased(self, s: Tensor, b: slice, h: slice, t: slice | Tensor, keys: slice | Tensor) -> Tensor:
        """`s` with what is added to it; hidden entries get some finite number. `keys` may be (b, C)."""
        if self.call.bias is not None:
            s = self.call.bias(s, *self._indices(b, h, t, keys))
            s = torch.where(s == -torch.inf, 0, s)
        if self.has_bias and self.mask is not None and not self._is_bool:
            part = _part(self.mask, b, h, t, keys).to(s.dtype)
            s = s + (torch.where(part <= self.threshold, 0, part) if self.hides else part)
        return s

    def _judge_floats(self, mask: Tensor) -> None:
        low, high = torch.stack(torch.aminmax(mask)).tolist()
        if high == 0 and HIDING < low <= -50 and _count(mask, lambda part: part == low) == _nonzero(mask):
            # Two values of which one is far below all scores: a mask (−100 in Swin), and no bias.
            self.threshold = low
        self.hides = not low > self.threshold
        if not self.hides:
            self.has_bias = not (low == high == 0)
        elif high == 0:
            self.has_bias = _count(mask, lambda part: part <= self.threshold) != _nonzero(mask)
        else:
            self.has_bias = not high <= self.threshold

    def _limits(self) -> tuple[int | None, int | None]:
        """`left` and `right` of the rule i − left ≤ j ≤ i + right that the call itself states."""
        offset = self.call.causal_offset
        left, right = self.call.window or (None, None)
        lower = None if left is None else left - (offset or 0)
        upper = None if right is None else right + (offset or 0)
        if offset is not None:
            upper = offset if upper is None else min(upper, offset)
        return lower, upper

    def _indices(
        self, b: slice, h: slice, t: slice | Tensor, keys: slice | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = zip(self.shape, (b, h, t, keys), strict=True)
        b_I, h_I, i_I, j_I = (torch.arange(size, device=self.device)[part] for size, part in sizes)
        if j_I.dim() == 2:
            j_I = j_I[:, None, None]
        return b_I[:, None, None, None], h_I[None, :, None, None], i_I[:, None], j_I


def _narrowed(mask: Tensor) -> Tensor:
    """In 4 dimensions, those that are only repeated with size 1."""
    mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))
    for axis in range(4):
        if mask.size(axis) > 1 and mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask


def _part(mask: Tensor, b: slice, h: slice, t: slice | Tensor, keys: slice | Tensor) -> Tensor:
    for axis, index in enumerate((b, h, t)):
        if mask.size(axis) > 1:
            mask = mask[(slice(None),) * axis + (index,)]
    if mask.size(3) == 1:
        return mask
    if isinstance(keys, slice) or keys.dim() == 1:
        return mask[..., keys]
    index_BHTC = keys[:, None, None].expand(-1, mask.size(1), mask.size(2), -1)
    return mask.expand(keys.size(0), -1, -1, -1).gather(-1, index_BHTC)


def _nonzero(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _count(mask: Tensor, holds: Callable[[Tensor], Tensor]) -> int:
    """Entries for which `holds` is true, by pieces: a comparison of the whole would be as large as the mask."""
    pieces = max(1, (1 << 20) // max(1, mask[0, 0].numel() // max(1, mask.size(2))))
    return sum(
        int(torch.count_nonzero(holds(part))) for each in mask.flatten(0, 1) for part in each.split(pieces)
    )


# --- constants ----------------------------------------------------------------------------------------

# An added value this low hides a key: older models add −1e4 or −1e9, newer ones finfo(dtype).min, which is
# −65,504 or less in every dtype.
HIDING = -9000.0
