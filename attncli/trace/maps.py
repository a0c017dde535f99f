"""Attention maps: the probabilities of chosen heads in blocks of queries and keys, and nothing for other heads.

A matrix of T × S numbers is never made: tiles of rows are summed over blocks of keys as they pass by. The
probabilities are those that weighed the values, before dropout and before heads are mixed with each other. This
file must not know how layers are named, nor what stands at a place of the sequence.

Suffixes: B batch, H query heads, T queries, S keys, Q blocks of queries, C blocks of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attncli.trace.fused import FusedScores
from attncli.trace.masks import Visibility, mask_facts, visibility
from attncli.trace.precision import in_full_precision
from attncli.trace.tiles import row_blocks, wide

if TYPE_CHECKING:
    from attncli.trace.pending import Pending
    from attncli.trace.statistics import FusedCall

MOST_BLOCKS = 64
"""Blocks of a map on either side."""


class Drawn(NamedTuple):
    """The map of one head for one row of the batch. `probs`, `query_starts`, `key_starts`: as in `AttentionMap`.

    Padding at either end, keys that no query sees, is left out: query 0 of the map is place `first_query` of the
    sequence, key 0 `first_key`.
    """

    head: int
    batch: int
    first_query: int
    first_key: int
    queries: int
    keys: int
    query_starts: tuple[int, ...]
    key_starts: tuple[int, ...]
    probs: tuple[tuple[float, ...] | None, ...]


@dataclass(slots=True)
class Maps:
    """Which maps are drawn.

    `heads`: module path, weights that project q and k, and number of heads of a call → the heads wanted of it, in
    any order. `rows`: rows of the batch; of a call with another batch size only the first is drawn. `most`: maps
    in all; `left_out` counts those beyond.
    """

    heads: Callable[[str, Mapping[str, str], int], Sequence[int]]
    rows: int = 1
    most: int = 256
    drawn: int = 0
    left_out: int = 0

    def chosen(
        self, module: str, parameters: Mapping[str, str], batch: int, heads: int
    ) -> list[tuple[int, int]]:
        """(row of the batch, head) of each map of a call."""
        wanted = sorted({head for head in self.heads(module, parameters, heads) if 0 <= head < heads})
        pairs = [
            (row, head) for row in range(batch if batch == self.rows else min(batch, 1)) for head in wanted
        ]
        kept = pairs[: max(0, self.most - self.drawn)]
        self.drawn += len(kept)
        self.left_out += len(pairs) - len(kept)
        return kept


@in_full_precision
def fused_maps(call: FusedCall, chosen: Sequence[tuple[int, int]]) -> tuple[Drawn, ...]:
    """Maps of (row, head) of a fused call: softmax in float32 or better of q and k as they were given.

    Mask, scale, cap, bias and learned sinks are the call's own; with sinks a row sums to what they leave.
    """
    if not chosen:
        return ()
    source = FusedScores(call)
    batch, heads, queries, keys = source.shape
    shown = source.visibility
    spans = _Spans(shown, lambda: source.mask.facts().seen_BHS, batch, queries, keys)
    source.count_padding()
    allowed_BHT = shown.allowed_BHT.expand(batch, heads, queries)
    drawn = []
    for b, h in chosen:
        rows, columns = spans.of(b)
        blocks_SC = _membership(columns, keys, source.dtype, source.device)
        values_BKSV = blocks_SC.expand(*call.k_BKSD.shape[:2], *blocks_SC.shape)
        here = slice(b, b + 1), slice(h, h + 1)
        parts = (
            (t, source.output(source.tile(*here, t), values_BKSV)[0, 0], allowed_BHT[b, h, t] > 0)
            for t in row_blocks(queries, keys, source.device, slice(rows.start, rows.stop))
        )
        drawn.append(_drawn(h, b, rows, columns, parts, blocks_SC))
    return tuple(drawn)


@in_full_precision
def eager_maps(
    scores_BHTS: Tensor,
    probs_BHTS: Tensor,
    chosen: Sequence[tuple[int, int]],
    *,
    visible_above: float,
    same_tokens: bool = True,
    padding: bool = True,
) -> tuple[Drawn, ...]:
    """Maps of (row, head) of probabilities that lie in memory, as they are.

    `scores_BHTS`: tell which keys a row may see, those > `visible_above`. `same_tokens`: as in `FusedCall`.
    `padding`: whether keys that no row sees may be padding.
    """
    if not chosen:
        return ()
    batch, heads, queries, keys = scores_BHTS.shape
    scores_BHTS, probs_BHTS = scores_BHTS.detach(), probs_BHTS.detach()
    device = scores_BHTS.device
    spans: _Spans | None = None
    if padding:
        facts = mask_facts(
            lambda b, h, t: ~(scores_BHTS[b, h, t] <= visible_above), batch, heads, queries, keys, device
        )
        shown = visibility(facts, batch, queries, keys, same_tokens)
        spans = _Spans(shown, lambda: facts.seen_BHS, batch, queries, keys)
    dtype = torch.float64 if probs_BHTS.dtype == torch.float64 else torch.float32
    drawn = []
    for b, h in chosen:
        rows, columns = spans.of(b) if spans is not None else (range(queries), range(keys))
        blocks_SC = _membership(columns, keys, dtype, device)
        parts = (
            (
                t,
                probs_BHTS[b, h, t].to(dtype) @ blocks_SC,
                (~(scores_BHTS[b, h, t] <= visible_above)).any(-1),
            )
            for t in row_blocks(queries, keys, device, slice(rows.start, rows.stop))
        )
        drawn.append(_drawn(h, b, rows, columns, parts, blocks_SC))
    return tuple(drawn)


def redrawn(pending: Pending, used: Tensor) -> tuple[Drawn, ...]:
    """The maps of `pending` from the weights (…, T, S) that met the values; as they were where those do not fit."""
    layout = pending.layout
    fits = used.numel() == layout.batch * layout.heads * layout.queries * layout.keys
    if not pending.drawn or not fits or used.shape[-1] != pending.node.shape[-1]:
        return pending.drawn
    probs_BHTS = layout.view(used.reshape(pending.node.shape))
    chosen = [(one.batch, one.head) for one in pending.drawn]
    # A probability of 0 may be a mask or a rounding: nothing is taken for padding.
    return eager_maps(probs_BHTS, probs_BHTS, chosen, visible_above=0.0, padding=False)


# --- padding ------------------------------------------------------------------------------------------


class _Spans:
    """From the first to the last place that is no padding: queries and keys of each row of the batch.

    `seen`: keys that any query sees, (B or 1, H or 1, S); asked for only where they tell what is padding.
    """

    def __init__(
        self, shown: Visibility, seen: Callable[[], Tensor], batch: int, queries: int, keys: int
    ) -> None:
        self.queries, self.keys = range(queries), range(keys)
        self._rows_BT = self._columns_BS = None
        if "padding" not in shown.kind:
            return
        if bool(shown.padded_BT.any()):  # queries and keys are the same tokens
            self._rows_BT = self._columns_BS = ~shown.padded_BT.expand(batch, -1)
        else:
            self._columns_BS = seen().any(1).expand(batch, -1)

    def of(self, row: int) -> tuple[range, range]:
        return _span(self._rows_BT, row, self.queries), _span(self._columns_BS, row, self.keys)


def _span(real_BN: Tensor | None, row: int, whole: range) -> range:
    if real_BN is None:
        return whole
    places = real_BN[row].nonzero()
    return range(int(places[0]), int(places[-1]) + 1) if places.numel() else whole


# --- blocks -------------------------------------------------------------------------------------------


def _starts(length: int) -> range:
    """First place of each block. All but the last are of one size, so that an even row has even cells."""
    return range(0, length, max(1, math.ceil(length / MOST_BLOCKS)))


def _membership(columns: range, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(S, C): 1 where a key is in a block. A row of probabilities times this is its sum over each block."""
    starts = _starts(len(columns))
    blocks_SC = torch.zeros(keys, len(starts), dtype=dtype, device=device)
    place_N = torch.arange(len(columns), device=device)
    blocks_SC[place_N + columns.start, place_N // starts.step] = 1
    return blocks_SC


def _drawn(
    head: int,
    batch: int,
    rows: range,
    columns: range,
    parts: Iterator[tuple[slice, Tensor, Tensor]],
    blocks_SC: Tensor,
) -> Drawn:
    """`parts`: rows, their probabilities by block of keys (T, C), and which of them see any key (T)."""
    starts = _starts(len(rows))
    sums_QC = wide(blocks_SC.new_zeros(len(starts), blocks_SC.size(1)))
    counts_Q = sums_QC.new_zeros(len(starts))
    for t, probs_TC, some_T in parts:
        block_T = (
            torch.arange(t.start - rows.start, t.stop - rows.start, device=sums_QC.device) // starts.step
        )
        # Not a product with 0: a row that sees nothing may hold NaN.
        counted_TC = torch.where(some_T[:, None], probs_TC.to(sums_QC.dtype), 0)
        sums_QC.index_add_(0, block_T, counted_TC)
        counts_Q.index_add_(0, block_T, some_T.to(counts_Q.dtype))
    means = (sums_QC / counts_Q[:, None]).tolist()
    probs = tuple(
        tuple(_short(value) for value in row) if count else None
        for row, count in zip(means, counts_Q.tolist(), strict=True)
    )
    return Drawn(
        head,
        batch,
        rows.start,
        columns.start,
        len(rows),
        len(columns),
        tuple(starts),
        tuple(_starts(len(columns))),
        probs,
    )


def _short(value: float) -> float:
    """Seven significant digits, which are all that float32 has."""
    return float(f"{value:.7g}")


# --- tables -------------------------------------------------------------------------------------------

# Normalisers whose weights are no probabilities.
WITHOUT_MAPS = ("sigmoid", "relu")
