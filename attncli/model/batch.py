"""The batch: a text, a file, the user's own callable, or a synthetic one made from what forward asks for."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncli.errors import ModelError
from attncli.model.contracts import Batch, BatchKind, BatchOptions, Runnable, placed
from attncli.model.devices import DTYPES, dtype_name
from attncli.model.factory import find_named, on_path
from attncli.model.faults import user_code
from attncli.model.signature import Forward, forward_of
from attncli.model.synthetic import synthetic
from attncli.model.tokens import text_batch


def make_batch(model: Runnable, options: BatchOptions | None = None) -> Batch:
    """A batch for `model`, on its device; floating tensors in the model's dtype. Errors: ModelError."""
    options = options or BatchOptions()
    for name, value in (("--seq-len", options.seq_len), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ModelError(f"{name} {value}", "a batch has at least one.", "Give a number of 1 or more.")
    if options.text and options.input:
        problem = "--text and --input both say what to feed the model."
        raise ModelError(model.path, problem, "Give one of them.")
    forward = forward_of(model)
    if options.text:
        texts = text_batch(model, forward, options)
        batch = _finished(model, forward, "text", (), texts.kwargs, options, texts.notes)
        return replace(batch, tokens=texts.tokens, decoder_tokens=texts.decoder_tokens)
    if options.input:
        kind, value = _given(options.input)
        args, kwargs = _arguments(options.input, value)
        _check_names(options.input, forward, args, kwargs)
        if model.example is not None:
            args, kwargs = _as_exported(forward, len(model.example[0]), args, kwargs)
        return _finished(model, forward, kind, args, kwargs, options)
    made = synthetic(model, forward, options)
    return _finished(model, forward, "synthetic", made.args, made.kwargs, options, made.notes)


def _finished(
    model: Runnable,
    forward: Forward,
    kind: BatchKind,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: BatchOptions,
    notes: tuple[str, ...] = (),
) -> Batch:
    dtype = DTYPES.get(model.dtype or "")
    args = tuple(placed(value, model.device, dtype) for value in args)
    kwargs = {name: placed(value, model.device, dtype) for name, value in kwargs.items()}
    named = [(forward.position(index), value) for index, value in enumerate(args)]
    inputs = {
        name: {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
        for root, value in (*named, *kwargs.items())
        for name, tensor in _tensors(root, value)
    }
    return Batch(args, kwargs, kind, inputs, None, notes, options.seed)


def _as_exported(
    forward: Forward, positional: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A torch.export program takes by position what it was exported with by position, whatever the names."""
    names = forward.positional[len(args) : positional]
    if any(name not in kwargs for name in names):
        return args, kwargs
    rest = {name: value for name, value in kwargs.items() if name not in names}
    return (*args, *(kwargs[name] for name in names)), rest


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}", item)


# --- what the user gives ------------------------------------------------------------------------------


def _given(spec: str) -> tuple[BatchKind, Any]:
    path = Path(spec)
    if path.is_file():
        if path.suffix == ".py":
            problem = "say which function of this file returns the batch."
            raise ModelError(spec, problem, f"Write {spec}:NAME.")
        return "file", _read(path)
    if path.exists():
        raise ModelError(spec, "this is a folder.", "Give a .pt, .safetensors, .npz or .json file.")
    if ":" not in spec:
        raise ModelError(
            spec, "there is no such file.", "Give a .pt, .safetensors, .npz or .json file, or file.py:batch."
        )
    named = find_named(spec)
    if not callable(named.value):
        return "callable", named.value
    remedy = "It is called without arguments: run it in Python to see why."
    with on_path(named.import_path), user_code(spec, "making the batch", remedy):
        return "callable", named.value()


def _read(path: Path) -> Any:
    """What a file holds, told by its bytes; nothing in it is executed."""
    remedy = "Save a dict of tensors with torch.save or safetensors, or write JSON."
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith(b"\x93NUMPY") or (start.startswith(b"PK") and _holds_arrays(path)):
            return _read_numpy(path)
        if start.startswith((b"PK", b"\x80")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        if start[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        return _from_json(str(path), json.loads(path.read_text(encoding="utf-8-sig")))
    except ModelError:
        raise
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or error}."
        raise ModelError(str(path), problem, "Check that you may read it.") from error
    except ValueError as error:
        problem = f"it is neither a torch, safetensors nor npz file, and no valid JSON: {error}."
        raise ModelError(str(path), problem, remedy) from error
    except Exception as error:
        # Whatever class the libraries have for a damaged file, or for a pickle that would run code.
        problem = f"its tensors cannot be read: {' '.join(str(error).split())[:300]}."
        raise ModelError(str(path), problem, remedy) from error


def _holds_arrays(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".npy") for name in archive.namelist())


def _read_numpy(path: Path) -> Any:
    try:
        import numpy as np
    except ImportError as error:
        problem = "this is a file of NumPy, which is not installed."
        raise ModelError(str(path), problem, "Install numpy, or save the batch with torch.save.") from error
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return torch.from_numpy(loaded)
    with loaded:
        return {name: torch.from_numpy(loaded[name]) for name in loaded.files}


def _from_json(subject: str, value: Any, name: str = "it") -> Any:
    """JSON with nested lists of numbers as tensors: integers int64, others float32."""
    if isinstance(value, dict):
        return {key: _from_json(subject, item, key) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if not value or any(isinstance(item, (str, dict)) for item in value):
        return [_from_json(subject, item, name) for item in value]
    try:
        return torch.tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        problem = f"the lists of {name} do not make a tensor: {' '.join(str(error).split())}."
        raise ModelError(subject, problem, "Give rows of equal length, of numbers only.") from error


def _arguments(subject: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(value, Mapping):
        return (), {str(key): item for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(value), {}
    if isinstance(value, Tensor):
        return (value,), {}
    problem = f"it gives {'nothing' if value is None else f'a {type(value).__name__}'}, which is no batch."
    raise ModelError(subject, problem, "Give a tensor, a tuple of arguments, or a dict of keyword arguments.")


def _check_names(subject: str, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Arguments that forward does not take, or that it needs and does not get."""
    takes = f"forward takes {forward.described()}."
    unknown = [] if forward.any_keyword else [name for name in kwargs if name not in forward.names]
    if unknown:
        problem = f"forward has no argument {', '.join(unknown)}."
        raise ModelError(subject, problem, f"Rename the keys: {takes}")
    if len(args) > len(forward.positional) and not forward.any_positional:
        problem = f"it gives {len(args)} arguments, and forward takes {len(forward.positional)}."
        raise ModelError(subject, problem, f"Give fewer, or a dict: {takes}")
    filled = {*forward.positional[: len(args)], *kwargs}
    twice = [name for name in forward.positional[: len(args)] if name in kwargs]
    missing = [item.name for item in forward.parameters if item.required and item.name not in filled]
    if missing or twice:
        problem = f"forward needs {', '.join(missing)}." if missing else f"{', '.join(twice)} is given twice."
        raise ModelError(subject, problem, f"Add what is missing: {takes}" if missing else "Give it once.")
