"""One run that serves for both: every attention call is measured, every operator searched for NaN and Inf."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from attncli.trace import Trace, kept, named_inputs, surroundings, told
from attncli.trace.attention import Attention
from attncli.trace.naming import clean
from attncli.trace.nan import Found, find


class Checked(NamedTuple):
    trace: Trace
    found: Found


def check(
    model: Any,
    run: Callable[[], Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    wanted: Callable[[str], bool] = lambda module: True,
    on_call: Callable[[int], None] | None = None,
    confirm: bool = True,
    finite: Collection[str] = (),
) -> Checked:
    """Runs `run()` once, and again only to prove where NaN or Inf came from.

    The arguments are those of `trace`. `finite`: names of parameters that hold numbers alone. Errors: whatever `run`
    raises, unless what it tripped over was found: then the calls up to there are told.
    """
    listener = Attention(wanted, on_call)
    parameters = model.named_parameters() if isinstance(model, nn.Module) else ()
    try:
        with kept(model):
            found = find(
                model,
                lambda _: run(),
                backward=False,
                confirm=confirm,
                beside=listener,
                inputs=tuple(named_inputs(model, args, kwargs or {})),
                sound=[tensor for name, tensor in parameters if clean(name) in finite],
            )
    finally:
        listener.close()
    operators = sum(found.operators.values())
    return Checked(told(listener, operators, found.changed, surroundings(model, args), found.result), found)
