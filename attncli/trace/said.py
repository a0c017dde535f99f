"""What a record says of an operator that is run again without the code that once called it.

A rerun has no modules to enter, no user's line on the stack and no autograd: whoever asks where an operator stands
(the tape, the search for NaN, the proofs) asks here first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Said(NamedTuple):
    """Where the operator that runs now stood. `place`: file and line. `backward`: whether a gradient is computed.

    `forward`: the number of the operator whose gradient it computes. `differentiated`: whether the gradient of this
    one is computed later.
    """

    module: str
    place: tuple[str, int] | None
    backward: bool
    forward: int | None
    differentiated: bool


class Voice(threading.local):
    """`said`: of the operator that runs now in this thread; None while the user's own code runs."""

    said: Said | None = None


def said() -> Said | None:
    return _VOICE.said


@contextmanager
def speaking() -> Iterator[Voice]:
    """Whoever reruns a record sets `said` of what it gets before each operator."""
    before = _VOICE.said
    try:
        yield _VOICE
    finally:
        _VOICE.said = before


_VOICE = Voice()
