"""A flat program → the step it was, without the code that it came from.

The operators run in order on the leaves, without autograd. What the user's modules, lines and autograd would tell of
each is said from the record, so that a tape, a search for NaN and its proofs see the run as they saw the first one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from attncli.errors import AttncliError
from attncli.trace.operators import dtype_of, import_libraries, operator_of, value_of
from attncli.trace.program import OptimizerStep, Program, View, damaged, extent, slots_in
from attncli.trace.said import Said, Voice, speaking


class Rerun:
    """A step that repeats a program: call it with its own `model`, as often as wanted.

    `model`: a bare nn.Module with the parameters and buffers by name. `inputs`: what the step is given, by name.
    `leaves`: tensors by the keys of the program, which are copied; `random`: the random states before the run.
    `trust`: whether libraries that define operators may be imported. The random states of this process are those of
    the program afterwards; parameters that the program writes to stay written to.
    Errors: AttncliError about `subject` where the record is damaged, or calls what is not here.
    """

    def __init__(
        self,
        program: Program,
        leaves: Mapping[str, Tensor],
        random: Mapping[str, Tensor],
        *,
        device: torch.device,
        subject: str = "the recorded step",
        trust: bool = False,
    ) -> None:
        self.program, self._subject = program, subject
        self._place, self._random = _moved(program.device, device), random
        if trust:
            import_libraries(program.libraries, subject)
        try:
            self._calls = self._resolved(trust)
            self._memory = self._leaves(leaves)
            self._views = {
                slot: self._leaf_view(view) for slot, view in program.views.items() if view.leaf is not None
            }
            self.model = self._bare_model()
            self.inputs = tuple(
                (name, self._views[slot]) for name, slot in program.inputs if slot in self._views
            )
        except (ValueError, OverflowError, TypeError) as error:
            raise damaged(subject, str(error)) from error
        except (RuntimeError, MemoryError) as error:
            raise AttncliError(
                subject, f"it cannot be loaded here: {_first_line(error)}.", _ELSEWHERE
            ) from error
        if missing := [n for n in range(len(program.generators)) if f"generator.{n}" not in random]:
            raise damaged(subject, f"the state of random generator {missing[0]} is missing")
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._values = {name: parameter.data for name, parameter in self._parameters.items()}
        self._optimizers = [_Recorded(self._stepped(step)) for step in program.optimizers]
        self._frees = _frees(program)
        # What the first run read out of its tensors: code that raised an error did so because of these.
        self._read: list[Any] | None = None

    def __call__(self, model: Any) -> Any:
        """Runs the program once. Gives its outputs by name and sets the gradients of `model`, which is its own."""
        tensors: dict[int, Tensor] = {}
        numbers: list[Any] = []
        with torch.no_grad(), speaking() as voice:
            try:
                with _disable_current_modes():
                    self._begin()
                    generators = self._generators()
            except (RuntimeError, TypeError, ValueError) as error:
                problem = f"a random state is none that torch takes here ({_first_line(error)})"
                raise damaged(self._subject, problem) from error
            steps = deque(zip(self.program.optimizers, self._optimizers, strict=True))
            self._until(0, len(self._calls), steps, voice, tensors, numbers, generators)
            first = self._read if self._read is not None else numbers
            self._read = first
            if self.program.raised is not None and not self.program.fails and _same(first, numbers):
                kind, text = self.program.raised
                raise type(kind, (Stopped,), {})(text)
            with _disable_current_modes():
                return self._end(tensors)

    # --- one run --------------------------------------------------------------------------------------

    def _until(
        self,
        at: int,
        end: int,
        steps: deque[tuple[OptimizerStep, _Recorded]],
        voice: Voice,
        tensors: dict[int, Tensor],
        numbers: list[Any],
        generators: Sequence[torch.Generator],
    ) -> int:
        """Runs operators up to number `end`; those of an optimiser inside a step of its stand-in."""
        while True:
            if steps and steps[0][0].begins <= at and steps[0][0].ends <= end:
                step, optimizer = steps.popleft()

                def inside(begins: int = step.begins, ends: int = step.ends) -> int:
                    return self._until(begins, ends, steps, voice, tensors, numbers, generators)

                at = optimizer.step(inside)
            elif at < end:
                self._one(at, voice, tensors, numbers, generators)
                at += 1
            else:
                return at

    def _one(
        self,
        at: int,
        voice: Voice,
        tensors: dict[int, Tensor],
        numbers: list[Any],
        generators: Sequence[torch.Generator],
    ) -> None:
        call = self._calls[at]

        def filled(value: Any) -> Any:
            if isinstance(value, list):
                return [filled(item) for item in value]
            if isinstance(value, _Slot):
                return self._tensor(value.number, tensors)
            return generators[value.number] if isinstance(value, _Generator) else value

        try:
            args = [filled(value) for value in call.args]
            kwargs = {name: filled(value) for name, value in call.kwargs.items()}
            voice.said = call.said
            try:
                result = call.function(*args, **kwargs)
            finally:
                voice.said = None
        except Exception as error:
            if self.program.fails and at == len(self._calls) - 1:
                raise
            if isinstance(error, AttncliError):
                raise
            what = f"operator {at}, {self.program.operators[at].name}, cannot be repeated here: {_first_line(error)}."
            raise AttncliError(self._subject, what, _ELSEWHERE) from error
        made = [one for one in _flat(result) if isinstance(one, Tensor)]
        if not made and isinstance(result, (bool, int, float)):
            numbers.append(result)
        tensors.update(zip(call.outputs, made, strict=False))
        for slot in self._frees.get(at, ()):
            tensors.pop(slot, None)

    def _tensor(self, slot: int, tensors: dict[int, Tensor]) -> Tensor:
        found = tensors.get(slot)
        if found is None:
            found = self._views.get(slot)
        if found is not None:
            return found
        view = self.program.views.get(slot)
        base = tensors.get(view.of) if view is not None and view.of is not None else None
        if view is None or base is None:
            raise damaged(self._subject, f"slot {slot} was not made by the operator that should have")
        with _disable_current_modes():
            try:
                found = _view(view, base.untyped_storage(), base.device)
            except ValueError as error:
                raise damaged(self._subject, str(error)) from error
        tensors[slot] = found
        return found

    def _begin(self) -> None:
        """Random states and parameters as they were; no gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            if parameter.data_ptr() != self._values[name].data_ptr():
                parameter.data = self._values[name]
        for name, state in self._random.items():
            _set_random(name, state, self._place)

    def _generators(self) -> list[torch.Generator]:
        found = []
        for number, name in enumerate(self.program.generators):
            generator = torch.Generator(self._place(name))
            if generator.device.type == torch.device(name).type:
                generator.set_state(self._random[f"generator.{number}"].clone())
            found.append(generator)
        return found

    def _end(self, tensors: dict[int, Tensor]) -> Any:
        """Puts gradients, and what took the place of parameters and buffers, where they belong; gives the outputs."""
        outputs: dict[str, Tensor] = {}
        # A parameter that got another dtype takes no gradient of it before.
        shown = sorted(self.program.shown.items(), key=lambda item: item[0].startswith("gradient of "))
        for name, slot in shown:
            tensor = self._tensor(slot, tensors)
            what, _, rest = name.partition(" of ") if name.startswith("gradient of ") else name.partition(" ")
            try:
                if what == "gradient":
                    self._parameter(rest).grad = tensor
                elif what == "parameter":
                    self._parameter(rest).data = tensor
                elif what == "buffer":
                    path, _, last = rest.rpartition(".")
                    _child(self.model, path)._buffers[last] = tensor
                else:
                    outputs[name] = tensor
            except (KeyError, RuntimeError, TypeError) as error:
                raise damaged(self._subject, f"{name} does not fit the model") from error
        if set(outputs) == {_WHOLE}:
            return outputs[_WHOLE]
        return {name.removeprefix(f"{_WHOLE}."): tensor for name, tensor in outputs.items()}

    def _parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name; a new one where the step itself gave it to the model."""
        found = self._parameters.get(name)
        if found is None:
            path, _, last = name.rpartition(".")
            found = nn.Parameter(torch.empty(0), requires_grad=False)
            self._parameters[name] = _child(self.model, path)._parameters[last] = found
            self._values[name] = found.data
        return found

    # --- reading the record ---------------------------------------------------------------------------

    def _resolved(self, trust: bool) -> list[_Call]:
        functions: dict[str, Any] = {}
        differentiated = {one.forward for one in self.program.operators}
        found = []
        for number, one in enumerate(self.program.operators):
            if one.name not in functions:
                functions[one.name] = operator_of(one.name, self._subject, trust)
            said = Said(one.module, one.place, one.backward, one.forward, number in differentiated)
            args = [value_of(value, self._place, self._special) for value in one.args]
            kwargs = {name: value_of(value, self._place, self._special) for name, value in one.kwargs.items()}
            found.append(_Call(functions[one.name], args, kwargs, one.outputs, said))
        return found

    def _special(self, kind: str, value: Any) -> Any:
        if kind == "slot":
            return _Slot(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value not in range(len(self.program.generators))
        ):
            raise ValueError(f"there is no random generator {value!r}")
        return _Generator(value)

    def _leaves(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """The bytes of each leaf, in memory of their own on the device."""
        found = []
        for leaf in self.program.leaves:
            given = leaves.get(leaf.key)
            if given is None:
                raise ValueError(f"the tensor {leaf.key!r} is missing")
            if given.numel() * given.element_size() != leaf.size:
                held = given.numel() * given.element_size()
                raise ValueError(f"the tensor {leaf.key!r} has {held} bytes and should have {leaf.size}")
            flat = given.detach().contiguous().reshape(-1).view(torch.uint8)
            found.append(flat.to(self._place(leaf.device), copy=True))
        return found

    def _leaf_view(self, view: View) -> Tensor:
        number = view.leaf or 0
        memory, leaf = self._memory[number], self.program.leaves[number]
        tensor = _view(view, memory.untyped_storage(), memory.device)
        return nn.Parameter(tensor, requires_grad=False) if leaf.weight else tensor

    def _bare_model(self) -> nn.Module:
        model = nn.Module()
        known: dict[Any, Tensor] = {}
        for named in self.program.tensors:
            path, _, last = named.name.rpartition(".")
            home = _child(model, path)
            key = (named.kind, named.view)
            tensor = known.get(key)
            if tensor is None:
                tensor = self._leaf_view(named.view)
                if named.kind == "parameter":
                    learns = tensor.is_floating_point() or tensor.is_complex()
                    tensor = nn.Parameter(tensor, requires_grad=learns)
                known[key] = tensor
            if isinstance(tensor, nn.Parameter):
                home._parameters[last] = tensor
            else:
                home._buffers[last] = tensor
                if not named.persistent:
                    home._non_persistent_buffers_set.add(last)
        return model

    def _stepped(self, step: OptimizerStep) -> list[nn.Parameter]:
        found = [self._parameters[name] for name in step.parameters if name in self._parameters]
        unique = list({id(parameter): parameter for parameter in found}.values())
        return unique or [nn.Parameter(torch.zeros(1))]


def device_name(device: str) -> str:
    """ "cpu", or what the GPU is called: kernels and random numbers differ between two of them."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    return device.partition(":")[0]


