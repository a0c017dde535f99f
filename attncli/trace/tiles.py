# ruff: noqa: N815  (fields carry shape suffixes)
"""Tiles of scores → a few numbers per row. Nothing of size T·S outlives its tile.

A tile holds the scores of some heads and rows over the keys that these rows can see. On CPU it fits the cache
of one core, and each core has its own tiles. Work on a tile is some eight passes; whatever can be known
without one is left to the end of the call. This file must not know where scores come from.

Suffixes: B batch, H query heads, T query rows, S keys, N batch times heads, C the columns of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

SAFE = 32.0
"""Row maxima within ±SAFE need no shift before exp: sums stay within 1e±14 and keep float32's digits."""

FIELDS = (
    *("max", "min", "z", "ps", "e_sink", "d_sink"),
    *("sum", "norm", "distance"),
    *("shift", "peak", "count"),
)
"""Per row, with d = s − shift and p = exp d over visible keys: largest and smallest s; Σ p and Σ p·d without the
guessed sink key; p and d of that key. Of thorough rows only: Σ d; ‖d‖₂; Σ p·|query − key|. Then, 0 where a tile
need not say: the shift; the largest probability, where probabilities are taken as they are; the number of
visible keys."""


@dataclass(slots=True)
class Edge:
    """Columns [start, stop) of a tile that not every row sees. `visible_BHTC` is 1.0 or 0.0, `hiding_BHTC` 0 or
    −big where hidden; both broadcast to the tile."""

    start: int
    stop: int
    visible_BHTC: Tensor
    hiding_BHTC: Tensor


@dataclass(slots=True)
class Tile:
    """Scores of some heads and rows over the columns [first, first + C); overwritten by whoever reduces it.

    `finite`: no NaN or Inf is among them, so that hiding by arithmetic is safe. `bounded`: no score lies
    outside ±SAFE. `probs_BHTC`: the probabilities as they are, where they are not the softmax. `count_BHT`: visible
    keys, where only the tile knows.
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
    """Running numbers of one call. `sinks_H`: learned logits; `guess_H`: the column taken for the sink key.

    `mass_BHS`: Σ of probabilities per column, without the guessed one. `position`: place of the first query among
    the keys. `order_BS`: which key each column is; None: column j is key j. `looks_back`: no query sees a key
    behind its own place. `thorough_T`: rows of which the metrics that cost most are taken.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        counted_BHT: Tensor,
        position: int,
        order_BS: Tensor | None,
        looks_back: bool,
        sinks_H: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        batch, heads, queries, keys = shape
        device = counted_BHT.device
        self.rows = torch.zeros(len(FIELDS), batch, heads, queries, dtype=dtype, device=device)
        self.mass_BHS = torch.zeros(batch, heads, keys, dtype=dtype, device=device)
        self.counted_BHT = counted_BHT
        self.sinks_H = None if sinks_H is None else sinks_H.detach().to(dtype)
        self.order_BS = order_BS
        self.position = position
        self.looks_back = looks_back
        self.thorough_T = torch.ones(queries, dtype=torch.bool, device=device)
        self.guess_H = torch.zeros(heads, dtype=torch.int64, device=device)
        self.guesses = [0] * heads
        self.all_counted = False
        # Distances of columns from a tile's first query are slices of this: made once, not per tile.
        low, high = position + queries, keys + abs(position) + queries
        self.ramp = torch.arange(-low, high, dtype=dtype, device=device)
        self.ramp_zero = low

    def settle(self, guess_H: Tensor) -> None:
        """Takes the guess, and copies to the host what tiles ask for."""
        self.guess_H = guess_H
        self.guesses = guess_H.tolist()
        self.all_counted = bool(self.counted_BHT.all())


