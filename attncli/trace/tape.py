"""The dispatch mode: which operator made which tensor, out of what, in which module.

Every aten operator of a run passes here, whichever way the model was written (eager, TorchScript, an
exported program, forward or backward). Each output gets a `Node`; nodes form the dataflow that the rest of
the room reads. The tape itself knows no attention: a listener is told of each operator, and decides which
tensors are worth keeping. Nodes hold no tensors but small ones (scalars, per-head factors), so that a tape
never keeps a model's activations alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from attncli.trace.ops import Op, op_of
from attncli.trace.said import said

# Tensors up to this size may be held by a node: scalars, factors per head, a norm's gain.
SMALL = 512


class Ref(NamedTuple):
    """One tensor operand as an operator saw it. `tensor` is held only where it is small, or asked for."""

    node: Node
    shape: tuple[int, ...]
    tensor: Tensor | None


@dataclass(slots=True, eq=False)
class Node:
    """One tensor value. `args` and `kwargs` are the operator's, with a `Ref` for each tensor.

    `constant`: made of parameters, buffers and literals alone, by operators that are no products; so it is
    a weight, a mask, a table of positions, but nothing that was computed from the input or by a projection.
    `sources`: bit set of the inputs and earlier calls that the value depends on.
    `carries`: what the listener attached to a value; inherited by what is made of it, except by products.
    `at`: how many operators had run before the one that made it.
    """

    serial: int
    op: Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Ref, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str = ""
    output: int = 0
    constant: bool = False
    sources: int = 0
    parameter: str | None = None
    carries: tuple[Any, ...] = ()
    at: int = 0


def place_of(tensor: Tensor) -> Any:
    """Where a tensor lies and how: two that share it are the same elements. None where there is no storage."""
    storage = _storage(tensor)
    return (storage._cdata, *_geometry(tensor)) if storage is not None else None


def release(node: Node) -> None:
    """Lets go of the tensors that a node held for the listener. Small ones stay: factors are read from them."""

    node.args = tuple(_released(value) for value in node.args)
    node.kwargs = {key: _released(value) for key, value in node.kwargs.items()}
    node.operands = tuple(_released(ref) for ref in node.operands)


class Listener(Protocol):
    """What a tape tells: one operator has run. `nodes`: one per tensor among its outputs, in order."""

    def hears(self, op: Op) -> bool:
        """Whether it wants to be told of this operator."""
        ...

    def holds(self, op: Op, operands: tuple[Ref, ...]) -> tuple[bool, ...]:
        """For each tensor operand, whether the nodes of this operator should hold on to it; () for none."""
        ...

    def enters(self, tape: Tape, op: Op, operands: tuple[Ref, ...], run: Ran) -> None:
        """The operator is about to run: what it will overwrite can still be read."""
        ...

    def ran(self, tape: Tape, op: Op, nodes: tuple[Node, ...], run: Ran) -> None: ...

    def dropout_module(self, node: Node, probability: float) -> None:
        """A dropout module was given `node`."""
        ...


class Ran(NamedTuple):
    """The tensors of one operator: valid only while it is being told; never to be kept as a whole."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]


