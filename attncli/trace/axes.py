"""What each axis of a tensor means: followed from the projection that made it, through views and joins.

A projection's output has positions (batch, sequence, window) on all axes but its last, which holds features.
Splitting features into heads, folding heads into the batch, grouping queries over shared keys: all are
reshapes, permutations and slices, so the meaning of an axis of the scores follows from shapes alone.

An axis is a tuple of atoms, outermost first; an atom is one factor of its length. (B·H, T, D) made from a
projection (B, T, E) has the axes ((B, H), (T,), (D,)), where H and D are atoms cut out of the features E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from attncli.trace.tape import Node, Ref

Kind = Literal["position", "feature", "unknown"]


@dataclass(frozen=True, slots=True, eq=False)
class Atom:
    """One factor of an axis. `origin`: the axis of the score product that it is part of, where it is.

    `step`: how many elements of that product's output lie between two of its entries; 0 where unknown.
    `torn`: a view cut the tensor between tokens and features where neither begins (`_tears`).
    """

    size: int
    kind: Kind
    origin: Literal["", "batch", "rows", "columns"] = ""
    step: int = 0
    torn: bool = False

    def sized(self, size: int) -> Atom:
        return replace(self, size=size)


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def axes(node: Node, known: dict[int, Axes]) -> Axes:
    """The axes of `node`, one per dimension. `known`: those of nodes where the walk is to stop, by serial.

    Walks back iteratively (chains can be long) and remembers what it found in `known`.
    """
    trail: list[tuple[Node, Ref | None]] = []
    here = node
    while here.serial not in known:
        ref = _main_operand(here)
        trail.append((here, ref))
        if ref is None:
            break
        here = ref.node
        if len(trail) > _LONGEST:
            break
    for item, ref in reversed(trail):
        if ref is None or ref.node.serial not in known:
            known[item.serial] = _root(item)
        else:
            known[item.serial] = _through(item, ref, known[ref.node.serial])
    return known[node.serial]


def _main_operand(node: Node) -> Ref | None:
    """The operand whose axes the result inherits; None at a root: products, look-ups, leaves."""
    if node.op.kind == "convolution" and node.carries:  # heads that talk to each other
        return node.operands[0]
    if node.op.kind in ("product", "convolution", "lookup", "fused", "random") or not node.operands:
        return None
    candidates = [ref for ref in node.operands if ref.node.shape == ref.shape] or list(node.operands)
    # A cache begins as an empty tensor, to which the first keys are joined.
    candidates = [ref for ref in candidates if numel(ref.shape)] or candidates
    if node.op.kind == "join":
        return max(candidates, key=lambda ref: numel(ref.shape))  # the part that most of the result is
    if node.op.kind in ("slice", "same", "reshape", "permute", "expand", "repeat", "norm"):
        return candidates[0]

    # Of operands that are combined, the one with as many axes and elements as the result, made by the run.
    def rank(ref: Ref) -> tuple[bool, int, bool]:
        return (bool(ref.node.carries), numel(ref.shape), not ref.node.constant)

    return max(candidates, key=rank)


def _root(node: Node) -> Axes:
    shape = node.shape
    feature = 1 if node.op.kind == "convolution" and len(shape) >= 3 else len(shape) - 1
    kinds: list[Kind] = ["feature" if axis == feature else "position" for axis in range(len(shape))]
    return tuple(_axis(size, kind) for size, kind in zip(shape, kinds, strict=True))


def _axis(size: int, kind: Kind) -> Axis:
    return (Atom(size, kind),) if size != 1 else ()


def _axis_like(atom: Atom, size: int) -> Axis:
    return (atom.sized(size),) if size != 1 else ()


def _through(node: Node, ref: Ref, before: Axes) -> Axes:
    """The axes after one operator, from those of its main operand."""
    shape, old = node.shape, ref.shape
    if len(before) != len(old):
        return unknown(shape)
    kind = node.op.kind
    if kind == "permute":
        order = _order(node, len(old))
        return tuple(before[axis] for axis in order) if order is not None else unknown(shape)
    if numel(shape) == numel(old) and (kind == "reshape" or len(shape) != len(old)):
        made = _regrouped(before, shape)
        return _torn(made) if _tears(before, shape) else made
    if kind == "slice" and len(shape) == len(old) - 1 and node.op.name in _DROPPING:
        axis = _dropped(node, len(old))
        rest = [item for number, item in enumerate(before) if number != axis]
        return tuple(_resized(item, size) for item, size in zip(rest, shape, strict=True))
    if kind == "join" and node.op.name != "stack" and (parts := _laid_end_to_end(node, before)):
        return parts
    if kind == "join" and node.op.name == "stack":
        axis = _argument(node, 1, "dim", 0) % len(shape)
        return (*before[:axis], _axis(shape[axis], "unknown"), *before[axis:])
    if node.op.name == "unfold" and len(shape) == len(old) + 1:  # windows that slide along an axis
        inner = tuple(_resized(item, size) for item, size in zip(before, shape[:-1], strict=True))
        return (*inner, _axis(shape[-1], "position"))
    if node.op.name in _REDUCING and len(shape) < len(old):
        gone = _reduced(node, len(old))
        return tuple(item for number, item in enumerate(before) if number not in gone)
    if len(shape) > len(old):  # broadcast against something with more axes
        return (
            *(_axis(size, "unknown") for size in shape[: len(shape) - len(old)]),
            *(
                _resized(item, size)
                for item, size in zip(before, shape[len(shape) - len(old) :], strict=True)
            ),
        )
    if len(shape) < len(old):
        return unknown(shape)
    return tuple(_resized(item, size) for item, size in zip(before, shape, strict=True))


def _resized(axis: Axis, size: int) -> Axis:
    """An axis that was cut, joined or expanded to `size`: inner factors stay where they still divide it."""
    if _length(axis) == size:
        return axis
    if not axis:
        return _axis(size, "unknown")
    kept: list[Atom] = []
    rest = size
    for atom in reversed(axis[1:]):
        if rest % atom.size:
            return _axis_like(axis[0], size)
        kept.insert(0, atom)
        rest //= atom.size
    return (*_axis_like(axis[0], rest), *kept)


def _regrouped(before: Axes, shape: Sequence[int]) -> Axes:
    """Row-major regrouping of factors, which are split where a new axis ends inside one."""
    if not numel(shape):
        return unknown(shape)
    atoms = [atom for axis in before for atom in axis]
    out: list[Axis] = []
    for size in shape:
        here: list[Atom] = []
        need = size
        while need > 1:
            if not atoms:
                return unknown(shape)
            atom = atoms.pop(0)
            if need % atom.size == 0:
                here.append(atom)
                need //= atom.size
            elif atom.size % need == 0:
                here.append(replace(atom, size=need, step=atom.step * (atom.size // need)))
                atoms.insert(0, atom.sized(atom.size // need))
                need = 1
            else:
                return unknown(shape)
        out.append(tuple(here))
    return tuple(out)


def _laid_end_to_end(node: Node, before: Axes) -> Axes | None:
    """The axes of slices of one tensor's features that were joined along another axis: heads in front of a batch."""
    parents = {ref.node.operands[0].node.serial for ref in node.operands if ref.node.op.kind == "slice"}
    shapes = {ref.shape for ref in node.operands}
    if len(node.operands) < 2 or len(parents) != 1 or len(shapes) != 1:
        return None
    if any(ref.node.op.kind != "slice" for ref in node.operands):
        return None
    (shape,), whole = shapes, node.operands[0].node.operands[0].shape
    if len(whole) != len(shape):
        return None
    cut = [place for place, (size, was) in enumerate(zip(shape, whole, strict=True)) if size != was]
    joined = [place for place, (size, now) in enumerate(zip(shape, node.shape, strict=True)) if size != now]
    if (
        len(cut) != 1
        or len(joined) != 1
        or cut == joined
        or whole[cut[0]] != shape[cut[0]] * len(node.operands)
    ):
        return None
    if not before[cut[0]] or any(atom.kind != "feature" for atom in before[cut[0]]):
        return None
    heads = Atom(len(node.operands), "feature")
    return tuple((heads, *axis) if place == joined[0] else axis for place, axis in enumerate(before))


