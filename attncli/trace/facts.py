"""Numbers taken at the spot where a bad value was born: what went in there, in float64, and what came out.

One reader per family of operators. What is taken is small: the operands at one element, one row, one dot product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attncli.trace.ops import Op
from attncli.trace.tape import Ran, Ref


class Given(NamedTuple):
    """One tensor operand: what the tape knows of it, and its value before the operator ran."""

    ref: Ref
    value: Tensor


Facts = dict[str, Any]


def facts_of(op: Op, given: Sequence[Given], run: Ran | None, output: Tensor, where: Tensor) -> Facts:
    """`where`: the bad elements of the output that were born here. Facts hold numbers, strings and lists of them.

    `index`: the first of them, `count`, `of`: all elements, `result`: what stands there.
    """
    index = where.nonzero()[0].tolist()
    facts: Facts = {
        "index": index,
        "count": int(where.sum()),
        "of": output.numel(),
        "shape": list(output.shape),
        "result": _number(output[tuple(index)]),
        "dtype": str(output.dtype).removeprefix("torch."),
    }
    if run is None:
        facts.update(_of_leaf(output, where))
        return facts
    reader = _READERS.get(op.name) or _BY_KIND.get(op.kind) or _elementwise
    try:
        facts.update(reader(op, given, run, index, output, where))
    except (RuntimeError, IndexError, TypeError, ValueError):
        # A shape that the reader does not expect: the place and the count still stand.
        facts["operands"] = _extremes(given)
    return facts


def _of_leaf(tensor: Tensor, where: Tensor) -> Facts:
    """Along which axis the bad elements are whole slices: rows of a table, slots of a cache."""
    plain = tensor if tensor.is_complex() else tensor.float()
    found: Facts = {"nan": int(torch.isnan(plain).sum()), "inf": int(torch.isinf(plain).sum())}
    for axis in range(tensor.dim()):
        others = [other for other in range(tensor.dim()) if other != axis]
        if not others:
            continue
        whole, some = where, where
        for other in sorted(others, reverse=True):
            whole, some = whole.all(other), some.any(other)
        if bool(some.any()) and bool((whole == some).all()) and not bool(whole.all()):
            slots = whole.nonzero().flatten().tolist()
            found["axis"], found["slots"] = axis, slots[:_MOST_LISTED]
            break
    return found


def _product(
    op: Op, given: Sequence[Given], run: Ran, index: list[int], output: Tensor, where: Tensor
) -> Facts:
    """The dot product of one element in float64, before anything was added to it."""
    first, second = given[-2].value, given[-1].value
    if op.name in ("mm", "bmm", "addmm", "baddbmm"):
        index = _worst(first, second, where)
    if op.name in ("mv", "addmv"):
        row, column = first[index[-1]], second
    elif op.name == "dot":
        row, column = first, second
    else:
        row = first[tuple(index[:-1])]
        column = second.transpose(-1, -2)[tuple(index[:-2] + index[-1:])]
    terms = _wide(row) * _wide(column)
    facts: Facts = {
        "index": index,
        # The largest number on the way, in whatever order a kernel adds up.
        "partial": float(terms.abs().sum()),
        "contracted": row.numel(),
        "exact": float(_wide(row) @ _wide(column)),
        "row_absmax": float(_wide(row).abs().amax()) if row.numel() else 0.0,
        "column_absmax": float(_wide(column).abs().amax()) if column.numel() else 0.0,
        "operands": _extremes(given),
    }
    alpha, beta = run.kwargs.get("alpha", 1), run.kwargs.get("beta", 1)
    facts["exact"] *= float(alpha)
    if len(given) == 3 and beta != 0:
        facts["added"] = _number(_at(given[0].value, index, output.shape)) * float(beta)
    return facts


def _worst(first: Tensor, second: Tensor, where: Tensor) -> list[int]:
    """Of the bad elements of a matrix product (of very many, a sample), the one whose dot product is largest."""
    places = where.nonzero()
    places = places[:: max(1, len(places) // _MOST_COMPARED)]
    axes = places.unbind(-1)
    rows = _wide(first[axes[:-1]])
    columns = _wide(second.transpose(-1, -2)[axes[:-2] + axes[-1:]])
    found: list[int] = places[(rows * columns).sum(-1).abs().nan_to_num(0.0).argmax()].tolist()
    return found


def _elementwise(
    op: Op, given: Sequence[Given], run: Ran, index: list[int], output: Tensor, where: Tensor
) -> Facts:
    facts: Facts = {"operands": _extremes(given)}
    values: list[float | None] = []
    for one in given:
        try:
            values.append(_number(_at(one.value, index, output.shape)))
        except (RuntimeError, IndexError):
            values.append(None)
    facts["values"] = values
    facts["names"] = [one.ref.node.parameter for one in given]
    scalars = [
        value
        for value in (*run.args, *run.kwargs.values())
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    facts["scalars"] = [float(value) for value in scalars]
    facts["from_dtype"] = str(given[0].value.dtype).removeprefix("torch.") if given else None
    return facts


def _row(op: Op, given: Sequence[Given], run: Ran, index: list[int], output: Tensor, where: Tensor) -> Facts:
    """The row that a softmax normalises. `rows`: how many rows hold bad values; `first_rows`: their places."""
    axis = run.args[1] if len(run.args) > 1 and isinstance(run.args[1], int) else -1
    scores = given[0].value
    place: list[Any] = list(index)
    place[axis] = slice(None)
    row = _wide(scores[tuple(place)])
    finite = row[torch.isfinite(row)]
    rows = where.movedim(axis, -1).any(-1)
    return {
        "axis": axis % scores.dim(),
        "keys": row.numel(),
        "minus_inf": int(torch.isneginf(row).sum()),
        "plus_inf": int(torch.isposinf(row).sum()),
        "nan": int(torch.isnan(row).sum()),
        "row_max": float(finite.amax()) if finite.numel() else None,
        "row_min": float(finite.amin()) if finite.numel() else None,
        "rows": int(rows.sum()),
        "of_rows": rows.numel(),
        "first_rows": rows.nonzero()[:_MOST_LISTED].tolist(),
        "operands": _extremes(given),
    }


def _reduction(
    op: Op, given: Sequence[Given], run: Ran, index: list[int], output: Tensor, where: Tensor
) -> Facts:
    """What was reduced to one element: how many numbers, their extremes, their sum and sum of squares."""
    value = given[0].value
    dims = _axes(op, run)
    if dims is None:
        part = value
    else:
        gone = {d % value.dim() for d in dims}
        kept = [d for d in range(value.dim()) if d not in gone]
        keep = output.dim() == value.dim()
        at = [index[d] for d in kept] if keep else index
        place: list[Any] = [slice(None)] * value.dim()
        for d, i in zip(kept, at, strict=True):
            place[d] = i
        part = value[tuple(place)]
    part = _wide(part.flatten())
    return {
        "reduced": part.numel(),
        "absmax": float(part.abs().amax()) if part.numel() else None,
        "sum": float(part.sum()),
        "squares": float((part * part).sum()),
        "operands": _extremes(given),
        "correction": run.kwargs.get("correction", 1 if op.name in ("std", "var") else None),
    }


def _axes(op: Op, run: Ran) -> list[int] | None:
    """The axes that a reduction takes away; None: all of them."""
    for value in (*run.args[1:], run.kwargs.get("dim")):
        if isinstance(value, (list, tuple)) and value and all(type(axis) is int for axis in value):
            return list(value)
    first = run.args[1] if len(run.args) > 1 else None
    return [first] if type(first) is int and op.name in ("cumsum", "prod", "amax", "amin") else None


def _losses(
    op: Op, given: Sequence[Given], run: Ran, index: list[int], output: Tensor, where: Tensor
) -> Facts:
    """Labels of a negative log-likelihood: how many count, and the smallest log-probability that was picked."""
    logs, targets = given[0].value, given[1].value
    ignored = next((a for a in run.args[::-1] if type(a) is int and a not in (0, 1, 2)), -100)
    counted = targets != ignored
    facts: Facts = {"labels": int(counted.sum()), "of_labels": targets.numel(), "operands": _extremes(given)}
    if logs.dim() == 2 and bool(counted.any()):
        picked = logs[counted.nonzero().flatten(), targets[counted].clamp(0, logs.size(1) - 1)]
        worst = int(picked.argmin())
        row = int(counted.nonzero().flatten()[worst])
        facts |= {"picked": float(picked[worst]), "row": row, "label": int(targets[row])}
    return facts


def _normalisation(
    op: Op, given: Sequence[Given], run: Ran, index: list[int], output: Tensor, where: Tensor
) -> Facts:
    value = given[0].value
    size = next(
        (a for a in run.args[1:] if isinstance(a, (list, tuple)) and a and all(type(d) is int for d in a)),
        None,
    )
    eps = next((a for a in run.args[::-1] if type(a) is float), None)
    facts: Facts = {"eps": eps, "operands": _extremes(given)}
    if size is not None:
        row = _wide(value[tuple(index[: value.dim() - len(size)])].flatten())
        facts |= {
            "reduced": row.numel(),
            "absmax": float(row.abs().amax()),
            "variance": float(row.var(correction=0)),
        }
    return facts


def _batch_norm(
    op: Op, given: Sequence[Given], run: Ran, index: list[int], output: Tensor, where: Tensor
) -> Facts:
    variance = run.args[4] if len(run.args) > 4 else None
    smallest = float(variance.amin()) if isinstance(variance, Tensor) and variance.numel() else None
    return {"smallest_variance": smallest, "eps": run.args[-1], "operands": _extremes(given)}


# --- helpers ------------------------------------------------------------------------------------------


def _extremes(given: Sequence[Given]) -> list[dict[str, Any]]:
    """Name, shape and largest finite magnitude of each floating operand."""
    found = []
    for one in given:
        value = one.value
        if (
            value.is_floating_point()
            and value.layout == torch.strided
            and not value.is_nested
            and value.numel()
        ):
            finite = torch.nan_to_num(value.detach(), 0.0, 0.0, 0.0)
            found.append(
                {
                    "name": one.ref.node.parameter,
                    "shape": list(value.shape),
                    "absmax": float(finite.abs().amax()),
                    "dtype": str(value.dtype).removeprefix("torch."),
                }
            )
    return found


def _at(value: Tensor, index: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The element of an operand that was broadcast to `shape`."""
    return value.expand(tuple(shape))[tuple(index)] if value.shape != tuple(shape) else value[tuple(index)]


