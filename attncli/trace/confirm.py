"""Proof of a cause: the step is repeated with one thing changed, and the symptom is looked at again.

A repetition starts from the same parameters, buffers, optimiser states and random numbers. It counts operators as
the tape did, so that "the 214th operator" is the same one. What can be changed is a row of `CHANGES`.

Widening is what a person does who upcasts: from one operator on everything made of its result is computed in
float64 beside the model's own dtype, until it fits that dtype again.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from attncli.trace.causes import (
    DOMAINS,
    SECOND_OPERAND,
    SINGULAR_GRADIENTS,
    Case,
    has_number_as_base,
    log_size,
)
from attncli.trace.facts import LARGEST, exceeds
from attncli.trace.naming import clean
from attncli.trace.ops import op_of
from attncli.trace.origins import user_place
from attncli.trace.pairs import in_backward
from attncli.trace.rewind import Rewind
from attncli.trace.roles import POISONED, UNWRITTEN, is_view, tensors_of
from attncli.trace.said import said
from attncli.trace.tape import Node, is_composite, is_mark, is_number

# Operator, module and line of the user's code: what a person changes when they change a line.
Spot = tuple[str, str, str]


class Alter(NamedTuple):
    """What is done at one operator: `before` gets its tensors, `after` its outputs. Both write in place.

    `everywhere`: also whenever the same line runs again, as in the next batch of an epoch.
    """

    before: Callable[[list[Tensor]], None] | None = None
    after: Callable[[list[Tensor]], None] | None = None
    widen: bool = False
    everywhere: bool = True


@dataclass
class Change:
    """All that is altered in one repetition. `words`: what a reader is told was done.

    `alters`: by the number of an operator; `of_kind`: at every operator of a kind or name, such as each softmax.
    `held`: a parameter and the optimiser step from which on parameters stay as they were. `scaled`: factors for
    parameters, by name, where that step lies before the run.
    """

    words: str
    alters: dict[int, Alter] = field(default_factory=dict)
    of_kind: dict[str, Alter] = field(default_factory=dict)
    around: Callable[[], Any] | None = None
    held: tuple[str, int] | None = None
    scaled: dict[str, float] = field(default_factory=dict)


class Captured(NamedTuple):
    """One operator and copies of what it was given."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Replay(TorchDispatchMode):
    """Runs a step again, altered. `spots`: what stands at the operators of `alters`, found by an earlier repetition.

    `modules`: the stack of module paths. `asked`: operators whose spots are to be found. `siblings`: a line is altered
    in all layers that run it. `_wide`: values in float64 of tensors whose own dtype could not hold them.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        change: Change,
        spots: Mapping[int, Spot],
        modules: Sequence[str],
        *,
        asked: Collection[int] = (),
        capture: int = -1,
        siblings: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        alters = change.alters
        self.of_kind = change.of_kind
        self.alters = {at: alter for at, alter in alters.items() if not (alter.everywhere and at in spots)}
        self._meant = _of_any_layer if siblings else lambda spot: spot
        self.at_spots = {
            self._meant(spots[at]): alter for at, alter in alters.items() if alter.everywhere and at in spots
        }
        self.found: dict[int, Spot] = {}
        self._names = {spot[0] for spot in self.at_spots}
        self._modules, self._asked = modules, asked
        self.captured: Captured | None = None
        self._capture = capture
        self.operators = 0
        self._wide: dict[Any, tuple[StorageWeakRef, Tensor]] = {}
        self.outside = Rewind()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_number(func, args):
            return args[0]
        if is_mark(func):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if self.operators == self._capture:
            self.captured = Captured(func, _copied(tuple(args)), {k: _copied(v) for k, v in kwargs.items()})
        alter = self.alters.get(self.operators)
        op = op_of(func)
        name = op.name
        alter = self.of_kind.get(op.kind) or self.of_kind.get(op.full_name) or alter
        if name in self._names and not in_backward():
            alter = self.at_spots.get(self._meant(self._spot(name))) or alter
        if self.operators in self._asked and not in_backward():
            self.found[self.operators] = self._spot(name)
        self.operators += 1
        if alter is not None and alter.before is not None:
            self._alter(alter.before, tensors_of(args, kwargs))
        widen = bool(self._wide) or (alter is not None and alter.widen)
        before = (
            self._widened(func, args, kwargs, forced=alter is not None and alter.widen) if widen else None
        )
        written = [t for at in op.writes for t in tensors_of(args[at : at + 1], {})]
        for target in written:
            self.outside.protect(target)
        result = func(*args, **kwargs)
        outputs = [t for t in _flat(result) if isinstance(t, Tensor)]
        if not op.writes and not is_view(func):
            for output in outputs:
                self.outside.made(output)
        if name in UNWRITTEN:
            for output in outputs:
                if output.dtype in POISONED and output.device.type != "meta":
                    output.data.fill_(float("nan"))
        if before is not None:
            forced = (alter is not None and alter.widen) or is_view(func)
            self._settle(outputs, [t for t in _flat(before) if isinstance(t, Tensor)], forced)
        elif widen:
            for output in outputs:
                self._wide.pop(_key(output), None)
        if alter is not None and alter.after is not None:
            with torch.no_grad():
                alter.after([*outputs, *written])
        return result

    def _spot(self, name: str) -> Spot:
        now = said()
        return name, now.module if now is not None else self._modules[-1], str(user_place())

    def value(self, tensor: Tensor) -> Tensor:
        """A tensor as the repetition has it: in float64 where its own dtype could not hold it."""
        found = self._wide.get(_key(tensor))
        return found[1] if found is not None else tensor

    def restore(self) -> None:
        """Puts back what the repetition wrote to tensors that outlive it."""
        self.outside.back()

    def _alter(self, before: Callable[[list[Tensor]], None], tensors: list[Tensor]) -> None:
        # By `.data`, which leaves autograd's version counters alone.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of writing to expanded tensors
            for tensor in tensors:
                self.outside.protect(tensor)
            before([t.data for t in tensors])

    def _widened(self, func: Any, args: Any, kwargs: Any, forced: bool) -> Any:
        """The operator on float64 values; None where nothing wide goes in, or where it cannot take them."""
        tensors = [t for t in tensors_of(args, kwargs) if t.is_floating_point()]
        if not forced and not any(_key(t) in self._wide for t in tensors):
            return None

        def wide(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                found = self._wide.get(_key(value))
                return found[1].clone() if found is not None else value.detach().to(torch.float64)
            if isinstance(value, (list, tuple)):
                return type(value)(map(wide, value))
            return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

        try:
            with torch.no_grad():
                return func(*wide(tuple(args)), **{name: wide(value) for name, value in kwargs.items()})
        except (RuntimeError, NotImplementedError, TypeError):
            return None

    def _settle(self, outputs: Sequence[Tensor], wide: Sequence[Tensor], forced: bool) -> None:
        """Takes what fits the model's dtype back into it, and keeps beside it what does not.

        What becomes 0 there does not fit either, where this operator itself is widened: an eps that underflows.
        """
        with torch.no_grad():
            for output, value in zip(outputs, wide, strict=False):
                if value.shape != output.shape:
                    continue
                if not output.is_floating_point():
                    if value.dtype == output.dtype and not _overlaps(output):
                        output.data.copy_(value)
                    continue
                fitting = value.to(output.dtype)
                key = _key(output)
                lost = ~torch.isfinite(fitting)
                if forced:
                    lost |= (fitting == 0) & (value != 0)
                if bool(torch.isfinite(value).all()) and bool(lost.any()):
                    self._wide[key] = (StorageWeakRef(output.untyped_storage()), value)
                else:
                    self._wide.pop(key, None)
                if not _overlaps(output):  # an expanded view shows what its base was given
                    output.data.copy_(fitting)


# --- what can be changed ------------------------------------------------------------------------------


def change_of(case: Case, name: str) -> Change:
    return CHANGES[name](case)


def _finite(case: Case) -> Change:
    return Change(f"with 0 in place of what {case.name} made", {case.origin.at: Alter(after=_cleaned)})


def _replace(case: Case) -> Change:
    origin = case.origin
    what = origin.name or "that tensor"
    if origin.role == "unwritten":
        return Change("with zeros in the reserved memory", {origin.at: Alter(after=_cleaned)})
    return Change(
        f"with 0 in place of the bad elements of {what}",
        {origin.at: Alter(before=lambda tensors: _cleaned([tensors[origin.position]]), everywhere=False)},
    )


def _widen(case: Case) -> Change:
    here = case.origin.node
    alters = {case.origin.at: Alter(widen=True)}
    # An eps that underflowed was lost before this operator.
    for node in _chain(here, 4):
        if node.operands and node.op.kind in ("sum", "factor", "same", "other", "clamp", "norm", "total"):
            alters[node.at] = Alter(widen=True)
    if case.backward:
        alters = {case.origin.at: Alter(widen=True)}
    return Change(f"with {case.name} and what follows in float64 until it fits {case.dtype} again", alters)


def _fit(case: Case) -> Change:
    """Widened where float64 has room for the result and for what is made of it; held small where it has not."""
    if case.seen and (case.dtype == "float64" or log_size(case) > _ROOM):
        return _held_small(case)
    return _widen(case)


def _held_small(case: Case) -> Change:
    """Takes the overflow away where it arises. An input is written to only where its derivative overflows as well:

    others that read it see that too.
    """
    op = case.name
    words = f"with the input of {op} held at {_SMALL} where {op} overflows"
    if op in ("sinh", "cosh", "pow", "square"):
        numbers = case.facts.get("scalars", ())[:1] if op == "pow" else ()
        number_first = has_number_as_base(case)

        def lowered(tensors: list[Tensor]) -> None:
            inputs = [*numbers, *tensors[:2]] if number_first else [*tensors[:2], *numbers]
            inputs = inputs[: 2 if op == "pow" else 1]
            beyond = torch.isinf(getattr(torch, op)(*inputs))
            tensors[0].masked_fill_(beyond.int().sum_to_size(tensors[0].shape) > 0, _SMALL)

        return Change(words, {case.origin.at: Alter(before=lowered)})
    benign = 1.0
    if op in _EXPONENTIAL:
        benign = float(getattr(torch, op)(torch.tensor(_SMALL)))
    else:
        words = f"with 1 in place of what {op} made where it overflows"

    def replaced(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.data.masked_fill_(~torch.isfinite(tensor), benign)

    return Change(words, {case.origin.at: Alter(after=replaced)})


def _unmask(case: Case) -> Change:
    def open_rows(tensors: list[Tensor]) -> None:
        scores = tensors[0]
        axis = case.facts.get("axis", -1)
        empty = torch.isneginf(scores).all(axis, keepdim=True)
        scores.masked_fill_(empty, 0.0)

    if "axis" not in case.facts:
        return _finite(case)
    # The same mask empties the same row in every layer.
    words = "with the rows that see nothing open to all keys"
    return Change(words, of_kind={case.origin.op.kind: Alter(before=open_rows)})


def _scale(case: Case) -> Change:
    scores = case.scores
    if (
        scores is None
        or scores.scale is None
        or not scores.unscaled
        or not _fits_scaled(case, scores.expected)
    ):
        return _fit(case)
    factor = scores.expected / scores.scale

    def scaled(tensors: list[Tensor]) -> None:
        tensors[-2].mul_(factor)

    return Change(
        f"with the scores scaled by {scores.expected:.4g} instead of {scores.scale:.4g}",
        {scores.product.at: Alter(before=scaled)},
    )


def _fits_scaled(case: Case, factor: float) -> bool:
    """Whether the dtype holds the scores, or their exponential, with the factor that was left out."""
    if case.name in _EXPONENTIAL:
        return not case.values or case.values[0] * factor < math.log(LARGEST.get(case.dtype, math.inf))
    return not exceeds(case.facts.get("exact", 0.0) * factor, case.dtype)


def _nudge(case: Case) -> Change:
    """Moves operands off the point where a function or its derivative is not finite."""
    origin = case.origin
    forward = origin.forward if case.backward else None
    if forward is not None and forward.op not in SINGULAR_GRADIENTS and forward.op not in _EXPONENTIAL:
        forward = None  # a backward pass of the user's own: its operators are changed themselves
    op = forward.op if forward is not None else case.name
    at = forward.at if forward is not None else origin.at
    domain = DOMAINS.get(op)
    if op in ("div", "true_divide") and forward is None and len(case.values) < 2:
        return _finite(case)  # the divisor is a number in the code

    def moved(tensors: list[Tensor]) -> None:
        floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
        target = floats[1] if op in SECOND_OPERAND and len(floats) > 1 else floats[0]
        bad = ~torch.isfinite(target)
        if domain is not None and not target.is_complex():
            bad = bad | (target <= domain.low) | (target >= domain.high)
        else:
            bad = bad | (target == 0)
        if op in _EXPONENTIAL:
            bad = bad | ~torch.isfinite(getattr(torch, op)(target))
        if op in ("std", "var", "std_mean"):
            target.add_(
                torch.linspace(0, 1, target.numel(), device=target.device, dtype=target.dtype).view_as(target)
            )
            return
        target.masked_fill_(bad, domain.inside if domain is not None else _SMALL)

    value = case.values[-1 if op in SECOND_OPERAND else 0] if case.values else 0.0
    outside = domain is not None and forward is None and not domain.low <= value <= domain.high
    where = "into its domain" if outside else "off the singular point"
    return Change(f"with the input of {op} moved {where}", {at: Alter(before=moved)})


def _hold(case: Case) -> Change:
    moved = max(case.book.moved.items(), key=lambda item: item[1][1] / max(item[1][0], 1e-30))
    name, (_, _, step) = moved
    if step <= case.book.steps_before:
        factors = {
            name: max(before, 1e-3) / after
            for name, (before, after, at) in case.book.moved.items()
            if at == step
        }
        words = f"with what optimiser step {step} moved scaled back to the size it had before"
        return Change(words, scaled=factors)
    return Change(
        f"with the parameters as they were before optimiser step {step}",
        {},
        held=(name, step - case.book.steps_before),
    )


def _kernel(case: Case) -> Change:
    def math_only() -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)

    if case.origin.op.kind == "fused":
        return Change("with the math kernel in place of the fused one", around=math_only)
    # The same kernel runs in every layer.
    words = f"with 0 in place of what {case.name} made"
    return Change(words, of_kind={case.origin.op.full_name: Alter(after=_cleaned)})


def _cleaned(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data.nan_to_num_(0.0, 0.0, 0.0)
        elif tensor.is_complex():
            torch.view_as_real(tensor.data).nan_to_num_(0.0, 0.0, 0.0)


def _chain(node: Node, most: int) -> Iterator[Node]:
    """The operators that made the operands, a few steps back along the first of them."""
    for _ in range(most):
        inner = [ref.node for ref in node.operands if ref.node.operands]
        if not inner:
            return
        node = inner[-1] if node.op.name in ("div", "true_divide") else inner[0]
        yield node


# --- repeating ----------------------------------------------------------------------------------------


@contextmanager
def _scaled(model: Any, factors: Mapping[str, float]) -> Iterator[None]:
    known = {clean(name): parameter for name, parameter in model.named_parameters()}
    before = [(known[name], known[name].detach().clone()) for name in factors if name in known]
    with _disable_current_modes():
        for name, factor in factors.items():
            if name in known:
                known[name].data.mul_(factor)
    try:
        yield
    finally:
        with _disable_current_modes():
            for parameter, value in before:
                parameter.data.copy_(value)


@contextmanager
def held_back(model: Any, change: Change) -> Iterator[None]:
    """Undoes one optimiser step on all parameters, or the growth that a step before the run gave to some."""
    if change.scaled:
        with _scaled(model, change.scaled):
            yield
        return
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    if change.held is None:
        yield
        return
    _, step = change.held
    taken = 0
    before: list[tuple[Tensor, Tensor]] = []

    def begins(optimizer: Any, args: Any, kwargs: Any) -> None:
        before.clear()
        if taken + 1 >= step:
            with _disable_current_modes():
                before.extend(
                    (p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]
                )

    def ends(optimizer: Any, args: Any, kwargs: Any) -> None:
        nonlocal taken
        taken += 1
        with _disable_current_modes():
            for parameter, value in before:
                parameter.data.copy_(value)

    with ExitStack() as stack:
        for handle in (register_optimizer_step_pre_hook(begins), register_optimizer_step_post_hook(ends)):
            stack.callback(handle.remove)
        yield


def combined(changes: Sequence[Change]) -> Change:
    """Several changes in one repetition; what two of them do at one operator is done by both."""
    alters: dict[int, Alter] = {}
    for change in changes:
        for at, alter in change.alters.items():
            alters[at] = _both(alters[at], alter) if at in alters else alter
    of_kind = {kind: alter for change in changes for kind, alter in change.of_kind.items()}
    around = next((change.around for change in changes if change.around is not None), None)
    held = next((change.held for change in changes if change.held is not None), None)
    scaled = {name: factor for change in changes for name, factor in change.scaled.items()}
    return Change("; ".join(change.words for change in changes), alters, of_kind, around, held, scaled)


def _both(first: Alter, second: Alter) -> Alter:
    def chained(one: Any, other: Any) -> Any:
        if one is None or other is None:
            return one or other

        def run(tensors: list[Tensor]) -> None:
            one(tensors)
            other(tensors)

        return run

    return Alter(
        chained(first.before, second.before),
        chained(first.after, second.after),
        first.widen or second.widen,
        first.everywhere and second.everywhere,
    )


def _of_any_layer(spot: Spot) -> Spot:
    return spot[0], re.sub(r"\d+", "*", spot[1]), spot[2]


def _overlaps(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _key(tensor: Tensor) -> Any:
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


# --- tables -------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Case], Change]] = {
    "finite": _finite,
    "replace": _replace,
    "widen": _widen,
    "fit": _fit,
    "unmask": _unmask,
    "scale": _scale,
    "nudge": _nudge,
    "hold": _hold,
    "kernel": _kernel,
}
_EXPONENTIAL = frozenset(("exp", "exp2", "expm1", "sinh", "cosh"))
# What an input is moved to: no function of the tables is singular there, but those that say so in `DOMAINS`.
_SMALL = 0.5
# Logarithm of a number of which float64 holds the square, and a sum of such squares, as losses take.
_ROOM = math.log(1e150)
