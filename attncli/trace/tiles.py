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

FIELDS = ("max", "min", "z", "ps", "e_sink", "sum", "norm", "distance", "shift", "peak", "count")
"""Per row, with d = s − shift and p = exp d over visible keys: largest and smallest s; Σ p and Σ p·d without the
guessed sink key; p of that key. Of thorough rows only: Σ d; ‖d‖₂; Σ p·|query − key|. Then, 0 where no tile says
them: the shift; the largest probability, where probabilities are taken as they are; the number of visible keys."""


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
    outside ±SAFE. `products`: pairs of the smallest and the largest product of each head, (B, H), that are not
    told by the scores. `probs_BHTC`: the probabilities as they are, where they are not the softmax. `count_BHT`:
    visible keys, where only the tile knows.
    """

    batch: slice
    heads: slice
    rows: slice
    first: int
    scores_BHTC: Tensor
    edges: list[Edge] = field(default_factory=list)
    finite: bool = True
    bounded: bool = False
    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    probs_BHTC: Tensor | None = None
    count_BHT: Tensor | None = None

    def edge_parts(self) -> list[tuple[Edge, Tensor]]:
        """Each edge and its scores, a view."""
        return [(one, self.scores_BHTC.narrow(-1, one.start, one.stop - one.start)) for one in self.edges]


class Room:
    """Memory that tiles take turns in. Its views are kept: making one costs as much as a small operation."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)
        self._views: dict[tuple[int, ...], Tensor] = {}

    def view(self, *shape: int) -> Tensor:
        """The first elements in this shape: what was there is gone."""
        found = self._views.get(shape)
        if found is None:
            numel, old = math.prod(shape), self._memory.numel()
            if numel > old:
                self._views.clear()
                room = max(numel, min(2 * old, tile_elements(self._memory.device)))
                self._memory = self._memory.new_empty(room)
            found = self._views[shape] = self._memory[:numel].view(shape)
        return found


