# ruff: noqa: N815  (fields carry shape suffixes)
"""Tiles of scores → a few numbers per row → numbers per head. Nothing of size T·S outlives its tile.

A tile holds the scores of some heads and rows over the keys that these rows can see. The hot path is made of
passes over a tile that fits the cache, so what can be known without one is: rows are judged once, at the end,
from running sums in float64 (float32 on devices without it). This file must not know where scores come from.

Suffixes: B batch, H query heads, T query rows, S keys, C the columns of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

SAFE = 32.0
"""Row maxima within ±SAFE need no shift before exp: sums stay within 1e±14 and keep float32's digits."""

FIELDS = ("max", "min", "shift", "sum", "norm", "z", "ps", "e_sink", "d_sink", "distance", "peak", "count")
"""Per row, with d = s − shift, p = exp d over visible keys: largest and smallest s; Σ d; ‖d‖₂; Σ p and
Σ p·d without the guessed sink key; p and d of that key; Σ p·|query − key|; largest probability (largest s
where the probabilities are the softmax); number of visible keys (where tiles count them)."""


@dataclass(slots=True)
class Edge:
    """Columns [start, stop) of a tile that not every row sees: `visible_BHTC` is 1.0 or 0.0, or broadcasts to it."""

    start: int
    stop: int
    visible_BHTC: Tensor


@dataclass(slots=True)
class Tile:
    """Scores of `heads` and `rows` over the columns [first, first + C); overwritten by whoever reduces it.

    `finite`: no NaN or Inf is among them, so that hiding by arithmetic is safe. `bounded`: no score lies
    outside ±SAFE. `probs_BHTC`: the probabilities as they are, where they are not the softmax.
    """

    batch: slice
    heads: slice
    rows: slice
    first: int
    scores_BHTC: Tensor
    edges: list[Edge] = field(default_factory=list)
    finite: bool = True
    bounded: bool = False
    probs_BHTC: Tensor | None = None
    count_BHT: Tensor | None = None


