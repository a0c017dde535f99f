"""Scores that were normalised and wait for their values, and what happened to them on the way.

What is known of a call between its softmax and its values: the layout of its scores, the numbers taken of
them, the path from q·k, and, once the weights are used, what was done to them after the softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attncli.trace import check
from attncli.trace.axes import Axes, numel
from attncli.trace.factors import Path, is_random
from attncli.trace.layout import Layout
from attncli.trace.maps import Drawn
from attncli.trace.origins import projected_features
from attncli.trace.products import Product
from attncli.trace.statistics import Numbers
from attncli.trace.tape import Node, release
from attncli.trace.zero_one import zeroed_shape


@dataclass(eq=False, slots=True)
class Pending:
    """Scores that were normalised, measured, and wait for the values they weigh."""

    normaliser: str
    product: Product
    node: Node
    layout: Layout
    numbers: Numbers
    dots: tuple[float, ...] | None
    path: Path
    explained: check.Answer
    scores_dtype: torch.dtype
    sinks: bool
    subtracts_maximum: bool
    source: str | None
    recovered: bool = True
    mask_known: bool = True
    softmax_dtype: torch.dtype | None = None
    claimed: bool = False
    drawn: tuple[Drawn, ...] = ()


@dataclass(slots=True)
class Seen:
    """One finished call. `facts`: the fields of `records.Call`, as far as the dataflow tells them."""

    facts: dict[str, Any]
    numbers: Numbers | None
    dots: tuple[float, ...] | None = None
    row_sums: tuple[float, float] | None = None
    factor_before: float = 1.0
    # The query of weights that were not divided by their sum before they met their values.
    divided_later_of: int | None = None
    # Where heads are slices of neighbouring tokens and not of features: how many tokens each holds.
    tokens_per_head: float | None = None
    # Where the softmax of scores in memory runs in another dtype than the product that made them.
    softmax_dtype: str | None = None
    # The maps that were asked for.
    drawn: tuple[Drawn, ...] = ()


def let_go(thing: Product | Pending) -> None:
    """Drops the tensors of scores that are settled, and the way back from their node to them."""
    if isinstance(thing, Pending):
        for step in thing.path.steps:
            release(step.node)
        thing.path = thing.path._replace(steps=())
    else:
        thing.first = thing.first._replace(tensor=None)
        thing.second = thing.second._replace(tensor=None)
        release(thing.node)


def is_done(thing: Product | Pending) -> bool:
    return thing.claimed if isinstance(thing, Pending) else thing.spent


def axes_of_product(pending: Pending) -> dict[int, Axes]:
    return {pending.product.node.serial: pending.product.axes}


def likely_heads(product: Product) -> int:
    """Features of the query's projection over the size of a head; 1 where there is no projection.

    Heads that were cut across tokens stand in front of them, however many features there are.
    """
    if product.mixes_tokens:
        return 1
    width, size = projected_features(product.first.node), product.first.shape[-1]
    return width // size if width and size and width % size == 0 else 1


def largest_scaled(dots: tuple[float, ...] | None, path: Path) -> float | None:
    """The largest score that scaling alone can make."""
    if dots is None or path.scale is None:
        return None
    return max(dots, default=0.0) * abs(path.scale)


def unshifted(scores: Tensor, path: Path) -> Tensor:
    """The scores before their own maximum was subtracted, which says nothing about them."""
    for step in reversed(path.steps):
        if step.kind != "shift" or not isinstance(step.value, Tensor):
            break
        if step.value.dim() == scores.dim() and step.value.shape[:-1] == scores.shape[:-1]:
            scores = scores - step.value
    return scores


def scale_of(
    pending: Pending, query: float | None, key: float | None
) -> tuple[float | None, dict[str, float]]:
    scores = pending.path.scale if pending.recovered else None
    named = {"query": query, "key": key, "scores": scores}
    factors = {name: value for name, value in named.items() if value is not None and value != 1.0}
    if query is None or key is None or scores is None:
        return None, factors
    return query * key * scores, factors


class After(NamedTuple):
    """`changed`: by more than a division by their sum. `mixed`: heads were mixed with each other."""

    dropout: float
    masked: bool
    divided: bool
    changed: bool
    mixed: bool


def after_softmax(weights: Node, pending: Pending) -> After:
    """What happened to the probabilities between the softmax and the values."""
    dropout, masked, divided, changed, mixed = 0.0, False, False, False, False
    node = weights
    for _ in range(_NEAR):
        if node is pending.node or not node.operands:
            break
        if node.op.kind == "dropout":
            chance = node.args[1] if len(node.args) > 1 else 0.0
            dropout = float(chance) if isinstance(chance, (int, float)) else 0.0
        elif node.op.kind == "factor" and len(node.operands) == 2:
            other = next((ref for ref in node.operands if pending not in ref.node.carries), None)
            divided = divided or any(ref.shape[-1:] == (1,) for ref in node.operands)
            if other is not None and numel(other.shape) > 1:
                if is_random(other.node):
                    dropout = dropout or 0.5
                elif other.shape[-1:] != (1,):
                    masked = True
        elif node.op.kind == "fill":
            if any(pending not in ref.node.carries and is_random(ref.node) for ref in node.operands):
                dropout = dropout or 0.5
            else:
                masked = True
        elif node.op.kind in ("softmax", "log softmax", "sum", "other", "sigmoid", "relu"):
            changed = True
        elif node.op.product or node.op.kind == "convolution":
            mixed = True
        # e / e.sum(): both come from the softmax; the way leads through the larger.
        ours = [ref for ref in node.operands if pending in ref.node.carries]
        following = max(ours, key=lambda ref: numel(ref.shape)).node if ours else None
        if following is None:
            break
        node = following
    return After(dropout, masked, divided, changed or masked, mixed)


def mask_facts(pending: Pending, masks: check.Masks, axis: str) -> dict[str, Any]:
    if axis == "channels":
        return {"mask_kind": "none"}
    if pending.normaliser == "other" or not pending.mask_known:
        return {"mask_kind": None}  # a probability of 0 may be a mask or the normaliser's own
    if any(map(math.isnan, pending.dots or ())):
        return {"mask_kind": None}  # NaN does not show whether it was hidden
    numbers, kind = pending.numbers, pending.numbers.mask_kind
    if masks.has_bias(pending.path):
        kind = with_bias(kind, masks.added_shape(pending.path, kind))
    zeroed = next(
        (found for step in pending.path.steps if (found := zeroed_shape(step, kind)) is not None), None
    )
    if zeroed is not None:
        kind = f"zero fill ({zeroed})" if kind == "none" else f"{kind} + zero fill ({zeroed})"
    return {"mask_kind": kind, "window": numbers.window, "causal_offset": numbers.causal_offset}


def with_bias(kind: str, zeros_and_ones: str | None = None) -> str:
    """`zeros_and_ones`: the shape of the mask that the bias was meant to be."""
    bias = "bias" if zeros_and_ones is None else f"0/1 bias ({zeros_and_ones})"
    return bias if kind == "none" else f"{kind} + {bias}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- tables -------------------------------------------------------------------------------------------

_NEAR = 16