class Sums:
    """Running numbers of one call. `sinks_H`: learned logits; `guess_H`: the column taken for the sink key.

    `mass_BHS`: Σ of probabilities per column, without the guessed one. `products_2BH`: smallest and largest of the
    products that tiles told apart from their scores. `position`: place of the first query among the keys. `order_BS`:
    which key each column is; None: column j is key j. `looks_back`: no query sees a key behind its own place.
    `thorough_T`: rows of which the metrics that cost most are taken.
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
        self.products_2BH = torch.zeros(2, batch, heads, dtype=dtype, device=device)
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
    """Takes the tiles of some heads into the sums: `start`, all row blocks in their order, `finish`.

    One for each thread: it owns the room for exponentials. Of a tile's operations on CPU a good part is the call
    itself, and threads wait for each other at every one. So what is found lies in lists until the heads are done.
    """

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self._room = Room(sums.rows.dtype, sums.rows.device)
        self._on_cpu = sums.rows.device.type == "cpu"

    def start(self, batch: slice, heads: slice) -> None:
        sums = self.sums
        self._found: dict[str, list[Tensor]] = {name: [] for name in FIELDS}
        self._products: list[tuple[Tensor, Tensor]] = []
        self._rows = sums.rows[:, batch, heads]
        self._products_2BH = sums.products_2BH[:, batch, heads]
        self._counted_BHT = sums.counted_BHT[batch, heads]
        mass_BHS = sums.mass_BHS[batch, heads]
        self._mass_N1S = mass_BHS.view(-1, 1, mass_BHS.size(-1))
        self._sinks_H1 = None if sums.sinks_H is None else sums.sinks_H[heads, None]
        self._guess_H11 = sums.guess_H[heads, None, None]
        self._guesses = sums.guesses[heads]
        self._order_BS = None if sums.order_BS is None else sums.order_BS[batch]

    def add(self, tile: Tile, thorough: bool = True) -> None:
        found = self._found
        self._products += tile.products
        d_BHTC = tile.scores_BHTC
        parts = tile.edge_parts()
        _lower(parts, tile.finite)
        max_BHT = d_BHTC.amax(-1)
        found["max"].append(max_BHT)
        shift_BHT = None if tile.bounded else self._shift(max_BHT)
        if shift_BHT is not None:
            d_BHTC.sub_(shift_BHT[..., None])
        p_BHTC = self._room.view(*d_BHTC.shape)
        if tile.probs_BHTC is None:
            torch.exp(d_BHTC, out=p_BHTC)
        _raise(parts, tile.finite)
        min_BHT = d_BHTC.amin(-1)
        found["min"].append(min_BHT if shift_BHT is None else min_BHT.add_(shift_BHT))
        if thorough:
            _level(parts, tile.finite)
            found["sum"].append(d_BHTC.sum(-1))
            found["norm"].append(torch.linalg.vector_norm(d_BHTC, 2, -1))
        if tile.probs_BHTC is not None:
            p_BHTC.copy_(tile.probs_BHTC)
            torch.log(torch.where(p_BHTC == 0, 1, p_BHTC), out=d_BHTC)
            found["peak"].append(p_BHTC.amax(-1))
        if thorough:
            steps_T, distance_BHT, left_BHT = self._distances(p_BHTC, tile)
        e_sink_BHT = self._take_sink(p_BHTC, tile.first)
        z_BHT = p_BHTC.sum(-1)
        all_BHT = z_BHT + e_sink_BHT
        if thorough:
            if left_BHT is not None:
                distance_BHT.addcmul_(steps_T, left_BHT if left_BHT is not ALL else all_BHT)
            found["distance"].append(distance_BHT)
        found["z"].append(z_BHT)
        found["e_sink"].append(e_sink_BHT)
        self._add_mass(all_BHT, shift_BHT, p_BHTC, tile)
        # Where d is hidden it is large by now, but finite, and p is 0.
        found["ps"].append(torch.mul(p_BHTC, d_BHTC, out=d_BHTC).sum(-1))
        if tile.count_BHT is not None:
            found["count"].append(tile.count_BHT)

    def finish(self) -> None:
        for row_BHT, parts in zip(self._rows, self._found.values(), strict=True):
            if len(parts) == len(self._found["max"]):
                torch.cat(parts, -1, out=row_BHT)
            elif parts:
                row_BHT[..., self.sums.thorough_T] = torch.cat(parts, -1)
        if self._products:
            lows, highs = zip(*self._products, strict=True)
            low_BH, high_BH = self._products_2BH
            low_BH.copy_(torch.stack((low_BH, *lows)).amin(0))
            high_BH.copy_(torch.stack((high_BH, *highs)).amax(0))

    def _shift(self, max_BHT: Tensor) -> Tensor | None:
        """What is taken off scores before exp: the rows' maxima, or nothing where all of them are small."""
        # A NaN among them is not small.
        if self._on_cpu and float(torch.linalg.vector_norm(max_BHT, torch.inf)) < SAFE:
            self._found["shift"].append(torch.zeros_like(max_BHT))
            return None
        self._found["shift"].append(max_BHT)
        return max_BHT

    def _add_mass(self, all_BHT: Tensor, shift_BHT: Tensor | None, p_BHTC: Tensor, tile: Tile) -> None:
        """Adds each column's probabilities. They are e^d over Σ e^d and a learned sink's share, or p as it is."""
        if tile.probs_BHTC is not None:
            weights_BHT = torch.ones_like(all_BHT)
        elif self._sinks_H1 is None:
            weights_BHT = all_BHT.reciprocal_()
        else:
            sink_BHT = (self._sinks_H1 if shift_BHT is None else self._sinks_H1 - shift_BHT).exp()
            weights_BHT = (all_BHT + sink_BHT).reciprocal_()
        if tile.count_BHT is not None:
            counted_BHT = self._counted_BHT[..., tile.rows] & (tile.count_BHT > 0)
            weights_BHT = torch.where(counted_BHT, weights_BHT, 0)
        elif not self.sums.all_counted:
            weights_BHT = torch.where(self._counted_BHT[..., tile.rows], weights_BHT, 0)
        batch, heads, rows, columns = p_BHTC.shape
        p_NTC = self._room.view(batch * heads, rows, columns)
        mass_N1C = self._mass_N1S.narrow(-1, tile.first, columns)
        mass_N1C.baddbmm_(weights_BHT.view(batch * heads, 1, rows), p_NTC)

    def _take_sink(self, p_BHTC: Tensor, first: int) -> Tensor:
        """p of the guessed key per row; there it becomes 0, so that the rest is summed without it."""
        columns = p_BHTC.size(-1)
        low, high = min(self._guesses), max(self._guesses)
        if low == high:
            if not first <= low < first + columns:
                return torch.zeros_like(p_BHTC[..., 0])
            p_BHT = p_BHTC.select(-1, low - first)
            e_BHT = p_BHT.clone()
            p_BHT.zero_()
            return e_BHT
        guess_BHT1 = (self._guess_H11 - first).expand(*p_BHTC.shape[:3], 1)
        if first <= low and high < first + columns:
            e_BHT1 = p_BHTC.gather(-1, guess_BHT1)
            p_BHTC.scatter_(-1, guess_BHT1, 0)
            return e_BHT1.squeeze(-1)
        inside_BHT1 = (guess_BHT1 >= 0) & (guess_BHT1 < columns)
        guess_BHT1 = guess_BHT1.clamp(0, columns - 1)
        e_BHT1 = p_BHTC.gather(-1, guess_BHT1) * inside_BHT1
        p_BHTC.scatter_add_(-1, guess_BHT1, -e_BHT1)
        return e_BHT1.squeeze(-1)

    def _distances(self, p_BHTC: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor | None]:
        """`steps_T`, distances and `left_BHT`: Σ p·|query − key| per row is distances + steps · left.

        Keys left of all the tile's queries, and right of them, need only a product with a vector: there
        |i − j| is (anchor − j) + (i − anchor). The anchor, the tile's first query, keeps the terms small.
        `left_BHT` is Σ p left of the tile's queries less that to the right, `ALL` for the row's sum, or None.
        """
        columns, queries = p_BHTC.size(-1), p_BHTC.size(2)
        sums = self.sums
        anchor = sums.position + tile.rows.start
        ramp, zero = sums.ramp, sums.ramp_zero
        steps_T = ramp[zero : zero + queries]
        if self._order_BS is not None:
            j_BC = self._order_BS[:, tile.first : tile.first + columns].to(ramp.dtype) - anchor
            return steps_T, (p_BHTC * (steps_T[:, None] - j_BC[:, None, None]).abs_()).sum(-1), None
        j_C = ramp[zero + tile.first - anchor : zero + tile.first - anchor + columns]
        if columns <= 256:
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
    _lower(tile.edge_parts(), tile.finite)


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


