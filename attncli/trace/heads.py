"""Sums of rows → the numbers of each head. Everything here is linear in tokens, and in float64 where there is one.

This file must not know tensors of a model: it sees sums, what rows may see, and a source to ask again for
the few rows that rounding would spoil.

Suffixes: B batch, H query heads, T queries, S columns, R chosen rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from attncli.trace.tiles import FIELDS, Sums, wide


class Logits(Protocol):
    """What was summed, for a second look, in float64: e^logit is a key's weight, −Inf where it is hidden."""

    def column(self, head: int, key: int) -> Tensor:
        """Logits of one column for every query: (B, T)."""
        ...

    def chosen_rows(self, batch: int, head: int, rows_R: Tensor) -> Tensor:
        """Logits of whole rows: (R, S)."""
        ...


def head_numbers(
    sums: Sums, allowed_BHT: Tensor, counted_BHT: Tensor, logits: Logits, as_they_are: bool, block: int
) -> Mapping[str, tuple[float | None, ...]]:
    """All per-head metrics but those that only the caller knows; None where no row or pair defines one.

    `as_they_are`: the probabilities need not sum to 1 (another normaliser). `block`: elements that a second
    look may hold at once.
    """
    rows = dict(zip(FIELDS, wide(sums.rows), strict=True))
    allowed_BHT = wide(allowed_BHT.expand(rows["z"].shape))
    counted_BHT = counted_BHT.expand(rows["z"].shape)
    z_BHT = rows["z"] + rows["e_sink"]
    ps_BHT = rows["ps"] + torch.xlogy(rows["e_sink"], rows["e_sink"])
    normaliser_BHT = torch.ones_like(z_BHT) if as_they_are else z_BHT
    if sums.sinks_H is not None and not as_they_are:
        normaliser_BHT = z_BHT + (wide(sums.sinks_H)[:, None] - rows["shift"]).exp()
    entropy_BHT = (z_BHT * normaliser_BHT.log() - ps_BHT) / normaliser_BHT
    single_BHT = allowed_BHT == 1
    if not as_they_are:
        entropy_BHT = entropy_BHT.clamp(min=0)
        if sums.sinks_H is None:
            entropy_BHT = torch.where(single_BHT & entropy_BHT.isfinite(), 0, entropy_BHT)
    peak_BHT = rows["peak"] if as_they_are else (rows["max"] - rows["shift"]).exp() / normaliser_BHT
    peaky_BHT = torch.where(peak_BHT.isnan(), peak_BHT, wide(peak_BHT > PEAKY))
    thorough_BHT = counted_BHT & sums.thorough_T
    several_BHT = counted_BHT & (allowed_BHT > 1)
    counts_H = counted_BHT.sum((0, 2))

    mass_HS = wide(sums.mass_BHS).sum(0)
    if mass_HS.size(-1):
        guessed_H = torch.where(counted_BHT, rows["e_sink"] / normaliser_BHT, 0).sum((0, 2))
        mass_HS.scatter_add_(-1, sums.guess_H[:, None], guessed_H[:, None])
    mass_HS /= counts_H.clamp(min=1)[:, None]
    sink_H, sink_mass_H = _sinks(mass_HS, sums.guess_H)
    rest_BHT = _rest(sums, rows, z_BHT, ps_BHT, allowed_BHT, counted_BHT, sink_H, logits, as_they_are, block)
    some_H = counts_H > 0
    unknown_H = sink_mass_H.isnan()
    numbers = {
        "entropy": _mean(entropy_BHT, counted_BHT),
        "entropy_min": _smallest(entropy_BHT, several_BHT),
        "entropy_ratio": _mean(entropy_BHT / allowed_BHT.clamp(min=2).log(), several_BHT),
        "entropy_rest": _mean(rest_BHT, counted_BHT & ~_undefined(rest_BHT)),
        "sink_mass": _optional(sink_mass_H, some_H),
        "sink_key": _optional(torch.where(unknown_H, torch.nan, wide(sink_H)), some_H),
        "score_max": _largest(rows["max"], counted_BHT),
        "score_min": _smallest(rows["min"], counted_BHT),
        "score_std": _deviation(rows, allowed_BHT, thorough_BHT),
        "reach": _mean(rows["distance"] / normaliser_BHT, thorough_BHT),
        "peaky_rows": _mean(peaky_BHT, counted_BHT),
    }
    stacked = torch.stack([value for value, _ in numbers.values()])
    known = torch.stack([defined for _, defined in numbers.values()])
    return {
        name: tuple(number if defined else None for number, defined in zip(*pair, strict=True))
        for name, *pair in zip(numbers, stacked.tolist(), known.tolist(), strict=True)
    }


# --- without the sink ---------------------------------------------------------------------------------


def _sinks(mass_HS: Tensor, guess_H: Tensor) -> tuple[Tensor, Tensor]:
    """Column of the largest mean probability and that probability. The guess stays where it is as good."""
    if not mass_HS.size(-1):
        return torch.zeros_like(guess_H), torch.zeros_like(mass_HS[:, :0].sum(-1))
    largest_H, sink_H = mass_HS.max(-1)
    guessed_H = mass_HS.gather(-1, guess_H[:, None])[:, 0]
    kept_H = guessed_H >= largest_H - 1e-6
    return torch.where(kept_H, guess_H, sink_H), torch.where(kept_H, guessed_H, largest_H)


