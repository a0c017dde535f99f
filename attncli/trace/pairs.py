"""Which forward operator an operator of the backward pass computes the gradient of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attncli.trace.said import said


def in_backward() -> bool:
    now = said()
    return now.backward if now is not None else torch._C._current_autograd_node() is not None


def gathers_gradients() -> bool:
    """Whether the operator that runs now adds to the gradient of a leaf."""
    node = torch._C._current_autograd_node()
    return node is not None and "AccumulateGrad" in node.name()


@dataclass(slots=True)
class Pairs:
    """Numbers of forward operators by autograd's sequence numbers, which nodes of the graph keep."""

    _operators: dict[int, int] = field(default_factory=dict)
    _sequence: int = 0

    def runs(self, at: int) -> bool:
        """Operator number `at` of the forward pass runs; whether it is the one that autograd has a new node for."""
        now = said()
        if now is not None:
            return now.differentiated
        sequence = torch._C._autograd._get_sequence_nr()
        if sequence == self._sequence:
            return False
        # One call may take several numbers, and numbers taken before the run began are nobody's.
        self._operators.update(
            (n, at) for n in range(max(self._sequence, sequence - _MOST_AT_ONCE), sequence)
        )
        self._sequence = sequence
        return True

    def forward(self) -> int | None:
        """The number of the forward operator whose gradient is computed now."""
        now = said()
        if now is not None:
            return now.forward
        node = torch._C._current_autograd_node()
        return self._operators.get(node._sequence_nr()) if node is not None else None


_MOST_AT_ONCE = 16
