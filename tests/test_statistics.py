"""What is measured on one attention call: closed forms first, then a slow obvious oracle, then hostile values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attncli.trace import statistics, tiles
from attncli.trace.statistics import (
    FusedCall,
    Numbers,
    dot_extremes,
    eager_statistics,
    fused_difference,
    fused_statistics,
    row_sums,
)

INF = math.inf


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's own threads wait busily: on a shared core the oracle's small products would take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- the oracle: the whole matrix, in float64 --------------------------------------------------------


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
    """Per head, from the whole matrix. `padded`: (B, T). Sink keys count from the first that is no padding."""
    batch, heads, queries, keys = s.shape
    if padded is None:
        padded = torch.zeros(batch, queries, dtype=torch.bool)
    orders = [torch.arange(keys)] * batch
    if padded.size(1) == keys:
        orders = [torch.argsort(row.byte(), stable=True) for row in padded]
    found: dict[str, list[float | None]] = {}
    for h in range(heads):
        # Rows of all batch elements below each other, columns in the order of their keys.
        logits = torch.cat([s[b, h][:, orders[b]] for b in range(batch)])
        shown = torch.cat([visible[b, h][:, orders[b]] for b in range(batch)])
        distance = torch.cat(
            [(torch.arange(queries)[:, None] + position - orders[b]).abs() for b in range(batch)]
        )
        real = ~padded.flatten()
        counted = real & shown.any(-1)
        logits, shown, distance = logits[counted], shown[counted], distance[counted]
        n = shown.sum(-1)
        extra = logits[:, :0] if sinks is None else sinks[h].double().expand(len(logits), 1)
        p = torch.softmax(torch.cat((logits, extra), -1), -1)[:, :keys]
        mass = p.mean(0) if len(p) else torch.zeros(keys)
        sink = int(mass.argmax()) if keys else 0
        entropy = -torch.xlogy(p, p).sum(-1)
        rest = logits.clone()
        rest[:, sink] = -INF
        rest = torch.softmax(rest[n - shown[:, sink].long() > 0], -1)
        rest_entropy = -torch.xlogy(rest, rest).sum(-1)
        pairs, several = logits[shown], n > 1

        def value(numbers: Tensor, how: Callable[[Tensor], Tensor] = torch.mean) -> float | None:
            return float(how(numbers.double())) if numbers.numel() else None

        row = {
            "entropy": value(entropy),
            "entropy_min": value(entropy[several], torch.min),
            "entropy_ratio": value(entropy[several] / n[several].double().log()),
            "entropy_rest": value(rest_entropy),
            "sink_mass": float(mass[sink]) if len(p) else None,
            "sink_key": float(sink) if len(p) else None,
            "score_max": value(pairs, torch.max),
            "score_min": value(pairs, torch.min),
            "score_std": value(pairs, lambda x: x.std(correction=0)),
            "reach": value((p * distance).sum(-1)),
            "peaky_rows": value(p.amax(-1) > 0.95),
            "rows": float(len(p)),
            "rows_masked": float((real & ~counted).sum()),
            "rows_padded": float((~real).sum()),
        }
        for name, number in row.items():
            found.setdefault(name, []).append(number)
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
        "lopsided": ({"window": (5, 3)}, "sliding window", 9, None, nobody),
        "narrower": ({"window": (3, 5), "causal_offset": 0}, "causal + sliding window", 4, 0, nobody),
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


# --- closed forms -------------------------------------------------------------------------------------


def zeros_call(size: int, heads: int = 2, **options: Any) -> FusedCall:
    q = torch.zeros(1, heads, size, 4)
    return FusedCall(q, torch.randn(1, heads, size, 4), torch.randn(1, heads, size, 4), 0.5, **options)


def one(numbers: Numbers, metric: str, head: int = 0) -> float:
    value = numbers.per_head[metric][head]
    assert value is not None
    return value


@pytest.mark.parametrize("size", [2, 50, 300])
def test_uniform_attention_has_entropy_log_n(size: int) -> None:
    numbers = fused_statistics(zeros_call(size))
    assert one(numbers, "entropy") == pytest.approx(math.log(size), abs=1e-6)
    assert one(numbers, "entropy_min") == pytest.approx(math.log(size), abs=1e-6)
    assert one(numbers, "entropy_ratio") == pytest.approx(1, abs=1e-6)
    assert one(numbers, "entropy_rest") == pytest.approx(math.log(size - 1), abs=1e-6)
    assert one(numbers, "sink_mass") == pytest.approx(1 / size, abs=1e-6)
    assert one(numbers, "reach") == pytest.approx((size**2 - 1) / (3 * size), rel=1e-5)
    assert (one(numbers, "score_max"), one(numbers, "score_std"), one(numbers, "dot_absmax")) == (0, 0, 0)


def test_uniform_causal_attention_has_the_mean_of_log_i() -> None:
    size = 300
    numbers = fused_statistics(zeros_call(size, causal_offset=0))
    assert one(numbers, "entropy") == pytest.approx(math.lgamma(size + 1) / size, abs=1e-6)
    assert one(numbers, "entropy_ratio") == pytest.approx(1, abs=1e-6)
    assert one(numbers, "entropy_min") == pytest.approx(math.log(2), abs=1e-6)
    assert one(numbers, "sink_mass") == pytest.approx(sum(1 / i for i in range(1, size + 1)) / size, rel=1e-5)
    assert one(numbers, "sink_key") == 0
    assert one(numbers, "reach") == pytest.approx((size - 1) / 4, rel=1e-5)


@pytest.mark.parametrize("strength", [1e2, 1e4, 1e6])
def test_one_hot_attention_has_entropy_0(strength: float) -> None:
    size = 70
    q = torch.eye(size)[None, None] * strength
    numbers = fused_statistics(FusedCall(q, torch.eye(size)[None, None], None, 1.0))
    assert one(numbers, "entropy") == pytest.approx(0, abs=1e-6)
    assert one(numbers, "peaky_rows") == 1
    assert one(numbers, "reach") == pytest.approx(0, abs=1e-5)
    assert one(numbers, "score_max") == one(numbers, "dot_absmax") == strength


def test_two_equal_keys_share_a_row() -> None:
    k = torch.zeros(1, 1, 5, 2)
    k[..., 1:3, 0] = 200.0
    numbers = fused_statistics(FusedCall(torch.ones(1, 1, 3, 2), k, None, 1.0))
    assert one(numbers, "entropy") == pytest.approx(math.log(2), abs=1e-6)
    assert one(numbers, "entropy_rest") == pytest.approx(0, abs=1e-6)
    assert one(numbers, "sink_mass") == pytest.approx(0.5, abs=1e-6)
    assert one(numbers, "sink_key") in (1, 2)


def test_rows_with_one_key_count_in_entropy_only() -> None:
    size = 5
    numbers = fused_statistics(zeros_call(size, mask=torch.eye(size, dtype=torch.bool)))
    assert one(numbers, "entropy") == 0
    assert numbers.per_head["entropy_ratio"] == numbers.per_head["entropy_min"] == (None, None)
    assert one(numbers, "rows") == size


def test_masked_rows_are_counted_and_left_out() -> None:
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[2] = mask[4] = False
    call = FusedCall(torch.zeros(1, 1, 6, 4), torch.randn(1, 1, 8, 4), None, 0.5, mask=mask)
    numbers = fused_statistics(call)
    assert (one(numbers, "rows"), one(numbers, "rows_masked"), one(numbers, "rows_padded")) == (4, 2, 0)
    assert one(numbers, "entropy") == pytest.approx(math.log(8), abs=1e-6)


def test_a_row_of_the_lowest_number_is_masked_and_not_uniform() -> None:
    mask = torch.zeros(1, 1, 6, 8)
    mask[:, :, 2] = torch.finfo(torch.float32).min
    call = FusedCall(torch.randn(1, 1, 6, 4), torch.randn(1, 1, 8, 4), None, 0.5, mask=mask)
    assert one(fused_statistics(call), "rows_masked") == 1


def test_a_call_without_any_visible_key_has_no_numbers() -> None:
    numbers = fused_statistics(zeros_call(4, mask=torch.zeros(4, 4, dtype=torch.bool)))
    assert numbers.per_head["entropy"] == numbers.per_head["score_max"] == (None, None)
    assert numbers.per_head["dot_absmax"] == (0, 0)


@pytest.mark.parametrize("logit", [0.0, 3.0, 40.0])
def test_a_learned_sink_takes_probability_and_is_no_key(logit: float) -> None:
    size = 10
    numbers = fused_statistics(zeros_call(size, heads=1, sinks_H=torch.tensor([logit])))
    p = 1 / (size + math.exp(logit))
    assert one(numbers, "entropy") == pytest.approx(-size * p * math.log(p), rel=1e-5)
    assert one(numbers, "sink_mass") == pytest.approx(p, rel=1e-5)
    assert one(numbers, "entropy_rest") == pytest.approx(math.log(size - 1), abs=1e-5)


@pytest.mark.parametrize("gap", [14.0, 30.0, 60.0, 95.0, 200.0])
@pytest.mark.parametrize("causal", [None, 0])
def test_the_rest_is_exact_behind_a_sink_that_takes_almost_everything(gap: float, causal: int | None) -> None:
    """At a gap of 14 the sink takes 0.9999 of a row, at 30 all that float32 can tell."""
    size = 90
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(1, 1, size, 4, generator=generator)
    k[..., 3] = 0
    k[:, :, 5, 3] = gap
    q = torch.randn(1, 1, size, 4, generator=generator)
    q[..., 3] = 1
    call = FusedCall(q, k, None, 1.0, causal_offset=causal)
    assert one(check(call), "sink_key") == 5
    _, s, _ = full_scores(call)
    scores = s.float()
    agree(eager_statistics(scores, torch.softmax(scores, -1), visible_above=-9000), oracle(s, s > -INF))


def test_the_rest_is_exact_where_the_sink_was_guessed_wrong() -> None:
    """The guess sees every second row; here those look elsewhere, and less sharply, than the others."""
    size = 128
    q = torch.zeros(1, 1, size, 3)
    q[:, :, 0::2, 0], q[:, :, 1::2, 1] = 2.0, 40.0
    q[..., 2] = torch.randn(size, generator=torch.Generator().manual_seed(0))
    k = torch.zeros(1, 1, size, 3)
    k[:, :, 7, 0], k[:, :, 9, 1] = 3.0, 1.0
    k[..., 2] = torch.randn(size, generator=torch.Generator().manual_seed(1))
    numbers = check(FusedCall(q, k, None, 1.0))
    assert one(numbers, "sink_key") == 9
    _, s, visible = full_scores(FusedCall(q, k, None, 1.0))
    eager = eager_statistics(s.float(), torch.softmax(s, -1).float(), visible_above=-9000)
    agree(eager, oracle(s, visible))


# --- agreement ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [3.0, 100.0, 1e4])
@pytest.mark.parametrize("options", [{}, {"causal_offset": 0}, {"window": (5, 3)}])
def test_large_scores_lose_no_digits(
    generator: torch.Generator, strength: float, options: dict[str, Any]
) -> None:
    call = random_call(generator, 1, 2, 2, 70, width=16, strength=strength, dtype=torch.float64, **options)
    check(call, tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_agrees_with_float64_of_the_same_numbers(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    check(random_call(generator, 2, 4, 2, 70, strength=3, dtype=dtype, causal_offset=0))


@pytest.mark.parametrize("cap", [0.5, 5.0, 50.0])
def test_a_soft_cap_bounds_scores_and_counts_what_it_cut(generator: torch.Generator, cap: float) -> None:
    call = random_call(generator, 2, 2, 1, 70, strength=8, soft_cap=cap, causal_offset=0)
    numbers = check(call)
    dots, _, visible = full_scores(call)
    over = ((dots * call.scale).abs() > cap) & visible
    shares = over.sum((0, 2, 3)) / visible.sum((0, 2, 3))
    assert numbers.saturated == pytest.approx(shares.tolist(), abs=1e-6)


@pytest.mark.parametrize("queries", [1, 40, 70])
def test_a_finite_bias_is_added_and_named(generator: torch.Generator, queries: int) -> None:
    bias = torch.randn(1, 4, queries, 70, generator=generator) * 3
    call = random_call(generator, 2, 4, 2, queries, 70, mask=bias)
    numbers = check(call, position=69 if queries == 1 else 0)
    assert numbers.bias
    assert numbers.mask_kind == "none"


def test_a_bias_that_masks_as_well_is_both(generator: torch.Generator) -> None:
    i, j = torch.arange(70)[:, None], torch.arange(70)
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    alibi = (slopes * (j - i))[None].masked_fill(j > i, -1e9)
    numbers = check(random_call(generator, 2, 2, 2, 70, mask=alibi))
    assert numbers.bias
    assert numbers.mask_kind == "causal"


def test_padding_with_a_bias_agrees(generator: torch.Generator) -> None:
    bias = torch.randn(2, 2, 40, 40, generator=generator)
    bias[1, :, :, :6] = -INF
    padded = torch.zeros(2, 40, dtype=torch.bool)
    padded[1, :6] = True
    call = random_call(generator, 2, 2, 2, 40, mask=bias)
    assert check(call, padded).mask_kind == "padding"


def test_padding_on_the_left_keeps_the_sink_of_eager_scores(generator: torch.Generator) -> None:
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., :6] = False
    call = random_call(generator, 2, 2, 2, 40, strength=3, mask=mask, causal_offset=0)
    call.k_BKSD[0, :, 0] = call.k_BKSD[1, :, 6] = call.q_BHTD.mean((0, 1, 2)) * 5
    padded = ~mask[:, 0, 0]
    _, s, visible = full_scores(call)
    expected = oracle(s, visible, padded)
    assert expected["sink_key"] == [0, 0]
    for recompute in (True, False):
        probs = torch.softmax(s, -1).nan_to_num().float()
        agree(eager_statistics(s.float(), probs, visible_above=-9000, recompute=recompute), expected)
    check(call, padded)


def test_a_score_function_and_a_mask_function_of_flex_attention(generator: torch.Generator) -> None:
    def soft_and_far(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.where(q - kv < 30, 5 * torch.tanh(s / 5) - 0.1 * (q - kv).abs() * (h + 1), -INF)

    call = random_call(
        generator, 2, 3, 1, 70, strength=5, bias=soft_and_far, visible=lambda b, h, q, kv: q >= kv
    )
    numbers = check(call)
    assert numbers.bias
    assert (numbers.mask_kind, numbers.window) == ("causal + sliding window", 30)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 1e-25])
def test_any_scale_leaves_the_dot_product_as_it_is(generator: torch.Generator, scale: float) -> None:
    check(random_call(generator, 1, 2, 2, 40, scale=scale, causal_offset=0))


@pytest.mark.parametrize("past", [0, 30, 300])
def test_decoding_with_a_cache_counts_places_from_the_first_key(
    generator: torch.Generator, past: int
) -> None:
    queries = 9
    call = random_call(generator, 1, 2, 2, queries, queries + past, causal_offset=past)
    numbers = check(call, position=past)
    assert (numbers.mask_kind, numbers.causal_offset) == ("causal", 0)


def test_a_square_causal_mask_on_a_longer_cache_is_off_by_the_difference(generator: torch.Generator) -> None:
    numbers = check(random_call(generator, 1, 2, 2, 9, 20, causal_offset=0))
    assert (numbers.mask_kind, numbers.causal_offset) == ("causal", -11)


def test_eager_heads_may_see_different_keys(generator: torch.Generator) -> None:
    call = random_call(generator, 2, 3, 3, 70, visible=lambda b, h, q, kv: (q >= kv) | (h == 2))
    _, s, visible = full_scores(call)
    numbers = eager_statistics(s.float(), torch.softmax(s, -1).float(), visible_above=-9000)
    agree(numbers, oracle(s, visible))
    assert numbers.mask_kind == "other"


def test_a_key_that_only_the_first_head_cannot_see_is_no_padding(generator: torch.Generator) -> None:
    call = random_call(generator, 1, 3, 3, 40, visible=lambda b, h, q, kv: (kv < 30) | (h > 0))
    _, s, visible = full_scores(call)
    numbers = eager_statistics(s.float(), torch.softmax(s, -1).float(), visible_above=-9000)
    agree(numbers, oracle(s, visible))
    agree(fused_statistics(call), oracle(s, visible))
    assert numbers.mask_kind == "other"


@pytest.mark.parametrize("hiding", [-INF, -1e4, torch.finfo(torch.float32).min])
def test_the_smallest_score_is_no_hidden_one(hiding: float) -> None:
    scores = torch.tensor([[3.0, hiding, hiding], [4.0, 5.0, hiding], [10.0, 20.0, 30.0]])[None, None]
    numbers = eager_statistics(scores, scores, visible_above=-9000)
    assert (one(numbers, "score_min"), one(numbers, "score_max")) == (3, 30)
    call = FusedCall(torch.ones(1, 1, 3, 1), torch.tensor([3.0, 4, 5])[None, None, :, None], None, 1.0)
    floats = torch.zeros(3, 3).masked_fill(scores[0, 0] == hiding, hiding)
    for options in ({"mask": floats}, {"causal_offset": 0}):
        assert one(fused_statistics(dataclasses.replace(call, **options)), "score_min") == 3


def test_eager_scores_may_lie_in_any_order(generator: torch.Generator) -> None:
    _, s, visible = full_scores(random_call(generator, 2, 3, 3, 40))
    turned = s.float().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    agree(eager_statistics(turned, turned, visible_above=-9000), oracle(s, visible))


def test_probabilities_that_are_no_softmax_are_taken_as_they_are() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.0, 0.125], [0.1, 0.0, 0.0, 0.0]])[None, None]
    scores = torch.randn(1, 1, 2, 4)
    numbers = eager_statistics(scores, probs, visible_above=-9000, recompute=False)
    expected = -torch.xlogy(probs, probs).sum(-1)
    assert one(numbers, "entropy") == pytest.approx(float(expected.mean()), abs=1e-6)
    assert one(numbers, "sink_mass") == pytest.approx(0.3, abs=1e-6)
    rest = -sum(p * math.log(p) for p in (2 / 3, 1 / 3))
    # The second row has nothing but its sink, so only the first has a rest.
    assert one(numbers, "entropy_rest") == pytest.approx(rest, abs=1e-6)
    assert one(numbers, "score_max") == pytest.approx(float(scores.max()))


@pytest.mark.parametrize("causal", [None, 0])
def test_long_calls_sample_what_costs_most_and_say_so(generator: torch.Generator, causal: int | None) -> None:
    call = random_call(generator, 1, 1, 1, 4096, strength=3, causal_offset=causal)
    numbers = fused_statistics(call)
    assert set(numbers.precision) == {"score_std", "reach"}
    dots, s, visible = full_scores(call)
    expected = oracle(s, visible)
    sampled = {name: expected.pop(name) for name in numbers.precision}
    expected["dot_absmax"] = [float(dots.abs().max())]
    agree(numbers, expected)
    for name, values in sampled.items():
        assert numbers.per_head[name] == pytest.approx(values, rel=0.03), name


# --- invariances --------------------------------------------------------------------------------------


def test_a_constant_added_to_a_row_changes_scores_only(generator: torch.Generator) -> None:
    call = random_call(generator, 1, 2, 2, 70, strength=3)
    shifted = FusedCall(call.q_BHTD, call.k_BKSD, None, call.scale, mask=torch.full((1, 1, 70, 1), 500.0))
    before, after = fused_statistics(call).per_head, fused_statistics(shifted).per_head
    for metric in ("entropy", "entropy_min", "entropy_rest", "sink_mass", "score_std", "reach", "dot_absmax"):
        assert after[metric] == pytest.approx(before[metric], rel=2e-4), metric
    assert after["score_max"] == pytest.approx([500 + float(x or 0) for x in before["score_max"]], abs=1e-3)


def test_the_order_of_keys_changes_places_only(generator: torch.Generator) -> None:
    call = random_call(generator, 1, 2, 2, 70, strength=3)
    order = torch.randperm(70, generator=generator)
    turned = FusedCall(call.q_BHTD, call.k_BKSD[:, :, order], None, call.scale)
    before, after = fused_statistics(call).per_head, fused_statistics(turned).per_head
    for metric in set(before) - {"sink_key", "reach"}:
        assert after[metric] == pytest.approx(before[metric], abs=1e-5), metric
    assert order[[int(key or 0) for key in after["sink_key"]]].tolist() == list(before["sink_key"])


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_threads_and_tiles_change_nothing(
    generator: torch.Generator, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = random_call(generator, 2, heads, heads, 333, causal_offset=0)
    expected = fused_statistics(call).per_head
    monkeypatch.setattr(tiles, "CPU_ELEMENTS", 1 << 12)
    monkeypatch.setattr(statistics, "WORTH_THREADS", 0)
    torch.set_num_threads(3)
    found = fused_statistics(call).per_head
    assert torch.get_num_threads() == 3
    for metric, values in expected.items():
        assert found[metric] == pytest.approx(values, abs=1e-5), metric


def test_grad_autocast_inference_and_fast_products_change_nothing(generator: torch.Generator) -> None:
    call = random_call(generator, 1, 4, 4, 300, width=64)
    expected = fused_statistics(call).per_head["entropy"]
    one_max = max(float(value or 0) for value in fused_statistics(call).per_head["dot_absmax"])
    call.q_BHTD.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_statistics(call).per_head["entropy"] == expected
        assert dot_extremes(call.q_BHTD[0], call.k_BKSD[0].mT).max() == pytest.approx(one_max, rel=1e-6)
    with torch.inference_mode():
        assert fused_statistics(call).per_head["entropy"] == expected
    torch.set_float32_matmul_precision("medium")
    try:
        assert fused_statistics(call).per_head["entropy"] == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_was_set_is_put_back_after_an_error(generator: torch.Generator) -> None:
    def broken(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        raise ValueError("no mask today")

    torch.set_num_threads(2)
    with torch.enable_grad(), pytest.raises(ValueError, match="no mask today"):
        fused_statistics(random_call(generator, visible=broken))
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.is_grad_enabled()


# --- the check against what the kernel gave -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["plain", "causal", "mask", "bias", "padding"])
def test_the_difference_to_what_sdpa_gave_is_rounding(
    generator: torch.Generator, how: str, dtype: torch.dtype
) -> None:
    size = 70
    key_mask = torch.ones(2, 1, 1, size, dtype=torch.bool)
    key_mask[1, ..., :9] = False
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal_offset": 0},
        "mask": {"mask": torch.rand(size, size, generator=generator) > 0.3},
        "bias": {"mask": torch.randn(1, 4, size, size, generator=generator).to(dtype)},
        "padding": {"mask": key_mask},
    }
    call = random_call(generator, 2, 4, 2, size, strength=3, dtype=dtype, **options[how])
    assert call.v_BKSV is not None
    k, v = (x.repeat_interleave(2, 1) for x in (call.k_BKSD, call.v_BKSV))
    out = torch.nn.functional.scaled_dot_product_attention(
        call.q_BHTD, k, v, attn_mask=call.mask, is_causal=how == "causal", scale=call.scale
    )
    limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert fused_difference(call, out) < limit
    assert fused_difference(call, out.roll(1, 2)) > 0.1
    out[1, 3, size - 1, 0] += 10
    assert fused_difference(call, out) > 0.1


@pytest.mark.parametrize("size", [1, 7, 8, 13, 64, 70, 300])
def test_the_difference_sees_the_first_and_the_last_row(generator: torch.Generator, size: int) -> None:
    call = random_call(generator, 1, 3, 3, size)
    assert call.v_BKSV is not None
    out = torch.nn.functional.scaled_dot_product_attention(call.q_BHTD, call.k_BKSD, call.v_BKSV)
    for row in (0, size - 1):
        changed = out.clone()
        changed[:, :, row] += 1
        assert fused_difference(call, out) < 1e-5 < 0.1 < fused_difference(call, changed)


def test_the_difference_takes_nan_for_nan(generator: torch.Generator) -> None:
    call = random_call(generator, 1, 2, 2, 20)
    call.q_BHTD[0, 1, 0] = math.nan
    assert call.v_BKSV is not None
    out = torch.nn.functional.scaled_dot_product_attention(call.q_BHTD, call.k_BKSD, call.v_BKSV)
    assert fused_difference(call, out) < 1e-5
    out[0, 1, 0] = 0.0
    assert math.isnan(fused_difference(call, out)) or fused_difference(call, out) > 0.1


# --- hostile values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("causal", [None, 0])
def test_a_head_with_a_non_finite_score_has_no_finite_entropy(
    generator: torch.Generator, bad: float, side: str, causal: int | None
) -> None:
    call = random_call(generator, 2, 3, 3, 70, causal_offset=causal)
    (call.q_BHTD if side == "query" else call.k_BKSD)[0, 1, 3, 2] = bad
    clean = fused_statistics(random_call(torch.Generator().manual_seed(0), 2, 3, 3, 70, causal_offset=causal))
    numbers = fused_statistics(call)
    for metric in (
        "entropy",
        "entropy_ratio",
        "entropy_rest",
        "sink_mass",
        "score_std",
        "reach",
        "peaky_rows",
    ):
        values = numbers.per_head[metric]
        assert math.isnan(float(values[1] or 0)), metric
        assert values[0] == pytest.approx(clean.per_head[metric][0], abs=1e-5)
        assert values[2] == pytest.approx(clean.per_head[metric][2], abs=1e-5)
    assert not math.isfinite(one(numbers, "dot_absmax", 1))
    assert not math.isfinite(one(numbers, "score_max", 1))


def test_a_nan_behind_the_mask_hurts_the_dot_product_only(generator: torch.Generator) -> None:
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    mask[..., -4:] = False
    call = random_call(generator, 1, 2, 2, 40, mask=mask)
    expected = fused_statistics(call).per_head
    call.k_BKSD[:, :, -2] = math.nan
    numbers = fused_statistics(FusedCall(call.q_BHTD, call.k_BKSD, None, call.scale, mask=mask))
    assert numbers.per_head["entropy"] == pytest.approx(expected["entropy"], abs=1e-6)
    assert math.isnan(one(numbers, "dot_absmax"))


def test_products_beyond_float32_are_told_as_they_are(generator: torch.Generator) -> None:
    call = random_call(generator, 1, 2, 2, 40, strength=1e25)
    call = FusedCall(call.q_BHTD, call.k_BKSD * 1e20, None, 1e-44)
    numbers = check(call, tolerance=1e-6)
    assert one(numbers, "dot_absmax") > 1e44
    large = dataclasses.replace(call, scale=1e-10, causal_offset=0)
    assert check(large, tolerance=1e-6).per_head["score_max"][0] > 1e34


@pytest.mark.parametrize("shape", [(1, 0, 0), (1, 0, 5), (1, 5, 0), (0, 5, 5)])
def test_empty_sizes_give_no_numbers(shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    call = FusedCall(
        torch.zeros(batch, 4, queries, 8), torch.zeros(batch, 2, keys, 8), torch.zeros(batch, 2, keys, 8), 1.0
    )
    assert fused_statistics(call).per_head["entropy"] == (None,) * 4
    assert fused_difference(call, torch.zeros(batch, 4, queries, 8)) == 0
    scores = torch.zeros(batch, 4, queries, keys)
    assert eager_statistics(scores, scores, visible_above=-9000).per_head["entropy"] == (None,) * 4
    assert dot_extremes(torch.zeros(batch, queries, 8), torch.zeros(batch, 8, keys)).shape == (batch, queries)
    assert all(map(math.isnan, row_sums(scores)))


# --- the small ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dot_extremes_are_those_of_the_whole_product(generator: torch.Generator, dtype: torch.dtype) -> None:
    q = torch.randn(5, 33, 8, generator=generator).to(dtype)
    k = torch.randn(5, 70, 8, generator=generator).to(dtype).transpose(1, 2)
    expected = (q.double() @ k.double()).abs().amax(-1)
    assert torch.allclose(dot_extremes(q, k).double(), expected, rtol=1e-5)


def test_dot_extremes_beyond_float32_are_told_as_they_are() -> None:
    assert float(dot_extremes(torch.full((1, 1, 1), 1e30), torch.full((1, 1, 1), -1e30))) == pytest.approx(
        1e60
    )


def test_row_sums_leave_out_rows_of_zeros() -> None:
    weights = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.25, 0.5], [1.0, 0.5]])[None, None]
    assert row_sums(weights) == (0.75, 1.5)
    assert row_sums(weights.half()) == (0.75, 1.5)
    assert all(map(math.isnan, row_sums(torch.zeros(1, 1, 2, 2))))
    weights[0, 0, 0, 0] = math.nan
    assert math.isnan(row_sums(weights)[0])


# --- memory -------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest storage that any operator made, but for views of `ignored`."""

    def __init__(self, ignored: Tensor | None = None) -> None:
        super().__init__()
        self.numel = 0
        self.ignored = None if ignored is None else ignored.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.ignored:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("how", ["plain", "causal", "flex", "eager"])
def test_no_tensor_is_as_large_as_the_scores(
    generator: torch.Generator, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1500
    options: dict[str, Any] = {
        "causal": {"causal_offset": 0},
        "flex": {"visible": lambda b, h, q, kv: (q + kv) % 3 > 0},
    }.get(how, {})
    call = random_call(generator, 1, 2, 1, size, **options)
    monkeypatch.setattr(statistics, "WORTH_THREADS", INF)  # a mode sees one thread only
    if how == "eager":
        _, scores, _ = full_scores(call)
        with Largest(ignored=scores) as largest:
            eager_statistics(scores, scores, visible_above=-9000)
    else:
        with Largest() as largest:
            fused_statistics(call)
            fused_difference(call, torch.zeros(1, 2, size, 11))
    assert size * 32 <= largest.numel <= size * size // 4
