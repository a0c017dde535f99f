"""MODEL and options → something that runs, and a batch for it.

A MODEL is a folder with config.json, a GGUF file, a self-contained program (TorchScript, torch.export) or the
user's own code. This room must not know what is looked for in the run.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from attncli.errors import BareCheckpointError, ModelError
from attncli.model import training
from attncli.model.batch import make_batch
from attncli.model.contracts import Batch, BatchOptions, ModelOptions, Progress, Runnable
from attncli.model.devices import available_devices
from attncli.model.factory import callables_in, load_code
from attncli.model.huggingface import load_adapter, load_folder, load_gguf
from attncli.model.programs import load_export, load_torchscript
from attncli.model.running import run

__all__ = [
    "Batch", "BatchOptions", "ModelOptions", "Progress", "Runnable", "available_devices", "load_model",
    "make_batch", "run", "training",
]  # fmt: skip


def load_model(spec: str, options: ModelOptions | None = None, progress: Progress | None = None) -> Runnable:
    """The model that MODEL names, ready to be called. Errors: ModelError."""
    options = options or ModelOptions()
    path = Path(spec)
    try:
        if path.is_dir():
            runnable = _load_folder(path, options, progress)
        elif path.is_file():
            runnable = _load_file(path, options, progress)
        elif ":" in spec:
            return load_code(spec, options, progress)
        else:
            raise ModelError(spec, "there is no such file or folder.", _missing_remedy(spec))
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or error}."
        raise ModelError(spec, problem, "Check that the file is there and that you may read it.") from error
    return runnable


def _load_folder(folder: Path, options: ModelOptions, progress: Progress | None) -> Runnable:
    _refuse_weights(str(folder), options)
    ggufs = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() and not (ggufs and not _has_other_weights(folder)):
        return load_folder(folder, options, progress)
    if len(ggufs) == 1:
        return load_gguf(ggufs[0], options, progress)
    if ggufs:
        names = ", ".join(path.name for path in ggufs)
        raise ModelError(str(folder), f"it holds several GGUF files: {names}.", "Give one of them.")
    if (folder / "adapter_config.json").is_file():
        return load_adapter(folder, options, progress)
    if (folder / "model_index.json").is_file():
        problem = "this is a diffusers pipeline, which is several models."
        raise ModelError(str(folder), problem, "Write a file.py:build that loads and returns one of them.")
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if inner:
        names = ", ".join(str(path) for path in inner[:5])
        raise ModelError(str(folder), "it holds no config.json itself.", f"Models may lie in: {names}.")
    problem = "it holds no config.json, so nothing says what to build from its files."
    raise BareCheckpointError(str(folder), problem, _bare(str(folder)))


def _load_file(path: Path, options: ModelOptions, progress: Progress | None) -> Runnable:
    kind = _file_kind(path)
    if kind == "python":
        known = ", ".join(f"{path.name}:{name}" for name in callables_in(path)[:10])
        remedy = f"It defines: {known}." if known else "Write a function in it that returns the model."
        raise ModelError(str(path), "say which function of this file builds the model.", remedy)
    _refuse_weights(str(path), options)
    if kind in _PROGRAMS:
        return _PROGRAMS[kind](path, options, progress)
    if kind == "empty":
        raise ModelError(str(path), "the file is empty.", "Download or copy it again.")
    if path.name == "config.json":
        raise ModelError(str(path), "this is the config of a model.", f"Give its folder: {path.parent}.")
    problem = "this is a checkpoint: it holds weights, but nothing says what to build from them."
    if kind == "weights":
        raise BareCheckpointError(str(path), problem, _bare(str(path)))
    if kind == "damaged":
        problem = "this is a zip archive that is cut short or damaged."
        raise ModelError(str(path), problem, "Download or copy it again.")
    if kind == "unknown":
        with path.open("rb") as file:
            begins = file.read(8)
        problem = f"the file begins with {begins!r}, which is no known kind of model."
    raise ModelError(str(path), problem, _bare(str(path)))


def _file_kind(path: Path) -> str:
    """What a file is, by its bytes; the suffix decides only that a text is Python."""
    if path.suffix == ".py":
        return "python"
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "empty"
    if start[:4] in (b"GGUF", b"FUGG"):
        return "gguf"
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.partition("/")[2] or name for name in archive.namelist()]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return "damaged"
        # A torch.export archive may hold TorchScript's members as well: the more telling first.
        if {"archive_format", "serialized_exported_program.json"} & set(names):
            return "export"
        if "constants.pkl" in names:
            return "torchscript"
        return "weights"
    if start[8:9] == b"{" or start[:1] == b"\x80":
        return "weights"
    return "unknown"


def _has_other_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def _refuse_weights(spec: str, options: ModelOptions) -> None:
    if options.weights is not None:
        problem = "--weights goes with a model built by code; this one has its own weights."
        raise ModelError(spec, problem, "Leave --weights out, or give pkg.module:build or file.py:build.")


def _missing_remedy(spec: str) -> str:
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        return "A model of a hub must be downloaded first (hf download NAME --local-dir FOLDER): give the folder."
    return "Give a folder with config.json, a .gguf, .pt or .pt2 file, pkg.module:build or file.py:build."


def _bare(path: str) -> str:
    return (
        f"Write a function that builds the model and pass it: file.py:build --weights {path}; or put the "
        "config.json of a Hugging Face model beside the weights and give the folder."
    )


def _without_progress(
    load: Callable[[Path, ModelOptions], Runnable],
) -> Callable[[Path, ModelOptions, Progress | None], Runnable]:
    return lambda path, options, progress: load(path, options)


_PROGRAMS: dict[str, Callable[[Path, ModelOptions, Progress | None], Runnable]] = {
    "gguf": load_gguf,
    "torchscript": _without_progress(load_torchscript),
    "export": _without_progress(load_export),
}
