"""What is measured on one attention call: closed forms first, then a slow obvious oracle, then hostile values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attncli.trace.statistics import (
    FusedCall,
    Numbers,
    eager_statistics,
    fused_statistics,
)

INF = math.inf


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- the oracle: one row at a time, in float64 --------------------------------------------------------


def full_scores(call: FusedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Raw dots, final scores (−Inf where hidden) and visibility, each (B, H, T, S) in float64."""
    q, k = call.q_BHTD.double(), call.k_BKSD.double()
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    dots = q @ k.transpose(-1, -2)
    s = dots * call.scale
    if call.soft_cap:
        s = call.soft_cap * torch.tanh(s / call.soft_cap)
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    if call.causal_offset is not None:
        visible &= j <= i + call.causal_offset
    if call.window is not None:
        left, right = call.window
        centre = i + (call.causal_offset or 0)
        if left is not None:
            visible &= j >= centre - left
        if right is not None:
            visible &= j <= centre + right
    b4, h4 = torch.arange(batch)[:, None, None, None], torch.arange(heads)[None, :, None, None]
    if call.bias is not None:
        s = call.bias(s, b4, h4, i, j)
        visible &= s > -9000
    if call.visible is not None:
        visible &= call.visible(b4, h4, i, j)
    if call.mask is not None:
        if call.mask.dtype == torch.bool:
            visible &= call.mask
        else:
            values = call.mask.double()
            two = bool(((values == 0) | (values == values.min())).all()) and float(values.min()) <= -50
            limit = max(-9000.0, float(values.min())) if two else -9000.0
            visible &= values > limit
            s = s + torch.where(values > limit, values, 0.0)
    return dots, s.masked_fill(~visible, -INF), visible


def oracle(
    s: Tensor, visible: Tensor, padded: Tensor | None = None, sinks: Tensor | None = None, position: int = 0
) -> dict[str, list[float | None]]:
    """Per head, by loops over rows. `padded`: (B, T). Sink keys count from the first that is no padding."""
    batch, heads, queries, keys = s.shape
    found: dict[str, list[float | None]] = {}
    for h in range(heads):
        rows = []
        masked = padded_rows = 0
        mass = torch.zeros(keys, dtype=torch.float64)
        for b in range(batch):
            order = torch.arange(keys)
            if padded is not None and queries == keys:
                order = torch.argsort(padded[b].byte(), stable=True)
            for i in range(queries):
                if padded is not None and bool(padded[b, i]):
                    padded_rows += 1
                    continue
                if not bool(visible[b, h, i].any()):
                    masked += 1
                    continue
                logits = s[b, h, i]
                if sinks is not None:
                    p = torch.softmax(torch.cat((logits, sinks[h : h + 1].double())), 0)[:-1]
                else:
                    p = torch.softmax(logits, 0)
                rows.append((b, i, logits, p, order))
                mass += p[order]
        sink = int(mass.argmax()) if rows else 0
        entropies, ratios, rests, reaches, peaks, allowed = [], [], [], [], [], []
        for b, i, logits, p, order in rows:
            entropy = float(-torch.xlogy(p, p).sum())
            n = int(visible[b, h, i].sum())
            entropies.append(entropy)
            if n > 1:
                ratios.append((entropy / math.log(n), entropy))
            rest = logits.clone()
            had = bool(visible[b, h, i, order[sink]])
            rest[order[sink]] = -INF
            if n - had >= 1:
                r = torch.softmax(rest, 0)
                rests.append(float(-torch.xlogy(r, r).sum()))
            reaches.append(float((p * (i + position - torch.arange(keys)).abs()).sum()))
            peaks.append(float(p.max()) > 0.95)
            allowed.append(logits[visible[b, h, i]])
        pairs = torch.cat(allowed) if allowed else torch.zeros(0)

        def mean(values: list[Any]) -> float | None:
            return sum(map(float, values)) / len(values) if values else None

        row = {
            "entropy": mean(entropies),
            "entropy_min": min((e for _, e in ratios), default=None),
            "entropy_ratio": mean([ratio for ratio, _ in ratios]),
            "entropy_rest": mean(rests),
            "sink_mass": float(mass[sink]) / len(rows) if rows else None,
            "sink_key": float(sink) if rows else None,
            "score_max": float(pairs.max()) if rows else None,
            "score_min": float(pairs.min()) if rows else None,
            "score_std": float(pairs.std(correction=0)) if rows else None,
            "reach": mean(reaches),
            "peaky_rows": mean(peaks),
            "rows": float(len(rows)),
            "rows_masked": float(masked),
            "rows_padded": float(padded_rows),
        }
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def agree(numbers: Numbers, expected: dict[str, list[float | None]], tolerance: float = 2e-5) -> None:
    for name, values in expected.items():
        got = numbers.per_head[name]
        assert len(got) == len(values), name
        for head, (mine, theirs) in enumerate(zip(got, values, strict=True)):
            if theirs is None or mine is None:
                assert mine is theirs, (name, head, mine, theirs)
            else:
                scale = 1 + abs(theirs) if name.startswith(("score", "dot", "reach")) else 1
                assert abs(mine - theirs) <= tolerance * scale, (name, head, mine, theirs)


