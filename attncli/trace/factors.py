"""The scale that attention really applies, followed through the dataflow: on q, on k, and on the scores.

A module's `scaling` attribute may read 1.0 where q was scaled before the product, so nothing here looks at
attributes. Every scalar between the projections and the softmax counts, wherever it stands.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from attncli.trace.tape import Node, Ref


class Step(NamedTuple):
    """One operator between the score product and the softmax, in the order in which they ran.

    `kind`: "factor" (`value`, or the tensor `mask`), "sum" (`value`: a number or a tensor that is added), "fill"
    (where `mask` is true the score becomes `value`), "cap" (tanh), "shift" (`value`, one number per row made of
    the scores themselves, is added: their maximum, which no softmax can see), "other" (nothing can be said).
    """

    kind: str
    value: float | Tensor | None
    mask: Tensor | None
    node: Node
    # The node of the tensor in `value`: the same mask serves many layers.
    key: int | None = None


class Path(NamedTuple):
    """The way of the scores. `scale`: None where a factor cannot be read. `cap`: c of c·tanh(s/c).

    `permuted`: the rows no longer lie in the order in which the product made them.
    """

    steps: tuple[Step, ...]
    scale: float | None
    cap: float | None
    permuted: bool = False


def score_path(scores: Node, product: Node, carried: Any) -> Path:
    """From the product's output to the scores that enter the softmax. `carried`: what marks the way."""
    chain: list[tuple[Node, Ref]] = []
    here = scores
    while here is not product and len(chain) < _LONGEST:
        ref = next((r for r in here.operands if carried in r.node.carries or r.node is product), None)
        if ref is None:
            return Path((), None, None)
        chain.append((here, ref))
        here = ref.node
    steps: list[Step] = []
    scale: float | None = 1.0
    cap: float | None = None
    alpha = product.kwargs.get("alpha", 1) if product.op.name in ("baddbmm", "addmm", "addmv") else 1
    if alpha != 1:
        steps.append(Step("factor", float(alpha), None, product))
    if product.op.name in ("baddbmm", "addmm", "addmv", "addbmm"):
        beta = product.kwargs.get("beta", 1)
        added = product.operands[0].tensor
        if beta != 0:
            if added is not None and beta != 1:
                added = added * beta
            steps.append(Step("sum", added, None, product))
    for node, ref in reversed(chain):
        step = _step(node, ref)
        if step is not None:
            steps.append(step)
    for number, step in enumerate(steps):
        if step.kind == "factor":
            value = step.value if isinstance(step.value, float) else None
            if cap is not None and value is not None and number and _undoes(steps, number, value):
                cap = value
                continue
            scale = scale * value if scale is not None and value is not None else None
        elif step.kind == "cap":
            # c·tanh(s/c): the factor 1/c before it is no scale, nor is c behind it.
            inner = _last_factor(steps, number)
            outer = _next_factor(steps, number)
            if inner is not None and outer is not None and math.isclose(inner * outer, 1.0, rel_tol=1e-3):
                cap = outer
                scale = scale / inner if scale is not None else None
            else:
                scale = None
        elif step.kind == "other":
            scale = None
    permuted = any(node.op.kind in ("permute", "slice", "join", "repeat") for node, _ in chain)
    return Path(tuple(steps), scale, cap, permuted)


