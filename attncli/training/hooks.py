"""Where a training run is heard: torch's global hooks, and the few functions that have none.

Each replacement calls the original with what it was given, returns what that returned, and lets through what it
raises; what happens beside it goes through `Monitor.guarded`. On leaving, everything is as it was before.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.modules.module import (
    _global_forward_hooks_always_called,
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from attncli.training.checks import is_sharded
from attncli.training.monitor import Monitor, stepped


@contextmanager
def hooked(monitor: Monitor) -> Iterator[None]:
    """The monitor hears everything until it is left."""
    with ExitStack() as stack:
        for handle in (*_modules(monitor), *_optimizers(monitor)):
            stack.callback(_removed, handle)
        patches = [
            *_backward(monitor),
            *_clipping(monitor),
            *_scaling(monitor),
            *_own_functions(monitor),
            *_clearing(monitor),
            *monitor.loaders.patches(monitor.guarded, monitor.functions.shut),
        ]
        for owner, name, replacement in patches:
            stack.callback(setattr, owner, name, vars(owner)[name])
            patch = functools.wraps(getattr(owner, name))(replacement)
            setattr(owner, name, classmethod(patch) if isinstance(vars(owner)[name], classmethod) else patch)
        stack.callback(monitor.functions.close)
        # What torch.compile says of global hooks on modules: these do nothing where they are compiled.
        stack.enter_context(_unwarned())
        yield


@contextmanager
def _unwarned() -> Iterator[None]:
    """Set once: whenever filters change, Python shows warnings again that it has shown already."""
    entries = [("ignore", one, Warning, None, 0) for one in _OUR_DOING]
    warnings.filters[:0] = entries  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for entry in entries:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]
        warnings._filters_mutated()  # type: ignore[attr-defined]


def _modules(monitor: Monitor) -> list[Any]:
    def enter(module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and not monitor.goes_deeper(1):
            monitor.guarded(monitor.enters, module, args)

    def leave(module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
        # Where a forward pass raised, torch gives no keyword arguments.
        if not torch.compiler.is_compiling() and not monitor.goes_deeper(-1):
            kwargs = kwargs_and_output[0] if len(kwargs_and_output) > 1 else {}
            monitor.guarded(monitor.leaves, module, args, kwargs, kwargs_and_output[-1])

    return [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, with_kwargs=True, always_call=True),
    ]


def _optimizers(monitor: Monitor) -> list[Any]:
    def update_begins(optimizer: Any) -> None:
        wanted = monitor.wants(optimizer)
        shared = (
            monitor.shared(lambda: [p.grad for p in stepped(optimizer) if p.grad is not None], "norms")
            if wanted
            else None
        )
        _raise(monitor.guarded(monitor.update_begins, optimizer, shared))

    def begins(optimizer: Any, args: Any, kwargs: Any) -> Any:
        if _is_part_of_another(optimizer):
            return None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 and callable(args[1]) else None)
        if closure is None:
            update_begins(optimizer)
            return None

        @functools.wraps(closure)
        def looked_at() -> Any:
            result = closure()
            update_begins(optimizer)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": looked_at}
        return (args[0], looked_at, *args[2:]), kwargs

    def ends(optimizer: Any, args: Any, kwargs: Any) -> None:
        if _is_part_of_another(optimizer):
            return
        shared = monitor.shared(lambda: stepped(optimizer), "largest") if monitor.wants(optimizer) else None
        _raise(monitor.guarded(monitor.update_ends, optimizer, shared))

    return [register_optimizer_step_pre_hook(begins), register_optimizer_step_post_hook(ends)]


def _is_part_of_another(optimizer: Any) -> bool:
    """Whether it steps inside the step of an optimiser of the same parameters, as the base of SAM or Lookahead does."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer":
            outer = frame.f_locals.get("self")
            if outer is not None and outer is not optimizer:
                own = {id(p) for group in optimizer.param_groups for p in group["params"]}
                return any(id(p) in own for group in outer.param_groups for p in group["params"])
        frame = frame.f_back
    return False


def _backward(monitor: Monitor) -> list[tuple[Any, str, Any]]:
    original = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        if monitor.is_in_backward:
            original(*args, **kwargs)
            return
        monitor.guarded(monitor.backward_begins, args, kwargs)
        try:
            original(*args, **kwargs)
        finally:
            monitor.backward_ends()

    return [(torch.autograd, "backward", backward)]


def _clipping(monitor: Monitor) -> list[tuple[Any, str, Any]]:
    """Behind `clip_grad_norm_` as scripts import it, the norm is computed by a function of its module."""
    name = "_get_total_norm"
    original: Callable[..., Any] | None = getattr(clip_grad, name, None)
    if original is None:
        return []

    def get_total_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = list(tensors) if not isinstance(tensors, torch.Tensor) else [tensors]
        norm = original(tensors, *args, **kwargs)
        shared = monitor.shared(lambda: tensors, "norms") if is_sharded(norm) else None
        monitor.guarded(monitor.clips, tensors, norm, shared)
        return norm

    return [(clip_grad, name, get_total_norm)]


def _scaling(monitor: Monitor) -> list[tuple[Any, str, Any]]:
    scale, step = GradScaler.scale, GradScaler.step

    def scaled(scaler: Any, outputs: Any) -> Any:
        result = scale(scaler, outputs)
        monitor.guarded(monitor.scaled, scaler, outputs, result)
        return result

    def stepped(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        before = monitor.step
        result = step(scaler, optimizer, *args, **kwargs)
        if scaler.is_enabled() and monitor.step == before:
            _raise(monitor.guarded(monitor.skipped, optimizer, scaler))
        return result

    return [(GradScaler, "scale", scaled), (GradScaler, "step", stepped)]


def _clearing(monitor: Monitor) -> list[tuple[Any, str, Any]]:
    of_optimizer, of_module = torch.optim.Optimizer.zero_grad, nn.Module.zero_grad

    def optimizer_cleared(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        with monitor.functions.shut():
            of_optimizer(optimizer, *args, **kwargs)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        monitor.guarded(monitor.cleared, parameters)

    def module_cleared(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        with monitor.functions.shut():
            of_module(module, *args, **kwargs)
        monitor.guarded(monitor.cleared, list(module.parameters()))

    return [(torch.optim.Optimizer, "zero_grad", optimizer_cleared), (nn.Module, "zero_grad", module_cleared)]


def _own_functions(monitor: Monitor) -> list[tuple[Any, str, Any]]:
    """Functions with a backward of their own: torch hands them to no mode."""
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        if monitor.functions.is_open and not torch.compiler.is_compiling():
            monitor.guarded(monitor.program.function_called, cls.apply, args, kwargs, result)
        return result

    return [(torch.autograd.Function, "apply", apply)]


def _removed(handle: Any) -> None:
    """Takes a hook off, and what torch forgets: its marks as one of the hooks that are given keyword arguments."""
    handle.remove()
    for marks in (_global_forward_hooks_with_kwargs, _global_forward_hooks_always_called):
        marks.pop(handle.id, None)


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


_OUR_DOING = (re.compile("Using `torch.compile"), re.compile("flex_attention called without torch.compile"))
