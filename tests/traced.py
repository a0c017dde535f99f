"""Helpers of the tests that trace: numbers of a report by head, and the slow reference they are compared with."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attncli
from attncli.api import Report
from attncli.records import Call


def only(report: Report) -> Call:
    """The single call of a report, which must have been explained."""
    assert len(report.calls) == 1, report.calls
    (call,) = report.calls
    assert call.explained, call.reason
    return call


def numbers(report: Report, metric: str, call: int = 0) -> list[Any]:
    """One metric of one call, by head."""
    rows = [m for m in report.measurements if m.metric == metric and m.call == call and m.head is not None]
    assert [row.head for row in rows] == list(range(len(rows)))
    return [row.value for row in rows]


def entropies(scores_BHTS: Tensor) -> list[float]:
    """Mean entropy per head of softmax(scores), in float64; rows without a key are left out."""
    found: list[float] = []
    for head in scores_BHTS.double().unbind(1):
        rows = [row for matrix in head for row in matrix if bool((row > -math.inf).any())]
        found.append(sum(float(torch.special.entr(row.softmax(-1)).sum()) for row in rows) / len(rows))
    return found


def largest_dots(q_BHTD: Tensor, k_BHSD: Tensor) -> list[float]:
    """The largest |q·k| of each head over all pairs, in float64."""
    dots_BHTS = q_BHTD.double() @ k_BHSD.double().transpose(-1, -2)
    return [float(value) for value in dots_BHTS.abs().amax((0, 2, 3))]


def assert_measured(report: Report, scores_BHTS: Tensor, tolerance: float = 1e-5, call: int = 0) -> None:
    """Shapes and entropies of a call are those of `scores_BHTS`, −Inf where masked."""
    found = report.calls[call]
    assert found.explained, found.reason
    assert (found.batch, found.heads, found.queries, found.keys) == tuple(scores_BHTS.shape)
    assert numbers(report, "entropy", call) == pytest.approx(entropies(scores_BHTS), abs=tolerance)


__all__ = ["assert_measured", "attncli", "entropies", "largest_dots", "numbers", "only"]