def _rest(
    sums: Sums,
    rows: Mapping[str, Tensor],
    z_BHT: Tensor,
    ps_BHT: Tensor,
    allowed_BHT: Tensor,
    counted_BHT: Tensor,
    sink_H: Tensor,
    logits: Logits,
    as_they_are: bool,
    block: int,
) -> Tensor:
    """Entropy of each row without its sink key, renormalised; UNDEFINED where no other key is left.

    Where the guess was right, the sums never held the key. Elsewhere it is subtracted, unless it has most of
    the row: then the difference would be rounding, and the row is computed again without it.
    """
    e_BHT, z_rest_BHT, ps_rest_BHT = rows["e_sink"], rows["z"], rows["ps"]
    hard_BHT = z_rest_BHT < 1e-25 * z_BHT
    wrong = (sink_H != sums.guess_H).nonzero()[:, 0].tolist()
    if wrong:
        e_BHT, z_rest_BHT, ps_rest_BHT = e_BHT.clone(), z_rest_BHT.clone(), ps_rest_BHT.clone()
    sinks = sink_H.tolist()
    for head in wrong:
        d_BT = wide(logits.column(head, sinks[head]))
        if not as_they_are:
            d_BT = d_BT - rows["shift"][:, head]
        weight_BT = d_BT.exp()
        e_BHT[:, head] = weight_BT
        z_rest_BHT[:, head] = z_BHT[:, head] - weight_BT
        ps_rest_BHT[:, head] = ps_BHT[:, head] - torch.where(weight_BT == 0, 0, weight_BT * d_BT)
        hard_BHT[:, head] = weight_BT > 0.9 * z_BHT[:, head]
    left_BHT = allowed_BHT - wide(e_BHT > 0)
    rest_BHT = (z_rest_BHT.log() - ps_rest_BHT / z_rest_BHT).clamp(min=0)
    hard_BHT &= counted_BHT & (left_BHT > 1)
    if bool(hard_BHT.any()):
        at_once = max(1, block // sums.mass_BHS.size(-1))
        for batch, head in hard_BHT.any(-1).nonzero().tolist():
            for rows_R in torch.split(hard_BHT[batch, head].nonzero()[:, 0], at_once):
                rest_BHT[batch, head, rows_R] = _entropy_without(
                    logits.chosen_rows(batch, head, rows_R), sinks[head]
                )
    rest_BHT = torch.where((left_BHT == 1) & z_BHT.isfinite(), 0, rest_BHT)
    nothing_BHT = left_BHT < 1
    if as_they_are:
        nothing_BHT |= z_rest_BHT == 0  # keys may have no probability at all
    return torch.where(nothing_BHT, UNDEFINED, rest_BHT)


def _entropy_without(logits_RS: Tensor, sink: int) -> Tensor:
    logits_RS = logits_RS.clone()
    logits_RS[:, sink] = -torch.inf
    log_probs_RS = torch.log_softmax(logits_RS, -1)
    return -torch.where(log_probs_RS == -torch.inf, 0, log_probs_RS.exp() * log_probs_RS).sum(-1)


def _undefined(value: Tensor) -> Tensor:
    return value == UNDEFINED


# --- rows → heads -------------------------------------------------------------------------------------


def _mean(value_BHT: Tensor, where_BHT: Tensor) -> tuple[Tensor, Tensor]:
    count_H = where_BHT.sum((0, 2))
    return torch.where(where_BHT, value_BHT, 0).sum((0, 2)) / count_H.clamp(min=1), count_H > 0


def _smallest(value_BHT: Tensor, where_BHT: Tensor) -> tuple[Tensor, Tensor]:
    value, known = _largest(-value_BHT, where_BHT)
    return -value, known


def _largest(value_BHT: Tensor, where_BHT: Tensor) -> tuple[Tensor, Tensor]:
    known_H = where_BHT.sum((0, 2)) > 0
    if not value_BHT.size(0) or not value_BHT.size(2):
        return torch.zeros_like(value_BHT.sum((0, 2))), known_H
    return torch.where(where_BHT, value_BHT, -torch.inf).amax((0, 2)), known_H


def _optional(value_H: Tensor, known_H: Tensor) -> tuple[Tensor, Tensor]:
    return value_H, known_H


def _deviation(rows: Mapping[str, Tensor], allowed_BHT: Tensor, counted_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation over all visible pairs: spread within rows plus spread of their means (Chan 1983)."""
    n_BHT = torch.where(counted_BHT, allowed_BHT, 0)
    pairs_H = n_BHT.sum((0, 2))
    share_BHT = rows["sum"] / n_BHT.clamp(min=1)
    mean_BHT = torch.where(counted_BHT, rows["shift"] + share_BHT, 0)
    within_BHT = torch.where(counted_BHT, (rows["norm"].square() - rows["sum"] * share_BHT).clamp(min=0), 0)
    centre_H = (n_BHT * mean_BHT).sum((0, 2)) / pairs_H.clamp(min=1)
    between_BHT = n_BHT * (mean_BHT - centre_H[:, None]).square()
    variance_H = (within_BHT + between_BHT).sum((0, 2)) / pairs_H.clamp(min=1)
    return variance_H.sqrt(), pairs_H > 0


# --- constants ----------------------------------------------------------------------------------------

# A row counts as peaky above this probability.
PEAKY = 0.95
# No entropy is negative, so this marks a row that has none.
UNDEFINED = -1.0
