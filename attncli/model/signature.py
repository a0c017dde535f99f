"""What forward asks for: the names of its arguments, and which layers read each of them.

Nothing runs here. A Python forward is read as source: `self.embed(tokens)` says that an embedding reads
`tokens`, `b, n, d = x.shape` that x has three axes. A TorchScript forward is read from its graph.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attncli.model.contracts import Runnable


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of forward. `annotation` as text, "" without one."""

    name: str
    required: bool
    annotation: str = ""


@dataclass(frozen=True, slots=True)
class Forward:
    """The arguments of a forward. `positional`: those that can be given by place, in order."""

    parameters: tuple[Parameter, ...]
    positional: tuple[str, ...]
    any_positional: bool = False
    any_keyword: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(item.name for item in self.parameters)

    @property
    def required(self) -> tuple[Parameter, ...]:
        return tuple(item for item in self.parameters if item.required)

    def position(self, index: int) -> str:
        """The name of the argument at that place."""
        return self.positional[index] if index < len(self.positional) else f"args.{index}"

    def described(self) -> str:
        """ "input_ids, attention_mask (optional)" """
        told = [item.name if item.required else f"{item.name} (optional)" for item in self.parameters]
        told += ["any others"] if self.any_positional or self.any_keyword else []
        return ", ".join(told) or "no argument"


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer that reads an argument. `place`: the argument's place or name in that layer's call."""

    module: Any
    place: int | str = 0


def forward_of(model: Runnable) -> Forward:
    """The arguments that the model's forward takes."""
    module = unwrapped(model.module)
    if model.example is not None:
        return _exported(module, *model.example)
    if isinstance(module, torch.jit.ScriptModule):
        return _scripted(module)
    return _python(module.forward if isinstance(module, nn.Module) else module)


def unwrapped(module: Any) -> Any:
    """The user's module below torch.compile and DataParallel, whose own forward takes anything."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            return module
        module = inner


def readers(module: Any, name: str) -> list[Reader]:
    """The innermost layers known to read the argument `name`, in the order of the code; [] where unknown."""
    if isinstance(module, torch.jit.ScriptModule):
        return list(_graph_readers(module, name))
    if isinstance(module, nn.Sequential):
        return list(_inner(module, 0, 0))
    return list(_source_readers(module, name, depth=0))


def rank(module: Any, name: str) -> int | None:
    """How many axes the code unpacks the argument's shape into: 3 for `b, n, d = x.shape`."""
    tree = _source(module)
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Tuple):
            value = ast.unparse(node.value)
            if value in (f"{name}.shape", f"{name}.size()"):
                targets = node.targets[0].elts
                return None if any(isinstance(item, ast.Starred) for item in targets) else len(targets)
    return None


# --- signatures ---------------------------------------------------------------------------------------


