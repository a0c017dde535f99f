"""A synthetic batch: from the program's own declaration, from what transformers' config says, or from the code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attncli.errors import ModelError
from attncli.model.contracts import BatchOptions, Draw, Made, Runnable
from attncli.model.layers import (
    by_name,
    first_layer,
    length_limit,
    positions,
    read_by,
    refuse_longer,
    setting,
    vocabulary,
)
from attncli.model.pretrained import is_pretrained, pretrained_inputs
from attncli.model.signature import Forward, Parameter, unwrapped

SEQ_LEN = 128
BATCH_SIZE = 2


def synthetic(model: Runnable, forward: Forward, options: BatchOptions) -> Made:
    """A batch that forward accepts, as far as that can be told without running it. Errors: ModelError."""
    if model.example is not None:
        return _as_declared(model, options)
    module = unwrapped(model.module)
    if is_pretrained(module):
        return pretrained_inputs(module, forward, options)
    return _from_code(model.path, module, forward, options)


def _from_code(path: str, module: Any, forward: Forward, options: BatchOptions) -> Made:
    draw = Draw(options.seed)
    batch = options.batch_size or BATCH_SIZE
    length = options.seq_len or min(SEQ_LEN, length_limit(module) or SEQ_LEN)
    if vocabulary(module) is not None:
        refuse_longer(options.seq_len, positions(module))
    values: dict[str, Any] = {}
    unknown: list[Parameter] = []
    notes: list[str] = []
    # Parts of a diffusion model have defaults that they cannot run with.
    config = getattr(module, "config", None)
    diffuses = isinstance(config, Mapping) and "_use_default_values" in config
    for item in forward.parameters if diffuses else ():
        if not item.required and item.name in _DIFFUSION:
            size = setting(module, _DIFFUSION[item.name]) or (1000 if item.name == "timestep" else None)
            values.update({item.name: draw.ids((batch,), size)} if size else {})
    for item in forward.required:
        found = read_by(module, item, draw, batch, length)
        if found is None:
            found = by_name(module, item, draw, batch, length)
        if found is None:
            unknown.append(item)
        else:
            values[item.name] = found.value
            if found.note and found.note not in notes:
                notes.append(found.note)
    if len(unknown) == 1 and not any(isinstance(value, Tensor) for value in values.values()):
        guess = first_layer(module, draw, batch, length)
        if guess is not None:
            values[unknown[0].name] = guess.value
            unknown = []
    if unknown or (not forward.parameters and forward.any_positional):
        names = ", ".join(item.name for item in unknown) or "*args"
        problem = f"what forward wants as {names} cannot be told from its code and layers."
        keys = ", ".join(item.name for item in forward.required)
        remedy = "Give a batch with --input FILE or --input file.py:batch" + (
            f": a dict with the keys {keys}." if keys else "."
        )
        raise ModelError(path, problem, remedy)
    positional = [item.name for item in forward.required if item.name in forward.positional]
    args = tuple(values.pop(name) for name in positional)
    return Made(args, values, tuple(notes))


def _as_declared(model: Runnable, options: BatchOptions) -> Made:
    """Tensors of the sizes that the exported program was made for; its dynamic sizes as the options say."""
    args, kwargs = model.example or ((), {})
    draw = Draw(options.seed)
    size = vocabulary(model.module)
    fixed = False
    sizes: dict[str, int] = {}
    wanted = [options.batch_size, options.seq_len]

    def chosen(axis: int, length: Any) -> int:
        nonlocal fixed
        asked = wanted[axis] if axis < 2 else None
        if isinstance(length, int):
            fixed |= asked is not None and asked != length
            return length
        symbol = str(length.node.expr)
        if symbol not in sizes:
            sizes[symbol] = asked or (BATCH_SIZE if axis == 0 else SEQ_LEN)
            low, high = _bounds(length)
            sizes[symbol] = max(low, min(sizes[symbol], high))
        return sizes[symbol]

    def made(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = tuple(chosen(axis, length) for axis, length in enumerate(value.shape))
            if value.is_floating_point():
                return draw.floats(*shape).to(value.dtype)
            if value.dtype == torch.bool:
                return torch.ones(shape, dtype=torch.bool)
            return draw.ids(shape, size or 2).to(value.dtype)
        if isinstance(value, dict):
            return {key: made(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(made(item) for item in value)
        return value

    made_args, made_kwargs = (
        tuple(made(item) for item in args),
        {key: made(item) for key, item in kwargs.items()},
    )
    notes = ("the program has fixed sizes: --seq-len and --batch-size do not change them",) if fixed else ()
    return Made(made_args, made_kwargs, notes)


def _bounds(length: Any) -> tuple[int, int]:
    """The range of a symbolic size, as the program was exported with."""
    found = length.node.shape_env.var_to_range.get(length.node.expr) if length.node.shape_env else None
    if found is None:
        return 1, 1 << 30
    low, high = found.lower, found.upper
    return (int(low) if low.is_number and low.is_finite else 1), (int(high) if high.is_finite else 1 << 30)


_DIFFUSION: dict[str, tuple[str, ...]] = {
    "timestep": (),
    "class_labels": ("num_embeds_ada_norm", "num_class_embeds"),
}
