"""A step that went wrong → repeated under the tape: the origins of what is bad in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from attncli.trace.nan import Found
    from attncli.trace.tape import Listener
    from attncli.training.monitor import Monitor
    from attncli.training.program import Entry
    from attncli.training.shards import Whole
    from attncli.training.sightings import Sighting


class Replayed(NamedTuple):
    """`found`: what the repetition showed, None where there was none; `why` says why. `model`: what was repeated."""

    found: Found | None
    why: str
    model: Any
    notes: tuple[str, ...] = ()


def replayed(
    monitor: Monitor,
    sighting: Sighting,
    *,
    confirm: bool = True,
    beside: Listener | None = None,
    whole: Whole | None = None,
) -> Replayed:
    """Repeats the step of a sighting. Afterwards gradients, buffers, random states and weights are as they are now.

    `whole`: the model with all its parameters, where this process holds a part of each alone.
    """
    from attncli.training.models import inside, model_of, unrepeatable
    from attncli.training.repeating import UnseenError

    model = whole.model if whole is not None else model_of(monitor)

    def stand_in(module: Any) -> Any:
        return inside(module) if whole is None else whole.of(inside(module))

    if sighting.is_updated and sighting.copies is None:
        return Replayed(None, _NOT_KEPT, model)
    if sighting.seen == "parameter":
        return _update(monitor, sighting, model, confirm, beside)
    if monitor.program.full:
        return Replayed(None, "the step does more outside its modules than is written down", model)
    entries = monitor.program.needed()
    if (wrapped := unrepeatable([entry.what for entry in entries])) is not None:
        return Replayed(
            None,
            f"{wrapped} holds its parameters in parts that cannot be put together here (those of fully_shard can)",
            model,
        )
    if not entries:
        return Replayed(None, "no module was called in it, so nothing was written down to repeat", model)
    notes = _overwritten(monitor)
    inputs = _inputs(monitor)
    why = ""
    for part in (entries, _without_cuts(entries)):
        if not part:
            continue
        try:
            found = _found(monitor, sighting, model, part, confirm, beside, inputs, stand_in)
        except UnseenError as error:
            why = why or f"it uses {error}"
            continue
        except Exception as error:  # noqa: BLE001 - what a repetition raises says that it is none
            why = why or f"its repetition raised {type(error).__name__}: {_first_line(error)}"
            continue
        if _is_another(monitor, sighting, found):
            return Replayed(None, "repeated, its loss is not finite, which it was in the run", model, notes)
        if found.origins:
            return Replayed(found, "", model)
        if why:  # of a part alone nobody can say what reaches the loss
            found = found._replace(notes=tuple(note.replace(_LOST, _SHOWN) for note in found.notes))
        why = why or "repeated with the same batch and the same random numbers, it gave finite numbers"
        return Replayed(found, why, model, notes)
    return Replayed(None, why, model, notes)


def bad_pass(monitor: Monitor) -> list[Any]:
    """Of a step of several backward passes: what the first was given whose gradients are bad; empty if none is told."""
    from attncli.trace.rewind import random_states
    from attncli.training.checks import bad
    from attncli.training.models import inside, unrepeatable, without_gradients
    from attncli.training.repeating import repeat

    passes = monitor.program.passes()
    if len(passes) < 2 or monitor.program.full or monitor.processes.world > 1:
        return []
    for entries in passes:
        called = [entry.what for entry in entries]
        if unrepeatable(called) is not None:
            return []
        with ExitStack() as stack:
            stack.enter_context(monitor.silent())
            for put_back in random_states():
                stack.callback(put_back)
            stack.enter_context(without_gradients([*monitor.roots.models(), *called]))
            stack.enter_context(monitor.buffers.as_then())
            try:
                repeat(entries, inside)
            except Exception:  # noqa: BLE001 - what cannot be repeated tells nothing
                return []
            if any(p.grad is not None and bad(p.grad) for p in monitor.roots.parameters()):
                return [one.tensor for one in monitor.program.given(entries)]
    return []


# --- the two kinds of repetition ----------------------------------------------------------------------


def _found(
    monitor: Monitor,
    sighting: Sighting,
    model: Any,
    entries: Sequence[Entry],
    confirm: bool,
    beside: Listener | None,
    inputs: Sequence[tuple[str, Any]],
    stand_in: Callable[[Any], Any],
) -> Found:
    """The forward and backward passes of the step, from no gradients on."""
    from attncli.trace.nan import find
    from attncli.trace.rewind import random_states
    from attncli.trace.steps import Before
    from attncli.training.models import without_gradients
    from attncli.training.repeating import repeat

    def step(_: Any) -> Any:
        shown = repeat(list(entries), stand_in)
        return shown[0] if len(shown) == 1 else shown

    moved = {
        one.parameter: (one.before, one.after, one.step)
        for one in monitor.sizes.moved
        if sighting.step - one.step <= _ECHOES
    }
    with ExitStack() as stack:
        for put_back in random_states():
            stack.callback(put_back)
        stack.enter_context(without_gradients([model, *(entry.what for entry in entries)]))
        stack.enter_context(monitor.buffers.as_then())
        _alone(stack, monitor)
        return find(
            model,
            step,
            backward=False,
            confirm=confirm,
            beside=beside,
            inputs=inputs,
            before=Before(sighting.step - 1, moved),
        )


def _update(
    monitor: Monitor, sighting: Sighting, model: Any, confirm: bool, beside: Listener | None
) -> Replayed:
    """The update of the optimiser alone, on the gradients that it had."""
    from attncli.trace.nan import find
    from attncli.trace.rewind import random_states
    from attncli.trace.steps import Before
    from attncli.training.checks import is_sharded

    if sighting.copies is None:
        return Replayed(None, _NOT_KEPT, model)
    optimizer = sighting.optimizer
    if any(is_sharded(one) for group in optimizer.param_groups for one in group["params"]):
        return Replayed(
            None, "an update of parameters that lie in parts in several processes is not repeated", model
        )

    def step(_: Any) -> None:
        optimizer.step()

    with ExitStack() as stack:
        for put_back in random_states():
            stack.callback(put_back)
        stack.enter_context(sighting.copies.untouched())
        _alone(stack, monitor)
        try:
            before = Before(sighting.step - 1, {})
            found = find(model, step, backward=False, confirm=confirm, beside=beside, before=before)
        except Exception as error:  # noqa: BLE001
            why = f"the repetition of the update raised {type(error).__name__}: {_first_line(error)}"
            return Replayed(None, why, model)
    from attncli.training.copies import bad_settings

    settings = ", ".join(dict.fromkeys(bad_settings(optimizer)))
    why = "" if found.origins else "repeated on the same gradients, the update gave finite numbers"
    why = f"its optimiser has {settings}" if settings and not found.origins else why
    if settings:
        found = found._replace(origins=tuple(_blamed(one, settings) for one in found.origins))
    return Replayed(found, why, model, (f"the optimiser has {settings}",) if settings else ())


# --- building blocks ----------------------------------------------------------------------------------


def _is_another(monitor: Monitor, sighting: Sighting, found: Found) -> bool:
    """Whether the repetition shows a bad loss where the run had none: then it proves nothing of the run."""
    import math

    from attncli.training.checks import bad
    from attncli.training.program import flat

    loss = monitor.so_far().loss
    if sighting.seen != "gradient" or monitor.scales_loss or loss is None or not math.isfinite(loss):
        return False
    return any(bad(one) for one in flat(found.result) if hasattr(one, "untyped_storage"))


def _blamed(origin: Any, settings: str) -> Any:
    """An origin that only says that a number of the code is NaN, with the setting that it comes from."""
    from dataclasses import replace

    return (
        replace(origin, message=f"the optimiser has {settings}") if origin.cause == "written-nan" else origin
    )


def _alone(stack: ExitStack, monitor: Monitor) -> None:
    """Of several processes each repeats by itself, so none may wait for another."""
    from attncli.training.processes import Alone

    if monitor.processes.world > 1:
        stack.enter_context(Alone())  # type: ignore[no-untyped-call]


def _without_cuts(entries: Sequence[Entry]) -> list[Entry]:
    """What can be repeated of a step part of which was not seen: everything that does not depend on that part."""
    from attncli.training.repeating import is_cut

    lost: set[int] = set()
    kept: list[Entry] = []
    for entry in entries:
        if entry.is_backward or is_cut(entry) or lost & entry.reads:
            lost |= {*entry.outputs}
        else:
            kept.append(entry)
    return kept if len(kept) < len(entries) else []


def _overwritten(monitor: Monitor) -> tuple[str, ...]:
    """A note where tensors that the step was given were written to since."""
    changed = [
        one.tensor
        for one in monitor.program.given()
        if not one.tensor.is_inference()
        and one.tensor._version != one.version
        and not one.tensor.requires_grad
        and one.tensor.grad_fn is None
    ]
    if not changed:
        return ()
    shapes = ", ".join(str(tuple(one.shape)) for one in changed[:3])
    count = f"{len(changed)} tensor{'s' if len(changed) != 1 else ''}"
    return (
        f"{count} that the step read (shapes {shapes}) changed after it read them, and was repeated as they are now",
    )


def _inputs(monitor: Monitor) -> list[tuple[str, Any]]:
    """Tensors of the batch that go to functions beside the model, under their place in the batch."""
    from attncli.training.loaders import named

    given = [one.tensor for one in monitor.program.given()]
    batch = monitor.loaders.of(given)
    if batch is None:
        return []
    first = {id(tensor) for module in monitor.program.first_given() for tensor in module}
    return [(name, tensor) for name, tensor in named(batch.value) if id(tensor) not in first]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# --- tables -------------------------------------------------------------------------------------------

_LOST, _SHOWN = "that reaches nothing the step gives", "in the part of the step that could be repeated"
_NOT_KEPT = "the weights from before the update were not kept"
# A parameter that a step threw out makes the next steps overflow, seldom a later one.
_ECHOES = 4
