"""Whether gradients and parameters are finite, in one pass over each, and how large they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, aminmax, dot, isfinite, isnan, isposinf, stack
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def unheard() -> Iterator[None]:
    """Modes that the script has entered hear nothing of what is computed inside."""
    if not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack():
        yield
        return
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@unheard()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each tensor, as one float32 vector on the CPU; NaN and Inf spread to it.

    A norm may overflow where all elements are finite: what is not finite here has to be looked at with `bad`.
    """
    if not tensors:
        return torch.zeros(0)
    local = [held(tensor) for tensor in tensors]
    device = local[0].device
    if all(one.is_cpu and one.dtype is torch.float32 and one.is_contiguous() for one in local):
        # One pass, as a norm is, by the faster routine.
        return stack([dot(flat, flat) for flat in (one.view(-1) for one in local)]).sqrt()
    if device.type == "cpu" or len({(one.device, one.dtype) for one in local}) > 1:
        return stack([_norm(one).cpu() for one in local])
    return stack([one.float() for one in torch._foreach_norm(local)]).cpu()


@unheard()
def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude in each tensor, as one vector on the CPU; NaN spreads to it."""
    local = [held(tensor) for tensor in tensors]
    local = [one if one.numel() else one.new_zeros(1) for one in local]
    if not local:
        return torch.zeros(0)
    device = local[0].device
    if device.type == "cpu" or len({(one.device, one.dtype) for one in local}) > 1:
        pairs = [stack(aminmax(one.abs() if one.is_complex() else one)) for one in local]
        return stack([pair.float().cpu() for pair in pairs]).abs().amax(1)
    return stack([one.float() for one in torch._foreach_norm(local, float("inf"))]).cpu()


@unheard()
def bad(tensor: Tensor) -> str:
    """ "nan", "+inf", "-inf", or "" where every element is finite."""
    local = held(tensor)
    if not (local.is_floating_point() or local.is_complex()) or bool(isfinite(local).all()):
        return ""
    if bool(isnan(local).any()):
        return "nan"
    return "+inf" if not local.is_complex() and bool(isposinf(local).any()) else "-inf"


@unheard()
def absmax(tensor: Tensor) -> float:
    local = held(tensor)
    return float(local.detach().abs().amax()) if local.numel() else 0.0


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone."""
    return hasattr(tensor, "to_local")


def held(tensor: Tensor) -> Tensor:
    """The values that lie in this process: the shard of a distributed tensor, what a sparse one holds."""
    given: Any = tensor.detach()
    if type(given) is Tensor and given.layout is torch.strided:
        return given
    if hasattr(given, "to_local"):
        given = given.to_local()
    if given.layout is not torch.strided:
        given = given.coalesce().values() if given.layout is torch.sparse_coo else given.values()
    found: Tensor = given
    return found


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=_wide(tensor))
    return norm.float()


def _wide(tensor: Tensor) -> torch.dtype | None:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
