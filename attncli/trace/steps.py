"""One run of a step under the tape, and what can be seen of it afterwards: outputs, gradients, parameters, buffers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from attncli.trace import watched
from attncli.trace.naming import clean, named_inputs, tensors_in
from attncli.trace.nonfinite import Nonfinite, visible
from attncli.trace.reach import Reach
from attncli.trace.recorder import Recorder
from attncli.trace.rewind import Rewind
from attncli.trace.tape import LEAF, Listener, Node, Tape, place_of
from attncli.trace.together import Together
from attncli.trace.trails import Trail


class Before(NamedTuple):
    """A training before the step that is looked at: how many optimiser steps it took, and what they threw far out.

    `moved`: name of a parameter → (its largest magnitude before, after, the step).
    """

    steps: int
    moved: Mapping[str, tuple[float, float, int]]


NOTHING_BEFORE = Before(0, {})


@dataclass
class Run:
    tape: Tape
    book: Nonfinite
    result: Any = None
    raised: Exception | None = None
    # What was changed while it ran.
    changed: tuple[str, ...] = ()
    seen: list[tuple[str, str, Trail | None, Node | None]] = field(default_factory=list)


def run_step(
    model: Any,
    step: Callable[[Any], Any],
    backward: bool,
    summed: bool,
    rewind: Rewind,
    on_operator: Callable[[int], None] | None,
    limit: float,
    beside: Listener | None = None,
    inputs: Sequence[tuple[str, Tensor]] = (),
    sound: Iterable[Tensor] = (),
    before: Before = NOTHING_BEFORE,
) -> Run:
    """One run of `step(model)`. `beside`: another listener of the same run. `inputs`: tensors that are given to it.

    `sound`: parameters that are known to hold numbers alone. `before`: what earlier steps of the training did.
    """
    known = frozenset(place_of(tensor) for tensor in sound) - {None}
    book = Nonfinite(rewind=rewind, on_operator=on_operator, reach=Reach(limit), sound=known)
    book.steps_before = book.optimizer_steps = before.steps
    book.moved.update(before.moved)
    listener = book if beside is None else Together(book, beside)
    tape = Tape(listener)
    run = Run(tape, book)
    if isinstance(model, nn.Module):
        parameters = [(clean(name), tensor) for name, tensor in model.named_parameters()]
        buffers = [(clean(name), tensor) for name, tensor in model.named_buffers()]
        tape.name_parameters(parameters)
        tape.name_parameters(buffers)
        book.named = dict.fromkeys((name for name, _ in buffers), "buffer")
    tape.name_inputs(inputs)
    recorder = beside if isinstance(beside, Recorder) else None
    if recorder is not None:
        recorder.begins(model, before.steps, before.moved)
    with (
        watched(model, tape, listener) as notes,
        _optimizers(tape, book, recorder),
        _inputs(model, tape),
        tape,
    ):
        try:
            run.result = step(model)
            own_backward = book.own_backward
            run_backward(run.result, backward and not own_backward, summed)
            book.own_backward = own_backward
        except Exception as error:  # noqa: BLE001 - raised again unless its origin is found
            run.raised = error
    if tape.failure is not None:
        raise tape.failure
    run.changed = tuple(notes)
    if recorder is not None:
        recorder.ends(tape, list(tensors_shown(model, run.result)), run.raised)
    # What the run did not write to is not looked at again.
    named = [
        (name, tensor)
        for name, tensor in tensors_shown(model, run.result)
        if not name.startswith(("parameter", "buffer")) or rewind.wrote(tensor)
    ]
    for name, tensor, kind, trail in visible(tape, book, named):
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


def run_backward(result: Any, wanted: bool, summed: bool) -> None:
    loss = loss_of(result, summed) if wanted else None
    if loss is None:
        return
    try:
        loss.backward()
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise


def loss_of(result: Any, summed: bool = True) -> Tensor | None:
    """A scalar, the `.loss` of an output, or, `summed`, all floating outputs that have a gradient."""
    own = getattr(result, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        return own
    tensors = [t for _, t in tensors_in("output", result) if t.is_floating_point() and t.requires_grad]
    if len(tensors) == 1 and tensors[0].dim() == 0:
        return tensors[0]
    return sum((t.sum() for t in tensors[1:]), tensors[0].sum()) if tensors and summed else None


@contextmanager
def _optimizers(tape: Tape, book: Nonfinite, recorder: Recorder | None) -> Iterator[None]:
    def begins(optimizer: Any, args: Any, kwargs: Any) -> None:
        book.optimizer_begins(optimizer)
        if recorder is not None:
            recorder.optimizer_begins(tape, optimizer)

    def ends(optimizer: Any, args: Any, kwargs: Any) -> None:
        book.optimizer_ends(tape, optimizer)
        if recorder is not None:
            recorder.optimizer_ends(tape)

    handles = (register_optimizer_step_pre_hook(begins), register_optimizer_step_post_hook(ends))
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


def tensors_shown(model: Any, result: Any) -> Iterator[tuple[str, Tensor]]:
    """All that can be seen after a step: what it returned, gradients, parameters and buffers."""
    yield from tensors_in("output", result)
    if not isinstance(model, nn.Module):
        return
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield f"gradient of {clean(name)}", parameter.grad
    for name, parameter in model.named_parameters():
        yield f"parameter {clean(name)}", parameter.detach()
    for name, buffer in model.named_buffers():
        yield f"buffer {clean(name)}", buffer


def _is_guarded(book: Nonfinite) -> bool:
    """Whether a loss scaler saw to it that bad gradients moved nothing, and may yet recover."""
    if not book.skipped:
        return False
    return not all(book.skipped[-_SKIPS:]) or len(book.skipped) < _SKIPS


# --- settings -----------------------------------------------------------------------------------------

# Words of errors that validations raise: distributions, linear algebra, assertions of one's own.
_NUMBERS = (
    r"\bnan|\binf(inity|inite)?\b|finite|invalid value"
    r"|constraint|ill-conditioned|singular|probability tensor|not converge"
)
# A loss scaler that skips this many steps in a row does not recover.
_SKIPS = 3