def linear_factor(node: Node, depth: int = 0) -> float | None:
    """The product of the scalars between a projection and this value; None where branches disagree.

    Rotary embedding passes it on: q·cos + rotated(q)·sin multiplies both branches alike.
    """
    factor = 1.0
    while depth < _DEEPEST:
        depth += 1
        kind = node.op.kind
        if not node.operands or kind in (
            "product",
            "convolution",
            "lookup",
            "norm",
            "fused",
            "other",
            "random",
        ):
            return factor
        if node.op.name in ("alias", "leaf"):
            return factor
        if kind in ("factor",):
            step = _scalar_factor(node)
            if step is not None:
                value, ref = step
                factor *= value
                node = ref.node
                continue
            main, other = _larger(node)
            if other is not None and other.shape and other.shape[-1] == 1 and not other.node.constant:
                return factor  # x / ‖x‖: what it was scaled by before is gone
            if (
                other is not None
                and _numel(other.shape) == _numel(main.shape)
                and not other.node.constant
                and other.node.sources == main.node.sources
                and _numel(other.shape) > 1
            ):
                return factor  # a gate
            node = main.node
            continue
        if kind in ("sum", "join"):
            filled = [ref for ref in node.operands if _numel(ref.shape)] or list(node.operands)
            made = [ref for ref in filled if not ref.node.constant] or filled
            if kind == "sum" and (len(made) > 1 and _adds_streams(made)):
                return factor
            found = [linear_factor(ref.node, depth + 1) for ref in made[:4]]
            if any(value is None for value in found):
                return None
            sizes = {round(abs(value), 12) for value in found if value is not None}
            return factor * sizes.pop() if len(sizes) == 1 else None
        if kind in ("same", "reshape", "permute", "expand", "slice", "repeat", "negative", "pad", "dropout"):
            node = node.operands[0].node
            continue
        return factor
    return factor


# --- one operator -------------------------------------------------------------------------------------


def _step(node: Node, ref: Ref) -> Step | None:
    """What an operator does to the scores; None for one that leaves the values as they are."""
    kind = node.op.kind
    if kind in (
        "same",
        "reshape",
        "permute",
        "expand",
        "slice",
        "negative",
        "pad",
        "join",
        "repeat",
        "alias",
    ):
        if kind == "negative":
            return Step("factor", -1.0, None, node)
        if kind in ("slice", "pad", "join", "repeat"):
            return Step("shape", None, None, node)
        return None
    if kind == "factor":
        if any(other.node is not ref.node and is_random(other.node) for other in node.operands):
            return Step("dropout", None, None, node)
        found = _scalar_factor(node, ref)
        if found is not None:
            return Step("factor", found[0], None, node)
        other = next((other.tensor for other in node.operands if other.node is not ref.node), None)
        return Step("factor", None, other, node)
    if kind == "sum":
        return _sum(node, ref)
    if kind == "cap":
        return Step("cap", None, None, node)
    if kind == "fill":
        return _fill(node, ref)
    if kind == "clamp":
        return Step("clamp", None, None, node)
    if kind == "dropout":
        return Step("dropout", None, None, node)
    if kind == "leaf" or node.op.name in ("leaf", "alias"):
        return Step("shape", None, None, node)
    return Step("other", None, None, node)


def _scalar_factor(node: Node, main: Ref | None = None) -> tuple[float, Ref] | None:
    """(factor, the other operand) where one operand of a product or quotient is a single number."""
    args = node.args
    if len(args) < 2:
        return None
    left, right = args[0], args[1]
    divides = node.op.name in ("div", "true_divide", "divide")
    for one, other, is_right in ((right, left, True), (left, right, False)):
        if not isinstance(other, Ref) or (main is not None and other.node is not main.node):
            continue
        value = _number(one)
        if value is None:
            continue
        if divides:
            if not is_right or value == 0:
                return None
            return 1.0 / value, other
        return value, other
    return None


