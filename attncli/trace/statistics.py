# ruff: noqa: N815  (fields carry shape suffixes)
"""Exact statistics of one attention call, in memory linear in tokens.

Fused kernels: the scores are computed again from q and k, by tiles that fit the cache. That costs about one
more attention and gives every number exactly, whatever the mask, bias, cap or learned sink. Scores that the
model's own code made are read where they lie, by tiles as well. Nothing here changes what it is given, and no
tensor outlives the call.

Suffixes: B batch, H query heads, K key-value heads, T queries, S keys, D head size, V value size, N batch times
heads, C the columns of one tile, R chosen rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncli.trace.eager import EagerScores
from attncli.trace.fused import FusedScores
from attncli.trace.heads import head_numbers
from attncli.trace.masks import Visibility
from attncli.trace.tiles import Sums, Tile, hide, tile_elements, tiles


@dataclass(frozen=True, slots=True)
class FusedCall:
    """All that determines the scores of one fused call: s = cap(scale·q·k) + mask.

    `q_BHTD`, `k_BKSD`, `v_BKSV`: K divides H, query head h reads kv head h // (H // K). `mask`: bool (True is
    visible) or floats added after scaling, broadcastable to (B, H, T, S). `causal_offset`: key j is visible to
    query i only where j ≤ i + causal_offset (0 top left, S − T bottom right). `window` (left, right): only
    where i + off − left ≤ j ≤ i + off + right, off = causal_offset or 0; None is no limit. `soft_cap`: s becomes
    cap·tanh(s / cap) before the mask. `sinks_H`: a learned logit per head that takes probability and has no
    key. `bias`: flex_attention's score_mod(score, b, h, q, kv), `visible`: its mask_mod(b, h, q, kv); both get
    index tensors that broadcast against each other.
    """

    q_BHTD: Tensor
    k_BKSD: Tensor
    v_BKSV: Tensor | None
    scale: float
    mask: Tensor | None = None
    causal_offset: int | None = None
    window: tuple[int | None, int | None] | None = None
    soft_cap: float | None = None
    sinks_H: Tensor | None = None
    bias: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Numbers:
    """What one call measured. `per_head`: metric → one number per query head, None where nothing defines it.

    `sink_key` counts keys from the first that is no padding. `precision` names what is not exact. `window`,
    `mask_kind`, `causal_offset`: as in `records.Call`. `bias`: a finite additive bias was seen. `saturated`: per head
    the share of visible |scale·q·k| above the soft cap; None without one.
    """

    per_head: Mapping[str, tuple[float | None, ...]]
    precision: Mapping[str, str]
    mask_kind: str
    window: int | None
    causal_offset: int | None
    bias: bool
    saturated: tuple[float, ...] | None = None


@torch.no_grad()
def fused_statistics(call: FusedCall) -> Numbers:
    """Everything about the scores of one fused call, exact; a NaN or Inf in a head's scores makes them NaN."""
    source = FusedScores(call)
    sums, allowed_BHT, counted_BHT = _summed(source, call.sinks_H)
    per_head = dict(head_numbers(sums, allowed_BHT, counted_BHT, source, False, source.elements))
    per_head["dot_absmax"] = tuple(source.dot_absmax(sums).tolist())
    visibility = source.visibility
    per_head.update(_row_counts(visibility, counted_BHT, visibility.masked_BHT, source.shape))
    saturated = None
    if call.soft_cap:
        pairs_H = torch.where(counted_BHT, allowed_BHT, 0).expand(source.shape[:3]).sum((0, 2)).clamp(min=1)
        saturated = tuple((source.saturated_H / pairs_H).tolist())
    return Numbers(
        per_head=per_head,
        precision={},
        mask_kind=visibility.kind,
        window=visibility.window,
        causal_offset=visibility.causal_offset,
        bias=source.has_bias,
        saturated=saturated,
    )


