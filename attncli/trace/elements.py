"""Elements that are not finite: what kinds a tensor holds, and which of them nothing bad went into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attncli.trace.ops import Op
from attncli.trace.tape import Ran


def at_once(tensor: Tensor) -> tuple[float, float]:
    """Smallest and largest element, NaN where there is one."""
    tensor = _comparable(tensor)
    if tensor.device.type == "cpu" and not tensor.is_contiguous():
        return float(tensor.amin()), float(tensor.amax())  # each faster than both in one pass over strides
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    return low, high


def kinds_of(tensor: Tensor) -> tuple[str, ...]:
    """Which of "nan", "+inf" and "-inf" a tensor holds."""
    tensor = _comparable(tensor)
    found = torch.stack(
        (torch.isnan(tensor).any(), torch.isposinf(tensor).any(), torch.isneginf(tensor).any())
    )
    return tuple(kind for kind, there in zip(("nan", "+inf", "-inf"), found.tolist(), strict=True) if there)


def finite(tensor: Tensor) -> Tensor:
    """Where a tensor is finite, element by element."""
    return torch.isfinite(tensor.float() if tensor.dtype in _NOT_COMPARED else tensor)


def _comparable(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, and dtypes of eight bits in float32."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.detach().resolve_conj())
    return tensor.float() if tensor.dtype in _NOT_COMPARED else tensor


def of_kind(tensor: Tensor, kind: str) -> Tensor:
    """Where a tensor holds this kind of value; a complex number does where one of its parts does."""
    if tensor.is_complex():
        return of_kind(_comparable(tensor), kind).any(-1)
    if tensor.dtype in _NOT_COMPARED:
        tensor = tensor.float()
    if kind == "nan":
        return torch.isnan(tensor)
    return torch.isposinf(tensor) if kind == "+inf" else torch.isneginf(tensor)


def explaining(
    op: Op, operands: Sequence[tuple[Tensor, Sequence[str]]], run: Ran, output: Tensor
) -> set[tuple[int, str]]:
    """Which kinds of which operands the NaN of an output comes from: (number of the operand, kind).

    By element where the operator works by element, by row for a softmax; otherwise NaN explains NaN, and only where
    there is none does Inf.
    """
    found = [(number, kind) for number, (_, kinds) in enumerate(operands) for kind in kinds]
    nan = torch.isnan(output)
    if op.kind in ("softmax", "log softmax"):
        scores = operands[0][0]
        axis = _axis(run)
        rows = nan.any(axis, keepdim=True)
        sources = {kind for kind in ("nan", "+inf") if bool((of_kind(scores, kind) & rows).any())}
        if bool((torch.isneginf(scores).all(axis, keepdim=True) & rows).any()):
            sources.add("-inf")
        return {(0, kind) for kind in sources}
    if op.kind in _ELEMENTWISE or op.name in _ELEMENTWISE_NAMES:
        try:
            places = {
                (n, kind): of_kind(operands[n][0], kind).expand(output.shape) & nan for n, kind in found
            }
        except RuntimeError:
            places = {}  # shapes that are not broadcast
        left = nan.clone()
        for (_, kind), place in places.items():
            if kind == "nan":
                left &= ~place
        if places:
            # Where an operand is NaN already, an Inf beside it explains nothing.
            return {
                one
                for one, place in places.items()
                if bool((place if one[1] == "nan" else place & left).any())
            }
    telling = {(number, kind) for number, kind in found if kind == "nan"}
    return telling or set(found)


def fine_elements(
    op: Op, operands: Sequence[tuple[Tensor, tuple[str, ...]]], run: Ran, output: Tensor
) -> Tensor | None:
    """For each element of the output, whether all that went into it was finite; None where that is not known.

    `operands`: the values before the operator ran, each with the kinds of bad values that stand there on
    purpose: those count as finite.
    """
    masks = [
        _fine(value, intended) if value.is_floating_point() or value.is_complex() else None
        for value, intended in operands
    ]
    if op.kind == "product" and op.name in _PRODUCTS:
        return _of_product(op, masks, output)
    if op.kind in ("softmax", "log softmax"):
        mask = masks[0]
        return None if mask is None else mask.all(_axis(run), keepdim=True).expand(output.shape)
    if op.kind in _ELEMENTWISE or op.name in _ELEMENTWISE_NAMES:
        fine = torch.ones(output.shape, dtype=torch.bool, device=output.device)
        for mask in masks:
            if mask is None:
                continue
            try:
                fine = fine & mask.expand(output.shape)
            except RuntimeError:
                return None
        return fine
    return None


def _fine(value: Tensor, intended: Sequence[str]) -> Tensor:
    if value.dtype in _NOT_COMPARED:
        value = value.float()
    fine = finite(value)
    if value.is_complex():
        return fine
    if "+inf" in intended:
        fine = fine | torch.isposinf(value)
    if "-inf" in intended:
        fine = fine | torch.isneginf(value)
    return fine


def _axis(run: Ran) -> int:
    return run.args[1] if len(run.args) > 1 and isinstance(run.args[1], int) else -1


def _of_product(op: Op, masks: Sequence[Tensor | None], output: Tensor) -> Tensor | None:
    first, second = masks[-2:]
    if first is None or second is None:
        return None
    rows = first.all(-1)
    if op.name in ("mm", "bmm", "addmm", "baddbmm"):
        fine = rows[..., None] & second.all(-2)[..., None, :]
    elif op.name in ("mv", "addmv"):
        fine = rows & second.all()
    else:
        return None
    if len(masks) == 3 and masks[0] is not None:
        fine = fine & masks[0].expand(fine.shape)
    return fine if fine.shape == output.shape else None


# --- tables -------------------------------------------------------------------------------------------

_PRODUCTS = frozenset(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv"))
_ELEMENTWISE = frozenset(
    ("factor", "sum", "negative", "cap", "clamp", "exponential", "sigmoid", "relu", "same")
)
_ELEMENTWISE_NAMES = frozenset(
    "sqrt rsqrt log log2 log10 log1p pow reciprocal square abs expm1 where masked_fill addcmul addcdiv lerp "
    "gelu silu erf sin cos tan atan softplus logaddexp hypot atan2 threshold hardswish elu mish xlogy".split()
)
_NOT_COMPARED = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
