"""Where a training run is heard: torch's global hooks, and the few functions that have none.

Each replacement calls the original with what it was given, returns what that returned, and lets through what it
raises; what happens beside it goes through `Monitor.guarded`. On leaving, everything is as it was before.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from attncli.training.monitor import Monitor


@contextmanager
def hooked(monitor: Monitor) -> Iterator[None]:
    """The monitor hears everything until it is left."""
    with ExitStack() as stack:
        for handle in (*_modules(monitor), *_optimizers(monitor)):
            stack.callback(handle.remove)
        patches = [
            *_backward(monitor),
            *_clipping(monitor),
            *_scaling(monitor),
            *monitor.loaders.patches(monitor.guarded),
        ]
        for owner, name, replacement in patches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, functools.wraps(getattr(owner, name))(replacement))
        stack.callback(monitor.functions.close)
        # What torch.compile says of global hooks on modules: these do nothing where they are compiled.
        stack.enter_context(_unwarned())
        yield


@contextmanager
def _unwarned() -> Iterator[None]:
    entry = ("ignore", _OUR_DOING, Warning, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    warnings._filters_mutated()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if entry in warnings.filters:
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
            warnings._filters_mutated()  # type: ignore[attr-defined]


def _modules(monitor: Monitor) -> list[Any]:
    def enter(module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            monitor.guarded(monitor.enters, module)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            monitor.guarded(monitor.leaves, module, args, kwargs, output)

    return [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, with_kwargs=True, always_call=True),
    ]


def _optimizers(monitor: Monitor) -> list[Any]:
    def begins(optimizer: Any, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 and callable(args[1]) else None)
        if closure is None:
            _raise(monitor.guarded(monitor.update_begins, optimizer))
            return None

        @functools.wraps(closure)
        def looked_at() -> Any:
            result = closure()
            _raise(monitor.guarded(monitor.update_begins, optimizer))
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": looked_at}
        return (args[0], looked_at, *args[2:]), kwargs

    def ends(optimizer: Any, args: Any, kwargs: Any) -> None:
        _raise(monitor.guarded(monitor.update_ends, optimizer))

    return [register_optimizer_step_pre_hook(begins), register_optimizer_step_post_hook(ends)]


def _backward(monitor: Monitor) -> list[tuple[Any, str, Any]]:
    original = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        if monitor.is_in_backward:
            original(*args, **kwargs)
            return
        _raise(monitor.guarded(monitor.backward_begins, args, kwargs))
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
        _raise(monitor.guarded(monitor.clips, tensors, norm))
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


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


_OUR_DOING = re.compile(r"Using `torch.compile\(module\)` when there are global hooks")