class Stopped(Exception):  # noqa: N818 - its subclasses carry the name of what the user's code raised
    """What the user's code raised at the end of the step that was recorded."""


class _Recorded(torch.optim.Optimizer):
    """Stands for an optimiser of the user's, so that whoever listens to optimiser steps hears of this one."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        return closure()


class _Slot(NamedTuple):
    number: int


class _Generator(NamedTuple):
    number: int


class _Call(NamedTuple):
    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    said: Said


def _moved(recorded: str, device: torch.device) -> Callable[[str], torch.device]:
    """Where what lay on a device of the recorded run lies now. What a GPU run kept on the CPU stays there."""
    try:
        main = torch.device(recorded)
    except RuntimeError:
        main = torch.device("cpu")

    def place(name: str) -> torch.device:
        try:
            kind = torch.device(name).type
        except RuntimeError as error:
            raise ValueError(f"{name!r} is no device") from error
        if kind == "meta":
            return torch.device("meta")
        return torch.device("cpu") if kind == "cpu" and main.type != "cpu" else device

    return place


def _view(view: View, storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    """Errors: ValueError where it would reach beyond the memory."""
    dtype = dtype_of(view.dtype)
    if extent(view, dtype.itemsize) > storage.nbytes() or math.prod(view.shape) > _LARGEST:
        raise ValueError(f"a tensor of shape {view.shape} lies outside its memory")
    tensor = torch.empty(0, dtype=dtype, device=device)
    tensor.set_(storage, view.offset, view.shape, view.stride)
    if view.conjugate:
        tensor = torch.conj(tensor)
    return torch._neg_view(tensor) if view.negative else tensor


def _child(model: nn.Module, path: str) -> nn.Module:
    """The module of that path, made where it is not there; any text is a name, so torch's checks are passed by."""
    for part in path.split(".") if path else ():
        model = model._modules.setdefault(part, nn.Module()) or model
    return model


