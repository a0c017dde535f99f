"""The proofs of causes: the step repeated with changes, and what it shows then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from attncli.trace import watched
from attncli.trace.causes import Case, Cause
from attncli.trace.confirm import Captured, Change, Replay, Spot, change_of, combined, held_back
from attncli.trace.nonfinite import Nonfinite
from attncli.trace.rewind import Rewind
from attncli.trace.steps import Run, run_backward, tensors_shown
from attncli.trace.tape import Tape

# An origin, its cause, and the evidence for it.
Judged = tuple[Case, Cause, dict[str, Any]]


class Proofs:
    """Repeats a step with changes. `repeats`: whether an unchanged repetition shows the same symptom."""

    def __init__(
        self,
        model: Any,
        step: Callable[[Any], Any],
        backward: bool,
        summed: bool,
        rewind: Rewind,
        run: Run,
    ) -> None:
        self.model, self.step, self.rewind, self.run = model, step, rewind, run
        self.backward, self.summed = backward and not run.book.own_backward, summed
        # Why a repetition ended early where the first run had not.
        self.ended = ""
        self.symptoms = [(name, kind) for name, kind, _, _ in run.seen]
        self.asked: set[int] = set()
        self.spots: dict[int, Spot] = {}
        self.siblings = False
        self._repeats: bool | None = None

    def of(self, judged: Sequence[Judged]) -> list[tuple[bool | None, str]]:
        if not judged:
            return []
        self.siblings = False
        changes = [change_of(case, cause.change) for case, cause, _ in judged[:MOST_PROOFS]]
        self.asked = {at for change in changes for at in change.alters}
        if not self.repeats:
            why = (
                f"the step could not be repeated ({self.ended})"
                if self.ended
                else "the step did not repeat itself"
            )
            return [(None, f"{why}, so nothing could be proved")] * len(judged)
        left = self.symptoms_after(combined(changes))
        if left and not self.ended:
            # A line that is run by every layer may go wrong in every layer: behind the first it shows only now.
            self.siblings = True
            wider = self.symptoms_after(combined(changes))
            self.siblings = set(wider) < set(left)
            left = wider if self.siblings else left
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
            everywhere = ", in every layer that runs this line" if self.siblings and gone else ""
            rest = (
                ", though gradients are not finite yet" if gone and any(pair in left for pair in mine) else ""
            )
            found[number] = (
                gone,
                f"{change.words}{everywhere}: the symptom is {'gone' if gone else 'still there'}{rest}",
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
            shown = dict(tensors_shown(self.model, result))
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
            for name, tensor in tensors_shown(self.model, result):
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
        shown = [(name, tensor.detach().clone()) for name, tensor in tensors_shown(self.model, result)]
        self._back(replay)
        return shown

    def _again(self, change: Change, capture: int = -1) -> tuple[Any, Exception | None, Replay]:
        self.rewind.back()
        book = Nonfinite(rewind=Rewind(enabled=False))
        tape = Tape(book)
        replay = Replay(
            change, self.spots, tape.modules, asked=self.asked, capture=capture, siblings=self.siblings
        )
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
                run_backward(result, self.backward, self.summed)
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


# --- settings -----------------------------------------------------------------------------------------

NOT_NEEDED = "the symptom goes without a change here"
MOST_PROOFS = 8
# Upcasting changes rounding; what was lost to an overflow changes results by more than this share.
_DIFFERENT = 0.02
