"""The self-check: a sample of rows is recomputed from what was captured and compared with what the model got.

A call that does not come out the same was not understood, and is reported as not observed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attncli.trace.factors import Path, Step
from attncli.trace.zero_one import added_shape

if TYPE_CHECKING:
    from attncli.trace.products import Product


class Answer(NamedTuple):
    """`difference`: the largest, relative to the largest value of the rows compared; None: nothing to compare."""

    explained: bool
    difference: float | None
    reason: str


def fused(difference: float, dtype: torch.dtype) -> Answer:
    """Judges the difference between a fused kernel's output and its recomputed rows."""
    if difference <= tolerance(dtype):
        return Answer(True, difference, "")
    return Answer(False, difference, f"recomputed rows differ from the kernel's output by {difference:.2g}")


def fused_with_dropout(difference: float | None, dtype: torch.dtype) -> Answer:
    """Judges a call whose output holds random zeros. `difference`: of the kernel's logsumexp of sampled rows.

    The scores do not depend on dropout, so a call without a logsumexp counts, but says that nothing was compared.
    """
    if difference is None:
        return Answer(
            True, None, "dropout changes its output and no logsumexp was given: no row was compared"
        )
    if difference <= tolerance(dtype):
        return Answer(True, difference, "")
    return Answer(
        False, difference, f"the logsumexp of recomputed rows differs from the kernel's by {difference:.2g}"
    )


def softmax_rows(scores: Tensor, probs: Tensor, rows: int = 16) -> Answer:
    """Whether `probs` are the softmax of `scores` over the last axis, on a sample of rows."""
    if scores.shape != probs.shape or scores.numel() == 0:
        return Answer(True, None, "")
    at = _indices(scores.shape[:-1], rows, scores.device)
    given = scores[at].double() if scores.device.type != "mps" else scores[at].float()
    expected = given.softmax(-1)
    # A row that may attend to nothing has no softmax; kernels return zeros there, or NaN.
    nothing = (given == -math.inf).all(-1, keepdim=True)
    difference = _largest_difference(
        expected.masked_fill(nothing, 0), probs[at].to(given.dtype).masked_fill(nothing, 0)
    )
    if difference <= tolerance(probs.dtype):
        return Answer(True, difference, "")
    return Answer(
        False, difference, f"the probabilities differ from the softmax of the scores by {difference:.2g}"
    )


def score_rows(
    scores: Tensor, product: Product, path: Path, visible_above: float, rows: int = 16
) -> Answer | None:
    """Whether q·k, scaled and masked along `path`, gives `scores`. None where the way cannot be repeated."""
    if path.scale is None or not _repeatable(path, product, scores):
        return None
    first, second = product.first.tensor, product.second.tensor
    if first is None or second is None or first.dim() != second.dim():
        return None
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    made = product.node.shape
    at = _indices(made[:-1], rows, scores.device)
    rows_RD = first[at].to(wide)
    columns = second[at[0]] if second.dim() == 3 else second
    expected = torch.einsum("rd,rds->rs" if columns.dim() == 3 else "rd,ds->rs", rows_RD, columns.to(wide))
    expected, unsure = _stored(expected, product.node.dtype)
    flat = _flat(made[:-1], at)
    for step in path.steps:
        shape = step.node.shape
        there = _unflat(shape[:-1], flat)
        if step.kind == "factor" and isinstance(step.value, float):
            expected, close = _stored(expected * step.value, step.node.dtype)
            unsure = unsure | close
        elif step.kind == "cap":
            expected = expected.tanh()
        elif step.kind in ("sum", "shift"):
            expected = expected + _rows_of(step.value, shape, there, wide)
        elif step.kind == "fill" and step.mask is not None:
            mask = step.mask.expand(shape)[there]
            expected = torch.where(mask, _rows_of(step.value, shape, there, wide), expected)
    got = scores[_unflat(tuple(scores.shape[:-1]), flat)].to(wide)
    visible = (expected > visible_above) & (got > visible_above) & ~unsure
    difference = _largest_difference(expected.where(visible, 0), got.where(visible, 0))
    # Scores are rounded to their dtype by each step on their way.
    allowed = tolerance(product.node.dtype) * (1 + len(path.steps))
    if difference <= allowed:
        return Answer(True, difference, "")
    return Answer(False, difference, f"recomputed scores differ by {difference:.2g}")


