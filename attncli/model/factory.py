"""The user's own code: `pkg.module:build`, `path/to/file.py:build`, and the weights that go into what it builds."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attncli.errors import ModelError
from attncli.model.contracts import ModelOptions, Progress, Runnable
from attncli.model.devices import (
    dtype_name,
    main_dtype,
    parameter_count,
    pick_autocast,
    pick_device,
    pick_dtype,
)
from attncli.model.faults import user_code


@dataclass(frozen=True, slots=True)
class Named:
    """An attribute of the user's code, and the folder that it needs on sys.path."""

    value: Any
    import_path: str


def load_code(spec: str, options: ModelOptions, progress: Progress | None = None) -> Runnable:
    """What `pkg.module:build` or `file.py:build` builds, with its weights, on its device."""
    device = pick_device(options.device)
    named = find_named(spec)
    with torch.random.fork_rng(devices=[]), on_path(named.import_path):
        # A model that is not given weights is the same one on every run.
        torch.default_generator.manual_seed(0)
        module = _build(spec, named.value)
        notes: list[str] = []
        if options.weights is not None:
            notes += _load_weights(spec, module, options, options.weights, progress)
        _refuse_empty(spec, module)
        with user_code(spec, "moving the model to its device", "Try another --device or --dtype.", module):
            module = module.to(device, pick_dtype(options.dtype) if options.dtype else None)
            module.train(options.train_mode)
    dtype = main_dtype(module)
    return Runnable(
        module=module,
        kind="code",
        path=spec,
        device=device,
        dtype=dtype_name(dtype) if dtype else None,
        configs=_configs(module),
        parameters=parameter_count(module),
        notes=tuple(notes),
        autocast=pick_autocast(options.autocast),
        import_path=named.import_path,
    )


def find_named(spec: str) -> Named:
    """The attribute that `pkg.module:name` or `file.py:name` names; the code around it runs."""
    place, _, name = spec.rpartition(":")
    if not place or not all(part.isidentifier() for part in name.split(".")):
        problem = f"the part after the last colon, {name!r}, is no name."
        raise ModelError(spec, problem, "Write file.py:build or pkg.module:build.")
    if place.endswith(".py") or "/" in place:
        file = Path(place)
        if not file.is_file():
            raise ModelError(
                spec, f"there is no file {place}.", "Check the path; it is relative to this folder."
            )
        folder = str(file.resolve().parent)
        with on_path(folder), user_code(spec, f"importing {file.name}", _IMPORT_REMEDY):
            found = _import_file(file)
    else:
        if not all(part.isidentifier() for part in place.split(".")):
            problem = "that is neither a file nor the name of a Python module."
            raise ModelError(
                spec, problem, "Write file.py:build or pkg.module:build, or give a path that exists."
            )
        folder = str(Path.cwd())
        with on_path(folder), user_code(spec, f"importing {place}", _IMPORT_REMEDY):
            found = pkgutil.resolve_name(place)
    value: Any = found
    for part in name.split("."):
        if not hasattr(value, part):
            known = [key for key, item in vars(found).items() if callable(item) and not key.startswith("_")]
            remedy = f"It defines: {', '.join(known[:20])}." if known else "It defines nothing callable."
            raise ModelError(spec, f"{place} has no {name}.", remedy)
        value = getattr(value, part)
    return Named(value, folder)


def callables_in(file: Path) -> list[str]:
    """Top-level functions and classes of a Python file, which is not run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


@contextlib.contextmanager
def on_path(folder: str | None) -> Iterator[None]:
    """`folder` first on sys.path, and gone again afterwards. What the user's code adds itself stays."""
    if folder is None:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


# --- importing and building ---------------------------------------------------------------------------


def _import_file(file: Path) -> ModuleType:
    """The file as a module of its own; as a part of its package where it imports relatively."""
    try:
        return _execute(file, f"attncli_user_{file.stem}")
    except ImportError as error:
        package = _package_of(file)
        if package is None or "relative import" not in str(error):
            raise
        with on_path(str(package[0])):
            module = pkgutil.resolve_name(package[1])
            if not isinstance(module, ModuleType):
                raise
            return module


def _execute(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _package_of(file: Path) -> tuple[Path, str] | None:
    """(folder above the outermost package, dotted name of the file in it)."""
    file = file.resolve()
    parts, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return (folder, ".".join(parts)) if len(parts) > 1 else None


def _build(spec: str, value: Any) -> nn.Module:
    built = value
    if not isinstance(value, nn.Module):
        if not callable(value):
            problem = f"it is a {type(value).__name__}, not a function that returns a torch.nn.Module."
            raise ModelError(spec, problem, "Name a function without arguments, or a module.")
        with user_code(
            spec, "building the model", "It is called without arguments: run it in Python to see why."
        ):
            built = value()
    if isinstance(built, torch.export.ExportedProgram):
        built = built.module()
    if not isinstance(built, nn.Module):
        problem = f"it returned {_described(built)}, not a torch.nn.Module."
        file = spec.rpartition(":")[0]
        script = f" To watch a training, run attncli nan-check {file}." if file.endswith(".py") else ""
        raise ModelError(spec, problem, f"Return the module alone.{script if built is None else ''}")
    return built


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value)}"
    return f"a {type(value).__name__}"


