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
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attncli.trace.eager import EagerScores
from attncli.trace.fused import FusedScores
from attncli.trace.heads import head_numbers
from attncli.trace.masks import Visibility
from attncli.trace.precision import CORES, in_full_precision
from attncli.trace.tiles import Reducer, Sums, Tile, head_blocks, hide, row_blocks, tile_elements, wide


@dataclass(frozen=True, slots=True)
class FusedCall:
    """All that determines the scores of one fused call: s = cap(scale·q·k) + mask.

    `q_BHTD`, `k_BKSD`, `v_BKSV`: K divides H, query head h reads kv head h // (H // K). `mask`: bool (True is
    visible) or floats added after scaling, broadcastable to (B, H, T, S). `causal_offset`: key j is visible to
    query i only where j ≤ i + causal_offset (0 top left, S − T bottom right). `window` (left, right): only
    where i + off − left ≤ j ≤ i + off + right, off = causal_offset or 0; None is no limit. `soft_cap`: s becomes
    cap·tanh(s / cap) before the mask. `sinks_H`: a learned logit per head that takes probability and has no
    key. `bias`: flex_attention's score_mod(score, b, h, q, kv), `visible`: its mask_mod(b, h, q, kv); both get
    index tensors that broadcast against each other. `same_tokens`: query i is the token of key i where there are
    as many of both, so a key that is padding is a row of padding too; False in cross-attention.
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
    # What was found out about mask, q and k: a call is looked at twice, for its numbers and for its check.
    known: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    same_tokens: bool = True


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


@in_full_precision
def fused_statistics(call: FusedCall) -> Numbers:
    """Everything about the scores of one fused call, exact; a NaN or Inf in a head's scores makes them NaN."""
    source = FusedScores(call)
    sums, allowed_BHT, counted_BHT = _summed(source, call.sinks_H)
    per_head = dict(head_numbers(sums, allowed_BHT, counted_BHT, source, False, tile_elements(source.device)))
    per_head["dot_absmax"] = tuple(source.dot_absmax(sums).tolist())
    visibility = source.visibility
    per_head.update(_row_counts(visibility, counted_BHT, visibility.masked_BHT, source.shape))
    saturated = None
    if call.soft_cap:
        pairs_H = torch.where(counted_BHT, allowed_BHT, 0).expand(source.shape[:3]).sum((0, 2)).clamp(min=1)
        saturated = tuple((wide(source.saturated_BH).sum(0) / pairs_H).tolist())
    return Numbers(
        per_head=per_head,
        precision=_precision(sums),
        mask_kind=visibility.kind,
        window=visibility.window,
        causal_offset=visibility.causal_offset,
        bias=source.has_bias,
        saturated=saturated,
    )


