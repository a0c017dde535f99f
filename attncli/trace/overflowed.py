"""Scores whose product overflowed: an infinity that q·k made hides nothing, so the mask is read from what masked.

In float16 a dot product beyond 65,504 is ±Inf, and −Inf looks like a hidden key. Which it is, only the mask says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncli.trace import check
from attncli.trace.factors import Path
from attncli.trace.products import Product


def overflows(dots: tuple[float, ...] | None, product: Product) -> bool:
    """Whether the product of q and k made infinities in its dtype. `dots`: the largest |q·k| of each head."""
    if dots is None:
        return False
    alpha = product.node.kwargs.get("alpha", 1)
    largest = max(dots, default=0.0) * abs(float(alpha))
    return largest > torch.finfo(product.node.dtype).max


def without_infinities(
    scores: Tensor, product: Product, path: Path, masks: check.Masks, shape: tuple[int, ...]
) -> tuple[Tensor, bool]:
    """Scores of which −Inf stands for hidden keys alone, and whether those could be told.

    What overflowed downwards becomes the lowest number of the product's dtype; upwards it stays. `shape`: of the
    scores that entered the softmax, over their last axis.
    """
    shown = scores.clamp(min=torch.finfo(product.node.dtype).min)
    # A row of nothing but −Inf has no softmax, also where all of it overflowed.
    shown = shown.masked_fill((scores == -math.inf).all(-1, keepdim=True), math.nan)
    hidden = _hidden(path, masks, shape)
    return (shown, False) if hidden is None else (shown.masked_fill(hidden, -math.inf), True)


# --- helpers ------------------------------------------------------------------------------------------


def _hidden(path: Path, masks: check.Masks, shape: tuple[int, ...]) -> Tensor | None:
    """True where a step of the path hides a key, of `shape` or broadcast to it; None where that cannot be told."""
    if path.permuted:
        return None
    hidden = torch.zeros((), dtype=torch.bool)
    for step in path.steps:
        made = step.node.shape
        if step.kind in ("shape", "other") or math.prod(made) != math.prod(shape) or made[-1:] != shape[-1:]:
            return None
        found = masks.hides(step)
        if step.kind == "fill" and isinstance(step.value, float) and step.mask is not None:
            mask = step.mask.bool().expand(made).reshape(shape)
            hidden = hidden.to(mask.device)
            hidden = hidden | mask if found is not None else hidden & ~mask
        elif step.kind == "fill" or (step.kind == "sum" and step.value is None):
            return None
        elif found is not None and isinstance(step.value, Tensor):
            mask = (step.value <= found).expand(made).reshape(shape)
            hidden = hidden.to(mask.device) | mask
    return hidden