@dataclass(slots=True)
class Masks:
    """What additive tensors are: masks, or biases that scores may legitimately carry. Remembered per run."""

    _known: dict[int, tuple[float | None, bool]] = field(default_factory=dict)

    def visible_above(self, path: Path, reach: float | None, dtype: torch.dtype) -> float:
        """The score at or below which an entry is masked.

        `reach`: the largest magnitude that scaling q·k makes; a mask has to lie clearly beyond it.
        """
        lowest = -_MASKED if reach is None or reach < _MASKED / 2 else -2 * reach
        fills = self._fills(path)
        if not fills or reach is None:
            return lowest
        mildest = max(fills)
        bias = 0.0 if not self.has_bias(path) else _ROOM_FOR_BIAS
        return mildest / 2 if reach + bias < -mildest / 2 else lowest

    def _fills(self, path: Path) -> list[float]:
        """The values that hide keys, as they are in the end: a mask may be applied before the scale."""
        fills: list[float] = []
        for step in path.steps:
            if step.kind == "factor" and isinstance(step.value, float):
                fills = [fill * step.value for fill in fills]
            elif (fill := self._fill(step)) is not None:
                fills.append(fill)
        return fills

    def has_bias(self, path: Path) -> bool:
        """Whether anything finite that is no mask was added to the scores."""
        return any(self._bias(step) for step in path.steps)

    def added_shape(self, path: Path, visible: str) -> str | None:
        """The shape of a mask of zeros and ones that was added to the scores, which hides nothing."""
        tensors = (step.value for step in path.steps if step.kind == "sum")
        shapes = (added_shape(tensor, visible) for tensor in tensors if isinstance(tensor, Tensor))
        return next((shape for shape in shapes if shape is not None), None)

    def hides(self, step: Step) -> float | None:
        """The value at or below which what this step fills in or adds hides a key; None where it hides none."""
        if step.kind == "fill":
            return step.value if isinstance(step.value, float) and step.value <= -_MILD else None
        if step.kind != "sum" or not isinstance(step.value, Tensor):
            return None
        mildest = self._additive(step)[0]
        return -_MASKED if mildest is None else max(mildest, -_MASKED)

    def _fill(self, step: Step) -> float | None:
        """The value that hides a key, where this step is a mask."""
        if step.kind == "fill":
            value = step.value
            if isinstance(value, Tensor):
                value = float(value.flatten()[0]) if value.numel() == 1 else None
            return value if value is not None and value <= -_MILD and math.isfinite(value) else None
        if step.kind == "sum" and isinstance(step.value, Tensor):
            return self._additive(step)[0]
        return None

    def _bias(self, step: Step) -> bool:
        if step.kind != "sum":
            return False
        if isinstance(step.value, Tensor):
            return self._additive(step)[1]
        return step.value is None

    def _additive(self, step: Step) -> tuple[float | None, bool]:
        tensor = step.value
        assert isinstance(tensor, Tensor)
        known = self._known.get(step.key) if step.key is not None else None
        if known is None:
            known = _read_additive(tensor)
            if step.key is not None:
                self._known[step.key] = known
        return known


def tolerance(dtype: torch.dtype) -> float:
    """How far a faithful repetition may be off, relative to the largest value: some units of rounding."""
    return _TOLERANCE.get(dtype, 1e-3)


# --- helpers ------------------------------------------------------------------------------------------


