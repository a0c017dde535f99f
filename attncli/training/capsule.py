"""A folder that holds a training step: JSON and safetensors, so that reading it runs nothing.

    capsule.json         the schema, the program of the step, the environment, and facts such as the fault
    model.safetensors    parameters and buffers under the names that the user's model has for them
    batch.safetensors    inputs, and other tensors that were there before the step
    random.safetensors   the states of the random generators before it

What a program is, is for its reader to know: here it is JSON.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attncli.errors import AttncliError

SCHEMA = "attncli-capsule/1"


class Capsule(NamedTuple):
    """What a folder holds. `tensors`: of the model and the batch by name; `random`: states by generator."""

    program: Mapping[str, Any]
    environment: Mapping[str, Any]
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    random: Mapping[str, Tensor]


def check(folder: Path) -> None:
    """Errors: AttncliError where `folder` is something that a capsule must not take the place of."""
    if folder.is_symlink() and not folder.exists():
        raise AttncliError(str(folder), "it is a link to nothing.", "Give another folder to --capsule.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise AttncliError(str(folder), "it is a file, not a folder.", "Give another folder to --capsule.")
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _FILES)
    if foreign:
        problem = f"the folder holds other files ({', '.join(foreign[:_NAMED])}) and would be replaced."
        raise AttncliError(
            str(folder), problem, "Give --capsule an empty folder, or one that is not there yet."
        )
    if any(folder.iterdir()) and not (folder / CAPSULE).is_file():
        problem = "the folder holds tensors but is no capsule, and would be replaced."
        raise AttncliError(
            str(folder), problem, "Give --capsule an empty folder, or one that is not there yet."
        )


def write(
    folder: Path,
    program: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    random: Mapping[str, Tensor],
    *,
    model: frozenset[str],
    environment: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> tuple[str, ...]:
    """Writes all or nothing; an older capsule is replaced. Gives the names of the files.

    `model`: the names among `tensors` that belong to the model. `program`, `environment`, `facts`: JSON types.
    Errors: AttncliError.
    """
    check(folder)
    target = folder.resolve() if folder.is_symlink() else folder.absolute()
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    stored: dict[str, str] = {}
    head = {
        "schema": SCHEMA,
        "environment": dict(environment),
        "facts": dict(facts),
        "stored": stored,
        "program": dict(program),
    }
    try:
        fresh.mkdir(parents=True)
        try:
            own = {name: tensor for name, tensor in tensors.items() if name in model}
            rest = {name: tensor for name, tensor in tensors.items() if name not in model}
            for file, held in ((MODEL, own), (BATCH, rest), (RANDOM, random)):
                save_file(
                    {name: _storable(name, tensor, stored) for name, tensor in held.items()}, fresh / file
                )
            text = json.dumps(head, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
            (fresh / CAPSULE).write_text(text, encoding="utf-8")
            for file in (MODEL, BATCH, RANDOM):  # which come readable for their owner alone
                (fresh / file).chmod((fresh / CAPSULE).stat().st_mode)
            _put(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        problem = f"the capsule cannot be written: {getattr(error, 'strerror', None) or error}."
        raise AttncliError(str(folder), problem, "Give --capsule a folder that you may write to.") from error
    return tuple(str(folder / name) for name in _FILES)


def read(folder: Path) -> Capsule:
    """What `write` wrote. Nothing is executed. Errors: AttncliError for anything else."""
    head = _head(folder)
    parts: list[Any] = [head.get(name) for name in _PARTS]
    for name, part in zip(_PARTS, parts, strict=True):
        if not isinstance(part, dict):
            raise _damaged(folder, f"{CAPSULE} has no {name}")
    program, environment, facts, stored = parts
    tensors: dict[str, Tensor] = {}
    for file in (MODEL, BATCH):
        for name, tensor in _tensors(folder, file).items():
            if name in tensors:
                raise _damaged(folder, f"the tensor {name!r} is there twice")
            tensors[name] = tensor
    for name, dtype in stored.items():
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if not isinstance(known, torch.dtype) or name not in tensors or tensors[name].dtype != torch.uint8:
            raise _damaged(folder, f"the tensor {name!r} is not stored as {dtype!r}")
    return Capsule(program, environment, facts, tensors, _tensors(folder, RANDOM))


# --- writing ------------------------------------------------------------------------------------------


def _storable(name: str, tensor: Tensor, stored: dict[str, str]) -> Tensor:
    """A tensor that safetensors takes; one of another dtype as its bytes, which `stored` tells."""
    held = tensor.detach().cpu().contiguous()
    if held.dtype in _DTYPES:
        return held
    stored[name] = str(held.dtype).removeprefix("torch.")
    return held.reshape(-1).view(torch.uint8)


def _put(fresh: Path, target: Path) -> None:
    """Renames the finished folder; what stood there is gone only when the new one is in its place."""
    if not target.exists():
        fresh.rename(target)
        return
    older = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    target.rename(older)
    try:
        fresh.rename(target)
    except OSError:
        older.rename(target)
        raise
    shutil.rmtree(older, ignore_errors=True)


# --- reading ------------------------------------------------------------------------------------------


def _head(folder: Path) -> dict[str, Any]:
    path = folder / CAPSULE
    if not folder.is_dir():
        raise AttncliError(str(folder), "there is no such folder.", "Give the folder that --capsule wrote.")
    if not path.is_file():
        raise AttncliError(
            str(folder), f"there is no {CAPSULE} in it.", "Give the folder that --capsule wrote."
        )
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise _damaged(folder, f"{CAPSULE} is larger than any capsule's")
        head = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{CAPSULE} is no JSON") from error
    except OSError as error:
        problem = f"{CAPSULE} cannot be read: {error.strerror or error}."
        raise AttncliError(str(folder), problem, "Check that you may read the folder.") from error
    schema = head.get("schema") if isinstance(head, dict) else None
    if schema != SCHEMA:
        problem = f"its schema is {_shown(schema)}; this attncli reads {SCHEMA}."
        raise AttncliError(str(folder), problem, "Replay it with the attncli that wrote it.")
    return dict(head)


def _tensors(folder: Path, file: str) -> dict[str, Tensor]:
    path = folder / file
    if not path.is_file():
        raise _damaged(folder, f"there is no {file} in it")
    try:
        with safe_open(path, framework="pt") as held:
            return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise _damaged(folder, f"{file} cannot be read ({error})") from error


def _damaged(folder: Path, problem: str) -> AttncliError:
    return AttncliError(
        str(folder), f"the capsule is damaged: {problem}.", "Copy it again from where it was written."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


# --- tables -------------------------------------------------------------------------------------------

CAPSULE, MODEL, BATCH, RANDOM = "capsule.json", "model.safetensors", "batch.safetensors", "random.safetensors"
_FILES = (CAPSULE, MODEL, BATCH, RANDOM)
# What every release of safetensors that attncli takes can hold.
_DTYPES = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
)
_PARTS = ("program", "environment", "facts", "stored")
_LARGEST_JSON = 1 << 30
_NAMED = 3
_LONGEST = 60
