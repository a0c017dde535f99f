"""What an operator does with NaN and Inf: fills them in, chooses among them, keeps a mask a mask, overwrites.

One row per operator in the tables at the foot; tensors of kinds that cannot be read element by element are named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncli.trace.ops import Op
from attncli.trace.tape import Ran


def is_view(func: Any) -> bool:
    return bool(getattr(func, "is_view", False))


def is_finite(value: float) -> bool:
    return value - value == 0.0


def is_readable(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
        return False
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.numel() > 0


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments, in the order of the operands on the tape."""
    return [value for value in _flat((args, tuple(kwargs.values()))) if isinstance(value, Tensor)]


def literals_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[str]:
    """The kinds of bad values that the code wrote out as numbers."""
    found = set()
    for value in _flat((args, tuple(kwargs.values()))):
        if isinstance(value, float) and not is_finite(value):
            found.add("nan" if value != value else "+inf" if value > 0 else "-inf")
    return found


def grouped(op: Op, args: Sequence[Any], outputs: int) -> list[list[int]] | None:
    """For an operator on lists, which tensor operands belong to each output; None for any other operator."""
    if not op.name.startswith(("_foreach", "_fused")):
        return None
    groups: list[list[int]] = [[] for _ in range(outputs)]
    position = 0
    for value in args:
        tensors = [one for one in _flat(value) if isinstance(one, Tensor)]
        several = isinstance(value, (list, tuple)) and len(tensors) > 1
        for number, _ in enumerate(tensors):
            for output in [number % outputs] if several else range(outputs):
                groups[output].append(position)
            position += 1
    return groups


def overwritten(op: Op, run: Ran, position: int, tensor: Tensor) -> bool:
    """Whether the old value of an operand has no part in the result."""
    if tensor is run.kwargs.get("out"):
        return True
    return position == 0 and bool(op.writes) and op.name in _OVERWRITING


def keeps_fills(op: Op, bad: Sequence[bool]) -> bool:
    """Whether −Inf that was filled in to hide something still hides it after this operator.

    `bad`: for each operand, whether it holds any.
    """
    if op.product:
        # A mask may be what a product is added to; as a factor it gets into sums.
        return op.name.startswith(("add", "badd")) and not any(bad[1:])
    # What a kernel of someone else's does with a mask is its own affair.
    opaque = bool(op.full_name) and not op.full_name.startswith("aten::")
    return opaque or op.kind in _KEEP_FILLS or op.name in _KEEPING_FILLS


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


# --- tables -------------------------------------------------------------------------------------------

# Integers made of the order of numbers: where several are Inf the order is lost.
CHOOSES = frozenset(("argmax", "argmin", "argsort"))
_OVERWRITING = frozenset(
    "copy fill zero normal uniform random bernoulli exponential geometric cauchy log_normal set resize".split()
)
POISONED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
UNWRITTEN = frozenset(
    ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
)
# Operators whose literal ±Inf is something the author wrote down.
FILLS = frozenset(("fill", "factor", "sum", "other", "like", "pad", "clamp"))
# Operators that choose among values: what they do not choose harms nothing.
SELECTS = frozenset(
    ("fill", "clamp", "slice", "lookup", "reshape", "permute", "expand", "same", "random", "like")
)
SELECTING = frozenset(
    ("topk", "sort", "max", "min", "amax", "amin", "copy", "fill", "zero", "masked_select", "isnan")
)
_KEEP_FILLS = frozenset(
    "fill clamp slice reshape permute expand same join pad repeat factor sum negative softmax exponential sigmoid cap "
    "relu lookup fused".split()
) | {"log softmax"}
_KEEPING_FILLS = frozenset(
    "max min amax amin aminmax topk sort logsumexp logaddexp _softmax_backward_data fill zero scatter "
    "log_sigmoid_forward softplus cummax where sgn abs square pow".split()
)
