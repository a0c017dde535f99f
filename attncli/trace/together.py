"""Two listeners on one tape: what is measured and what is searched in the same run."""

from __future__ import annotations

from attncli.trace.ops import Op
from attncli.trace.tape import Listener, Node, Ran, Ref, Tape


class Together:
    """A listener that passes on to both what each wants to hear."""

    def __init__(self, first: Listener, second: Listener) -> None:
        self._both = (first, second)

    def hears(self, op: Op) -> bool:
        return any(listener.hears(op) for listener in self._both)

    def holds(self, op: Op, operands: tuple[Ref, ...]) -> tuple[bool, ...]:
        first, second = (listener.holds(op, operands) for listener in self._both)
        return (
            tuple(a or b for a, b in zip(first, second, strict=True)) if first and second else first or second
        )

    def enters(self, tape: Tape, op: Op, operands: tuple[Ref, ...], run: Ran) -> None:
        for listener in self._both:
            if listener.hears(op):
                listener.enters(tape, op, operands, run)

    def ran(self, tape: Tape, op: Op, nodes: tuple[Node, ...], run: Ran) -> None:
        for listener in self._both:
            if listener.hears(op):
                listener.ran(tape, op, nodes, run)

    def dropout_module(self, node: Node, probability: float) -> None:
        for listener in self._both:
            listener.dropout_module(node, probability)
