"""Products of two computed tensors: the candidates for scores.

A product carries itself along on all values that are made of it, until another product uses them up.
Shapes: N leading axes of a matrix product, H query heads, T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from attncli.trace.axes import Atom, Axes, Axis, axes, better, marked, numel
from attncli.trace.layout import Layout, roles, sizes, viewer
from attncli.trace.ops import Op
from attncli.trace.statistics import dot_extremes
from attncli.trace.tape import Node, Ref


@dataclass(eq=False, slots=True)
class Product:
    """A product of two computed tensors, which may turn out to be scores. `axes`: of its output.

    `mixes_tokens`: rows and columns are slices of tokens on both sides.
    """

    node: Node
    first: Ref
    second: Ref
    axes: Axes
    over_features: bool = True
    dropped_out: bool = False
    spent: bool = False
    mixes_tokens: bool = False


def products(node: Node) -> list[Product]:
    return [thing for thing in node.carries if isinstance(thing, Product)]


def main_product(products: list[Product]) -> Product | None:
    """Of the products that make up the scores, the one of queries and keys: both depend on the input."""
    if not products:
        return None
    return max(
        products,
        key=lambda p: (bool(p.first.node.sources) and bool(p.second.node.sources), numel(p.node.shape)),
    )


class Factors(NamedTuple):
    """Two factors whose product was summed over `axis` of the product's shape: a matrix product in two steps."""

    first: Ref
    second: Ref
    axis: int


def may_sum_up(op: Op, operands: Sequence[Ref]) -> bool:
    """Whether a multiplication may be half of a matrix product: two computed tensors, one repeated for the other.

    x · (a number per row), as in norms, is none; nor is a gate, which repeats nothing.
    """
    if op.name not in ("mul", "multiply") or len(operands) != 2:
        return False
    first, second = operands
    if first.node.constant or second.node.constant or not first.shape or not second.shape:
        return False
    pairs = _pairs(first.shape, second.shape)
    grows = any(a == 1 != b for a, b in pairs), any(b == 1 != a for a, b in pairs)
    if all(grows):
        return True
    return any(grows) and (
        pairs[-1][0] == pairs[-1][1] != 1 or bool(first.node.carries or second.node.carries)
    )


def summed_factors(node: Node) -> Factors | None:
    """The factors of (a * b).sum(dim); None where this sum is of something else."""
    made = node.operands[0].node if node.operands else node
    dims = node.args[1] if len(node.args) > 1 else None
    if not isinstance(dims, tuple) or len(dims) != 1 or not may_sum_up(made.op, made.operands):
        return None
    first, second = made.operands
    rank = len(made.shape)
    return Factors(first, second, dims[0] % rank)


def has_own_axis(values: tuple[int, ...], weights: tuple[int, ...]) -> bool:
    """Whether `values` has an axis along which `weights` is broadcast: a feature, which a mask has none of."""
    return any(value != 1 == weight for value, weight in _pairs(values, weights))


def product_of_factors(node: Node, factors: Factors) -> Product | None:
    """The product as one of matrices (N, T, D) and (N, D, S), where the sum really makes one."""
    first, second, axis = factors
    if first.tensor is None or second.tensor is None:
        return None
    pairs = _pairs(first.shape, second.shape)
    rank = len(pairs)
    rows = [i for i, (a, b) in enumerate(pairs) if b == 1 != a]
    columns = [i for i, (a, b) in enumerate(pairs) if a == 1 != b]
    batch = [i for i in range(rank) if i not in (*rows, *columns, axis)]
    if pairs[axis][0] != pairs[axis][1] or axis in (*rows, *columns) or not (rows or columns):
        return None
    known: dict[int, Axes] = {}
    sides = [
        ((),) * (rank - len(ref.shape)) + axes(ref.node, known)
        if len(axes(ref.node, known)) == len(ref.shape)
        else ((),) * rank
        for ref in (first, second)
    ]
    parts: list[list[Axis]] = [
        [better(sides[0][i], sides[1][i]) for i in batch],
        [sides[0][i] for i in rows],
        [sides[1][i] for i in columns],
    ]
    atoms = marked(*(tuple(atom for part in group for atom in part) for group in parts))
    by_axis: dict[int, Axis] = {}
    for places, group, side in zip((batch, rows, columns), parts, atoms, strict=True):
        rest = list(side)
        for place, part in zip(places, group, strict=True):
            by_axis[place] = tuple(rest[: len(part)])
            del rest[: len(part)]
    keeps = len(node.shape) == rank
    made = tuple(by_axis.get(i, ()) for i in range(rank) if keeps or i != axis)
    sizes = [numel([max(pairs[i]) for i in places]) for places in (batch, rows, columns)]
    q_NTD = _laid(first.tensor, rank, [*batch, *rows, axis, *columns]).reshape(sizes[0], sizes[1], -1)
    k_NDS = _laid(second.tensor, rank, [*batch, *rows, axis, *columns]).reshape(sizes[0], -1, sizes[2])
    return Product(
        node,
        Ref(first.node, tuple(q_NTD.shape), q_NTD),
        Ref(second.node, tuple(k_NDS.shape), k_NDS),
        made,
        not sides[0][axis] or any(atom.kind != "position" for atom in sides[0][axis]),
    )


def contracts_scores(summed: Axis) -> bool:
    """Whether an axis that is summed over lay in the score product (or may have: nothing is known of it)."""
    return not summed or any(atom.origin in ("rows", "columns") for atom in summed)


