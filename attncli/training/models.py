"""The modules of a step as one model: without their wrappers, side by side, and with no gradients yet."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attncli.training.checks import is_sharded

if TYPE_CHECKING:
    from attncli.training.monitor import Monitor


class Roots:
    """The outermost modules that a script called."""

    def __init__(self) -> None:
        self.modules: list[weakref.ref[nn.Module]] = []
        # The modules that were looked for, and what holds them.
        self._holder: tuple[tuple[int, ...], weakref.ref[nn.Module] | None] = ((), None)

    def add(self, module: nn.Module) -> None:
        if not any(reference() is module for reference in self.modules):
            self.modules = [one for one in self.modules if one() is not None]
            self.modules.append(weakref.ref(module))

    def models(self) -> list[nn.Module]:
        """Those that are still there, without those inside others; the one that holds them all, if any does."""
        found = [module for reference in self.modules if (module := reference()) is not None]
        inner = {id(child) for module in found for child in module.modules() if child is not module}
        outer = [module for module in found if id(module) not in inner]
        holder = self._holder_of(outer)
        return [holder] if holder is not None else outer

    def _holder_of(self, modules: Sequence[nn.Module]) -> nn.Module | None:
        """A module that the script has at hand, and whose parts it calls: its names are those of the checkpoint."""
        key = tuple(map(id, modules))
        if self._holder[0] != key:
            found = _holding(modules) if modules else None
            self._holder = key, weakref.ref(found) if found is not None else None
        reference = self._holder[1]
        return reference() if reference is not None else None

    def called(self, modules: Sequence[nn.Module]) -> list[str]:
        """What the script calls these modules: the names of variables that hold them, or their classes."""
        wanted = {id(module): "" for module in modules}
        frame: Any = sys._getframe(1)
        while frame is not None:
            of_a_library = frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "attncli")
            for scope in () if of_a_library else (frame.f_locals, frame.f_globals):
                for name, value in list(scope.items()):
                    if wanted.get(id(value)) == "" and name != "self":
                        wanted[id(value)] = name
            frame = frame.f_back
        taken: list[str] = []
        for module in modules:
            name = wanted[id(module)] or type(module).__name__
            while name in taken:
                name += "_"
            taken.append(name)
        return taken

    def names(self) -> dict[int, str]:
        """Parameters by identity, named as their model names them; of several models, by class as well."""
        return {id(parameter): name for parameter, name in self.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[Tensor, str]]:
        models = [inside(one) for one in self.models() if next(one.parameters(), None) is not None]
        for module in models:
            for name, parameter in module.named_parameters():
                yield parameter, name if len(models) < 2 else f"{type(module).__name__}.{name}"

    def parameters(self) -> list[Tensor]:
        return [parameter for module in self.models() for parameter in module.parameters()]


def _holding(modules: Sequence[nn.Module]) -> nn.Module | None:
    """The smallest module that is alive and holds all of these as parts.

    Found among all objects: what the variables of a running function hold cannot be read without keeping it alive.
    """
    if any(is_sharded(one) for module in modules for one in module.parameters()):
        return None  # to put it together would copy whatever else it holds
    wanted = {id(inside(module)) for module in modules}
    best: tuple[int, nn.Module] | None = None
    for value in gc.get_objects():
        if nn.Module in type(value).__mro__ and id(value) not in wanted and vars(value).get("_modules"):
            parts = {id(part) for part in value.modules()}
            if wanted < parts and inside(value) is value and (best is None or len(parts) < best[0]):
                best = len(parts), value
    return best[1] if best is not None else None


def model_of(monitor: Monitor) -> nn.Module | None:
    """The model of a step: its outermost module, or several side by side under their names in the script."""
    called = {id(inside(module)) for module in monitor.program.modules()}
    found = [inside(module) for module in monitor.roots.models()]
    with_weights = [module for module in found if _has_state(module)]
    used = [module for module in with_weights if not called or called & {id(m) for m in module.modules()}]
    chosen = used or with_weights or found
    if len(chosen) < 2:
        return chosen[0] if chosen else None
    together = nn.Module()
    for name, module in zip(monitor.roots.called(chosen), chosen, strict=True):
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


def unrepeatable(called: Iterable[Any]) -> str | None:
    """The class of a wrapper inside these modules whose parameters only it can put together; None without one."""
    modules = (one for root in called if isinstance(root, nn.Module) for one in root.modules())
    return next((type(one).__name__ for one in modules if type(one).__name__ in _DIVIDED), None)


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
# FSDP1 and DeepSpeed: they keep parts of flattened parameters, which no module inside them can be called with.
_DIVIDED = frozenset(("FullyShardedDataParallel", "DeepSpeedEngine"))
_WRAPPERS: Mapping[str, str] = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