def _tears(before: Axes, shape: Sequence[int]) -> bool:
    """Whether a view of (…, T, E) puts heads in front of the tokens: (…, H, T, D), with no permutation between.

    Then E no longer ends where an axis ends: one new axis holds some of the tokens and some of their features. That
    alone is no mistake, as (…, T·H, D) with queries folded beside their heads shows: there it holds all tokens.
    """
    inner = len(before)
    while inner and all(atom.kind == "feature" for atom in before[inner - 1]):
        inner -= 1
    features = numel([_length(axis) for axis in before[inner:]])
    if not inner or features <= 1 or any(atom.kind != "position" for atom in before[inner - 1]):
        return False
    ends, end = set(), features
    for axis in reversed(before[:inner]):
        end *= _length(axis)
        ends.add(end)
    low = 1
    for place in reversed(range(len(shape))):
        high = low * shape[place]
        if low < features < high:
            if features % low:  # more heads than tokens
                return high in ends and features % shape[place] == 0
            heads = shape[place - 1] if place else 1
            return high not in ends and heads > 1 and features % (low * heads) == 0
        low = high
    return False


def _torn(found: Axes) -> Axes:
    return tuple(tuple(replace(atom, torn=True) for atom in axis) for axis in found)


def mixes_tokens(axis: Axis) -> bool:
    """Whether what should be tokens are slices of tokens: some features of each, beside one another."""
    kinds = {atom.kind for atom in axis}
    return any(atom.torn for atom in axis) and ("unknown" in kinds or {"position", "feature"} <= kinds)


