"""One origin with all that is known around it, and what causes ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from attncli.trace.axes import Axes, axes, of_product
from attncli.trace.factors import linear_factor
from attncli.trace.facts import exceeds
from attncli.trace.layout import layout_of
from attncli.trace.nonfinite import Nonfinite
from attncli.trace.origins import projected_features
from attncli.trace.tape import Node, Ref
from attncli.trace.trails import Origin

Evidence = dict[str, Any]


class Cause(NamedTuple):
    """`says`: one sentence with the numbers; `{…}` are names of the evidence. `change`: see `confirm.CHANGES`.

    `advice`: a sentence, or what makes it of the evidence where not every case is mended alike.
    """

    name: str
    reads: Callable[[Case], Evidence | None]
    says: str
    advice: str | Callable[[Evidence], str]
    change: str

    def advises(self, evidence: Evidence) -> str:
        return self.advice if isinstance(self.advice, str) else self.advice(evidence)


@dataclass
class Case:
    """One origin with all that is known around it. `path`: nodes from the origin to what is seen.

    `seen`: names of what is seen to be bad.
    """

    origin: Origin
    book: Nonfinite
    path: list[Node] = field(default_factory=list)
    seen: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        return self.origin.facts

    @property
    def values(self) -> list[float]:
        """What the operands held at the element."""
        return [value for value in self.facts.get("values", ()) if value is not None]

    @property
    def dtype(self) -> str:
        return str(self.facts.get("dtype", ""))

    @property
    def name(self) -> str:
        return self.origin.op.name

    @property
    def backward(self) -> bool:
        return self.origin.phase == "backward"

    @cached_property
    def scores(self) -> Scores | None:
        return _scores(self)

    def made_by(self, position: int) -> Node | None:
        """The node of an operand, behind views and casts."""
        operands = self.origin.node.operands
        if position >= len(operands):
            return None
        return behind_views(operands[position].node)


class Scores(NamedTuple):
    """The attention whose scores an origin lies on. `scale`: None where it is no single number.

    `after`: the part of it that is applied to the product.
    """

    product: Node
    normaliser: Node | None
    scale: float | None
    expected: float
    heads: int
    after: float | None = None

    @property
    def unscaled(self) -> bool:
        return self.scale is not None and math.isclose(self.scale, 1.0) and self.expected < 0.9


def place_of(case: Case) -> dict[str, Any] | None:
    """Where the value stands: batch, head, query and key in attention scores, otherwise the index."""
    index = case.facts.get("index")
    if index is None:
        return None
    if case.scores is not None:
        named = _in_scores(case, index)
        if case.origin.op.kind in ("softmax", "log softmax"):
            named.pop("key", None)  # a whole row is bad
        if named:
            return named
    return {"index": index}


def common(case: Case) -> Evidence:
    facts = case.facts
    found: Evidence = {}
    for name in ("count", "of", "shape"):
        if name in facts:
            found[name] = facts[name]
    return found


# --- helpers ------------------------------------------------------------------------------------------


def _until(nodes: list[Node], last: Node) -> list[Node]:
    return nodes[: nodes.index(last)] if last in nodes else nodes


def _heads(product: Node, entering: Node) -> int:
    """Heads that lie in the first axis of scores with three."""
    left, right = product.operands[-2:]
    known: dict[int, Axes] = {}
    first, second = axes(left.node, known), axes(right.node, known)
    made = of_product(product.op.name, first, second, product.shape)
    width, size = projected_features(left.node), left.shape[-1]
    likely = width // size if width and size and width % size == 0 else 1
    over_features = not first or any(atom.kind != "position" for atom in first[-1])
    return layout_of(entering, -1, {product.serial: made}, likely, over_features).heads


def _scores(case: Case) -> Scores | None:
    """Whether the origin lies between a product of two computed tensors and its softmax."""
    origin = case.origin
    normaliser = next(
        (
            node
            for node in [origin.node, *case.path[:_NEAR]]
            if node.op.kind in ("softmax", "log softmax", "exponential")
        ),
        None,
    )
    product = origin.node
    for _ in range(_NEAR):
        if product.op.product or not product.operands:
            break
        if product.op.kind not in _SCORE_STEPS and product is not origin.node:
            return None
        inner = [ref.node for ref in product.operands if not ref.node.constant]
        if not inner:
            return None
        product = inner[0]
    if not product.op.product or len(product.operands) < 2 or origin.forward is not None:
        return None
    left, right = product.operands[-2:]
    if left.node.constant or right.node.constant or normaliser is None:
        return None
    if origin.node is product and any(
        node.op.kind not in _SCORE_STEPS for node in _until(case.path[1:], normaliser)
    ):
        return None
    size = left.shape[-1]
    entering = normaliser.operands[0].node if normaliser.operands else product
    parts = [linear_factor(entering), linear_factor(left.node), linear_factor(right.node)]
    scale = math.prod(part for part in parts if part is not None) if None not in parts else None
    return Scores(
        product, normaliser, scale, 1 / math.sqrt(size) if size else 1.0, _heads(product, entering), parts[0]
    )


def _in_scores(case: Case, index: list[int]) -> dict[str, int]:
    shape = list(case.facts["shape"])
    scores = case.scores
    normaliser = scores.normaliser if scores is not None else None
    if (
        len(shape) == 3
        and normaliser is not None
        and len(normaliser.shape) == 4
        and math.prod(normaliser.shape) == math.prod(shape)
    ):
        index, shape = _unravelled(_flattened(index, shape), normaliser.shape), list(normaliser.shape)
    if len(shape) == 4:
        names = ("batch", "head", "query", "key")
        return dict(zip(names, index, strict=True))
    if len(shape) == 3 and scores is not None:
        return {
            "batch": index[0] // scores.heads,
            "head": index[0] % scores.heads,
            "query": index[1],
            "key": index[2],
        }
    return {"query": index[0], "key": index[1]} if len(shape) == 2 else {}


def _flattened(index: list[int], shape: list[int]) -> int:
    flat = 0
    for place, size in zip(index, shape, strict=True):
        flat = flat * size + place
    return flat


def _unravelled(flat: int, shape: tuple[int, ...]) -> list[int]:
    found = []
    for size in reversed(shape):
        found.append(flat % size)
        flat //= size
    return found[::-1]


def row_words(case: Case) -> str:
    place = place_of(case) or {}
    named = [f"{name} {place[name]}" for name in ("batch", "head", "query") if name in place]
    return ", ".join(named) if named else f"row {case.facts['index'][:-1]}"


def masks(case: Case) -> list[dict[str, Any]]:
    found = []
    for number in case.origin.masks[:_MOST_MASKS]:
        mask = case.book.origins[number]
        found.append(
            {
                "op": mask.op.name,
                "name": mask.name,
                "module": mask.module,
                "source": str(mask.place) if mask.place else None,
            }
        )
    return found


def mask_words(case: Case) -> str:
    words = [
        mask["name"] or (f"{mask['op']} at {mask['source']}" if mask["source"] else mask["op"])
        for mask in masks(case)
    ]
    return f" (masks: {'; '.join(dict.fromkeys(words))})" if words else ""


def scaling_words(scores: Scores, dtype: str, scaled: float) -> str:
    if scores.unscaled:
        fits = "with it they fit" if not exceeds(scaled, dtype) else "and even with it they would not fit"
        return f"; the scores are not scaled (factor 1, expected {short(scores.expected)}), {fits}"
    if scores.after is None or scores.after == 1.0:
        return ""
    return f"; the factor {short(scores.after)} comes after the product, which is too late"


def behind_views(node: Node) -> Node:
    for _ in range(_NEAR):
        if (
            node.op.kind not in ("same", "reshape", "permute", "expand", "slice") and node.op.name != "alias"
        ) or not node.operands:
            break
        node = node.operands[0].node
    return node


def from_where(case: Case) -> bool:
    """Whether the gradient that came in here is 0 because a selection did not take this branch."""
    node, since = case.origin.node, case.book.backward_from or 0
    for _ in range(_NEAR):
        gradients = [ref.node for ref in node.operands if ref.node.at >= since]
        if not gradients:
            return False
        node = gradients[0]
        if node.op.kind == "fill":
            return True
        if node.op.kind not in ("same", "reshape", "permute", "expand", "factor", "negative", "sum"):
            return False
    return False


def added_eps(node: Node) -> float | None:
    """The small number that was added to a value, behind roots and views; None without one."""
    for _ in range(_NEAR):
        if node.op.kind == "sum" or node.op.name in ("clamp_min", "clamp"):
            numbers = [
                float(value)
                for value in node.args
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            ]
            numbers += [
                float(ref.tensor.detach())
                for ref in node.operands[1:]
                if isinstance(ref, Ref) and ref.tensor is not None and ref.tensor.numel() == 1
            ]
            small = [number for number in numbers if 0 < abs(number) < 1e-2]
            return small[0] if small else None
        if node.op.name not in ("sqrt", "rsqrt", "pow", "reciprocal", "alias") and node.op.kind not in (
            "same",
            "reshape",
            "expand",
        ):
            return None
        if not node.operands:
            return None
        node = node.operands[0].node
    return None


def is_spread(node: Node) -> bool:
    """A standard deviation, a variance, or the root of one; with nothing added."""
    for _ in range(_NEAR):
        if node.op.name in ("std", "var", "std_mean", "var_mean"):
            return True
        if (
            node.op.name == "mean"
            and node.operands
            and node.operands[0].node.op.name in ("pow", "square", "mul")
        ):
            return True
        if node.op.name not in ("sqrt", "rsqrt", "pow", "alias") and node.op.kind not in (
            "same",
            "reshape",
            "expand",
        ):
            return False
        if not node.operands:
            return False
        node = node.operands[0].node
    return False


def first_name(case: Case) -> str | None:
    return next((operand["name"] for operand in case.facts.get("operands", ()) if operand.get("name")), None)


def short(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


# --- tables -------------------------------------------------------------------------------------------

_NEAR = 24
_MOST_MASKS = 4
_SCORE_STEPS = frozenset(
    "factor sum fill same reshape permute cap slice expand clamp negative product join pad softmax exponential".split()
) | {"log softmax"}
