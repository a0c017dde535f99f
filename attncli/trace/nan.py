"""A step that gives NaN or Inf → the origins of what is seen, their causes, and the proof of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from attncli import records
from attncli.trace import watched
from attncli.trace.causes import Case, Cause, cause_of, place_of
from attncli.trace.confirm import Captured, Change, Replay, Spot, change_of, combined, held_back
from attncli.trace.facts import LARGEST
from attncli.trace.naming import clean, named_inputs
from attncli.trace.nonfinite import Nonfinite, Trail, visible, way
from attncli.trace.rewind import Rewind
from attncli.trace.tape import LEAF, Node, Tape


class Found(NamedTuple):
    """What a checked step showed. `operators`: how many ran, by phase.

    `headroom`: by dtype, the bits left below its end, and the operator and module that came nearest. `raised`: what
    the step raised, where its origins were still found. `beyond`: operators whose numbers the dtype asked about would
    not hold. `repro`: the operator at the first origin, with its operands.
    """

    origins: tuple[records.Origin, ...]
    operators: Mapping[str, int]
    headroom: Mapping[str, tuple[float, str, str]]
    notes: tuple[str, ...]
    result: Any
    raised: Exception | None
    beyond: tuple[Mapping[str, Any], ...] = ()
    repro: Captured | None = None


# An origin, its cause, and the evidence for it.
Judged = tuple[Case, Cause, dict[str, Any]]


@dataclass
class _Run:
    tape: Tape
    book: Nonfinite
    result: Any = None
    raised: Exception | None = None
    seen: list[tuple[str, str, Trail | None, Node | None]] = field(default_factory=list)


def find(
    model: Any,
    step: Callable[[Any], Any],
    *,
    backward: bool = True,
    confirm: bool = True,
    on_operator: Callable[[int], None] | None = None,
    summed: bool = False,
    limit: str | None = None,
    capture: bool = False,
) -> Found:
    """Runs `step(model)` once, and again for each proof.

    `backward`: also `.backward()` of the loss that the step returns (a scalar or its `.loss`; with `summed` also the
    sum of its floating outputs), unless the step has gathered gradients itself. `limit`: a dtype; operators whose
    numbers it would not hold are listed. `capture`: the operator at the first birth is kept with its operands.
    Afterwards the model is as one run of the step leaves it. Errors: whatever the step raises, unless what it tripped
    over was found.
    """
    rewind = Rewind(enabled=confirm or capture)
    rewind.begins(model)
    run = _run(model, step, backward, summed, rewind, on_operator, LARGEST[limit] if limit else math.inf)
    book = run.book
    cases = _cases(run)
    with ExitStack() as stack:
        if cases and rewind.enabled:
            stack.enter_context(rewind.kept(model))
        repeater = _Proofs(model, step, backward, summed, rewind, run)
        proofs = repeater if confirm else None
        judged = [(case, *cause_of(case)) for case in cases]
        silent = [(case, cause, evidence) for case, cause, evidence in judged if not case.seen]
        judged = _one_each([one for one in judged if one[0].seen])
        judged += _harmful(silent, proofs)
        verdicts = proofs.of(judged) if proofs is not None else [(None, "")] * len(judged)
        if any(confirmed for confirmed, _ in verdicts):
            # What may stay as it is while the symptom goes is no cause of it.
            kept = [number for number, (_, words) in enumerate(verdicts) if words != NOT_NEEDED]
            judged, verdicts = [judged[n] for n in kept], [verdicts[n] for n in kept]
        repro = repeater.captured(judged) if capture else None
    if run.raised is not None and not judged:
        raise run.raised
    origins = tuple(
        _record(case, cause, evidence, confirmed, words)
        for (case, cause, evidence), (confirmed, words) in zip(judged, verdicts, strict=True)
    )
    beyond = tuple(
        {
            "module": node.module,
            "op": node.op.name,
            "largest": largest,
            "dtype": str(node.dtype).removeprefix("torch."),
        }
        for node, largest in book.beyond
    )
    return Found(
        origins, dict(book.phases), _headroom(book), tuple(_notes(run)), run.result, run.raised, beyond, repro
    )


# --- the run ------------------------------------------------------------------------------------------


def _run(
    model: Any,
    step: Callable[[Any], Any],
    backward: bool,
    summed: bool,
    rewind: Rewind,
    on_operator: Callable[[int], None] | None,
    limit: float,
) -> _Run:
    book = Nonfinite(rewind=rewind, on_operator=on_operator, limit=limit)
    tape = Tape(book)
    run = _Run(tape, book)
    if isinstance(model, nn.Module):
        parameters = [(clean(name), tensor) for name, tensor in model.named_parameters()]
        buffers = [(clean(name), tensor) for name, tensor in model.named_buffers()]
        tape.name_parameters(parameters)
        tape.name_parameters(buffers)
        book.named = dict.fromkeys((name for name, _ in buffers), "buffer")
    with watched(model, tape, book), _optimizers(tape, book), _inputs(model, tape), tape:
        try:
            run.result = step(model)
            own_backward = book.own_backward
            _backward(run.result, backward and not own_backward, summed)
            book.own_backward = own_backward
        except Exception as error:  # noqa: BLE001 - raised again unless its origin is found
            run.raised = error
    if tape.failure is not None:
        raise tape.failure
    named = list(_shown(model, run.result))
    for name, tensor, kind, trail in visible(tape, book, named):
        if name.startswith(("parameter", "buffer")) and not rewind.wrote(tensor):
            continue
        if name.startswith("gradient of") and tape.node(tensor).op is LEAF:
            continue
        if trail is not None and all(book.origins[number].name == name[7:] for number in trail.origins):
            continue  # what a buffer held before and still holds, as the unwritten slots of a cache do
        if name.startswith("gradient of") and _is_guarded(book):
            continue
        run.seen.append((name, kind, trail, tape.node(tensor)))
    if run.raised is not None and not run.seen and book.last is not None and _is_about_numbers(run.raised):
        for kind, trail in book.states[book.last.serial].items():
            run.seen.append(("what the step stopped at", kind, trail, book.last))
    return run


def _is_about_numbers(error: Exception) -> bool:
    """Whether a step may have stopped because of what it saw in its numbers, and not by a mistake in its code."""
    return bool(re.search(_NUMBERS, str(error), re.IGNORECASE))


def _backward(result: Any, wanted: bool, summed: bool) -> None:
    loss = loss_of(result, summed) if wanted else None
    if loss is None:
        return
    try:
        loss.backward()
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        # The step has run its backward pass already, and nothing of it was gathered.


def loss_of(result: Any, summed: bool = True) -> Tensor | None:
    """A scalar, the `.loss` of an output, or, `summed`, all floating outputs that have a gradient."""
    own = getattr(result, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        return own
    tensors = [t for _, t in _tensors("output", result) if t.is_floating_point() and t.requires_grad]
    if len(tensors) == 1 and tensors[0].dim() == 0:
        return tensors[0]
    return sum((t.sum() for t in tensors[1:]), tensors[0].sum()) if tensors and summed else None


@contextmanager
def _optimizers(tape: Tape, book: Nonfinite) -> Iterator[None]:
    handles = (
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: book.optimizer_begins(optimizer)),
        register_optimizer_step_post_hook(
            lambda optimizer, args, kwargs: book.optimizer_ends(tape, optimizer)
        ),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _inputs(model: Any, tape: Tape) -> Iterator[None]:
    """Gives the tensors that a step hands to the model the names that its forward has for them."""
    if not isinstance(model, nn.Module):
        yield
        return

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tape.name_inputs(named_inputs(module, args, kwargs))

    handle = model.register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _shown(model: Any, result: Any) -> Iterator[tuple[str, Tensor]]:
    """All that can be seen after a step: what it returned, gradients, parameters and buffers."""
    yield from _tensors("output", result)
    if not isinstance(model, nn.Module):
        return
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield f"gradient of {clean(name)}", parameter.grad
    for name, parameter in model.named_parameters():
        yield f"parameter {clean(name)}", parameter.detach()
    for name, buffer in model.named_buffers():
        yield f"buffer {clean(name)}", buffer


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(f"{name}.{number}", item)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from _tensors(f"{name}.{item.name}", getattr(value, item.name))


def _is_guarded(book: Nonfinite) -> bool:
    """Whether a loss scaler saw to it that bad gradients moved nothing, and may yet recover."""
    if not book.skipped:
        return False
    return not all(book.skipped[-_SKIPS:]) or len(book.skipped) < _SKIPS


# --- origins ------------------------------------------------------------------------------------------


def _cases(run: _Run) -> list[Case]:
    """One case per origin of what is seen, and one per overflow that arithmetic swallowed (`seen` is empty)."""
    book = run.book
    found: dict[int, Case] = {}
    for name, _, trail, node in run.seen:
        for number in trail.origins if trail is not None else ():
            origin = book.origins[number]
            case = found.get(number)
            if case is None:
                path = way(book, origin, node) if node is not None else []
                found[number] = Case(origin, book, path, (name,))
            elif name not in case.seen:
                case.seen = (*case.seen, name)
    for origin in book.origins:
        if origin.number not in found and origin.role != "fill" and origin.absorbed:
            found[origin.number] = Case(origin, book, [origin.node, *origin.absorbed[:1]], ())
    cases = sorted(found.values(), key=lambda case: case.origin.number)
    return _without_echoes(cases)


def _without_echoes(cases: list[Case]) -> list[Case]:
    """One case per fault: what the gradient of a faulty operator makes of it, and repeats of one place, go."""
    kept: dict[Any, Case] = {}
    forward = {case.origin.at: case for case in cases if case.origin.phase == "forward" and case.seen}
    for case in cases:
        origin = case.origin
        first = forward.get(origin.forward.at) if origin.forward is not None else None
        if first is None and origin.phase == "backward" and origin.masks:
            # The same mask that made the forward value bad makes its gradient bad.
            first = next((one for one in forward.values() if {*one.origin.masks} & {*origin.masks}), None)
        first = first or kept.setdefault(_spot(case), case)
        if first is not case:
            first.seen = tuple(dict.fromkeys((*first.seen, *case.seen)))
    return list(kept.values())[:_MOST_CASES]


def _spot(case: Case) -> Any:
    """What two origins share that are one fault. Of several operators in the backward of one, the first is it."""
    origin = case.origin
    if origin.forward is not None:
        return "backward", origin.forward.at
    place, seen = str(origin.place), bool(case.seen)
    return origin.role, origin.phase, origin.op.name, origin.module, place, origin.name, seen


def _one_each(judged: list[Judged]) -> list[Judged]:
    """Echoes of one optimiser step are one fault, whatever overflowed behind it."""
    kept: dict[Any, Judged] = {}
    for case, cause, evidence in judged:
        key = (cause.name, evidence.get("tensor")) if cause.name == "optimizer-step" else case.origin.number
        first = kept.setdefault(key, (case, cause, evidence))[0]
        first.seen = tuple(dict.fromkeys((*first.seen, *case.seen)))
    return list(kept.values())


def _harmful(silent: list[Judged], proofs: _Proofs | None) -> list[Judged]:
    """Of bad values that were swallowed, by arithmetic or in a kernel, those that changed what the step gives."""
    likely = [one for one in silent if _may_harm(one[0], one[1])]
    if not likely or proofs is None or not proofs.changes_result(likely):
        return []
    return [one for one in likely[:_MOST_PROOFS] if len(likely) == 1 or proofs.changes_result([one])][
        :1
    ] or likely[:1]


def _may_harm(case: Case, cause: Cause) -> bool:
    in_kernel = any(node.op.kind == "fused" for node in case.origin.absorbed)
    lost = cause.name.startswith("overflow") or cause.name == "optimizer-step"
    return case.origin.phase != "backward" and (in_kernel or lost)


class _Proofs:
    """Repeats a step with changes. `repeats`: whether an unchanged repetition shows the same symptom."""

    def __init__(
        self,
        model: Any,
        step: Callable[[Any], Any],
        backward: bool,
        summed: bool,
        rewind: Rewind,
        run: _Run,
    ) -> None:
        self.model, self.step, self.rewind, self.run = model, step, rewind, run
        self.backward, self.summed = backward and not run.book.own_backward, summed
        # Why a repetition ended early where the first run had not.
        self.ended = ""
        self.symptoms = [(name, kind) for name, kind, _, _ in run.seen]
        self.asked: set[int] = set()
        self.spots: dict[int, Spot] = {}
        self._repeats: bool | None = None

    def of(self, judged: Sequence[Judged]) -> list[tuple[bool | None, str]]:
        if not judged:
            return []
        changes = [change_of(case, cause.change) for case, cause, _ in judged[:_MOST_PROOFS]]
        self.asked = {at for change in changes for at in change.alters}
        if not self.repeats:
            why = (
                f"the step could not be repeated ({self.ended})"
                if self.ended
                else "the step did not repeat itself"
            )
            return [(None, f"{why}, so nothing could be proved")] * len(judged)
        left = self.symptoms_after(combined(changes))
        found: list[tuple[bool | None, str]] = [(None, "not tried: too many origins")] * len(judged)
        needed = set(range(len(changes)))
        # The latest first: of several changes that each do, the first origin keeps its own.
        for number in reversed(range(len(changes))):
            case, change = judged[number][0], changes[number]
            if not case.seen:
                found[number] = (True, f"{change.words}: the result is another")
                continue
            mine = [pair for pair in self.symptoms if pair[0] in case.seen]
            # Where the values themselves are cured, gradients that are still bad have a reason of their own.
            shown = [pair for pair in mine if pair[0].startswith("output")] or mine
            gone = not any(pair in left for pair in shown)
            if gone and len(needed) > 1:
                others = self.symptoms_after(
                    combined([changes[other] for other in sorted(needed - {number})])
                )
                if not any(pair in others for pair in shown):
                    needed.discard(number)
                    found[number] = (False, NOT_NEEDED)
                    continue
            rest = (
                ", though gradients are not finite yet" if gone and any(pair in left for pair in mine) else ""
            )
            found[number] = (
                gone,
                f"{change.words}: the symptom is {'gone' if gone else 'still there'}{rest}",
            )
        return found

    @property
    def repeats(self) -> bool:
        if self._repeats is None:
            same = not self.symptoms or set(self.symptoms_after(Change("", {}))) == set(self.symptoms)
            self._repeats = same and not self.ended
        return self._repeats

    def symptoms_after(self, change: Change) -> list[tuple[str, str]]:
        """Those symptoms of the first run that a repetition with this change still shows."""
        result, raised, replay = self._again(change)
        if raised is not None:
            self.ended = type(raised).__name__ if self.run.raised is None else ""
            left = list(self.symptoms)
        else:
            left = []
            shown = dict(_shown(self.model, result))
            for name, kind in self.symptoms:
                tensor = shown.get(name)
                if tensor is not None and _holds(replay.value(tensor), kind):
                    left.append((name, kind))
        self._back(replay)
        return left

    def changes_result(self, judged: Sequence[Judged]) -> bool:
        """Whether the step gives something else where these overflows are upcast, these leaves cleaned."""
        before = {name: t.detach().clone() for name, t in self._plain()}
        change = combined(
            [
                change_of(case, "widen" if case.origin.kinds[0] != "nan" else cause.change)
                for case, cause, _ in judged
            ]
        )
        result, raised, replay = self._again(change)
        other = False
        if raised is None:
            for name, tensor in _shown(self.model, result):
                known = before.get(name)
                if known is not None and known.shape == tensor.shape and _differ(known, replay.value(tensor)):
                    other = True
                    break
        self._back(replay)
        return other

    def captured(self, judged: Sequence[Judged]) -> Captured | None:
        """The operator at the first birth, with its operands, from one more repetition."""
        born = [case for case, _, _ in judged if case.origin.role == "birth"]
        if not born or not self.repeats:
            return None
        _, _, replay = self._again(Change("", {}), capture=born[0].origin.at)
        self._back(replay)
        return replay.captured

    def _plain(self) -> list[tuple[str, Tensor]]:
        result, _, replay = self._again(Change("", {}))
        shown = [(name, tensor.detach().clone()) for name, tensor in _shown(self.model, result)]
        self._back(replay)
        return shown

    def _again(self, change: Change, capture: int = -1) -> tuple[Any, Exception | None, Replay]:
        self.rewind.back()
        book = Nonfinite(rewind=Rewind(enabled=False))
        tape = Tape(book)
        replay = Replay(change, self.spots, tape.modules, asked=self.asked, capture=capture)
        with ExitStack() as stack:
            stack.enter_context(watched(self.model, tape, book))
            if change.around is not None:
                stack.enter_context(change.around())
            # An optimiser that the first run only skipped has a state now that it had not.
            handle = register_optimizer_step_pre_hook(
                lambda optimizer, args, kwargs: replay.outside.save_optimizer(optimizer)
            )
            stack.callback(handle.remove)
            stack.enter_context(held_back(self.model, change))
            stack.enter_context(replay)
            try:
                result = self.step(self.model)
                _backward(result, self.backward, self.summed)
            except Exception as error:  # noqa: BLE001 - a repetition that cannot run proves nothing
                return None, error, replay
        return result, None, replay

    def _back(self, replay: Replay) -> None:
        replay.restore()
        self.spots.update(replay.found)
        self.rewind.back()


def _holds(tensor: Tensor, kind: str) -> bool:
    if kind == "nan":
        return bool(torch.isnan(tensor).any())
    return bool((torch.isposinf(tensor) if kind == "+inf" else torch.isneginf(tensor)).any())


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether a finite number of the first became another one, beyond rounding, or none at all."""
    if not first.is_floating_point() or not first.numel():
        return not torch.equal(first, second)
    first, second = first.double(), second.double()
    shown = torch.isfinite(first)
    if not bool(shown.any()):
        return False
    first, second = first[shown], second[shown]
    scale = first.abs().amax().clamp(min=second.abs().amax())
    return not bool((first - second).abs().amax() <= _DIFFERENT * scale)


