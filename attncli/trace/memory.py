"""Memory as a record of a run knows it: storages and the geometry of tensors on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attncli.trace.ops import op_of
from attncli.trace.program import View, extent
from attncli.trace.tape import Ran


@dataclass(slots=True)
class Memory:
    """One storage: its slots by geometry, and which of them came first. `leaf`: its number, if no operator made it."""

    reference: StorageWeakRef
    slots: dict[Any, int] = field(default_factory=dict)
    first: int = -1
    leaf: int | None = None


@dataclass(slots=True)
class Source:
    """A leaf in the making: bytes from `start` to `stop` of a storage, as uint8, or not copied yet."""

    kind: Any
    name: str
    storage: Any
    device: torch.device
    dtype: torch.dtype
    start: int
    stop: int
    weight: bool
    data: Tensor | None = None
    written: bool = False


def why_not(tensor: Tensor) -> str | None:
    """What keeps a tensor from being memory with a geometry; None where it is."""
    if is_traceable_wrapper_subclass(tensor):
        return f"a {type(tensor).__name__}, which is made of other tensors"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return "a quantised tensor"
    if torch.nn.parameter.is_lazy(tensor):
        return "a parameter without a shape yet"
    return None


def written_by(run: Ran) -> list[Tensor]:
    """The tensors that an operator is about to write to, lists of them as well."""
    found: list[Tensor] = []
    for position in op_of(run.func).writes:
        argument = run.func._schema.arguments[position].name
        value = run.args[position] if position < len(run.args) else run.kwargs.get(argument)
        found += [
            one for one in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(one, Tensor)
        ]
    return found


def geometry_of(tensor: Tensor) -> Any:
    return (
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor covers, from where memory is aligned for any kernel."""
    size = tensor.element_size()
    offset = int(tensor.storage_offset())
    start = offset * size
    view = View(0, None, "", tuple(tensor.shape), tensor.stride(), offset)
    return start // _ALIGNED * _ALIGNED, max(start, extent(view, size))


def copied(leaf: Source) -> Tensor:
    """The bytes of a leaf, in memory of their own on the CPU."""
    with torch.no_grad():
        whole = torch.empty(0, dtype=torch.uint8, device=leaf.device)
        whole.set_(leaf.storage, leaf.start, (leaf.stop - leaf.start,), (1,))
        return whole.to("cpu", copy=True)


def random_states() -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        found.update({f"cuda:{number}": state for number, state in enumerate(states)})
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps.get_rng_state()
    return found


# --- settings -----------------------------------------------------------------------------------------

# A storage up to this many bytes is kept whole, whatever part of it is read.
SMALL = 1 << 20
# torch allocates at multiples of this; a kernel may sum in another order elsewhere.
_ALIGNED = 64