@in_full_precision
def fused_difference(call: FusedCall, out_BHTV: Tensor, rows: int = 8) -> float:
    """Largest difference between `out_BHTV` and some rows computed again, over the largest |out| there.

    In float32, or float64 for float64 inputs. At least `rows` rows at equal distances, the first and the last
    among them; a row that sees no key is left out, since kernels differ on what it gives. NaN or Inf in the
    same place of both counts as equal.
    """
    if call.v_BKSV is None:
        raise ValueError("a difference needs the values, and v_BKSV is None")
    source = FusedScores(call)
    batch, heads, queries, keys = source.shape
    if not batch * heads * queries * keys:
        return 0.0
    source.count_padding()
    step = max(1, (queries - 1) // max(1, rows - 1))
    spread = [slice(0, queries, step)]
    if (queries - 1) % step:
        spread.append(slice(queries - 1, queries))
    # Few rows leave room for the keys of several heads at once.
    blocks = head_blocks(batch, heads, min(rows, queries), keys, source.group, source.device)
    chosen = [t for part in spread for t in row_blocks(queries, keys, source.device, part)]
    worst = torch.zeros((), dtype=source.dtype, device=out_BHTV.device)
    largest = torch.zeros_like(worst)
    for b, h in blocks:
        for t in chosen:
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


@in_full_precision
def eager_statistics(
    scores_BHTS: Tensor,
    probs_BHTS: Tensor,
    *,
    visible_above: float,
    recompute: bool = True,
    same_tokens: bool = True,
) -> Numbers:
    """The same of scores that lie in memory; `dot_absmax` is not known here and left out.

    `scores_BHTS`: what went into the softmax, any strides and float dtype; an entry is masked where it is
    ≤ `visible_above`, and −Inf always is. `recompute`: probabilities are the softmax of the scores in at least
    float32 (the model's own may be rounded); False takes `probs_BHTS` as they are, rows that do not sum to 1
    included: entropy is then −Σ p ln p of what is there, and `entropy_rest` renormalises. `same_tokens`: as in
    `FusedCall`.
    """
    heads = scores_BHTS.size(1)
    for judged_heads in (1, heads):
        # Nearly always all heads see the same keys, and one of them tells all.
        source = EagerScores(
            scores_BHTS, probs_BHTS, visible_above, recompute, same_tokens, judged_heads=judged_heads
        )
        sums, _, _ = _summed(source, None)
        allowed_BHT, counted_BHT, masked_BHT = source.recounted(sums)
        if source.shared:
            break
    per_head = dict(
        head_numbers(sums, allowed_BHT, counted_BHT, source, not recompute, tile_elements(source.device))
    )
    visibility = source.visibility
    per_head.update(_row_counts(visibility, counted_BHT, masked_BHT, source.shape))
    return Numbers(
        per_head=per_head,
        precision=_precision(sums),
        mask_kind=visibility.kind,
        window=visibility.window,
        causal_offset=visibility.causal_offset,
        bias=False,
    )


@in_full_precision
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
    for n, _, t in _tiles((pairs, 1, queries, keys), 1, q_NTD.device):
        dots_NTS = torch.bmm(q_NTD[n, t].to(dtype), k_NDS[n].to(dtype))
        found_NT[n, t] = torch.maximum(dots_NTS.amax(-1), -dots_NTS.amin(-1))
    if dtype == torch.float32 and q_NTD.device.type != "mps" and not bool(found_NT.isfinite().all()):
        return dot_extremes(q_NTD.double(), k_NDS.double())
    return found_NT


@in_full_precision
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
    for b, h, t in _tiles((batch, heads, queries, keys), 1, weights_BHTS.device):
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
        source.position,
        source.order_BS,
        source.looks_back,
        sinks_H,
        source.dtype,
    )
    if not batch * heads * queries * keys:
        return sums, visibility.allowed_BHT, counted_BHT
    blocks = list(head_blocks(batch, heads, queries, keys, source.group, source.device))
    sample = row_blocks(queries, keys, source.device, slice(0, queries, max(1, queries // SAMPLE)))
    rows = row_blocks(queries, keys, source.device)
    thorough = [_is_thorough(index, len(rows)) for index in range(len(rows))]
    for t, counts in zip(rows, thorough, strict=True):
        sums.thorough_T[t] = counts
    mass_BHS = torch.zeros_like(sums.mass_BHS)

    def look(reader: FusedScores | EagerScores, blocks: Iterator[tuple[slice, slice]]) -> None:
        for b, h in blocks:
            for t in sample:
                _add_sample(reader.tile(b, h, t), counted_BHT, mass_BHS)

    def reduce(reader: FusedScores | EagerScores, blocks: Iterator[tuple[slice, slice]]) -> None:
        reducer = Reducer(sums)
        for b, h in blocks:
            reducer.start(b, h)
            for t, counts in zip(rows, thorough, strict=True):
                reducer.add(reader.tile(b, h, t, counting=True), counts)
            reducer.finish()

    _share(source, blocks, look)
    sums.settle(mass_BHS.sum(0).argmax(-1))
    _share(source, blocks, reduce)
    return sums, visibility.allowed_BHT, counted_BHT


def _is_thorough(index: int, blocks: int) -> bool:
    """Whether a block of rows is one of those that the costly metrics are taken of.

    Of many blocks a quarter, two of each eight at equal distance from their middle: what grows or falls evenly
    along the sequence keeps its mean.
    """
    return blocks < MANY_BLOCKS or index % 8 in (1, 6)


def _precision(sums: Sums) -> dict[str, str]:
    return {} if bool(sums.thorough_T.all()) else dict.fromkeys(SAMPLED, "sampled")


def _share(
    source: FusedScores | EagerScores,
    blocks: list[tuple[slice, slice]],
    work: Callable[[Any, Iterator[tuple[slice, slice]]], None],
) -> None:
    """Runs `work` on all blocks; on CPU by threads, each with blocks of its own."""
    workers = min(CORES.get(), len(blocks))
    if source.device.type != "cpu" or math.prod(source.shape) < WORTH_THREADS or workers == 1:
        work(source, iter(blocks))
        return
    lock = threading.Lock()
    left = iter(blocks)
    inference = torch.is_inference_mode_enabled()

    def taken() -> Iterator[tuple[slice, slice]]:
        while True:
            with lock:
                block = next(left, None)
            if block is None:
                return
            yield block

    def run() -> None:
        torch.set_num_threads(1)
        # Grad and inference mode are each thread's own.
        with torch.inference_mode(inference), torch.no_grad():
            work(source.reader(), taken())

    with ThreadPoolExecutor(workers, "attncli-tiles") as pool:
        for future in [pool.submit(run) for _ in range(workers)]:
            future.result()


def _add_sample(tile: Tile, counted_BHT: Tensor, mass_BHS: Tensor) -> None:
    """Adds the probabilities of a tile's rows to their columns.

    From these a sink key is guessed: which key is summed apart, never what is reported.
    """
    hide(tile)
    probs_BHTC = tile.probs_BHTC
    if probs_BHTC is None:
        probs_BHTC = torch.softmax(tile.scores_BHTC, -1)
    weights_BHT = counted_BHT[tile.batch, tile.heads, tile.rows].to(mass_BHS.dtype)
    probs_NTC = probs_BHTC.to(mass_BHS.dtype).flatten(0, 1)
    mass_N1C = torch.bmm(weights_BHT.flatten(0, 1)[:, None], probs_NTC)
    columns = slice(tile.first, tile.first + probs_NTC.size(-1))
    target_BHC = mass_BHS[tile.batch, tile.heads, columns]
    target_BHC += mass_N1C.view(target_BHC.shape)


def _tiles(
    shape: tuple[int, int, int, int], group: int, device: torch.device
) -> Iterator[tuple[slice, slice, slice]]:
    batch, heads, queries, keys = shape
    rows = row_blocks(queries, keys, device)
    for b, h in head_blocks(batch, heads, queries, keys, group, device):
        for t in rows:
            yield b, h, t


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
# From this number of row blocks on (2,048 queries of up to 4,096 keys on CPU) these take a quarter of the rows:
# exact, they would cost a sixth of everything.
MANY_BLOCKS = 32
SAMPLED = ("score_std", "reach")
# Scores of a call below which starting threads takes longer than they save.
WORTH_THREADS = 1 << 21