def random_call(
    generator: torch.Generator,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    queries: int = 9,
    keys: int | None = None,
    width: int = 8,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> FusedCall:
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    q = torch.randn(batch, heads, queries, width, generator=generator) * strength
    k = torch.randn(batch, kv_heads, keys, width, generator=generator)
    v = torch.randn(batch, kv_heads, keys, width + 3, generator=generator)
    return FusedCall(q.to(dtype), k.to(dtype), v.to(dtype), options.pop("scale", width**-0.5), **options)


def check(
    call: FusedCall, padded: Tensor | None = None, position: int = 0, tolerance: float = 2e-5
) -> Numbers:
    numbers = fused_statistics(call)
    dots, s, visible = full_scores(call)
    expected = oracle(s, visible, padded, call.sinks_H, position)
    expected["dot_absmax"] = [float(value) for value in dots.abs().amax((0, 2, 3))]
    agree(numbers, expected, tolerance)
    return numbers


SIZES = [(1, 1), (5, 5), (64, 64), (65, 65), (131, 131), (7, 300), (300, 7), (1, 50), (70, 333)]
GROUPS = [(1, 1), (4, 4), (6, 2), (5, 1)]


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_a_bidirectional_call_agrees_with_the_oracle(
    generator: torch.Generator, queries: int, keys: int, heads: int, kv_heads: int
) -> None:
    call = random_call(generator, 2, heads, kv_heads, queries, keys, strength=3)
    numbers = check(call, position=keys - 1 if queries == 1 else 0)
    assert numbers.mask_kind == "none"


@pytest.mark.parametrize("size", [2, 5, 64, 65, 131, 333])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_causal_call_agrees_with_the_oracle(generator: torch.Generator, size: int, offset: int) -> None:
    call = random_call(generator, 2, 4, 2, size, strength=3, causal_offset=offset)
    numbers = check(call)
    if size > 2:
        assert numbers.mask_kind == "causal"
        assert numbers.causal_offset == offset


def eager_scores(call: FusedCall) -> tuple[Tensor, Tensor]:
    _, s, _ = full_scores(call)
    return s.float(), torch.softmax(s, -1).float()


@pytest.mark.parametrize("size", [1, 5, 64, 131])
@pytest.mark.parametrize("hiding", [-INF, -1e4, torch.finfo(torch.float32).min])
def test_eager_scores_agree_with_the_oracle(generator: torch.Generator, size: int, hiding: float) -> None:
    call = random_call(generator, 2, 3, 3, size, strength=3, causal_offset=0)
    _, s, visible = full_scores(call)
    expected = oracle(s, visible)
    scores = s.float().masked_fill(~visible, hiding)
    numbers = eager_statistics(scores, torch.softmax(scores, -1), visible_above=-9000)
    agree(numbers, expected)
    assert "dot_absmax" not in numbers.per_head
    kept = eager_statistics(scores, torch.softmax(scores, -1), visible_above=-9000, recompute=False)
    agree(kept, expected)


def mask_calls(size: int) -> dict[str, tuple[dict[str, Any], str, int | None, int | None, list[list[int]]]]:
    """Options → kind, window, causal offset and padded rows of two batch elements."""
    i, j = torch.arange(size)[:, None], torch.arange(size)
    left = torch.ones(2, 1, 1, size, dtype=torch.bool)
    left[1, ..., :3] = False
    right = torch.ones(2, 1, 1, size, dtype=torch.bool)
    right[0, ..., -2:] = False
    causal = (j <= i)[None, None]
    window = (j > i - 4)[None, None]
    floats = torch.zeros(2, 1, size, size).masked_fill(~(causal & left), torch.finfo(torch.float32).min)
    swin = torch.zeros(2, 1, size, size).masked_fill(((i // 4) != (j // 4))[None, None], -100.0)
    nobody: list[list[int]] = [[], []]
    first3, last2 = [[], [0, 1, 2]], [[size - 2, size - 1], []]
    return {
        "none": ({"mask": torch.ones(size, size, dtype=torch.bool)}, "none", None, None, nobody),
        "zeros": ({"mask": torch.zeros(2, 1, size, size)}, "none", None, None, nobody),
        "causal": ({"mask": causal}, "causal", None, 0, nobody),
        "strict": ({"mask": (j < i)[None, None]}, "causal", None, -1, nobody),
        "future": ({"mask": (j <= i + 1)[None, None]}, "causal", None, 1, nobody),
        "left": ({"mask": left}, "padding", None, None, first3),
        "right": ({"mask": right}, "padding", None, None, last2),
        "causal left": ({"mask": causal & left}, "causal + padding", None, 0, first3),
        "causal right": ({"mask": causal & right}, "causal + padding", None, 0, last2),
        "causal floats": ({"mask": floats}, "causal + padding", None, 0, first3),
        "window": ({"mask": causal & window}, "causal + sliding window", 4, 0, nobody),
        "window left": ({"mask": causal & window & left}, "causal + sliding window + padding", 4, 0, first3),
        "both ways": ({"mask": ((i - j).abs() <= 2)[None, None]}, "sliding window", 5, None, nobody),
        "documents": ({"mask": ((i // 4 == j // 4) & (j <= i))[None, None]}, "other", None, None, nobody),
        "prefix": ({"mask": ((j <= i) | (j < 3))[None, None]}, "other", None, None, nobody),
        "checkers": ({"mask": ((i + j) % 3 != 0)[None, None]}, "other", None, None, nobody),
        "swin": ({"mask": swin}, "other", None, None, nobody),
        "own window": ({"window": (3, 0), "causal_offset": 0}, "causal + sliding window", 4, 0, nobody),
        "own both ways": ({"window": (2, 2)}, "sliding window", 5, None, nobody),
        "flex": ({"visible": lambda b, h, q, kv: q >= kv}, "causal", None, 0, nobody),
        "flex heads": ({"visible": lambda b, h, q, kv: (q >= kv) | (h == 1)}, "other", None, None, nobody),
    }


@pytest.mark.parametrize("size", [12, 70])
@pytest.mark.parametrize("name", list(mask_calls(12)))
def test_a_mask_is_recognised_and_its_numbers_agree(generator: torch.Generator, size: int, name: str) -> None:
    options, kind, window, offset, rows = mask_calls(size)[name]
    call = random_call(generator, 2, 4, 2, size, strength=3, **options)
    padded = torch.zeros(2, size, dtype=torch.bool)
    for batch, positions in enumerate(rows):
        padded[batch, positions] = True
    numbers = check(call, padded)
    assert (numbers.mask_kind, numbers.window, numbers.causal_offset) == (kind, window, offset)
    assert not numbers.bias