def _read_additive(tensor: Tensor) -> tuple[float | None, bool]:
    """(the value that masks, whether there is a bias) of a tensor that is added to scores."""
    if tensor.numel() == 0 or tensor.is_complex():
        return None, False
    if not tensor.is_floating_point():
        tensor = tensor.float()
    lowest = tensor.amin()
    # −100 everywhere or 0 is a mask (shifted windows); −1, −2, −3 … are biases (ALiBi).
    other = (tensor != 0) & (tensor != lowest)
    facts = torch.stack(
        [
            lowest.double() if tensor.device.type != "mps" else lowest,
            other.any().to(lowest.dtype).double()
            if tensor.device.type != "mps"
            else other.any().to(lowest.dtype),
            (other & (tensor > -_MASKED)).any().double()
            if tensor.device.type != "mps"
            else (other & (tensor > -_MASKED)).any().to(lowest.dtype),
        ]
    ).tolist()
    low, two_valued, bias = facts[0], not facts[1], bool(facts[2])
    if low <= -_MASKED or (two_valued and low <= -_MILD):
        return (max(low, -3e38) if math.isfinite(low) else None), bias
    return None, bool(low != 0 or not two_valued)


def _stored(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values as `dtype` would hold them where they overflow, and those so near to it that rounding decides."""
    largest = torch.finfo(dtype).max
    size = values.abs()
    infinite = torch.full_like(values, math.inf).copysign(values)
    return torch.where(size > largest, infinite, values), (size > 0.99 * largest) & (size < 1.01 * largest)


def _repeatable(path: Path, product: Product, scores: Tensor) -> bool:
    """Whether the scores lie in the order of the product, and every step on their way can be repeated."""
    made = product.node.shape
    if math.prod(made) != scores.numel() or not made or made[-1] != scores.shape[-1]:
        return False
    if product.node.op.name not in ("mm", "bmm", "addmm", "baddbmm"):
        return False
    for step in path.steps:
        if math.prod(step.node.shape) != scores.numel() or step.node.shape[-1:] != made[-1:]:
            return False
        if step.kind in ("other", "shape"):
            return False
        if step.kind == "sum" and step.value is None:
            return False
        if step.kind == "fill" and (step.mask is None or step.value is None):
            return False
        if step.kind == "factor" and step.value is None:
            return False
    return not path.permuted


def _rows_of(value: Any, shape: Sequence[int], at: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.expand(tuple(shape))[at].to(dtype)
    return torch.tensor(value, dtype=dtype, device=at[0].device if at else None)


def _indices(shape: Sequence[int], rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """`rows` indices spread over all leading axes, the first and the last among them."""
    total = math.prod(shape)
    flat = torch.linspace(0, total - 1, min(rows, total), device="cpu").round().long().to(device)
    return _unflat(shape, flat)


def _unflat(shape: Sequence[int], flat: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.unravel_index(flat, tuple(shape))) if shape else ()


def _flat(shape: Sequence[int], at: tuple[Tensor, ...]) -> Tensor:
    flat = torch.zeros_like(at[0]) if at else torch.zeros(1, dtype=torch.long)
    for size, index in zip(shape, at, strict=True):
        flat = flat * size + index
    return flat


def _largest_difference(expected: Tensor, got: Tensor) -> float:
    """Relative to the largest expected value; NaN and Inf that stand at the same places are no difference."""
    same = (expected == got) | (expected.isnan() & got.isnan())
    apart = torch.where(same, 0, (expected - got).abs())
    if not apart.numel():
        return 0.0
    scale = torch.where(expected.isfinite(), expected.abs(), 0).amax()
    worst, size = torch.stack([apart.nan_to_num(math.inf).amax(), scale]).tolist()
    return float(worst) / (float(size) + 1e-6) if worst else 0.0


# --- tables -------------------------------------------------------------------------------------------

# Additive values and fills from here down hide a key whatever its score: −1e4, −1e9, finfo.min, −inf.
_MASKED = 9000.0
# A tensor of zeros and one value from here down is a mask as well: Swin's windows use −100.
_MILD = 50.0
# Relative position biases stay well inside this.
_ROOM_FOR_BIAS = 20.0

_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 2e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