def _refuse_empty(spec: str, module: nn.Module) -> None:
    """Parameters without values cannot run, and moving them fails with less to say."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        problem = f"{len(empty)} tensors are on the meta device, without values: {_few(empty)}."
        raise ModelError(
            spec, problem, "Give their values with --weights CHECKPOINT, or build on a real device."
        )


def _configs(module: nn.Module) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """The settings that a module carries as `config`, if they are plain enough for a record."""
    config: Any = getattr(module, "config", None)
    values: Any = None
    if isinstance(config, Mapping):
        values = dict(config)
    elif hasattr(config, "to_json_string"):
        # transformers: to_dict() would keep dtypes as objects
        with contextlib.suppress(TypeError, ValueError):
            values = json.loads(config.to_json_string(use_diff=False))
    elif is_dataclass(config) and not isinstance(config, type):
        values = asdict(config)
    elif config is not None and hasattr(config, "__dict__") and not isinstance(config, type):
        values = vars(config)
    plain = {str(key): value for key, value in (values or {}).items() if _is_plain(value)}
    return (("the module's config", plain),) if plain else ()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


# --- weights ------------------------------------------------------------------------------------------


def _load_weights(
    spec: str,
    module: nn.Module,
    options: ModelOptions,
    read: Callable[[], Mapping[str, Tensor]],
    progress: Progress | None,
) -> list[str]:
    subject = options.weights_path or f"the weights of {spec}"
    if progress:
        progress("loading weights", 0, 1)
    weights = dict(read())
    # A module built on the meta device has nothing to copy into: it takes the tensors themselves.
    assign = any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            missing, unexpected = module.load_state_dict(weights, strict=False, assign=assign)
    except RuntimeError as error:
        raise ModelError(subject, _mis_shaped(module, weights, error), _SHAPE_REMEDY) from error
    missing = _really_missing(module, missing, weights)
    if progress:
        progress("loading weights", 1, 1)
    if not missing and not unexpected:
        return _dtype_note(module, weights)
    parts = [f"{len(missing)} missing ({_few(missing)})"] if missing else []
    parts += [f"{len(unexpected)} unexpected ({_few(unexpected)})"] if unexpected else []
    loaded = len(weights) - len(unexpected)
    problem = f"its names are not those of the model that {spec} builds: {' and '.join(parts)}"
    if loaded == 0 or options.strict:
        nothing = "; not one name fits" if loaded == 0 else ""
        hint = _prefix_hint(missing, unexpected) if loaded == 0 else ""
        remedy = hint or "Build the model that the weights were saved from" + (
            ", or pass --no-strict to run without them." if loaded else "."
        )
        raise ModelError(subject, f"{problem}{nothing}.", remedy)
    return [f"weights: {' and '.join(parts)}; what is missing keeps the values that the code gave it"]


def _mis_shaped(module: nn.Module, weights: Mapping[str, Tensor], error: RuntimeError) -> str:
    """Every tensor whose shape is not the model's."""
    shapes = {
        name: tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)
    }
    wrong = [
        f"{name} is {_shape(weights[name].shape)} and should be {_shape(shape)}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if not wrong:
        return f"loading it failed: {' '.join(str(error).split())[:600]}."
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    return f"{len(wrong)} tensors do not have the model's shapes: {'; '.join(wrong[:8])}{more}."


def _really_missing(module: nn.Module, missing: list[str], weights: Mapping[str, Tensor]) -> list[str]:
    """Names without a value in the weights, less those tied to a tensor that has one."""
    if not missing:
        return []
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    places = {_place(value) for name, value in state.items() if name in weights and value.numel()}
    return [name for name in missing if name not in state or _place(state[name]) not in places]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride())


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    """How to rename, where the two lists differ by one prefix only."""
    if not missing or not unexpected:
        return ""
    for long, short, more in ((unexpected, missing, "checkpoint's"), (missing, unexpected, "model's")):
        ends = [name for name in long if name.endswith(f".{short[0]}")]
        for name in ends:
            prefix = name[: -len(short[0])]
            if {f"{prefix}{item}" for item in short} <= set(long):
                whose = (
                    "inner module" if more == "model's" else f"module under a name: self.{prefix[:-1]} = …"
                )
                return f"The {more} names begin with {prefix!r}: return the {whose}."
    return ""


def _dtype_note(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    built = main_dtype(module)
    stored = {value.dtype for value in weights.values() if value.is_floating_point()}
    if built is None or not stored or built in stored:
        return []
    names = ", ".join(sorted(dtype_name(dtype) for dtype in stored))
    return [f"the weights are stored as {names}; the model that the code builds runs in {dtype_name(built)}"]


def _shape(shape: Any) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _few(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


_IMPORT_REMEDY = "Run that import in Python: the error must go away there first."
_SHAPE_REMEDY = "Build the model with the sizes that the weights were saved with."