class Tape(TorchDispatchMode):
    """Records one run. `parameters`: names by storage; `modules`: the stack of module paths, kept by hooks."""

    # flex_attention arrives as a higher-order operator.
    supports_higher_order_operators = True

    def __init__(self, listener: Listener) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.listener = listener
        self.modules: list[str] = [""]
        self.operators = 0
        # A fault of our own, kept until the user's code is left, so that it is not taken for a fault of theirs.
        self.failure: Exception | None = None
        self.source_names: list[str] = []
        self._known = _Storages()
        self._names: dict[int, str] = {}
        self._held: list[Any] = []  # storages whose address stands in _names: no other may take it meanwhile
        self._serial = 0

    @property
    def module(self) -> str:
        """The path of the innermost module that runs now."""
        now = said()
        return now.module if now is not None else self.modules[-1]

    def name_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named:
            storage = _storage(tensor)
            if storage is not None and storage._cdata not in self._names:
                self._names[storage._cdata] = name
                self._held.append(storage)

    def name_inputs(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Each input is a source of its own, so that a value can be traced to the inputs it came from.

        What an operator of this run made keeps its own history.
        """
        for name, tensor in named:
            if self._known.get(tensor) is not None:
                continue
            node = self._leaf(tensor, constant=False, sources=self.source(f"input {name}"))
            self._known.put(tensor, node)

    def source(self, name: str) -> int:
        """A new bit for `name`; the same name keeps its bit."""
        if name not in self.source_names:
            self.source_names.append(name)
        return 1 << self.source_names.index(name)

    def names_of(self, sources: int) -> tuple[str, ...]:
        return tuple(name for bit, name in enumerate(self.source_names) if sources >> bit & 1)

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer."""
        storage = _storage(tensor)
        return self._names.get(storage._cdata) if storage is not None else None

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor, which is a leaf if no operator of this run made it."""
        found = self._known.get(tensor)
        if found is None:
            found = self._leaf(tensor, constant=self._is_weight(tensor), sources=0)
            self._known.put(tensor, found)
        elif not isinstance(found, Node):
            found = self._alias(tensor, found.last)
            self._known.put(tensor, found)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_number(func, args):
            return args[0]
        if self.failure is not None or is_mark(func):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and is_composite(func):
            # Without autograd nothing has taken these apart before they come here.
            with self:
                return func.decompose(*args, **kwargs)
        # An operator that writes in place destroys what its operands were, so they are looked up before.
        before = self._guarded(self._before, func, args, kwargs)
        result = func(*args, **kwargs)
        self.operators += 1
        if before is not None:
            self._guarded(self._after, func, before, args, kwargs, result)
        return result

    def _guarded(self, step: Any, *given: Any) -> Any:
        try:
            return step(*given)
        except Exception as error:  # noqa: BLE001 - raised again by whoever started the tape
            self.failure = error
            return None

    def _before(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, Any, tuple[Ref, ...]]:
        op = op_of(func)
        before = self._operands(op, args, kwargs)
        if self.listener.hears(op):
            with _Undisturbed():
                self.listener.enters(self, op, before[2], Ran(func, args, kwargs, ()))
        return before

    def _after(self, func: Any, before: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        op = op_of(func)
        outputs = tuple(t for t in _flat(result) if isinstance(t, Tensor))
        # An operator may write into arguments that it does not return, lists of them as well.
        outputs += tuple(
            target
            for position in op.writes
            if position < len(args)
            for target in _flat(args[position])
            if isinstance(target, Tensor) and not any(target is tensor for tensor in outputs)
        )
        nodes = self._record(op, before, outputs)
        if nodes and self.listener.hears(op):
            with _Undisturbed():
                self.listener.ran(self, op, nodes, Ran(func, args, kwargs, outputs))

    # --- nodes ----------------------------------------------------------------------------------------

    def _operands(self, op: Op, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, Any, tuple[Ref, ...]]:
        found: list[Ref] = []
        new_args = tuple(self._replaced(value, found) for value in args)
        new_kwargs = {key: self._replaced(value, found) for key, value in kwargs.items()} if kwargs else {}
        wanted = self.listener.holds(op, tuple(found)) if found else ()
        if any(wanted):
            tensors = [t for t in _flat((args, tuple(kwargs.values()))) if isinstance(t, Tensor)]
            held: dict[int, Ref] = {
                id(ref): ref._replace(tensor=tensor) if hold else ref
                for ref, tensor, hold in zip(found, tensors, wanted, strict=True)
            }
            new_args = tuple(_holding(value, held) for value in new_args)
            new_kwargs = {key: _holding(value, held) for key, value in new_kwargs.items()}
            found = [held[id(ref)] for ref in found]
        return new_args, new_kwargs, tuple(found)

    def _replaced(self, value: Any, found: list[Ref]) -> Any:
        """An argument with a `Ref` for each tensor, which `found` gets as well."""
        if isinstance(value, Tensor):
            ref = Ref(self.node(value), tuple(value.shape), value if value.numel() <= SMALL else None)
            found.append(ref)
            return ref
        if isinstance(value, (list, tuple)):
            return tuple([self._replaced(item, found) for item in value])
        return value

    def _record(
        self, op: Op, before: tuple[Any, Any, tuple[Ref, ...]], outputs: tuple[Tensor, ...]
    ) -> tuple[Node, ...]:
        new_args, new_kwargs, operands = before
        # What is made in the likeness of a tensor takes its shape, not its value.
        inputs = [ref.node for ref in operands] if op.kind != "like" else []
        sources = 0
        for node in inputs:
            sources |= node.sources
        # A product of weights is no weight any more: projected queries, a table of projected positions.
        constant = not op.random and not op.product and all(node.constant for node in inputs)
        carries = () if op.product else _carried(inputs)

        def made(tensor: Tensor, number: int) -> Node:
            node = Node(
                self._next(),
                op,
                new_args,
                new_kwargs,
                operands,
                tuple(tensor.shape),
                tensor.dtype,
                self.module,
                number,
                constant,
                sources,
                carries=carries if tensor.is_floating_point() else (),
                at=self.operators - 1,
            )
            self._known.put(tensor, node, written=bool(op.writes))
            return node

        return tuple(made(tensor, number) for number, tensor in enumerate(outputs))

    def _leaf(self, tensor: Tensor, *, constant: bool, sources: int) -> Node:
        parameter = self._weight(tensor)
        shape = tuple(tensor.shape)
        return Node(
            self._next(),
            LEAF,
            (),
            {},
            (),
            shape,
            tensor.dtype,
            self.module,
            0,
            constant,
            sources,
            parameter,
        )

    def _alias(self, tensor: Tensor, last: Node) -> Node:
        """A view nobody saw being made, or one of a storage that was written through another view."""
        ref = Ref(last, last.shape, None)
        shape = tuple(tensor.shape)
        return Node(
            self._next(),
            ALIAS,
            (ref,),
            {},
            (ref,),
            shape,
            tensor.dtype,
            self.module,
            0,
            last.constant,
            last.sources,
            last.parameter,
            last.carries if tensor.is_floating_point() else (),
        )

    def _is_weight(self, tensor: Tensor) -> bool:
        if isinstance(tensor, torch.nn.Parameter):
            return True
        # A tensor that is neither a parameter, nor an input, nor floating can only index, count or mask.
        return self._weight(tensor) is not None or not tensor.is_floating_point()

    def _weight(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer; autocast keeps its casts of them from one call to the next."""
        storage = _storage(tensor)
        if storage is None:
            return None
        if storage._cdata in self._names:
            return self._names[storage._cdata]
        made = tensor.grad_fn
        if made is None or made.name() != "ToCopyBackward0":
            return None
        source = getattr(made.next_functions[0][0], "variable", None)
        return self.name_of(source) if isinstance(source, Tensor) else None

    def _next(self) -> int:
        self._serial += 1
        return self._serial


# Functions of the module, not of each operator: a function that calls itself by a closure is a cycle, and
# would keep the tensors it saw until the next garbage collection.


def _holding(value: Any, held: Mapping[int, Ref]) -> Any:
    if isinstance(value, Ref):
        return held[id(value)]
    return tuple([_holding(item, held) for item in value]) if type(value) is tuple else value


def _released(value: Any) -> Any:
    if isinstance(value, Ref):
        tensor = value.tensor
        return value if tensor is None or tensor.numel() <= SMALL else value._replace(tensor=None)
    return tuple([_released(item) for item in value]) if type(value) is tuple else value


def _carried(nodes: Iterable[Node]) -> tuple[Any, ...]:
    """All that the nodes carry, each once, the newest last; no more than a few: the rest is history."""
    found: dict[int, Any] = {}
    for node in nodes:
        for thing in node.carries:
            found[id(thing)] = thing
    return tuple(found.values())[-_MOST_CARRIED:] if found else ()


class _Written(NamedTuple):
    last: Node


class _Storages:
    """Nodes by storage and, within it, by geometry: views of one storage are values of their own.

    Held by weak references, which keep a storage's address from being used again, but not its memory.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[StorageWeakRef, dict[Any, Node], list[Node]]] = {}
        self._puts = 0

    def get(self, tensor: Tensor) -> Node | _Written | None:
        storage = _storage(tensor)
        if storage is None:
            return None
        entry = self._entries.get(storage._cdata)
        if entry is None:
            return None
        return entry[1].get(_geometry(tensor)) or _Written(entry[2][0])

    def put(self, tensor: Tensor, node: Node, *, written: bool = False) -> None:
        storage = _storage(tensor)
        if storage is None:
            return
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = (StorageWeakRef(storage), {_geometry(tensor): node}, [node])
        elif written:
            # What was read through other views before is not what they show now.
            if entry[2][0] is not node and entry[1].get(_geometry(tensor)) is not entry[2][0]:
                before = entry[2][0]
                node.operands = (*node.operands, Ref(before, before.shape, None))
                node.sources |= before.sources
                node.constant = node.constant and before.constant
                node.carries = _carried((node, before))
            entry[1].clear()
            entry[1][_geometry(tensor)] = node
            entry[2][0] = node
        else:
            entry[1][_geometry(tensor)] = node
        self._puts += 1
        if self._puts % _PURGE_EVERY == 0:
            self._purge()

    def _purge(self) -> None:
        dead = [key for key, (reference, _, _) in self._entries.items() if reference.expired()]
        for key in dead:
            del self._entries[key]


def is_number(func: Any, args: tuple[Any, ...]) -> bool:
    """A number of a traced program, which arrives here as one and not as the tensor that is asked for its value."""
    return func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], (int, float, bool))


def is_mark(func: Any) -> bool:
    """Whether it only marks a stretch of the run for a profiler, as optimisers do: no operator."""
    return getattr(func, "namespace", None) == "profiler"


@cache
def is_composite(func: Any) -> bool:
    """Whether an operator is made of others, on every device."""
    name = getattr(func, "name", None)
    schema = getattr(func, "_schema", None)
    return (
        schema is not None
        and callable(name)
        and hasattr(func, "decompose")
        and bool(torch._C._dispatch_has_kernel_for_dispatch_key(name(), "CompositeImplicitAutograd"))
    )


def _geometry(tensor: Tensor) -> Any:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _storage(tensor: Tensor) -> Any:
    """The storage, or None where there is none (sparse tensors, wrappers of function transforms)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


class _Undisturbed:
    """Our own arithmetic: no gradients, no autocast of the user's, nothing on the tape (modes are off here)."""

    def __enter__(self) -> None:
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()
        self._casts = [_uncast(kind) for kind in _autocast_devices()]
        for cast in self._casts:
            cast.__enter__()

    def __exit__(self, *error: Any) -> None:
        for cast in reversed(self._casts):
            cast.__exit__(*error)
        self._no_grad.__exit__(*error)


def _uncast(kind: str) -> Any:
    return torch.autocast(kind, enabled=False)


def _autocast_devices() -> list[str]:
    return [kind for kind in _devices() if torch.is_autocast_enabled(kind)]


@cache
def _devices() -> tuple[str, ...]:
    return tuple(dict.fromkeys(("cpu", *(["cuda"] if torch.cuda.is_available() else []), *_accelerator())))


def _accelerator() -> list[str]:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [found.type] if found is not None else []


# Dead storages are looked for after this many new values: often enough that what their nodes hold is freed.
_PURGE_EVERY = 32

# BigBird joins the scores of five products into one row; more than these nobody was seen to join.
_MOST_CARRIED = 8

LEAF = Op("leaf")
ALIAS = Op("alias")