def _number(value: Any) -> float | None:
    """A Python number, or a tensor whose elements are all the same number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Ref) and value.tensor is not None and 0 < value.tensor.numel() <= _FEW:
        if value.tensor.is_complex() or not (value.tensor.is_floating_point() or value.tensor.numel() == 1):
            return None
        numbers = value.tensor.detach().flatten().tolist()
        return float(numbers[0]) if all(number == numbers[0] for number in numbers) else None
    return None


def _sum(node: Node, ref: Ref) -> Step:
    alpha = node.kwargs.get("alpha", 1)
    if len(node.args) > 2 and node.op.name == "rsub":
        alpha = node.args[2]
    left, right = node.args[0], node.args[1] if len(node.args) > 1 else 0
    ours_is_left = isinstance(left, Ref) and left.node is ref.node
    other = right if ours_is_left else left
    sign = 1.0
    if node.op.name in ("sub", "subtract"):
        sign = -1.0 if ours_is_left else 1.0
        if not ours_is_left:
            return Step("other", None, None, node)
    elif node.op.name == "rsub":
        return Step("other", None, None, node)
    if ours_is_left:
        sign *= float(alpha)
    elif alpha != 1:
        return Step("other", None, None, node)
    if isinstance(other, Ref):
        tensor = other.tensor
        if tensor is None:
            return Step("sum", None, None, node)
        signed = tensor if sign == 1.0 else tensor * sign
        if other.shape[-1:] == (1,) and ref.shape[-1:] != (1,) and other.node.carries:
            return Step("shift", signed, None, node)
        return Step("sum", signed, None, node, other.node.serial)
    return Step("sum", float(other) * sign, None, node)


def _fill(node: Node, ref: Ref) -> Step:
    name, args = node.op.name, node.args
    if name == "masked_fill" and isinstance(args[1], Ref):
        return Step("fill", _fill_value(args[2]), args[1].tensor, node)
    if name == "where" and len(args) == 3 and isinstance(args[0], Ref) and args[0].tensor is not None:
        if isinstance(args[1], Ref) and args[1].node is ref.node:
            return Step("fill", _fill_value(args[2]), ~args[0].tensor.bool(), node)
        return Step("fill", _fill_value(args[1]), args[0].tensor.bool(), node)
    if name == "index_put" and len(args) > 2:
        return Step("fill", _fill_value(args[2]), None, node)
    if name in ("triu", "tril"):
        return Step("fill", 0.0, None, node)
    return Step("other", None, None, node)


def _fill_value(value: Any) -> float | Tensor | None:
    number = _number(value)
    if number is not None:
        return number
    return value.tensor if isinstance(value, Ref) else None


def is_random(node: Node) -> bool:
    """Whether a value was drawn, as the mask of a dropout is."""
    for _ in range(4):
        if node.op.kind in ("random", "dropout"):
            return True
        if not node.operands:
            return False
        node = node.operands[0].node
    return False


# --- helpers ------------------------------------------------------------------------------------------


def _undoes(steps: list[Step], number: int, value: float) -> bool:
    """Whether the factor at `number` is the c behind tanh."""
    before = [step for step in steps[:number] if step.kind in ("cap", "factor")]
    return bool(before) and before[-1].kind == "cap"


def _last_factor(steps: list[Step], number: int) -> float | None:
    for step in reversed(steps[:number]):
        if step.kind == "factor":
            return step.value if isinstance(step.value, float) else None
    return None


def _next_factor(steps: list[Step], number: int) -> float | None:
    for step in steps[number + 1 :]:
        if step.kind == "factor":
            return step.value if isinstance(step.value, float) else None
    return None


def _larger(node: Node) -> tuple[Ref, Ref | None]:
    refs = sorted(node.operands, key=lambda ref: (-_numel(ref.shape), ref.node.constant))
    return refs[0], refs[1] if len(refs) > 1 else None


def _adds_streams(refs: list[Ref]) -> bool:
    """A residual sum of two different streams, as against the two halves of a rotary embedding."""
    return origin(refs[0].node) is not origin(refs[1].node)


def origin(node: Node) -> Node:
    """The node behind views, factors and joins: where a value was first made."""
    for _ in range(_DEEPEST):
        if not node.operands or node.op.kind in (
            "product",
            "convolution",
            "lookup",
            "norm",
            "fused",
            "other",
        ):
            return node
        node = _larger(node)[0].node if node.op.kind == "factor" else node.operands[0].node
    return node


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


# --- tables -------------------------------------------------------------------------------------------

_LONGEST = 200
_DEEPEST = 64
# A factor per head is still read element by element; anything larger is no factor.
_FEW = 512
