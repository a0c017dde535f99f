"""A step that gives NaN or Inf → the origins of what is seen, their causes, and the proof of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor

from attncli import records
from attncli.trace.causes import Case, Cause, cause_of, place_of
from attncli.trace.confirm import Captured
from attncli.trace.facts import LARGEST
from attncli.trace.nonfinite import Nonfinite, way
from attncli.trace.proofs import MOST_PROOFS, NOT_NEEDED, Judged, Proofs
from attncli.trace.rewind import Rewind
from attncli.trace.steps import NOTHING_BEFORE, Before, Run, run_step
from attncli.trace.tape import Listener, Node


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
    changed: tuple[str, ...] = ()


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
    beside: Listener | None = None,
    inputs: Sequence[tuple[str, Tensor]] = (),
    sound: Iterable[Tensor] = (),
    before: Before = NOTHING_BEFORE,
) -> Found:
    """Runs `step(model)` once, and again for each proof.

    `backward`: also `.backward()` of the loss that the step returns (a scalar or its `.loss`; with `summed` also the
    sum of its floating outputs), unless the step has gathered gradients itself. `limit`: a dtype; operators whose
    numbers it would not hold are listed. `capture`: the operator at the first birth is kept with its operands.
    `beside`: another listener of the first run; `inputs`: tensors that the step is given, by name; `sound`: parameters
    that are known to hold numbers alone, and need not be looked at; `before`: what a training did before this step.
    Afterwards the model is as one run of the step leaves it. Errors: whatever the step raises, unless what it tripped
    over was found.
    """
    rewind = Rewind(enabled=confirm or capture)
    rewind.begins(model)
    largest = LARGEST[limit] if limit else math.inf
    run = run_step(model, step, backward, summed, rewind, on_operator, largest, beside, inputs, sound, before)
    book = run.book
    cases = _cases(run)
    with ExitStack() as stack:
        if cases and rewind.enabled:
            stack.enter_context(rewind.kept(model))
        repeater = Proofs(model, step, backward, summed, rewind, run)
        proofs = repeater if confirm else None
        judged = [(case, *cause_of(case)) for case in cases]
        silent = [(case, cause, evidence) for case, cause, evidence in judged if not case.seen]
        judged = _one_each([one for one in judged if one[0].seen])
        judged += _harmful(silent, proofs)
        verdicts = proofs.of(judged) if proofs is not None else [(None, "")] * len(judged)
        if proofs is not None and any(
            cause.name == "optimizer-step" and confirmed is False
            for (_, cause, _), (confirmed, _) in zip(judged, verdicts, strict=True)
        ):
            # No echo of an update: each has a cause of its own.
            book.moved.clear()
            judged = _one_each([(case, *cause_of(case)) for case, _, _ in judged])
            verdicts = proofs.of(judged)
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
        for node, largest in book.reach.beyond
    )
    return Found(
        origins,
        dict(book.phases),
        _headroom(book),
        tuple(_notes(run)),
        run.result,
        run.raised,
        beyond,
        repro,
        run.changed,
    )


# --- origins ------------------------------------------------------------------------------------------


def _cases(run: Run) -> list[Case]:
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


def _harmful(silent: list[Judged], proofs: Proofs | None) -> list[Judged]:
    """Of bad values that were swallowed, by arithmetic or in a kernel, those that changed what the step gives."""
    likely = [one for one in silent if _may_harm(one[0], one[1])]
    if not likely or proofs is None or not proofs.changes_result(likely):
        return []
    return [one for one in likely[:MOST_PROOFS] if len(likely) == 1 or proofs.changes_result([one])][
        :1
    ] or likely[:1]


def _may_harm(case: Case, cause: Cause) -> bool:
    in_kernel = any(node.op.kind == "fused" for node in case.origin.absorbed)
    lost = cause.name.startswith("overflow") or cause.name == "optimizer-step"
    return case.origin.phase != "backward" and (in_kernel or lost)


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
        advice=cause.advises(evidence),
    )


def _thinned(path: Sequence[Node]) -> list[Node]:
    """The first and the last of a long way."""
    return list(path) if len(path) <= 2 * _ENDS else [*path[:_ENDS], *path[-_ENDS:]]


def _headroom(book: Nonfinite) -> dict[str, tuple[float, str, str]]:
    found = {}
    for dtype, (largest, node) in book.reach.largest.items():
        name = str(dtype).removeprefix("torch.")
        if name in LARGEST and largest > 0:
            found[name] = (math.log2(LARGEST[name] / largest), node.op.name, node.module)
    return found


def _notes(run: Run) -> Iterator[str]:
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

_MOST_CASES = 64
_MOST_SHOWN = 8
_ENDS = 12
