"""Scores that the model's own code holds in memory, read tile by tile and never copied whole.

Which keys are hidden is read from the scores themselves. This file must not know what is made of them.

Suffixes: B batch, H heads, T queries, S keys, C the columns of one tile, R chosen rows.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from attncli.trace.masks import first_position, mask_facts, visibility
from attncli.trace.tiles import FIELDS, Room, Sums, Tile, big, edge, wide


class EagerScores:
    """Scores (B, H, T, S) and, where they are not their softmax, the probabilities.

    What is visible is judged by the first `judged_heads`; that the others agree is known once all were summed.
    """

    group = 1
    looks_back = False  # other heads may see what the first does not

    def __init__(
        self,
        scores_BHTS: Tensor,
        probs_BHTS: Tensor,
        visible_above: float,
        recompute: bool,
        same_tokens: bool = True,
        judged_heads: int = 1,
    ) -> None:
        batch, heads, queries, keys = scores_BHTS.shape
        self.shape = (batch, heads, queries, keys)
        self.scores_BHTS = scores_BHTS.detach()
        self.probs_BHTS = None if recompute else probs_BHTS.detach()
        self.visible_above = visible_above
        self.device = scores_BHTS.device
        self.dtype = torch.float64 if scores_BHTS.dtype == torch.float64 else torch.float32
        self.shared = True
        facts = mask_facts(self._visible, batch, min(judged_heads, heads), queries, keys, self.device)
        self.visibility = visibility(facts, batch, queries, keys, same_tokens)
        order_BS = self.visibility.order_BS
        self.order_BS = None if order_BS is None else order_BS.expand(batch, -1)
        self.position = first_position(self.visibility.causal_offset, queries, keys)
        self._room = Room(self.dtype, self.device)

    def reader(self) -> EagerScores:
        """The same scores with room of its own, for another thread."""
        reader = copy.copy(self)
        reader._room = Room(self.dtype, self.device)
        return reader

    def tile(self, b: slice, h: slice, t: slice, *, counting: bool = False) -> Tile:
        """A copy of these scores, in float32 or better."""
        part = self.scores_BHTS[b, h, t]
        s_BHTC, visible_BHTC = self._room.view(2, *part.shape)
        s_BHTC.copy_(self._in_order(part, b))
        torch.le(s_BHTC, self.visible_above, out=visible_BHTC).neg_().add_(1)
        # −Inf hides a key, and −Inf · 0 would be NaN; NaN stays.
        s_BHTC.clamp_(min=-big(self.dtype))
        return Tile(
            b,
            h,
            t,
            0,
            s_BHTC,
            [edge(0, part.size(-1), visible_BHTC)],
            probs_BHTC=None if self.probs_BHTS is None else self._in_order(self.probs_BHTS[b, h, t], b),
            count_BHT=visible_BHTC.sum(-1),
        )

    def recounted(self, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
        """Visible keys, rows that count and masked rows of every head: (B, H, T) each."""
        allowed_BHT = sums.rows[FIELDS.index("count")].long()
        padded_BHT = self.visibility.padded_BT[:, None].expand(allowed_BHT.shape)
        self.shared = bool((allowed_BHT == self.visibility.allowed_BHT).all())
        some_BHT = allowed_BHT > 0
        return allowed_BHT, some_BHT & ~padded_BHT, ~some_BHT & ~padded_BHT

    def column(self, head: int, key: int) -> Tensor:
        if self.order_BS is None:
            return self._logits((slice(None), head, slice(None), key))
        keys = self.order_BS[:, key].tolist()
        return torch.stack([self._logits((b, head, slice(None), place)) for b, place in enumerate(keys)])

    def chosen_rows(self, batch: int, head: int, rows_R: Tensor) -> Tensor:
        logits_RS = self._logits((batch, head, rows_R))
        return logits_RS if self.order_BS is None else logits_RS[:, self.order_BS[batch]]

    def _in_order(self, part_BHTS: Tensor, b: slice) -> Tensor:
        if self.order_BS is None:
            return part_BHTS
        return part_BHTS.gather(-1, self.order_BS[b, None, None].expand(part_BHTS.shape))

    def _logits(self, index: tuple[int | slice | Tensor, ...]) -> Tensor:
        if self.probs_BHTS is not None:
            return wide(self.probs_BHTS[index]).log()
        scores = wide(self.scores_BHTS[index])
        return torch.where(scores <= self.visible_above, -torch.inf, scores)

    def _visible(self, b: slice, h: slice, t: slice) -> Tensor:
        return ~(self.scores_BHTS[b, h, t] <= self.visible_above)
