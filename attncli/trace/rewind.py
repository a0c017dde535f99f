"""Takes a step back: what it wrote to tensors that were there before, gradients, optimisers and random numbers.

Tensors are copied at the moment something is about to write to them, so a step that writes nothing costs nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(slots=True)
class Rewind:
    """Remembers what a run overwrites. `enabled`: whether anything is to be kept at all."""

    enabled: bool = True
    _written: set[int] = field(default_factory=set)
    _new: dict[int, StorageWeakRef] = field(default_factory=dict)
    _leaves: list[Tensor] = field(default_factory=list)
    _existing: dict[int, StorageWeakRef] = field(default_factory=dict)
    _saved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _references: list[Callable[[], None]] = field(default_factory=list)
    _optimizers: dict[int, Any] = field(default_factory=dict)
    _random: list[Callable[[], None]] = field(default_factory=list)

    def begins(self, model: Any) -> None:
        """Remembers what no operator shows: random states, and which tensors are gradients and buffers."""
        if not self.enabled:
            return
        self._random = random_states()
        if isinstance(model, nn.Module):
            self._references += references(model)

    def existed(self, tensor: Tensor) -> None:
        """The tensor was there before the run."""
        storage = _storage(tensor)
        if storage is None or storage._cdata in self._existing:
            return
        self._existing[storage._cdata] = StorageWeakRef(storage)
        if self.enabled and tensor.requires_grad and tensor.is_leaf:
            # An input may gather a gradient as well, which a repetition would add to.
            self._references.append(_gradient(tensor))
            self._leaves.append(tensor)

    def made(self, tensor: Tensor) -> None:
        """The tensor is new: whatever is written to it is lost with it."""
        storage = _storage(tensor)
        if storage is not None:
            self._new[storage._cdata] = StorageWeakRef(storage)

    def protect(self, tensor: Tensor) -> None:
        """Something is about to write to this tensor: its storage is copied unless it is new."""
        storage = _storage(tensor)
        if storage is not None and storage._cdata not in self._new:
            self.existed(tensor)
            self.save(tensor)

    def save(self, tensor: Tensor) -> None:
        """Something is about to write to this tensor: its storage is copied if it was there before the run."""
        storage = _storage(tensor)
        if storage is None or storage._cdata in self._written or storage._cdata not in self._existing:
            return
        self._written.add(storage._cdata)
        if self.enabled:
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            whole.set_(storage, 0, (storage.nbytes() // tensor.element_size(),), (1,))
            self._saved[storage._cdata] = (whole, whole.clone())

    def wrote(self, tensor: Tensor) -> bool:
        """Whether the run wrote to this tensor, which was there before."""
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._written

    def save_optimizer(self, optimizer: Any) -> None:
        """The optimiser is about to step: which states it has, and its settings."""
        if self.enabled and id(optimizer) not in self._optimizers:
            self._optimizers[id(optimizer)] = optimizer
            self._references.append(_optimizer_state(optimizer))

    def back(self) -> None:
        """Everything as it was before the run."""
        _copy_back(list(self._saved.values()))
        for put_back in (*self._references, *self._random):
            put_back()

    @contextmanager
    def kept(self, model: Any) -> Iterator[None]:
        """All that the run changed stays as it is now, whatever happens inside."""
        values = [(tensor, tensor.clone()) for tensor, _ in self._saved.values()]
        put_back = random_states()
        put_back += [one(leaf) for leaf in self._leaves for one in (_gradient, _gradient_value)]
        if isinstance(model, nn.Module):
            put_back += references(model)
            put_back += [_gradient_value(parameter) for parameter in model.parameters()]
        put_back += [_optimizer_state(optimizer) for optimizer in self._optimizers.values()]
        put_back += [_state_values(optimizer) for optimizer in self._optimizers.values()]
        try:
            yield
        finally:
            _copy_back(values)
            for one in put_back:
                one()


def random_states() -> list[Callable[[], None]]:
    """Functions that put the random states of Python, NumPy and torch back."""
    python, on_cpu = random.getstate(), torch.get_rng_state()
    found: list[Callable[[], None]] = [
        lambda: random.setstate(python),
        lambda: torch.set_rng_state(on_cpu),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        on_gpu = torch.cuda.get_rng_state_all()
        found.append(lambda: torch.cuda.set_rng_state_all(on_gpu))
    if torch.backends.mps.is_available():
        on_mps = torch.mps.get_rng_state()
        found.append(lambda: torch.mps.set_rng_state(on_mps))
    import sys

    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state()
        found.append(lambda: numpy.random.set_state(state))
    return found


def references(model: nn.Module) -> list[Callable[[], None]]:
    """Functions that put gradients, buffers and the training flags of all modules back."""
    return [
        *(_gradient(parameter) for parameter in model.parameters()),
        *(_buffers(module) for module in model.modules()),
    ]


def _gradient(parameter: Tensor) -> Callable[[], None]:
    gradient = parameter.grad

    def put_back() -> None:
        parameter.grad = gradient

    return put_back


def _gradient_value(parameter: Tensor) -> Callable[[], None]:
    """Also the values: a second run may add to the gradient of the first."""
    gradient, value = parameter.grad, parameter.grad.detach().clone() if parameter.grad is not None else None

    def put_back() -> None:
        if gradient is not None and value is not None:
            _copy_back([(gradient, value)])

    return put_back


def _buffers(module: nn.Module) -> Callable[[], None]:
    training = module.training
    if isinstance(module, torch.jit.ScriptModule):  # its buffers are written to, never exchanged
        return lambda: setattr(module, "training", training)
    buffers = dict(module._buffers)

    def put_back() -> None:
        module._buffers.update(buffers)
        module.training = training

    return put_back


def _optimizer_state(optimizer: Any) -> Callable[[], None]:
    states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]

    def put_back() -> None:
        optimizer.state.clear()
        optimizer.state.update({parameter: dict(state) for parameter, state in states.items()})
        for group, settings in zip(optimizer.param_groups, groups, strict=False):
            group.update(settings)

    return put_back


def _state_values(optimizer: Any) -> Callable[[], None]:
    """Tensors of an optimiser's state that the run itself made, so that no copy of theirs was kept."""
    values = [
        (tensor, tensor.detach().clone())
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    ]

    def put_back() -> None:
        _copy_back(values)

    return put_back


def _copy_back(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in values:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
