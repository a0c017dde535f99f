"""Masks that hide nothing are found by name; biases of zeros and ones, and masks that do hide, are not."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name
from torch import Tensor
from traced import only

import attncli

B, H, T, D = 2, 4, 12, 8
CAUSAL = torch.ones(T, T).tril()
HIDDEN = CAUSAL == 0
PADDING = torch.ones(B, 1, 1, T)
PADDING[0, ..., 9:] = 0
WINDOW = CAUSAL.triu(-3)
BAND = torch.ones(T, T).triu(-2).tril(2)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) for _ in range(3))
    return q, k, v


def with_scores(change: Callable[[Tensor], Tensor]) -> Attention:
    """Attention by hand whose scores are changed before the softmax."""
    return lambda q, k, v: change(q @ k.transpose(-1, -2) / math.sqrt(D)).softmax(-1) @ v


def fused(mask: Tensor) -> Attention:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


BROKEN: dict[str, tuple[Attention, str, str]] = {
    "a causal float mask": (fused(CAUSAL), "0/1 bias (causal)", "error"),
    "a float mask of what is hidden": (fused(1 - CAUSAL), "0/1 bias (future only)", "error"),
    "a window as a float mask": (fused(WINDOW), "0/1 bias (causal)", "error"),
    "padding as a float mask": (fused(PADDING), "0/1 bias (padding)", "warning"),
    "causal and padded": (fused(CAUSAL * PADDING), "0/1 bias (causal)", "error"),
    "added by hand": (with_scores(lambda s: s + CAUSAL), "0/1 bias (causal)", "error"),
    "added as integers": (with_scores(lambda s: s + CAUSAL.long()), "0/1 bias (causal)", "error"),
    "filled with 0": (with_scores(lambda s: s.masked_fill(HIDDEN, 0)), "zero fill (causal)", "error"),
    "filled with 0 in place": (
        with_scores(lambda s: s.masked_fill_(HIDDEN, 0)),
        "zero fill (causal)",
        "error",
    ),
    "0 where hidden": (with_scores(lambda s: torch.where(HIDDEN, 0, s)), "zero fill (causal)", "error"),
    "padding filled with 0": (
        with_scores(lambda s: s.masked_fill(PADDING == 0, 0)),
        "zero fill (padding)",
        "error",
    ),
    "a band, the rest filled with 0": (
        with_scores(lambda s: s.masked_fill(BAND == 0, 0)),
        "zero fill (sliding window)",
        "error",
    ),
    "multiplied by the mask": (with_scores(lambda s: s * CAUSAL), "zero fill (causal)", "error"),
    "tril of the scores": (with_scores(torch.tril), "zero fill (causal)", "error"),
    "padding hidden, the future not": (
        with_scores(lambda s: s.masked_fill(HIDDEN, 0).masked_fill(PADDING == 0, -math.inf)),
        "padding + zero fill (causal)",
        "error",
    ),
}
BLOCKS = torch.block_diag(*(torch.ones(4, 4),) * 3)
ONE_KEY = torch.zeros(T).index_fill(0, torch.tensor([0]), 1.0)
ROWS = torch.zeros(T, 1).index_fill(0, torch.tensor([2, 5]), 1.0)
HEALTHY: dict[str, tuple[Attention, str]] = {
    "a bool mask": (fused(CAUSAL.bool()), "causal"),
    "a mask of -inf": (fused(torch.zeros(T, T).masked_fill(HIDDEN, -math.inf)), "causal"),
    "a bias for the same segment": (fused(BLOCKS), "bias"),
    "a bias for one key": (fused(ONE_KEY.expand(T, T)), "bias"),
    "a bias for neighbours": (fused(BAND), "bias"),
    "a bias of a half": (fused(CAUSAL / 2), "bias"),
    "three values": (fused(CAUSAL + CAUSAL.tril(-3)), "bias"),
    "added to what a mask hides anyway": (
        with_scores(lambda s: (s + CAUSAL).masked_fill(HIDDEN, -math.inf)),
        "causal + bias",
    ),
    "zeros that are hidden afterwards": (
        with_scores(lambda s: (t := s.tril()).masked_fill(t == 0, -math.inf)),
        "causal",
    ),
    "whole rows set to 0": (with_scores(lambda s: s.masked_fill(ROWS.bool(), 0)), "none"),
    "scores of some pairs set to 0": (with_scores(lambda s: s.masked_fill(BLOCKS.bool(), 0)), "none"),
    "multiplied by a bias": (with_scores(lambda s: s * BLOCKS), "none"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mask_of_zeros_that_hides_nothing_is_found(name: str) -> None:
    attention, kind, severity = BROKEN[name]
    report = attncli.measure(attention, *tensors())
    assert only(report).mask_kind == kind
    assert [(finding.name, finding.severity) for finding in report.findings] == [
        ("mask-hides-nothing", severity)
    ]


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_a_mask_that_hides_and_of_a_bias(name: str) -> None:
    attention, kind = HEALTHY[name]
    report = attncli.measure(attention, *tensors())
    assert only(report).mask_kind == kind
    assert report.findings == ()


def test_relu_of_zeroed_scores_is_no_softmax() -> None:
    """0 is no score where relu normalises: it gives no weight at all."""

    def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).masked_fill(HIDDEN, 0).relu() @ v

    assert attncli.measure(squared, *tensors()).findings == ()