def _frees(program: Program) -> dict[int, list[int]]:
    """After which operator a slot is read no more; what is shown is kept."""
    last: dict[int, int] = {}
    for number, one in enumerate(program.operators):
        for slot in (*one.outputs, *slots_in((one.args, one.kwargs))):
            last[slot] = number
            view = program.views.get(slot)
            if view is not None and view.of is not None:
                last[view.of] = number
    kept = set(program.shown.values())
    kept |= {
        view.of for slot in kept if (view := program.views.get(slot)) is not None and view.of is not None
    }
    found: dict[int, list[int]] = {}
    for slot, number in last.items():
        if slot not in kept:
            found.setdefault(number, []).append(slot)
    return found


def _set_random(name: str, state: Tensor, place: Callable[[str], torch.device]) -> None:
    if name.startswith("generator."):
        return
    device = place(name)
    if device.type != torch.device(name).type:
        return
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)


def _same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(
        a == b or (a != a and b != b) for a, b in zip(first, second, strict=True)
    )


def _flat(value: Any) -> list[Any]:
    return [one for item in value for one in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


# --- settings -----------------------------------------------------------------------------------------

_WHOLE = "output"
_LARGEST = 1 << 60
_ELSEWHERE = "Replay it on the kind of device and with the torch that wrote it."