# --- hidden entries of d or s -------------------------------------------------------------------------


def _lower(parts: list[tuple[Edge, Tensor]], finite: bool) -> None:
    """Below all others."""
    for one, part_BHTC in parts:
        if finite:
            part_BHTC.add_(one.hiding_BHTC)
        else:
            part_BHTC.masked_fill_(one.visible_BHTC == 0, -big(part_BHTC.dtype))


def _raise(parts: list[tuple[Edge, Tensor]], finite: bool) -> None:
    """From there to above all others, so that a smallest one is a visible one."""
    for one, part_BHTC in parts:
        if finite:
            # They lie at −2 · big where they were −Inf before; from there this leads high enough as well.
            part_BHTC.sub_(one.hiding_BHTC, alpha=4)
        else:
            part_BHTC.masked_fill_(one.visible_BHTC == 0, big(part_BHTC.dtype))


def _level(parts: list[tuple[Edge, Tensor]], finite: bool) -> None:
    """To 0, so that sums are those of visible ones."""
    for one, part_BHTC in parts:
        if finite:
            part_BHTC.mul_(one.visible_BHTC)
        else:
            part_BHTC.masked_fill_(one.visible_BHTC == 0, 0)


# --- settings -----------------------------------------------------------------------------------------

# Scores per tile. On CPU a tile and its exponentials share a core's cache; elsewhere launches must be few.
CPU_ELEMENTS = 1 << 18
DEVICE_ELEMENTS = 1 << 25
# Rows per tile: a causal tile computes half of its own columns in vain.
CPU_ROWS = 64
DEVICE_ROWS = 512
# Stands for the sum of the row, which is not known yet.
ALL = torch.empty(0)