# --- records ------------------------------------------------------------------------------------------


def _record(
    case: Case, cause: Cause, evidence: dict[str, Any], confirmed: bool | None, words: str
) -> records.Origin:
    origin = case.origin
    at = place_of(case)
    where = "an unknown place"
    if at is not None:
        where = ", ".join(f"{name} {value}" for name, value in at.items())
    message = re.sub(r"(?<=\d),(?=\d{3})", " ", cause.says.format(**{"at": where, **evidence}))
    phase, module, op, tensor = (
        origin.phase,
        origin.module,
        origin.op.name,
        evidence.get("tensor") or origin.name,
    )
    source = str(origin.place) if origin.place is not None else None
    if cause.name == "optimizer-step":
        # What overflowed behind the step is its echo, and no place to look for the fault.
        evidence = {**evidence, "echo": {"op": op, "module": module, "source": source, "at": at}}
        phase, op, module = "optimizer", "step", str(tensor).rpartition(".")[0]
        source = at = None
    elif origin.role == "leaf":
        op, module = "leaf", str(origin.name or "").rpartition(".")[0] or module
    return records.Origin(
        value=origin.kinds[0],
        phase=phase,  # type: ignore[arg-type]
        cause=cause.name if cause.name != "bad-leaf" else f"bad-{evidence['kind_of_leaf']}",
        confirmed=confirmed,
        module=module,
        op=op,
        source=source,
        tensor=tensor,
        layer=None,
        at=at,
        dtype=str(origin.dtype).removeprefix("torch."),
        evidence={
            **evidence,
            "seen": list(case.seen[:_MOST_SHOWN]),
            **({"forward_op": origin.forward.op} if origin.forward is not None else {}),
            **({"proof": words} if words else {}),
        },
        path=tuple({"module": node.module, "op": node.op.name} for node in _thinned(case.path)),
        message=message,
        advice=cause.advice,
    )