def _python(function: Any) -> Forward:
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return Forward((), (), any_positional=True, any_keyword=True)
    named = [item for item in given if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    empty = inspect.Parameter.empty
    return Forward(
        tuple(
            Parameter(
                item.name,
                item.default is empty,
                "" if item.annotation is empty else _text(item.annotation),
            )
            for item in named
        ),
        tuple(item.name for item in named if item.kind is not item.KEYWORD_ONLY),
        any(item.kind is item.VAR_POSITIONAL for item in given),
        any(item.kind is item.VAR_KEYWORD for item in given),
    )


def _text(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _scripted(module: Any) -> Forward:
    arguments = [item for item in module.forward.schema.arguments if item.name != "self"]
    parameters = tuple(
        Parameter(item.name, not item.has_default_value(), str(item.type)) for item in arguments
    )
    return Forward(parameters, tuple(item.name for item in parameters))


def _exported(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Forward:
    own = _python(module.forward)
    names = [item.name for item in own.parameters]
    positional = tuple(names[i] if i < len(names) else f"args_{i}" for i in range(len(args)))
    parameters = tuple(Parameter(name, True) for name in (*positional, *kwargs))
    return Forward(parameters, positional)


# --- who reads an argument ----------------------------------------------------------------------------


def _source_readers(module: Any, name: str, depth: int) -> Iterator[Reader]:
    tree = _source(module)
    if tree is None or depth > 6:
        return
    loops = {
        node.target.id: node.iter
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name)
    }
    names = {name}
    for node in _in_order(tree):
        if isinstance(node, ast.Assign) and _is_same(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if not isinstance(node, ast.Call):
            continue
        callee = _member(module, node.func, loops)
        if not isinstance(callee, nn.Module):
            continue
        for place, argument in [*enumerate(node.args), *((word.arg, word.value) for word in node.keywords)]:
            if place is not None and _is_same(argument, names):
                yield from _inner(callee, place, depth)


def _inner(callee: Any, place: int | str, depth: int) -> Iterator[Reader]:
    """The layer itself if it is torch's own; otherwise the layers in it that read the same argument."""
    if isinstance(callee, nn.Sequential) and len(callee):
        yield from _inner(callee[0], 0, depth + 1)
        return
    if not type(callee).__module__.startswith("torch.nn"):
        forward = _python(callee.forward)
        name = place if isinstance(place, str) else forward.position(place)
        found = list(_source_readers(callee, name, depth + 1))
        if found:
            yield from found
            return
    yield Reader(callee, place)


def _is_same(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is one of the names, or the same values in another dtype or on another device."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SAME:
        node = node.func.value
    return isinstance(node, ast.Name) and node.id in names


def _member(module: Any, node: ast.AST, loops: dict[str, ast.expr]) -> Any:
    """What `self.a.b`, `self.layers[0]` or a loop variable over `self.layers` is."""
    if isinstance(node, ast.Name):
        if node.id == "self":
            return module
        layers = _member(module, loops[node.id], {}) if node.id in loops else None
        return layers[0] if isinstance(layers, nn.ModuleList) and len(layers) else None
    if isinstance(node, ast.Attribute):
        owner = _member(module, node.value, loops)
        return getattr(owner, node.attr, None) if isinstance(owner, nn.Module) else None
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        owner = _member(module, node.value, loops)
        known = isinstance(owner, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
        return owner[node.slice.value] if known and node.slice.value in _keys(owner) else None
    return None


def _keys(owner: Any) -> list[Any]:
    return list(owner.keys()) if isinstance(owner, nn.ModuleDict) else list(range(len(owner)))


def _in_order(tree: ast.AST) -> list[ast.stmt | ast.expr]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.stmt, ast.expr))]
    return sorted(nodes, key=lambda node: (node.lineno, node.col_offset))


def _source(module: Any) -> ast.AST | None:
    """The syntax tree of a module's forward, None where its source is not at hand."""
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    except (OSError, TypeError, SyntaxError):
        return None


def _graph_readers(module: Any, name: str) -> Iterator[Reader]:
    """The submodules that a TorchScript graph hands an argument to."""
    try:
        graph = module.graph
    except RuntimeError:
        return
    value = next((item for item in list(graph.inputs())[1:] if item.debugName().split(".")[0] == name), None)
    if value is None:
        return
    for use in value.uses():
        node = use.user
        if node.kind() != "prim::CallMethod":
            continue
        callee = _script_member(module, next(iter(node.inputs())))
        if callee is None:
            continue
        arguments = [item.debugName() for item in list(node.inputs())[1:]]
        place = arguments.index(value.debugName())
        inner = [item.debugName().split(".")[0] for item in list(callee.graph.inputs())[1:]]
        found = list(_graph_readers(callee, inner[place])) if place < len(inner) else []
        yield from found or [Reader(callee, place)]


def _script_member(module: Any, value: Any) -> Any:
    node = value.node()
    if node.kind() != "prim::GetAttr":
        return module if node.kind() == "prim::Param" else None
    owner = _script_member(module, next(iter(node.inputs())))
    return getattr(owner, node.s("name"), None) if owner is not None else None


_SAME = ("to", "float", "long", "int", "half", "bfloat16", "double", "contiguous", "clone", "detach", "type")