class Reducer:
    """Takes the tiles of some heads into the sums. One for each thread: it owns the room for exponentials."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self._room = sums.rows.new_empty(0)
        self._key: tuple[int, ...] = ()

    def add(self, tile: Tile, thorough: bool = True) -> None:
        self._turn_to(tile)
        d_BHTC = tile.scores_BHTC
        hide(tile)
        max_BHT = d_BHTC.amax(-1)
        shift_BHT = None
        if not (tile.bounded or (d_BHTC.device.type == "cpu" and self._is_safe(max_BHT))):
            shift_BHT = max_BHT
            d_BHTC.sub_(shift_BHT[..., None])
        p_BHTC = self._room_for(d_BHTC.shape)
        if tile.probs_BHTC is None:
            torch.exp(d_BHTC, out=p_BHTC)
        min_BHT = _smallest(d_BHTC, tile)
        if thorough:
            sum_BHT, norm_BHT = d_BHTC.sum(-1), torch.linalg.vector_norm(d_BHTC, 2, -1)
        if shift_BHT is not None:
            min_BHT = min_BHT + shift_BHT
        if tile.probs_BHTC is not None:
            p_BHTC.copy_(tile.probs_BHTC)
            torch.log(torch.where(p_BHTC == 0, 1, p_BHTC), out=d_BHTC)
            self._rows[10, ..., tile.rows] = p_BHTC.amax(-1)
        if thorough:
            steps_T, distance_BHT, left_BHT = self._distances(p_BHTC, tile)
        e_sink_BHT, d_sink_BHT = self._take_sink(p_BHTC, d_BHTC, tile)
        z_BHT = p_BHTC.sum(-1)
        all_BHT = z_BHT + e_sink_BHT
        if thorough:
            if left_BHT is not None:
                distance_BHT.addcmul_(steps_T, left_BHT if left_BHT is not ALL else all_BHT)
            self._rows[6:9, ..., tile.rows] = torch.stack((sum_BHT, norm_BHT, distance_BHT))
        weights_BHT = self._normaliser(all_BHT, shift_BHT, tile).reciprocal()
        if tile.count_BHT is not None:
            counted_BHT = self._counted_BHT[..., tile.rows] & (tile.count_BHT > 0)
            weights_BHT = torch.where(counted_BHT, weights_BHT, 0)
        elif not self.sums.all_counted:
            weights_BHT = torch.where(self._counted_BHT[..., tile.rows], weights_BHT, 0)
        columns = slice(tile.first, tile.first + d_BHTC.size(-1))
        self._mass_N1S[..., columns].baddbmm_(weights_BHT.flatten(0, 1)[:, None], p_BHTC.flatten(0, 1))
        ps_BHT = torch.mul(p_BHTC, d_BHTC, out=d_BHTC).sum(-1)
        found = torch.stack((max_BHT, min_BHT, z_BHT, ps_BHT, e_sink_BHT, d_sink_BHT))
        self._rows[:6, ..., tile.rows] = found
        if shift_BHT is not None:
            self._rows[9, ..., tile.rows] = shift_BHT
        if tile.count_BHT is not None:
            self._rows[11, ..., tile.rows] = tile.count_BHT

    def _turn_to(self, tile: Tile) -> None:
        key = (tile.batch.start, tile.batch.stop, tile.heads.start, tile.heads.stop)
        if key == self._key:
            return
        self._key = key
        sums = self.sums
        self._rows = sums.rows[:, tile.batch, tile.heads]
        self._counted_BHT = sums.counted_BHT[tile.batch, tile.heads]
        mass_BHS = sums.mass_BHS[tile.batch, tile.heads]
        self._mass_N1S = mass_BHS.view(-1, 1, mass_BHS.size(-1))
        self._guess_H = sums.guess_H[tile.heads]
        self._guesses = sums.guesses[tile.heads]
        self._order_BS = None if sums.order_BS is None else sums.order_BS[tile.batch]

    def _normaliser(self, z_BHT: Tensor, shift_BHT: Tensor | None, tile: Tile) -> Tensor:
        """What e^d is divided by: Σ e^d and a learned sink's share, or 1 for probabilities taken as they are."""
        if tile.probs_BHTC is not None:
            return torch.ones_like(z_BHT)
        if self.sums.sinks_H is None:
            return z_BHT
        sink_HT = self.sums.sinks_H[tile.heads, None]
        sink_BHT = (sink_HT if shift_BHT is None else sink_HT - shift_BHT).exp()
        return z_BHT + sink_BHT

    def _is_safe(self, max_BHT: Tensor) -> bool:
        low, high = torch.aminmax(max_BHT)
        return bool(low > -SAFE) and bool(high < SAFE)

    def _room_for(self, shape: torch.Size) -> Tensor:
        numel = shape.numel()
        if self._room.numel() < numel:
            self._room = self._room.new_empty(numel)
        return self._room[:numel].view(shape)

    def _take_sink(self, p_BHTC: Tensor, d_BHTC: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """p and d of the guessed key per row; p there becomes 0, so that the rest is summed without it."""
        first, columns = tile.first, p_BHTC.size(-1)
        if len(self._guesses) == 1:
            place = self._guesses[0] - first
            if not 0 <= place < columns:
                nothing_BHT = torch.zeros_like(p_BHTC[..., 0])
                return nothing_BHT, nothing_BHT
            e_BHT = p_BHTC[..., place].clone()
            p_BHTC[..., place] = 0
            return e_BHT, d_BHTC[..., place].clone()
        guess = (self._guess_H - first)[None, :, None, None].expand(*p_BHTC.shape[:3], 1)
        if first <= min(self._guesses) and max(self._guesses) < first + columns:
            e_BHT1 = p_BHTC.gather(-1, guess)
            p_BHTC.scatter_(-1, guess, 0)
            return e_BHT1[..., 0], d_BHTC.gather(-1, guess)[..., 0]
        inside = (guess >= 0) & (guess < columns)
        guess = guess.clamp(0, columns - 1)
        e_BHT1 = p_BHTC.gather(-1, guess) * inside
        p_BHTC.scatter_add_(-1, guess, -e_BHT1)
        return e_BHT1[..., 0], (d_BHTC.gather(-1, guess) * inside)[..., 0]

    def _distances(self, p_BHTC: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor | None]:
        """`steps_T`, distances and `left_BHT`: Σ p·|query − key| per row is distances + steps · left.

        Keys left of all the tile's queries, and right of them, need only a product with a vector: there
        |i − j| is (anchor − j) + (i − anchor). The anchor, the tile's first query, keeps the terms small.
        `left_BHT` is Σ p left of the tile's queries less that to the right, `ALL` for the row's sum, or None.
        """
        columns, queries, rows = p_BHTC.size(-1), p_BHTC.size(2), tile.rows.step or 1
        sums = self.sums
        anchor = sums.position + tile.rows.start
        ramp, zero = sums.ramp, sums.ramp_zero
        steps_T = ramp[zero : zero + queries * rows : rows]
        if self._order_BS is not None:
            j_BC = self._order_BS[:, tile.first : tile.first + columns].to(ramp.dtype) - anchor
            return steps_T, (p_BHTC * (steps_T[:, None] - j_BC[:, None, None]).abs_()).sum(-1), None
        j_C = ramp[zero + tile.first - anchor : zero + tile.first - anchor + columns]
        if columns <= 256 or rows > 1:
            return steps_T, (p_BHTC * (steps_T[:, None] - j_C).abs_()).sum(-1), None
        flat = p_BHTC.flatten(0, 2)
        if sums.looks_back:
            return steps_T, torch.mv(flat, j_C).neg_().view(p_BHTC.shape[:3]), ALL
        left = min(max(anchor - tile.first, 0), columns)
        right = min(max(anchor + queries - tile.first, left), columns)
        middle_BHTC = p_BHTC[..., left:right]
        distance_BHT = (middle_BHTC * (steps_T[:, None] - j_C[left:right]).abs_()).sum(-1)
        if left:
            distance_BHT -= torch.mv(flat[:, :left], j_C[:left]).view(distance_BHT.shape)
        left_BHT = None
        if left:
            left_BHT = p_BHTC[..., :left].sum(-1)
        if right < columns:
            distance_BHT += torch.mv(flat[:, right:], j_C[right:]).view(distance_BHT.shape)
            right_BHT = p_BHTC[..., right:].sum(-1)
            left_BHT = -right_BHT if left_BHT is None else left_BHT.sub_(right_BHT)
        return steps_T, distance_BHT, left_BHT


def hide(tile: Tile) -> None:
    """Hidden entries become so low that no maximum or exponential sees them."""
    for edge in tile.edges:
        part = tile.scores_BHTC[..., edge.start : edge.stop]
        if tile.finite:
            part.add_(edge.hiding_BHTC)
        else:
            part.masked_fill_(edge.visible_BHTC == 0, -big(part.dtype))


def edge(start: int, stop: int, visible_BHTC: Tensor) -> Edge:
    """`visible_BHTC` in the dtype of the scores."""
    return Edge(start, stop, visible_BHTC, (visible_BHTC - 1).mul_(big(visible_BHTC.dtype)))


def big(dtype: torch.dtype) -> float:
    """What is taken off hidden scores: far below any score, and far from overflow itself."""
    return 1e290 if dtype == torch.float64 else 1e30


def head_blocks(
    batch: int, heads: int, queries: int, keys: int, group: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and heads whose tiles have a good size: whole kv groups, or parts of a single one."""
    rows = max(1, min(queries, rows_at_once(keys, device)))
    at_once = max(1, tile_elements(device) // (rows * max(1, keys)))
    if at_once >= heads:
        batch_step, head_step = max(1, at_once // max(1, heads)), max(1, heads)
    elif at_once >= group:
        groups = heads // group
        blocks = math.ceil(groups / (at_once // group))
        batch_step, head_step = 1, math.ceil(groups / blocks) * group
    else:
        batch_step, head_step = 1, max(size for size in range(1, at_once + 1) if group % size == 0)
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            yield slice(b, min(batch, b + batch_step)), slice(h, min(heads, h + head_step))


def row_blocks(queries: int, keys: int, device: torch.device, within: slice | None = None) -> list[slice]:
    """Slices of rows for one tile each. `within`: only these rows, a slice with a step."""
    chosen = range(*(within or slice(0, queries)).indices(queries))
    rows = rows_at_once(keys, device)
    parts = [chosen[first : first + rows] for first in range(0, len(chosen), rows)]
    return [slice(part.start, part.stop, part.step) for part in parts]


def rows_at_once(keys: int, device: torch.device) -> int:
    most = CPU_ROWS if device.type == "cpu" else DEVICE_ROWS
    return max(1, min(most, tile_elements(device) // max(1, keys)))


def tile_elements(device: torch.device) -> int:
    return CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS


def wide(tensor: Tensor) -> Tensor:
    """In float64, or float32 where the device has no float64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _smallest(d_BHTC: Tensor, tile: Tile) -> Tensor:
    """Smallest d over visible keys. Leaves hidden d at 0, so that p·d there is 0 and not NaN."""
    lows = []
    start = 0
    for one in tile.edges:
        part = d_BHTC[..., one.start : one.stop]
        if start < one.start:
            lows.append(d_BHTC[..., start : one.start].amin(-1))
        if tile.finite:
            # Hidden entries may lie at −2 · big where they were −Inf before; from both this leads above all scores.
            lows.append(part.sub(one.hiding_BHTC, alpha=4).amin(-1))
            part.mul_(one.visible_BHTC)
        else:
            hidden = (one.visible_BHTC == 0).expand(part.shape)
            lows.append(part.masked_fill(hidden, big(part.dtype)).amin(-1))
            part.masked_fill_(hidden, 0)
        start = one.stop
    if start < d_BHTC.size(-1):
        lows.append(d_BHTC[..., start:].amin(-1))
    low_BHT = lows[0]
    for other in lows[1:]:
        low_BHT = torch.minimum(low_BHT, other)
    return low_BHT


# --- settings -----------------------------------------------------------------------------------------

# Scores per tile. On CPU a tile and its exponentials share a core's cache; elsewhere launches must be few.
CPU_ELEMENTS = 1 << 18
DEVICE_ELEMENTS = 1 << 25
# Rows per tile: a causal tile computes half of its own columns in vain.
CPU_ROWS = 64
DEVICE_ROWS = 512
# Stands for the sum of the row, which is not known yet.
ALL = torch.empty(0)
