"""A listener that writes a run down as a flat `Program`, with copies of the tensors that no operator made.

Nothing is kept of what operators make: the program is their names, arguments and order. Memory that was there before
is copied when it is first read, because an operator may write to it later; parameters and buffers, which are large,
only when something is about to write to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from attncli.errors import AttncliError
from attncli.trace.memory import (
    SMALL,
    Memory,
    Source,
    copied,
    geometry_of,
    random_states,
    span,
    why_not,
    written_by,
)
from attncli.trace.naming import clean
from attncli.trace.operators import is_random, library_of, place_in_file, plain_value
from attncli.trace.ops import Op
from attncli.trace.origins import user_place
from attncli.trace.pairs import Pairs, in_backward
from attncli.trace.program import Leaf, Named, Operator, OptimizerStep, Program, View
from attncli.trace.tape import LEAF, Node, Ran, Ref, Tape


class Recorded(NamedTuple):
    """A program, the tensors of its leaves by key (in memory, on the CPU), and the random states before it."""

    program: Program
    leaves: Mapping[str, Tensor]
    random: Mapping[str, Tensor]


class Recorder:
    """The listener. `refused`: why the run cannot be written down; "" while it can."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """Nothing is written down yet: a run that follows another takes its place."""
        self.refused = ""
        self._operators: list[Operator] = []
        self._memories: dict[int, Memory] = {}
        self._leaves: list[Source] = []
        self._views: dict[int, tuple[int | None, Any]] = {}
        self._slots = 0
        self._named: list[tuple[str, str, Tensor, bool]] = []
        self._kinds: dict[str, str] = {}
        self._inputs: list[tuple[str, int]] = []
        self._shown: dict[str, int] = {}
        self._open: list[int] = []
        self._optimizers: list[OptimizerStep] = []
        self._generators: list[torch.Generator] = []
        self._random: dict[str, Tensor] = {}
        self._libraries: dict[str, None] = {}
        self._devices: dict[torch.device, int] = {}
        self._raised: tuple[str, str] | None = None
        self._steps_before = 0
        self._moved: Mapping[str, tuple[float, float, int]] = {}
        self._draws = False
        self._fails = False
        self._ended = False
        self._pairs = Pairs()

    # --- what the tape asks ---------------------------------------------------------------------------

    def hears(self, op: Op) -> bool:
        return True

    def holds(self, op: Op, operands: tuple[Ref, ...]) -> tuple[bool, ...]:
        return ()

    def dropout_module(self, node: Node, probability: float) -> None:
        """Dropout is an operator like others."""

    def enters(self, tape: Tape, op: Op, operands: tuple[Ref, ...], run: Ran) -> None:
        if self.refused:
            return
        # An operator that raised was not counted: the next one, after the error was caught, takes its place.
        del self._operators[tape.operators :]
        try:
            self._writes_down(tape, run, iter(operands))
        except _Refused as reason:
            self._refuse(str(reason))

    def ran(self, tape: Tape, op: Op, nodes: tuple[Node, ...], run: Ran) -> None:
        if self.refused:
            return
        try:
            # Behind what it returned stand the arguments that it wrote to, which have their slots.
            outputs = tuple(self._output(tensor) for tensor in run.outputs)
        except _Refused as reason:
            self._refuse(str(reason))
            return
        last = self._operators[-1]
        self._operators[-1] = Operator(
            last.name, last.args, last.kwargs, outputs, last.module, last.place, last.backward, last.forward
        )

    # --- what the step tells --------------------------------------------------------------------------

    def begins(self, model: Any, steps_before: int, moved: Mapping[str, tuple[float, float, int]]) -> None:
        """The run is about to begin: random states, which tensors are the model's, and what went before."""
        self._forget()
        self._steps_before, self._moved = steps_before, dict(moved)
        self._random = random_states()
        if not isinstance(model, nn.Module):
            return
        for prefix, module in model.named_modules(remove_duplicate=False):
            path = f"{prefix}." if prefix else ""
            unsaved: set[str] = getattr(module, "_non_persistent_buffers_set", set())
            for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
                self._named.append((clean(path + name), "parameter", tensor, True))
            for name, tensor in module.named_buffers(recurse=False, remove_duplicate=False):
                self._named.append((clean(path + name), "buffer", tensor, name not in unsaved))
        self._kinds = {name: kind for name, kind, _, _ in self._named}

    def optimizer_begins(self, tape: Tape, optimizer: Any) -> None:
        names = [tape.name_of(tensor) for group in optimizer.param_groups for tensor in group["params"]]
        known = tuple(dict.fromkeys(name for name in names if name is not None))
        self._open.append(len(self._optimizers))
        self._optimizers.append(OptimizerStep(tape.operators, -1, known))

    def optimizer_ends(self, tape: Tape) -> None:
        if self._open:
            self._close(self._open.pop(), tape.operators)

    def ends(self, tape: Tape, shown: Sequence[tuple[str, Tensor]], raised: Exception | None) -> None:
        """The run is over. `shown`: all that can be seen after it, by name."""
        self._ended = True
        if raised is None:
            del self._operators[tape.operators :]
        else:
            self._raised = (type(raised).__name__, str(raised))
            self._fails = len(self._operators) > tape.operators
        while self._open:
            self._close(self._open.pop(), len(self._operators))
        if self.refused:
            return
        try:
            with _disable_current_modes(), torch.no_grad():
                for name, tensor in shown:
                    self._show(tape, name, tensor)
                for _, _, tensor, _ in self._named:
                    if why_not(tensor) is None and tensor.device.type != "meta":
                        self._memory(tensor, tape, None)
        except _Refused as reason:
            self._refuse(str(reason))

    # --- the result -----------------------------------------------------------------------------------

    def recorded(self) -> Recorded:
        """The whole run. Errors: AttncliError where it cannot be written down, and why."""
        if not self._ended and not self.refused:
            self.refused = "no step was recorded"
        if self.refused:
            remedy = "Everything else of the report stands; only the capsule is missing."
            raise AttncliError("--capsule", f"the step cannot be written down: {self.refused}.", remedy)
        leaves, tensors = self._stored()
        program = Program(
            operators=tuple(self._operators),
            leaves=leaves,
            views={slot: self._view(*found) for slot, found in self._views.items()},
            tensors=tuple(
                Named(name, kind, self._view(memory.leaf, geometry_of(tensor)), persistent)  # type: ignore[arg-type]
                for name, kind, tensor, persistent in self._named
                if why_not(tensor) is None
                and (memory := self._memories.get(tensor.untyped_storage()._cdata)) is not None
            ),
            inputs=tuple(self._inputs),
            shown=self._shown,
            optimizers=tuple(self._optimizers),
            raised=self._raised,
            fails=self._fails,
            steps_before=self._steps_before,
            moved=self._moved,
            generators=tuple(str(generator.device) for generator in self._generators),
            device=str(max(self._devices, key=self._devices.__getitem__, default=torch.device("cpu"))),
            random=self._draws,
            libraries=tuple(self._libraries),
        )
        return Recorded(program, tensors, self._random)

    # --- one operator ---------------------------------------------------------------------------------

    def _writes_down(self, tape: Tape, run: Ran, operands: Any) -> None:
        if getattr(run.func, "_schema", None) is None:
            raise _Refused(f"{run.func} is a higher-order operator, which calls code of the user's")
        name = str(run.func)

        def tensor(value: Tensor) -> dict[str, int]:
            return {"slot": self._slot(value, tape, next(operands))}

        def generator(value: torch.Generator) -> dict[str, int]:
            return {"generator": self._generator(value)}

        try:
            args = tuple(plain_value(value, tensor, generator) for value in run.args)
            kwargs = {key: plain_value(value, tensor, generator) for key, value in run.kwargs.items()}
        except TypeError as error:
            raise _Refused(f"{name} was given {error}") from error
        if "as_strided" in name:
            self._keeps_whole(run.args[0])
        for target in written_by(run):
            self._keeps(target)
        self._draws = self._draws or is_random(run.func)
        library = library_of(run.func)
        if library is not None:
            self._libraries[library] = None
        backward = in_backward()
        forward = self._pairs.forward() if backward else None
        if not backward:
            self._pairs.runs(tape.operators)
        self._operators.append(
            Operator(name, args, kwargs, (), tape.module, place_in_file(user_place()), backward, forward)
        )

    def _output(self, tensor: Tensor) -> int:
        reason = why_not(tensor)
        if reason is not None:
            raise _Refused(f"{self._operators[-1].name} made {reason}")
        self._devices[tensor.device] = self._devices.get(tensor.device, 0) + 1
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is None:
            memory = self._memories[storage._cdata] = Memory(StorageWeakRef(storage))
            if len(self._memories) % _PURGE_EVERY == 0:
                self._purge()
        geometry = geometry_of(tensor)
        slot = memory.slots.get(geometry)
        if slot is None:
            slot = memory.slots[geometry] = self._next()
            if memory.first < 0:
                memory.first = slot
        return slot

    def _slot(self, tensor: Tensor, tape: Tape, ref: Ref | None) -> int:
        """The slot of a tensor that is read."""
        memory = self._memory(tensor, tape, ref)
        geometry = geometry_of(tensor)
        slot = memory.slots.get(geometry)
        if slot is None:
            slot = memory.slots[geometry] = self._next()
            if memory.leaf is not None:
                self._covers(self._leaves[memory.leaf], tensor)
                self._views[slot] = (memory.leaf, geometry)
            else:
                self._views[slot] = (None, (memory.first, geometry))
            name = _input_name(tape, ref)
            if name is not None and memory.leaf is not None:
                self._inputs.append((name, slot))
        return slot

    def _next(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _generator(self, generator: torch.Generator) -> int:
        for number, known in enumerate(self._generators):
            if known is generator:
                return number
        self._random[f"generator.{len(self._generators)}"] = generator.get_state().clone()
        self._generators.append(generator)
        return len(self._generators) - 1

    # --- leaves ---------------------------------------------------------------------------------------

    def _memory(self, tensor: Tensor, tape: Tape, ref: Ref | None) -> Memory:
        reason = why_not(tensor)
        if reason is not None:
            raise _Refused(f"it reads {reason}")
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is not None:
            return memory
        memory = self._memories[storage._cdata] = Memory(StorageWeakRef(storage), leaf=len(self._leaves))
        name, entered = tape.name_of(tensor), _input_name(tape, ref)
        start, stop = 0, storage.nbytes()
        if name is None:
            first, last = span(tensor)
            if stop > max(SMALL, 2 * (last - first)):
                start, stop = first, last
        found = Source(
            kind=self._kinds.get(name or "", "parameter") if name else "input" if entered else "constant",
            name=name or entered or "",
            storage=storage,
            device=tensor.device,
            dtype=tensor.dtype,
            start=start,
            stop=stop,
            weight=name is None and ref is not None and ref.node.constant and tensor.is_floating_point(),
        )
        if name is None:
            found.data = copied(found)
        self._leaves.append(found)
        return memory

    def _covers(self, leaf: Source, tensor: Tensor) -> None:
        """Of a large storage no more is kept than what is read; here more is read."""
        start, stop = span(tensor)
        if leaf.start <= start and stop <= leaf.stop:
            return
        if leaf.written:
            raise _Refused("a part of a large tensor is read after another part was written to")
        leaf.start, leaf.stop = min(start, leaf.start), max(stop, leaf.stop)
        if leaf.data is not None:
            leaf.data = copied(leaf)

    def _keeps_whole(self, tensor: Tensor) -> None:
        """The tensor is about to be read at places that count from the start of its storage."""
        memory = self._memories[tensor.untyped_storage()._cdata]
        leaf = self._leaves[memory.leaf] if memory.leaf is not None else None
        if leaf is None or (leaf.start, leaf.stop) == (0, leaf.storage.nbytes()):
            return
        if leaf.written:
            raise _Refused("a part of a large tensor is read after another part was written to")
        leaf.start, leaf.stop = 0, leaf.storage.nbytes()
        leaf.data = copied(leaf)

    def _keeps(self, tensor: Tensor) -> None:
        """The tensor is about to be written to."""
        memory = self._memories.get(tensor.untyped_storage()._cdata)
        if memory is not None and memory.leaf is not None:
            leaf = self._leaves[memory.leaf]
            leaf.written = True
            if leaf.data is None:
                leaf.data = copied(leaf)

    def _stored(self) -> tuple[tuple[Leaf, ...], dict[str, Tensor]]:
        leaves: list[Leaf] = []
        tensors: dict[str, Tensor] = {}
        whole = {
            name: tensor
            for name, _, tensor, _ in self._named
            if tensor.layout == torch.strided and tensor.is_contiguous()
        }
        constants = 0
        for found in self._leaves:
            data = found.data if found.data is not None else copied(found)
            key = found.name
            if found.kind == "constant":
                key, constants = f"constant {constants}", constants + 1
            elif found.kind == "input":
                key = f"input {key}"
            shaped = whole.get(found.name) if found.kind in ("parameter", "buffer") else None
            typed = data.view(found.dtype) if data.numel() % found.dtype.itemsize == 0 else data
            if shaped is not None and shaped.numel() == typed.numel():
                typed = typed.view(shaped.shape)
            number, base = 1, key
            while key in tensors:
                number += 1
                key = f"{base} ({number})"
            tensors[key] = typed
            leaves.append(Leaf(key, found.kind, str(found.device), data.numel(), found.weight))
        return tuple(leaves), tensors

    # --- what is seen afterwards ----------------------------------------------------------------------

    def _show(self, tape: Tape, name: str, tensor: Tensor) -> None:
        if name.startswith(("parameter ", "buffer ")):
            if why_not(tensor) is not None or tape.name_of(tensor) is not None:
                return
        elif name.startswith("gradient of ") and (
            why_not(tensor) is not None or tensor.untyped_storage()._cdata not in self._memories
        ):
            return  # from before the run, which did not look at it
        self._shown[name] = self._slot(tensor, tape, None)

    def _view(self, leaf: int | None, found: Any) -> View:
        of: int | None = None
        if leaf is None:
            of, found = found
        offset, shape, stride, dtype, conjugate, negative = found
        if leaf is not None:
            offset -= self._leaves[leaf].start // dtype.itemsize
        name = str(dtype).removeprefix("torch.")
        return View(leaf, of, name, shape, stride, offset, conjugate, negative)

    def _close(self, number: int, at: int) -> None:
        step = self._optimizers[number]
        self._optimizers[number] = OptimizerStep(min(step.begins, at), at, step.parameters)

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._operators.clear()
        self._memories.clear()
        self._leaves.clear()

    def _purge(self) -> None:
        dead = [key for key, one in self._memories.items() if one.leaf is None and one.reference.expired()]
        for key in dead:
            del self._memories[key]


class _Refused(Exception):  # noqa: N818 - never leaves this file
    """Why a run cannot be written down, as the end of a sentence."""


def _input_name(tape: Tape, ref: Ref | None) -> str | None:
    """The name of an input, where the tensor is one."""
    if ref is None or ref.node.parameter is not None or not ref.node.sources:
        return None
    node = ref.node
    while node.op is not LEAF and node.operands:
        node = node.operands[0].node
    names = tape.names_of(node.sources)
    return names[0].removeprefix("input ") if names else None


# --- settings -----------------------------------------------------------------------------------------

# Dead memories are looked for after this many new ones.
_PURGE_EVERY = 256