def _thinned(path: Sequence[Node]) -> list[Node]:
    """The first and the last of a long way."""
    return list(path) if len(path) <= 2 * _ENDS else [*path[:_ENDS], *path[-_ENDS:]]


def _headroom(book: Nonfinite) -> dict[str, tuple[float, str, str]]:
    found = {}
    for dtype, (largest, node) in book.largest.items():
        name = str(dtype).removeprefix("torch.")
        if name in LARGEST and largest > 0:
            found[name] = (math.log2(LARGEST[name] / largest), node.op.name, node.module)
    return found


def _notes(run: _Run) -> Iterator[str]:
    book = run.book
    named = {number for _, _, trail, _ in run.seen if trail is not None for number in trail.origins}
    if run.raised is not None:
        yield f"the step raised {type(run.raised).__name__}: {run.raised}"
    if book.skipped:
        yield f"the loss scaler skipped {sum(book.skipped)} of {len(book.skipped)} optimiser steps"
    dropped = [
        origin
        for origin in book.origins
        if origin.role == "birth"
        and "nan" in origin.kinds
        and not origin.hidden
        and origin.number not in named
    ]
    if dropped:
        where = dropped[0].place or dropped[0].module or "the model"
        yield f"{dropped[0].op.name} ({where}) made NaN that reaches nothing the step gives"
    if book.unread:
        yield f"{book.unread} tensors are of kinds that cannot be looked into (sparse, nested)"


# --- settings -----------------------------------------------------------------------------------------

# Words of errors that validations raise: distributions, linear algebra, assertions of one's own.
_NUMBERS = (
    r"\bnan|\binf(inity|inite)?\b|finite|invalid value"
    r"|constraint|ill-conditioned|singular|probability tensor|not converge"
)
NOT_NEEDED = "the symptom goes without a change here"
_MOST_CASES = 64
_MOST_PROOFS = 8
_MOST_SHOWN = 8
_ENDS = 12
# A loss scaler that skips this many steps in a row does not recover.
_SKIPS = 3
# Upcasting changes rounding; what was lost to an overflow changes results by more than this share.
_DIFFERENT = 0.02
