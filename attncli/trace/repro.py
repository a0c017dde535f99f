"""A small script that repeats one operator on the operands it had, without the model."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncli.errors import UsageError
from attncli.trace.confirm import Captured


def save(captured: Captured, path: Path) -> tuple[str, str]:
    """Writes `path` and, beside it, its tensors (`.pt`, readable with weights_only=True); returns both names."""
    if path.suffix != ".py":
        raise UsageError("--save-repro", f"{path} is no Python file.", "Give a name that ends in .py.")
    tensors: dict[str, Tensor] = {}
    given = [_written(value, tensors) for value in captured.args]
    given += [f"{name}={_written(value, tensors)}" for name, value in captured.kwargs.items()]
    beside = path.with_suffix(".pt")
    name = str(captured.func).replace("aten.", "torch.ops.aten.", 1)
    if not name.startswith("torch.ops"):
        name = f"torch.ops.{name}"
    call = ",\n    ".join(given)
    try:
        torch.save(tensors, beside)
        path.write_text(_SCRIPT.format(tensors=beside.name, name=name, call=call), encoding="utf-8")
    except (OSError, RuntimeError) as error:
        problem = f"{path} cannot be written: {getattr(error, 'strerror', None) or error}."
        raise UsageError("--save-repro", problem, "Give a path in a folder that you may write to.") from error
    return str(path), str(beside)


def _written(value: Any, tensors: dict[str, Tensor]) -> str:
    """A value as the script spells it; tensors are taken out and read from the file."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.cpu()
        return f't["{name}"]'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(item, tensors) for item in value)}]"
    if isinstance(value, float):
        return repr(value) if value - value == 0 else f'float("{value}")'
    if isinstance(value, torch.device):
        return 'torch.device("cpu")'
    if isinstance(value, enum.Enum):
        return str(value)
    return repr(value)


_SCRIPT = '''"""Repeats one operator whose operands are finite and whose result is not. Needs torch alone."""

from pathlib import Path

import torch

t = torch.load(Path(__file__).with_name("{tensors}"), weights_only=True)

for name, tensor in t.items():
    shown = f"{{tuple(tensor.shape)}} {{tensor.dtype}}"
    finite = bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() else True
    print(f"{{name}}: {{shown}}, finite: {{finite}}")

result = {name}(
    {call}
)

for number, output in enumerate(result if isinstance(result, (tuple, list)) else [result]):
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        nan, inf = int(output.isnan().sum()), int(output.isinf().sum())
        print(f"output {{number}}: {{tuple(output.shape)}} {{output.dtype}}, {{nan}} NaN and {{inf}} Inf")
'''
