"""The modules of a step as one model: without their wrappers, side by side, and with no gradients yet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from attncli.training.monitor import Monitor


def model_of(monitor: Monitor) -> nn.Module | None:
    """The model of a step: its outermost module, or several side by side under their names in the script."""
    called = {id(inside(module)) for module in monitor.program.modules()}
    found = [inside(module) for module in monitor.models()]
    with_weights = [module for module in found if _has_state(module)]
    used = [module for module in with_weights if not called or called & {id(m) for m in module.modules()}]
    chosen = used or with_weights or found
    if len(chosen) < 2:
        return chosen[0] if chosen else None
    together = nn.Module()
    for name, module in zip(monitor.called(chosen), chosen, strict=True):
        together.add_module(name, module)
    return together


def has_compiled_parts(module: nn.Module) -> bool:
    """Whether a call of it runs compiled code: uncompiled, its numbers would be others."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    classes = set()
    for one in module.modules():
        if type(one).__name__ == "OptimizedModule" or getattr(one, "_compiled_call_impl", None) is not None:
            return True
        if "flex" in str(getattr(getattr(one, "config", None), "_attn_implementation", "")):
            return True
        classes.add(type(one))
    return any(
        hasattr(function.__globals__.get(name), _COMPILED)
        for kind in classes
        for function in vars(kind).values()
        if isinstance(function, FunctionType)
        for name in function.__code__.co_names
    )


def _has_state(module: nn.Module) -> bool:
    return any(True for tensors in (module.parameters(), module.buffers()) for _ in tensors)


def inside(module: Any) -> Any:
    """The module that a wrapper runs: repeating must not talk to other processes, and runs no compiled code."""
    while (attribute := _WRAPPERS.get(type(module).__name__)) and hasattr(module, attribute):
        module = getattr(module, attribute)
    return module


@contextmanager
def without_gradients(modules: Iterable[Any]) -> Iterator[None]:
    """Gradients are gathered anew, and those that are there now are given back."""
    leaves = {id(p): p for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    before: Sequence[tuple[Any, Any]] = [(leaf, leaf.grad) for leaf in leaves.values()]
    for leaf, _ in before:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


# --- tables -------------------------------------------------------------------------------------------

# How torch.compile marks a function that it compiled.
_COMPILED = "_torchdynamo_orig_callable"
_WRAPPERS: Mapping[str, str] = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