def _order(node: Node, rank: int) -> list[int] | None:
    name = node.op.name
    order = list(range(rank))
    if name in ("t", "numpy_T"):
        return order[::-1]
    if name in ("transpose", "swapaxes", "transpose_copy"):
        first, second = _argument(node, 1, "dim0", 0) % rank, _argument(node, 2, "dim1", 1) % rank
        order[first], order[second] = order[second], order[first]
        return order
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dims")
    return [dim % rank for dim in dims] if isinstance(dims, (list, tuple)) else None


def _dropped(node: Node, rank: int) -> int:
    position = 1
    default = 0
    return _argument(node, position, "dim", default) % rank


def _reduced(node: Node, rank: int) -> set[int]:
    """The axes that a reduction takes away."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(dims, int):
        dims = (dims,)
    return {dim % rank for dim in dims} if isinstance(dims, (list, tuple)) else set(range(rank))


def _argument(node: Node, position: int, name: str, default: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return value if isinstance(value, int) else default


def unknown(shape: Sequence[int]) -> Axes:
    return tuple(_axis(size, "unknown") for size in shape)


def _length(axis: Axis) -> int:
    return numel([atom.size for atom in axis])


def numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def of_product(name: str, first: Axes, second: Axes, shape: Sequence[int]) -> Axes:
    """The axes of a matrix product's output, its atoms marked with the side that they come from."""
    if name in ("mm", "addmm") and len(first) == len(second) == 2:
        return marked((), first[0], second[1])[1:]
    if name in ("bmm", "baddbmm") and len(first) == len(second) == 3:
        return marked(better(first[0], second[0]), first[1], second[2])
    if name in ("linear", "matmul") and len(first) >= 2 and len(second) == 2 and len(shape) == len(first):
        columns = second[0] if name == "linear" else second[1]
        of_all = marked((), tuple(a for axis in first[:-1] for a in axis), columns)
        return (*_regrouped((of_all[1],), shape[:-1]), of_all[2])
    if name in ("mv", "addmv") and len(first) == 2:
        return marked((), first[0], ())[1:2]
    return unknown(shape)


def better(first: Axis, second: Axis) -> Axis:
    """The batch axis of a product as both sides know it: factor by factor, heads where either side has them.

    Keys that were repeated for their group of queries no longer show what a factor is; the queries do. An axis
    that cannot be cut into common factors stays as the side sees it that knows more.
    """
    left, right = list(first), list(second)
    out: list[Atom] = []
    while left and right:
        one, other = left.pop(), right.pop()
        size = min(one.size, other.size)
        if not size or max(one.size, other.size) % size:
            return _knowing(first, second)
        if one.size > size:
            left.append(one.sized(one.size // size))
        if other.size > size:
            right.append(other.sized(other.size // size))
        kinds = {one.kind, other.kind}
        kind: Kind = "feature" if "feature" in kinds else "position" if "position" in kinds else "unknown"
        out.insert(0, Atom(size, kind))
    return _knowing(first, second) if left or right else tuple(out)


def _knowing(first: Axis, second: Axis) -> Axis:
    def rank(axis: Axis) -> tuple[bool, bool]:
        return (not any(a.kind == "unknown" for a in axis), any(a.kind == "feature" for a in axis))

    return max((first, second), key=rank)


def marked(batch: Axis, rows: Axis, columns: Axis) -> Axes:
    """The three axes of a product's output, their atoms marked with the one they lie on and their steps."""
    three = (batch, rows, columns)
    marks: tuple[Literal["batch", "rows", "columns"], ...] = ("batch", "rows", "columns")
    found: list[Axis] = []
    step = 1
    for axis, mark in zip(reversed(three), reversed(marks), strict=True):
        atoms: list[Atom] = []
        for atom in reversed(axis):
            atoms.insert(0, Atom(atom.size, atom.kind, mark, step))
            step *= atom.size
        found.insert(0, tuple(atoms))
    return tuple(found)


# --- tables -------------------------------------------------------------------------------------------

_DROPPING = frozenset(("select", "unbind", "select_copy", "unbind_copy"))
_REDUCING = frozenset(("sum", "mean", "amax", "amin", "max", "min", "logsumexp", "prod"))
# Longer walks lead through a residual stream, not to a projection.
_LONGEST = 400