def contracts_keys(weights: Ref, number: int) -> bool:
    """Whether a product sums scores over the axis of their keys (or may: the axes are not known)."""
    product = main_product([p for p in products(weights.node) if not p.spent])
    if product is None:
        return False
    summed = contracted(axes(weights.node, {product.node.serial: product.axes}), number)
    return contracts_scores(summed)


def contracted(found: Axes, number: int) -> tuple[Atom, ...]:
    """The axis that a product sums over, of its first (0) or second (1) operand."""
    if not found:
        return ()
    return found[-1] if number == 0 or len(found) == 1 else found[-2]


def columns(product: Product, keys_from: str) -> int:
    shape = product.node.shape
    return shape[-2] if keys_from == "rows" and len(shape) > 1 else shape[-1]


def first_key(given: Node, product: Product, layout: Layout, columns: int) -> int | None:
    """Where the real keys begin, if further columns without keys were joined to the scores; else None."""
    extra = layout.keys - columns
    if extra <= 0 or extra > _MOST_SINKS or layout.keys_from != "columns":
        return None
    node = given
    for _ in range(_NEAR):
        if node.op.name == "cat":
            parts = [ref for ref in node.operands if isinstance(ref, Ref)]
            ours = next((i for i, ref in enumerate(parts) if product in ref.node.carries), None)
            if ours is not None:
                return sum(ref.shape[-1] for ref in parts[:ours])
        if not node.operands:
            break
        node = next((ref.node for ref in node.operands if product in ref.node.carries), node.operands[0].node)
    return None


def largest_dots(product: Product, layout: Layout) -> tuple[float, ...] | None:
    """The largest |q·k| of each head, of q and k as they entered the product."""
    first, second = product.first.tensor, product.second.tensor
    if first is None or second is None:
        return None
    name = product.node.op.name
    if name == "linear":
        second = second.transpose(-1, -2)
    if name in ("mv", "addmv"):
        second = second[:, None]
    if second.dim() == 2:
        first, second = first.reshape(1, -1, first.shape[-1]), second[None]
    if first.dim() != 3 or second.dim() != 3:
        return None
    placed = _placed(first, second, layout)
    if placed is not None:
        return placed
    found = list(product.axes)
    if layout.keys_from == "rows":
        first, second = second.transpose(1, 2), first.transpose(1, 2)
        leading = [*found[:-2], found[-1]]
    else:
        leading = found[:-1]
    rows_NT = dot_extremes(first, second)
    read = roles(leading, [_size(axis) for axis in leading], layout.keys_from, layout.heads)
    batch, heads, queries = sizes(read)
    if heads != layout.heads or batch * heads * queries != rows_NT.numel():
        largest = float(rows_NT.amax()) if rows_NT.numel() else 0.0
        return (largest,) * layout.heads
    if not rows_NT.numel():
        return (0.0,) * layout.heads
    per_head = viewer(read)(rows_NT.reshape(-1, 1)).amax(dim=(0, 2, 3))
    return tuple(per_head.double().tolist() if per_head.device.type != "mps" else per_head.tolist())


def _placed(first_NTD: Tensor, second_NDS: Tensor, layout: Layout) -> tuple[float, ...] | None:
    """The same where each factor of the scores' axes is known by its place in the product; else None."""
    pairs, rows, columns = first_NTD.shape[0], first_NTD.shape[1], second_NDS.shape[2]
    if layout.keys_from == "rows":
        first_NTD, second_NDS = second_NDS.transpose(1, 2), first_NTD.transpose(1, 2)
        places = [(size, step if step < columns else step // rows) for size, step in layout.places]
    else:
        places = [(size, step // columns) for size, step in layout.places]
    count = pairs * first_NTD.shape[1]
    if numel([size for size, _ in places]) != count or not count:
        return None
    if count != layout.batch * layout.heads * layout.queries or not all(step for _, step in places):
        return None
    flat = dot_extremes(first_NTD, second_NDS).flatten()
    in_order = flat.as_strided([size for size, _ in places], [step for _, step in places])
    per_head = in_order.reshape(layout.batch, layout.heads, layout.queries).amax(dim=(0, 2))
    return tuple(per_head.tolist())


def four_axes(weights: Tensor) -> Tensor:
    """(…, T, S) with four axes."""
    if weights.dim() > 4:
        return weights.flatten(0, weights.dim() - 4)
    return weights.view((1,) * (4 - weights.dim()) + tuple(weights.shape)) if weights.dim() < 4 else weights


def is_heads(scores: Ref, size: int) -> bool:
    return size in scores.shape


def _pairs(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """The sizes of two shapes, axis by axis as they broadcast."""
    rank = max(len(first), len(second))
    left, right = ((1,) * (rank - len(shape)) + tuple(shape) for shape in (first, second))
    return list(zip(left, right, strict=True))


def _laid(tensor: Tensor, rank: int, order: Sequence[int]) -> Tensor:
    return tensor[(None,) * (rank - tensor.dim())].permute(*order)


def _size(axis: tuple[Atom, ...]) -> int:
    return numel(tuple(atom.size for atom in axis))


# --- tables -------------------------------------------------------------------------------------------

# Learned sinks are one logit a head; more columns than this are keys.
_MOST_SINKS = 8
_NEAR = 16
