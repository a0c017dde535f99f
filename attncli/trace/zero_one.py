"""Masks that hide nothing: zeros and ones added to scores, and scores that are set to 0 where they should vanish.

To a softmax 0 is a score like any other. Only a tensor of exactly two values in the shape of a mask is taken for one:
a triangle, a band of scores that become 0, or padding at one end. Any other bias of zeros and ones is left alone.

Shapes: T queries, S keys, N any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attncli.trace.factors import Step
from attncli.trace.masks import mask_facts, visibility


def added_shape(mask: Tensor, visible: str) -> str | None:
    """The shape of the mask that an added tensor of zeros and ones (…, T, S) was meant to be; None where it is none.

    `visible`: the kind of mask that the scores have in the end.
    """
    if mask.is_complex() or not mask.numel():
        return None
    mask_NTS = _narrowed(mask)
    if mask.dtype != torch.bool:
        low, high = (float(value) for value in torch.aminmax(mask_NTS))
        if (low, high) != (0.0, 1.0) or not bool(((mask_NTS == 0) | (mask_NTS == 1)).all()):
            return None
    kind = _shape(mask_NTS, 1)
    # One more for each neighbour on both sides may be meant.
    return None if kind == "sliding window" else _unless_hidden(kind, visible)


def zeroed_shape(step: Step, visible: str) -> str | None:
    """The shape of what a step sets to 0 and nothing hides afterwards; None where it does no such thing."""
    if step.kind == "fill" and isinstance(step.value, float) and step.value == 0:
        if step.mask is not None:
            return _unless_hidden(_shape(_narrowed(step.mask), 0), visible)
        left = _triangle(step)
        return None if left is None else _unless_hidden(_shape(left, 1), visible)
    if step.kind == "factor" and step.mask is not None:
        return added_shape(step.mask, visible)
    return None


# --- helpers ------------------------------------------------------------------------------------------


def _unless_hidden(kind: str | None, visible: str) -> str | None:
    """tril(scores).masked_fill(scores == 0, -inf) hides in the end what was set to 0."""
    kinds = visible.split(" + ")
    return None if kind in kinds or "other" in kinds else kind


def _shape(mask_NTS: Tensor, shown: int) -> str | None:
    """ "causal", "future only", "sliding window" or "padding"; None where a mask that is `shown` at what is visible
    has no such shape."""
    count, queries, keys = mask_NTS.shape
    if not count * queries * keys:
        return None
    facts = mask_facts(
        lambda b, h, t: mask_NTS[b, None, t] == shown, count, 1, queries, keys, mask_NTS.device
    )
    seen = visibility(facts, count, queries, keys, same_tokens=queries == keys)
    kind = seen.kind.split(" + ")[0]
    partly = (facts.count_BHT > 0) & (facts.count_BHT < keys)
    if kind in ("none", "other") or not bool(partly.any()):
        return None
    return None if kind == "padding" and not _lies_at_one_end(facts.seen_BHS[:, 0]) else kind


def _narrowed(mask: Tensor) -> Tensor:
    """(N, T, S), without the axes that a mask is only repeated along."""
    mask = mask[(None,) * max(0, 3 - mask.dim())]
    for axis in range(mask.dim() - 1):
        if mask.size(axis) > 1 and mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask.flatten(0, -3)


def _lies_at_one_end(shown_NS: Tensor) -> bool:
    """Whether each row is a run of ones at its start or its end, some longer than a single one."""
    changes_N = (shown_NS[:, 1:] != shown_NS[:, :-1]).sum(-1)
    longest = int(shown_NS.sum(-1).amax())
    return bool((changes_N <= 1).all()) and longest > 1


def _triangle(step: Step) -> Tensor | None:
    """What tril and triu leave of the scores."""
    name, shape = step.node.op.name, step.node.shape
    if name not in ("tril", "triu") or len(shape) < 2 or not math.prod(shape):
        return None
    diagonal = _diagonal(step.node.args)
    ones = torch.ones(1, *shape[-2:], dtype=torch.bool)
    return ones.tril(diagonal) if name == "tril" else ones.triu(diagonal)


def _diagonal(args: Sequence[object]) -> int:
    return args[1] if len(args) > 1 and isinstance(args[1], int) else 0
