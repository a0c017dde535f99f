"""Operators and their arguments as plain data, and back: the only way in which a record calls anything."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from attncli.errors import AttncliError
from attncli.trace.origins import Place


def plain_value(
    value: Any, tensor: Callable[[Tensor], Any], generator: Callable[[torch.Generator], Any]
) -> Any:
    """An argument as JSON types; `tensor` and `generator` say what stands for one. Errors: TypeError names the type."""
    if isinstance(value, Tensor):
        return tensor(value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": _spelled(value)}
    if isinstance(value, complex):
        parts = (value.real, value.imag)
        return {"complex": [part if math.isfinite(part) else _spelled(part) for part in parts]}
    if isinstance(value, (list, tuple)):
        return [plain_value(item, tensor, generator) for item in value]
    if isinstance(value, torch.Generator):
        return generator(value)
    for kind, known in _KINDS.items():
        if isinstance(value, known):
            return {kind: str(value).removeprefix("torch.")}
    raise TypeError(f"a {type(value).__name__}, which cannot be written down")


def value_of(plain: Any, device: Callable[[str], torch.device], special: Callable[[str, Any], Any]) -> Any:
    """The argument again. `special`: what stands for {"slot": …} and {"generator": …}. Errors: ValueError."""
    if plain is None or isinstance(plain, (bool, int, float, str)):
        return plain
    if isinstance(plain, (list, tuple)):
        return [value_of(item, device, special) for item in plain]
    if not isinstance(plain, Mapping) or len(plain) != 1:
        raise ValueError("an argument is of no known kind")
    kind, value = next(iter(plain.items()))
    if kind in ("slot", "generator"):
        return special(kind, value)
    if kind == "float" and value in _SPELLED:
        return float(value)
    if kind == "complex" and isinstance(value, list) and len(value) == 2:
        return complex(*(_number(part) for part in value))
    if kind == "device" and isinstance(value, str):
        return device(value)
    if kind in _KINDS and isinstance(value, str):
        found = getattr(torch, value, None)
        if isinstance(found, _KINDS[kind]):
            return found
    raise ValueError(f"{kind!r} of an argument is not known")


def dtype_of(name: str) -> torch.dtype:
    """Errors: ValueError."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def operator_of(name: str, subject: str, trust: bool) -> Any:
    """The operator of that name. Errors: AttncliError where it is unknown, or none that only computes."""
    parts = name.split(".")
    namespace = parts[0]
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        raise AttncliError(subject, f"{name!r} is no name of an operator.", _DAMAGED)
    if namespace not in _OWN and not trust:
        problem = f"it calls {name}, which is not an operator of torch itself."
        remedy = "If you trust the capsule, pass --trust: that imports the library that defines it."
        raise AttncliError(subject, problem, remedy)
    if namespace in _OWN and parts[1] in _NEVER:
        raise AttncliError(
            subject, f"it calls {name}, which no training step needs.", "Do not use this capsule."
        )
    packet = getattr(getattr(torch.ops, namespace), parts[1], None)
    found = getattr(packet, parts[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    # What the dispatcher does not know are functions of TorchScript, some of which read and write files.
    if not isinstance(found, torch._ops.OpOverload) or not torch._C._dispatch_has_kernel(found.name()):
        problem = f"the operator {name} is not in torch {torch.__version__}."
        remedy = "Replay it with the torch that wrote it, or install the library that defines the operator."
        raise AttncliError(subject, problem, remedy)
    return found


def import_libraries(names: Iterable[str], subject: str) -> None:
    """Imports the modules that define operators which are not torch's. Errors: AttncliError."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module does on import
            problem = f"the library {name}, which defines its operators, cannot be imported: {error}."
            raise AttncliError(subject, problem, "Install it, or add its folder to PYTHONPATH.") from error


def library_of(func: Any) -> str | None:
    """The module that defines an operator, where that is not torch and is known."""
    if func.namespace in _OWN:
        return None
    from torch._library.custom_ops import OPDEFS

    defined = OPDEFS.get(func._schema.name)
    function = getattr(defined, "_init_fn", None)
    module = getattr(function, "__module__", None)
    return module if isinstance(module, str) and module != "__main__" else None


def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def place_in_file(place: Place | None) -> tuple[str, int] | None:
    """A line with its file as it is shown: another machine has other folders."""
    return (str(place).rpartition(":")[0], place.line) if place is not None else None


def _spelled(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _number(value: Any) -> float:
    if isinstance(value, (int, float)) or value in _SPELLED:
        return float(value)
    raise ValueError("a complex number has parts that are no numbers")


# --- tables -------------------------------------------------------------------------------------------

_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_SPELLED = ("nan", "inf", "-inf")
_OWN = frozenset(("aten", "prims"))
# Operators of torch's own that reach beyond their tensors: a file, standard output.
_NEVER = frozenset(("from_file", "_print"))
_DAMAGED = "Copy it again from where it was written."
