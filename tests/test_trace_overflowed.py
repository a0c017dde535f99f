"""Where q·k overflows, the report says so: infinities hide no keys, and masks are those that the code applied."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from traced import numbers, only

import attncli

B, H, T, D = 2, 4, 16, 8
HIDDEN = torch.ones(T, T, dtype=torch.bool).triu(1)
ADDED = torch.zeros(T, T, dtype=torch.float16).masked_fill(HIDDEN, torch.finfo(torch.float16).min)
PADDED = torch.zeros(B, 1, 1, T, dtype=torch.bool)
PADDED[0, ..., 12:] = True


def tensors(size: float = 150.0) -> tuple[Tensor, Tensor, Tensor]:
    """q and k so large that their dot products reach 3e5, either sign."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) * size for _ in range(3))
    return q.half(), k.half(), v.half()


def attention(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: change((q @ k.transpose(-1, -2)) / math.sqrt(D)).softmax(-1).to(v.dtype) @ v


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "none": (lambda s: s, "none"),
    "in float32": (lambda s: s.float(), "none"),
    "filled with -inf": (lambda s: s.masked_fill(HIDDEN, -math.inf), "causal"),
    "filled with the lowest number": (
        lambda s: s.masked_fill(HIDDEN, torch.finfo(torch.float16).min),
        "causal",
    ),
    "added": (lambda s: s + ADDED, "causal"),
    "where": (lambda s: torch.where(HIDDEN, -math.inf, s), "causal"),
    "padding too": (
        lambda s: s.masked_fill(HIDDEN, -math.inf).masked_fill(PADDED, -math.inf),
        "causal + padding",
    ),
    "in float32, filled": (lambda s: s.float().masked_fill(HIDDEN, -math.inf), "causal"),
}


@pytest.mark.parametrize("name", MASKS)
def test_scores_that_overflow_are_said_to_and_the_mask_is_what_it_is(name: str) -> None:
    change, kind = MASKS[name]
    report = attncli.measure(attention(change), *tensors())
    call = only(report)
    assert call.mask_kind == kind
    assert call.scale == pytest.approx(1 / math.sqrt(D), rel=1e-3)
    assert numbers(report, "rows_masked") == [0] * H
    found = {finding.name for finding in report.findings}
    assert found == {"product-overflows", "large-scores"}


def test_a_mask_that_cannot_be_read_is_said_not_to_be() -> None:
    def sorted_scores(s: Tensor) -> Tensor:
        return s.sort(-1).values

    call = only(attncli.measure(attention(sorted_scores), *tensors()))
    assert call.mask_kind is None


def test_without_overflow_the_lowest_scores_are_no_mask_either() -> None:
    call = only(attncli.measure(attention(lambda s: s), *tensors(40.0)))
    assert (call.mask_kind, call.scores_dtype) == ("none", "float16")


def test_rows_that_overflow_downwards_as_a_whole_are_not_uniform() -> None:
    """The model's softmax of them is NaN, and so is what is said of it."""
    q = torch.full((B, H, T, D), 200.0).half()
    report = attncli.measure(attention(lambda s: s), q, -q, tensors()[2])
    assert only(report).mask_kind == "none"
    assert all(value is None or math.isnan(value) for value in numbers(report, "entropy"))
    assert [finding.name for finding in report.findings] == ["product-overflows"]


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda s: s.softmax(-1), "float16"),
        (lambda s: s.float().softmax(-1), "float32"),
        (lambda s: s.softmax(-1, dtype=torch.float32), "float32"),
    ],
)
def test_a_product_near_the_limit_is_told_with_the_dtype_of_its_softmax(
    change: Callable[[Tensor], Tensor], dtype: str
) -> None:
    q = torch.full((B, H, T, D), 80.0).half()
    report = attncli.measure(lambda q, k, v: change(q @ k.mT).half() @ v, q, q * 1.0, tensors()[2])
    near = next(finding for finding in report.findings if finding.name == "scores-near-overflow")
    assert near.evidence["softmax_dtype"] == dtype
    assert ("the cast to float32 behind it comes too late" in near.message) == (dtype == "float32")
    shown = [row.value for row in report.measurements if row.metric == "softmax_dtype"]
    assert shown == ([] if dtype == "float16" else [dtype])
    assert "scores-near-overflow" in str(report)
