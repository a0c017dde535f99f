"""Names of inputs and weights, as the user and the checkpoint know them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Weight(NamedTuple):
    """One parameter or persistent buffer: its facts, never its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int


def named_inputs(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, Tensor], ...]:
    """The tensors of a batch under the names of the forward's parameters; nested ones dotted."""
    names = _parameters(model)
    given = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(args)}
    return tuple(pair for name, value in {**given, **kwargs}.items() for pair in tensors_in(name, value))


def named_weights(model: Any) -> tuple[Weight, ...]:
    """Parameters and persistent buffers of a model, in order; none of a bare function."""
    return tuple(
        Weight(
            name,
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
            value.numel() * value.element_size(),
        )
        for name, value in named_tensors(model).items()
    )


def named_tensors(model: Any) -> dict[str, Tensor]:
    """The same by name, with their values."""
    if not isinstance(model, nn.Module):
        return {}
    return {clean(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def clean(name: str) -> str:
    """Paths as the checkpoint has them: without what torch.compile and activation checkpointing put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _parameters(model: Any) -> list[str]:
    forward = getattr(model, "forward", model)
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in positional]


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested arguments or outputs, with dotted names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from tensors_in(f"{name}.{number}", item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_in(f"{name}.{part.name}", getattr(value, part.name))


_WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))
