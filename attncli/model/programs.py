"""Self-contained programs: TorchScript archives and torch.export programs. Nothing of the user's is imported."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from attncli.errors import ModelError
from attncli.model.contracts import ModelOptions, Runnable
from attncli.model.devices import (
    dtype_name,
    main_dtype,
    parameter_count,
    pick_autocast,
    pick_device,
    pick_dtype,
)
from attncli.model.faults import user_code


def load_torchscript(path: Path, options: ModelOptions) -> Runnable:
    """A TorchScript archive on its device."""
    device = pick_device(options.device)
    with warnings.catch_warnings(), user_code(str(path), "loading it as TorchScript", _DAMAGED):
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the file is what it is
        load: Any = torch.jit.load
        module = load(str(path), map_location=device)
        if options.dtype:
            module.to(pick_dtype(options.dtype))
    with user_code(str(path), "setting its mode", "Save it again in the mode that you want.", module):
        # A frozen module has no mode left to set.
        if hasattr(module, "training"):
            module.train(options.train_mode)
    return _runnable(module, "torchscript", path, device, options)


def load_export(path: Path, options: ModelOptions) -> Runnable:
    """A torch.export program as a graph module on its device. Its dtypes are part of the graph."""
    if options.dtype:
        problem = "the dtypes of a torch.export program are part of its graph; --dtype cannot change them."
        raise ModelError(str(path), problem, "Export it in that dtype, or use --autocast.")
    if options.train_mode:
        problem = "the mode of a torch.export program is part of its graph; --train-mode cannot change it."
        raise ModelError(str(path), problem, "Export the model in train mode.")
    device = pick_device(options.device)
    with warnings.catch_warnings(), user_code(str(path), "loading it as a torch.export program", _DAMAGED):
        warnings.simplefilter("ignore")
        program = torch.export.load(str(path))
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module = program.module()
    return _runnable(module, "export", path, device, options, example=_example(program))


def _runnable(
    module: Any,
    kind: Any,
    path: Path,
    device: torch.device,
    options: ModelOptions,
    example: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
) -> Runnable:
    dtype = main_dtype(module)
    return Runnable(
        module=module,
        kind=kind,
        path=str(path),
        device=device,
        dtype=dtype_name(dtype) if dtype else None,
        configs=(),
        parameters=parameter_count(module),
        autocast=pick_autocast(options.autocast),
        example=example,
    )


def _example(program: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The inputs of the program as its own graph declares them: fake tensors with symbolic sizes where dynamic."""
    declared = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves = [
        declared.get(spec.arg.name, getattr(spec.arg, "value", None))
        for spec in program.graph_signature.input_specs
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT
    ]
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


_DAMAGED = "It is damaged, or made by another version of torch: export it again, with this one."
