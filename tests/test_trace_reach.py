"""What is said to come nearest to the end of its dtype: a number that was computed, never a mask that was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nan_faults import Apply
from torch import Tensor

import attncli

LOW = torch.finfo(torch.float32).min
HIDDEN = torch.ones(6, 6, dtype=torch.bool).triu(1)


def headroom(function: Callable[..., Any], *args: Tensor, **tensors: Tensor) -> dict[str, dict[str, Any]]:
    report = attncli.check(Apply(function, **tensors), *args)
    assert report.origins == ()
    found: dict[str, dict[str, Any]] = (report.run or {})["headroom_bits"]
    return found


def x(largest: float = 8.0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.linspace(-1, 1, 36).reshape(6, 6)
    return (values * largest).to(dtype)


def filled(self: Any, x: Tensor) -> Tensor:
    return (x * 2).masked_fill(HIDDEN, LOW).softmax(-1)


def chosen(self: Any, x: Tensor) -> Tensor:
    return torch.where(HIDDEN, torch.finfo(x.dtype).min, x * 2).softmax(-1)


def added(self: Any, x: Tensor) -> Tensor:
    mask = torch.full((6, 6), LOW).triu(1)
    return (x * 2 + mask[None, None].expand(2, 3, 6, 6)).softmax(-1)


def written_into(self: Any, x: Tensor) -> Tensor:
    """Blocks of tokens that see one another are cut out of a mask that hides all."""
    mask = torch.full((6, 6), LOW)
    mask[:3, :3] = 0
    mask[3:, 3:] = 0
    return (x * 2 + mask[None]).softmax(-1)


def multiplied(self: Any, x: Tensor) -> Tensor:
    return (x * 2 + (1.0 - (~HIDDEN).float()) * LOW).softmax(-1)


def taken_away(self: Any, x: Tensor) -> Tensor:
    return (x * 2 - HIDDEN.float() * 1e9).softmax(-1)


def in_the_product(self: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(1, 6, 6).masked_fill(HIDDEN, -1e9)
    return torch.baddbmm(mask, x[None] * 2, torch.eye(6)[None]).softmax(-1)


@pytest.mark.parametrize(
    "function", [filled, chosen, added, written_into, multiplied, taken_away, in_the_product]
)
def test_a_mask_of_the_smallest_number_is_no_overflow_to_come(function: Callable[..., Tensor]) -> None:
    (found,) = headroom(function, x()).values()
    assert found["bits"] == pytest.approx(math.log2(-LOW / 16.0), abs=0.01)


@pytest.mark.parametrize("kind", ["buffer", "input"])
def test_a_mask_that_is_given_is_none_either(kind: str) -> None:
    mask = torch.zeros(6, 6).masked_fill(HIDDEN, LOW)
    if kind == "buffer":
        found = headroom(lambda self, x: (x * 2 + self.mask).softmax(-1), x(), mask=mask)
    else:
        found = headroom(lambda self, x, mask: (x * 2 + mask).softmax(-1), x(), mask)
    assert found["float32"]["bits"] == pytest.approx(math.log2(-LOW / 16.0), abs=0.01)


def test_a_mask_of_minus_ten_thousand_leaves_float16_its_room() -> None:
    found = headroom(
        lambda self, x: (x * 2 + torch.zeros_like(x).masked_fill(HIDDEN, -1e4)).softmax(-1),
        x(dtype=torch.float16),
    )
    assert found["float16"]["bits"] == pytest.approx(math.log2(65504 / 16), abs=0.01)


def test_a_negative_number_that_was_computed_counts() -> None:
    found = headroom(lambda self, x: (x * 1000).square() * -1.5, x(200.0))
    assert found["float32"]["op"] == "mul"
    assert found["float32"]["bits"] == pytest.approx(math.log2(-LOW / (1.5 * 200_000.0**2)), abs=0.01)


def test_a_number_of_the_code_that_computes_counts() -> None:
    found = headroom(lambda self, x: x * 50_000.0, x(1.0, torch.float16))
    assert found["float16"]["bits"] == pytest.approx(math.log2(65504 / 50_000), abs=0.01)


def test_scores_larger_than_the_mask_count() -> None:
    """Twenty thousand beside a mask of ten thousand is no mask any more."""
    found = headroom(
        lambda self, x: (x * 2 + torch.zeros_like(x).masked_fill(HIDDEN, -1e4)).softmax(-1),
        x(-1e4, torch.float16),
    )
    assert found["float16"]["bits"] == pytest.approx(math.log2(65504 / 2e4), abs=0.6)
    assert found["float16"]["bits"] < math.log2(65504 / 1e4)


def test_what_stands_beside_a_mask_counts() -> None:
    found = headroom(lambda self, x: (x * 2).masked_fill(HIDDEN, LOW) * 1.0, x(1e6))
    assert found["float32"]["bits"] == pytest.approx(math.log2(-LOW / 2e6), abs=0.01)


def test_a_weight_of_the_smallest_number_is_no_mask() -> None:
    """Whoever trained it there did not write it as a mask: the sum with it is near the end."""
    weight = torch.nn.Parameter(torch.full((6,), LOW / 2))
    found = headroom(lambda self, x: x + self.weight, x(), weight=weight)
    assert found["float32"]["bits"] == pytest.approx(1.0, abs=0.01)