@torch.no_grad()
def fused_difference(call: FusedCall, out_BHTV: Tensor, rows: int = 16) -> float:
    """Largest difference between `out_BHTV` and `rows` spread rows computed again, over the largest |out| there.

    In float32, or float64 for float64 inputs. The first and the last row are among them; a row that sees no
    key is not, since kernels differ on what it gives. NaN or Inf in the same place of both counts as equal.
    """
    if call.v_BKSV is None:
        raise ValueError("a difference needs the values, and v_BKSV is None")
    source = FusedScores(call)
    batch, heads, queries, keys = source.shape
    if not batch * heads * queries * keys:
        return 0.0
    source.count_padding()
    step = max(1, (queries - 1) // max(1, rows - 1))
    spread = [slice(0, queries, step), slice(queries - 1, queries)]
    worst = torch.zeros((), dtype=source.dtype, device=out_BHTV.device)
    largest = torch.zeros_like(worst)
    for chosen in spread:
        for b, h, t in tiles(batch, heads, queries, keys, source.group, source.elements, chosen):
            tile = source.tile(b, h, t)
            expected_BHTV = source.output(tile, call.v_BKSV)
            got_BHTV = out_BHTV[b, h, t].to(expected_BHTV.dtype)
            seen_BHT1 = (source.visibility.allowed_BHT.expand(batch, heads, queries)[b, h, t] > 0)[..., None]
            same_BHTV = (got_BHTV == expected_BHTV) | (got_BHTV.isnan() & expected_BHTV.isnan())
            error_BHTV = (got_BHTV - expected_BHTV).abs()
            worst = torch.maximum(worst, torch.where(same_BHTV | ~seen_BHT1, 0, error_BHTV).amax())
            finite_BHTV = seen_BHT1 & got_BHTV.isfinite()
            largest = torch.maximum(largest, torch.where(finite_BHTV, got_BHTV.abs(), 0).amax())
    return float(worst / (largest + torch.finfo(source.dtype).tiny))


@torch.no_grad()
def eager_statistics(
    scores_BHTS: Tensor, probs_BHTS: Tensor, *, visible_above: float, recompute: bool = True
) -> Numbers:
    """The same of scores that lie in memory; `dot_absmax` is not known here and left out.

    `scores_BHTS`: what went into the softmax, any strides and float dtype; an entry is masked where it is
    ≤ `visible_above`, and −Inf always is. `recompute`: probabilities are the softmax of the scores in at least
    float32 (the model's own may be rounded); False takes `probs_BHTS` as they are, rows that do not sum to 1
    included: entropy is then −Σ p ln p of what is there, and `entropy_rest` renormalises.
    """
    source = EagerScores(scores_BHTS, probs_BHTS, visible_above, recompute)
    sums, allowed_BHT, counted_BHT = _summed(source, None)
    allowed_BHT, counted_BHT, masked_BHT = source.recounted(sums)
    per_head = dict(head_numbers(sums, allowed_BHT, counted_BHT, source, not recompute, source.elements))
    visibility = source.visibility
    per_head.update(_row_counts(visibility, counted_BHT, masked_BHT, source.shape))
    return Numbers(
        per_head=per_head,
        precision={},
        mask_kind=visibility.kind if source.shared else "other",
        window=visibility.window if source.shared else None,
        causal_offset=visibility.causal_offset if source.shared else None,
        bias=False,
    )


@torch.no_grad()
def dot_extremes(q_NTD: Tensor, k_NDS: Tensor) -> Tensor:
    """Largest |q·k| of each query row over all keys, (N, T), in float32 or better, by tiles.

    A product beyond float32 is computed in float64; rows without keys give 0.
    """
    pairs, queries, _ = q_NTD.shape
    keys = k_NDS.size(-1)
    dtype = torch.float64 if torch.float64 in (q_NTD.dtype, k_NDS.dtype) else torch.float32
    found_NT = torch.zeros(pairs, queries, dtype=dtype, device=q_NTD.device)
    if not keys:
        return found_NT
    for n, _, t in tiles(pairs, 1, queries, keys, 1, tile_elements(q_NTD.device)):
        dots_NTS = torch.bmm(q_NTD[n, t].to(dtype), k_NDS[n].to(dtype))
        found_NT[n, t] = torch.maximum(dots_NTS.amax(-1), -dots_NTS.amin(-1))
    if dtype == torch.float32 and q_NTD.device.type != "mps" and not bool(found_NT.isfinite().all()):
        return dot_extremes(q_NTD.double(), k_NDS.double())
    return found_NT


@torch.no_grad()
def row_sums(weights_BHTS: Tensor) -> tuple[float, float]:
    """Smallest and largest sum over the last axis, in float32 or better; rows of zeros only are left out.

    (nan, nan) where a row holds NaN or where every row is zero.
    """
    batch, heads, queries, keys = weights_BHTS.shape
    dtype = torch.float64 if weights_BHTS.dtype == torch.float64 else torch.float32
    low = torch.full((), math.inf, dtype=dtype, device=weights_BHTS.device)
    high = -low
    if not weights_BHTS.numel():
        return math.nan, math.nan
    for b, h, t in tiles(batch, heads, queries, keys, 1, tile_elements(weights_BHTS.device)):
        weights = weights_BHTS[b, h, t]
        sums_BHT = weights.sum(-1, dtype=dtype)
        empty_BHT = (sums_BHT == 0) & ~(weights != 0).any(-1)
        low = torch.minimum(low, torch.where(empty_BHT, math.inf, sums_BHT).amin())
        high = torch.maximum(high, torch.where(empty_BHT, -math.inf, sums_BHT).amax())
    smallest, largest = torch.stack((low, high)).tolist()
    return (math.nan, math.nan) if smallest > largest else (smallest, largest)


# --- one pass over all tiles --------------------------------------------------------------------------


def _summed(source: FusedScores | EagerScores, sinks_H: Tensor | None) -> tuple[Sums, Tensor, Tensor]:
    batch, heads, queries, keys = source.shape
    visibility = source.visibility
    counted_BHT = visibility.counted_BHT.expand(batch, heads, queries)
    sums = Sums(
        source.shape,
        counted_BHT,
        torch.zeros(heads, dtype=torch.int64, device=counted_BHT.device),
        source.position,
        source.order_BS,
        sinks_H,
        source.dtype,
    )
    if batch * heads * queries * keys:
        sums.guess_H = _likely_sinks(source, counted_BHT)
        for b, h, t in tiles(batch, heads, queries, keys, source.group, source.elements):
            sums.add(source.tile(b, h, t, counting=True))
    return sums, visibility.allowed_BHT, counted_BHT


def _likely_sinks(source: FusedScores | EagerScores, counted_BHT: Tensor) -> Tensor:
    """The column with the largest mass over some spread rows, per head.

    A guess only: it decides which key is summed apart, never what is reported.
    """
    batch, heads, queries, keys = source.shape
    mass_HS = torch.zeros(heads, keys, dtype=source.dtype, device=counted_BHT.device)
    sample = slice(0, queries, max(1, queries // SAMPLE))
    for b, h, t in tiles(batch, heads, queries, keys, source.group, source.elements, sample):
        tile = source.tile(b, h, t)
        probs_BHTC = _probabilities(tile)
        columns = slice(tile.first, tile.first + probs_BHTC.size(-1))
        weights_BHT = counted_BHT[b, h, t].to(probs_BHTC.dtype)
        mass_BHC = torch.bmm(weights_BHT.flatten(0, 1)[:, None], probs_BHTC.flatten(0, 1))
        mass_HS[h, columns] += mass_BHC.view(weights_BHT.size(0), -1, probs_BHTC.size(-1)).sum(0)
    return mass_HS.argmax(-1)


def _probabilities(tile: Tile) -> Tensor:
    if tile.probs_BHTC is not None:
        return tile.probs_BHTC.to(tile.scores_BHTC.dtype)
    for edge in tile.edges:
        hide(tile.scores_BHTC[..., edge.start : edge.stop], edge.visible_BHTC, tile.finite)
    return torch.softmax(tile.scores_BHTC, -1)


def _row_counts(
    visibility: Visibility, counted_BHT: Tensor, masked_BHT: Tensor, shape: tuple[int, int, int, int]
) -> dict[str, tuple[float, ...]]:
    counts = {
        "rows": counted_BHT,
        "rows_masked": masked_BHT,
        "rows_padded": visibility.padded_BT[:, None],
    }
    return {
        name: tuple(map(float, rows.expand(shape[:3]).sum((0, 2)).tolist())) for name, rows in counts.items()
    }


# --- constants ----------------------------------------------------------------------------------------

# Rows that a sink is guessed from.
SAMPLE = 32