def _number(value: Tensor) -> float:
    """One element; of a complex number its magnitude."""
    return float(value.abs() if value.is_complex() else value)


def _wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = tensor.abs()
    return tensor.detach().float() if tensor.device.type == "mps" else tensor.detach().double()


# --- tables -------------------------------------------------------------------------------------------

Reader = Callable[[Op, Sequence[Given], Ran, list[int], Tensor, Tensor], Facts]

_READERS: dict[str, Reader] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"), _product),
    **dict.fromkeys(
        "_foreach_norm "
        "sum mean var std var_mean std_mean linalg_vector_norm norm prod cumsum logsumexp amax amin nansum".split(),
        _reduction,
    ),
    **dict.fromkeys("nll_loss_forward nll_loss2d_forward nll_loss nll_loss2d".split(), _losses),
    "native_batch_norm": _batch_norm,
    **dict.fromkeys("native_layer_norm _fused_rms_norm native_group_norm rms_norm".split(), _normalisation),
}
_BY_KIND: dict[str, Reader] = {"softmax": _row, "log softmax": _row}

_MOST_LISTED = 8
_MOST_COMPARED = 4096
LARGEST = {
    name: torch.finfo(getattr(torch, name)).max for name in ("float16", "bfloat16", "float32", "float64")
}
SMALLEST = {name: torch.finfo(getattr(torch, name)).smallest_normal for name in LARGEST}
TINIEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}


def exceeds(value: float, dtype: str) -> bool:
    """Whether a number rounds to Inf in `dtype`."""
    largest = LARGEST.get(dtype, math.inf)
    return not abs(value) <= largest