class Sums:
    """Running numbers of one call. `sinks_H`: learned logits; `guess_H`: the column taken for the sink key."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        counted_BHT: Tensor,
        guess_H: Tensor,
        position: int,
        order_BS: Tensor | None,
        sinks_H: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        batch, heads, queries, keys = shape
        device = counted_BHT.device
        self.rows = torch.zeros(len(FIELDS), batch, heads, queries, dtype=dtype, device=device)
        self.mass_BHS = torch.zeros(batch, heads, keys, dtype=dtype, device=device)
        self.counted_BHT = counted_BHT.expand(batch, heads, queries)
        self.guess_H = guess_H
        self.sinks_H = None if sinks_H is None else sinks_H.to(dtype)
        self._position = position
        self._order_BS = order_BS
        self._room = torch.empty(0, dtype=dtype, device=device)

    def add(self, tile: Tile) -> None:
        """Takes a tile's rows into the sums. About eight passes over the tile."""
        d_BHTC = tile.scores_BHTC
        counted_BHT = self.counted_BHT[tile.batch, tile.heads, tile.rows]
        count_BHT = torch.zeros_like(d_BHTC[..., 0]) if tile.count_BHT is None else tile.count_BHT
        if tile.count_BHT is not None:
            counted_BHT = counted_BHT & (count_BHT > 0)
        for edge in tile.edges:
            hide(d_BHTC[..., edge.start : edge.stop], edge.visible_BHTC, tile.finite)
        max_BHT = d_BHTC.amax(-1)
        if tile.bounded or (d_BHTC.device.type == "cpu" and self._is_safe(max_BHT)):
            shift_BHT = torch.zeros_like(max_BHT)
        else:
            shift_BHT = max_BHT
            d_BHTC.sub_(shift_BHT[..., None])
        p_BHTC = self._room_for(d_BHTC.shape)
        if tile.probs_BHTC is None:
            torch.exp(d_BHTC, out=p_BHTC)
        low_BHT, sum_BHT, norm_BHT = _moments(d_BHTC, tile)
        if tile.probs_BHTC is not None:
            p_BHTC.copy_(tile.probs_BHTC)
            torch.log(torch.where(p_BHTC == 0, 1, p_BHTC), out=d_BHTC)
        peak_BHT = max_BHT if tile.probs_BHTC is None else p_BHTC.amax(-1)
        distance_BHT = self._distances(p_BHTC, tile)
        e_sink_BHT, d_sink_BHT = self._take_sink(p_BHTC, d_BHTC, tile)
        z_BHT = p_BHTC.sum(-1)
        normaliser_BHT = self._normaliser(z_BHT + e_sink_BHT, shift_BHT, tile)
        self._add_mass(p_BHTC, torch.where(counted_BHT, 1 / normaliser_BHT, 0), e_sink_BHT, tile)
        ps_BHT = torch.mul(p_BHTC, d_BHTC, out=d_BHTC).sum(-1)
        self.rows[:, tile.batch, tile.heads, tile.rows] = torch.stack(
            (
                max_BHT,
                low_BHT + shift_BHT,
                shift_BHT,
                sum_BHT,
                norm_BHT,
                z_BHT,
                ps_BHT,
                e_sink_BHT,
                d_sink_BHT,
                distance_BHT,
                peak_BHT,
                count_BHT,
            )
        )

    def _take_sink(self, p_BHTC: Tensor, d_BHTC: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """p and d of the guessed key per row; p there becomes 0, so that the rest is summed without it."""
        columns = p_BHTC.size(-1)
        guess = (self.guess_H[tile.heads] - tile.first)[None, :, None, None].expand(*p_BHTC.shape[:3], 1)
        inside = (guess >= 0) & (guess < columns)
        guess = guess.clamp(0, columns - 1)
        e_BHTC = p_BHTC.gather(-1, guess) * inside
        p_BHTC.scatter_add_(-1, guess, -e_BHTC)
        return e_BHTC[..., 0], (d_BHTC.gather(-1, guess) * inside)[..., 0]

    def _normaliser(self, z_BHT: Tensor, shift_BHT: Tensor, tile: Tile) -> Tensor:
        """What e^d is divided by: Σ e^d and a learned sink's share, or 1 for probabilities taken as they are."""
        if tile.probs_BHTC is not None:
            return torch.ones_like(z_BHT)
        if self.sinks_H is None:
            return z_BHT
        sink_BHT: Tensor = (self.sinks_H[tile.heads, None] - shift_BHT).exp()
        return z_BHT + sink_BHT

    def _is_safe(self, max_BHT: Tensor) -> bool:
        low, high = torch.aminmax(max_BHT)
        if self.sinks_H is not None:
            high = torch.maximum(high, self.sinks_H.max())
        return bool(low > -SAFE) and bool(high < SAFE)

    def _room_for(self, shape: torch.Size) -> Tensor:
        numel = shape.numel()
        if self._room.numel() < numel:
            self._room = self._room.new_empty(numel)
        return self._room[:numel].view(shape)

    def _add_mass(self, p_BHTC: Tensor, weights_BHT: Tensor, e_sink_BHT: Tensor, tile: Tile) -> None:
        columns = slice(tile.first, tile.first + p_BHTC.size(-1))
        mass_BHC = torch.bmm(weights_BHT.flatten(0, 1)[:, None], p_BHTC.flatten(0, 1))
        target_BHC = self.mass_BHS[tile.batch, tile.heads, columns]
        target_BHC += mass_BHC.view(target_BHC.shape)
        index = self.guess_H[tile.heads][None, :, None].expand(target_BHC.size(0), -1, 1)
        self.mass_BHS[tile.batch, tile.heads].scatter_add_(
            -1, index, (weights_BHT * e_sink_BHT).sum(-1, keepdim=True)
        )

    def _distances(self, p_BHTC: Tensor, tile: Tile) -> Tensor:
        """Σ p·|query − key| per row.

        Keys left of all the tile's queries, and right of them, need only a product with a vector: there
        |i − j| is (anchor − j) + (i − anchor). The anchor, the tile's first query, keeps the terms small.
        """
        columns, dtype, device = p_BHTC.size(-1), p_BHTC.dtype, p_BHTC.device
        rows = tile.rows.step or 1
        anchor = self._position + tile.rows.start
        queries = p_BHTC.size(2)
        steps_T = torch.arange(0, queries * rows, rows, dtype=dtype, device=device)
        # Distances are from the anchor, j − anchor, so that float32 holds them to the last digit.
        j_C = torch.arange(tile.first, tile.first + columns, dtype=dtype, device=device).sub_(anchor)
        if self._order_BS is not None:
            j_BC = self._order_BS[tile.batch, tile.first : tile.first + columns].to(dtype) - anchor
            return torch.sum(p_BHTC * (steps_T[:, None] - j_BC[:, None, None]).abs_(), -1)
        if columns <= 256 or rows > 1:
            return torch.sum(p_BHTC * (steps_T[:, None] - j_C).abs_(), -1)
        left = min(max(anchor - tile.first, 0), columns)
        right = min(max(anchor + queries - tile.first, left), columns)
        flat = p_BHTC.flatten(0, 2)
        distance_BHT = (p_BHTC[..., left:right] * (steps_T[:, None] - j_C[left:right]).abs_()).sum(-1)
        if left:
            distance_BHT -= torch.mv(flat[:, :left], j_C[:left]).view(distance_BHT.shape)
            distance_BHT += steps_T * p_BHTC[..., :left].sum(-1)
        if right < columns:
            distance_BHT += torch.mv(flat[:, right:], j_C[right:]).view(distance_BHT.shape)
            distance_BHT -= steps_T * p_BHTC[..., right:].sum(-1)
        return distance_BHT


def hide(scores: Tensor, visible: Tensor, finite: bool) -> None:
    """Hidden entries become so low that no maximum or exponential sees them."""
    if finite:
        scores.add_(visible.sub(1), alpha=big(scores.dtype))
    else:
        scores.masked_fill_(visible == 0, -big(scores.dtype))


def big(dtype: torch.dtype) -> float:
    """What is taken off hidden scores: far below any score, and far from overflow itself."""
    return 1e290 if dtype == torch.float64 else 1e30


def tiles(
    batch: int, heads: int, queries: int, keys: int, group: int, elements: int, within: slice | None = None
) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of batch, heads and rows of about `elements` scores: whole kv groups, or parts of a single one.

    `within`: only these rows, a slice with a step.
    """
    chosen = range(*(within or slice(0, queries)).indices(queries))
    rows = max(1, min(len(chosen), ROWS, elements // max(1, keys)))
    at_once = max(1, elements // (rows * max(1, keys)))
    if at_once >= heads:
        batch_step, head_step = max(1, at_once // max(1, heads)), max(1, heads)
    elif at_once >= group:
        batch_step, head_step = 1, at_once // group * group
    else:
        batch_step, head_step = 1, max(size for size in range(1, at_once + 1) if group % size == 0)
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            for first in range(0, len(chosen), rows):
                part = chosen[first : first + rows]
                yield (
                    slice(b, min(batch, b + batch_step)),
                    slice(h, min(heads, h + head_step)),
                    slice(part.start, part.stop, part.step),
                )


def tile_elements(device: torch.device) -> int:
    return CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS


def wide(tensor: Tensor) -> Tensor:
    """In float64, or float32 where the device has no float64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


# --- passes over one tile -----------------------------------------------------------------------------


def _moments(d_BHTC: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest, sum and norm of d over visible keys. Leaves hidden d at 0, so that p·d there is 0 and not NaN."""
    lows = []
    start = 0
    for edge in tile.edges:
        part = d_BHTC[..., edge.start : edge.stop]
        if start < edge.start:
            lows.append(d_BHTC[..., start : edge.start].amin(-1))
        lows.append(torch.where(part < -big(part.dtype) / 2, math.inf, part).amin(-1))
        if tile.finite:
            part.mul_(edge.visible_BHTC)
        else:
            part.masked_fill_(edge.visible_BHTC == 0, 0)
        start = edge.stop
    if start < d_BHTC.size(-1):
        lows.append(d_BHTC[..., start:].amin(-1))
    low_BHT = lows[0]
    for other in lows[1:]:
        low_BHT = torch.minimum(low_BHT, other)
    return low_BHT, d_BHTC.sum(-1), torch.linalg.vector_norm(d_BHTC, 2, -1)


# --- settings -----------------------------------------------------------------------------------------

# Scores per tile. On CPU a tile and its exponentials share the cache; elsewhere launches must be few.
CPU_ELEMENTS = 1 << 20
DEVICE_ELEMENTS = 1 << 25
# Rows per tile: a causal tile computes the exponentials of half its own columns in vain.
ROWS = 64
