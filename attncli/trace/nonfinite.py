"""Where values stopped being finite: births, and what carried them to what can be seen.

A listener of the tape. Every floating output is looked at once (its smallest and largest element); only what is
not finite gets a record. Each NaN and each sign of Inf in a tensor has a `Trail`: whether the code put it there on
purpose, and which origins it came from. An origin is a birth (finite in, not finite out), a fill (a literal −Inf,
a mask), a leaf (a parameter, a buffer, an input that was bad already) or memory that nobody had written. What is
clean again has no trail, so nothing is blamed for values that were cleaned away.

Forward, backward and optimiser are one graph: every operator passes the tape, whoever called it. An operator of
the backward pass is paired, by autograd's sequence number, with the forward operator whose gradient it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attncli.trace.elements import at_once, explaining, fine_elements, finite, kinds_of, of_kind
from attncli.trace.facts import Given, facts_of
from attncli.trace.ops import Op
from attncli.trace.origins import user_place
from attncli.trace.pairs import Pairs, gathers_gradients, in_backward
from attncli.trace.reach import Reach
from attncli.trace.rewind import Rewind
from attncli.trace.roles import (
    CHOOSES,
    FILLS,
    POISONED,
    SELECTING,
    SELECTS,
    UNWRITTEN,
    grouped,
    is_finite,
    is_readable,
    is_view,
    keeps_fills,
    literals_of,
    overwritten,
    tensors_of,
)
from attncli.trace.tape import ALIAS, LEAF, Node, Ran, Ref, Tape, place_of
from attncli.trace.trails import Bad, Forward, Operand, Origin, Role, Trail


@dataclass(slots=True)
class Nonfinite:
    """The listener. `reach`: the largest finite magnitudes that operators made.

    `sound`: the places of parameters that were read before and hold numbers alone.
    """

    rewind: Rewind = field(default_factory=Rewind)
    origins: list[Origin] = field(default_factory=list)
    states: dict[int, Bad] = field(default_factory=dict)
    reach: Reach = field(default_factory=Reach)
    sound: frozenset[Any] = frozenset()
    unread: int = 0
    phases: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0, "optimizer": 0})
    optimizer_steps: int = 0
    in_optimizer: int = 0
    on_operator: Callable[[int], None] | None = None
    # Which phase a name on the tape belongs to: "parameter", "buffer".
    named: Mapping[str, str] = field(default_factory=dict)
    # Large parameters that an optimiser moved: name → (largest magnitude before, after, the step).
    moved: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    # Optimiser steps that were taken before this run, of which `moved` may know.
    steps_before: int = 0
    # For each update of a loss scaler, whether it saw bad gradients.
    skipped: list[bool] = field(default_factory=list)
    # The newest value that is bad and was not meant to be.
    last: Node | None = None
    # Whether gradients were gathered: a call of autograd.grad gathers none.
    own_backward: bool = False
    # The first operator of the backward pass.
    backward_from: int | None = None
    _seen: set[int] = field(default_factory=set)
    _absmax: dict[str, float] = field(default_factory=dict)
    _forwards: dict[int, Forward] = field(default_factory=dict)
    _pairs: Pairs = field(default_factory=Pairs)
    _before: dict[int, Tensor] = field(default_factory=dict)

    # --- what the tape asks ---------------------------------------------------------------------------

    def hears(self, op: Op) -> bool:
        return True

    def holds(self, op: Op, operands: tuple[Ref, ...]) -> tuple[bool, ...]:
        return ()

    def dropout_module(self, node: Node, probability: float) -> None:
        """Where dropout stands is of no interest here."""

    def enters(self, tape: Tape, op: Op, operands: tuple[Ref, ...], run: Ran) -> None:
        self._before.clear()
        tensors = tensors_of(run.args, run.kwargs)
        for position, (ref, tensor) in enumerate(zip(operands, tensors, strict=True)):
            node = ref.node
            if node.op is LEAF and node.serial not in self._seen:
                self._leaf(tape, node, tensor, position)
                self._written_out(op, node, tensor)
            elif node.op is ALIAS and node.serial not in self._seen:
                self._alias(node, tensor)
        if op.writes:
            for target in tensors_of([run.args[at] for at in op.writes if at < len(run.args)], {}):
                self.rewind.save(target)
                if target.is_floating_point():
                    self._before[id(target)] = target.detach().clone()

    def ran(self, tape: Tape, op: Op, nodes: tuple[Node, ...], run: Ran) -> None:
        phase = self._phase(tape, op, nodes[0])
        self.phases[phase] += 1
        if self.on_operator is not None and tape.operators % 100 == 0:
            self.on_operator(tape.operators)
        if op.name == "_amp_foreach_non_finite_check_and_unscale":
            self.skipped.append(bool(run.args[1].item()))
            return
        if op.name in UNWRITTEN:
            self._unwritten(tape, op, nodes, run, phase)
            return
        states = self.states
        bad = bool(states) and any(ref.node.serial in states for ref in nodes[0].operands)
        if not bad and is_view(run.func) and is_readable(run.args[0]):
            return
        tensors: list[Tensor] | None = None
        groups: list[list[int]] | None = None
        for number, (node, output) in enumerate(zip(nodes, run.outputs, strict=True)):
            if not is_readable(output):
                if bad and op.name in CHOOSES:
                    tensors = tensors or tensors_of(run.args, run.kwargs)
                    self._absorbed(op, node, self._given(op, node, run, tensors, range(len(tensors))))
                continue
            low, high = self._look(output)
            if is_finite(low) and is_finite(high):
                self.reach.made(node, run, low, high)
                if not bad:
                    continue
            if tensors is None:
                tensors = tensors_of(run.args, run.kwargs)
                groups = grouped(op, run.args, len(run.outputs))
            chosen = groups[number] if groups is not None else range(len(tensors))
            given = self._given(op, node, run, tensors, chosen)
            if is_finite(low) and is_finite(high):
                self._absorbed(op, node, given)
            else:
                self._judge(tape, op, node, output, given, run, phase)

    def _given(
        self, op: Op, node: Node, run: Ran, tensors: Sequence[Tensor], chosen: Iterable[int]
    ) -> list[Operand]:
        return [
            Operand(
                node.operands[at],
                self._before.get(id(tensors[at]), tensors[at]),
                self.states.get(node.operands[at].node.serial, {}),
            )
            for at in chosen
            if not overwritten(op, run, at, tensors[at])
        ]

    # --- one operator ---------------------------------------------------------------------------------

    def _judge(
        self,
        tape: Tape,
        op: Op,
        node: Node,
        output: Tensor,
        given: Sequence[Operand],
        run: Ran,
        phase: str,
    ) -> None:
        """Says of each kind of bad value in an output whether it was born here, filled in, or came along."""
        literals = literals_of(run.args, run.kwargs)
        bad: Bad = {}
        fine: dict[bool, Tensor | None] = {}
        born: list[str] = []
        given = [self._as_read(tape, one, node, phase, number) for number, one in enumerate(given)]
        for kind in kinds_of(output):
            sources = self._sources(op, kind, given, run, output)
            # A factor or a difference may turn the sign of the Inf that was written.
            turned = kind != "nan" and bool(literals - {"nan"}) and op.kind in ("factor", "sum")
            written = kind in literals or turned
            if written and op.kind in FILLS:
                number = self._origin("fill", (kind,), phase, op, node, tape).number
                bad[kind] = Trail(kind != "nan", (number,))
                continue
            if sources:
                # What was filled in on purpose explains an Inf, but no NaN.
                strict = kind != "nan"
                if strict not in fine:
                    fine[strict] = fine_elements(
                        op,
                        [(one.value, () if strict else self._meant(op, one)) for one in given],
                        run,
                        output,
                    )
                here, known = of_kind(output, kind), fine[strict]
                mine = known & here if known is not None else None
                if mine is None or not bool(mine.any()):
                    bad[kind] = _joined(sources)
                    continue
                born.append(kind)
                rest = bool((here & ~mine).any())
                bad[kind] = _joined(sources) if rest else Trail(False, ())
            else:
                born.append(kind)
                bad[kind] = Trail(False, ())
        if born:
            origin = self._origin("birth", tuple(born), phase, op, node, tape)
            origin.masks = tuple(
                dict.fromkeys(
                    number
                    for one in given
                    for trail in one.bad.values()
                    if trail.intended
                    for number in trail.origins
                )
            )
            if len(self.origins) < _MOST_EXAMINED:
                where, known = of_kind(output, born[0]), fine.get(born[0] != "nan")
                if known is not None and bool((where & known).any()):
                    where = where & known
                origin.facts = facts_of(op, [Given(one.ref, one.value) for one in given], run, output, where)
            for kind in born:
                trail = bad[kind]
                bad[kind] = Trail(False, (*trail.origins, origin.number))
        self.states[node.serial] = bad
        if not all(trail.intended for trail in bad.values()):
            self.last = node
        if op.kind == "lookup":
            self._looked_up(node, given, bad)

    def _meant(self, op: Op, one: Operand) -> tuple[str, ...]:
        """The signs of Inf in an operand that are there on purpose. Data in a product with weights is no mask."""
        return tuple(
            kind
            for kind, trail in one.bad.items()
            if trail.intended
            and not (op.product and all(self.origins[number].role == "leaf" for number in trail.origins))
        )

    def _as_read(self, tape: Tape, one: Operand, reader: Node, phase: str, position: int) -> Operand:
        """An operand that was finite when it was made and is not when it is read was written to outside torch."""
        if one.bad or not is_readable(one.value):
            return one
        low, high = self._look(one.value)
        if is_finite(low) and is_finite(high):
            return one
        kinds = kinds_of(one.value)
        origin = self._origin("outside", kinds, phase, one.ref.node.op, one.ref.node, tape)
        origin.at, origin.position, origin.reader = reader.at, position, reader
        origin.facts = facts_of(LEAF, [], None, one.value, ~finite(one.value))
        bad = {kind: Trail(False, (origin.number,)) for kind in kinds}
        self.states[one.ref.node.serial] = bad
        return one._replace(bad=bad)

    def _sources(
        self, op: Op, kind: str, given: Sequence[Operand], run: Ran, output: Tensor
    ) -> list[tuple[Node, Trail]]:
        """The trails of the operands that explain this kind of value in the output."""
        found = [(one.ref.node, name, trail) for one in given for name, trail in one.bad.items()]
        if kind == "nan":
            if all(trail.intended for _, _, trail in found):
                # An intended −Inf explains no NaN: a row of nothing else, 0·Inf and Inf − Inf are births.
                return (
                    []
                    if keeps_fills(op, [bool(one.bad) for one in given])
                    else self._leaves((node, trail) for node, _, trail in found)
                )
            telling = explaining(op, [(one.value, tuple(one.bad)) for one in given], run, output)
            return [
                (one.ref.node, trail)
                for number, one in enumerate(given)
                for name, trail in one.bad.items()
                if not trail.intended and (number, name) in telling
            ]
        same = [(node, trail) for node, name, trail in found if name == kind]
        other = [(node, trail) for node, name, trail in found if name != kind]
        sources = same or [pair for pair in other if not pair[1].intended] or other
        if (
            sources
            and all(trail.intended for _, trail in sources)
            and not keeps_fills(op, [bool(one.bad) for one in given])
        ):
            # What was filled in to hide something has got into a sum.
            return self._leaves(sources)
        return sources

    def _leaves(self, sources: Iterable[tuple[Node, Trail]]) -> list[tuple[Node, Trail]]:
        """Of intended values that got into a sum, those that were there before the run: data that is no mask."""
        return [
            (node, trail._replace(intended=False))
            for node, trail in sources
            if any(self.origins[number].role == "leaf" for number in trail.origins)
        ]

    def _absorbed(self, op: Op, node: Node, given: Sequence[Operand]) -> None:
        selects = op.kind in SELECTS or op.name in SELECTING
        for one in given:
            for kind, trail in one.bad.items():
                # No arithmetic makes a number of NaN; a fused kernel does, of rows that it takes for empty.
                swallowed = kind != "nan" or op.kind == "fused"
                for number in () if trail.intended or not (selects or swallowed) else trail.origins:
                    found = self.origins[number].hidden if selects else self.origins[number].absorbed
                    if len(found) < _MOST_KEPT:
                        found.append(node)

    def _origin(
        self, role: Role, kinds: tuple[str, ...], phase: str, op: Op, node: Node, tape: Tape
    ) -> Origin:
        forward = self._forward() if phase == "backward" else None
        origin = Origin(
            number=len(self.origins),
            role=role,
            kinds=kinds,
            phase=phase,
            op=op,
            node=node,
            at=node.at,
            module=forward.module if forward is not None else node.module,
            place=forward.place if forward is not None else user_place(),
            dtype=node.dtype,
            forward=forward,
            step=self.optimizer_steps,
        )
        self.origins.append(origin)
        return origin

    def _unwritten(self, tape: Tape, op: Op, nodes: tuple[Node, ...], run: Ran, phase: str) -> None:
        """Memory that was only reserved is filled with NaN, so that whoever reads it before writing shows up."""
        for node, output in zip(nodes, run.outputs, strict=True):
            if not (is_readable(output) and output.dtype in POISONED):
                continue
            output.fill_(float("nan"))
            origin = self._origin("unwritten", ("nan",), phase, op, node, tape)
            self.states[node.serial] = {"nan": Trail(False, (origin.number,))}

    # --- leaves ---------------------------------------------------------------------------------------

    def _leaf(self, tape: Tape, node: Node, tensor: Tensor, position: int = 0) -> None:
        """Looks at a tensor that no operator of this run made."""
        self._seen.add(node.serial)
        self.rewind.existed(tensor)
        if not is_readable(tensor) or (self.sound and place_of(tensor) in self.sound):
            return
        low, high = self._look(tensor)
        name = node.parameter
        if name is not None:
            self._absmax.setdefault(name, max(abs(low), abs(high)))
        if is_finite(low) and is_finite(high):
            if name is None or name in self.named:
                self.reach.given(node, low, high)
            return
        inputs = tape.names_of(node.sources)
        phase = self.named.get(name, "parameter") if name else "input"
        kinds = kinds_of(tensor)
        origin = self._origin("leaf", kinds, phase, LEAF, node, tape)
        origin.at, origin.position = tape.operators, position
        origin.name = name or (inputs[0].removeprefix("input ") if inputs else None)
        origin.facts = facts_of(LEAF, [], None, tensor, ~finite(tensor))
        # −Inf in what is no parameter is a mask, or the logarithm of silence; what comes of it will show.
        self.states[node.serial] = {
            kind: Trail(_is_meant(kind, phase, bool(name or inputs), tensor.numel()), (origin.number,))
            for kind in kinds
        }

    def _written_out(self, op: Op, node: Node, tensor: Tensor) -> None:
        """A single NaN that no argument holds is a literal of the code: `x[0] = float("nan")`."""
        bad = self.states.get(node.serial, {})
        if "nan" in bad and node.parameter is None and not node.sources and tensor.dim() == 0:
            origin = self.origins[bad["nan"].origins[0]]
            origin.role, origin.phase, origin.op = "fill", "forward", op

    def _alias(self, node: Node, tensor: Tensor) -> None:
        """Looks at a view that nobody saw being made, where what lies under it is not clean."""
        self._seen.add(node.serial)
        under = node.operands[0].node
        found: Bad = {}
        waiting: list[Node] = [under]
        met: set[int] = set()
        while waiting and len(met) < _MOST_KEPT:
            one = waiting.pop()
            if one.serial in met:
                continue
            met.add(one.serial)
            for kind, trail in self.states.get(one.serial, {}).items():
                found.setdefault(kind, trail)
            if one.op is ALIAS or one.op.writes:
                waiting += [ref.node for ref in one.operands]
        if not found or not is_readable(tensor):
            return
        kept = {kind: found.get(kind, next(iter(found.values()))) for kind in kinds_of(tensor)}
        if kept:
            self.states[node.serial] = kept

    def _looked_up(self, node: Node, given: Sequence[Operand], bad: Bad) -> None:
        """Which rows of a table were asked for, and where: kept with the table's origin."""
        table = given[0]
        if len(given) < 2 or not table.bad:
            return
        indices = given[1].value
        rows = ~torch.isfinite(table.value).flatten(1).all(-1)
        hits = rows[indices.clamp(0, len(rows) - 1)]
        if not bool(hits.any()):
            return
        first = hits.nonzero()[0].tolist()
        facts = {
            "token": int(indices[tuple(first)]),
            "at": first,
            "hits": int(hits.sum()),
            "rows": int(rows.sum()),
        }
        for trail in bad.values():
            for number in trail.origins:
                if self.origins[number].role == "leaf":
                    self.origins[number].facts.setdefault("lookup", facts)

    # --- phases ---------------------------------------------------------------------------------------

    def _phase(self, tape: Tape, op: Op, node: Node) -> str:
        if in_backward():
            self.own_backward = self.own_backward or gathers_gradients()
            if self.backward_from is None:
                self.backward_from = node.at
            return "backward"
        if self._pairs.runs(node.at):
            self._forwards[node.at] = Forward(op.name, node.module, user_place(), node.at, node)
        return "optimizer" if self.in_optimizer else "forward"

    def _forward(self) -> Forward | None:
        at = self._pairs.forward()
        return self._forwards.get(at) if at is not None else None

    def _look(self, tensor: Tensor) -> tuple[float, float]:
        """Smallest and largest element; NaN where there is one; (0, 0) of a dtype that cannot be compared."""
        try:
            return at_once(tensor)
        except (NotImplementedError, RuntimeError):
            self.unread += 1
            return 0.0, 0.0

    # --- optimisers -----------------------------------------------------------------------------------

    def optimizer_begins(self, optimizer: Any) -> None:
        self.in_optimizer += 1
        self.rewind.save_optimizer(optimizer)

    def optimizer_ends(self, tape: Tape, optimizer: Any) -> None:
        self.in_optimizer -= 1
        self.optimizer_steps += 1
        with _disable_current_modes(), torch.no_grad():  # what is looked at here is no operator of the step
            self._moved_by(tape, optimizer)

    def _moved_by(self, tape: Tape, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = tape.name_of(parameter)
                if name is None or not is_readable(parameter):
                    continue
                low, high = self._look(parameter.detach())
                after, before = max(abs(low), abs(high)), self._absmax.get(name, 0.0)
                if is_finite(after) and after > _MOVED * max(before, 1e-3) and name not in self.moved:
                    self.moved[name] = (before, after, self.optimizer_steps)
                self._absmax[name] = after


# --- reading ------------------------------------------------------------------------------------------


def visible(
    tape: Tape, book: Nonfinite, named: Sequence[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor, str, Trail | None]]:
    """Of what can be seen after a run: (name, tensor, kind, trail) of all that is bad and was not meant to be.

    `trail` None: the value was made where no tape could look.
    """
    for name, tensor in named:
        if not is_readable(tensor) or all(map(is_finite, book._look(tensor.detach()))):
            continue
        kinds = kinds_of(tensor)
        node = tape.node(tensor)
        if node.serial not in book.states:
            book._leaf(tape, node, tensor) if node.op is LEAF else book._alias(node, tensor)
        state = book.states.get(node.serial, {})
        for kind in kinds:
            trail = state.get(kind) or next(iter(state.values()), None)
            if trail is None or not trail.intended:
                yield name, tensor, kind, trail


def way(book: Nonfinite, origin: Origin, node: Node) -> list[Node]:
    """The nodes from an origin to `node`, the origin's own first; views that nobody saw made are left out."""
    found: list[Node] = []
    here: Node | None = node
    for _ in range(_LONGEST_WAY):
        if here is None:
            break
        if here.op not in (LEAF, ALIAS):
            found.append(here)
        if here is origin.node:
            break
        here = next((ref.node for ref in here.operands if _came_from(book, origin, ref.node)), None)
    return found[::-1]


def _came_from(book: Nonfinite, origin: Origin, node: Node) -> bool:
    return any(origin.number in trail.origins for trail in book.states.get(node.serial, {}).values())


def _joined(sources: Sequence[tuple[Node, Trail]]) -> Trail:
    unintended = [pair for pair in sources if not pair[1].intended]
    chosen = unintended or sources
    origins = tuple(dict.fromkeys(number for _, trail in chosen for number in trail.origins))
    return Trail(not unintended, origins[:_MOST_KEPT])


def _is_meant(kind: str, phase: str, known: bool, elements: int) -> bool:
    """Whether a leaf's Inf is a mask or the like: −Inf in what is no parameter, Inf as a constant of the code."""
    if kind == "nan":
        return False
    return (kind == "-inf" and phase != "parameter") or (not known and elements == 1)


# --- tables -------------------------------------------------------------------------------------------

_MOST_KEPT = 16
_MOST_EXAMINED = 256
_LONGEST_WAY = 4096
# A parameter that grew by more than this in one optimiser step was thrown, not trained.
_MOVED = 1e3
