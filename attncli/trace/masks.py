# ruff: noqa: N815  (fields carry shape suffixes)
"""Which keys each query row may attend to, and what kind of mask that is. Memory is linear in tokens.

A mask is read once, by tiles of rows, into the first, the last and the number of visible keys of each row and
the set of keys that any row sees. Where these say everything (each row sees an interval of those keys) the
statistics never look at the mask again. This file must not know scores, heads' layouts or files.

Suffixes: B batch, H heads, T queries, S keys; a size may be 1 where all share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

VisibleTile = Callable[[slice, slice, slice], Tensor]
"""(batch, heads, rows) → bool (b or 1, h or 1, t or 1, S), True where a key may be attended to."""


@dataclass(frozen=True, slots=True)
class Visibility:
    """What the rows of one call see.

    `allowed_BHT`: number of visible keys; `counted_BHT`: rows with a key that are no padding; `masked_BHT`:
    rows without one; `padded_BT`: rows at the positions of padding keys, in neither of the two. `low_BT`, `high_BT`:
    row i sees the columns low ≤ j < high and no others, where column j is key `order_BS[b, j]` (None: key
    j); None where no such interval exists. `order_BS` puts padding last and else keeps the order of keys.
    """

    kind: str
    window: int | None
    causal_offset: int | None
    allowed_BHT: Tensor
    counted_BHT: Tensor
    masked_BHT: Tensor
    padded_BT: Tensor
    low_BT: Tensor | None
    high_BT: Tensor | None
    order_BS: Tensor | None


@dataclass(frozen=True, slots=True)
class RowFacts:
    """First, last (−1 without any) and number of visible keys per row; keys that some row sees."""

    first_BHT: Tensor
    last_BHT: Tensor
    count_BHT: Tensor
    seen_BHS: Tensor


def interval_facts(
    queries: int, keys: int, left: int | None, right: int | None, device: torch.device
) -> RowFacts:
    """Facts of the plain rule i − left ≤ j ≤ i + right (None: no limit), without any mask being made."""
    i_T = torch.arange(queries, device=device)
    first_T = torch.zeros_like(i_T) if left is None else (i_T - left).clamp(0, keys)
    last_T = torch.full_like(i_T, keys - 1) if right is None else (i_T + right).clamp(-1, keys - 1)
    count_T = (last_T - first_T + 1).clamp(min=0)
    last_T = torch.where(count_T > 0, last_T, -1)
    first_T = torch.where(count_T > 0, first_T, keys)
    steps_S = torch.zeros(keys + 1, dtype=torch.int64, device=device)
    some_T = (count_T > 0).long()
    steps_S.index_add_(0, first_T.clamp(max=keys), some_T)
    steps_S.index_add_(0, last_T + 1, -some_T)
    seen_S = steps_S.cumsum(0)[:keys] > 0
    return RowFacts(first_T[None, None], last_T[None, None], count_T[None, None], seen_S[None, None])


def mask_facts(
    visible: VisibleTile,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    device: torch.device,
    tile: int = 1 << 19,
) -> RowFacts:
    """Facts of any mask, read by tiles of about `tile` elements. `batch` and `heads`: those that differ."""
    if not batch * heads * queries * keys:
        return interval_facts(queries, keys, None, None, device)
    parts = [torch.zeros(batch, heads, queries, dtype=torch.int64, device=device) for _ in range(3)]
    seen_BHS = torch.zeros(batch, heads, keys, dtype=torch.bool, device=device)
    number = torch.int16 if keys < 2**15 - 1 else torch.int32
    up_S = torch.arange(1, keys + 1, dtype=number, device=device)
    down_S = up_S.flip(0)
    for b, h, t in _blocks(batch, heads, queries, keys, tile):
        shape = (b.stop - b.start, h.stop - h.start, t.stop - t.start, keys)
        # The product with bytes, not `argmax`: several times faster on bool rows.
        bytes_BHTS = visible(b, h, t).expand(shape).view(torch.uint8)
        parts[0][b, h, t] = keys - (bytes_BHTS * down_S).amax(-1).long()
        parts[1][b, h, t] = (bytes_BHTS * up_S).amax(-1).long() - 1
        parts[2][b, h, t] = torch.count_nonzero(bytes_BHTS, dim=-1)
        seen_BHS[b, h] |= bytes_BHTS.amax(-2).bool()
    return RowFacts(parts[0], parts[1], parts[2], seen_BHS)


def visibility(facts: RowFacts, batch: int, queries: int, keys: int, same_tokens: bool = True) -> Visibility:
    """The facts judged: padding, kind of mask, intervals.

    `same_tokens`: query i is the token of key i where there are as many of both, so padding is both.
    """
    paired = same_tokens and queries == keys
    shared = facts.count_BHT.size(1) == 1 or all(
        bool((part == part[:, :1]).all())
        for part in (facts.first_BHT, facts.last_BHT, facts.count_BHT, facts.seen_BHS)
    )
    first_BT, last_BT, count_BT, seen_BS = (
        part[:, 0] for part in (facts.first_BHT, facts.last_BHT, facts.count_BHT, facts.seen_BHS)
    )
    device = count_BT.device
    if not queries or not keys or not batch:
        nothing_BT = torch.zeros(1, queries, dtype=torch.bool, device=device)
        zero_BHT = torch.zeros(1, 1, queries, dtype=torch.int64, device=device)
        bounds_BT = zero_BHT[0]
        return Visibility(
            "none", None, None, zero_BHT, zero_BHT > 0, zero_BHT == 0, nothing_BT, bounds_BT, bounds_BT, None
        )
    before_BS = torch.nn.functional.pad(seen_BS.long().cumsum(-1), (1, 0))
    low_BT = before_BS.gather(-1, first_BT.clamp(0, keys))
    high_BT = before_BS.gather(-1, last_BT + 1)
    intervals = shared and bool((high_BT - low_BT == count_BT)[count_BT > 0].all())
    pattern = (
        _pattern(first_BT, last_BT, count_BT, seen_BS, queries, keys, paired) if intervals else _Pattern()
    )
    if pattern.padding_BS is not None and paired:
        padded_BT = pattern.padding_BS
    else:
        padded_BT = torch.zeros(count_BT.size(0), queries, dtype=torch.bool, device=device)
    allowed_BHT = count_BT[:, None] if shared else facts.count_BHT
    some_BHT = allowed_BHT > 0
    order_BS = None
    if intervals and bool((~seen_BS).any()):
        if pattern.padding_BS is None:
            low_BT, high_BT = first_BT.clamp(max=keys), last_BT + 1
            # Keys that nobody sees lie inside some row's interval only if they are padding.
            intervals = bool((high_BT - low_BT == count_BT)[count_BT > 0].all())
        elif _is_prefix(seen_BS):
            low_BT, high_BT = first_BT.clamp(max=keys), last_BT + 1
        else:
            order_BS = torch.argsort((~seen_BS).byte(), dim=-1, stable=True)
    return Visibility(
        kind=pattern.kind,
        window=pattern.window,
        causal_offset=pattern.causal_offset,
        allowed_BHT=allowed_BHT,
        counted_BHT=some_BHT & ~padded_BT[:, None],
        masked_BHT=~some_BHT & ~padded_BT[:, None],
        padded_BT=padded_BT,
        low_BT=low_BT if intervals else None,
        high_BT=high_BT if intervals else None,
        order_BS=order_BS if intervals else None,
    )


def first_position(causal_offset: int | None, queries: int, keys: int) -> int:
    """Place among the keys of the first query: behind the cached ones, unless the mask says otherwise."""
    if causal_offset is None:
        return keys - 1 if queries == 1 else 0
    return keys - queries + (causal_offset if causal_offset < -1 else 0)


# --- the kind of mask ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pattern:
    kind: str = "other"
    window: int | None = None
    causal_offset: int | None = None
    padding_BS: Tensor | None = None


def _pattern(
    first_BT: Tensor,
    last_BT: Tensor,
    count_BT: Tensor,
    seen_BS: Tensor,
    queries: int,
    keys: int,
    paired: bool,
) -> _Pattern:
    """The simplest rule that gives exactly these rows; rows at padded positions may do as they like.

    With the diagonal hidden, nobody sees the last key: that is no padding. So keys are first taken for
    padding, and where the rule that follows from it hides the last keys anyway, they are not.
    """
    hidden_BS = ~seen_BS
    pattern = _fit(first_BT, last_BT, count_BT, hidden_BS, queries, keys, paired)
    if pattern.causal_offset is not None and pattern.causal_offset < 0:
        explained_BS = hidden_BS.clone()
        explained_BS[:, max(0, keys + pattern.causal_offset) :] = False
        pattern = _fit(first_BT, last_BT, count_BT, explained_BS, queries, keys, paired)
    if pattern.kind == "other" and bool(hidden_BS.any()):
        pattern = _fit(first_BT, last_BT, count_BT, torch.zeros_like(hidden_BS), queries, keys, paired)
    return pattern


def _fit(
    first_BT: Tensor,
    last_BT: Tensor,
    count_BT: Tensor,
    padding_BS: Tensor,
    queries: int,
    keys: int,
    paired: bool,
) -> _Pattern:
    real_BS = ~padding_BS
    rows_BT = (~padding_BS if paired else torch.ones_like(padding_BS[:, :1])).expand(-1, queries)
    rows_BT = rows_BT.expand(count_BT.shape)
    padded = bool(padding_BS.any())
    padding = padding_BS if padded else None
    some_BT = rows_BT & (count_BT > 0)
    if not bool(some_BT.any()):
        return _Pattern("padding" if padded and not bool(rows_BT.any()) else "other", padding_BS=padding)
    diagonal_T = torch.arange(queries, device=count_BT.device) + (keys - queries)
    below_BS = _nearest(real_BS, below=True)
    above_BS = _nearest(real_BS, below=False)
    left = int((diagonal_T - first_BT)[some_BT].max())
    right = int((last_BT - diagonal_T)[some_BT].max())
    options: list[tuple[int | None, int | None]] = [(None, None), (None, right), (left, None), (left, right)]
    for lower, upper in options:
        start_T = torch.zeros_like(diagonal_T) if lower is None else diagonal_T - lower
        stop_T = torch.full_like(diagonal_T, keys - 1) if upper is None else diagonal_T + upper
        expected_first_BT = above_BS[:, start_T.clamp(0, keys)]
        expected_last_BT = below_BS[:, stop_T.clamp(-1, keys - 1) + 1]
        empty_BT = expected_first_BT > expected_last_BT
        fits_BT = torch.where(
            empty_BT, count_BT == 0, (first_BT == expected_first_BT) & (last_BT == expected_last_BT)
        )
        if bool(fits_BT[rows_BT].all()):
            return _named(lower, upper, padding)
    return _Pattern()


def _named(left: int | None, right: int | None, padding_BS: Tensor | None) -> _Pattern:
    kinds: list[str] = []
    window = causal_offset = None
    if right is not None and (left is None or (right <= 1 and left > right)):
        kinds.append("causal")
        causal_offset = right
    if left is not None and right is None:
        if left > 0:
            return _Pattern()
        kinds.append("future only")  # a causal mask of the wrong sign
    if left is not None and right is not None:
        kinds.append("sliding window")
        window = left + right + 1
    if padding_BS is not None:
        kinds.append("padding")
    return _Pattern(" + ".join(kinds) or "none", window, causal_offset, padding_BS)


def _nearest(real_BS: Tensor, below: bool) -> Tensor:
    """(B, S + 1). Below: entry j + 1 is the last real key ≤ j, or −1. Else: entry j is the first one ≥ j, or S."""
    keys = real_BS.size(-1)
    j_S = torch.arange(keys, device=real_BS.device)
    pad = torch.nn.functional.pad
    if below:
        return pad(torch.where(real_BS, j_S, -1), (1, 0), value=-1).cummax(-1).values
    return pad(torch.where(real_BS, j_S, keys), (0, 1), value=keys).flip(-1).cummin(-1).values.flip(-1)


def _is_prefix(seen_BS: Tensor) -> bool:
    return not bool((seen_BS[:, 1:] & ~seen_BS[:, :-1]).any()) and bool(
        (seen_BS[:, 0] | ~seen_BS.any(-1)).all()
    )


def _blocks(
    batch: int, heads: int, queries: int, keys: int, tile: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Slices whose product with `keys` has about `tile` elements, and never more than one row above it."""
    rows = max(1, min(queries, tile // max(1, keys)))
    per_head = rows * max(1, keys)
    heads_at_once = max(1, min(heads, tile // per_head))
    batch_at_once = max(1, min(batch, tile // (per_head * heads_at_once)))
    for b in range(0, batch, batch_at_once):
        for h in range(0, heads, heads_at_once):
            for t in range(0, queries, rows):
                yield (
                    slice(b, min(batch, b + batch_at_once)),
                    slice(h, min(heads, h + heads_at_once)),
                    slice(t, min(queries, t + rows)),
                )
