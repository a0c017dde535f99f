"""Scores of a fused call, tile by tile: scale·q·k, capped, biased and masked as the kernel did it.

Also the extremes of q·k over all pairs, hidden ones too, since a product overflows before any mask. This file
must not know what is made of the scores.

Suffixes: B batch, H query heads, K key-value heads, G query heads of one kv head, T queries, S keys, D head size, V
value size, N batch times kv heads, C the columns of one tile, R chosen rows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attncli.trace.call_mask import CallMask
from attncli.trace.masks import first_position, visibility
from attncli.trace.tiles import SAFE, Edge, Room, Sums, Tile, big, edge, hide, wide

if TYPE_CHECKING:
    from attncli.trace.statistics import FusedCall


class FusedScores:
    """The scores of one call. `order_BS`: which key each column is; None: column j is key j."""

    def __init__(self, call: FusedCall) -> None:
        batch, heads, queries, _ = call.q_BHTD.shape
        kv_heads, keys = call.k_BKSD.shape[1:3]
        self.shape = (batch, heads, queries, keys)
        self.group = heads // max(1, kv_heads)
        self.call = call
        self.device = call.q_BHTD.device
        if not call.known:
            mask = CallMask(call, self.shape)
            call.known.append(
                (mask, visibility(mask.facts(), batch, queries, keys, call.same_tokens), _precision(call))
            )
        self.mask, self.visibility, (self.dtype, self.bound, self.finite) = call.known[0]
        self.has_bias = self.mask.has_bias
        self.explicit = self.visibility.low_BT is None
        order_BS = self.visibility.order_BS
        self.order_BS = None if order_BS is None else order_BS.expand(batch, -1)
        offset = self.visibility.causal_offset
        self.looks_back = offset is not None and offset <= 0 and not self.explicit
        self.position = first_position(self.visibility.causal_offset, queries, keys)
        self.factor = call.scale
        # A power of ten beyond these and scaled q would lose digits, or the scale divides by zero below.
        self.scales_queries = math.isfinite(call.scale) and 1e-20 < abs(call.scale) < 1e20
        self.plain = self.finite and not (
            self.explicit or self.mask.changes_scores or call.soft_cap or not self.scales_queries
        )
        self.bounded = self.plain and call.sinks_H is None and self.bound < SAFE
        self.saturated_BH = torch.zeros(batch, heads, dtype=self.dtype, device=self.device)
        self._room = Room(self.dtype, self.device)
        self._chunk_key: tuple[int, ...] = ()
        self._edges: dict[tuple[int | None, ...], list[Edge]] = {}
        self._ranges: dict[tuple[int | None, ...], tuple[int, int, int, int]] = {}
        self._read_intervals()

    def reader(self) -> FusedScores:
        """The same scores with room of its own, for another thread."""
        reader = copy.copy(self)
        reader._room = Room(self.dtype, self.device)
        reader._chunk_key = ()
        return reader

    def tile(self, b: slice, h: slice, t: slice, *, counting: bool = False) -> Tile:
        """Scores of these heads and rows; `counting`: each row comes once, so saturated scores may be counted."""
        q_NGTD, k_NDS = self._chunk(b, h)
        chosen_NGTD = q_NGTD[:, :, t]
        q_NRD = chosen_NGTD.flatten(1, 2)
        shape = (b.stop - b.start, h.stop - h.start, chosen_NGTD.size(2))
        keys = self.shape[3]
        start, full_start, full_stop, stop = (0, 0, keys, keys) if self.explicit else self._range(b, t)
        products = []
        if counting:
            # Products that no row sees: their extremes only, before the tile takes their place in the room.
            inner = (full_start, full_stop) if self.plain else (start, stop)
            for first, last in ((0, inner[0]), (inner[1], keys)):
                if first < last:
                    unseen_BHTC = self._dots(q_NRD, k_NDS, shape, first, last)
                    products.append((unseen_BHTC.amin((-2, -1)), unseen_BHTC.amax((-2, -1))))
        s_BHTC = self._dots(q_NRD, k_NDS, shape, start, stop)
        if not self.plain:
            if counting:
                products.append((s_BHTC.amin((-2, -1)), s_BHTC.amax((-2, -1))))
            if not self.scales_queries:
                s_BHTC.mul_(self.factor)
        edges = self._edges_of(b, h, t)
        tile = Tile(b, h, t, start, s_BHTC, edges, self.finite, self.bounded, products)
        if self.call.soft_cap:
            self._cap(tile, self.call.soft_cap, counting)
        if self.mask.changes_scores:
            columns = slice(tile.first, tile.first + tile.scores_BHTC.size(-1))
            places = columns if self.order_BS is None else self.order_BS[b, columns]
            tile.scores_BHTC.copy_(self.mask.biased(tile.scores_BHTC, b, h, t, places))
        return tile

    def output(self, tile: Tile, v_BKSV: Tensor) -> Tensor:
        """softmax(s)·v of a tile, (b, h, t, V) in its dtype; overwrites the tile."""
        hide(tile)
        s_BHTC = tile.scores_BHTC
        columns = s_BHTC.size(-1)
        if self.call.sinks_H is not None:
            sink_BHT1 = (
                self.call.sinks_H[tile.heads].to(self.dtype)[:, None, None].expand(*s_BHTC.shape[:3], 1)
            )
            s_BHTC = torch.cat((s_BHTC, sink_BHT1), -1)
        p_BHTC = torch.softmax(s_BHTC, -1)[..., :columns]
        kv = self._kv_heads(tile.heads)
        v_BKCV = self._in_order(v_BKSV.detach()[tile.batch, kv].to(self.dtype), tile.batch)
        v_BKCV = v_BKCV[:, :, tile.first : tile.first + columns]
        p_NTC = p_BHTC.reshape(v_BKCV.size(0) * v_BKCV.size(1), -1, columns)
        out_NTV = torch.bmm(p_NTC, v_BKCV.flatten(0, 1))
        return out_NTV.view(*p_BHTC.shape[:3], -1)

    def count_padding(self) -> None:
        """Lets rows at padded positions take part: kernels compute them like all others."""
        shown = self.visibility
        self.visibility = dataclasses.replace(shown, counted_BHT=shown.allowed_BHT > 0)
        self._ranges.clear()
        self._edges.clear()
        self._read_intervals()

    def dot_absmax(self, sums: Sums) -> Tensor:
        """Largest |q·k| of each head before scale, over all pairs: (H,)."""
        batch, heads, queries, keys = self.shape
        if not batch * queries * keys:
            return wide(torch.zeros(heads, device=self.device))
        largest_BH = wide(sums.products_2BH).abs().amax(0)
        if self.plain:
            seen_BHT = wide(sums.rows[:2]).abs()
            # What hides a score is no score.
            seen_BHT = torch.where(seen_BHT > big(self.dtype) / 2, 0, seen_BHT)
            largest_BH = torch.maximum(largest_BH, seen_BHT.amax((0, 3)))
        return largest_BH.amax(0) / (abs(self.factor) if self.scales_queries else 1)

    def column(self, head: int, key: int) -> Tensor:
        batch, _, queries, _ = self.shape
        column = torch.tensor([key], device=self.device)
        return torch.cat([self._logits(b, head, slice(0, queries), column)[None, :, 0] for b in range(batch)])

    def chosen_rows(self, batch: int, head: int, rows_R: Tensor) -> Tensor:
        return self._logits(batch, head, rows_R, torch.arange(self.shape[3], device=self.device))

    # --- scores ---

    def _dots(
        self, q_NRD: Tensor, k_NDS: Tensor, shape: tuple[int, int, int], first: int, last: int
    ) -> Tensor:
        """scale·q·k of some columns, (B, H, T, C) for a shape (B, H, T): in the room, so what was there is gone."""
        columns = last - first
        room_NRC = self._room.view(q_NRD.size(0), q_NRD.size(1), columns)
        torch.bmm(q_NRD, k_NDS.narrow(-1, first, columns), out=room_NRC)
        return self._room.view(*shape, columns)

    def _edges_of(self, b: slice, h: slice, t: slice) -> list[Edge]:
        """Of the columns that any row sees, those that not all rows see."""
        if self.explicit:
            return [edge(0, self.shape[3], self.mask.visible(b, h, t).to(self.dtype))]
        start, full_start, full_stop, stop = self._range(b, t)
        # Along the diagonal all edges of a regular mask are the same.
        origin = t.start if self._regular else 0
        places = (t.start, t.stop, start, full_start, full_stop, stop)
        key = (self._regular, t.step, *(place - origin for place in places))
        edges = self._edges.get(key)
        if edges is None:
            spans = [(start, full_start), (full_stop, stop)] if full_start < full_stop else [(start, stop)]
            low_BHT1, high_BHT1 = (
                bound_BT[slice(0, 1) if self._shared else b, t][:, None, :, None]
                for bound_BT in (self._low_BT, self._high_BT)
            )
            edges = []
            for first, last in spans:
                if first < last:
                    column_C = torch.arange(first, last, device=self.device)
                    visible_BHTC = (column_C >= low_BHT1) & (column_C < high_BHT1)
                    edges.append(edge(first - start, last - start, visible_BHTC.to(self.dtype)))
            if self._shared and sum(one.visible_BHTC.numel() for one in edges) <= KEPT_EDGE:
                self._edges[key] = edges
        return edges

    def _cap(self, tile: Tile, cap: float, counting: bool) -> None:
        s_BHTC = tile.scores_BHTC
        if counting:
            over_BHTC = (s_BHTC.abs() > cap).to(self.dtype)
            for one in tile.edges:
                over_BHTC[..., one.start : one.stop].mul_(one.visible_BHTC)
            counted_BHT = self.visibility.counted_BHT.expand(self.shape[:3])[
                tile.batch, tile.heads, tile.rows
            ]
            over_BHT = torch.where(counted_BHT, over_BHTC.sum(-1), 0)
            self.saturated_BH[tile.batch, tile.heads] += over_BHT.sum(-1)
        s_BHTC.div_(cap).tanh_().mul_(cap)

    def _logits(self, batch: int, head: int, rows: slice | Tensor, columns: Tensor) -> Tensor:
        """Scores of chosen rows and columns of one head, in float64: (R, C), −Inf where hidden."""
        call = self.call
        keys = columns if self.order_BS is None else self.order_BS[batch, columns]
        q_RD = wide(call.q_BHTD.detach()[batch, head][rows])
        k_CD = wide(call.k_BKSD.detach()[batch, head // self.group][keys])
        s_RC = q_RD @ k_CD.T * call.scale
        if call.soft_cap:
            s_RC = call.soft_cap * torch.tanh(s_RC / call.soft_cap)
        b, h = slice(batch, batch + 1), slice(head, head + 1)
        s_BHRC = self.mask.biased(s_RC[None, None], b, h, rows, keys)
        return torch.where(self.mask.visible(b, h, rows, keys), s_BHRC, -torch.inf)[0, 0]

    # --- q and k ---

    def _kv_heads(self, h: slice) -> slice:
        return slice(h.start // self.group, (h.stop - 1) // self.group + 1)

    def _in_order(self, x_BKSD: Tensor, b: slice) -> Tensor:
        if self.order_BS is None:
            return x_BKSD
        return x_BKSD.gather(2, self.order_BS[b, None, :, None].expand(x_BKSD.shape))

    def _chunk(self, b: slice, h: slice) -> tuple[Tensor, Tensor]:
        """q (N, G, T, D), scaled, and k (N, D, S) of these heads, kept until other heads are asked for."""
        key = (b.start, b.stop, h.start, h.stop)
        if key != self._chunk_key:
            # The old chunk goes first: two of them need not be held.
            self._kept: tuple[Tensor, Tensor] | None = None
            k_NDS = self._transposed(self.call.k_BKSD.detach()[b, self._kv_heads(h)], b)
            q_BHTD = self.call.q_BHTD.detach()[b, h].to(self.dtype)
            if self.scales_queries:
                q_BHTD = q_BHTD * self.factor
            queries, width = q_BHTD.shape[2:]
            self._kept = q_BHTD.reshape(k_NDS.size(0), -1, queries, width), k_NDS
            self._chunk_key = key
        if self._kept is None:
            raise RuntimeError("a chunk was dropped and not made again")
        return self._kept

    def _transposed(self, k_BKSD: Tensor, b: slice) -> Tensor:
        """k as (N, D, S), in the order of the columns. By pieces: a transpose in one go misses the cache."""
        batch, kv_heads, keys, width = k_BKSD.shape
        k_BKSD = self._in_order(k_BKSD, b)
        k_BKDS = torch.empty(batch, kv_heads, width, keys, dtype=self.dtype, device=self.device)
        for first in range(0, keys, 512):
            piece = k_BKSD[:, :, first : first + 512].to(self.dtype).contiguous()
            k_BKDS[..., first : first + 512] = piece.transpose(-1, -2)
        return k_BKDS.flatten(0, 1)

    # --- intervals ---

    def _read_intervals(self) -> None:
        """Copies the intervals of the rows that count to the host, in one go."""
        if self.visibility.low_BT is None or self.visibility.high_BT is None:
            return
        keys = self.shape[3]
        self._low_BT, self._high_BT = self.visibility.low_BT, self.visibility.high_BT
        counted_BT = self.visibility.counted_BHT[:, 0]
        host = torch.stack(
            [
                torch.where(counted_BT, bound, other)
                for bound, other in (
                    (self._low_BT, keys),
                    (self._low_BT, 0),
                    (self._high_BT, keys),
                    (self._high_BT, 0),
                )
            ]
        )
        self._host_4BT: list[list[list[int]]] = host.tolist()
        self._shared = host.size(1) == 1
        kind = self.visibility.kind
        self._regular = self._shared and kind != "other" and "padding" not in kind

    def _range(self, b: slice, t: slice) -> tuple[int, int, int, int]:
        """First column any row sees, first and one past the last that all see, one past the last any sees."""
        some = slice(0, 1) if self._shared else b
        key = (some.start, some.stop, t.start, t.stop, t.step)
        found = self._ranges.get(key)
        if found is None:
            low, last_low, first_high, high = self._host_4BT
            start, full_start = min(min(r[t]) for r in low[some]), max(max(r[t]) for r in last_low[some])
            full_stop, stop = min(min(r[t]) for r in first_high[some]), max(max(r[t]) for r in high[some])
            if start >= stop:  # no row counts, so nothing need be hidden
                start, full_start, full_stop, stop = 0, 0, self.shape[3], self.shape[3]
            if full_start >= full_stop:
                full_start = full_stop = start
            found = self._ranges[key] = (start, full_start, full_stop, stop)
        return found


# --- helpers ------------------------------------------------------------------------------------------


def _precision(call: FusedCall) -> tuple[torch.dtype, float, bool]:
    """The dtype to compute in, a bound of |scale·q·k| (Cauchy-Schwarz), and whether q and k are finite."""
    inputs = (call.q_BHTD, call.k_BKSD)
    dtypes = (
        [torch.float64] if any(x.dtype == torch.float64 for x in inputs) else [torch.float32, torch.float64]
    )
    if call.q_BHTD.device.type == "mps":
        dtypes = [torch.float32]
    bound, dtype = 0.0, dtypes[0]
    if all(x.numel() for x in inputs):
        for dtype in dtypes:
            norms = [float(torch.linalg.vector_norm(x.detach(), dim=-1, dtype=dtype).amax()) for x in inputs]
            bound = norms[0] * norms[1] * max(1.0, abs(call.scale))
            if bound < big(dtype) / 100:
                return dtype, norms[0] * norms[1] * abs(call.scale), True
    return dtype, bound, bound < big(dtype) / 100


# --- constants ----------------------------------------------------------------------------------------

# Elements of an edge that is kept for the tiles of other heads.
KEPT_EDGE = 1 << 13
