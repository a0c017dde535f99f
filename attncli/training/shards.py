"""Parameters of which each process holds a part: how large they are as a whole, and the whole model in one process.

The numbers are asked of all processes that share a parameter, by one small all-reduce: with parameters in parts a
step is taken by all of them together or by none. Everything here must be called in all of them alike.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.utils._pytree import tree_map

from attncli.training import checks
from attncli.training.checks import bad, is_sharded


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each tensor over all its parts; NaN where an element is bad, finite where none is."""
    local = checks.norms(tensors)
    sizes = _across(tensors, local.double().square(), ReduceOp.SUM).sqrt()
    if bool(torch.isfinite(sizes).all()):
        return sizes
    wrong = torch.tensor([float(bool(bad(one))) for one in tensors], dtype=torch.float64)
    wrong = _across(tensors, wrong, ReduceOp.MAX)
    sizes = sizes.nan_to_num(nan=torch.finfo(torch.float64).max)
    return torch.where(wrong > 0, float("nan"), sizes)


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude in each tensor over all its parts; Inf where an element is bad."""
    sizes = checks.largest(tensors).double().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return _across(tensors, sizes, ReduceOp.MAX)


def owner(tensor: Any, index: Sequence[int]) -> int | None:
    """The rank that holds this element; None where several do, or where it cannot be told."""
    if not is_sharded(tensor) or len(index) != tensor.dim():
        return None
    mesh, place, divided = tensor.device_mesh, [], set()
    for dimension, placement in enumerate(tensor.placements):
        if not placement.is_shard() or type(placement).__name__ != "Shard" or placement.dim in divided:
            return None
        divided.add(placement.dim)
        length, parts = tensor.shape[placement.dim], mesh.size(dimension)
        place.append(index[placement.dim] // -(-length // parts))
    return int(mesh.mesh[tuple(place)])


class Whole:
    """A copy of a model of which each process holds a part, with all its parameters, and without its collectives.

    Making it gathers the parameters, in all processes alike.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copies: dict[int, Any] = {}
        for module in model.modules():
            self._copies[id(module)] = object.__new__(_own_class(module))
        for parameter, dtype in _parameters(model):
            with torch.no_grad():
                given: Any = parameter
                value = given.full_tensor() if is_sharded(parameter) else given
                value = value.detach().to(dtype or value.dtype, copy=True)
            self._copies[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for module in list(model.modules()):
            self._fill(module)
        self.model: nn.Module = self._copies[id(model)]

    def of(self, module: nn.Module) -> nn.Module:
        """The copy of a module of the model; another module itself."""
        found: nn.Module = self._copies.get(id(module), module)
        return found

    def _fill(self, module: nn.Module) -> None:
        made = self._copies[id(module)]
        for name, value in vars(module).items():
            if isinstance(value, dict) and name.endswith("_hooks"):
                value = {key: hook for key, hook in value.items() if not _is_distributed(hook)}
                made.__dict__[name] = type(vars(module)[name])(value)
            elif not _is_distributed(value) and not str(name).startswith("__"):
                made.__dict__[name] = self._copied(value)
        policy = _policy(module)
        if policy is not None:
            _cast(made, policy)

    def _copied(self, value: Any) -> Any:
        """A copy whose modules and parameters are ours; what cannot be copied is shared."""
        try:
            return copy.deepcopy(value, self._copies)
        except Exception:  # noqa: BLE001 - classes of others may refuse in any way
            return value


def fits(model: nn.Module) -> bool:
    """Whether this process has room for the whole model and its gradients."""
    needed: dict[str, int] = {}
    for parameter in model.parameters():
        kind = parameter.device.type
        needed[kind] = needed.get(kind, 0) + 2 * parameter.numel() * parameter.element_size()
    if "cuda" in needed and needed["cuda"] > _SHARE * torch.cuda.mem_get_info()[0]:
        return False
    return needed.get("cpu", 0) <= _MOST_BYTES


def is_whole(model: nn.Module) -> bool:
    """Whether this process holds all of every parameter."""
    return not any(is_sharded(parameter) for parameter in model.parameters())


# --- across processes ---------------------------------------------------------------------------------


def _across(tensors: Sequence[Tensor], values: Tensor, op: Any) -> Tensor:
    """One number for each tensor, reduced over the processes that hold parts of it. → (tensors,) float64, CPU."""
    values = values.detach().double().cpu()
    meshes: dict[Any, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if is_sharded(tensor):
            meshes.setdefault(tensor.device_mesh, []).append(number)  # type: ignore[attr-defined]
    for mesh, numbers in meshes.items():
        part = values[numbers]
        if op == ReduceOp.SUM:
            part = part / torch.tensor([float(_copies(tensors[number])) for number in numbers])
        device = torch.device(mesh.device_type)
        part = part.to(device, torch.float32 if device.type == "mps" else torch.float64)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(part, op=op, group=mesh.get_group(dimension))
        values[numbers] = part.cpu().double()
    return values


def _copies(tensor: Any) -> int:
    """How many processes hold the same part."""
    found = 1
    for dimension, placement in enumerate(tensor.placements):
        found *= 1 if placement.is_shard() else tensor.device_mesh.size(dimension)
    return found


# --- the whole model ----------------------------------------------------------------------------------


def _parameters(
    model: nn.Module, dtype: torch.dtype | None = None
) -> Iterator[tuple[Tensor, torch.dtype | None]]:
    """Each parameter with the dtype in which it is computed with, where its shards have another."""
    policy = _policy(model)
    dtype = policy.param_dtype if policy is not None else dtype
    for parameter in model._parameters.values():
        if parameter is not None:
            yield parameter, dtype if parameter.is_floating_point() else None
    for child in model.children():
        yield from _parameters(child, dtype)


def _own_class(module: nn.Module) -> type:
    """The class that a module had before it was divided."""
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__[1:2]):
        return type(module).__mro__[getattr(type(module), "_orig_cls_mro_index", 2)]
    return type(module)


def _policy(module: nn.Module) -> Any:
    """In which dtypes a divided module computes; None for any other."""
    from torch.distributed._composable_state import _get_module_state

    return getattr(_get_module_state(module), "_mp_policy", None)


def _cast(module: nn.Module, policy: Any) -> None:
    """Inputs and outputs in the dtypes that the divided module gives them."""

    def to(dtype: torch.dtype) -> Callable[[Any], Any]:
        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return cast

    forward = module.forward

    def forward_in_dtypes(*args: Any, **kwargs: Any) -> Any:
        if policy.cast_forward_inputs and policy.param_dtype is not None:
            args, kwargs = tree_map(to(policy.param_dtype), (args, kwargs))
        output = forward(*args, **kwargs)
        return output if policy.output_dtype is None else tree_map(to(policy.output_dtype), output)

    # Not by hooks: what they return would be taken for what the module was given.
    module.forward = functools.wraps(forward)(forward_in_dtypes)


def _is_distributed(value: Any) -> bool:
    """Whether it is a hook or a state of torch's own for several processes."""
    value = getattr(value, "func", value)
    home = getattr(value, "__module__", None) or type(value).__module__
    return isinstance(home, str) and home.startswith("torch.distributed")


# --- settings -----------------------------------------------------------------------------------------

# Of the free memory of a GPU: the rest is for the activations of the repeated step.
_SHARE = 0.6
# Of a process on the CPU, whose neighbours do the same.
_MOST_BYTES = 16 << 30
